"""`config.json` of the families that convert: every field that says something, with transformers' own defaults, checked.

A field that no model of the family reads is dropped; one that would be lost, or that transformers cannot read either, is a
ConfigError. Both forms are taken: transformers 4's (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5's (`rope_parameters`,
`dtype`, `layer_types`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError, is_finite
from nemo_longctx.hf.families import ACTIVATIONS, DEFAULTS, FIXED, norm_epsilon, refusal
from nemo_longctx.hf.files import KEY
from nemo_longctx.hf.layers import ALL_SLIDE, attention_values, no_rope_of, windows_of
from nemo_longctx.rope.base import RopeVariant

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ALSO_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")  # with a default, or null
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_sliding_window", "use_cache")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
PHI3_TRAINED = 4096
DTYPES = ("float32", "float16", "bfloat16")
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor")
_LARGEST = {"head_dim": 2**16, "num_hidden_layers": 2**16, "num_attention_heads": 2**20, "hidden_size": 2**24}
_ROPE_FIELDS = (
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor",
)  # fmt: skip
# What another family's layers compute by: in a config.json of a family that converts, transformers passes over it.
_OTHERS = (
    "rotary_pct", "rope_pct", "rotary_dim", "rope_local_base_freq", "use_mrope", "logit_scale", "logits_scaling", "scale_emb",
    "scale_depth", "dim_model_base", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
    "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "use_qk_norm", "qk_norm", "qk_layernorm",
    "num_local_experts", "num_experts", "attention_chunk_size", "pruned_heads", "num_nextn_predict_layers",
    "use_bidirectional_attention", "add_cross_attention",
    "dual_chunk_attention_config", "sparse_config", "llama_4_scaling_beta",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """What a `config.json` says, all of it checked.

    Attributes:
        values: the keys that transformers 4 needs to build the model and read its RoPE, and no others.
        variant: its RoPE.
        windows: tokens that each layer's queries look back on, themselves included; None for all of them.
        no_rope: whether each layer leaves q and k unrotated.
        notes: what was dropped or read otherwise than it stands there, a sentence each.
    """

    values: Mapping[str, Any]
    variant: RopeVariant
    windows: tuple[int | None, ...]
    no_rope: tuple[bool, ...]
    notes: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture."""
        return self.values["model_type"]

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return self.values["head_dim"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a directory, which must be a mapping.

    Raises:
        ConfigError: absent, not text, not JSON, or another thing than a mapping.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(KEY, str(path), f"cannot be read ({error.strerror or type(error).__name__})") from error
    except (ValueError, RecursionError) as error:  # also bytes that are no text
        raise ConfigError(KEY, str(path), f"is not JSON ({error}); copy or download it again") from error
    if not isinstance(values, dict):
        raise ConfigError(KEY, str(path), f"holds a {type(values).__name__}, where a mapping of settings was looked for")
    return values


def read_config(raw: Mapping[str, Any]) -> HFConfig:
    """Check what a `config.json` holds.

    Raises:
        ConfigError: another architecture, quantised weights, a field that would be lost or that says nothing usable.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in DEFAULTS:
        raise refusal(family, raw)
    _refuse_quantised(raw)
    notes: list[str] = []
    _check_head(raw)
    if raw.get("auto_map"):
        notes.append(f"the code that comes with the directory (auto_map) is not run: it is taken as transformers' own {family}")
    found = {**DEFAULTS[family], **{key: raw[key] for key in raw if key not in ROPE_KEYS}}
    values: dict[str, Any] = {"model_type": family}
    values |= {key: _size(found, key) for key in SIZES}
    values |= {key: _size(found, key, optional=True) for key in ALSO_SIZES}
    values |= {key: _flag(found, key) for key in FLAGS if key in found}
    values |= {key: _number(found, key) for key in (norm_epsilon(family), "initializer_range")}
    _heads(values)
    _check_fixed(family, found, values)
    for key in TOKENS:
        default = DEFAULTS[family].get(key)
        if key not in raw and default is not None and default >= values["vocab_size"]:
            found[key] = None  # StarCoder2's class names tokens that its own vocabulary has not
        values[key] = token_numbers(found, key, values["vocab_size"], notes)
    values |= _dtype(found)
    windows = windows_of(family, found, values, notes)
    no_rope = no_rope_of(family, found, values)
    values |= _rope_values(raw, family, values)
    notes += _passed_over(raw, family)
    if raw.get("rope_parameters"):
        notes.append(
            "transformers 4 does not read rope_parameters; it is given the same RoPE as rope_theta and rope_scaling, so a "
            "comparison cannot show how transformers 5 would read them"
        )
    try:
        variant = RopeVariant.from_hf(values)
        for length in (2, values["max_position_embeddings"]):
            variant.inv_freq(values["head_dim"], length)
        _ = variant.attention_scaling
    except (ArithmeticError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        said = raw.get("rope_scaling") or raw.get("rope_parameters")
        raise ConfigError("rope_scaling", said, f"gives no frequencies: {error}") from error
    values |= attention_values(family, windows, no_rope)
    return HFConfig(values=values, variant=variant, windows=windows, no_rope=no_rope, notes=tuple(notes))


def _refuse_quantised(raw: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):  # the last one is MLX's
        settings = raw.get(key)
        if settings is None:
            continue
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        mend = (
            "its weights are quantised; import the original in bf16 or fp32, or dequantise it first (transformers: "
            "model.dequantize(), then save_pretrained)"
        )
        raise ConfigError(key, method or settings, mend)


def _check_head(raw: Mapping[str, Any]) -> None:
    """Refuse a model whose head is none of a language model: a classifier's, a reward model's."""
    names = raw.get("architectures")
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and "For" in name and not name.endswith("ForCausalLM"):
            mend = "has another head than a language model's, which would be lost; take the model that it was made from"
            raise ConfigError("architectures", names, mend)


def _size(found: Mapping[str, Any], key: str, *, optional: bool = False) -> int | None:
    value = found.get(key)
    if value is None and optional:
        return None
    if value is None:
        raise ConfigError(key, None, "missing in config.json; take it from the model that the weights are of")
    if isinstance(value, float) and is_finite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(key, value, "must be a whole number of 1 or more, in config.json")
    if value > _LARGEST.get(key, 2**31):  # what follows makes tables of these sizes
        raise ConfigError(key, value, f"is beyond every model ({_LARGEST.get(key, 2**31):,} at most); mend config.json")
    return value


def _number(found: Mapping[str, Any], key: str) -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value) or value < 0:
        raise ConfigError(key, value, "must be a number of 0 or more, in config.json")
    return float(value)


def _flag(found: Mapping[str, Any], key: str) -> bool:
    value = found.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(key, value, "must be true or false, in config.json")
    return bool(value)


def _heads(values: dict[str, Any]) -> None:
    """Resolve the sizes that may be null, and refuse those that do not go together."""
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    if heads % values["num_key_value_heads"]:
        raise ConfigError("num_key_value_heads", values["num_key_value_heads"], f"must divide num_attention_heads={heads}")
    if values["head_dim"] is None and values["hidden_size"] % heads:
        raise ConfigError("num_attention_heads", heads, f"does not divide hidden_size={values['hidden_size']}; set head_dim")
    values["head_dim"] = _size({"head_dim": values["head_dim"] or values["hidden_size"] // heads}, "head_dim")
    if values["max_position_embeddings"] is None:
        raise ConfigError("max_position_embeddings", None, "write the longest input in tokens that the model was trained on")


def _check_fixed(family: str, found: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Refuse what the host's class cannot be."""
    act = found.get("hidden_act")
    known = ACTIVATIONS.get(family, ("silu", "swish"))
    if not isinstance(act, str) or act not in known:
        raise ConfigError("hidden_act", act, f"a {family} model of the host has {known[0]!r} and would not compute the same")
    values["hidden_act"] = "silu" if act == "swish" else act
    for key, wanted in FIXED[family].items():
        if values.get(key, wanted) != wanted:
            mend = f"a {family} model of the host has {wanted!r} there and would not compute the same"
            raise ConfigError(key, values[key], mend)
    dropout = found.get("attention_dropout")
    if dropout is not None and (isinstance(dropout, bool) or not isinstance(dropout, (int, float))):
        raise ConfigError("attention_dropout", dropout, "must be a number, in config.json")


def token_numbers(found: Mapping[str, Any], key: str, vocab_size: int, notes: list[str], *, file: str = "config.json") -> Any:
    """A special token's number, a list of them, or None, all within the vocabulary.

    Raises:
        ConfigError: no whole number, or one beyond the embedding.
    """
    value = found.get(key)
    if value is None:
        return None
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ConfigError(key, value, f"must be a token's number, in {file}")
        if number >= vocab_size:
            mend = (
                f"outside the {vocab_size} rows of the embedding, in {file}; set a token that the model has, or resize its "
                "embedding (transformers: model.resize_token_embeddings) and save it again"
            )
            raise ConfigError(key, value, mend)
    if isinstance(value, list) and (not value or key != "eos_token_id"):
        raise ConfigError(key, value, f"must be one token's number, in {file}")
    if isinstance(value, int) and value < 0:
        notes.append(f"{key}={value} in {file} means none")
        return None
    if isinstance(value, list) and min(value) < 0:
        raise ConfigError(key, value, f"must be numbers of 0 or more, in {file}")
    return value


def _dtype(found: Mapping[str, Any]) -> dict[str, str]:
    """The type of the weights under its name in transformers 4.57; nothing where the weights themselves say it."""
    value = found.get("dtype", None)
    value = found.get("torch_dtype") if value is None else value
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is None or name == "auto":
        return {}
    if name not in DTYPES:
        known = ", ".join(DTYPES)
        raise ConfigError("dtype", value, f"weights of this type cannot be trained; known: {known} (dequantise others first)")
    return {"dtype": name}


def check_one_rope(variant: RopeVariant) -> None:
    """Refuse what no class of transformers that the host's weights fit can say.

    Raises:
        ConfigError: layers with a window have a RoPE of their own.
    """
    if variant.local_base is not None:
        mend = (
            "no class of transformers has this model's layers with two RoPEs (OLMo 3 and Gemma 3 norm elsewhere); it stays in "
            "NeMo, where generate, chat and eval read it"
        )
        raise ConfigError("rope.layers", "full_attention", mend)


def family_rope(family: str, variant: RopeVariant, keys: Mapping[str, Any]) -> dict[str, Any]:
    """`RopeVariant.to_hf`'s keys as the family's config class in transformers takes them.

    Raises:
        ConfigError: Phi-3 under another scaling than LongRoPE's, or layers with a window that have a RoPE of their own.
    """
    check_one_rope(variant)
    if family != "phi3":
        return dict(keys)
    if not keys.get("rope_scaling"):  # its class would say 4,096 there, which tools take for a stretch from that length
        return {**keys, "original_max_position_embeddings": keys["max_position_embeddings"]}
    if variant.variant != "longrope":
        raise ConfigError("rope.variant", variant.variant, "transformers' phi3 takes no scaling of RoPE but longrope")
    scaling = {key: keys["rope_scaling"][key] for key in ("short_factor", "long_factor")}
    return {**keys, "rope_scaling": {"type": "longrope", **scaling}}


def _passed_over(raw: Mapping[str, Any], family: str) -> list[str]:
    """A sentence on settings that change what a model computes, and that neither transformers nor the host reads here."""
    notes = []
    if "max_position_embeddings" not in raw:
        longest = DEFAULTS[family]["max_position_embeddings"]
        notes.append(f"max_position_embeddings is not said: {longest:,} tokens, as transformers takes it for {family}")
    said = raw.get("max_sequence_length")  # LongChat's and Vicuna's word for what linear scaling reaches
    longest = raw.get("max_position_embeddings")
    if isinstance(said, int) and isinstance(longest, int) and said > longest:
        notes.append(
            f"max_sequence_length={said:,} is read by no class of transformers: lengths and rope.factor are counted from "
            f"max_position_embeddings={longest:,}; write {said} there if the model was trained so far"
        )
    windowed = ("sliding_window", "layer_types", "use_sliding_window") if family == "llama" else ()
    others = [key for key in (*_OTHERS, *windowed) if raw.get(key)]
    if family in ALL_SLIDE and raw.get("use_sliding_window") is False and raw.get("sliding_window"):
        notes.append(
            f"use_sliding_window=false: transformers' {family} does not read it and keeps its window; write null there"
        )
    if raw.get("is_causal") is False:
        notes.append(f"is_causal=false: transformers' {family} does not read it; each token sees those before it alone")
    if others:
        notes.append(f"{', '.join(others)}: transformers' {family} does not read it, and neither does the import")
    for where in ("rope_scaling", "rope_parameters"):
        scaling = raw.get(where)
        unread = sorted(set(map(str, scaling)) - {*_ROPE_FIELDS, "type", *ROPE_KEYS}) if isinstance(scaling, Mapping) else []
        if unread:
            notes.append(f"{where}: {', '.join(unread)} is read by no RoPE of transformers' {family}; left out")
    return notes


def _check_phi3_scaling(scaling: Mapping[str, Any]) -> None:
    """Phi-3's class takes three fields and no others, and reads its trained length from the top of the config."""
    if set(scaling) != {"type", "short_factor", "long_factor"} or scaling["type"] not in ("longrope", "su"):
        mend = "transformers' phi3 takes type 'longrope', short_factor and long_factor, and nothing else"
        raise ConfigError("rope_scaling", dict(scaling), mend)


def _rope_values(raw: Mapping[str, Any], family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE keys in transformers 4's form, without what no reader of them knows.

    Raises:
        ConfigError: a partial rotation, or the two forms side by side with different words.
    """
    longest = {"max_position_embeddings": values["max_position_embeddings"], "model_type": family}
    given = {key: raw[key] for key in ROPE_KEYS if key in raw} | longest
    if family == "phi3":  # its class always has one, which longrope then reads
        given.setdefault("original_max_position_embeddings", PHI3_TRAINED)
    nested = given.get("rope_parameters")
    for where in (given, nested if isinstance(nested, Mapping) else {}):
        share = where.get("partial_rotary_factor")
        if share is not None and (isinstance(share, bool) or share != 1):
            raise ConfigError("partial_rotary_factor", share, f"a {family} model of the host rotates whole heads")
    variant = RopeVariant.from_hf(given)
    if variant.local_base is not None:
        mend = f"one set a layer type, where transformers' {family} has one RoPE for all of its layers"
        raise ConfigError("rope_parameters", sorted(map(str, nested or {})), mend)
    if nested and (given.get("rope_scaling") or given.get("rope_theta") is not None):
        old = RopeVariant.from_hf({key: value for key, value in given.items() if key != "rope_parameters"})
        if old != variant:
            mend = f"says {variant}, but rope_theta and rope_scaling beside it say {old}; leave one of the two out"
            raise ConfigError("rope_parameters", nested, mend)
    if nested:
        keys = variant.to_hf(rotary_dim=values["head_dim"], max_position_embeddings=values["max_position_embeddings"])
        if keys["max_position_embeddings"] != values["max_position_embeddings"]:  # dynamic NTK's is the trained length
            raise ConfigError("rope_parameters", nested, "a trained length unlike max_position_embeddings is not read alike")
        return family_rope(family, variant, keys)
    scaling = given.get("rope_scaling") or None
    if scaling and family == "phi3":
        _check_phi3_scaling(scaling)
    # As the file has it, not as we read it: an import is compared with what transformers makes of this.
    theta = given.get("rope_theta")
    keys = {"rope_theta": float(variant.base if theta is None else theta), "rope_scaling": None}
    if scaling:
        rope_type = scaling.get("rope_type", scaling.get("type"))
        keys["rope_scaling"] = {key: scaling[key] for key in _ROPE_FIELDS if key in scaling} | {
            "type" if family == "phi3" else "rope_type": rope_type
        }
    if given.get("original_max_position_embeddings") is not None:
        keys["original_max_position_embeddings"] = _size(given, "original_max_position_embeddings")
    return keys
