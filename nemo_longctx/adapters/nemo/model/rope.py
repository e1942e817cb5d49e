"""A RoPE variant on any stock NeMo GPT: by the host's own fields where they can say it, else by one model transform.

| variant                | where                                                                                  |
| ---------------------- | -------------------------------------------------------------------------------------- |
| rope, abf, ntk         | `rotary_base`                                                                          |
| pi                     | `rotary_base`, `seq_len_interpolation_factor`                                          |
| llama3                 | `scale_factor`, ... where the config has them (Llama31Config), else the transform      |
| yarn                   | `yarn_*` where the config has them (gpt-oss) and the host can say it, else the transform |
| all others             | the transform                                                                          |
| any with `local_base`  | the transform                                                                          |

The transform is kept in the checkpoint's context as the model's `model_transform`, so that whoever loads it has the variant.
Importing any module of this room, as such a checkpoint does, also keeps the host's exporters from losing what they cannot say
(`checkpoint/exporter.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from nemo.lightning import io

from nemo_longctx.adapters.megatron.rope_module import (
    check_supported,
    check_windows,
    rotary_dim_of,
    transform_rope,
)
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.nemo import FIELDS, LLAMA31_FIELDS, YARN_FIELDS, variant_of_fields
from nemo_longctx.rope.request import BY_LAYER, EVERYWHERE, LAYERS
from nemo_longctx.rope.variants import (
    AbfRope,
    Llama3Rope,
    NtkRope,
    PiRope,
    Rope,
    YarnRope,
    ntk_base,
    parse,
    to_dict,
)


def host_fields(variant: RopeVariant, config: Any) -> tuple[dict[str, Any], bool]:
    """What to set on a NeMo GPT config for `variant`, and whether that says all of it.

    Fields of the config that would add another extension are put back to none, since Megatron-Core applies YaRN's attention
    factor, and Llama31Config its scaling, whatever else is asked for.

    Returns:
        (field -> value, True), or with False where the transform has to place the variant as well.
    """
    base = ntk_base(variant.base, variant.factor, rotary_dim_of(config)) if isinstance(variant, NtkRope) else variant.base
    fields: dict[str, Any] = {"rotary_base": int(base) if float(base).is_integer() else base}
    fields["seq_len_interpolation_factor"] = variant.factor if isinstance(variant, PiRope) else None
    by_layer = variant.local_base is not None  # which no field of the host says
    complete = isinstance(variant, (Rope, AbfRope, PiRope, NtkRope)) and not by_layer
    if _has_all(config, LLAMA31_FIELDS):
        is_llama3 = isinstance(variant, Llama3Rope)
        fields |= (
            {host: getattr(variant, ours) for host, ours in LLAMA31_FIELDS.items()} if is_llama3 else {"scale_factor": 1.0}
        )
        # With scale_factor 1 Llama31Config still recomputes its frequencies, which moves them by a rounding.
        complete = is_llama3 and not by_layer
    if _has_all(config, YARN_FIELDS):
        if isinstance(variant, YarnRope) and not by_layer and _host_can_yarn(variant, config):
            fields |= {host: getattr(variant, ours) for host, ours in YARN_FIELDS.items()}
            fields["position_embedding_type"] = "yarn"
            complete = True
        else:
            fields |= {"yarn_rotary_scaling_factor": 1.0, "position_embedding_type": "rope"}
    return fields, complete


def _has_all(config: Any, names: dict[str, str]) -> bool:
    return all(hasattr(config, name) for name in names)


def _host_can_yarn(variant: YarnRope, config: Any) -> bool:
    """Megatron-Core's YaRN ignores partial rotary, refuses interleaving, and loses its attention factor under RoPE fusion."""
    partial = getattr(config, "rotary_percent", 1.0) < 1.0
    return not (partial or config.rotary_interleaved or config.apply_rope_fusion or variant.attention_factor is not None)


def place_rope(model: Any, variant: RopeVariant) -> None:
    """Give a NeMo GPT model (`nemo.collections.llm.GPTModel`, before it is built) `variant`, and its checkpoints with it.

    Args:
        model: its config is changed in place, and what NeMo will write as its context too.

    Raises:
        ConfigError: a model without RoPE, with several, with another transform (PEFT), or with layers of one type where the
            variant is for those of two.
    """
    config = model.config
    check_supported(config)
    check_windows(config, variant)
    was = model.model_transform
    if was is not None and not isinstance(was, RopeTransform):
        raise ConfigError("model_transform", type(was).__name__, "a model has one transform, and this RoPE variant needs it")
    fields, complete = host_fields(variant, config)
    for name, value in fields.items():
        set_config_field(model, name, value)
    model.model_transform = None if complete else RopeTransform(rope=to_dict(variant))
    if hasattr(model, "__io__"):
        model.__io__.model_transform = None if complete else copy.deepcopy(model.model_transform.__io__)


def set_config_field(model: Any, name: str, value: Any) -> None:
    """Set a field of a NeMo model's config on the config and in the context that its checkpoints carry."""
    setattr(model.config, name, value)
    for captured in (getattr(model.config, "__io__", None), getattr(getattr(model, "__io__", None), "config", None)):
        if captured is not None:
            setattr(captured, name, value)


def variant_of(model: Any) -> RopeVariant:
    """The variant that a NeMo GPT model has now: its transform's, or what its config's fields say."""
    placed = getattr(model.model_transform, "variant", None)  # RopeTransform's, or LongContextLoRA's
    return placed if isinstance(placed, RopeVariant) else variant_of_config(model.config)


def variant_of_config(config: Any) -> RopeVariant:
    """The variant that the host's own fields of a NeMo GPT config say."""
    names = (*FIELDS, *YARN_FIELDS, *LLAMA31_FIELDS)
    return variant_of_fields({name: getattr(config, name) for name in names if hasattr(config, name)})


class RopeTransform(io.IOMixin):
    """Places a variant on built Megatron-Core models; for NeMo's `model_transform`. Placing twice is the same as once.

    Args:
        rope: the variant as a mapping (`nemo_longctx.rope.variants.to_dict`), as it is kept in checkpoints.
    """

    def __init__(self, rope: dict[str, Any]):
        self.variant = parse(rope)

    def __call__(self, model: torch.nn.Module) -> torch.nn.Module:
        """Transform every Megatron-Core GPT model inside `model` (NeMo's, DDP's and precision's wrappers included)."""
        from megatron.core.models.gpt.gpt_model import GPTModel as MCoreGPTModel

        for module in model.modules():
            if isinstance(module, MCoreGPTModel):
                transform_rope(module, self.variant)
        return model


def settings(variant: RopeVariant) -> dict[str, Any]:
    """`rope.variant`, `rope.layers` and each field, for the table of settings that a run prints and stores."""
    said = {LAYERS: EVERYWHERE if variant.local_base is None else BY_LAYER}
    return {f"rope.{key}": value for key, value in (to_dict(variant) | said).items()}
