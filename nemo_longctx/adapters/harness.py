"""lm-eval's tasks run by lm-eval's own evaluator, over our `LM`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

import nemo_longctx.eval.tasks
from nemo_longctx.adapters.lm_eval import LongContextLM
from nemo_longctx.eval.suite import HarnessTask

logger = logging.getLogger(__name__)
TASK_FOLDER = str(Path(nemo_longctx.eval.tasks.__file__).parent)


def load_tasks(task: HarnessTask) -> dict[str, Any]:
    """lm-eval's task objects by name, groups resolved.

    Raises:
        ValueError: a name that no folder has; lm-eval's own tasks need `include_defaults`.
    """
    folders = [TASK_FOLDER, *([task.include_path] if task.include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=task.include_defaults, metadata=dict(task.metadata) or None)
    unknown = [name for name in task.tasks if name not in manager.all_tasks]
    if unknown:
        mend = "" if task.include_defaults else "; for lm-eval's own set include_defaults: true"
        raise ValueError(f"no task {', '.join(unknown)} in {', '.join(Path(f).name for f in folders)}{mend}")
    return manager.load(list(task.tasks))["tasks"]


def run_harness(task: HarnessTask, lm: LongContextLM) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Run the tasks of one block.

    `evaluate` is called rather than `simple_evaluate`, which would reseed every generator of the training run.

    Returns:
        (metrics by task, with how many prompts were cut and how many samples were not scored for it; value of each sample by
        `task/metric`, for the guard).
    """
    tasks = load_tasks(task)
    for one in tasks.values():
        if task.num_fewshot is not None:
            one.set_config("num_fewshot", task.num_fewshot)
        one.set_fewshot_seed(1234)
    lm.truncations.clear()
    output = lm_eval.evaluate(
        lm=lm, task_dict=tasks, limit=task.limit, bootstrap_iters=0, log_samples=True, verbosity="WARNING"
    )
    results: dict[str, dict[str, Any]] = {}
    watched: dict[str, list[float]] = {}
    for name, scores in output["results"].items():
        results[name] = {k.removesuffix(",none"): v for k, v in scores.items() if k != "alias" and v != "N/A"}
        cut = [record for record in lm.truncations if record.task == name]
        results[name] |= {"cut": len(cut), "not_scored": len([record for record in cut if record.lost])}
        for sample in sorted(output["samples"].get(name, []), key=lambda s: s["doc_id"]):
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float):
                    watched.setdefault(f"{name}/{metric}", []).append(float(sample[metric]))
    return results, watched
