"""A chosen layout as a recipe file: what `plan --apply` writes, once it is known to mean what was planned."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_longctx.compose import compose, groups, recipe_file
from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import PARALLEL_SIZES, Curriculum, StageConfig
from nemo_longctx.planning.gpus import DEFAULT_GPU, GPUS, Gpu
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.models import ModelShape
from nemo_longctx.planning.planner import Candidate

WRITTEN_BY = "# Written by `nemo-longctx plan --apply`"
_HEAD = (
    f"# @package _global_\n{WRITTEN_BY}"
    """ for {model} at {length} tokens on {gpus} x {gpu}:
# {memory:.0f} GiB a GPU and {seconds:.1f} s a step predicted. Train it with recipe=PATH_OF_THIS_FILE.
"""
)
_PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32", "fp8": "fp8"}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the written recipe has to mean.

    Attributes:
        chosen: the layout, as the search judged it; it holds for all stages.
        curriculum: of the run.
        model_name, model: what was planned, and what to call it.
        gpu: kind of GPU.
        eval_length: context of evaluations that was planned with, tokens.
        recipe: a choice of conf/recipe/ or a recipe file to begin with, whose keys are then merged in; None takes the choice of
            the model's name.
        overrides: `key=value` laid over the recipe, which the file will hold.
    """

    chosen: Candidate
    curriculum: Curriculum
    model_name: str
    model: ModelShape
    gpu: Gpu
    eval_length: int = 0
    recipe: str | None = None
    overrides: Sequence[str] = ()


def recipe_override(planned: Planned, *, file_name: str = "plan.yaml") -> tuple[str, list[str]]:
    """YAML of a recipe that begins with another and sets what was planned; `recipe=FILE` takes it.

    The text is composed and planned again before it is handed out.

    Args:
        planned: what it has to mean.
        file_name: of the file that it will be, under which it has to compose.

    Returns:
        the text, and sentences on what it does not hold.

    Raises:
        ConfigError: no recipe to begin with, a layout that no recipe can say, or a text that would train something else.
    """
    import yaml  # a plan that writes nothing needs none

    recipe = planned.recipe or planned.model_name
    if recipe_file(recipe) is None and recipe not in groups()["recipe"]:
        raise ConfigError("apply", recipe, "no recipe of this name to begin with; name one with --recipe")
    composed = compose([f"recipe={recipe}", *planned.overrides])
    devices, notes = _devices(planned, composed["trainer"])
    layout_values = override_values(planned.chosen.layout, planned.curriculum, devices=devices)
    wanted = _merged(composed, layout_values)
    document = _beginning(recipe, planned.overrides)
    changed = _difference(wanted, _composed(yaml.safe_dump(document), file_name))
    document = _merged(document, _merged(changed, layout_values))
    text = yaml.safe_dump(document, sort_keys=False)
    found = _composed(text, file_name)
    if found != wanted:
        keys = sorted(_differing(wanted, found))
        mend = f"a recipe file cannot say this of {', '.join(keys)}; leave the override out, and give it to the run"
        raise ConfigError("apply", list(planned.overrides), mend)
    notes += _planned_again(planned, found, text, file_name)
    head = _HEAD.format(
        model=planned.model_name,
        length=max(stage.seq_length for stage in planned.curriculum.stages),
        gpus=planned.chosen.layout.gpus,
        gpu=planned.gpu.name,
        memory=planned.chosen.memory_gib,
        seconds=planned.chosen.seconds,
    )
    return head + "".join(f"# Note: {note}\n" for note in notes) + text, notes


def _beginning(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe that the file begins with, and the user's choices of groups (`rope=yarn`) as entries of its defaults list."""
    import yaml

    file = recipe_file(recipe)
    document: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) if file else {"defaults": [recipe, "_self_"]}
    known = groups()
    chosen: dict[str, str | None] = {}
    for item in overrides:
        key, _, value = item.partition("=")
        if value in known.get(key, ()):
            chosen[f"override /{key}"] = value
        elif item.startswith("~") and item[1:] in known:
            chosen[f"override /{item[1:]}"] = None
    if not chosen:
        return document
    kept = [
        entry for entry in document.get("defaults") or ["_self_"] if not (isinstance(entry, dict) and chosen.keys() & entry)
    ]
    return {**document, "defaults": [*kept, *({key: value} for key, value in chosen.items())]}


