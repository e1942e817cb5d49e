"""lm-eval's tasks run by lm-eval's own evaluator, over our `LM`."""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

import nemo_longctx.eval.tasks
from nemo_longctx.adapters.lm_eval import LongContextLM
from nemo_longctx.config import ConfigError
from nemo_longctx.eval.suite import HarnessResult, HarnessTask

logger = logging.getLogger(__name__)
TASK_FOLDER = str(Path(nemo_longctx.eval.tasks.__file__).parent)
# `evaluate`'s own switch for running code; lm-eval's code tasks ask it when they are loaded.
CODE_SWITCH = "HF_ALLOW_CODE_EVAL"
# What lm-eval says of a task beside its metrics.
NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@functools.lru_cache(maxsize=8)
def _manager(include_path: str | None, include_defaults: bool, metadata: str) -> TaskManager:
    """An index of tasks, kept: with lm-eval's own tasks it takes many seconds to build."""
    folders = [TASK_FOLDER, *([include_path] if include_path else [])]
    return TaskManager(include_path=folders, include_defaults=include_defaults, metadata=json.loads(metadata) or None)


def load_tasks(task: HarnessTask) -> dict[str, Any]:
    """What lm-eval's `evaluate` takes: its task objects, and their groups.

    Raises:
        ConfigError: a name that no folder has (lm-eval's own tasks need `include_defaults`), or a task that runs what the model
            wrote without `allow_code_execution`.
    """
    manager = _manager(task.include_path, task.include_defaults, json.dumps(dict(task.metadata), sort_keys=True))
    unknown = [name for name in task.tasks if name not in manager.all_tasks]
    if unknown:
        mend = "" if task.include_defaults else "; for lm-eval's own set include_defaults: true"
        raise ConfigError("eval.tasks", ", ".join(unknown), f"no such task in {TASK_FOLDER}{mend}")
    mend = "runs code that the model wrote, on this machine; in a sandbox set allow_code_execution: true"
    if task.allow_code_execution:
        os.environ[CODE_SWITCH] = "1"
    try:
        loaded = manager.load(list(task.tasks))
    except ValueError as error:
        if CODE_SWITCH in str(error):
            raise ConfigError("eval.tasks", ", ".join(task.tasks), mend) from error
        raise
    unsafe = [name for name, one in loaded["tasks"].items() if getattr(one, "UNSAFE_CODE", False)]
    if unsafe and not task.allow_code_execution:
        raise ConfigError("eval.tasks", ", ".join(unsafe), mend)
    for one in loaded["tasks"].values():
        if task.num_fewshot is not None:
            one.set_config("num_fewshot", task.num_fewshot)
        one.set_fewshot_seed(1234)
    return dict(loaded)


def run_harness(task: HarnessTask, lm: LongContextLM) -> HarnessResult:
    """Run the tasks of one block.

    `evaluate` is called rather than `simple_evaluate`, which would reseed every generator of the training run.

    Beside the metrics of a task stand how many of its prompts were cut, and how many samples were not scored for it.
    """
    loaded = load_tasks(task)
    lm.truncations.clear()
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
    results: dict[str, dict[str, Any]] = {}
    watched: dict[str, list[float]] = {}
    for name, scores in output["results"].items():
        kept = {k.removesuffix(",none"): v for k, v in scores.items() if k not in NOT_METRICS and v != "N/A" and v != " "}
        if name in loaded["tasks"]:
            cut = [record for record in lm.truncations if record.task == name]
            lost = {record.doc_id for record in cut if record.lost}
            kept |= {"cut": len({record.doc_id for record in cut}), "not_scored": len(lost)}
        if kept:
            results[name] = kept
        for sample in sorted(output["samples"].get(name, []), key=lambda s: s["doc_id"]):
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float):
                    watched.setdefault(f"{name}/{metric}", []).append(float(sample[metric]))
    return HarnessResult(tasks=results, watched=watched, truncations=list(lm.truncations))
