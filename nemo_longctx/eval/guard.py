"""The short-context guard: has the model lost what it could do at its old length?

The same documents and samples are scored before and after, so the change is judged on their differences: far smaller changes
show than between two independent means. Many measurements are looked at many times, and a run that lost nothing must not be
stopped by that: the error over the whole run is spent over the looks (alpha spending, Lan and DeMets 1983: alpha / (k (k + 1))
at look k, which needs no planned number of looks), and within a look over the measurements (Holm 1979).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from nemo_longctx.config import ConfigError, did_you_mean

ACTIONS = ("warn", "stop")
LOWER = "lower_is_better"  # part of the name of a score of which a rise is a loss of ability
FLIPS = 10_000
BLOCK = 1 << 22  # signs drawn at once


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a change is a loss of ability.

    Attributes:
        loss: rise of the loss at the old length that is too much, nats per token.
        score: fall of a task's score that is too much, as a share (0.02 is two points); where lower is better, a rise.
        significance: probability that a run in which nothing changes raises any alarm, over all measurements and looks.
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
            raise ConfigError(
                "guard.significance", self.significance, "give the run's chance of a false alarm, between 0 and 1"
            )
        if self.action not in ACTIONS:
            raise ConfigError("guard.action", self.action, f"unknown action, {did_you_mean(str(self.action), ACTIONS)}")

    def limit(self, name: str) -> float:
        """The change of the measurement `name` that is allowed."""
        return self.loss if name.startswith("loss") else self.score


@dataclass(frozen=True, kw_only=True)
class Change:
    """Mean of paired differences (after - before), its standard error, and how many pairs there were.

    `p_value` is two-sided; `rise` and `fall` are those of either direction alone.
    """

    mean: float
    standard_error: float
    p_value: float
    pairs: int
    rise: float
    fall: float


def paired_change(before: Sequence[float], after: Sequence[float], *, flips: int = FLIPS, seed: int = 0) -> Change:
    """Compare paired measurements by a sign-flip permutation test (Fisher 1935): exact for any distribution of differences
    that would be symmetric around 0 if nothing had changed. All flips are made where they are no more than `flips`.

    Where so few flips cannot tell a p value, Hoeffding's bound for random signs does, exp(-sum(d)^2 / (2 sum(d^2))), which is
    never below the exact one. Pairs with a NaN (not scored) are left out.

    Raises:
        ValueError: lists of different length, or no pair.
    """
    a, b = np.asarray(before, float), np.asarray(after, float)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} measurements before and {len(b)} after cannot be paired")
    d = (b - a)[np.isfinite(a) & np.isfinite(b)]
    if not len(d):
        raise ValueError("no pair was scored both before and after")
    rng, total, slack = np.random.default_rng(seed), d.sum(), 1e-12 * max(1.0, np.abs(d).sum())
    counts = np.zeros(3, int)  # flips as far as this from 0, as high, as low
    every = 2 ** len(d) if 2 ** len(d) <= flips else 0
    rows = max(1, BLOCK // len(d))  # MMLU has 14,042 pairs: all flips of it at once would take 1 GB
    for done in range(0, every or flips, rows):
        size = min(rows, (every or flips) - done)
        if every:
            signs = 1.0 - 2.0 * ((np.arange(done, done + size)[:, None] >> np.arange(len(d))) & 1)
        else:
            signs = rng.choice((-1.0, 1.0), (size, len(d)))
        sums = signs @ d
        counts += [(np.abs(sums) >= abs(total) - slack).sum(), (sums >= total - slack).sum(), (sums <= total + slack).sum()]
    p_two, p_rise, p_fall = counts / every if every else (counts + 1) / (flips + 1)
    squares = (d**2).sum()
    bound = float(np.exp(-(total**2) / (2 * squares))) if squares else 1.0
    error = float(d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else float("nan")
    return Change(
        mean=float(d.mean()),
        standard_error=error,
        p_value=min(float(p_two), 2 * bound),
        pairs=len(d),
        rise=min(float(p_rise), bound) if total > 0 else float(p_rise),
        fall=min(float(p_fall), bound) if total < 0 else float(p_fall),
    )


def level(significance: float, look: int) -> float:
    """What of the run's error the `look`-th look (1, 2, ...) may spend; all looks together spend no more than it."""
    return significance / (look * (look + 1))


def holm(p_values: Mapping[str, float], alpha: float) -> set[str]:
    """Names whose hypotheses fall at a family error of `alpha` (Holm 1979)."""
    fallen: set[str] = set()
    for place, name in enumerate(sorted(p_values, key=lambda one: (p_values[one], one))):
        if p_values[name] > alpha / (len(p_values) - place):
            break
        fallen.add(name)
    return fallen


