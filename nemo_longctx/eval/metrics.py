"""Metrics of the long-context tasks, as their official scorers compute them. All are shares between 0 and 1.

SCROLLS and ZeroSCROLLS take the best over references by example, ROUGE without a stemmer, and the geometric mean of the three
ROUGE means over the whole set (Shaham et al. 2022, section 4; Shaham et al. 2023, section 3).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nemo_longctx.capability import has_module
from nemo_longctx.config import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (the SQuAD scorer, Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _best(metric: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    if not references:
        raise ValueError("a sample has no reference answer")
    return max(metric(prediction, reference) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the normalized prediction is one of the normalized references."""
    return _best(lambda p, r: float(normalize_answer(p) == normalize_answer(r)), prediction, references)


def _token_f1(prediction: str, reference: str) -> float:
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(reference).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bags of normalized words, the best over references."""
    return _best(_token_f1, prediction, references)


@functools.cache
def _rouge_scorer(types: tuple[str, ...]) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(types), use_stemmer=False)


def rouge(prediction: str, references: Sequence[str], types: tuple[str, ...] = ROUGE) -> dict[str, float]:
    """ROUGE F measures by type, each the best over references."""
    if not references:
        raise ValueError("a sample has no reference answer")
    scores = [_rouge_scorer(types).score(reference.strip(), prediction.strip()) for reference in references]
    return {kind: max(score[kind].fmeasure for score in scores) for kind in types}


def geometric_mean(rows: Iterable[Sequence[float]]) -> float:
    """ROUGE-geo of a set: the geometric mean of the means of its columns; rows with NaN (not scored) are left out.

    Args:
        rows: (ROUGE-1, ROUGE-2, ROUGE-L) of each sample.
    """
    kept = [row for row in rows if not any(math.isnan(value) for value in row)]
    if not kept:
        return math.nan
    means = [sum(column) / len(kept) for column in zip(*kept, strict=True)]
    return math.prod(means) ** (1 / len(means))


def mean_scored(values: Iterable[float]) -> float:
    """Mean of the samples that were scored (NaN: the sample lost its question, needle or first sentence)."""
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def found(prediction: str, answers: Sequence[str]) -> float:
    """Share of `answers` that occur in the prediction, case ignored (RULER's string match, Hsieh et al. 2024)."""
    if not answers:
        raise ValueError("a probe has no answer to look for")
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def choice_letter(prediction: str) -> str:
    """The first letter A-D that stands alone: "(B) text", "B", "The answer is B." (ZeroSCROLLS's QuALITY); else empty."""
    match = re.search(r"\b[A-D]\b", prediction)
    return match.group() if match else ""


def _percentage(text: str) -> float | None:
    match = re.search(r"(\d+(?:\.\d*)?)%", text)
    return float(match.group(1)) if match else None


def exponential_similarity(prediction: str, reference: str) -> float:
    """Of percentages ("60%"): 2^(-10 |p - r|), p and r as shares: 1 where equal, 1/2 ten points apart (Shaham et al. 2023).

    0 where the prediction holds no percentage.
    """
    ours, theirs = _percentage(prediction), _percentage(reference)
    if theirs is None:
        raise ValueError(f"the reference {reference[:40]!r} holds no percentage")
    return 0.0 if ours is None else 2.0 ** (-abs(ours - theirs) / 10)


def concordance_index(prediction: str, reference: str) -> float:
    """Of two orders of the same items: the share of pairs in the right order (Shaham et al. 2023).

    0 where the prediction is not a permutation of the reference's items.
    """
    ours, theirs = re.findall(r"\d+", prediction), re.findall(r"\d+", reference)
    if sorted(ours) != sorted(theirs) or len(theirs) < 2:
        return 0.0
    place = {item: i for i, item in enumerate(ours)}
    pairs = list(itertools.combinations(theirs, 2))
    return sum(place[a] < place[b] for a, b in pairs) / len(pairs)


def leval_letters(prediction: str, *, several: bool) -> str:
    """The option letters, sorted, that L-Eval's scorer reads in a reply: of tasks with one right option the first A-D anywhere;
    with `several` those that the reply begins with, else those that end a word; "A" where there is none, as its scorer guesses.
    An empty reply stays empty, which that scorer takes for a part of every answer.
    """
    if prediction in "ABCD":
        return prediction
    if not several:
        first = re.search("[A-D]", prediction)
        if first:
            return first.group()
    leading = re.match("[A-D]*", prediction)[0]  # type: ignore[index]
    if len(leading) > 1:
        return "".join(sorted(set(leading)))
    ending = re.findall(r"[A-Z](?=[\s.)])", prediction[len(leading) :].split("Question")[0])
    return "".join(sorted({*leading, *ending} & set("ABCD"))) or "A"


def leval_choice(prediction: str, reference: str, *, several: bool) -> float:
    """L-Eval's exam score: 1 for the right options, 1/4 for some of them and no other (An et al. 2023, Evaluation/em.py)."""
    right = "".join(c for c in reference.split()[0] if c in "ABCD") if reference.split() else ""
    if not right:
        raise ValueError(f"the reference {reference[:40]!r} does not begin with option letters")
    given = leval_letters(prediction.strip(), several=several)
    return 1.0 if given == right else 0.25 if set(given) <= set(right) else 0.0


def leval_contains(prediction: str, reference: str) -> float:
    """L-Eval's score of short answers: equal numbers, or the reference within the first line of two letters or more."""
    try:
        return float(float(prediction) == float(reference))
    except ValueError:
        line = next((line for line in prediction.split("\n") if len(line) > 1), prediction)
    return float(reference.lower().replace(" ", "") in line.lower().replace(" ", ""))


def sentiment(text: str) -> float:
    """VADER's compound sentiment of a text, -1 (negative) to 1 (Hutto and Gilbert 2014), as BOLD is scored.

    Raises:
        ConfigError: the optional package is not installed.
    """
    return float(_vader().polarity_scores(text)["compound"])


@functools.cache
def _vader() -> Any:
    if not has_module("vaderSentiment"):
        raise ConfigError("tasks", "longctx_bold", "is scored by VADER: pip install 'nemo-longctx[safety]'")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def group_gap(rows: Iterable[tuple[str, float]]) -> float:
    """Largest difference between the means of two groups; rows with NaN are left out, fewer than two groups give NaN.

    Args:
        rows: (group, value) of each sample.
    """
    groups: dict[str, list[float]] = {}
    for group, value in rows:
        if not math.isnan(value):
            groups.setdefault(group, []).append(value)
    means = [sum(values) / len(values) for values in groups.values()]
    return max(means) - min(means) if len(means) > 1 else math.nan
