"""What the parts of a recipe say of each other: heads of RoPE, pipelines of batches and evaluations, layouts of validation.

Each of these ended a run after the host was imported, some of them hours into it: at the first validation, or at the end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import PARALLEL_SIZES
from nemo_longctx.model_fields import UNEVEN
from nemo_longctx.planning.models import class_sizes, sizes_of

PLAIN_CLASSES = ("GPTConfig", "LlamaConfig")  # of the host: no window unless one is set


def check_head(model: Mapping[str, Any]) -> None:
    """Refuse a head whose rotated dimensions are no whole pairs, as far as the sizes are known.

    Raises:
        ConfigError: by the field that makes them so.
    """
    sizes = class_sizes(model) | {key: value for key, value in model.items() if value is not None}
    heads, hidden, head = (sizes.get(name) for name in ("num_attention_heads", "hidden_size", "kv_channels"))
    if not head and heads and hidden:
        head = hidden // heads
    if not isinstance(head, int):
        return
    percent = sizes.get("rotary_percent", 1.0)
    rotated = head if percent >= 1 else int(head * percent)
    if rotated < 2 or rotated % 2:
        key = next((name for name in ("rotary_percent", "kv_channels", "num_attention_heads") if name in model), "hidden_size")
        mend = f"{rotated} dimensions of a head's {head} would be rotated, and RoPE turns pairs: set it so that they are even"
        raise ConfigError(f"model.{key}", model.get(key), f"{mend}, and 2 at least")


def check_windowed(model: Mapping[str, Any]) -> None:
    """Refuse a choice of layers with a window where no layer has one, or none is left out; of a checkpoint it is not known.

    Raises:
        ConfigError: it has no effect.
    """
    skip = model.get("window_attn_skip_freq")
    if skip is None:
        return
    sizes = sizes_of(class_sizes(model) | dict(model))
    known = bool(class_sizes(model)) or model.get("config") in PLAIN_CLASSES or "window_size" in model
    if known and sizes.get("sliding_window") is None:
        mend = "has no effect: no layer has a window; set model.window_size too, such as [4095, 0], or leave it out"
        raise ConfigError("model.window_attn_skip_freq", skip, mend)
    layers = sizes.get("num_layers")
    if isinstance(skip, int) and isinstance(layers, int) and skip > layers:
        mend = f"has no effect: of {layers} layers none would see all tokens; set at most {layers}, or leave it out"
        raise ConfigError("model.window_attn_skip_freq", skip, mend)


def check_pipeline(model: Mapping[str, Any], trainer: Any, curriculum: Any, *, evaluates: bool) -> None:
    """Refuse what Megatron-Core's pipelines cannot run.

    Args:
        evaluates: whether there are tasks of `eval`.

    Raises:
        ConfigError: an interleaved pipeline with evaluations, or with micro batches that its stages do not divide; uneven
            stages without a pipeline.
    """
    pipeline, virtual = trainer.pipeline_model_parallel_size, trainer.virtual_pipeline_model_parallel_size
    pipelines = [stage.parallel_sizes.get(PARALLEL_SIZES[1], pipeline) for stage in curriculum.stages]
    for key, value in uneven_stages(model).items():
        if max(pipelines) == 1:
            mend = "has no effect without a pipeline; set trainer.pipeline_model_parallel_size above 1, or leave it out"
            raise ConfigError(f"model.{key}", value, mend)
    if virtual is None:
        return
    key = "trainer.virtual_pipeline_model_parallel_size"
    if evaluates:
        mend = "evaluation inside a run reads whole stages, not chunks of them; leave it out, or set eval=none"
        raise ConfigError(key, virtual, mend)
    for stage in curriculum.plan:
        micro = stage.num_microbatches(trainer.data_parallel_size)
        if not stage.config.parallel_sizes and micro % pipeline:
            step = curriculum.tokens_per_step // micro
            near = max(1, round(micro / pipeline)) * pipeline * step
            mend = (
                f"interleaves micro batches by {pipeline} pipeline stages, and stage {stage.number} has {micro} of them a step "
                f"on each rank; leave it out, or set a multiple: the nearest curriculum.tokens_per_step is {near}"
            )
            raise ConfigError(key, virtual, mend)


def uneven_stages(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe's `model` says of pipeline stages that hold different numbers of layers; it is handed to the strategy."""
    return {name: model[name] for name in UNEVEN if model.get(name)}


def check_validation(validation: Any, trainer: Any, curriculum: Any) -> None:
    """Refuse windows of validation that the layout of a stage does not split: each rank has its part of a window there too.

    Raises:
        ConfigError: the first of them.
    """
    for stage in curriculum.stages:
        sizes = {name: stage.parallel_sizes.get(name, getattr(trainer, name)) for name in PARALLEL_SIZES}
        tensor, _, context = sizes.values()
        parts = (2 * context if context > 1 else 1) * (tensor if trainer.sequence_parallel else 1)
        for number, each in enumerate(validation):
            if each.seq_length % parts:
                near = max(1, round(each.seq_length / parts)) * parts
                mend = f"must be a multiple of {parts}, so that each rank has its part of a window; the nearest is {near}"
                raise ConfigError(f"data.validation[{number}].seq_length", each.seq_length, mend)


def check_stage_begun(recipe: Any, newest: Any) -> None:
    """Refuse a start in a stage of the curriculum that needs other parallel sizes than the trainer has.

    Args:
        newest: the checkpoint that the run goes on from; None for one that begins.

    Raises:
        ConfigError: by the stage, with the settings that it needs.
    """
    curriculum, trainer = recipe.curriculum, recipe.trainer
    step = 0 if newest is None else newest.step
    if step >= curriculum.total_steps:
        return
    stage = curriculum.stage_at_step(step)
    missing = {name: size for name, size in stage.config.parallel_sizes.items() if getattr(trainer, name) != size}
    if missing:
        said = " ".join(f"trainer.{name}={size}" for name, size in missing.items())
        mend = f"the run begins or goes on in stage {stage.number}, which needs them; start it with {said}"
        raise ConfigError(f"curriculum.stages[{stage.number}]", missing, mend)


def check_base_is_another(restore_from: str | None, directory: Path, name: str) -> None:
    """Refuse a run in the directory of the run that it begins with: it would go on with that one, or write over it.

    Raises:
        ConfigError: by the run's name.
    """
    if restore_from is None:
        return
    base = os.path.abspath(os.path.expanduser(restore_from))
    if base == str(directory) or base.startswith(f"{directory}{os.sep}"):
        mend = f"the run would be written to {directory}, where restore_from lies; give it another name"
        raise ConfigError("name", name, mend)
