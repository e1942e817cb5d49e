"""The fields of `model`: those of the host's config classes, as far as they can be checked without importing the host.

What a run sets itself is refused by name, so that nothing a user writes is overwritten in silence. Of all other fields the
value must be plain and finite; of those that a long-context run meets, the kind and the bounds are checked too. Whether a
class has a field at all, and what it makes of it, the class says when the model is made.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError, belongs_to, checked, did_you_mean, is_finite

# What a run sets on the model itself -> where to say it instead.
SET_BY_THE_RUN: dict[str, str] = {
    "seq_length": "the longest window of the run takes its place; set curriculum.stages",
    "max_position_embeddings": "the longest window of the run takes its place; set curriculum.stages",
    "forward_step_fn": "the run has its own, for packed documents; leave it out",
    "data_step_fn": "the run has its own, for packed documents; leave it out",
    "transformer_layer_spec": "the run has its own attention; leave it out",
    "calculate_per_token_loss": "a run takes one mean over all tokens of a step; leave it out",
    "tensor_model_parallel_size": "set trainer.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "set trainer.pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "set trainer.virtual_pipeline_model_parallel_size",
    "context_parallel_size": "set trainer.context_parallel_size",
    "sequence_parallel": "set trainer.sequence_parallel",
    "fp16": "set trainer.precision",
    "bf16": "set trainer.precision",
    "params_dtype": "set trainer.precision",
    "pipeline_dtype": "set trainer.precision",
    "autocast_dtype": "set trainer.precision",
    "enable_autocast": "set trainer.precision",
    "seq_len_interpolation_factor": "set rope=pi, and rope.factor where the checkpoint does not give it",
    "use_cpu_initialization": "the run sets it by its accelerator; leave it out",
    "tp_comm_overlap": "set trainer.tp_comm_overlap",
    "expert_model_parallel_size": "it has no expert parallelism; leave it out",
    "expert_tensor_parallel_size": "it has no expert parallelism; leave it out",
    "moe_extended_tp": "it has no expert parallelism; leave it out",
    "microbatch_group_size_per_vp_stage": "as many micro batches as there are pipeline stages; leave it out",
    "pipeline_model_parallel_comm_backend": "NeMo's strategy has its own; leave it out",
    "use_te_rng_tracker": "NeMo's strategy has its own; leave it out",
    "autocast_enabled": "set trainer.precision",
    "grad_reduce_in_fp32": "set trainer.precision",
    "first_last_layers_bf16": "set trainer.precision (fp8-current keeps them so)",
    "num_layers_at_start_in_bf16": "set trainer.precision (fp8-current has 1)",
    "num_layers_at_end_in_bf16": "set trainer.precision (fp8-current has 1)",
    "timers": "it is code, which a recipe cannot say; leave it out",
    "finalize_model_grads_func": "it is code, which a recipe cannot say; leave it out",
    "grad_scale_func": "it is code, which a recipe cannot say; leave it out",
    "no_sync_func": "it is code, which a recipe cannot say; leave it out",
    "grad_sync_func": "it is code, which a recipe cannot say; leave it out",
    "param_sync_func": "it is code, which a recipe cannot say; leave it out",
    "activation_func": "it is code, which a recipe cannot say; name a config class that has it",
    "init_method": "it is code, which a recipe cannot say; set init_method_std",
    "output_layer_init_method": "it is code, which a recipe cannot say; set init_method_std",
    "embedding_init_method": "it is code, which a recipe cannot say; set init_method_std",
    "generation_config": "it is code, which a recipe cannot say; leave it out",
    "quant_recipe": "it is code, which a recipe cannot say; leave it out",
}

# What no run has, whatever the class says of it.
NOT_HERE: dict[str, str] = {
    "attention_chunk_size": "the run's attention has windows and no chunks; set model.window_size, or leave it out",
    "attn_logit_softcapping": "models that cap attention's scores (Gemma 2) are not supported; leave it out",
    "mtp_num_layers": "the run's loss predicts one token; leave it out",
    "defer_embedding_wgrad_compute": "the run's loss needs the gradient of its head at once; leave it out",
    "use_mup": "the run's loss has no scaled logits; leave it out",
}
# RoPE's stretch in the words of the host and of transformers.
_STRETCHES = ("rope_scaling", "rope_scaling_factor", "rotary_scaling_factor", "rope_type", "original_max_position_embeddings")

_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "make_vocab_size_divisible_by")
_OPTIONAL_SIZES = ("ffn_hidden_size", "num_query_groups", "kv_channels", "vocab_size", "num_moe_experts", "moe_ffn_hidden_size",
                   "mtp_num_layers", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
                   "old_context_len", "moe_router_topk", "attention_chunk_size")  # fmt: skip
_SHARES = ("hidden_dropout", "attention_dropout")
_POSITIVE = ("layernorm_epsilon", "init_method_std", "rotary_base", "rotary_percent", "scale_factor", "low_freq_factor",
             "high_freq_factor")  # fmt: skip
_NUMBERS = ("softmax_scale", "embedding_init_method_std", "activation_func_clamp_value", "glu_linear_offset",
            "moe_aux_loss_coeff", "moe_z_loss_coeff", "mtp_loss_scaling_factor")  # fmt: skip
_TEXTS = ("normalization", "position_embedding_type", "attention_backend", "cross_entropy_fusion_impl")
# Of texts that choose, the choices; what a class has beside them is its own.
_CHOICES = {
    "normalization": ("LayerNorm", "RMSNorm", "L2Norm"),
    "attention_backend": ("auto", "flash", "fused", "unfused", "local"),
    "position_embedding_type": ("rope", "yarn"),
}
# Whole families of the host's fields are switches.
_SWITCHES = ("add_bias_linear", "add_qkv_bias", "gated_linear_unit", "qk_layernorm", "share_embeddings_and_output_weights",
             "rotary_interleaved", "apply_rope_fusion", "masked_softmax_fusion", "bias_dropout_fusion",
             "bias_activation_fusion", "gradient_accumulation_fusion", "cross_entropy_loss_fusion", "persist_layer_norm",
             "memory_efficient_layer_norm", "fp32_residual_connection", "layernorm_zero_centered_gamma",
             "attention_softmax_in_fp32", "apply_query_key_layer_scaling", "perform_initialization", "deterministic_mode",
             "apply_residual_connection_post_layernorm", "multi_latent_attention", "fp16_lm_cross_entropy", "parallel_output",
             "moe_grouped_gemm", "moe_permute_fusion", "moe_token_dropping", "test_mode", "flash_decode",
             "scatter_embedding_sequence_parallel", "use_transformer_engine_full_layer_spec",
             "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
             "use_transformer_engine_op_fuser", "enable_cuda_graph", "external_cuda_graph")  # fmt: skip
COMMUNICATION = ("p2p", "all_gather", "a2a", "a2a+p2p")  # of Transformer Engine's context parallelism
LARGEST_FLOAT32 = 3.4e38
LARGEST_BASE = 1e15  # beyond it every pair of RoPE but the first stands still over any length
MOST = 2**31 - 1  # of a size: beyond it no tensor of a layer can be made


def check_model(model: Mapping[str, Any]) -> None:
    """Check what a recipe says of its model.

    Raises:
        ConfigError: a field that the run sets itself, or a value of a kind or size that the field cannot have.
    """
    for name, value in model.items():
        key = f"model.{name}"
        if name.startswith(("recompute_", "cpu_offloading")):
            mend = "set trainer.recompute and trainer.offload (none, selective, block:N, full), or a stage's own"
            raise ConfigError(key, value, mend)
        if name.startswith(("fp8", "fp4")):  # the precision's plugin sets all of them
            raise ConfigError(key, value, "the run sets it: set trainer.precision (fp8, fp8-delayed or fp8-current)")
        if name in SET_BY_THE_RUN:
            raise ConfigError(key, value, f"the run sets it: {SET_BY_THE_RUN[name]}")
        if name in NOT_HERE and value:
            raise ConfigError(key, value, NOT_HERE[name])
        if (name.startswith("yarn_") or name in _STRETCHES) and value is not None:
            raise ConfigError(key, value, "RoPE is said under rope, such as rope=yarn rope.factor=4; leave it out here")
        if name.startswith("_"):
            raise ConfigError(key, value, "no field of a config that a recipe can set; leave it out")
        _check_known(name, value, key)
        _check_field(name, value, key)
    _check_shape(model)


@functools.cache
def host_fields() -> dict[str, frozenset[str]] | None:
    """`configs` and `fields` of the host (docs/make_host_fields.py); None where another version of it is installed."""
    known = json.loads(Path(__file__).with_name("host_fields.json").read_text(encoding="utf-8"))
    for package, version in known["versions"].items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            if metadata.version(package) != version:
                return None
    return {key: frozenset(known[key]) for key in ("configs", "fields")}


def _check_known(name: str, value: Any, key: str) -> None:
    """A name that no class of the host has is a slip; of another version's fields its class says so when it is made."""
    known = host_fields()
    if known is None:
        return
    if name == "config":
        if isinstance(value, str) and value.isidentifier() and value not in known["configs"]:
            raise ConfigError(key, value, f"no such config class, {_nearest(value, known['configs'])}")
    elif name not in known["fields"]:
        if there := belongs_to(name):
            raise ConfigError(key, value, f"no field of the host's config classes, did you mean {there}?")
        raise ConfigError(key, value, f"no field of the host's config classes, {_nearest(name, known['fields'])}")


