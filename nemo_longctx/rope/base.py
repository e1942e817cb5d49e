"""What every RoPE variant answers, and the checks that all share. NumPy only.

RoPE turns pair j of the first `rotary_dim` (d) dimensions of a head at position t by the angle `theta_j * t`,
`theta_j = base ** (-2j/d)`, j = 0..d/2-1 (Su et al. 2021, eq. 15). An extension changes the theta_j, multiplies the rotated q
and k by an attention factor, or (xPos) scales them by position.

Frequencies are computed in float64 and rounded once to float32; the guard on the running model compares those bits.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import numpy as np
import numpy.typing as npt

from nemo_longctx.config import ConfigError, is_finite
from nemo_longctx.rope import hf

Float64s = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]


def check_number(name: str, value: object, *, above: float | None = None, at_least: float | None = None) -> None:
    """A finite int or float within its bound, or a ConfigError. YAML reads `5e5` as text: the message says so."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value):
        raise ConfigError(f"rope.{name}", value, "not a number; write digits, with a point before an exponent (5.0e+5)")
    if above is not None and value <= above:
        raise ConfigError(f"rope.{name}", value, f"must be above {above:g}")
    if at_least is not None and value < at_least:
        raise ConfigError(f"rope.{name}", value, f"must be at least {at_least:g}")


def check_length(name: str, value: object) -> None:
    """A whole number of tokens, or a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"rope.{name}", value, "must be a whole number of tokens, 1 or more")
    if value > hf.LONGEST:
        raise ConfigError(f"rope.{name}", value, f"is beyond every model ({hf.LONGEST:,} tokens at most)")


_BY_NAME: dict[str, type[RopeVariant]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeVariant:
    """What every variant answers. Subclasses override `theta`, and `attention_scaling` or `xpos_zeta` where they differ.

    Attributes:
        base: the b of theta_j = b^(-2j/d), above 1.
        local_base: base of the plain RoPE that layers with a sliding window have instead (OLMo 3, Gemma 3); None: all layers
            have this variant.
    """

    variant: ClassVar[str]
    evaluation_only: ClassVar[bool] = False  # the frequencies follow the input's length, so no fixed model is trained
    depends_on_length: ClassVar[bool] = False

    base: float = 10_000.0
    local_base: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "variant" in vars(cls):
            _BY_NAME[cls.variant] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # as the Python number that it is, which JSON and YAML can hold
                object.__setattr__(self, field.name, value.item())
        check_number("base", self.base, above=1.0)
        if self.local_base is not None:
            check_number("local_base", self.local_base, above=1.0)

    def __str__(self) -> str:
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.local_base is None:
            del said["local_base"]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    @property
    def local(self) -> RopeVariant | None:
        """What layers with a sliding window have, where it is another than this; None: all layers have this."""
        return None if self.local_base is None else _BY_NAME["rope"](base=self.local_base)

    @property
    def everywhere(self) -> Self:
        """This variant on all layers."""
        return dataclasses.replace(self, local_base=None)

    def theta(self, rotary_dim: int, seq_length: int | None = None) -> Float64s:
        """Angle a position, radians, float64 [rotary_dim / 2]. `seq_length` matters where `depends_on_length`."""
        return powers(self.base, rotary_dim)

    def inv_freq(self, rotary_dim: int, seq_length: int | None = None) -> Float32s:
        """`theta` rounded once to float32 [rotary_dim / 2].

        Args:
            rotary_dim: dimensions of a head that are rotated: `int(head_dim * rotary_percent)`, even.
            seq_length: tokens in the input, for the variants that look at it; None is the longest (LongRoPE) or
                the trained length (dynamic NTK).

        Raises:
            ConfigError: an odd `rotary_dim`, or one that this variant cannot serve; frequencies that float32 has no number for.
        """
        with np.errstate(over="ignore"):
            inv_freq = self.theta(rotary_dim, seq_length).astype(np.float32)
        bad = np.flatnonzero(~((inv_freq > 0) & np.isfinite(inv_freq)))
        if bad.size:
            mend = f"pair {bad[0]} of {self.variant} then turns by {inv_freq[bad[0]]} a token in float32; use smaller numbers"
            raise ConfigError("rope", dataclasses.asdict(self), mend)
        return inv_freq

    def plain_base(self, rotary_dim: int) -> float:
        """The base that a config must have where it cannot say the stretch: `base`, or what NTK-aware makes of it."""
        return float(self.base)

    @property
    def attention_scaling(self) -> float:
        """The attention factor: what the rotated dimensions of both q and k are multiplied by."""
        return 1.0

    def xpos_zeta(self, rotary_dim: int) -> Float64s | None:
        """xPos' zeta_j per token, float64 [rotary_dim / 2]: q at t is scaled by zeta^t, k by zeta^-t. None: no xPos."""
        return None

    def to_hf(
        self, *, rotary_dim: int, max_position_embeddings: int, version: int = 4, partial_rotary_factor: float = 1.0
    ) -> dict[str, Any]:
        """The keys of a transformers config that say this variant.

        Args:
            rotary_dim: dimensions of a head that are rotated; NTK-aware is written as the base that it makes there.
            max_position_embeddings: tokens the extended model is for. Dynamic NTK writes its trained length instead, since
                that is where transformers starts to stretch.
            version: major version of transformers: 4 (`rope_theta`, `rope_scaling`; Gemma 3's `rope_local_base_freq` where
                layers with a window have another) or 5 (`rope_parameters`, by layer type there).
            partial_rotary_factor: share of a head's dimensions that are rotated.

        Raises:
            ConfigError: transformers cannot say this variant (xPos), an unknown version, or an argument out of its range.
        """
        return hf.write(
            self,
            rotary_dim=rotary_dim,
            max_position_embeddings=max_position_embeddings,
            version=version,
            partial_rotary_factor=partial_rotary_factor,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """The variant that a transformers config (a `config.json` or `PretrainedConfig.to_dict()`, 4.x or 5.x) asks for.

        `RopeVariant.from_hf` takes whatever the config says; ABF and NTK-aware come back as plain RoPE with their base, which
        is all that such a config knows of them. A variant's own `from_hf` (`YarnRope.from_hf`) gives that variant or refuses.

        Raises:
            ConfigError: a `rope_type` with no variant here, layers with a window whose RoPE is not a plain one, a key that is
                missing or holds no usable value, or another variant than the one that was asked for.
        """
        if "variant" in vars(cls):
            return cls(**hf.read_as(config, cls.variant))
        name, fields = hf.read(config)
        return cast("Self", _BY_NAME[name](**fields))


def powers(base: float, rotary_dim: int) -> Float64s:
    """theta_j = base^(-2j/d), float64 [rotary_dim / 2]."""
    if not isinstance(rotary_dim, numbers.Integral) or rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            "rotary_dim", rotary_dim, "RoPE turns pairs, so head_dim * rotary_percent must be even and at least 2"
        )
    return np.float64(base) ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