def smallest_p(pairs: int) -> float:
    """The least p value of one direction that `paired_change` can give: of equal differences, all for the worse."""
    return 0.5**pairs if 2**pairs <= FLIPS else min(1 / (FLIPS + 1), math.exp(-pairs / 2))


def fewest_pairs(alpha: float, measurements: int = 1) -> int:
    """So many pairs are needed for any change, however large, to be significant at `alpha` among so many measurements."""
    return next(pairs for pairs in itertools.count(1) if smallest_p(pairs) <= alpha / measurements)


# Standard errors by which a mean may stay below what is allowed and still not be told from it.
REACH = 2.0


def power(change: Change, limit: float, alpha: float) -> float:
    """Chance that a look with this standard error raises an alarm where the true change is `limit`; NaN with one pair."""
    if not change.standard_error > 0:
        return float("nan") if change.standard_error != 0 else float(limit > 0)
    normal = NormalDist()
    return 1 - normal.cdf(max(normal.inv_cdf(1 - alpha) - limit / change.standard_error, -REACH))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Changes by name; a sentence for each that is too much and significant; by name why something could not be compared, or
    could have raised no alarm; by name the chance that a change of what is allowed would have been seen."""

    changes: dict[str, Change]
    alarms: list[str]
    unpaired: dict[str, str]
    power: dict[str, float]
    blind: dict[str, str]

    def lines(self) -> list[str]:
        """What a run's last words say: alarms, or that none was raised and what was looked at; and what could not be."""
        looked = ", ".join(f"{name} {each.mean:+.4f} {plus_minus(each.standard_error)}" for name, each in self.changes.items())
        said = [f"ALARM: {alarm}" for alarm in self.alarms]
        said += [] if said else [f"no alarm: {looked}"] if looked else ["nothing was compared, so it saw nothing"]
        said += [f"{name} was not compared: {why}" for name, why in self.unpaired.items()]
        said += [f"{name} can raise no alarm: {why}" for name, why in self.blind.items()]
        return [f"short-context guard: {line}" for line in said]


def judge(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], config: GuardConfig, *, look: int = 1
) -> Verdict:
    """Compare two evaluations of the same documents and samples.

    An alarm is raised for a change for the worse that is significant at what this look may spend, and that reaches the limit as
    far as can be told (within `REACH` standard errors).

    Args:
        before, after: measurement -> value of each document or sample. Names that begin with `loss` are losses, for which a
            rise is bad, as it is for names with `LOWER` in them; of all others a fall is. Names that one of them lacks are not
            judged, and told in `unpaired`.
        look: which comparison of this run it is, from 1.
    """
    changes = {}
    unpaired = {name: "it was not measured at the start" for name in after if name not in before}
    unpaired |= {name: "it was not measured now" for name in before if name not in after}
    for name in (n for n in after if n in before):
        try:
            changes[name] = paired_change(before[name], after[name])
        except ValueError as why:  # other samples than before, or none scored; the run that is watched goes on
            unpaired[name] = str(why)
    alpha = level(config.significance, look)
    worse = {name: change.rise if _rise_is_bad(name) else change.fall for name, change in changes.items()}
    alarms, seen = [], {}
    fallen = holm(worse, alpha)
    could = holm({name: smallest_p(change.pairs) for name, change in changes.items()}, alpha)
    blind = {
        name: f"no change of so few pairs ({change.pairs}) can be told from chance at look {look}, which needs "
        f"{fewest_pairs(alpha, len(changes))}; measure more, or less often"
        for name, change in changes.items()
        if name not in could
    }
    for name, change in changes.items():
        limit = config.limit(name)
        seen[name] = 0.0 if name in blind else power(change, limit, alpha / len(changes))
        by = change.mean if _rise_is_bad(name) else -change.mean
        reach = 0.0 if np.isnan(change.standard_error) else REACH * change.standard_error
        if name in fallen and by + reach >= limit:
            alarms.append(
                f"{name} changed by {change.mean:+.4f} {plus_minus(change.standard_error)} since the start "
                f"(p = {worse[name]:.2g}, {change.pairs} pairs, look {look}); {limit} is allowed"
            )
    return Verdict(changes=changes, alarms=alarms, unpaired=unpaired, power=seen, blind=blind)


def plus_minus(standard_error: float) -> str:
    """`± 0.0123`, or that one pair has no error."""
    return "(one pair: no error)" if np.isnan(standard_error) else f"± {standard_error:.4f}"


def seen_percent(power: float) -> str:
    """`93 %`, or `–` where one pair tells nothing."""
    return "–" if np.isnan(power) else f"{100 * power:.0f} %"


def _rise_is_bad(name: str) -> bool:
    return name.startswith("loss") or LOWER in name