def _composed(text: str, file_name: str) -> dict[str, Any]:
    """What a recipe file of this text and name composes to, as the training script will read it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / file_name
        file.write_text(text, encoding="utf-8")
        return compose([f"recipe={file}"])


def _planned_again(planned: Planned, composed: Mapping[str, Any], text: str, file_name: str) -> list[str]:
    """Plan the written recipe, and refuse one that trains another model, curriculum or layout than was planned.

    Returns:
        sentences on what the plan took from its options and the recipe does not say.
    """
    from nemo_longctx.planning.recipe import machine_of, model_of, plan_of
    from nemo_longctx.recipe import load_recipe

    recipe = load_recipe(composed)
    notes = []
    try:
        name, model = model_of(recipe)
    except ConfigError as error:
        name, model = planned.model_name, planned.model
        notes.append(
            f"the file does not say what its model is ({error.key}={error.value!r} is not there to read); plan it with --model"
        )
    if _arithmetic(model) != _arithmetic(planned.model):
        mend = (
            f"the file would train {name}, in the layout of another model; name a recipe of {planned.model_name} with --recipe"
        )
        raise ConfigError("model", planned.model_name, mend)
    again = plan_of(recipe, gpu=None, named=(name, model))
    layout = planned.chosen.layout
    expected = replace(layout, sequence_parallel=layout.residual_shards > 1)
    stages = replace(planned.curriculum, stages=_stages(planned.curriculum, layout))
    stages = stages.with_activations(recompute=layout.recompute, offload=layout.offload)
    for key, value, wanted in (("layout", again.layout, expected), ("curriculum", again.curriculum, stages)):
        if value != wanted:
            raise ConfigError("apply", file_name, f"the file's {key} would be {value}, where {wanted} was planned")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / file_name
        file.write_text(text, encoding="utf-8")
        machine = machine_of(str(file))
    if (machine if machine in GPUS else DEFAULT_GPU) != planned.gpu.name:
        notes.append(f"a recipe does not hold the kind of GPU; plan the file with --gpu {planned.gpu.name}")
    if again.eval_length != planned.eval_length:
        mend = f"plan the file with --eval-length {planned.eval_length}"
        notes.append(f"the file's evaluations take {again.eval_length:,} tokens, {planned.eval_length:,} were planned; {mend}")
    return notes


def _arithmetic(model: ModelShape) -> ModelShape:
    """What decides FLOPs and memory, with defaults resolved."""
    resolved: dict[str, Any] = {"num_query_groups": model.query_groups, "kv_channels": model.head_dim}
    return replace(model, **resolved, seq_length=1, sliding_window=None, full_layers=None)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], over[key]) for key in base if isinstance(base[key], dict) and isinstance(over.get(key), dict)
    }
    return {**base, **over, **both}


def _difference(wanted: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be merged into `before` to give `wanted`, keys that are too many apart."""
    result: dict[str, Any] = {}
    for key, value in wanted.items():
        there = before.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            inner = _difference(value, there)
            if inner:
                result[key] = inner
        elif key not in before or value != there:
            result[key] = value
    return result


def _differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Dotted keys at which two mappings differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [where]
    both = [found for key in a.keys() & b.keys() for found in _differing(a[key], b[key], f"{where}.{key}".strip("."))]
    return both + [f"{where}.{key}".strip(".") for key in a.keys() ^ b.keys()]


def _devices(planned: Planned, trainer: Mapping[str, Any]) -> tuple[int, list[str]]:
    """GPUs of a node: as many as share its fast links, or fewer that divide all GPUs and keep TP and CP groups whole.

    A recipe of several nodes, or of as many GPUs as were planned, knows the size of its nodes.
    """
    layout, gpu = planned.chosen.layout, planned.gpu
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    known = trainer.get("accelerator") == "gpu" and (nodes > 1 or devices * nodes == layout.gpus)
    tensor, ring = layout.tensor_model_parallel_size, layout.tensor_model_parallel_size * layout.context_parallel_size
    together = next((size for size in (ring, tensor) if size <= gpu.gpus_per_node), 1)
    for node in dict.fromkeys((devices if known else gpu.gpus_per_node, gpu.gpus_per_node)):
        fitting = [d for d in range(1, min(node, layout.gpus) + 1) if layout.gpus % d == 0 and d % together == 0]
        if fitting:
            break
    full = min(devices if known else gpu.gpus_per_node, layout.gpus)
    if fitting[-1] == full:
        return full, []
    return fitting[-1], [f"{layout.gpus} GPUs as {layout.gpus // fitting[-1]} nodes of {fitting[-1]}, not of {full}"]


def _stages(curriculum: Curriculum, layout: Layout) -> tuple[StageConfig, ...]:
    """The stages as the file has them: their lengths, in one layout."""
    own: dict[str, Any] = dict.fromkeys((*PARALLEL_SIZES, "recompute", "offload"))
    return tuple(replace(stage, **{**own, "micro_batch_size": layout.micro_batch_size}) for stage in curriculum.stages)


def override_values(layout: Layout, curriculum: Curriculum, *, devices: int) -> dict[str, Any]:
    """Keys of `nemo_longctx.recipe.RecipeConfig` that a layout decides.

    Args:
        layout: of all stages.
        curriculum: of the run.
        devices: GPUs of a node.

    Raises:
        ConfigError: a precision, sharding or loss that recipes do not have, or GPUs that do not fill nodes.
    """
    if layout.precision not in _PRECISIONS:
        raise ConfigError(
            "precision", layout.precision, f"recipes train in {' or '.join(_PRECISIONS)}; search with one of these"
        )
    if layout.sharding == "full":
        raise ConfigError("sharding", layout.sharding, "recipes shard the optimizer at most; search with --sharding optimizer")
    if layout.loss != "chunked":
        raise ConfigError("loss", layout.loss, "recipes train with the chunked loss; search with --loss chunked")
    if layout.gpus % devices:
        raise ConfigError("gpus", layout.gpus, f"are no whole number of nodes of {devices} GPUs")
    half_gradients = layout.precision == "bf16" and not layout.grad_reduce_in_fp32
    trainer: dict[str, Any] = {
        "accelerator": "gpu",
        "devices": devices,
        "num_nodes": layout.gpus // devices,
        "precision": "bf16-true" if half_gradients else _PRECISIONS[layout.precision],
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "sequence_parallel": layout.residual_shards > 1,
        "recompute": layout.recompute,
        "offload": layout.offload,
    }
    stages = [
        {"until": stage.until, "seq_length": stage.seq_length, "micro_batch_size": stage.micro_batch_size}
        for stage in _stages(curriculum, layout)
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
