"""Weights and shapes, Hugging Face <-> Megatron-Core: Llama, Mistral, Qwen2, Qwen3 (dense), SmolLM3, Phi-3, StarCoder2.

The host's converters know Transformer Engine's names of the norms only; these take whichever names the built model has.
Shapes: H query heads, G groups (key and value heads), D head size, E hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from nemo.collections import llm
from nemo.collections.llm.fn.activation import openai_gelu
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
from transformers import GenerationConfig

from nemo_longctx.adapters.megatron.attention import layer_window
from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import HFConfig
from nemo_longctx.hf.directory import HFDirectory
from nemo_longctx.hf.families import FIXED, norm_epsilon
from nemo_longctx.hf.layers import attention_values
from nemo_longctx.model_fields import no_rope_layers

Weights = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: its names on both sides.

    Attributes:
        model_type: transformers' name.
        config_class, model_class: NeMo's.
    """

    model_type: str
    config_class: type[GPTConfig]
    model_class: type[GPTModel]


# Most derived first: Qwen3Config is a Qwen2Config. SmolLM3 is NeMo's Llama whose config leaves some layers without RoPE.
FAMILIES = (
    Family(model_type="qwen3", config_class=llm.Qwen3Config, model_class=llm.Qwen3Model),
    Family(model_type="qwen2", config_class=llm.Qwen2Config, model_class=llm.Qwen2Model),
    Family(model_type="mistral", config_class=llm.MistralConfig7B, model_class=llm.MistralModel),
    Family(model_type="phi3", config_class=llm.Phi3Config, model_class=llm.Phi3Model),
    Family(model_type="starcoder2", config_class=llm.Starcoder2Config, model_class=llm.Starcoder2Model),
    Family(model_type="smollm3", config_class=llm.LlamaConfig, model_class=llm.LlamaModel),
    Family(model_type="llama", config_class=llm.LlamaConfig, model_class=llm.LlamaModel),
)

# transformers' name of an activation -> the host's function. StarCoder2's is the tanh form, which Megatron-Core has as F.gelu
# where it fuses the bias (on GPUs), and not where it does not.
ACTIVATIONS = {"gelu_pytorch_tanh": openai_gelu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}


def family_of_hf(config: HFConfig) -> Family:
    """The family of a checked `config.json`."""
    return next(family for family in FAMILIES if family.model_type == config.model_type)


def family_of_nemo(config: GPTConfig) -> Family:
    """The family of a NeMo config.

    Raises:
        ConfigError: another architecture, experts, or layers that the family's model in transformers cannot have.
    """
    no_rope = any(no_rope_of(config))
    family = next((f for f in FAMILIES if isinstance(config, f.config_class) and (f.model_type != "smollm3" or no_rope)), None)
    if family is None or config.num_moe_experts is not None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise ConfigError(
            "model.config", type(config).__name__, f"cannot be exported; the families that can, without experts: {known}"
        )
    for key, value in (("rotary_percent", 1.0), ("rotary_interleaved", False)):
        if getattr(config, key) != value:
            raise ConfigError(key, getattr(config, key), f"only {value!r} can be exported to transformers' {family.model_type}")
    attention_values(family.model_type, windows_of(config), no_rope_of(config))
    return family


def windows_of(config: GPTConfig) -> tuple[int | None, ...]:
    """Tokens that each layer's queries look back on, themselves included, of a NeMo config; None for all of them."""
    return tuple(layer_window(config, layer + 1) for layer in range(config.num_layers))


def no_rope_of(config: GPTConfig) -> tuple[bool, ...]:
    """Whether each layer of a NeMo config leaves q and k unrotated."""
    said = no_rope_layers(getattr(config, "no_rope_freq", None), config.num_layers, "no_rope_freq")
    return tuple(bool(each) for each in said or [0] * config.num_layers)


def stored_dtype(config: Any, weights: Weights) -> torch.dtype:
    """The type that a model is trained in: what its config says, else that of its weights."""
    said = vars(config).get("dtype") or vars(config).get("torch_dtype")  # by the release of transformers
    named = getattr(torch, said, None) if isinstance(said, str) else said
    return named if isinstance(named, torch.dtype) else next(w.dtype for w in weights.values() if w.is_floating_point())


