"""lm-eval's tasks run by lm-eval's own evaluator, over our `LM`."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

import nemo_longctx.eval.tasks
from nemo_longctx.adapters.lm_eval import LongContextLM
from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.eval.guard import LOWER
from nemo_longctx.eval.results import finite
from nemo_longctx.eval.suite import HarnessResult, HarnessTask
from nemo_longctx.eval.tasks.loaders import load
from nemo_longctx.eval.truncation import POLICIES, TruncationRecord, prompt_budget
from nemo_longctx.files import write_text

logger = logging.getLogger(__name__)
TASK_FOLDER = str(Path(nemo_longctx.eval.tasks.__file__).parent)
# `evaluate`'s own switch for running code; lm-eval's code tasks ask it when they are loaded.
CODE_SWITCH = "HF_ALLOW_CODE_EVAL"
# What lm-eval says of a task beside its metrics.
NOT_METRICS = ("alias", "name", "sample_len", "sample_count", "not_scored")
# Metrics that keep parts of a score for each sample; the score of one sample is their aggregate over it alone.
OF_ONE_SAMPLE = ("rouge_geo", "word_perplexity", "byte_perplexity", "bits_per_byte")
PROMPT_END = 2000  # characters of a prompt that are kept where the sample has no question of its own
# What lm-eval's RULER says of a length that it has no samples of, in place of a score.
NO_SAMPLES = -1
# What a user may tell our tasks' loader.
OUR_METADATA = ("data", "max_prompt", "policy", "splits", "source")


@functools.lru_cache(maxsize=8)
def _index(include_path: str | None, include_defaults: bool) -> TaskManager:
    """An index of tasks, kept: with lm-eval's own tasks it takes many seconds to build."""
    folders = [TASK_FOLDER, *([include_path] if include_path else [])]
    return TaskManager(include_path=folders, include_defaults=include_defaults)


def _manager(task: HarnessTask, metadata: Mapping[str, Any]) -> TaskManager:
    """The index, giving the tasks that it loads this metadata."""
    manager = copy.copy(_index(task.include_path, task.include_defaults))
    manager.metadata = dict(metadata) or None
    manager._factory = TaskFactory(meta=manager.metadata)
    return manager


def check_names(task: HarnessTask) -> None:
    """Refuse tasks that do not exist, before a model is loaded for them.

    Raises:
        ConfigError: a name that no folder has (lm-eval's own tasks need `include_defaults`).
    """
    known = _index(task.include_path, task.include_defaults).all_tasks
    for name in task.tasks:
        if name not in known:
            more = "" if task.include_defaults else "; for lm-eval's own set include_defaults: true"
            near = difflib.get_close_matches(name, known, n=3)
            mend = f"did you mean {' or '.join(map(repr, near))}?" if near else f"none of {len(known)} is like it"
            raise ConfigError("eval.tasks", name, f"no such task, {mend}{more}")


def load_tasks(task: HarnessTask, *, tokenizer: str | None = None) -> dict[str, Any]:
    """What lm-eval's `evaluate` takes: its task objects, and their groups.

    Args:
        tokenizer: path or name of the model's, for tasks that make their own data from it (RULER).

    Raises:
        ConfigError: a name that no folder has (lm-eval's own tasks need `include_defaults`), or a task that runs what the model
            wrote without `allow_code_execution`.
    """
    check_names(task)
    manager = _manager(task, ({"tokenizer": tokenizer} if tokenizer else {}) | dict(task.metadata))
    mend = "runs code that the model wrote, on this machine; in a sandbox set allow_code_execution: true"
    if task.allow_code_execution:
        os.environ[CODE_SWITCH] = "1"
    try:
        loaded = manager.load(list(task.tasks))
    except ValueError as error:
        if CODE_SWITCH in str(error):
            raise ConfigError("eval.tasks", ", ".join(task.tasks), mend) from error
        raise
    ours = [name for name, one in loaded["tasks"].items() if one.config.custom_dataset is load]
    if ours and (task.policy != POLICIES[0] or task.max_prompt is not None):
        mend = f"is for lm-eval's own tasks; of {', '.join(ours)} use metadata.policy and metadata.max_prompt"
        raise ConfigError("eval.policy", task.policy, mend)
    unsafe = [name for name, one in loaded["tasks"].items() if getattr(one, "UNSAFE_CODE", False)]
    if unsafe and not task.allow_code_execution:
        raise ConfigError("eval.tasks", ", ".join(unsafe), mend)
    _check_metadata(task, loaded["tasks"])
    for one in loaded["tasks"].values():
        if task.num_fewshot is not None:
            one.set_config("num_fewshot", task.num_fewshot)
        one.set_fewshot_seed(1234)
    return dict(loaded)


