"""The short-context guard: has the model lost what it could do at its old length?

The same documents and samples are scored before and after, so the change is judged on their differences: far smaller changes
show than between two independent means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_longctx.config import ConfigError, did_you_mean

ACTIONS = ("warn", "stop")
LOWER = "lower_is_better"  # part of the name of a score of which a rise is a loss of ability
BLOCK = 1 << 22  # signs drawn at once


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a change is a loss of ability.

    Args:
        loss: rise of the loss at the old length that is too much, nats per token.
        score: fall of a task's score that is too much, as a share (0.02 is two points); where lower is better, a rise.
        significance: p value below which a change is taken to be real.
        action: `warn` in the log, or `stop` the run.
    """

    loss: float = 0.05
    score: float = 0.02
    significance: float = 0.05
    action: str = "warn"

    def __post_init__(self) -> None:
        for name in ("loss", "score"):
            if getattr(self, name) < 0:
                raise ConfigError(f"guard.{name}", getattr(self, name), "give a change of 0 or more")
        if not 0 < self.significance < 1:
            raise ConfigError("guard.significance", self.significance, "give a p value between 0 and 1")
        if self.action not in ACTIONS:
            raise ConfigError("guard.action", self.action, f"unknown action, {did_you_mean(str(self.action), ACTIONS)}")


@dataclass(frozen=True, kw_only=True)
class Change:
    """Mean of paired differences (after - before), its standard error, p value, and how many pairs there were."""

    mean: float
    standard_error: float
    p_value: float
    pairs: int


def paired_change(before: Sequence[float], after: Sequence[float], *, flips: int = 10_000, seed: int = 0) -> Change:
    """Compare paired measurements by a sign-flip permutation test (Fisher 1935): exact for any distribution of differences
    that would be symmetric around 0 if nothing had changed.

    Pairs with a NaN (not scored) are left out.

    Raises:
        ValueError: lists of different length, or no pair.
    """
    a, b = np.asarray(before, float), np.asarray(after, float)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} measurements before and {len(b)} after cannot be paired")
    d = (b - a)[np.isfinite(a) & np.isfinite(b)]
    if not len(d):
        raise ValueError("no pair was scored both before and after")
    rng, limit = np.random.default_rng(seed), abs(d.sum()) - 1e-12 * max(1.0, np.abs(d).sum())
    rows = max(1, BLOCK // len(d))  # MMLU has 14,042 pairs: all flips of it at once would take 1 GB
    extreme = sum(
        int((np.abs(rng.choice((-1.0, 1.0), (min(rows, flips - done), len(d))) @ d) >= limit).sum())
        for done in range(0, flips, rows)
    )
    error = float(d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else float("nan")
    return Change(mean=float(d.mean()), standard_error=error, p_value=(extreme + 1) / (flips + 1), pairs=len(d))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Changes by name; a sentence for each that is too much and significant; by name why something could not be compared."""

    changes: dict[str, Change]
    alarms: list[str]
    unpaired: dict[str, str]


def judge(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], config: GuardConfig) -> Verdict:
    """Compare two evaluations of the same documents and samples.

    Args:
        before, after: measurement -> value of each document or sample. Names that begin with `loss` are losses, for which a
            rise is bad, as it is for names with `LOWER` in them; of all others a fall is. Names that `before` lacks are new and
            not judged.
    """
    changes, alarms, unpaired = {}, [], {}
    for name in (n for n in after if n in before):
        try:
            change = changes[name] = paired_change(before[name], after[name])
        except ValueError as why:  # other samples than before, or none scored; the run that is watched goes on
            unpaired[name] = str(why)
            continue
        limit = config.loss if name.startswith("loss") else config.score
        worse = change.mean if name.startswith("loss") or LOWER in name else -change.mean
        if worse > limit and change.p_value < config.significance:
            alarms.append(
                f"{name} changed by {change.mean:+.4f} ± {change.standard_error:.4f} since the start "
                f"(p = {change.p_value:.4f}, {change.pairs} pairs), more than the {limit} allowed"
            )
    return Verdict(changes=changes, alarms=alarms, unpaired=unpaired)