def nemo_config(found: HFDirectory, family: Family, config_class: type[GPTConfig], dtype: torch.dtype) -> GPTConfig:
    """A NeMo config with the sizes of a checked directory; RoPE is placed afterwards."""
    source, windows = found.config.values, found.config.windows
    fields: dict[str, Any] = {
        "num_layers": source["num_hidden_layers"],
        "hidden_size": source["hidden_size"],
        "ffn_hidden_size": source["intermediate_size"],
        "num_attention_heads": source["num_attention_heads"],
        "num_query_groups": source["num_key_value_heads"],
        "kv_channels": source["head_dim"],
        "vocab_size": source["vocab_size"],
        "layernorm_epsilon": source[norm_epsilon(family.model_type)],
        "init_method_std": source["initializer_range"],
        "share_embeddings_and_output_weights": source["tie_word_embeddings"],
        "seq_length": source["max_position_embeddings"],
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "generation_config": GenerationConfig(**found.generation) if found.generation else None,
        "window_size": None,
    }
    window = next((each for each in windows if each is not None), None)
    if window is not None:
        fields["window_size"] = (window - 1, 0)  # Megatron-Core counts the tokens before the query
        if None in windows:
            fields["window_attn_skip_freq"] = [int(each is not None) for each in windows]
    if any(found.config.no_rope):
        fields["no_rope_freq"] = [int(each) for each in found.config.no_rope]
    if family.model_type == "starcoder2":
        fields["bias_activation_fusion"] = False
        if source["hidden_act"] != "gelu":  # which the class has
            fields["activation_func"] = ACTIVATIONS[source["hidden_act"]]
    if family.model_type == "qwen3":
        fields["max_position_embeddings"] = source["max_position_embeddings"]
    lacking = sorted(fields.keys() - {field.name for field in dataclasses.fields(config_class)})
    if lacking:
        mend = f"its layers differ ({', '.join(lacking)}), which this version of NeMo cannot build; take a newer one"
        raise ConfigError("HF_DIR", str(found.path), mend)
    return config_class(**fields)


def hf_fields(config: GPTConfig, family: Family) -> dict[str, Any]:
    """The sizes of a NeMo config as a transformers config's fields; RoPE and token numbers are added by the caller."""
    return {
        "model_type": family.model_type,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups or config.num_attention_heads,
        "head_dim": config.kv_channels or config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        norm_epsilon(family.model_type): config.layernorm_epsilon,
        "hidden_act": next((name for name, func in ACTIVATIONS.items() if func is config.activation_func), "silu"),
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        **FIXED[family.model_type],
        **attention_values(family.model_type, windows_of(config), no_rope_of(config)),
    }


