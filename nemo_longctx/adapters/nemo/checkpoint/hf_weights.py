"""Weights and shapes of the Llama family, Hugging Face <-> Megatron-Core: Llama, Mistral, Qwen2, Qwen3 (dense).

The host's converters know Transformer Engine's names of the norms only; these take whichever names the built model has.
Shapes: H query heads, G groups (key and value heads), D head size, E hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel

from nemo_longctx.config import ConfigError, did_you_mean

Weights = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: its names on both sides.

    Attributes:
        model_type: transformers' name.
        config_class, model_class: NeMo's.
        fixed: what a transformers config must say, since the NeMo class does.
    """

    model_type: str
    config_class: type[GPTConfig]
    model_class: type[GPTModel]
    fixed: Mapping[str, Any]


# Most derived first: Qwen3Config is a Qwen2Config.
FAMILIES = (
    Family(
        model_type="qwen3",
        config_class=llm.Qwen3Config,
        model_class=llm.Qwen3Model,
        fixed={"attention_bias": False, "use_sliding_window": False},
    ),
    Family(model_type="qwen2", config_class=llm.Qwen2Config, model_class=llm.Qwen2Model, fixed={"use_sliding_window": False}),
    Family(
        model_type="mistral", config_class=llm.MistralConfig7B, model_class=llm.MistralModel, fixed={"sliding_window": None}
    ),
    Family(
        model_type="llama",
        config_class=llm.LlamaConfig,
        model_class=llm.LlamaModel,
        fixed={"attention_bias": False, "mlp_bias": False},
    ),
)


def family_of_hf(config: Any) -> Family:
    """The family of a transformers config, checked to be one that converts without loss.

    Raises:
        ConfigError: another architecture, or a setting that the NeMo model would not have.
    """
    by_type = {family.model_type: family for family in FAMILIES}
    if config.model_type not in by_type:
        raise ConfigError("model_type", config.model_type, f"cannot be converted, {did_you_mean(config.model_type, by_type)}")
    family = by_type[config.model_type]
    for key, value in {"hidden_act": "silu", "partial_rotary_factor": 1.0, **family.fixed}.items():
        if getattr(config, key, value) != value:
            mend = f"only {value!r} converts without loss; if that is what you want, say so in config.json"
            raise ConfigError(key, getattr(config, key), mend)
    return family


def family_of_nemo(config: GPTConfig) -> Family:
    """The family of a NeMo config.

    Raises:
        ConfigError: another architecture, experts, or a sliding window.
    """
    family = next((f for f in FAMILIES if isinstance(config, f.config_class)), None)
    if family is None or config.num_moe_experts is not None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise ConfigError(
            "model.config", type(config).__name__, f"cannot be exported; the families that can, without experts: {known}"
        )
    for key, value in (("window_size", None), ("rotary_percent", 1.0), ("rotary_interleaved", False)):
        if getattr(config, key) != value:
            raise ConfigError(key, getattr(config, key), f"only {value!r} can be exported to transformers' {family.model_type}")
    return family


def nemo_config(source: Any, family: Family, config_class: type[GPTConfig], generation_config: Any) -> GPTConfig:
    """A NeMo config with the sizes of a transformers config; RoPE is placed afterwards."""
    heads = source.num_attention_heads
    dtype = getattr(source, "dtype", None) or torch.float32
    fields: dict[str, Any] = {
        "num_layers": source.num_hidden_layers,
        "hidden_size": source.hidden_size,
        "ffn_hidden_size": source.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": source.num_key_value_heads,
        "kv_channels": getattr(source, "head_dim", None) or source.hidden_size // heads,
        "vocab_size": source.vocab_size,
        "layernorm_epsilon": source.rms_norm_eps,
        "init_method_std": source.initializer_range,
        "share_embeddings_and_output_weights": bool(source.tie_word_embeddings),
        "seq_length": source.max_position_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "generation_config": generation_config,
    }
    if family.model_type == "mistral":
        fields["window_size"] = None
    if family.model_type == "qwen3":
        fields["max_position_embeddings"] = source.max_position_embeddings
    return config_class(**fields)


def hf_fields(config: GPTConfig, family: Family) -> dict[str, Any]:
    """The sizes of a NeMo config as a transformers config's fields; RoPE and token numbers are added by the caller."""
    return {
        "model_type": family.model_type,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels or config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.layernorm_epsilon,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        **family.fixed,
    }


def to_megatron(source: Weights, names: set[str], config: GPTConfig) -> Weights:
    """Hugging Face weights -> a Megatron-Core model's.

    Args:
        source: name -> tensor.
        names: the Megatron-Core model's own names, which say where its norms are.
    """
    target = {
        "embedding.word_embeddings.weight": source["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": source["model.norm.weight"],
    }
    if "output_layer.weight" in names:
        target["output_layer.weight"] = source["lm_head.weight"]
    for i in range(config.num_layers):
        hf, mcore = f"model.layers.{i}.", f"decoder.layers.{i}."
        for theirs, ours in _plain_names(mcore, names).items():
            if hf + theirs in source:
                target[mcore + ours] = source[hf + theirs]
        for kind in ("weight", "bias"):
            parts = [f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv"]
            if parts[0] in source:
                q, k, v = (source[name] for name in parts)
                target[f"{mcore}self_attention.linear_qkv.{kind}"] = merge_qkv(q, k, v, config)
        halves = (source[f"{hf}mlp.gate_proj.weight"], source[f"{hf}mlp.up_proj.weight"])
        target[f"{mcore}mlp.linear_fc1.weight"] = torch.cat(halves)
    return target


def to_hugging_face(source: Weights, config: GPTConfig) -> Weights:
    """A Megatron-Core model's weights -> Hugging Face's; padding of the vocabulary is cut off."""
    vocabulary = config.vocab_size
    target = {
        "model.embed_tokens.weight": source["embedding.word_embeddings.weight"][:vocabulary],
        "model.norm.weight": source["decoder.final_layernorm.weight"],
    }
    if "output_layer.weight" in source:
        target["lm_head.weight"] = source["output_layer.weight"][:vocabulary]
    names = set(source)
    for i in range(config.num_layers):
        hf, mcore = f"model.layers.{i}.", f"decoder.layers.{i}."
        for theirs, ours in _plain_names(mcore, names).items():
            if mcore + ours in source:
                target[hf + theirs] = source[mcore + ours]
        for kind in ("weight", "bias"):
            merged = source.get(f"{mcore}self_attention.linear_qkv.{kind}")
            if merged is not None:
                for x, part in zip("qkv", split_qkv(merged, config), strict=True):
                    target[f"{hf}self_attn.{x}_proj.{kind}"] = part
        gate, up = source[f"{mcore}mlp.linear_fc1.weight"].chunk(2)
        target[f"{hf}mlp.gate_proj.weight"], target[f"{hf}mlp.up_proj.weight"] = gate, up
    return target


def _plain_names(mcore: str, names: set[str]) -> dict[str, str]:
    """Weights of a layer that need no rearrangement: Hugging Face's name -> Megatron-Core's."""

    def norm(local: str, fused: str) -> str:
        return local if mcore + local in names else fused  # Transformer Engine fuses a norm into the projection after it

    return {
        "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
        "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
        "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
        "mlp.down_proj.weight": "mlp.linear_fc2.weight",
        "input_layernorm.weight": norm("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        "post_attention_layernorm.weight": norm("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    }


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


def _heads(config: GPTConfig) -> tuple[int, int]:
    groups = config.num_query_groups or config.num_attention_heads
    return groups, config.kv_channels or config.hidden_size // config.num_attention_heads
