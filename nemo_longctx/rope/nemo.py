"""RoPE variants from what a NeMo 2 model's config says, and what its checkpoint's `context/model.yaml` says, without NeMo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import Llama3Rope, PiRope, Rope, YarnRope, parse

FIELDS = ("rotary_base", "position_embedding_type", "seq_len_interpolation_factor")  # of every GPT config
# Fields of the host's config (gpt-oss has them) -> YarnRope's.
YARN_FIELDS = {
    "yarn_rotary_scaling_factor": "factor",
    "yarn_original_max_position_embeddings": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
    "yarn_correction_range_round_to_int": "truncate",
}
# Llama31Config's fields -> Llama3Rope's.
LLAMA31_FIELDS = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}


def variant_of_fields(config: Mapping[str, Any]) -> RopeVariant:
    """The variant that the host's own fields of a NeMo GPT config say."""
    base = float(config.get("rotary_base", 10_000))
    if config.get("position_embedding_type") == "yarn":
        return YarnRope(base=base, **{ours: config[host] for host, ours in YARN_FIELDS.items() if host in config})
    if LLAMA31_FIELDS.keys() <= config.keys() and config["scale_factor"] != 1.0:
        return Llama3Rope(base=base, **{ours: config[host] for host, ours in LLAMA31_FIELDS.items()})
    if config.get("seq_len_interpolation_factor") is not None:
        return PiRope(base=base, factor=float(config["seq_len_interpolation_factor"]))
    return Rope(base=base)


def variant_of_context(context: Mapping[str, Any]) -> RopeVariant:
    """The variant of a checkpoint by its `context/model.yaml`: that of its transform, or else what its config's fields say.

    Raises:
        ConfigError: fields that are none of a variant.
    """
    placed = context.get("model_transform")
    rope = placed.get("rope") if isinstance(placed, Mapping) else None
    try:
        return parse(rope) if isinstance(rope, Mapping) else variant_of_fields(context["config"])
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("context/model.yaml", None, f"says no RoPE that can be read ({error})") from error
