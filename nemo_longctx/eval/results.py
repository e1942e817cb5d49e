"""What an evaluation found, as one value that every rank holds and that JSON keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nemo_longctx.eval import context, position, probe_scores, probes, ruler
from nemo_longctx.eval.truncation import TruncationRecord


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What one evaluation found.

    Args:
        model: label of the model, say "step 200".
        position: rows by task name. documents: by task name the same losses of each document, {"edges": [bins + 1], "sums" and
            "counts": [documents][bins]}, for a bootstrap over documents.
        context: by task name the losses on fixed targets against the context before them.
        probes: cells. tasks: lm-eval's `results` by task.
        truncations: every prompt that was cut.
        watched: measurement -> value of each document or sample, for the guard.
        errors: task -> what went wrong, on whichever rank. skipped: tasks for which the time did not suffice.
        seconds: by task.
    """

    model: str
    position: dict[str, list[position.PositionRow]]
    documents: dict[str, dict[str, list]]
    context: dict[str, context.ContextScores]
    probes: list[probe_scores.ProbeRow]
    tasks: dict[str, dict[str, Any]]
    truncations: list[TruncationRecord]
    watched: dict[str, list[float]]
    errors: dict[str, str]
    skipped: list[str]
    seconds: dict[str, float]

    def add(self, found: SuiteResult) -> None:
        """Take in what one task found."""
        self.position.update(found.position)
        self.documents.update(found.documents)
        self.context.update(found.context)
        self.probes.extend(found.probes)
        self.tasks.update(found.tasks)
        self.truncations.extend(found.truncations)
        self.watched.update(found.watched)

    def scalars(self) -> dict[str, float]:
        """One number a measurement, for a logger."""
        found = {f"{name}/loss": _mean_loss(rows) for name, rows in self.position.items()}
        for name, scores in self.context.items():
            for line in context.rows(scores, self.model):
                found[f"{name}/loss_at_{line.context}"] = line.loss
            found[f"{name}/gain"] = context.gain(scores).mean
        for row in self.probes:
            if row.samples:
                cell = f"{row.kind}/{row.length}" + ("" if row.kind in probes.WITHOUT_DEPTH else f"/{row.depth:.2f}")
                found |= {f"{cell}/score": row.score, f"{cell}/answer_loss": row.answer_loss}
        weak = probe_scores.too_weak(self.probes)
        for key, length in probe_scores.effective_length(self.probes).items():
            if key not in weak:  # a 0 would pass for a length
                found[f"{key[1]}/effective_length"] = length
        cells = [(row.kind, row.length, row.score) for row in self.probes]
        means = ruler.averages(cells)
        found |= {f"ruler/{length}/average": mean for length, mean in means.items()}
        if means:
            found["ruler/tasks"] = ruler.tasks_scored(cells)
            found["ruler/effective_length"] = ruler.effective_length(means, ruler.lengths(cells))
        for task, values in self.tasks.items():
            found |= {f"{task}/{key}": v for key, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return {key: float(value) for key, value in found.items()}


def blank_result(model: str) -> SuiteResult:
    return SuiteResult(
        model=model,
        position={},
        documents={},
        context={},
        probes=[],
        tasks={},
        truncations=[],
        watched={},
        errors={},
        skipped=[],
        seconds={},
    )


def _mean_loss(rows: Sequence[position.PositionRow]) -> float:
    tokens = sum(row.tokens for row in rows)
    return sum(row.loss * row.tokens for row in rows) / tokens if tokens else math.nan


def as_record(result: SuiteResult) -> dict[str, Any]:
    """JSON form of a result; numbers that JSON has no word for (NaN: not scored, infinity) are null."""
    return finite(json.loads(json.dumps(asdict(result), default=str)))


def finite(value: Any) -> Any:
    """`value` with null in place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """The reverse of `finite` where every null was a number: NaN."""
    if isinstance(value, Mapping):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return math.nan if value is None else value


def from_record(record: Mapping[str, Any]) -> SuiteResult:
    """A result from its JSON form."""
    numbers = {name: _numbers(record[name]) for name in ("position", "documents", "probes", "tasks", "watched", "seconds")}
    made = {
        "position": {name: [position.PositionRow(**row) for row in rows] for name, rows in numbers["position"].items()},
        "context": {name: context.ContextScores(**one) for name, one in record.get("context", {}).items()},
        "probes": [probe_scores.ProbeRow(**row) for row in numbers["probes"]],
        "truncations": [TruncationRecord(**{**cut, "lost": tuple(cut["lost"])}) for cut in record["truncations"]],
    }
    return replace(blank_result(""), **{**record, **numbers, **made})
