"""RoPE variants to and from a transformers `config.json`: 4.x (`rope_theta`, `rope_scaling`) and 5.x (`rope_parameters`).

Where layers with a window have a plain RoPE of their own, 4.x says its base as `rope_local_base_freq` (Gemma 3) or gives it
`rope_theta` without the scaling (OLMo 3), and 5.x has one set of parameters a layer type.

Variants are known here by name and fields alone (`RopeVariant` imports this module, not the other way round).
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

from nemo_longctx.config import ConfigError, did_you_mean, is_finite

Keys = dict[str, Any]
Found = tuple[str, Keys]  # a variant's name and its fields

LONGEST = 2**31  # tokens; transformers makes tensors of lengths, which hold no more than 64 bits
ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"
NO_XPOS = "transformers has no xPos: its RoPE cannot scale q and k by position; keep it in NeMo"


def write(variant: Any, *, rotary_dim: int, max_position_embeddings: int, version: int, partial_rotary_factor: float) -> Keys:
    """`RopeVariant.to_hf`."""
    if version not in (4, 5):
        raise ConfigError("transformers", version, "only configs of major versions 4 and 5 are known")
    if variant.variant == "xpos":
        raise ConfigError("rope.variant", variant.variant, NO_XPOS)
    max_position_embeddings = _length("max_position_embeddings", max_position_embeddings)
    if not 0 < _number("partial_rotary_factor", partial_rotary_factor) <= 1:
        raise ConfigError("partial_rotary_factor", partial_rotary_factor, "a share of a head's dimensions: above 0, up to 1")
    variant.inv_freq(rotary_dim)  # refuses a size that this variant has no frequencies for, as transformers would only later
    theta = variant.plain_base(rotary_dim)
    scaling = _TO_HF[variant.variant](variant) if variant.variant in _TO_HF else {}
    if variant.variant == "dynamic_ntk":
        max_position_embeddings = variant.original_max_position_embeddings
    partial = {} if partial_rotary_factor == 1.0 else {"partial_rotary_factor": partial_rotary_factor}
    keys: Keys = {"max_position_embeddings": max_position_embeddings}
    local = variant.local_base
    if version == 5:
        everywhere = {"rope_type": "default", "rope_theta": theta, **scaling, **partial}
        windowed = {"rope_type": "default", "rope_theta": local, **partial}
        keys["rope_parameters"] = everywhere if local is None else {FULL: everywhere, SLIDING: windowed}
        return keys
    if local is not None:
        keys["rope_local_base_freq"] = float(local)
    keys |= {"rope_theta": theta, "rope_scaling": scaling or None, **partial}
    if variant.variant == "longrope":
        # transformers 4 reads LongRoPE's trained length from the top of the config alone.
        keys["original_max_position_embeddings"] = variant.original_max_position_embeddings
    return keys


def read(config: Mapping[str, Any]) -> Found:
    """Name and fields of the variant that `config` asks for (`RopeVariant.from_hf`)."""
    if not isinstance(config, Mapping):
        raise ConfigError("config", config, "must be a mapping, as a config.json holds or PretrainedConfig.to_dict() gives")
    config = _language_model(config)
    params = _parameters(config)
    rope_type = _rope_type(params, config)
    params["base"] = _base(params, config)
    try:
        name, fields = _FROM_HF[rope_type](params, config)
    except KeyError as error:
        raise ConfigError(f"rope_scaling.{error.args[0]}", None, f"missing; rope_type {rope_type!r} needs it") from error
    local = _local_base(config, params["base"])
    if local is not None and (name, local) != ("rope", params["base"]):
        fields["local_base"] = local
    return name, fields


def read_as(config: Mapping[str, Any], wanted: str) -> Keys:
    """Fields of the variant named `wanted`, which `config` must be able to mean (`YarnRope.from_hf` and its like)."""
    name, fields = read(config)
    if name == wanted:
        return fields
    if (name, wanted) in _ALSO:
        local = {"local_base": fields["local_base"]} if "local_base" in fields else {}
        return {ours: fields[theirs] for ours, theirs in _ALSO[name, wanted].items()} | local
    config = _language_model(config)
    rope_type = _rope_type(_parameters(config), config)
    if wanted == "xpos":
        raise ConfigError("rope_type", rope_type, NO_XPOS)
    raise ConfigError("rope_type", rope_type, f"says {name!r}, not {wanted!r}; read it with RopeVariant.from_hf")


# The base of a config that names none, where it is another than RoPE's own 10,000: transformers' classes of these families.
_BASES = {
    "mixtral": 1e6, "gemma3": 1e6, "gemma3_text": 1e6, "smollm3": 2e6, "llama4_text": 5e5, "gpt_oss": 1.5e5,
    "gemma3n_text": 1e6, "phimoe": 1e6, "minimax": 1e6, "lfm2": 1e6, "qwen2_vl_text": 1e6, "qwen2_5_vl_text": 1e6,
    "qwen3_vl_text": 5e6, "qwen3_vl_moe_text": 5e6, "ernie4_5": 5e5, "ernie4_5_moe": 5e5, "flex_olmo": 5e5, "bitnet": 5e5,
    "apertus": 1.2e7, "longcat_flash": 1e7, "helium": 1e5, "falcon_h1": 1e5, "persimmon": 25_000.0,
}  # fmt: skip
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")  # a language model's settings, of a larger one
_SAYS_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")


def _language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`config`, or of a multimodal model, whose own says nothing of RoPE, what it says of the language model in it."""
    inner = next((config[key] for key in _NESTED if isinstance(config.get(key), Mapping)), None)
    if inner is None or any(config.get(key) is not None for key in _SAYS_ROPE):
        return config
    return _language_model(inner if inner.get("model_type") else {**inner, "model_type": config.get("model_type")})