def _nearest(word: str, known: frozenset[str]) -> str:
    said = did_you_mean(word, known)
    return said if said.startswith("did you mean") else "see its class in nemo.collections.llm"


def _check_field(name: str, value: Any, key: str) -> None:
    if name == "config":
        if not isinstance(value, str) or not value.isidentifier():
            raise ConfigError(key, value, "name a config class of nemo.collections.llm, such as LlamaConfig")
    elif name in _SIZES or name in _OPTIONAL_SIZES:
        if value is None and name in _OPTIONAL_SIZES:
            return
        checked(int, value, key)
        if not 1 <= value <= MOST:
            raise ConfigError(key, value, f"set a whole number of at least 1, at most {MOST:,}")
    elif name in _SHARES:
        checked(float, value, key)
        if not 0 <= value < 1:
            raise ConfigError(key, value, "set a share in [0, 1)")
    elif name in _POSITIVE:
        checked(float, value, key)
        if abs(value) > (LARGEST_BASE if name == "rotary_base" else LARGEST_FLOAT32):
            raise ConfigError(key, value, "is too large a number for it")
        if value <= 0 or (name == "rotary_percent" and value > 1) or (name == "rotary_base" and value <= 1):
            bounds = {"rotary_percent": "a share in (0, 1]", "rotary_base": "a number above 1"}
            raise ConfigError(key, value, f"set {bounds.get(name, 'a number above 0')}")
    elif name in _NUMBERS:
        checked(float | None, value, key)
    elif name in _SWITCHES:
        checked(bool, value, key)
    elif name in _TEXTS:
        checked(str | None, value, key)
        choices = _CHOICES.get(name, ())
        if choices and value is not None and value not in choices:
            only = "only RoPE models can be extended; " if name == "position_embedding_type" else "no such choice, "
            raise ConfigError(key, value, f"{only}{did_you_mean(value, choices)}")
    elif name == "cp_comm_type" and isinstance(value, str) and value not in COMMUNICATION:
        raise ConfigError(key, value, f"no such choice, {did_you_mean(value, COMMUNICATION)}")
    elif name == "window_size":
        _check_window(value, key)
    elif name in ("window_attn_skip_freq", "no_rope_freq"):
        _check_layers(value, key)
    else:
        _check_plain(value, key)


