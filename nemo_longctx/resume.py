"""What a restart may do with each setting: one table, and the comparison of a run's record with what it is asked to do now.

A resumed run is the run it was. Every setting has one rule:

- equal: it made what the run has learned or read; another value is refused, with both values.
- applied: another value takes effect from the checkpoint's step on, and is noted in the run's history.
- free: it says where and how the run computes, and changes no number but by rounding.

The record is `results/settings.json`, which each start writes, so that most mistakes are found before the host is imported;
what the checkpoint itself keeps (a callback's state) is compared once more where it is loaded.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nemo_longctx.checkpoints import Checkpoint, checkpoints
from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.effects import part
from nemo_longctx.runs import check_guard

Rule = Literal["equal", "applied", "free"]
ALLOW = "data.allow_change"


@dataclasses.dataclass(frozen=True)
class Row:
    """Rule of the keys that `pattern` matches (`*` stands for anything); `[]` is any place in a list.

    Attributes:
        pattern: dotted key. Of several that match, the one with the most letters beside `*` counts.
        rule: see the module.
        why: for the docs.
        opened: whether `data.allow_change=true` makes an equal setting an applied one.
    """

    pattern: str
    rule: Rule
    why: str
    opened: bool = False


MOVABLE = "what the run reads: contents are compared, by their hash, and what was moved may be named where it is now"
TABLE = (
    Row("name", "free", "with output_dir, where the run is: another name is another run"),
    Row("output_dir", "free", "a run's directory may be moved"),
    Row("restore_from", "equal", "a resumed run has its own weights; a base that was moved may be named where it is now"),
    Row("seed", "equal", "all random choices"),
    Row("model.*", "equal", "the weights have that shape"),
    *(
        Row(f"model.{name}", "free", "which kernels compute")
        for name in ("*fusion", "*fusion_impl", "attention_backend", "*cuda_graph*", "*_layer_norm", "deterministic_mode")
    ),
    *(
        Row(f"model.{name}", "free", "layout, and what its ranks exchange when")
        for name in (
            "*pipeline_stage",
            "*pipeline_split",
            "pipeline_model_parallel_layout",
            "cp_comm_type",
            "tp_comm*",
            "hierarchical_context_parallel_sizes",
            "moe_token_dispatcher_type",
            "*deepep*",
            "*p2p*",
            "*overlap*",
            "*wgrad*",
        )
    ),
    *(
        Row(f"model.{name}", "applied", "from the checkpoint's step on")
        for name in ("*dropout", "*loss_coeff", "*loss_scaling_factor", "moe_router_bias_update_rate")
    ),
    Row("rope*", "equal", "the weights have learned these positions"),
    Row("data.*", "equal", "the stream of tokens is made of it", opened=True),
    Row("data.mix.sources[].path", "free", "contents are compared, by their hash: a corpus may be moved"),
    Row("data.mix.share_tolerance", "free", "a check, no choice"),
    Row("data.mix.sources", "applied", "the stream goes on with what was not read yet: sources may come and go"),
    Row("data.mix.sources[].weight", "applied", "the stream goes on with what was not read yet"),
    Row("data.short", "equal", MOVABLE, opened=True),
    Row("data.long", "equal", MOVABLE, opened=True),
    Row("data.pretraining.sources[].path", "equal", MOVABLE, opened=True),
    Row("data.after", "equal", "said once, where a run begins; a base that was moved may be named where it is", opened=True),
    Row("data.allow_change", "free", "opens a change of the stream"),
    Row("data.validation*", "applied", "what is measured from now on"),
    Row("data.test*", "applied", "what is measured from now on"),
    Row("data.tokenizer", "applied", "what checkpoints carry, and exports; what the corpora say of theirs is compared with it"),
    Row("data.cache_dir", "free", "where the order of documents is kept"),
    Row("data.num_workers", "free", "data loader processes"),
    Row("data.pin_memory", "free", "data loader processes"),
    Row("data.persistent_workers", "free", "data loader processes"),
    Row("data.output_log", "applied", "logging"),
    Row("curriculum.tokens_per_step", "equal", "steps count tokens"),
    Row(
        "curriculum.total_tokens",
        "applied",
        "the stream goes on with what was not read yet (`sft`: under `data.allow_change=true`); the schedule ends there",
    ),
    Row("curriculum.stages*", "applied", "the stream goes on with what was not read yet, at these lengths"),
    Row("curriculum.stages[].micro_batch_size", "free", "layout"),
    Row("curriculum.stages[].recompute", "free", "memory against time"),
    Row("curriculum.stages[].offload", "free", "memory against time"),
    Row("curriculum.stages[].*_parallel_size", "free", "layout"),
    Row("eval*", "applied", "what is measured from now on"),
    Row("optimizer.*", "applied", "from the checkpoint's step on, as if the schedule had always been this one"),
    Row("optimizer.distributed", "equal", "how the optimizer's state is kept in checkpoints"),
    Row("trainer.*", "free", "where the run computes, and its layout"),
    Row("trainer.precision", "equal", "what the optimizer's state holds"),
    Row("trainer.fsdp", "equal", "how weights are kept in checkpoints"),
    Row("trainer.val_every_tokens", "applied", "validation"),
    Row("trainer.limit_val_batches", "applied", "validation"),
    Row("trainer.log_every_n_steps", "applied", "logging"),
    Row("checkpoint.*", "applied", "what is kept from now on"),
    Row("resume.*", "free", "how a start finds its checkpoint"),
    Row("logger", "free", "where figures go besides the run's own files"),
    Row("bad_numbers.*", "applied", "what is done from now on where loss or gradient go wrong"),
    Row("lora*", "equal", "the adapters have that shape"),
    Row("lora.dropout", "applied", "from the checkpoint's step on"),
)


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting that is not what the run's record has."""

    key: str
    row: Row
    before: Any
    run: Any