def _base(params: Keys, config: Mapping[str, Any]) -> float:
    """`rope_theta`, which transformers 4 reads from the top of the config alone; a null is refused, since it fails there."""
    places = [params, config] if _is_v5(config) else [config]
    for place in places:
        if "rope_theta" in place:
            if place["rope_theta"] is None:
                mend = "null, of which no reader makes frequencies; write the base that the model was trained with"
                raise ConfigError("rope_theta", None, mend)
            return _number("rope_theta", place["rope_theta"])
    family = config.get("model_type")
    return _BASES.get(family, 10_000.0) if isinstance(family, str) else 10_000.0


def _is_v5(config: Mapping[str, Any]) -> bool:
    """Whether `config` has the keys of transformers 5, whose rules then hold, not those of 4."""
    return bool(config.get("rope_parameters"))


def _parameters(config: Mapping[str, Any]) -> Keys:
    key = "rope_parameters" if _is_v5(config) else "rope_scaling"
    params = config.get(key)
    if params is None:
        return {}
    if not isinstance(params, Mapping):
        raise ConfigError(key, params, "must be a mapping with rope_type and what it needs, or null")
    if not any(isinstance(each, Mapping) for each in params.values()):
        return dict(params)
    kinds = {kind: each for kind, each in params.items() if isinstance(each, Mapping)}
    windowed = kinds.get(SLIDING, {})
    if key == "rope_scaling" or set(params) != {FULL, SLIDING} or len(kinds) != 2:
        mend = f"one set a layer type is known as {FULL} and {SLIDING}, in rope_parameters"
        raise ConfigError(key, sorted(map(str, params)), mend)
    if windowed.get("rope_type", "default") != "default" or windowed.get("rope_theta") is None:
        mend = "layers with a window can have plain RoPE here: rope_type default, and its rope_theta"
        raise ConfigError(f"{key}.{SLIDING}", dict(windowed), mend)
    return dict(kinds[FULL])


_LOCAL_BASES = {"gemma3": 1e4, "gemma3_text": 1e4, "gemma3n_text": 1e4}  # of configs that do not say rope_local_base_freq


