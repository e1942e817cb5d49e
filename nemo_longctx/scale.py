"""A recipe made small: `scale=tiny` cuts sizes, and leaves everything else as it stands, so that what runs is the recipe.

All lengths shrink by one factor, so that the longest window has `longest` tokens; all counts of tokens and steps by another, so
that the run has `steps` optimizer steps; layers, widths and vocabulary to given sizes, with the model's own ratios of heads to
groups and of inner to outer width; nodes and parallel sizes to what `processes` allow. What the command line says stays so.

A recipe that begins with a checkpoint needs one of its scaled shape: it is trained by the same recipe from random weights
(`model=llama2_7b restore_from=null rope=null scale=tiny`), or imported.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from nemo_longctx.config import ConfigError, build, plain
from nemo_longctx.planning.models import class_sizes

_LAYOUT = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
_COUNTS = ("samples", "documents", "limit", "targets")  # of what is measured: no more than `windows` of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """How small a recipe is made.

    Attributes:
        longest: tokens of the run's longest window; every other length shrinks by the same factor.
        lengths: that factor, in place of `longest`.
        windows: longest windows in an optimizer step.
        steps: optimizer steps of the run.
        num_layers, hidden_size, num_attention_heads, vocab_size: of the model; a smaller one stays.
        processes: no more than so many, on one node; parallel sizes are cut to fit: tensor first, then context, then pipeline.
    """

    longest: int = 256
    lengths: int | None = None
    windows: int = 8
    steps: int = 12
    num_layers: int = 2
    hidden_size: int = 128
    num_attention_heads: int = 8
    vocab_size: int = 512
    processes: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ConfigError(f"scale.{field.name}", value, "set a whole number of at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError("scale.num_attention_heads", self.num_attention_heads, "must divide scale.hidden_size")


def scaled(values: Mapping[str, Any], *, recipe: Mapping[str, Any], said: Collection[str] = ()) -> dict[str, Any]:
    """A composed mapping, made as small as its `scale` says.

    Args:
        values: with the key `scale`, which is taken out.
        recipe: the same without what the command line says by key: the factors are those of the recipe.
        said: dotted keys of the command line; they and what is below them stay.

    Raises:
        ConfigError: a wrong `scale`.
    """
    made: dict[str, Any] = plain({key: value for key, value in values.items() if key != "scale"})
    scale = build(ScaleConfig, values["scale"], where="scale")
    shrink = _Shrink(made, said)
    _trainer(shrink, scale)
    _model(shrink, scale)
    longest = max((stage["seq_length"] for stage in recipe["curriculum"]["stages"]), default=1)
    factor = scale.lengths or max(1, longest // scale.longest)
    _lengths(shrink, factor)
    _counts(shrink, scale)
    _tokens(shrink, scale, recipe["curriculum"])
    return made


class _Shrink:
    """Values, and what of them the command line said."""

    def __init__(self, values: dict[str, Any], said: Collection[str]):
        self.values, self.said = values, said

    def is_said(self, key: str) -> bool:
        return any(key == each or key.startswith((f"{each}.", f"{each}[")) for each in self.said)

    def part(self, key: str) -> dict[str, Any]:
        """The mapping at a dotted key; an empty one where there is none."""
        at: Any = self.values
        for name in key.split("."):
            at = at.get(name) if isinstance(at, dict) else None
        return at if isinstance(at, dict) else {}

    def change(self, key: str, smaller: Callable[[Any], Any]) -> None:
        """Change the value at a dotted key, if it has one and the command line did not say it."""
        where, _, name = key.rpartition(".")
        part = self.part(where) if where else self.values
        if isinstance(part.get(name), (int, float)) and not isinstance(part.get(name), bool) and not self.is_said(key):
            part[name] = smaller(part[name])

    def set(self, key: str, value: Any) -> None:
        """Say what the recipe leaves to a default."""
        where, _, name = key.rpartition(".")
        if not self.is_said(key):
            self.values.setdefault(where, {})[name] = value


def _trainer(shrink: _Shrink, scale: ScaleConfig) -> None:
    trainer = shrink.part("trainer")
    processes = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    shrink.set("trainer.num_nodes", 1)
    shrink.set("trainer.devices", min(scale.processes, processes))
    room = trainer["devices"] * trainer["num_nodes"]
    for name in _LAYOUT:
        if not shrink.is_said(f"trainer.{name}"):
            trainer[name] = math.gcd(trainer.get(name, 1), room)
        room = max(1, room // trainer[name])
    if trainer["tensor_model_parallel_size"] == 1 and "sequence_parallel" in trainer:
        shrink.set("trainer.sequence_parallel", False)
    if trainer["pipeline_model_parallel_size"] == 1 and "virtual_pipeline_model_parallel_size" in trainer:
        shrink.set("trainer.virtual_pipeline_model_parallel_size", None)
    for number, stage in enumerate(shrink.part("curriculum").get("stages", ())):
        for name in _LAYOUT:
            if name in stage and not shrink.is_said(f"curriculum.stages[{number}].{name}"):
                stage[name] = math.gcd(stage[name], trainer[name])


def _model(shrink: _Shrink, scale: ScaleConfig) -> None:
    """Sizes of a model that begins with random weights; a checkpoint has its own."""
    model = shrink.part("model")
    if "config" not in model:
        return
    sizes = class_sizes(model) | model
    heads = min(scale.num_attention_heads, sizes.get("num_attention_heads", scale.num_attention_heads))
    hidden = min(scale.hidden_size, sizes.get("hidden_size", scale.hidden_size))
    all_heads = sizes.get("num_attention_heads") or heads
    groups = heads * (sizes.get("num_query_groups") or all_heads) // all_heads
    inner = hidden * (sizes.get("ffn_hidden_size") or 4 * hidden) / (sizes.get("hidden_size") or hidden)
    trainer = shrink.part("trainer")
    chunks = trainer["pipeline_model_parallel_size"] * (trainer.get("virtual_pipeline_model_parallel_size") or 1)
    layers = min(scale.num_layers, sizes.get("num_layers", scale.num_layers))
    small = {
        "num_layers": math.ceil(layers / chunks) * chunks,
        "hidden_size": hidden,
        "ffn_hidden_size": max(16, round(inner / 16) * 16),
        "num_attention_heads": heads,
        "num_query_groups": max(min(2, heads), groups),
        "kv_channels": hidden // heads,
        "vocab_size": min(scale.vocab_size, sizes.get("vocab_size", scale.vocab_size)),
    }
    for name, value in small.items():
        shrink.set(f"model.{name}", value)
    stages = enumerate(shrink.part("curriculum").get("stages") or ())
    for where, part in [("trainer", trainer), *((f"curriculum.stages[{i}]", stage) for i, stage in stages)]:
        for name in ("recompute", "offload"):
            kind, _, count = str(part.get(name)).partition(":")
            if kind == "block" and count.isdecimal() and not shrink.is_said(f"{where}.{name}"):
                part[name] = f"block:{min(int(count), model['num_layers'] // chunks)}"


def _lengths(shrink: _Shrink, factor: int) -> None:
    def smaller(tokens: int) -> int:
        return max(1, int(tokens) // factor)

    def all_in(part: Any, key: str, names: Collection[str]) -> None:
        """Shrink lengths by these names, in a mapping or each mapping of a list, and in lists of numbers."""
        for number, each in enumerate(part if isinstance(part, list) else [part]):
            where = f"{key}[{number}]" if isinstance(part, list) else key
            for name in names if isinstance(each, dict) else ():
                value = each.get(name)
                if shrink.is_said(f"{where}.{name}"):
                    continue
                if isinstance(value, list):
                    each[name] = sorted({smaller(tokens) for tokens in value})
                elif isinstance(value, int):
                    each[name] = smaller(value)

    all_in(shrink.part("curriculum").get("stages"), "curriculum.stages", ["seq_length"])
    data = shrink.part("data")
    for name in ("validation", "test"):
        all_in(data.get(name), f"data.{name}", ["seq_length"])
    for name in ("mix", "pretraining"):
        lengths = ["drop_shorter", "drop_longer", "long_length"]
        all_in(data.get(name), f"data.{name}", lengths)
        all_in(shrink.part(f"data.{name}").get("sources"), f"data.{name}.sources", lengths)
    all_in(shrink.values.get("eval"), "eval", ["max_length"])
    tasks = shrink.part("eval").get("tasks") or []
    for number, task in enumerate(tasks):
        where = f"eval.tasks[{number}]"
        all_in(task, where, ["seq_length", "contexts", "short", "targets"])
        all_in(task.get("probes"), f"{where}.probes", ["lengths"])
        all_in(task.get("metadata"), f"{where}.metadata", ["max_prompt"])
    all_in(shrink.values.get("rope"), "rope", ["original_max_position_embeddings", "original_length"])


def _counts(shrink: _Shrink, scale: ScaleConfig) -> None:
    """What is measured: no more of it than a step has windows."""
    sets = [(f"data.{name}", shrink.part("data").get(name) or []) for name in ("validation", "test")]
    sets.append(("eval.tasks", shrink.part("eval").get("tasks") or []))
    for key, part in sets:
        for number, each in enumerate(part):
            for name in _COUNTS:
                if isinstance(each.get(name), int) and not shrink.is_said(f"{key}[{number}].{name}"):
                    each[name] = min(each[name], scale.windows)


def _copies(shrink: _Shrink) -> int:
    """Data-parallel ranks of the scaled layout."""
    trainer = shrink.part("trainer")
    return max(1, trainer["devices"] * trainer["num_nodes"] // math.prod(trainer[name] for name in _LAYOUT))


def _tokens(shrink: _Shrink, scale: ScaleConfig, recipe: Mapping[str, Any]) -> None:
    """Tokens of a step and of the run, and what is counted in either."""
    curriculum = shrink.part("curriculum")
    stages = curriculum.get("stages") or []
    longest = max((stage["seq_length"] for stage in stages), default=1)
    # Whole batches on every rank in each stage, and a step in each.
    whole = math.lcm(*(stage["seq_length"] * stage.get("micro_batch_size", 1) * _copies(shrink) for stage in stages))
    ends = [0.0, *(stage["until"] for stage in stages)]
    shortest = min((end - begin for begin, end in itertools.pairwise(ends)), default=1.0)
    before = recipe["tokens_per_step"], recipe["total_tokens"] // recipe["tokens_per_step"]
    shrink.change("curriculum.tokens_per_step", lambda tokens: math.ceil(longest * scale.windows / whole) * whole)
    step = curriculum["tokens_per_step"]
    steps = min(max(scale.steps, math.ceil(1 / max(shortest, 1e-6))), before[1])
    shrink.change("curriculum.total_tokens", lambda tokens: steps * step)

    def in_steps(count: float, least: int) -> int:
        return 0 if count <= 0 else max(1, least, round(count * steps / before[1]))

    def in_tokens(tokens: int, least: int) -> int:
        return step * in_steps(tokens / before[0], least)

    quarter = max(1, steps // 4)  # saving at every step of so few would be all that a run does
    for key, least in (
        ("trainer.val_every_tokens", quarter),
        ("checkpoint.every_tokens", quarter),
        ("optimizer.warmup_tokens", 1),
    ):
        shrink.change(key, functools.partial(in_tokens, least=least))
    shrink.change("eval.every", lambda count: in_steps(count, quarter))