def rule_of(key: str) -> Row | None:
    """The row of the table that a dotted key (`curriculum.stages[1].seq_length`) falls under; None: it has no rule."""
    name = re.sub(r"\[\d+\]", "[]", key)
    rows = [row for row in TABLE if fnmatch.fnmatchcase(name, row.pattern.replace("[", "[[]"))]
    return max(rows, key=lambda row: len(row.pattern.replace("*", "")), default=None)


def flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys; what is None is left out."""
    if isinstance(values, Mapping):
        inner = {f"{key}.{name}" if key else str(name): value for name, value in values.items()}
    elif isinstance(values, (list, tuple)) and any(isinstance(value, Mapping) for value in values):
        inner = {f"{key}[{place}]": value for place, value in enumerate(values)}
    else:
        return {} if values is None else {key: values}
    return {name: value for inside, part in inner.items() for name, value in flat(part, inside).items()}


def plain(recipe: Any) -> dict[str, Any]:
    """A recipe (or a mapping) as JSON keeps it. Records of 0.1 keep an instruction recipe's `run` beside its adapters."""
    values = recipe if isinstance(recipe, Mapping) else dataclasses.asdict(recipe)
    values = json.loads(json.dumps(values, default=str))
    return {**values.pop("run"), **values} if isinstance(values.get("run"), dict) else values


