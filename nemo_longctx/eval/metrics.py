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
    """The letter A-D that an answer gives: "(B) text", "B", "The answer is B." (ZeroSCROLLS's QuALITY); else empty."""
    match = re.search(r"\(([A-D])\)", prediction) or re.search(r"\b([A-D])\b", prediction)
    return match.group(1) if match else ""


def _first_integer(text: str) -> float | None:
    match = re.search(r"-?\d+(?:\.\d+)?", text)
    return float(match.group()) if match else None


def exponential_similarity(prediction: str, reference: str) -> float:
    """Of percentages: 2^(-10 |p - r|), p and r as shares: 1 where equal, 1/2 ten points apart (Shaham et al. 2023)."""
    ours, theirs = _first_integer(prediction), _first_integer(reference)
    if theirs is None:
        raise ValueError(f"the reference {reference[:40]!r} holds no number")
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
