"""What the finished runs of a study measured, from the files that every run leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_longctx.ablation.study import Measure, Run
from nemo_longctx.eval.results import SuiteResult
from nemo_longctx.report.evaluation import read_results
from nemo_longctx.report.training_log import read_training_log

Array = NDArray[np.float64]


def last_result(run: Run) -> SuiteResult | None:
    """The last evaluation of a run; None where there is none."""
    results = read_results(run.folder / "results" / "eval")
    return results[-1] if results else None


def value(measure: Measure, run: Run) -> Array:
    """A measure of one run, [D]: each document's value, or one.

    Raises:
        ValueError: the run did not measure it, named with what it has.
    """
    root, _, rest = measure.path.partition("/")
    if root == "training":
        return _training(rest, run)
    result = last_result(run)
    if result is None:
        raise ValueError(f"{run.name} has no evaluation yet, so {measure.path} is not known")
    return of_result(measure.path, result, run.name)


def of_result(path: str, result: SuiteResult, name: str) -> Array:
    """A measure's values in one evaluation, [D]."""
    root, _, rest = path.partition("/")
    if root == "watched" and rest in result.watched:
        return np.array(result.watched[rest], float)
    if root == "context":
        task, _, read = rest.rpartition("/")
        scores = result.context.get(task)
        if scores is not None and int(read) - scores.targets in scores.contexts:
            return np.array(scores.losses)[:, scores.contexts.index(int(read) - scores.targets)]
    if root == "gain" and rest in result.context:
        scores = result.context[rest]
        losses = np.array(scores.losses)
        return losses[:, scores.contexts.index(scores.short)] - losses[:, -1]
    if root in ("probes", "answers"):
        kind, _, length = rest.rpartition("/")
        rows = [row for row in result.probes if row.kind == kind and str(row.length) == length]
        found = [row.score if root == "probes" else row.answer_loss for row in rows]
        if found:
            return np.array([np.mean(found)])
    has = [*(f"watched/{n}" for n in result.watched), *(f"context/{n}" for n in result.context)]
    has += sorted({f"{root}/{row.kind}/{row.length}" for row in result.probes for root in ("answers", "probes")})
    failed = f"; failed: {result.errors}" if result.errors else ""
    raise ValueError(f"{name} did not measure {path}; it has {', '.join(has) or 'nothing'}{failed}")


def _training(what: str, run: Run) -> Array:
    if what == "flops":
        path = run.folder / "results" / "throughput.json"
        if not path.exists():
            raise ValueError(f"{run.name} has no throughput.json yet")
        return np.array([float(json.loads(path.read_text())["planned_total_flops"])])
    rows = [row for row in read_training_log(run.folder / "results" / "training.csv") if "loss" in row]
    if not rows:
        raise ValueError(f"{run.name} has no training.csv yet")
    if what == "loss":
        return np.array([np.mean([row["loss"] for row in rows[-max(1, len(rows) // 10) :]])])
    if what == "hours":
        tokens = [row["tokens"] for row in rows]
        steps = np.diff([0, *tokens])
        return np.array([sum(n / row["tokens_per_second"] for n, row in zip(steps, rows, strict=True)
                             if row.get("tokens_per_second")) / 3600])  # fmt: skip
    if what == "processor_hours":
        return np.array([sum(row.get("processor_seconds", 0) for row in rows) / 3600])
    has = "training/loss, training/hours, training/processor_hours and training/flops"
    raise ValueError(f"training/{what} is no measure; there are {has}")


def table(measure: Measure, runs: Sequence[Run], arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Array]:
    """arm -> [S, D] in the order of `seeds`, of arms that every seed measured on the same number of documents."""
    found = {}
    for arm in arms:
        mine = {run.seed: value(measure, run) for run in runs if run.arm == arm}
        if set(mine) == set(seeds) and len({len(v) for v in mine.values()}) == 1:
            found[arm] = np.stack([mine[seed] for seed in seeds])
    return found