@contextlib.contextmanager
def _tokenizer_on_disk(tokenizer: Any) -> Iterator[str]:
    """Where a task can load the tokenizer from: its own folder or name, or else a copy that is removed afterwards."""
    name = str(tokenizer.name_or_path or "")
    if name and (Path(name).is_dir() or not name.startswith((".", "/"))):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield folder


def _check_metadata(task: HarnessTask, loaded: Mapping[str, Any]) -> None:
    """Refuse what no task of the block would read: ours read the arguments of `load`, others what their own loader names."""
    readers = [one.config.custom_dataset for one in loaded.values()]
    for key, value in task.metadata.items():
        if any(reader is not None and _reads(reader, key) for reader in readers):
            continue
        if any(reader is load for reader in readers):
            raise ConfigError(f"eval.metadata.{key}", value, f"unknown key, {did_you_mean(str(key), OUR_METADATA)}")
        mend = f"has no effect on {', '.join(task.tasks)}, which is no task of ours; remove it"
        raise ConfigError(f"eval.metadata.{key}", value, mend)
    if task.metadata.get("policy", POLICIES[0]) not in POLICIES:
        raise ConfigError("eval.metadata.policy", task.metadata["policy"], did_you_mean(str(task.metadata["policy"]), POLICIES))
    most = task.metadata.get("max_prompt")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ConfigError("eval.metadata.max_prompt", most, "give a whole number of tokens, at least 1")


def _reads(reader: Callable[..., Any], key: str) -> bool:
    if reader is load:
        return key in OUR_METADATA
    parameters = inspect.signature(reader).parameters
    return key in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _bound(one: Any, max_length: int) -> dict[str, int]:
    """The longest prompt that the model has room for, where that is less than the task asks for."""
    most, new = (one.config.metadata or {}).get("max_prompt"), (one.config.generation_kwargs or {}).get("max_gen_toks", 0)
    room = prompt_budget(max_length, new) if most and one.config.custom_dataset is load else 0
    return {"prompt_limit": room} if most and 0 < room < most else {}


def _unmeasured(metric: str, value: Any) -> bool:
    """Whether the value says that there were no samples: RULER names its metrics by lengths, and none is below 0."""
    return metric.partition(",")[0].isdigit() and value == NO_SAMPLES


def _left_out(one: Any) -> dict[str, int]:
    """Published samples of one of our tasks that only a judge can score."""
    if one.config.custom_dataset is not load:
        return {}
    first: dict[str, Any] = next(iter(one.eval_docs), {})
    left = first.get("longctx", {}).get("left_out", 0)
    return {"left_out": left} if left else {}