def _local_base(config: Mapping[str, Any], base: float) -> float | None:
    """The base of layers with a window where they have a RoPE of their own, as the family's class of transformers reads it."""
    nested = config.get("rope_parameters") or {}
    if isinstance(nested.get(SLIDING), Mapping):
        return _number(f"rope_parameters.{SLIDING}.rope_theta", nested[SLIDING]["rope_theta"])
    family = config.get("model_type")
    if family is not None and not isinstance(family, str):
        return None
    if family == "olmo3":
        return base
    if family in _LOCAL_BASES or (family is None and config.get("rope_local_base_freq") is not None):
        return _number("rope_local_base_freq", config.get("rope_local_base_freq", _LOCAL_BASES.get(str(family))))
    return None


def _rope_type(params: Keys, config: Mapping[str, Any]) -> str:
    names = {key: params[key] for key in ("rope_type", "type") if key in params}  # the second: its name in old releases
    if len(names) == 2 and names["rope_type"] != names["type"]:
        raise ConfigError(
            "rope_type", names["rope_type"], f"the same mapping says type={names['type']!r}; leave one of them out"
        )
    if not names and params and not _is_v5(config):
        raise ConfigError("rope_scaling.rope_type", None, "missing; transformers 4 cannot read a rope_scaling without it")
    rope_type = next(iter(names.values()), "default")
    if not isinstance(rope_type, str) or rope_type not in _FROM_HF:
        raise ConfigError("rope_type", rope_type, f"no variant for it, {did_you_mean(str(rope_type), _FROM_HF)}")
    return rope_type


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not is_finite(value):
        raise ConfigError(key, value, "not a number")
    return float(value)


