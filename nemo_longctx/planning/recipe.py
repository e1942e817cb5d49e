"""What a recipe of conf/recipe/ says that a plan needs: model, curriculum, machine, layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nemo_longctx.compose import CONF_DIR, compose, recipe_file
from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.eval.config import ContextTask, HarnessTask, PositionTask, ProbeTask, Task
from nemo_longctx.planning.gpus import GPUS
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.models import (
    CLASSES,
    MODELS,
    ModelShape,
    model_by_name,
    model_from_nemo,
    nemo_context,
    parse_model,
    sizes_of,
)
from nemo_longctx.precision import PRECISIONS
from nemo_longctx.recipe import RunConfig, load_recipe

CPU = "cpu"


@dataclass(frozen=True, kw_only=True)
class RecipePlan:
    """A recipe as the planner reads it.

    Attributes:
        model_name, model: what is trained.
        curriculum: its stages with their micro batches.
        layout: GPUs and parallel sizes, with the first stage's micro batch.
        gpu: the kind of GPU that its trainer names, or `cpu`; None where it names none.
        eval_length: the longest context of its evaluations, tokens; 0 without any.
    """

    model_name: str
    model: ModelShape
    curriculum: Curriculum
    layout: Layout
    gpu: str | None
    eval_length: int


def recipe_plan(name: str, overrides: Sequence[str] = (), *, model: str | None = None) -> RecipePlan:
    """Read recipe `name` (of conf/recipe/, or a YAML file of the user's), with Hydra overrides.

    Args:
        name: choice or file.
        overrides: `key=value`.
        model: what `parse_model` takes, in place of the recipe's own model.

    Raises:
        ConfigError: no such recipe, or one whose model the planner does not know.
    """
    recipe = load_recipe(compose([f"recipe={name}", *overrides]))
    chosen = [item.partition("=")[2] for item in overrides if item.startswith("trainer=")]
    machine = chosen[-1] if chosen else machine_of(name)
    if recipe.trainer.accelerator == "cpu":
        gpu: str | None = CPU
    else:
        gpu = machine if machine in GPUS else None
    return plan_of(recipe, gpu=gpu, named=parse_model(model) if model else None)


def plan_of(recipe: RunConfig, *, gpu: str | None, named: tuple[str, ModelShape] | None = None) -> RecipePlan:
    """What the planner needs of a recipe that is at hand; `named` takes the place of its model.

    Raises:
        ConfigError: its model is neither a class that the planner knows, nor a checkpoint that can be read.
    """
    model_name, model = named or model_of(recipe)
    return RecipePlan(
        model_name=model_name,
        model=model,
        curriculum=recipe.curriculum,
        layout=_layout(recipe),
        gpu=gpu,
        eval_length=_eval_length(recipe),
    )


def _eval_length(recipe: RunConfig) -> int:
    """The longest context that the recipe's evaluations name, tokens; 0 without any."""
    if recipe.eval is None or not recipe.eval.tasks or recipe.eval.max_length:
        return (recipe.eval and recipe.eval.max_length) or 0
    lengths = [recipe.seq_length, *_task_lengths(recipe.eval.tasks)]
    return max(lengths)


def _task_lengths(tasks: Sequence[Task]) -> Iterator[int]:
    for task in tasks:
        if isinstance(task, PositionTask):
            yield task.seq_length
        elif isinstance(task, ContextTask):
            yield task.needed
        elif isinstance(task, ProbeTask):
            yield max(task.probes.lengths)
        elif isinstance(task, HarnessTask) and isinstance(task.metadata.get("max_prompt"), int):
            yield task.metadata["max_prompt"]


def machine_of(name: str, conf_dir: Path = CONF_DIR) -> str | None:
    """The trainer that recipe `name` chooses, itself or by the recipe it begins with: `h100`, `cpu`; None for no choice."""
    file = recipe_file(name) or conf_dir / "recipe" / f"{name}.yaml"
    values: dict[str, Any] = yaml.safe_load(file.read_text()) or {}
    for entry in reversed(values.get("defaults", [])):
        if isinstance(entry, str) and entry != "_self_":
            return machine_of(entry, conf_dir)
        if isinstance(entry, dict) and "override /trainer" in entry:
            return entry["override /trainer"]
    return None


def model_of(recipe: RunConfig) -> tuple[str, ModelShape]:
    """What a recipe trains: name and sizes.

    Raises:
        ConfigError: neither a class that the planner knows, nor a checkpoint that can be read.
    """
    config = recipe.model.get("config")
    if config is None:
        name, shape = _checkpoint_model(str(recipe.restore_from))
        same = {"num_query_groups": shape.num_attention_heads, "kv_channels": shape.hidden_size // shape.num_attention_heads}
        for key, value in sizes_of(recipe.model).items():
            has = same.get(key) if getattr(shape, key) is None else getattr(shape, key)
            if value != has and key not in ("seq_length", "sliding_window", "full_layers"):
                mend = f"the checkpoint {recipe.restore_from} has {has}, and its weights have that shape"
                raise ConfigError(f"model.{key}", value, mend)
        if "window_size" in recipe.model:
            given = sizes_of({"num_layers": shape.num_layers, **recipe.model})
            shape = replace(shape, sliding_window=given.get("sliding_window"), full_layers=given.get("full_layers"))
        return name, shape
    if recipe.model.get("num_moe_experts"):
        raise ConfigError("model.num_moe_experts", recipe.model["num_moe_experts"], "FLOPs of experts are not counted")
    given = sizes_of(recipe.model)
    if config in CLASSES:
        name = CLASSES[config]
        published = model_by_name(name)
        return name, build(ModelShape, {**asdict(published), **given}, where="model")
    return str(config), build(ModelShape, given, where="model")


def _checkpoint_model(restore_from: str) -> tuple[str, ModelShape]:
    path = Path(restore_from)
    context = nemo_context(path)
    if context is not None:
        return path.name, model_from_nemo(context)
    if path.name not in MODELS:
        names = ", ".join(MODELS)
        mend = f"no NeMo checkpoint is there to read sizes from, and its name is none of {names}"
        mend = f"{mend}; give --model: one of them, or the Hugging Face directory that it will be imported from"
        raise ConfigError("restore_from", restore_from, mend)
    return path.name, model_by_name(path.name)


def _layout(recipe: RunConfig) -> Layout:
    """On GPUs with Transformer Engine, on a CPU without; the loss is always ours, in chunks."""
    trainer = recipe.trainer
    return Layout(
        gpus=trainer.world_size,
        tensor_model_parallel_size=trainer.tensor_model_parallel_size,
        pipeline_model_parallel_size=trainer.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=trainer.virtual_pipeline_model_parallel_size,
        context_parallel_size=trainer.context_parallel_size,
        sequence_parallel=trainer.sequence_parallel,
        micro_batch_size=recipe.curriculum.plan[0].micro_batch_size,
        recompute=trainer.recompute,
        offload=trainer.offload,
        sharding="full" if trainer.fsdp != "none" else "optimizer" if recipe.optimizer.distributed else "none",
        precision=PRECISIONS[trainer.precision].planned,
        grad_reduce_in_fp32=PRECISIONS[trainer.precision].grad_reduce_in_fp32,
        loss="chunked",
        unfused=trainer.accelerator == "cpu",
    )
