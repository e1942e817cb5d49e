"""Effects paired over seeds and documents, and what may be said of a claim: it holds, does not, or cannot be told here.

Arms of one seed share initial weights, stream and evaluation documents, so each claim rests on differences. Two things are
drawn at random, the seed and the document, and the same documents come in every seed: the error of the mean difference has a
part from each, and Student's t of the fewer of the two makes the interval wide where there are few.

Shapes: S seeds, D documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.eval.intervals import t_quantile

HOLDS, NOT, UNKNOWN = "holds", "does not", "cannot be told here"
TESTS = ("less", "greater", "no_worse")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Mean difference between two arms with its 95 % interval; infinite limits where one seed or document leaves no spread."""

    mean: float
    low: float
    high: float
    seeds: int
    documents: int

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self._told(self.mean)} (no interval: {_many(self.seeds, 'seed')}, {_many(self.documents, 'document')})"
        return f"{self._told(self.mean)} ({self._told(self.low)} to {self._told(self.high)})"

    @staticmethod
    def _told(value: float) -> str:
        return f"{value:+.4f}" if abs(value) < 1e5 else f"{value:+.4g}"


def _many(number: int, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"


def effect(first_SD: ArrayLike, second_SD: ArrayLike) -> Effect:
    """`first` - `second`, each [S, D]: a value a seed and document (D = 1 for a measure that is one number a run).

    Raises:
        ValueError: shapes differ, or nothing was measured in both.
    """
    first, second = np.atleast_2d(np.asarray(first_SD, float)), np.atleast_2d(np.asarray(second_SD, float))
    if first.shape != second.shape:
        raise ValueError(f"arms measured on {first.shape} and {second.shape} seeds and documents cannot be paired")
    d_SD = first - second
    d_SD = d_SD[:, np.isfinite(d_SD).all(axis=0)]
    S, D = d_SD.shape
    if not D:
        raise ValueError("no document was measured in both arms")
    mean = float(d_SD.mean())
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in (d_SD.mean(1), d_SD.mean(0)) if len(values) > 1]
    if S < 2 or not parts:  # one seed says nothing of the next one
        return Effect(mean=mean, low=-math.inf, high=math.inf, seeds=S, documents=D)
    variance = sum(v for v, _ in parts)
    if variance <= (1e-12 * max(1.0, abs(mean))) ** 2:
        return Effect(mean=mean, low=mean, high=mean, seeds=S, documents=D)
    # The fewest degrees of freedom: three seeds may by luck lie close together, and then say too little of their spread.
    half = t_quantile(min(f for _, f in parts)) * math.sqrt(variance)
    return Effect(mean=mean, low=mean - half, high=mean + half, seeds=S, documents=D)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper and the test that decides it, written before the run.

    Args:
        text: the sentence. measure: which measure decides. first, second: the arms compared, first - second.
        test: `less` or `greater`: the difference lies on that side of 0 by more than `margin`; `no_worse`: it is below
            `margin` (of a measure of which less is better).
        margin: in the measure's units; the smallest difference that matters.
        where: table or figure of the paper.
    """

    text: str
    measure: str
    first: str
    second: str
    test: str = "less"
    margin: float = 0.0
    where: str = ""

    def __post_init__(self) -> None:
        if self.test not in TESTS:
            raise ConfigError("claims.test", self.test, did_you_mean(str(self.test), TESTS))
        if self.margin < 0 or (self.test == "no_worse" and self.margin == 0):
            raise ConfigError(
                "claims.margin", self.margin, "give what difference still matters: 0 or more, above 0 for no_worse"
            )


def verdict(claim: Claim, found: Effect) -> str:
    """Holds, does not, or cannot be told here.

    An interval around 0 decides nothing, however narrow: two equal arms give "cannot be told", and only `no_worse` can be said
    of them. A real difference that is smaller than the margin is one that the claim does not hold for.
    """
    low, high = found.low, found.high
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNKNOWN
    if claim.test == "no_worse":
        return HOLDS if high < claim.margin else NOT if low > claim.margin else UNKNOWN
    if claim.test == "greater":
        low, high = -high, -low
    if high < -claim.margin:
        return HOLDS
    return NOT if low > 0 or (high < 0 and low > -claim.margin) else UNKNOWN
