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
_MULTIMODAL = "it is multimodal"
_CENTRED = (
    "its norms are of 1 + weight, which Megatron-Core has in Transformer Engine alone; there NeMo's own "
    "nemo.collections.llm.import_ckpt converts it, with plain RoPE"
)
_CENTRED_AROUND = "its norms are of 1 + weight and stand before and after attention and MLP, which the host has not"
_OWN_CODE = "its code comes with the directory (auto_map) and is not run; NeMo's nemo.collections.llm.import_ckpt runs it"
_CODE_HERE = "its code comes with the directory (auto_map), and nothing here knows what it computes"
_PARTIAL = "it rotates a part of each head (partial_rotary_factor)"
_PAIRS = "it rotates neighbouring dimensions as pairs, and no converter here reorders its weights for that"
_BESIDE = "its attention and MLP run side by side, which the host has not"
_NO_ROPE = "it has no RoPE, so that there is nothing to extend here"
_NOT_ATTENTION = "some of its layers are no attention (state spaces, convolutions, linear attention)"
_ENCODER = "it is no causal language model"
_AS_LLAMA = "say model_type llama in config.json if its tensors are named as Llama's"
_LATENT = "its latent attention keeps a RoPE of its own in each layer"
_MROPE = "it has a RoPE of three positions a token (M-RoPE)"
_BLOCKS = "its layers differ in width, and some lack attention (block_configs), which the host's class has not"
_OTHER_LAYERS = (
    "mamba", "mamba2", "jamba", "bamba", "zamba", "zamba2", "falcon_h1", "falcon_mamba", "nemotron_h", "lfm2", "lfm2_moe",
    "qwen3_next", "qwen3_5_text", "rwkv", "recurrent_gemma", "xlstm", "granitemoehybrid", "kimi_linear", "minimax",
)  # fmt: skip
_MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "phimoe", "granitemoe", "granitemoeshared", "olmoe",
    "flex_olmo", "dbrx", "dots1", "glm4_moe", "jetmoe", "ernie4_5_moe", "hunyuan_v1_moe", "doge", "aria_text",
)  # fmt: skip
WHY_NOT: dict[str, str] = {
    **dict.fromkeys(("phi", "gpt_neox", "gptj", "codegen"), f"{_PARTIAL}, and its attention and MLP run side by side"),
    **dict.fromkeys(("stablelm", "persimmon"), _PARTIAL),
    **dict.fromkeys(("glm", "glm4"), f"{_PARTIAL}, in neighbouring pairs"),
    **dict.fromkeys(("helium", "ernie4_5"), _PAIRS),
    "falcon": _BESIDE,
    **dict.fromkeys(("gpt2", "gpt_bigcode", "opt", "bloom", "mpt"), _NO_ROPE),
    **dict.fromkeys(_OTHER_LAYERS, _NOT_ATTENTION),
    **dict.fromkeys(("bert", "roberta", "xlm_roberta", "electra", "modernbert", "t5", "bart", "mbart", "pegasus"), _ENCODER),
    "granite": "its embeddings, attention, residuals and logits have multipliers, which the host's class has not",
    "arcee": "its MLP has no gate and a squared relu, and no class of the host has that beside Llama's norms",
    "apertus": "its MLP has no gate and an activation with weights of its own (xIELU), which the host has not",
    "exaone4": "it norms after attention and MLP, which the host has not",
    "bitnet": "its weights are of three values; there is nothing to train on in bf16 or fp32",
    "diffllama": "its attention is the difference of two, which the host has not",
    "hunyuan_v1_dense": "it norms q and k after their rotation, and the host before",
    "cwm": "some of its layers have a window, and transformers' llama has none to write them to",
    "seed_oss": "its layers are Qwen2's where attention_out_bias is false: say model_type qwen2 in config.json",
    "ministral3": "it scales queries by their position (llama_4_scaling_beta), which the host has not",
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), _MROPE),
    "mllama_text_model": "some of its layers attend to images, which the host has not",
    **dict.fromkeys(("nemotron_nas", "deci"), _BLOCKS),
    **dict.fromkeys(("internlm2", "internlm3", "qwen", "minicpm", "minicpm3", "mimo", "exaone", "internlm"), _CODE_HERE),
    **dict.fromkeys(("yi", "aquila", "code_llama"), _AS_LLAMA),
    "gemma": _CENTRED,
    "gemma2": (
        "its layers are Transformer Engine's in NeMo, with all scores of a window at once (soft-capping), which no long window "
        "fits; NeMo's own nemo.collections.llm.import_ckpt converts it there"
    ),
    **dict.fromkeys(("gemma3_text", "gemma3n_text", "vaultgemma"), _CENTRED_AROUND),
    "gemma3": "it is multimodal, and its norms are of 1 + weight, before and after attention and MLP, which the host has not",
    "nemotron": _CENTRED,
    "chatglm": _OWN_CODE,
    "baichuan": _OWN_CODE,
    **dict.fromkeys(_MIXTURES, _EXPERTS),
    "gpt_oss": f"{_EXPERTS}, and attention sinks",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "longcat_flash", "glm4_moe_lite"), _LATENT),
    "olmo": "its norms have no weights, which the host has not",
    **dict.fromkeys(
        ("olmo2", "olmo3"), "it norms after attention and MLP, and q and k over all heads at once, which the host has not"
    ),
    **dict.fromkeys(("cohere", "cohere2"), _BESIDE),
    **dict.fromkeys(("llava", "llava_next", "mistral3", "pixtral", "gemma3n", "mllama", "llama4", "qwen3_vl"), _MULTIMODAL),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), f"{_MULTIMODAL}, and {_MROPE}"),
    "llama4_text": f"{_EXPERTS}, and chunked attention",
    "ministral": "say model_type mistral in config.json if all of its layers have one window",
}
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")  # a language model's settings, of a larger one
_FOR_MULTIMODAL = (*_NESTED, "vision_config", "audio_config")