def _length(key: str, value: Any) -> int:
    whole = isinstance(value, numbers.Integral) or (isinstance(value, float) and is_finite(value) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 1:
        raise ConfigError(key, value, "must be a whole number of tokens, 1 or more")
    if value > LONGEST:
        raise ConfigError(key, value, f"is beyond every model ({LONGEST:,} tokens at most)")
    return int(value)


def _trained_length(config: Mapping[str, Any], *places: Mapping[str, Any]) -> int:
    """The length that a stretched model was trained at: said by the first of `places` that says one, else the whole length."""
    said = [place[ORIGINAL] for place in places if place.get(ORIGINAL) is not None]
    return _length(ORIGINAL, said[0]) if said else _length("max_position_embeddings", config["max_position_embeddings"])


def _places(params: Keys, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Where Llama-3's and YaRN's trained length may stand: transformers 5 looks at the top of the config first, 4 never."""
    return (config, params) if _is_v5(config) else (params,)


def _linear_to_hf(variant: Any) -> Keys:
    return {"rope_type": "linear", "factor": float(variant.factor)}


def _dynamic_to_hf(variant: Any) -> Keys:
    return {"rope_type": "dynamic", "factor": float(variant.factor)}  # its trained length is max_position_embeddings


def _by_parts_to_hf(variant: Any) -> Keys:
    """NTK-by-parts is the formula that transformers knows as llama3, its beta_slow and beta_fast the two freq factors."""
    low = variant.low_freq_factor if variant.variant == "llama3" else variant.beta_slow
    high = variant.high_freq_factor if variant.variant == "llama3" else variant.beta_fast
    return {
        "rope_type": "llama3",
        "factor": float(variant.factor),
        "low_freq_factor": float(low),
        "high_freq_factor": float(high),
        "original_max_position_embeddings": variant.original_max_position_embeddings,
    }


def _yarn_to_hf(variant: Any) -> Keys:
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


def _longrope_to_hf(variant: Any) -> Keys:
    return {
        "rope_type": "longrope",
        "factor": float(variant.factor),
        "short_factor": list(variant.short_factor),
        "long_factor": list(variant.long_factor),
        "original_max_position_embeddings": variant.original_max_position_embeddings,
        "attention_factor": variant.attention_scaling,
    }


_TO_HF: dict[str, Callable[[Any], Keys]] = {
    "pi": _linear_to_hf,
    "dynamic_ntk": _dynamic_to_hf,
    "ntk_by_parts": _by_parts_to_hf,
    "llama3": _by_parts_to_hf,
    "yarn": _yarn_to_hf,
    "longrope": _longrope_to_hf,
}


def _default_from_hf(params: Keys, config: Mapping[str, Any]) -> Found:
    return "rope", {"base": params["base"]}


def _linear_from_hf(params: Keys, config: Mapping[str, Any]) -> Found:
    return "pi", {"base": params["base"], "factor": params["factor"]}


def _dynamic_from_hf(params: Keys, config: Mapping[str, Any]) -> Found:
    # Not rope_scaling's own original length: transformers starts to stretch at max_position_embeddings.
    trained = _length("max_position_embeddings", config["max_position_embeddings"])
    return "dynamic_ntk", {"base": params["base"], "factor": params["factor"], "original_max_position_embeddings": trained}


def _llama3_from_hf(params: Keys, config: Mapping[str, Any]) -> Found:
    if not _is_v5(config) and params.get(ORIGINAL) is None:  # only 5 falls back on the whole length
        raise KeyError(ORIGINAL)
    return "llama3", {
        "base": params["base"],
        "factor": params["factor"],
        "low_freq_factor": params["low_freq_factor"],
        "high_freq_factor": params["high_freq_factor"],
        "original_max_position_embeddings": _trained_length(config, *_places(params, config)),
    }


def _yarn_from_hf(params: Keys, config: Mapping[str, Any]) -> Found:
    mscale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
    if not (mscale and all_dim):
        mscale, all_dim = 1.0, 0.0  # transformers reads the two together or not at all
    return "yarn", {
        "base": params["base"],
        "factor": params["factor"],
        "original_max_position_embeddings": _trained_length(config, *_places(params, config)),
        "beta_fast": params.get("beta_fast") or 32.0,
        "beta_slow": params.get("beta_slow") or 1.0,
        "mscale": mscale,
        "mscale_all_dim": all_dim,
        "truncate": params.get("truncate", True),
        "attention_factor": params.get("attention_factor"),
    }


def _longrope_from_hf(params: Keys, config: Mapping[str, Any]) -> Found:
    """transformers 4 looks for the trained length at the top of the config alone; where it is there, `factor` gives way to the
    ratio of the two lengths. 5 looks in `rope_parameters` too, and takes the ratio only where there is no `factor`."""
    longest = _length("max_position_embeddings", config["max_position_embeddings"])
    at_top = config.get(ORIGINAL) is not None
    trained = _trained_length(config, config, params) if _is_v5(config) else _trained_length(config, config)
    factor, attention_factor = params.get("factor"), params.get("attention_factor")
    if (at_top and not _is_v5(config)) or (factor is None and (_is_v5(config) or attention_factor is not None)):
        factor = longest / trained
    if factor is None:
        mend = f"missing; without it transformers 4 needs {ORIGINAL} at the top of the config, or attention_factor"
        raise ConfigError("rope_scaling.factor", None, mend)
    return "longrope", {
        "base": params["base"],
        "factor": max(_number("factor", factor), 1.0),
        "short_factor": params["short_factor"],
        "long_factor": params["long_factor"],
        "original_max_position_embeddings": trained,
        "attention_factor": attention_factor,
    }


_FROM_HF: dict[str, Callable[[Keys, Mapping[str, Any]], Found]] = {
    "default": _default_from_hf,
    "linear": _linear_from_hf,
    "dynamic": _dynamic_from_hf,
    "llama3": _llama3_from_hf,
    "yarn": _yarn_from_hf,
    "longrope": _longrope_from_hf,
    "su": _longrope_from_hf,  # LongRoPE's name in the first Phi-3 releases
}

# What one config says may be either of two variants here: (read, asked for) -> the second's fields from the first's.
_ALSO: dict[tuple[str, str], dict[str, str]] = {
    ("rope", "abf"): {"base": "base"},
    ("llama3", "ntk_by_parts"): {
        "base": "base",
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position_embeddings",
        "beta_slow": "low_freq_factor",
        "beta_fast": "high_freq_factor",
    },
}