def to_megatron(source: Weights, names: set[str], config: GPTConfig) -> Weights:
    """Hugging Face weights -> a Megatron-Core model's.

    Args:
        source: name -> tensor.
        names: the Megatron-Core model's own names, which say where its norms are.
    """
    outside = {**_OUTSIDE, **({"lm_head.weight": "output_layer.weight"} if "output_layer.weight" in names else {})}
    target = {ours: source[theirs] for theirs, ours in outside.items() if theirs in source}
    for i in range(config.num_layers):
        hf, mcore = f"model.layers.{i}.", f"decoder.layers.{i}."
        for theirs, ours in _plain_names(mcore, names, config).items():
            if hf + theirs in source:
                target[mcore + ours] = source[hf + theirs]
        for kind in ("weight", "bias"):
            parts = [f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv"]
            fused = source.get(f"{hf}self_attn.qkv_proj.{kind}")  # Phi-3's
            if parts[0] in source or fused is not None:
                q, k, v = (source[name] for name in parts) if fused is None else fused.split(_rows(config))
                target[f"{mcore}self_attention.linear_qkv.{kind}"] = merge_qkv(q, k, v, config)
        halves = [source[name] for name in (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight") if name in source]
        if halves:
            target[f"{mcore}mlp.linear_fc1.weight"] = torch.cat(halves)
    return target


def to_hugging_face(source: Weights, config: GPTConfig) -> Weights:
    """A Megatron-Core model's weights -> Hugging Face's; padding of the vocabulary is cut off."""
    outside = {**_OUTSIDE, "lm_head.weight": "output_layer.weight"}
    target = {theirs: source[ours] for theirs, ours in outside.items() if ours in source}
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(target):
        target[name] = target[name][: config.vocab_size]
    names, fused = set(source), isinstance(config, llm.Phi3Config)
    for i in range(config.num_layers):
        hf, mcore = f"model.layers.{i}.", f"decoder.layers.{i}."
        for theirs, ours in _plain_names(mcore, names, config).items():
            if mcore + ours in source:
                target[hf + theirs] = source[mcore + ours]
        for kind in ("weight", "bias"):
            merged = source.get(f"{mcore}self_attention.linear_qkv.{kind}")
            if merged is None:
                continue
            parts = split_qkv(merged, config)
            named = {"qkv": torch.cat(parts)} if fused else dict(zip("qkv", parts, strict=True))
            target |= {f"{hf}self_attn.{x}_proj.{kind}": part for x, part in named.items()}
        if config.gated_linear_unit and not fused:
            gate, up = source[f"{mcore}mlp.linear_fc1.weight"].chunk(2)
            target[f"{hf}mlp.gate_proj.weight"], target[f"{hf}mlp.up_proj.weight"] = gate, up
    return target


_OUTSIDE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "model.norm.bias": "decoder.final_layernorm.bias",
}


def _plain_names(mcore: str, names: set[str], config: GPTConfig) -> dict[str, str]:
    """Weights of a layer that need no rearrangement: Hugging Face's name -> Megatron-Core's."""

    def norm(local: str, fused: str) -> str:
        return local if mcore + local in names else fused  # Transformer Engine fuses a norm into the projection after it

    plain = {
        "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
        "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    }
    down = "mlp.down_proj"
    if isinstance(config, llm.Phi3Config):
        plain["mlp.gate_up_proj.weight"] = "mlp.linear_fc1.weight"  # its halves in the same order
    if isinstance(config, llm.Starcoder2Config):
        down = "mlp.c_proj"
        plain |= {f"mlp.c_fc.{kind}": f"mlp.linear_fc1.{kind}" for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        plain |= {
            f"self_attn.o_proj.{kind}": f"self_attention.linear_proj.{kind}",
            f"{down}.{kind}": f"mlp.linear_fc2.{kind}",
            f"input_layernorm.{kind}": norm(f"input_layernorm.{kind}", f"self_attention.linear_qkv.layer_norm_{kind}"),
            f"post_attention_layernorm.{kind}": norm(f"pre_mlp_layernorm.{kind}", f"mlp.linear_fc1.layer_norm_{kind}"),
        }
    return plain


def merge_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: GPTConfig) -> torch.Tensor:
    """q [H*D, ...], k and v [G*D, ...] -> Megatron-Core's [(H + 2G) * D, ...]: by group, its queries, its key, its value."""
    groups, size = _heads(config)
    rest = q.shape[1:]
    parts = [x.view(groups, -1, size, *rest) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def split_qkv(merged: torch.Tensor, config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `merge_qkv`."""
    groups, size = _heads(config)
    rest = merged.shape[1:]
    by_group = merged.view(groups, -1, size, *rest)
    q, k, v = by_group.split([by_group.shape[1] - 2, 1, 1], dim=1)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def _rows(config: GPTConfig) -> list[int]:
    """Rows of a fused projection's q, k and v."""
    groups, size = _heads(config)
    return [config.num_attention_heads * size, groups * size, groups * size]


def _heads(config: GPTConfig) -> tuple[int, int]:
    groups = config.num_query_groups or config.num_attention_heads
    return groups, config.kv_channels or config.hidden_size // config.num_attention_heads
