"""RoPE variants to and from a transformers `config.json`: 4.x (`rope_theta`, `rope_scaling`) and 5.x (`rope_parameters`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import (
    AbfRope,
    DynamicNtkRope,
    Llama3Rope,
    LongRope,
    NtkByPartsRope,
    NtkRope,
    PiRope,
    Rope,
    XposRope,
    YarnRope,
    ntk_base,
)

Keys = dict[str, Any]
V = TypeVar("V", bound=RopeVariant)

NO_XPOS = "transformers has no xPos: its RoPE cannot scale q and k by position; keep it in NeMo"


def write(
    variant: RopeVariant, *, rotary_dim: int, max_position_embeddings: int, version: int, partial_rotary_factor: float
) -> Keys:
    """`RopeVariant.to_hf`."""
    if version not in (4, 5):
        raise ConfigError("transformers", version, "only configs of major versions 4 and 5 are known")
    if isinstance(variant, XposRope):
        raise ConfigError("rope.variant", variant.variant, NO_XPOS)
    theta = ntk_base(variant.base, variant.factor, rotary_dim) if isinstance(variant, NtkRope) else float(variant.base)
    scaling = _TO_HF[type(variant)](variant) if type(variant) in _TO_HF else {}
    if isinstance(variant, DynamicNtkRope):
        max_position_embeddings = variant.original_max_position_embeddings
    partial = {} if partial_rotary_factor == 1.0 else {"partial_rotary_factor": partial_rotary_factor}
    keys: Keys = {"max_position_embeddings": max_position_embeddings}
    if version == 5:
        keys["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **scaling, **partial}
        return keys
    keys |= {"rope_theta": theta, "rope_scaling": scaling or None, **partial}
    if isinstance(variant, LongRope):
        # transformers 4 reads LongRoPE's trained length from the top of the config alone.
        keys["original_max_position_embeddings"] = variant.original_max_position_embeddings
    return keys


def read(config: Mapping[str, Any], cls: type[V]) -> V:
    """`RopeVariant.from_hf`: the variant that `config` asks for, as a `cls`."""
    params = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(v, Mapping) for v in params.values()):
        raise ConfigError(
            "rope_parameters", sorted(params), "one set a layer type: models that mix several RoPEs are not supported"
        )
    rope_type = params.get("rope_type", params.get("type", "default"))
    if rope_type not in _FROM_HF:
        raise ConfigError("rope_type", rope_type, f"no variant for it, {did_you_mean(str(rope_type), _FROM_HF)}")
    base = params.get("rope_theta", config.get("rope_theta"))
    params["base"] = 10_000.0 if base is None else float(base)
    try:
        found = _FROM_HF[rope_type](params, config)
    except KeyError as error:
        raise ConfigError(f"rope_scaling.{error.args[0]}", None, f"missing; rope_type {rope_type!r} needs it") from error
    if isinstance(found, cls):
        return found
    if (type(found), cls) in _ALSO:
        return _ALSO[type(found), cls](found)
    if cls is XposRope:
        raise ConfigError("rope_type", rope_type, NO_XPOS)
    raise ConfigError("rope_type", rope_type, f"says {found.variant!r}, not {cls.variant!r}; read it with RopeVariant.from_hf")


def _linear_to_hf(variant: PiRope) -> Keys:
    return {"rope_type": "linear", "factor": float(variant.factor)}


def _dynamic_to_hf(variant: DynamicNtkRope) -> Keys:
    return {"rope_type": "dynamic", "factor": float(variant.factor)}  # its trained length is max_position_embeddings


def _by_parts_to_hf(variant: NtkByPartsRope | Llama3Rope) -> Keys:
    """NTK-by-parts is the formula that transformers knows as llama3, its beta_slow and beta_fast the two freq factors."""
    low = variant.low_freq_factor if isinstance(variant, Llama3Rope) else variant.beta_slow
    high = variant.high_freq_factor if isinstance(variant, Llama3Rope) else variant.beta_fast
    return {
        "rope_type": "llama3",
        "factor": float(variant.factor),
        "low_freq_factor": float(low),
        "high_freq_factor": float(high),
        "original_max_position_embeddings": variant.original_max_position_embeddings,
    }


def _yarn_to_hf(variant: YarnRope) -> Keys:
    keys: Keys = {
        "rope_type": "yarn",
        "factor": float(variant.factor),
        "original_max_position_embeddings": variant.original_max_position_embeddings,
        "beta_fast": float(variant.beta_fast),
        "beta_slow": float(variant.beta_slow),
    }
    if not variant.truncate:
        keys["truncate"] = False
    if variant.attention_factor is not None or (variant.mscale, variant.mscale_all_dim) != (1.0, 0.0):
        # Written outright: transformers ignores one of mscale and mscale_all_dim without the other.
        keys["attention_factor"] = variant.attention_scaling
    return keys


def _longrope_to_hf(variant: LongRope) -> Keys:
    return {
        "rope_type": "longrope",
        "factor": float(variant.factor),
        "short_factor": list(variant.short_factor),
        "long_factor": list(variant.long_factor),
        "original_max_position_embeddings": variant.original_max_position_embeddings,
        "attention_factor": variant.attention_scaling,
    }


_TO_HF: dict[type[RopeVariant], Callable[[Any], Keys]] = {
    PiRope: _linear_to_hf,
    DynamicNtkRope: _dynamic_to_hf,
    NtkByPartsRope: _by_parts_to_hf,
    Llama3Rope: _by_parts_to_hf,
    YarnRope: _yarn_to_hf,
    LongRope: _longrope_to_hf,
}


def _default_from_hf(params: Keys, config: Mapping[str, Any]) -> RopeVariant:
    return Rope(base=params["base"])


def _linear_from_hf(params: Keys, config: Mapping[str, Any]) -> RopeVariant:
    return PiRope(base=params["base"], factor=params["factor"])


def _dynamic_from_hf(params: Keys, config: Mapping[str, Any]) -> RopeVariant:
    # Not rope_scaling's own original length: transformers starts to stretch at max_position_embeddings.
    trained = config["max_position_embeddings"]
    return DynamicNtkRope(base=params["base"], factor=params["factor"], original_max_position_embeddings=trained)


def _llama3_from_hf(params: Keys, config: Mapping[str, Any]) -> RopeVariant:
    return Llama3Rope(
        base=params["base"],
        factor=params["factor"],
        low_freq_factor=params["low_freq_factor"],
        high_freq_factor=params["high_freq_factor"],
        original_max_position_embeddings=params["original_max_position_embeddings"],
    )


def _yarn_from_hf(params: Keys, config: Mapping[str, Any]) -> RopeVariant:
    mscale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
    if not (mscale and all_dim):
        mscale, all_dim = 1.0, 0.0  # transformers reads the two together or not at all
    return YarnRope(
        base=params["base"],
        factor=params["factor"],
        original_max_position_embeddings=params.get("original_max_position_embeddings") or config["max_position_embeddings"],
        beta_fast=params.get("beta_fast") or 32.0,
        beta_slow=params.get("beta_slow") or 1.0,
        mscale=mscale,
        mscale_all_dim=all_dim,
        truncate=params.get("truncate", True),
        attention_factor=params.get("attention_factor"),
    )


def _longrope_from_hf(params: Keys, config: Mapping[str, Any]) -> RopeVariant:
    original = config.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    # With a trained length of its own in the config, transformers ignores `factor` for the ratio of the two lengths.
    factor = config["max_position_embeddings"] / original if original else params["factor"]
    return LongRope(
        base=params["base"],
        factor=max(float(factor), 1.0),
        short_factor=tuple(params["short_factor"]),
        long_factor=tuple(params["long_factor"]),
        original_max_position_embeddings=original or config["max_position_embeddings"],
        attention_factor=params.get("attention_factor"),
    )


_FROM_HF: dict[str, Callable[[Keys, Mapping[str, Any]], RopeVariant]] = {
    "default": _default_from_hf,
    "linear": _linear_from_hf,
    "dynamic": _dynamic_from_hf,
    "llama3": _llama3_from_hf,
    "yarn": _yarn_from_hf,
    "longrope": _longrope_from_hf,
    "su": _longrope_from_hf,  # LongRoPE's name in the first Phi-3 releases
}

# What one config says may be either of two variants here: (read, asked for) -> the second.
_ALSO: dict[tuple[type[RopeVariant], type[RopeVariant]], Callable[[Any], Any]] = {
    (Rope, AbfRope): lambda rope: AbfRope(base=rope.base),
    (Llama3Rope, NtkByPartsRope): lambda rope: NtkByPartsRope(
        base=rope.base,
        factor=rope.factor,
        original_max_position_embeddings=rope.original_max_position_embeddings,
        beta_slow=rope.low_freq_factor,
        beta_fast=rope.high_freq_factor,
    ),
}
