"""A chosen layout as overrides of a recipe: what `plan --apply` writes."""

from __future__ import annotations

from typing import Any

from nemo_longctx.compose import groups, recipe_file
from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.planning.gpus import Gpu
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.planner import Candidate

_HEAD = """# @package _global_
# Written by `nemo-longctx plan --apply` for {model} at {length} tokens on {gpus} x {gpu}:
# {memory:.0f} GiB a GPU and {seconds:.1f} s a step predicted. Train it with recipe=PATH_OF_THIS_FILE.
"""
_PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32"}


def recipe_override(chosen: Candidate, curriculum: Curriculum, model_name: str, gpu: Gpu, *, recipe: str | None) -> str:
    """YAML of a recipe that begins with `recipe` and sets what the layout decides; `recipe=FILE` takes it.

    Args:
        chosen: the layout, as the search judged it.
        curriculum: of the run.
        model_name: what to call the model in the file's first lines.
        gpu: kind of GPU.
        recipe: a choice of conf/recipe/ or a recipe file, whose keys are then merged in; None takes the choice of the model's
            name.

    Raises:
        ConfigError: no recipe to begin with, or a layout that no recipe can say.
    """
    import yaml  # a plan that writes nothing needs none

    recipe = recipe or model_name
    values = override_values(chosen.layout, curriculum, gpu)
    file = recipe_file(recipe)
    if file is not None:
        values = _merged(yaml.safe_load(file.read_text()), values)
    elif recipe in groups()["recipe"]:
        values = {"defaults": [recipe, "_self_"], **values}
    else:
        raise ConfigError("apply", recipe, "no recipe of this name to begin with; name one with --recipe")
    head = _HEAD.format(
        model=model_name,
        length=max(stage.seq_length for stage in curriculum.stages),
        gpus=chosen.layout.gpus,
        gpu=gpu.name,
        memory=chosen.memory_gib,
        seconds=chosen.seconds,
    )
    return head + yaml.safe_dump(values, sort_keys=False)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], over[key]) for key in base if isinstance(base[key], dict) and isinstance(over.get(key), dict)
    }
    return {**base, **over, **both}


def override_values(layout: Layout, curriculum: Curriculum, gpu: Gpu) -> dict[str, Any]:
    """Keys of `nemo_longctx.recipe.RecipeConfig` that a layout decides.

    Raises:
        ConfigError: a precision, sharding or loss that recipes do not have.
    """
    if layout.precision not in _PRECISIONS:
        raise ConfigError(
            "precision", layout.precision, f"recipes train in {' or '.join(_PRECISIONS)}; search with one of these"
        )
    if layout.sharding == "full":
        raise ConfigError("sharding", layout.sharding, "recipes shard the optimizer at most; search with --sharding optimizer")
    if layout.loss != "chunked":
        raise ConfigError("loss", layout.loss, "recipes train with the chunked loss; search with --loss chunked")
    devices = min(layout.gpus, gpu.gpus_per_node)
    trainer: dict[str, Any] = {
        "accelerator": "gpu",
        "devices": devices,
        "num_nodes": layout.gpus // devices,
        "precision": _PRECISIONS[layout.precision],
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "sequence_parallel": layout.residual_shards > 1,
        "recompute": layout.recompute,
        "offload": layout.offload,
    }
    stages = [
        {"until": stage.until, "seq_length": stage.seq_length, "micro_batch_size": layout.micro_batch_size}
        for stage in curriculum.stages
    ]
    return {
        "trainer": trainer,
        "optimizer": {"distributed": layout.sharding == "optimizer"},
        "curriculum": {
            "stages": stages,
            "tokens_per_step": curriculum.tokens_per_step,
            "total_tokens": curriculum.total_tokens,
        },
    }