def _check_window(value: Any, key: str) -> None:
    if value is None:
        return
    window = checked(tuple[int, ...], value, key)
    if len(window) != 2 or any(tokens < -1 for tokens in window):
        raise ConfigError(
            key, value, "two whole numbers: tokens before a query and after it, -1 for all; null for full attention"
        )
    if window[1] > 0:
        raise ConfigError(key, value, "looks ahead, where attention is causal; write 0 for the second number")


def _check_layers(value: Any, key: str) -> None:
    listed = list(value) if isinstance(value, (list, tuple)) else []
    one_each = bool(listed) and all(isinstance(each, int) and each in (0, 1) for each in listed)
    if value is not None and not one_each and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        what = "the window" if key.endswith("skip_freq") else "no RoPE"
        every = "all tokens" if key.endswith("skip_freq") else "no RoPE"
        raise ConfigError(key, value, f"N (each Nth layer has {every}), a list with 1 for the layers with {what}, or null")


def no_rope_layers(said: Any, num_layers: int, key: str = "model.no_rope_freq") -> list[int] | None:
    """Megatron-Core's `no_rope_freq` as a list, 1 for a layer that leaves q and k unrotated; None where all are rotated.

    Raises:
        ConfigError: a number or list that does not go into the layers.
    """
    _check_layers(said, key)
    if not said:
        return None
    if isinstance(said, int):
        if num_layers % said:
            raise ConfigError(key, said, f"must divide the {num_layers} layers; or name each layer in a list of 0 and 1")
        return ([0] * (said - 1) + [1]) * (num_layers // said)
    if len(said) != num_layers:
        raise ConfigError(key, said, f"must be one number for each of the {num_layers} layers, 1 for those without RoPE")
    return [int(each) for each in said]


def check_layer_lists(model: Mapping[str, Any]) -> None:
    """What is said layer by layer, against the number of layers, as soon as that is known.

    Raises:
        ConfigError: a list of another length, or a number that does not go into the layers.
    """
    layers, skip = model.get("num_layers"), model.get("window_attn_skip_freq")
    if not isinstance(layers, int):
        return
    no_rope_layers(model.get("no_rope_freq"), layers)
    if isinstance(skip, (list, tuple)) and len(skip) != layers:
        mend = f"must be one number for each of the {layers} layers, 1 for those with the window"
        raise ConfigError("model.window_attn_skip_freq", list(skip), mend)


def _check_plain(value: Any, key: str) -> None:
    """Numbers that are finite, text, true or false, null, and lists and mappings of these."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_plain(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check_plain(item, f"{key}[{number}]")
    elif isinstance(value, (int, float)) and not is_finite(value):
        raise ConfigError(key, value, "must be a finite number")


def _check_shape(model: Mapping[str, Any]) -> None:
    """What the sizes that are named say of each other; a class's own stay where only one of them is named."""
    heads, groups, hidden = (model.get(name) for name in ("num_attention_heads", "num_query_groups", "hidden_size"))
    if heads and groups and heads % groups:
        raise ConfigError("model.num_query_groups", groups, f"must divide the {heads} of model.num_attention_heads")
    if heads and hidden and not model.get("kv_channels") and hidden % heads:
        raise ConfigError(
            "model.num_attention_heads", heads, f"must divide the {hidden} of model.hidden_size, or set kv_channels"
        )
    experts, chosen = (model.get(name) for name in ("num_moe_experts", "moe_router_topk"))
    if experts and chosen and chosen > experts:
        raise ConfigError("model.moe_router_topk", chosen, f"a token goes to at most the {experts} of model.num_moe_experts")


def check_layout(shape: Mapping[str, Any], trainer: Any, curriculum: Any) -> None:
    """Sizes against the layout, of the run and of each stage that has its own.

    Args:
        shape: the model's sizes, as far as they are known.
        trainer: `TrainerConfig`.
        curriculum: `Curriculum`.

    Raises:
        ConfigError: windows, layers or heads that the parallel sizes do not divide, or a list of other layers than it has.
    """
    check_layer_lists(shape)
    virtual = trainer.virtual_pipeline_model_parallel_size
    for number, stage in enumerate(curriculum.stages):
        own = stage.parallel_sizes
        sizes = {name: own.get(name) or getattr(trainer, name) for name in _PARALLEL}
        tensor, pipeline, context = sizes.values()
        where = f"curriculum.stages[{number}]." if own else "trainer."
        parts = 2 * context if context > 1 else 1
        if trainer.sequence_parallel:
            parts *= tensor
        if stage.seq_length % parts:
            halves = "2 x context_parallel_size" if context > 1 else ""
            said = " x ".join(
                part for part in (halves, "tensor_model_parallel_size" if trainer.sequence_parallel else "") if part
            )
            mend = f"must be a multiple of {said} = {parts}, so that each rank has its part of a window"
            raise ConfigError(f"curriculum.stages[{number}].seq_length", stage.seq_length, mend)
        chunks = pipeline * (virtual or 1)
        layers, heads, groups = (shape.get(name) for name in ("num_layers", "num_attention_heads", "num_query_groups"))
        uneven = any(shape.get(name) for name in UNEVEN)
        if layers and not uneven and layers % chunks:
            mend = f"the {layers} layers must divide by pipeline{' x virtual' if virtual else ''} stages = {chunks}"
            raise ConfigError(f"{where}pipeline_model_parallel_size", pipeline, mend)
        _check_ends(shape, layers, pipeline, virtual or 1)
        if layers and not uneven:
            _check_blocks(stage, trainer, layers // chunks, number)
        for name, count in (("attention heads", heads), ("query groups", groups)):
            if count and count % tensor and (name == "attention heads" or tensor % count):
                mend = f"the {count} {name} must divide by it"
                raise ConfigError(f"{where}tensor_model_parallel_size", tensor, mend)


def _check_blocks(stage: Any, trainer: Any, layers: int, number: int) -> None:
    """`block:N` of a chunk that has fewer layers: `full` under another name, which the planner refuses too."""
    for name in ("recompute", "offload"):
        own, whole = getattr(stage, name), getattr(trainer, name)
        said = whole if own is None else own
        kind, _, count = said.partition(":")
        if kind == "block" and int(count) > layers:
            where = "trainer" if said == whole else f"curriculum.stages[{number}]"
            raise ConfigError(f"{where}.{name}", said, f"a model chunk has {layers} layers; set full, or block:N up to that")


def _check_ends(shape: Mapping[str, Any], layers: Any, pipeline: int, virtual: int) -> None:
    """The layers that a first and a last stage of their own leave, against the other stages."""
    ends = [name for name in UNEVEN[:2] if shape.get(name)]
    if not ends or not layers or pipeline == 1:
        return
    left, others = layers - sum(shape[name] for name in ends), pipeline - len(ends)
    if left < 0 or (others and (left == 0 or left % others)) or (not others and left):
        what = f"leaves {left} of the {layers} layers to {others} pipeline stages, which must share them evenly"
        raise ConfigError(f"model.{ends[0]}", shape[ends[0]], what)
    for name in ends:
        if shape[name] % virtual:
            raise ConfigError(f"model.{name}", shape[name], f"must be a multiple of the {virtual} virtual stages")


_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
# How layers lie on pipeline stages: of a layout, not of weights. The host's strategy sets them from its own arguments.
UNEVEN = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout",
          "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")  # fmt: skip