def reason(family: object, raw: Mapping[str, Any]) -> str:
    """Why a `model_type` that is none of `DEFAULTS` does not convert.

    Args:
        family: the `model_type`.
        raw: the whole `config.json`.
    """
    plain = _plain(family) if isinstance(family, str) else ""
    inner = next((raw[key] for key in _NESTED if isinstance(raw.get(key), Mapping)), None)
    if inner is not None and WHY_NOT.get(plain, _MULTIMODAL) == _MULTIMODAL:
        return _of_language_model(inner)
    if plain in WHY_NOT:
        return WHY_NOT[plain]
    if any(isinstance(raw.get(key), Mapping) for key in _FOR_MULTIMODAL):
        return _MULTIMODAL
    if raw.get("auto_map"):
        return _CODE_HERE
    if any(raw.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")):
        return _EXPERTS
    return "no converter knows it"


def _plain(family: str) -> str:
    return family.strip().lower().replace("-", "_")


def _of_language_model(inner: Mapping[str, Any]) -> str:
    """What can be done about a multimodal model, by the settings of the language model in it."""
    kind = inner.get("model_type")
    if not isinstance(kind, str) or not kind:
        return _MULTIMODAL
    if kind in DEFAULTS:
        return (
            f"{_MULTIMODAL}; its language model ({kind}) can be by itself: fill transformers' AutoModelForCausalLM.from_config("
            "model.config.text_config) with the weights of model.language_model and lm_head, and save that"
        )
    return f"{_MULTIMODAL}, and of its language model ({kind}): {reason(kind, inner)}"


def refusal(family: object, raw: Mapping[str, Any]) -> ConfigError:
    """Why a `model_type` that is none of `DEFAULTS` does not convert, in one sentence."""
    known = ", ".join(DEFAULTS)
    if not isinstance(family, str) or not family:
        mend = f"config.json must name its architecture; {known} can be converted"
        if any(isinstance(raw.get(key), Mapping) for key in _FOR_MULTIMODAL):
            mend = f"{reason(family, raw)}; {mend}"
        return ConfigError("model_type", family, mend)
    plain = _plain(family)
    if plain != family and plain in DEFAULTS:
        return ConfigError("model_type", family, f"transformers writes it {plain!r}; mend config.json")
    return ConfigError("model_type", family, f"cannot be converted: {reason(family, raw)}; the families that can: {known}")
