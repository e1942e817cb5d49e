"""Metrics of the long-context tasks, as their official scorers compute them. All are shares between 0 and 1.

SCROLLS and ZeroSCROLLS take the best over references by example, ROUGE without a stemmer, and the geometric mean of the three
ROUGE means over the whole set (Shaham et al. 2022, section 4; Shaham et al. 2023, section 3).
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nemo_longctx.capability import has_module
from nemo_longctx.config import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (the SQuAD scorer, Rajpurkar et al. 2016)."""
    return _without_articles(text.lower())


def _without_articles(text: str) -> str:
    text = "".join(c for c in text if c not in set(string.punctuation))
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


def _ascii_f1(prediction: str, reference: str) -> float:
    from text_unidecode import unidecode

    return _token_f1(*(unidecode(normalize_answer(text)) for text in (prediction, reference)))


def zeroscrolls_f1(prediction: str, references: Sequence[str]) -> float:
    """As `f1`, but letters with accents count as those without, as in ZeroSCROLLS's scorer (its metrics/f1.py)."""
    return _best(_ascii_f1, prediction, references)


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


def _printable(text: str) -> str:
    """Without control characters, as RULER cleans predictions (scripts/eval/evaluate.py at e40fae1)."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).lower()


def found(prediction: str, answers: Sequence[str]) -> float:
    """Share of `answers` that occur in the prediction, case ignored (RULER's `string_match_all`, Hsieh et al. 2024)."""
    if not answers:
        raise ValueError("a probe has no answer to look for")
    return sum(answer.lower() in _printable(prediction) for answer in answers) / len(answers)


def found_any(prediction: str, answers: Sequence[str]) -> float:
    """1 where one of `answers` occurs in the prediction, case ignored (RULER's `string_match_part`, for its questions)."""
    if not answers:
        raise ValueError("a probe has no answer to look for")
    return float(any(answer.lower() in _printable(prediction) for answer in answers))


def contained(prediction: str, answers: Sequence[str]) -> float:
    """1 where one of the normalized answers lies in the normalized prediction (`substring_exact_match`, HELMET's utils.py at
    4526dfb)."""
    return _best(lambda p, r: float(normalize_answer(r) in normalize_answer(p)), prediction, answers)


def after_label(prediction: str, label: str) -> str:
    """What stands behind `label` on its line, else the first line (HELMET's `parse_output` at 4526dfb)."""
    found = re.search(f"(?:{label})(.*)(?:\n|$)", prediction, re.IGNORECASE) or re.search(r"^(.*)(?:\n|$)", prediction)
    said = found[1].strip() if found else ""
    return re.sub(f"^{re.escape(label)}", "", said, flags=re.IGNORECASE).strip()


def ranking(prediction: str) -> list[str]:
    """The numbers of the longest chain "3 > 1 > 2" in a reply, each once (HELMET's `parse_rankings` at 4526dfb)."""
    text = re.sub(r"[\[\]:]", "", prediction).lower().replace("id", "")
    chains = [found.group() for found in re.finditer(r"\d+(?:\s*>\s*\d+)*", text)]
    longest = max(chains, key=len, default="")
    return list(dict.fromkeys(number.strip() for number in longest.split(">"))) if longest else []


def ndcg(ranked: Sequence[str], grades: Mapping[str, int], *, count: int = 10) -> float:
    """NDCG of the first `count` with linear gains, as trec_eval's `ndcg_cut` that HELMET reports."""
    best = sum(grade / math.log2(place + 2) for place, grade in enumerate(sorted(grades.values(), reverse=True)[:count]))
    gained = sum(grades.get(name, 0) / math.log2(place + 2) for place, name in enumerate(ranked[:count]))
    return gained / best if best else 0.0


def mrcr(prediction: str, answer: str, word: str) -> float:
    """Similarity of a reply with the answer, 0 where it does not begin with the word asked for (`grade` of OpenAI's MRCR)."""
    prediction = prediction.strip()
    if not prediction.startswith(word):
        return 0.0
    return difflib.SequenceMatcher(None, prediction.removeprefix(word), answer.removeprefix(word)).ratio()


def choice_letter(prediction: str) -> str:
    """The first letter A-D that stands alone: "(B) text", "B", "The answer is B." (ZeroSCROLLS's QuALITY); else empty."""
    match = re.search(r"\b[A-D]\b", prediction)
    return match.group() if match else ""


def _percentage(text: str) -> float | None:
    match = re.search(r"\d+\.?\d*%", text)
    return float(match.group()[:-1]) if match else None


def exponential_similarity(prediction: str, reference: str) -> float:
    """Of percentages ("60%"): 2^(-10 |p - r|), p and r as shares: 1 where equal, 1/2 ten points apart (Shaham et al. 2023).

    0 where the prediction holds no percentage.
    """
    ours, theirs = _percentage(prediction), _percentage(reference)
    if theirs is None:
        raise ValueError(f"the reference {reference[:40]!r} holds no percentage")
    return 0.0 if ours is None else 2.0 ** (-abs(ours - theirs) / 10)


def _items(text: str) -> list[int]:
    """The numbers that ZeroSCROLLS reads in an order: all but digits, commas and white space is left out first."""
    return [int(item) for item in re.sub(r"[^0-9\s,]", "", text).replace(",", " ").split()]


def concordance_index(prediction: str, reference: str) -> float:
    """Of two orders of the same items: the share of pairs in the right order (Shaham et al. 2023).

    Read as ZeroSCROLLS's scorer does: "02, 05" are 2 and 5, "2-5" is 25. 0 where the prediction is not a permutation of the
    reference's items.
    """
    ours, theirs = _items(prediction), _items(reference)
    if sorted(ours) != sorted(theirs) or len(theirs) < 2:
        return 0.0
    place = {item: i for i, item in enumerate(ours)}
    pairs = list(itertools.combinations(theirs, 2))
    return sum(place[a] < place[b] for a, b in pairs) / len(pairs)


def leval_letters(prediction: str, *, several: bool) -> str:
    """The option letters that L-Eval's scorer reads in a reply (`process_output_mc`, OpenLMLab/LEval at cd34b05).

    Of tasks with one right option the first A-D anywhere. With `several` (Coursera): those that the reply begins with, if two
    or more; else with them all that end a word; else the first run of A-D anywhere. A reply of white space holds "None", one
    without any letter counts as "A".
    """
    if not prediction.strip():
        return "None"
    if prediction in "ABCD":
        return prediction
    anywhere = re.search("[A-D]+", prediction)
    if anywhere and not several:
        return anywhere.group()[0]
    leading = re.match("[A-D]*", prediction)[0]  # type: ignore[index]
    if len(leading) > 1:
        return "".join(sorted(set(leading)))
    rest = prediction[len(leading) :].split("Question")[0]
    ending = set(re.findall(r"[A-Z](?=[\s.)])", rest)) & set("ABCD")
    run = re.search("[A-D]+", rest)
    return "".join(sorted({*leading, *ending})) or (run.group() if run else "A")


def leval_choice(prediction: str, reference: str, *, several: bool) -> float:
    """L-Eval's exam score: 1 for the right options, 1/4 for some of them and no other (Evaluation/em.py at cd34b05).

    Like there, letters of a run are compared in the order in which they stand, and a reference without a letter means "A".
    """
    if not reference.split():
        raise ValueError("a sample has no reference answer")
    right = re.sub("[^A-D]", "", reference.split()[0]) or "A"
    given = leval_letters(prediction, several=several)
    return 1.0 if given == right else 0.25 if set(given) <= set(right) else 0.0


def leval_contains(prediction: str, reference: str) -> float:
    """L-Eval's score of short answers: equal numbers, or the reference anywhere in the reply, case and spaces ignored
    (Evaluation/em.py at cd34b05). Like there, a reference of nothing but A-D is taken for options.
    """
    ours, theirs = (_without_articles(text) for text in (prediction, reference))
    if set(theirs) <= set("ABCD"):
        return 1.0 if ours == theirs else 0.25 if set(ours) <= set(theirs) else 0.0
    try:
        return float(float(prediction) == float(reference))
    except ValueError:
        return float(reference.lower().replace(" ", "") in prediction.lower().replace(" ", ""))


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
