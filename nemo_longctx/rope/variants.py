"""Every RoPE extension as one small frozen dataclass that returns its frequencies. NumPy only.

What each of them answers is in `RopeVariant` (base.py). The keys of a YAML file under `rope:` are the fields here, plus
`variant`, the name in `VARIANTS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from nemo_longctx.config import ConfigError, build, did_you_mean
from nemo_longctx.rope.base import Float64s, RopeVariant, check_length, check_number, powers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope(RopeVariant):
    """Plain RoPE (Su et al. 2021)."""

    variant: ClassVar[str] = "rope"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbfRope(RopeVariant):
    """Adjusted base frequency: plain RoPE with a larger base (Xiong et al. 2023, section 4.1)."""

    variant: ClassVar[str] = "abf"

    base: float = 500_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stretched(RopeVariant):
    """Variants with a stretch.

    Attributes:
        factor: new length / trained length, 1 or more.
    """

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("factor", self.factor, at_least=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiRope(_Stretched):
    """Position interpolation: every angle divided by `factor` (Chen et al. 2023, eq. 4)."""

    variant: ClassVar[str] = "pi"

    def theta(self, rotary_dim: int, seq_length: int | None = None) -> Float64s:
        return powers(self.base, rotary_dim) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtkRope(_Stretched):
    """NTK-aware: the base that interpolates the slowest pair by `factor` (bloc97 2023; Peng et al. 2023, eq. 16)."""

    variant: ClassVar[str] = "ntk"

    def plain_base(self, rotary_dim: int) -> float:
        return ntk_base(self.base, self.factor, rotary_dim)

    def theta(self, rotary_dim: int, seq_length: int | None = None) -> Float64s:
        return powers(self.plain_base(rotary_dim), rotary_dim)


def ntk_base(base: float, stretch: float, rotary_dim: int) -> float:
    """The base at which the slowest pair turns `stretch` times as slowly (Peng et al. 2023, eq. 16)."""
    if rotary_dim <= 2:
        raise ConfigError("rotary_dim", rotary_dim, "NTK scaling has no base to change with one pair; use pi")
    try:
        made = float(base * stretch ** (rotary_dim / (rotary_dim - 2)))
    except OverflowError:
        made = math.inf
    if math.isinf(made):
        raise ConfigError(
            "rope.factor", stretch, f"the base {base:g} stretched by it is beyond every number; use a smaller one"
        )
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNtkRope(_Stretched):
    """Dynamic NTK: the NTK base grows with the input beyond the trained length (emozilla 2023). Evaluation only.

    Attributes:
        original_max_position_embeddings: the trained length L; at length l > L the stretch is factor * l/L - (factor - 1).
    """

    variant: ClassVar[str] = "dynamic_ntk"
    evaluation_only: ClassVar[bool] = True
    depends_on_length: ClassVar[bool] = True

    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length("original_max_position_embeddings", self.original_max_position_embeddings)

    def theta(self, rotary_dim: int, seq_length: int | None = None) -> Float64s:
        trained = self.original_max_position_embeddings
        length = max(seq_length or trained, trained)
        stretch = self.factor * length / trained - (self.factor - 1)
        return powers(ntk_base(self.base, stretch, rotary_dim), rotary_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ByParts(_Stretched):
    """NTK-by-parts and Llama-3 are one formula (Peng et al. 2023, eqs. 17-19) under two names and two defaults.

    A pair that turns fewer than `low` times in the trained length is interpolated, more than `high` times left alone,
    between them mixed in proportion to its turns.
    """

    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length("original_max_position_embeddings", self.original_max_position_embeddings)

    def _mix(self, rotary_dim: int, low: float, high: float) -> Float64s:
        theta = powers(self.base, rotary_dim)
        turns = self.original_max_position_embeddings * theta / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - kept) * theta / self.factor + kept * theta


def _check_turns(low_name: str, low: float, high_name: str, high: float) -> None:
    check_number(low_name, low, above=0.0)
    check_number(high_name, high, above=0.0)
    if high <= low:
        raise ConfigError(f"rope.{high_name}", high, f"must be above {low_name}={low:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtkByPartsRope(_ByParts):
    """NTK-by-parts (bloc97 2023; Peng et al. 2023, eqs. 17-19), without YaRN's temperature.

    Attributes:
        beta_slow, beta_fast: turns in the trained length under which a pair is interpolated, over which it is kept
            (the paper's alpha and beta).
        original_max_position_embeddings: the trained length, tokens.
    """

    variant: ClassVar[str] = "ntk_by_parts"

    beta_slow: float = 1.0
    beta_fast: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_turns("beta_slow", self.beta_slow, "beta_fast", self.beta_fast)

    def theta(self, rotary_dim: int, seq_length: int | None = None) -> Float64s:
        return self._mix(rotary_dim, self.beta_slow, self.beta_fast)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope(_ByParts):
    """Llama 3.1's scaling (Dubey et al. 2024; the numbers are those of Meta's release).

    Attributes:
        low_freq_factor, high_freq_factor: turns in the trained length, as NTK-by-parts' beta_slow and beta_fast.
        original_max_position_embeddings: the trained length, tokens.
    """

    variant: ClassVar[str] = "llama3"

    base: float = 500_000.0
    factor: float = 8.0
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_turns("low_freq_factor", self.low_freq_factor, "high_freq_factor", self.high_freq_factor)

    def theta(self, rotary_dim: int, seq_length: int | None = None) -> Float64s:
        return self._mix(rotary_dim, self.low_freq_factor, self.high_freq_factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope(_Stretched):
    """YaRN (Peng et al. 2023, section 3.4), as released: the ramp is linear in the pair's index, not in its turns.

    Attributes:
        original_max_position_embeddings: the trained length, tokens.
        beta_fast, beta_slow: turns in the trained length at which the ramp begins (pairs faster than that are kept) and
            ends (slower ones are interpolated).
        mscale, mscale_all_dim: the attention factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).
        truncate: round the ramp's ends outwards to whole pairs (transformers and Megatron-Core by default; gpt-oss does not).
        attention_factor: set the attention factor outright; None computes it.

    The ends of the ramp are clamped to [0, rotary_dim - 1] as transformers and Megatron-Core clamp them. Where both ends lie
    on one side (a base so small, or a length so large, that no pair is slow), the result is theirs too.
    """

    variant: ClassVar[str] = "yarn"

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length("original_max_position_embeddings", self.original_max_position_embeddings)
        _check_turns("beta_slow", self.beta_slow, "beta_fast", self.beta_fast)
        check_number("mscale", self.mscale, at_least=0.0)
        check_number("mscale_all_dim", self.mscale_all_dim, at_least=0.0)
        if not isinstance(self.truncate, bool):
            raise ConfigError("rope.truncate", self.truncate, "must be true or false")
        if self.attention_factor is not None:
            check_number("attention_factor", self.attention_factor, above=0.0)

    def ramp(self, rotary_dim: int) -> Float64s:
        """Share of interpolation of each pair, 0 (kept) to 1 (divided by `factor`), float64 [rotary_dim / 2]."""

        def pair_of(turns: float) -> float:
            length_in_turns = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return rotary_dim * math.log(length_in_turns) / (2 * math.log(self.base))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001  # a step, without a division by zero
        return np.clip((np.arange(rotary_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)

    def theta(self, rotary_dim: int, seq_length: int | None = None) -> Float64s:
        theta, ramp = powers(self.base, rotary_dim), self.ramp(rotary_dim)
        return theta / self.factor * ramp + theta * (1 - ramp)

    @property
    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        log = math.log(self.factor)
        return (0.1 * self.mscale * log + 1.0) / (0.1 * self.mscale_all_dim * log + 1.0)


def _numbers(name: str, values: object) -> tuple[float, ...]:
    """A list, tuple or array of numbers above 0 as a tuple of floats."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise ConfigError(f"rope.{name}", values, "must be a list of numbers, one a pair of dimensions")
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    for i, value in enumerate(plain):
        check_number(f"{name}[{i}]", value, above=0.0)
    return tuple(float(value) for value in plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(_Stretched):
    """LongRoPE: a searched divisor for each pair (Ding et al. 2024, section 3; released with Phi-3).

    Attributes:
        short_factor, long_factor: divisor of each pair's angle, for inputs up to the trained length and beyond it.
        original_max_position_embeddings: the trained length, tokens.
        attention_factor: set it outright; None gives sqrt(1 + ln(factor) / ln(trained length)).
    """

    variant: ClassVar[str] = "longrope"
    depends_on_length: ClassVar[bool] = True

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length("original_max_position_embeddings", self.original_max_position_embeddings)
        if self.original_max_position_embeddings < 2:
            raise ConfigError(
                "rope.original_max_position_embeddings", self.original_max_position_embeddings, "must be 2 or more"
            )
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if self.attention_factor is not None:
            check_number("attention_factor", self.attention_factor, above=0.0)

    def theta(self, rotary_dim: int, seq_length: int | None = None) -> Float64s:
        is_long = seq_length is None or seq_length > self.original_max_position_embeddings
        name = "long_factor" if is_long else "short_factor"
        divisors = np.asarray(getattr(self, name), dtype=np.float64)
        theta = powers(self.base, rotary_dim)
        if divisors.shape != theta.shape:
            raise ConfigError(f"rope.{name}", f"{len(divisors)} numbers", f"a rotary_dim of {rotary_dim} needs {len(theta)}")
        return theta / divisors

    @property
    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class XposRope(RopeVariant):
    """xPos over RoPE with any base (Sun et al. 2022, section 3.2): base 500,000 is the paper's "xPos ABF".

    Attributes:
        scale_base: tokens over which pair j decays by zeta_j; larger decays more slowly (512 in Sun et al.'s release).
        gamma: zeta_j = (2j/d + gamma) / (1 + gamma).
    """

    variant: ClassVar[str] = "xpos"

    scale_base: float = 512.0
    gamma: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale_base", self.scale_base, above=0.0)
        check_number("gamma", self.gamma, above=0.0)

    def xpos_scale(self, rotary_dim: int) -> Float64s:
        """zeta_j over `scale_base` tokens, float64 [rotary_dim / 2]."""
        share = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
        return (share + self.gamma) / (1 + self.gamma)

    def xpos_zeta(self, rotary_dim: int) -> Float64s:
        return self.xpos_scale(rotary_dim) ** (1.0 / self.scale_base)


VARIANTS: dict[str, type[RopeVariant]] = {
    cls.variant: cls
    for cls in (Rope, AbfRope, PiRope, NtkRope, NtkByPartsRope, YarnRope, DynamicNtkRope, Llama3Rope, LongRope, XposRope)
}


def parse(values: Mapping[str, Any], *, where: str = "rope") -> RopeVariant:
    """The variant that `values` names, e.g. `{"variant": "abf", "base": 500000}`.

    Raises:
        ConfigError: no mapping, no or an unknown `variant`, an unknown or missing field, or a bad value.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(where, values, "must be a mapping: variant, and that variant's own keys")
    fields = dict(values)
    name = fields.pop("variant", None)
    if not isinstance(name, str) or name not in VARIANTS:
        raise ConfigError(f"{where}.variant", name, f"no such variant, {did_you_mean(str(name), VARIANTS)}")
    return build(VARIANTS[name], fields, where=where)


def to_dict(variant: RopeVariant) -> dict[str, Any]:
    """The mapping that `parse` turns back into `variant`."""
    fields = dataclasses.asdict(variant)
    if variant.local_base is None:  # as records and checkpoints of one RoPE for all layers have always been
        del fields["local_base"]
    return {"variant": variant.variant, **fields}
