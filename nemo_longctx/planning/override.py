"""A chosen layout as overrides of a recipe: what `plan --apply` writes."""

from __future__ import annotations

from typing import Any

import yaml

from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.planning.gpus import Gpu
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.planner import Candidate

_HEAD = """# @package _global_
# Written by `nemo-longctx plan --apply` for {model} at {length} tokens on {gpus} x {gpu}:
# {memory:.0f} GiB a GPU and {seconds:.1f} s a step predicted. Keep it in conf/recipe/ and
# begin it with the recipe that it changes: `defaults: [THAT_RECIPE, _self_]`.
"""


def recipe_override(chosen: Candidate, curriculum: Curriculum, model_name: str, gpu: Gpu) -> str:
    """YAML of the keys of `nemo_longctx.recipe.RecipeConfig` that the layout decides."""
    head = _HEAD.format(
        model=model_name,
        length=max(stage.seq_length for stage in curriculum.stages),
        gpus=chosen.layout.gpus,
        gpu=gpu.name,
        memory=chosen.memory_gib,
        seconds=chosen.seconds,
    )
    return head + yaml.safe_dump(override_values(chosen.layout, curriculum, gpu), sort_keys=False)


def override_values(layout: Layout, curriculum: Curriculum, gpu: Gpu) -> dict[str, Any]:
    """The same as a mapping."""
    devices = min(layout.gpus, gpu.gpus_per_node)
    trainer: dict[str, Any] = {
        "devices": devices,
        "num_nodes": layout.gpus // devices,
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
        "curriculum": {
            "stages": stages,
            "tokens_per_step": curriculum.tokens_per_step,
            "total_tokens": curriculum.total_tokens,
        },
    }
