"""The families of transformers: which convert, what their `config.json` may leave out, and why the others do not convert.

Defaults are those of transformers 4.57's config classes, which a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_longctx.config import ConfigError

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "sliding_window": None,
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

# What transformers takes for a field that config.json leaves out. A null is another thing: it is what it says.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_COMMON, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {**_COMMON, **_QWEN},
    "qwen3": {**_COMMON, **_QWEN, "head_dim": 128, "attention_bias": False},
    "smollm3": {
        **_COMMON,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    "phi3": {
        **_COMMON,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    "starcoder2": {
        **{key: value for key, value in _COMMON.items() if key != "rms_norm_eps"},
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "initializer_range": 0.018042,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "use_bias": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
}

# Activations that the host has for a family, the usual one first; silu where it is not named here.
ACTIVATIONS = {"starcoder2": ("gelu_pytorch_tanh", "gelu")}

# What must hold, since the host's class of the family has it so.
FIXED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": False},
    "smollm3": {"attention_bias": False, "mlp_bias": False},
    "phi3": {},
    "starcoder2": {"use_bias": True},
}


def norm_epsilon(family: str) -> str:
    """The key of the norms' epsilon."""
    return "norm_epsilon" if family == "starcoder2" else "rms_norm_eps"


_EXPERTS = "it has experts, whose FLOPs are not counted here, so that training refuses them"
_MULTIMODAL = "it is multimodal; save its language model alone (model.language_model.save_pretrained)"
_CENTRED = (
    "its norms are of 1 + weight, which Megatron-Core has in Transformer Engine alone; there NeMo's own "
    "nemo.collections.llm.import_ckpt converts it, with plain RoPE"
)
_OWN_CODE = "its code comes with the directory (auto_map) and is not run; NeMo's nemo.collections.llm.import_ckpt runs it"
_CODE_HERE = "its code comes with the directory (auto_map), and nothing here knows what it computes"
_PARTIAL = "it rotates a part of each head (partial_rotary_factor)"
_PAIRS = "it rotates neighbouring dimensions as pairs, and no converter here reorders its weights for that"
_BESIDE = "its attention and MLP run side by side, which the host has not"
_NO_ROPE = "it has no RoPE, so that there is nothing to extend here"
_NOT_ATTENTION = "some of its layers are no attention (state spaces, convolutions, linear attention)"
_ENCODER = "it is no causal language model"
_AS_LLAMA = "say model_type llama in config.json if its tensors are named as Llama's"
WHY_NOT: dict[str, str] = {
    **dict.fromkeys(("phi", "gpt_neox", "gptj", "codegen"), f"{_PARTIAL}, and its attention and MLP run side by side"),
    **dict.fromkeys(("stablelm", "persimmon"), _PARTIAL),
    **dict.fromkeys(("glm", "glm4"), f"{_PARTIAL}, in neighbouring pairs"),
    **dict.fromkeys(("helium", "ernie4_5"), _PAIRS),
    "falcon": _BESIDE,
    **dict.fromkeys(("gpt2", "gpt_bigcode", "opt", "bloom", "mpt"), _NO_ROPE),
    **dict.fromkeys(
        ("mamba", "mamba2", "jamba", "bamba", "zamba2", "falcon_h1", "nemotron_h", "lfm2", "qwen3_next", "rwkv"), _NOT_ATTENTION
    ),
    **dict.fromkeys(("bert", "roberta", "modernbert", "t5", "bart"), _ENCODER),
    "granite": "its embeddings, attention, residuals and logits have multipliers, which the host's class has not",
    "arcee": "its MLP has no gate and a squared relu, and no class of the host has that beside Llama's norms",
    "exaone4": "it norms after attention and MLP, which the host has not",
    "bitnet": "its weights are of three values; there is nothing to train on in bf16 or fp32",
    **dict.fromkeys(("internlm2", "internlm3", "qwen", "minicpm", "minicpm3", "mimo"), _CODE_HERE),
    **dict.fromkeys(("yi", "aquila"), _AS_LLAMA),
    "gemma": _CENTRED,
    "gemma2": (
        "its layers are Transformer Engine's in NeMo, with all scores of a window at once (soft-capping), which no long window "
        "fits; NeMo's own nemo.collections.llm.import_ckpt converts it there"
    ),
    "gemma3_text": "its norms are of 1 + weight and stand before and after attention and MLP, which the host has not",
    "gemma3": "it is multimodal, and its norms are of 1 + weight, before and after attention and MLP, which the host has not",
    "nemotron": _CENTRED,
    "chatglm": _OWN_CODE,
    "baichuan": _OWN_CODE,
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "granitemoe", "olmoe", "dbrx", "dots1", "glm4_moe", "jetmoe"), _EXPERTS
    ),
    "gpt_oss": f"{_EXPERTS}, and attention sinks",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), "its latent attention keeps a RoPE of its own in each layer"),
    "olmo": "its norms have no weights, which the host has not",
    **dict.fromkeys(
        ("olmo2", "olmo3"), "it norms after attention and MLP, and q and k over all heads at once, which the host has not"
    ),
    **dict.fromkeys(("cohere", "cohere2"), _BESIDE),
    **dict.fromkeys(
        ("llama4", "mllama", "llava", "llava_next", "mistral3", "pixtral", "gemma3n", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        _MULTIMODAL,
    ),
    "llama4_text": f"{_EXPERTS}, and chunked attention",
    "ministral": "say model_type mistral in config.json if all of its layers have one window",
}
_FOR_MULTIMODAL = ("text_config", "vision_config", "audio_config", "language_config", "llm_config")


def refusal(family: object, raw: Mapping[str, Any]) -> ConfigError:
    """Why a `model_type` that is none of `DEFAULTS` does not convert, in one sentence."""
    known = ", ".join(DEFAULTS)
    if not isinstance(family, str) or not family:
        return ConfigError("model_type", family, f"config.json must name its architecture; {known} can be converted")
    plain = family.strip().lower().replace("-", "_")
    if plain != family and plain in DEFAULTS:
        return ConfigError("model_type", family, f"transformers writes it {plain!r}; mend config.json")
    if plain in WHY_NOT:
        why = WHY_NOT[plain]
    elif any(isinstance(raw.get(key), Mapping) for key in _FOR_MULTIMODAL):
        why = _MULTIMODAL
    elif raw.get("auto_map"):
        why = _CODE_HERE
    elif any(raw.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")):
        why = _EXPERTS
    else:
        why = "no converter knows it"
    return ConfigError("model_type", family, f"cannot be converted: {why}; the families that can: {known}")
