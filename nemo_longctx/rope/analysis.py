"""What a variant does to attention, in NumPy: score decay, granularity, wavelengths, and which bases reach a length."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.rope.base import Float64s, RopeVariant
from nemo_longctx.rope.variants import (
    AbfRope,
    Llama3Rope,
    LongRope,
    NtkByPartsRope,
    NtkRope,
    PiRope,
    Rope,
    XposRope,
    YarnRope,
    to_dict,
)

LARGEST_SPREAD = 1e100  # its square is a number still
LONGEST = 2**24  # tokens of a context; the sums over all distances of longer ones take hours
BLOCK = 256  # distances a row of the sum over pairs, see _cosine_rows


def _cosine_rows(theta: Float64s, rows: Float64s, zeta: Float64s | None = None) -> Float64s:
    """sum_j zeta_j^m cos(m theta_j) for m = BLOCK * row + column, float64 [rows, BLOCK]; without `zeta` of the cosines alone.

    By cos(a + b), and zeta^(a + b): a product of two thin matrices instead of rows * BLOCK * pairs cosines.
    """
    far, near = rows * float(BLOCK), np.arange(BLOCK, dtype=np.float64)
    coarse, fine = np.outer(far, theta), np.outer(near, theta)
    sides = [np.cos(coarse), np.cos(fine), np.sin(coarse), np.sin(fine)]
    if zeta is not None:
        damping = [np.exp(np.outer(distances, np.log(zeta))) for distances in (far, near)]
        sides = [side * damping[number % 2] for number, side in enumerate(sides)]
    return sides[0] @ sides[1].T - sides[2] @ sides[3].T


def _cosine_sums(theta: Float64s, start: int, stop: int, zeta: Float64s | None = None) -> Float64s:
    """sum_j zeta_j^m cos(m theta_j) for m = start..stop-1; start is a multiple of BLOCK."""
    rows = np.arange(start // BLOCK, -(-stop // BLOCK), dtype=np.float64)
    return _cosine_rows(theta, rows, zeta).reshape(-1)[: stop - start]


def raw_scores(
    variant: RopeVariant, distances: int, *, head_dim: int, rotary_dim: int | None = None, first: int = 0
) -> Float64s:
    """Attention score of an all-ones q and k against their distance, before the softmax (Xiong et al. 2023, Figure 4).

    Args:
        distances: how many, counted from 0.
        head_dim: the score is divided by its square root; dimensions beyond `rotary_dim` add the same at every distance.
        first: the smallest that is asked for, a multiple of `BLOCK`.

    Returns:
        float64 [distances - first]. At distance 0, sqrt(head_dim) times the square of the attention factor (11.3 at 128).
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    theta = variant.theta(rotary_dim, distances)
    rotated = 2 * _cosine_sums(theta, first, distances, variant.xpos_zeta(rotary_dim))
    return (rotated * variant.attention_scaling**2 + (head_dim - rotary_dim)) / math.sqrt(head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Granularity:
    """How far apart neighbouring positions lie (Xiong et al. 2023, appendix B, Theorem 1): larger tells them better apart.

    Attributes:
        value: C_d = mean of sin(theta_j): the sine similarity of x at n and n + 1 when all pairs of x weigh the same.
        lower, upper: its bounds for any x whose largest pair is `spread` times the smallest: C_d / spread^2, C_d * spread^2.
        limit: C_d for d -> infinity with sin(theta) ~ theta: 1 / ln(base) for ABF, 1 / (factor ln(base)) for PI. None for
            LongRoPE, whose factors belong to one d.
    """

    value: float
    lower: float
    upper: float
    limit: float | None


def granularity(variant: RopeVariant, rotary_dim: int, *, spread: float = 2.0, seq_length: int | None = None) -> Granularity:
    """Theorem 1 for `variant`.

    Args:
        spread: max |x_j| / min |x_j| over the pairs of x, from 1 to `LARGEST_SPREAD`.
        seq_length: for the variants that look at it.
    """
    if not 1 <= spread <= LARGEST_SPREAD:
        raise ConfigError("spread", spread, f"is the largest pair over the smallest, so from 1 to {LARGEST_SPREAD:g}")
    value = float(np.sin(variant.theta(rotary_dim, seq_length)).mean())
    limit = None if isinstance(variant, LongRope) else float(variant.theta(1 << 17, seq_length).mean())
    return Granularity(value=value, lower=value / spread**2, upper=value * spread**2, limit=limit)


def sine_similarity(variant: RopeVariant, pair_sizes: Sequence[float], *, seq_length: int | None = None) -> float:
    """|Im <f(x, n+1), f(x, n)>| / |f(x, n+1)| |f(x, n)| for an x whose pair j has length pair_sizes[j] (Theorem 1)."""
    weights = np.asarray(pair_sizes, dtype=np.float64) ** 2
    theta = variant.theta(2 * len(weights), seq_length)
    return float(abs((weights * np.sin(theta)).sum()) / weights.sum())


def wavelengths(variant: RopeVariant, rotary_dim: int, seq_length: int | None = None) -> Float64s:
    """Tokens that each pair takes for a full turn, float64 [rotary_dim / 2]; divide a context by it for its turns."""
    return 2 * math.pi / variant.theta(rotary_dim, seq_length)


def helix(variant: RopeVariant, rotary_dim: int, pair: int, positions: Float64s) -> tuple[Float64s, Float64s]:
    """(cos, sin) of one pair's angle along `positions`: with the position a helix (Xiong et al. 2023, Figure 8)."""
    if not 0 <= pair < rotary_dim // 2:
        raise ConfigError("pair", pair, f"must be between 0 and {rotary_dim // 2 - 1}")
    angle = variant.theta(rotary_dim, int(positions[-1]) + 1)[pair] * positions
    return np.cos(angle), np.sin(angle)


def first_negative(theta: Float64s, length: int, zeta: Float64s | None = None) -> int | None:
    """The first distance m < `length` where sum_j cos(m theta_j) < 0, None if there is none (Men et al. 2024, eq. 9).

    Beyond it a key like the query scores, on average, below a random one. With xPos' `zeta` each cosine is damped by zeta_j^m.
    """
    done, upto = 0, min(length, 4 * BLOCK)
    while done < length:
        below = np.flatnonzero(_cosine_sums(theta, done, upto, zeta) < 0)
        if below.size:
            return done + int(below[0])
        done, upto = upto, min(length, 4 * upto)
    return None


# Bases that models were trained with, and the longest window of that training: what was seen to work, no bound of anything.
# Xiong et al. 2023, section 4.1; Roziere et al. 2023, section 2.4; Dubey et al. 2024, section 3; Qwen2.5's released config.
PRACTICE: tuple[tuple[float, int, str], ...] = (
    (500_000.0, 32_768, "Llama 2 Long (Xiong et al. 2023)"),
    (1_000_000.0, 16_384, "Code Llama (Roziere et al. 2023)"),
    (500_000.0, 8_192, "Llama 3 (Dubey et al. 2024)"),
    (1_000_000.0, 32_768, "Qwen2.5 (its config.json)"),
)


def practised_base(length: int, base: float) -> float | None:
    """The smallest base above `base` that a published model was trained with at `length` tokens or more; None for none."""
    found = [trained for trained, longest, _ in PRACTICE if longest >= length and trained > base]
    return min(found, default=None)


def fitted_base(length: int) -> float:
    """Men et al. 2024's fit of the smallest base for a length: 0.0424 L^1.628 (d = 128)."""
    return 0.0424 * length**1.628


@functools.lru_cache(maxsize=64)
def smallest_base(length: int, rotary_dim: int, *, at_least: float | None = None) -> float:
    """The smallest base with sum_j cos(m theta_j) >= 0 for all m up to `length` (Men et al. 2024, section 4.2).

    Searched upwards in steps of 1 % from an eighth of the fit: the condition is not monotone in the base, so bisecting
    would find some base, not the smallest.

    Args:
        at_least: search upwards from this base instead: the larger of a base that reaches and this one may not reach.

    Raises:
        ConfigError: a length beyond `LONGEST`, or one that no base reaches.
    """
    if length > LONGEST:
        raise ConfigError("length", length, f"is longer than any context: {LONGEST:,} tokens at most")
    last_row = length // BLOCK - 1
    stride = max(1, last_row // 96)
    sample = np.arange(0, last_row + 1, stride, dtype=np.float64)

    def reaches(base: float) -> bool:
        theta = Rope(base=base).theta(rotary_dim)
        if sample.size:
            # Most bases are refuted by a few rows of distances, or by those near the lowest, long before all are looked at.
            lows = _cosine_rows(theta, sample).min(axis=1)
            around = (np.arange(row - stride, row + stride + 1).clip(0, last_row) for row in sample[np.argsort(lows)[:4]])
            if (lows < 0).any() or any((_cosine_rows(theta, near) < 0).any() for near in around):
                return False
        return first_negative(theta, length + 1) is None

    step, base = 1.01, max(1.5, fitted_base(length) / 8) if at_least is None else at_least
    while at_least is None and base > 1.5 and reaches(base):
        base = max(1.5, base / 8)
    while not reaches(base):
        base *= step
        if base > 1e30:
            raise ConfigError("length", length, f"no base reaches it with {rotary_dim} rotated dimensions")
    return base


def paper_values(variant: RopeVariant, head_dim: int) -> dict[str, float]:
    """The figures of Xiong et al. 2023 that `show` prints beside ours, for the variants that the paper measured."""
    values = {}
    if head_dim == 128 and isinstance(variant, (Rope, AbfRope, PiRope, XposRope)):
        values["raw_score_at_0"] = 11.3  # Figure 4
    if variant == AbfRope(base=500_000.0):
        values["granularity_limit"] = 0.076  # appendix B, beta = 50
    if variant == PiRope(factor=4.0):
        values["granularity_limit"] = 0.027  # appendix B, alpha = 1/4
    return values


def describe(variant: RopeVariant, *, head_dim: int, rotary_dim: int, spread: float, seq_length: int | None) -> dict[str, Any]:
    """What `nemo-longctx rope show` prints, as plain numbers and lists."""
    inv_freq = variant.inv_freq(rotary_dim, seq_length)  # first: it refuses frequencies of which nothing can be said
    grain = granularity(variant, rotary_dim, spread=spread, seq_length=seq_length)
    steps = wavelengths(variant, rotary_dim, seq_length)
    facts: dict[str, Any] = {
        "inv_freq": [float(f) for f in inv_freq],
        "attention_factor": variant.attention_scaling,
        "granularity": grain.value,
        "granularity_bounds": [grain.lower, grain.upper],
        "granularity_limit": grain.limit,
        "raw_score_at_0": float(raw_scores(variant, 1, head_dim=head_dim, rotary_dim=rotary_dim)[0]),
        "wavelengths": steps.tolist(),
        "paper": paper_values(variant, head_dim),
    }
    if isinstance(variant, XposRope):
        facts["xpos_scale"] = variant.xpos_scale(rotary_dim).tolist()
    if seq_length is not None:
        facts["turns"] = (seq_length / steps).tolist()
    return facts


def candidates(trained: int, target: int, base: float, *new_bases: float) -> list[RopeVariant]:
    """Each variant that can be set up from the two lengths alone, to take `trained` tokens at `base` to `target`."""
    stretch = target / trained
    parts: dict[str, Any] = {"base": base, "factor": stretch, "original_max_position_embeddings": trained}
    return [
        Rope(base=base),
        *(AbfRope(base=new) for new in new_bases),
        *(XposRope(base=new) for new in new_bases),
        PiRope(base=base, factor=stretch),
        NtkRope(base=base, factor=stretch),
        NtkByPartsRope(**parts),
        YarnRope(**parts),
        Llama3Rope(**parts),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """One variant at a target length.

    Attributes:
        variant: its name and fields.
        granularity, granularity_limit: see `Granularity`.
        attention_factor: of q and k.
        reaches: the first distance where the score of a key like the query, xPos' damping included, is below a random one's
            (`raw_scores` < 0); None: not before the target.
        unseen_pairs: pairs that reach, at the target, angles beyond every one that training showed them (less than a turn
            in the trained length, and more angle at the target than then).
        score_at_target: raw score at the target's distance.
    """

    variant: dict[str, Any]
    granularity: float
    granularity_limit: float | None
    attention_factor: float
    reaches: int | None
    unseen_pairs: int
    score_at_target: float


def advise(variants: Iterable[RopeVariant], *, trained: int, target: int, base: float, head_dim: int) -> list[Advice]:
    """Compare `variants` for taking a model trained with `base` on `trained` tokens to `target` tokens."""
    seen = np.minimum(Rope(base=base).theta(head_dim) * trained, 2 * math.pi)
    rows = []
    for variant in variants:
        theta = variant.theta(head_dim, target)
        grain = granularity(variant, head_dim, spread=1.0, seq_length=target)
        reach = np.minimum(theta * target, 2 * math.pi)
        scores = raw_scores(variant, target + 1, head_dim=head_dim, first=target // BLOCK * BLOCK)
        rows.append(
            Advice(
                variant=to_dict(variant),
                granularity=grain.value,
                granularity_limit=grain.limit,
                attention_factor=variant.attention_scaling,
                reaches=first_negative(theta, target + 1, variant.xpos_zeta(head_dim)),
                unseen_pairs=int((reach > seen * (1 + 1e-9)).sum()),
                score_at_target=float(scores[-1]),
            )
        )
    return rows
