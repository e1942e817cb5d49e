"""What a recipe of conf/recipe/ says that a plan needs: model, curriculum, machine, layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from nemo_longctx.compose import CONF_DIR, compose
from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.planning.gpus import GPUS
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.models import MODELS, ModelShape, model_by_name
from nemo_longctx.recipe import RecipeConfig, load_recipe

# Classes of nemo.collections.llm whose sizes the planner knows by name.
CLASSES = {
    "Llama2Config7B": "llama2_7b",
    "Llama2Config13B": "llama2_13b",
    "CodeLlamaConfig34B": "codellama_34b",
    "Llama2Config70B": "llama2_70b",
    "Llama3Config8B": "llama3_8b",
    "Llama3Config70B": "llama3_70b",
    "Qwen25Config7B": "qwen25_7b",
    "MistralConfig7B": "mistral_7b",
}
_PRECISIONS = {"32": "fp32", "bf16-mixed": "bf16", "16-mixed": "bf16"}


@dataclass(frozen=True, kw_only=True)
class RecipePlan:
    """A recipe as the planner reads it.

    Attributes:
        model_name, model: what is trained.
        curriculum: its stages with their micro batches.
        layout: GPUs and parallel sizes, with the first stage's micro batch.
        gpu: the kind of GPU that its trainer names; None where it names none.
    """

    model_name: str
    model: ModelShape
    curriculum: Curriculum
    layout: Layout
    gpu: str | None


def recipe_plan(name: str, overrides: Sequence[str] = ()) -> RecipePlan:
    """Read recipe `name` (of conf/recipe/, with or without `.yaml`), with Hydra overrides.

    Raises:
        ConfigError: no such recipe, or one whose model the planner does not know.
    """
    name = Path(name).stem
    recipe = load_recipe(compose([f"recipe={name}", *overrides]))
    model_name, model = _model(recipe)
    return RecipePlan(
        model_name=model_name, model=model, curriculum=recipe.curriculum, layout=_layout(recipe), gpu=machine_of(name)
    )


def machine_of(name: str, conf_dir: Path = CONF_DIR) -> str | None:
    """The GPU that recipe `name` names by its choice of trainer, its own or that of the recipe it begins with."""
    values: dict[str, Any] = yaml.safe_load((conf_dir / "recipe" / f"{name}.yaml").read_text())
    for entry in reversed(values.get("defaults", [])):
        if isinstance(entry, str) and entry != "_self_":
            return machine_of(entry, conf_dir)
        if isinstance(entry, dict) and "override /trainer" in entry:
            trainer = entry["override /trainer"]
            return trainer if trainer in GPUS else None
    return None


def _model(recipe: RecipeConfig) -> tuple[str, ModelShape]:
    config = recipe.model.get("config")
    if config is None:
        name = Path(str(recipe.restore_from)).name
        if name not in MODELS:
            mend = f"the planner cannot tell the model from this name; plan with --model, or name it one of {', '.join(MODELS)}"
            raise ConfigError("restore_from", recipe.restore_from, mend)
        return name, model_by_name(name)
    known = {field.name for field in fields(ModelShape)}
    given = {key: value for key, value in recipe.model.items() if key in known}
    if config in CLASSES:
        name = CLASSES[config]
        published = model_by_name(name)
        return name, build(ModelShape, {**{key: getattr(published, key) for key in known}, **given}, where="model")
    return str(config), build(ModelShape, given, where="model")


def _layout(recipe: RecipeConfig) -> Layout:
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
        sharding="optimizer" if recipe.optimizer.distributed else "none",
        precision=_PRECISIONS[trainer.precision],
    )