def _watched(name: str, one: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """`task/metric` -> value of each sample, for the guard; `LOWER` is part of the name where a rise is a loss.

    Of the metrics whose values are parts of a score (`OF_ONE_SAMPLE`) it is the score of the sample alone. A metric of the
    whole set, say the gap between groups, has no value of one sample. How many were not scored is no score.
    """
    higher, aggregations = one.higher_is_better(), one.aggregation()
    watched: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        rule = sample.get("filter", "none")
        for metric in sample["metrics"]:
            value = aggregations[metric]([sample[metric]]) if metric in OF_ONE_SAMPLE else sample[metric]
            if metric in NOT_METRICS or not isinstance(value, int | float) or _unmeasured(metric, value):
                continue
            parts = [name, metric, *([] if rule == "none" else [rule]), *([LOWER] if higher.get(metric) is False else [])]
            watched.setdefault("/".join(parts), []).append(float(value))
    return watched


def _spread(scores: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many samples stand behind a task's scores, and the standard error of each that is the mean of its samples' values
    (NaN, not scored, left out), under lm-eval's own name for it, which it counts only beside a bootstrap of all others."""
    found: dict[str, float] = {"samples": len({sample["doc_id"] for sample in samples})}
    values: dict[str, list[float]] = {}
    for sample in samples:
        rule = sample.get("filter", "none")
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, int | float) and math.isfinite(value) and not _unmeasured(metric, value):
                values.setdefault(metric if rule == "none" else f"{metric},{rule}", []).append(float(value))
    for key, each in values.items():
        score = scores.get(key)
        if key in NOT_METRICS or len(each) < 2 or not isinstance(score, int | float):
            continue
        if math.isclose(score, sum(each) / len(each), rel_tol=1e-9, abs_tol=1e-12):
            metric, comma, rule = key.partition(",")
            found[f"{metric}_stderr{comma}{rule}"] = statistics.stdev(each) / math.sqrt(len(each))
    return found


def sample_rows(name: str, samples: Sequence[Mapping[str, Any]], cuts: Sequence[TruncationRecord]) -> list[dict[str, Any]]:
    """What is kept of each sample: its prompt's digest and end, the reply, the scores, and what was cut. `compare` reads it."""
    cut = {record.doc_id: record for record in cuts if record.task == name}
    filters = {sample.get("filter", "none") for sample in samples}
    named = [str(sample["doc"].get("id", sample["doc_id"])) for sample in samples]
    own = len(set(zip(named, (sample.get("filter") for sample in samples), strict=True))) == len(samples)
    rows = []
    for sample in sorted(samples, key=lambda one: one["doc_id"]):
        doc, replies = sample["doc"], sample["filtered_resps"]
        record = cut.get(sample["doc_id"])
        prompt = str(next(iter(sample["arguments"]), [""])[0])
        # Ids that repeat, and samples that several filters score, would be two answers of one id to `compare`.
        name_of_it = str(doc.get("id", sample["doc_id"]) if own else sample["doc_id"])
        rows.append(
            {
                "id": name_of_it + (f"/{sample['filter']}" if len(filters) > 1 else ""),
                "prompt": str(doc.get("question") or prompt[-PROMPT_END:]),
                "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
                "response": replies[0] if replies and isinstance(replies[0], str) else json.dumps(replies, default=str),
                "scores": {name: sample[name] for name in sample["metrics"] if not _unmeasured(name, sample[name])},
                "removed_tokens": record.removed if record else 0,
                "lost": list(record.lost) if record else [],
            }
        )
    return rows


def _keep(folder: Path, task: HarnessTask, samples: Mapping[str, Sequence[Mapping[str, Any]]], lm: LongContextLM) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in samples.items():
        rows = sample_rows(name, some, lm.truncations)
        text = "".join(json.dumps(finite(row), ensure_ascii=False, default=str) + "\n" for row in rows)
        write_text(folder / f"samples_{task.labelled(name).replace('/', '_')}.jsonl", text)


def run_harness(task: HarnessTask, lm: LongContextLM, *, keep: Path | None = None) -> HarnessResult:
    """Run the tasks of one block.

    Args:
        keep: folder for `samples_TASK.jsonl`, one line a sample; None keeps none.

    `evaluate` is called rather than `simple_evaluate`, which would reseed every generator of the training run.

    Beside the metrics of a task stand their standard errors, how many samples it asked, how many of its prompts were cut, how
    many samples were not scored for it, and as `prompt_limit` the model's own limit where a prompt of the task's length does
    not fit it.

    Raises:
        ConfigError: as `load_tasks`; a `max_prompt` beyond what the model reads; a guard with nothing to watch.
    """
    with _tokenizer_on_disk(lm.tokenizer) as tokenizer:
        loaded = load_tasks(task, tokenizer=tokenizer)
    asked = task.metadata.get("max_prompt") or task.max_prompt
    if asked is not None and asked > lm.max_length:
        mend = f"the model reads {lm.max_length} tokens, so no prompt can have so many; give at most that"
        raise ConfigError("eval.metadata.max_prompt" if "max_prompt" in task.metadata else "eval.max_prompt", asked, mend)
    lm.truncations.clear()
    lm.truncation = {"policy": task.policy, "max_prompt": task.max_prompt}
    output = lm_eval.evaluate(
        lm=lm,
        task_dict=loaded,
        limit=task.limit,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="WARNING",
        apply_chat_template=task.apply_chat_template,
        fewshot_as_multiturn=task.apply_chat_template,
        confirm_run_unsafe_code=task.allow_code_execution,
    )
    if keep is not None and os.environ.get("RANK", "0") == "0":
        _keep(keep, task, output["samples"], lm)
    results: dict[str, dict[str, Any]] = {}
    watched: dict[str, list[float]] = {}
    for name, scores in output["results"].items():
        kept = {k.removesuffix(",none"): v for k, v in scores.items() if k not in NOT_METRICS and v != "N/A" and v != " "}
        if name in loaded["tasks"]:
            cut = [record for record in lm.truncations if record.task == name]
            lost = {record.doc_id for record in cut if record.lost}
            kept |= _spread(kept, output["samples"].get(name, []))
            kept |= {"cut": len({record.doc_id for record in cut}), "not_scored": len(lost)}
            kept |= _bound(loaded["tasks"][name], lm.max_length) | _left_out(loaded["tasks"][name])
        kept = {key: "no samples" if _unmeasured(key, value) else value for key, value in kept.items()}
        if kept:
            results[name] = kept
        if name in loaded["tasks"]:
            found = _watched(name, loaded["tasks"][name], output["samples"].get(name, []))
            if task.guard and not found:
                mend = "no metric of this task has a value of each sample, so there is nothing to guard; set guard: false"
                raise ConfigError("eval.guard", name, mend)
            watched |= found
    return HarnessResult(tasks=results, watched=watched, truncations=list(lm.truncations))
