"""Settings that act only beside another: one table, read when a command line is composed, and once more before a run begins.

What somebody types and what nothing heeds is refused. Where a recipe says it, and something else took its effect away
(`data.validation=[]` over a recipe that validates), it is a note: the recipe is not theirs to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from nemo_longctx.config import ConfigError

ASKS_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {}, ())


@dataclasses.dataclass(frozen=True)
class Rule:
    """Settings that have no effect under some values.

    Attributes:
        keys: dotted; what is below one is meant with it.
        idle: whether the composed values leave them without effect.
        why: what is wrong and what to change.
        refused: whether one that is typed is an error; else it is a note too.
        nothing: values that ask for nothing, so that they may stand anywhere.
    """

    keys: tuple[str, ...]
    idle: Callable[[Mapping[str, Any]], bool]
    why: str
    refused: bool = True
    nothing: tuple[Any, ...] = ASKS_NOTHING


def part(values: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _without(key: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: not part(values, key)


def _no_share(source: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: bool(part(values, "data.blend")) and source not in part(values, "data.blend")


EVALUATION = ("every", "at_start", "at_end", "time_budget", "guard", "tokenizer", "max_length", "results_cache")
_NO_SHARE = "data.blend gives it no share, so it is not read; name a share, or leave it out"
RULES = (
    Rule(("trainer.val_every_tokens", "trainer.limit_val_batches"), _without("data.validation"),
         "data.validation names no set, so nothing is validated; name one, or leave it out"),
    Rule(tuple(f"eval.{name}" for name in EVALUATION), _without("eval.tasks"),
         "eval.tasks names none, so nothing is measured; choose one with eval=NAME, or leave it out"),
    Rule(("data.test",), lambda values: True,
         "a run measures data.validation alone; name the set there, or measure checkpoints with `nemo-longctx eval`",
         refused=False),  # the data module has a loader of it, for NeMo's own trainer.test
    Rule(("data.persistent_workers",), lambda values: part(values, "data.num_workers") == 0,
         "data.num_workers=0 starts no process to keep; set it above 0, or leave it out"),
    Rule(("data.mix.balance",), _without("data.mix.long_share"),
         "data.mix.long_share asks for no share of long documents; set it with data.mix.long_length, or leave it out"),
    Rule(("data.pretraining.balance",), _without("data.pretraining.long_share"),
         "data.pretraining.long_share asks for no share of long documents; set it with long_length, or leave it out"),
    Rule(("data.prompt_loss_weight",), _no_share("long"),
         "it is the weight of long instances' prompts, and data.blend has no long ones; give them a share, or leave it out",
         nothing=(None,)),
    # The same files for every row of a study (`sft=...`): only some of the rows read all of them.
    Rule(("data.short",), _no_share("short"), _NO_SHARE, refused=False),
    Rule(("data.long",), _no_share("long"), _NO_SHARE, refused=False),
    Rule(("data.pretraining",), _no_share("pretraining"), _NO_SHARE, refused=False),
    Rule(("optimizer.min_lr",), lambda values: part(values, "optimizer.schedule") == "constant",
         "optimizer.schedule=constant stays at optimizer.lr; set cosine, or leave it out", nothing=(None,)),
    Rule(("checkpoint.keep_last",), _without("checkpoint.every_tokens"),
         "checkpoint.every_tokens=0 saves only at the end, so there is one; set it above 0, or leave it out"),
)  # fmt: skip


def idle(values: Mapping[str, Any]) -> Iterator[tuple[str, Rule]]:
    """The keys of `values` that ask for something which nothing heeds, each with its rule."""
    for rule in RULES:
        for key in rule.keys:
            if part(values, key) not in rule.nothing and rule.idle(values):
                yield key, rule


def refuse_idle(values: Mapping[str, Any], typed: Iterable[str]) -> None:
    """Refuse what was typed and has no effect.

    Args:
        values: as composed.
        typed: dotted keys of the command line.

    Raises:
        ConfigError: the first of them.
    """
    named = sorted(set(typed))
    for key, rule in idle(values):
        word = next((each for each in named if each == key or each.startswith(f"{key}.")), None)
        if word is not None and rule.refused:
            raise ConfigError(word, part(values, word), f"has no effect: {rule.why}")


def beyond(recipe: Any) -> Iterator[tuple[str, int, str]]:
    """Intervals that are longer than a run: key, value, and what that comes to."""
    tokens, steps = recipe.curriculum.total_tokens, recipe.curriculum.total_steps
    validates, measures = bool(recipe.data.validation), bool(recipe.eval and recipe.eval.tasks)
    only_at_end = "so only the end is"
    for key, value, whole, unit, does in (
        ("trainer.val_every_tokens", recipe.trainer.val_every_tokens * validates, tokens, "tokens", f"{only_at_end} validated"),
        ("checkpoint.every_tokens", recipe.checkpoint.every_tokens, tokens, "tokens", f"{only_at_end} saved"),
        ("eval.every", recipe.eval.every * measures if recipe.eval else 0, steps, "steps", "so nothing is measured in between"),
        ("trainer.log_every_n_steps", recipe.trainer.log_every_n_steps, steps, "steps", "so no step is logged"),
    ):
        if value > whole:
            yield key, value, f"the run has {whole:,} {unit}, {does}"


def without_effect(recipe: Any) -> list[str]:
    """A sentence on each setting of a recipe that has no effect: none of them a default."""
    values, defaults = dataclasses.asdict(recipe), _defaults(recipe)
    said = [
        f"{key}={_short(part(values, key))} has no effect: {rule.why}"
        for key, rule in idle(values)
        if part(values, key) != defaults.get(key)
    ]
    return said + [f"{key}={value}: {why}" for key, value, why in beyond(recipe)] + list(blind_guard(recipe))


def blind_guard(recipe: Any) -> Iterator[str]:
    """A sentence on each task that the guard watches on documents too few for an alarm at the run's last look."""
    if recipe.eval is None or recipe.eval.guard is None:
        return
    from nemo_longctx.eval.guard import fewest_pairs, level  # numpy, which `plan` does without

    watched = [task for task in recipe.eval.tasks if getattr(task, "guard", False)]
    looks = -(-recipe.curriculum.total_steps // recipe.eval.every) if recipe.eval.every else 1
    needed = fewest_pairs(level(recipe.eval.guard.significance, looks), len(watched))
    for task in watched:
        documents = getattr(task, "documents", needed)
        if documents < needed:
            yield (
                f"eval.guard: no change of {task.name} on {documents} documents, however large, is told from chance at the "
                f"last of {looks} looks; set documents={needed} or more in the task, or a larger eval.every"
            )


def _short(value: Any) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _defaults(made: Any, where: str = "") -> dict[str, Any]:
    """What the schema says where nobody does, by dotted key."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        found[f"{where}{field.name}"] = field.default
        if dataclasses.is_dataclass(value):
            found |= _defaults(value, f"{where}{field.name}.")
    return found