def changes(before: Mapping[str, Any], run: Mapping[str, Any]) -> list[Change]:
    """What differs between two plain recipes, by key, free settings left out.

    A key that only one of them sets is a change where it is applied; where it must be equal, what it comes to is not known
    here, and compared when it is (`check_live`, the data module). Of lists of other lengths the whole is named, and where
    sources were replaced. Sources in another order are compared by their names.
    """
    run = _in_old_order(before, run)
    old, new = flat(before), flat(run)
    found = [_change(key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
    for key in _lists_of_other_lengths(before, run):
        found = [change for change in found if change is None or not (change.key == key or change.key.startswith(f"{key}["))]
        found.append(_change(key, part(before, key), part(run, key)))
    adapters = before.get("lora"), run.get("lora")
    if (adapters[0] is None) != (adapters[1] is None) and (row := rule_of("lora")) is not None:
        found.append(Change("lora", row, *adapters))
    return [change for change in found if change is not None]


def _change(key: str, before: Any, run: Any) -> Change | None:
    row = rule_of(key)
    if row is None or row.rule == "free" or before == run:
        return None
    if (row.pattern in ("restore_from", "data.after") or row.why == MOVABLE) and _moved(before, run):
        return None
    if row.rule == "equal" and (before is None or run is None) and key != "restore_from":
        return None
    return Change(key, row, before, run)


def _moved(before: Any, run: Any) -> bool:
    """Whether two paths (or lists of them) mean one thing: the same place, or the old place has nothing any more."""
    if isinstance(before, list) and isinstance(run, list) and len(before) == len(run):
        return all(_moved(*pair) for pair in zip(before, run, strict=True))
    if not (isinstance(before, str) and isinstance(run, str)):
        return False
    return Path(before).resolve() == Path(run).resolve() or not Path(before).exists()


SOURCES = "data.mix.sources"
LISTS = ("curriculum.stages", "data.mix.sources", "data.pretraining.sources", "data.validation", "data.test", "eval.tasks")


def _lists_of_other_lengths(before: Mapping[str, Any], run: Mapping[str, Any]) -> Iterable[str]:
    for key in LISTS:
        lists = part(before, key), part(run, key)
        if not all(isinstance(each, list) for each in lists):
            continue
        if len(lists[0]) != len(lists[1]) or (key == SOURCES and _replaced(*lists)):
            yield key


def _replaced(before: Sequence[Any], run: Sequence[Any]) -> bool:
    """Whether sources in the same places are called otherwise: some came and some went, or were given another name."""
    names = [[source.get("name") for source in each] for each in (before, run)]
    return any(None not in both and both[0] != both[1] for both in zip(*names, strict=True))


def _in_old_order(before: Mapping[str, Any], run: Mapping[str, Any]) -> Mapping[str, Any]:
    """`run` with its sources in the order that they have in `before`, where they are the same ones."""
    lists = part(before, SOURCES), part(run, SOURCES)
    if not all(isinstance(each, list) for each in lists):
        return run
    there, here = ([str(each.get("name") or each.get("path")) for each in sources] for sources in lists)
    if there == here or sorted(there) != sorted(here):
        return run
    sources = [lists[1][here.index(name)] for name in there]
    return {**run, "data": {**run["data"], "mix": {**run["data"]["mix"], "sources": sources}}}


def refuse(found: Iterable[Change], *, where: str, allow_change: bool) -> None:
    """Raise for the first change of a setting that must be equal.

    Args:
        found: `changes`.
        where: what has the value before, such as "the checkpoint at 40960 tokens".
        allow_change: `data.allow_change`.

    Raises:
        ConfigError: the key, both values, and the mend.
    """
    for change in found:
        if change.row.rule != "equal" or (change.row.opened and allow_change):
            continue
        mend = f"{where} has {change.before!r}, and a resumed run keeps it; set that again, or another `name` for another run"
        if change.row.opened:
            mend += f", or {ALLOW}=true to go on with the new value"
        raise ConfigError(change.key, change.run, mend)


def applied(found: Iterable[Change]) -> dict[str, dict[str, Any]]:
    """What takes effect from the checkpoint on, for the history: key -> {before, run}."""
    return {change.key: {"before": change.before, "run": change.run} for change in found}


def check_live(before: Mapping[str, Any], run: Mapping[str, Any], *, where: str) -> None:
    """Compare what the settings came to: RoPE and shape of the live model, which no YAML needs to say.

    Raises:
        ConfigError: one that differs, with both values.
    """
    for key in sorted(before, key=lambda name: not name.startswith("rope.")):  # the user's words before the host's
        row = rule_of(key if key.startswith("rope") else f"model.{key}")
        if key in run and row is not None and row.rule == "equal" and not _same(before[key], run[key]):
            mend = f"{where} was trained with {before[key]!r}; set that again, or another `name` for another run"
            raise ConfigError(key, run[key], mend)


def _same(before: Any, run: Any) -> bool:
    """Whether a live value is the one of a record, which keeps lists as text (`[31, 0]`), tuples by either bracket."""
    return before == run or _text(before) == _text(run)


def _text(value: Any) -> str:
    return str(value).replace("(", "[").replace(")", "]")


# What a run may change in its model without being another: its longest window, and how it computes.
NOT_COMPARED = ("seq_length", "max_position_embeddings", "recompute", "attention_backend")


def live_settings(record: Mapping[str, Any], asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a run's record says that its model had.

    Args:
        asked: `model` of the recipe of now. A field that only one of it and the record's recipe names is compared too: the
            other took what the checkpoint or the class has.
    """
    sides = [] if asked is None else [plain(record.get("recipe", {})).get("model") or {}, asked]
    named = [{key for key, value in side.items() if value is not None and key != "config"} for side in sides]
    once = named[0] ^ named[1] if named else set()
    fields = {key: value for key, value in record.get("config", {}).items() if key in once}
    settings = fields | {key: value["run"] for key, value in record.get("settings", {}).items()} | record.get("model", {})
    if "rope.variant" in settings:
        settings.setdefault("rope.layers", "all")  # records of before it could be another
    return {key: value for key, value in settings.items() if key not in NOT_COMPARED}


def read_record(path: Path) -> dict[str, Any] | None:
    """A run's `settings.json`; None where there is none that can be read."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("recipe"), dict) else None


def run_record(directory: Path) -> dict[str, Any] | None:
    """The record of a run that has a finished checkpoint to go on from; None where either is missing.

    A start that ended before it saved anything has changed nothing: what its checkpoint was made by counts (`from`).
    """
    found, record = checkpoints(directory), read_record(directory / "results" / "settings.json")
    if not found or record is None:
        return None
    before = record.get("from")
    return before if isinstance(before, dict) and found[0].step <= record.get("step", -1) else record


def check_resumed(recipe: Any, directory: Path) -> None:
    """Compare a recipe with the record of the run in `directory`, if that has a checkpoint to go on from; without the host.

    Raises:
        ConfigError: a setting that must be equal and is not, or a run that the short-context guard stopped.
    """
    record = run_record(directory)
    if record is None:
        return
    now, where = plain(recipe), f"the run in {directory}"
    allow_change = bool((now.get("data") or {}).get("allow_change"))
    was = plain(record["recipe"])
    refuse(changes(was, now), where=where, allow_change=allow_change)
    check_live(live_settings(record), _asked_rope(was.get("rope"), now.get("rope")), where=where)
    check_guard(directory, (now.get("eval") or {}).get("guard"))


def check_length(curriculum: Any, resumed: Checkpoint | None) -> None:
    """Refuse a run that is shorter than what the checkpoint that it goes on from has behind it.

    Raises:
        ConfigError: it is.
    """
    behind = 0 if resumed is None else resumed.step * curriculum.tokens_per_step
    if resumed is not None and behind > curriculum.total_tokens:
        mend = (
            f"the run in {resumed.path.parent.parent} has {behind} tokens behind it already; set at least that, or another name"
        )
        raise ConfigError("curriculum.total_tokens", curriculum.total_tokens, mend)


def shorter_again(curriculum: Any, directory: Path) -> str | None:
    """A sentence where a run goes on with shorter windows than it would have, had its curriculum not been changed.

    `until` is a share of the whole run: one that is made much longer falls back into a stage that it had left.
    """
    record, newest = run_record(directory), next(iter(checkpoints(directory)), None)
    values = None if record is None else plain(record["recipe"]).get("curriculum")
    if newest is None or not values or not 0 < newest.step < curriculum.total_steps:
        return None
    before = build(Curriculum, values, where="curriculum").stage_at_step(newest.step).seq_length
    now = curriculum.stage_at_step(newest.step).seq_length
    if now >= before:
        return None
    return (
        f"from step {newest.step} on windows have {now:,} tokens, and by the curriculum of before {before:,}: `until` is a "
        "share of the whole run; set curriculum.stages so that the run stays in its stage"
    )


# Variants that the host's own field of the base says whole: a model that has one is a plain RoPE of another base.
SAID_BY_THE_BASE = ("abf", "ntk")


def _asked_rope(was: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `now` asks of RoPE in the words of a live model, where the run's record had not asked the same."""
    if not now or now == was:
        return {}
    asked = dict(now)
    if asked.get("variant") in SAID_BY_THE_BASE:
        made = asked.pop("variant") == "ntk"  # by its factor, which the live model does not know
        asked = {} if made else {"variant": "rope", **asked}
    return {f"rope.{key}": value for key, value in asked.items()}


def without_effect(recipe: Any, directory: Path) -> list[str]:
    """What a recipe asks otherwise than the run in `directory` did, as `key: before -> asked`: a finished run heeds none."""
    record = run_record(directory)
    if record is None:
        return []
    return [f"{each.key}: {each.before} -> {each.run}" for each in changes(plain(record["recipe"]), plain(recipe))]


def check_resumed_live(live: Mapping[str, Any], directory: Path, *, asked: Mapping[str, Any] | None = None) -> None:
    """`check_live` with the record of the run in `directory`, if that has a checkpoint to go on from.

    Args:
        live: settings, shape and fields of the model that is about to be trained.
        asked: as in `live_settings`.
    """
    record = run_record(directory)
    if record is not None:
        check_live(live_settings(record, asked), live, where=f"the run in {directory}")


def table_markdown() -> str:
    """The table as the docs show it: neighbours under one rule for one reason stand in one line."""
    lines = ["| setting | rule | why |", "| --- | --- | --- |"]
    for (rule, opened, why), rows in itertools.groupby(TABLE, lambda row: (row.rule, row.opened, row.why)):
        told = f"{rule}; applied with `{ALLOW}=true`" if opened else rule
        lines.append(f"| {', '.join(f'`{row.pattern}`' for row in rows)} | {told} | {why} |")
    return "\n".join(lines) + "\n"
