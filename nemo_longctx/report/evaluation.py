"""Results of evaluations as files: JSON, CSV, figures, and one page with all of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_longctx.eval import position, probes
from nemo_longctx.eval.suite import SuiteResult, as_record, from_record
from nemo_longctx.report.html import Section, write_page
from nemo_longctx.report.plots import plot_loss_by_position, plot_probes

RECORD = "results.json"


def read_results(directory: str | Path) -> list[SuiteResult]:
    """Results that `write_results` left in `directory`, in their order; none where there are none."""
    path = Path(directory) / RECORD
    if not path.exists():
        return []
    return [from_record(record) for record in json.loads(path.read_text(encoding="utf-8"))["results"]]


def write_results(
    directory: str | Path,
    results: Sequence[SuiteResult],
    *,
    provenance: Mapping[str, Any],
    marks: Sequence[tuple[float, str]] = (),
    title: str = "Long-context evaluation",
) -> Path:
    """Write everything that is known of some evaluations of one model; returns the page.

    Args:
        results: evaluations in order, say before, during and after an extension.
        provenance: what made them (config, versions, seed, data), kept in the JSON.
        marks: (position, name) verticals in the figures of loss by position.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / (RECORD + ".tmp")
    record = {"provenance": dict(provenance), "results": [as_record(result) for result in results]}
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(directory / RECORD)
    sections = [_summary(results)]
    for name in dict.fromkeys(name for result in results for name in result.position):
        rows = [row for result in results for row in result.position.get(name, [])]
        stem = "loss_by_" + name
        position.write_csv(directory / f"{stem}.csv", rows)
        figure = plot_loss_by_position(position.by_model(rows), directory / f"{stem}.png", marks=marks)
        sections.append(Section(heading=f"Loss by position ({name})", note="Bands: 95 % over documents.", figures=[figure]))
    cells = [row for result in results for row in result.probes]
    if cells:
        probes.write_csv(directory / "probes.csv", cells)
        figures = [plot_probes(cells, directory / "probes_score.png")]
        figures.append(
            plot_probes(cells, directory / "probes_answer_loss.png", value="answer_loss", title="Loss of the probes' answers")
        )
        sections.append(_probe_section(cells, figures))
    tasks = _task_table(results)
    if len(tasks) > 1:
        _write_table(directory / "tasks.csv", tasks)
        sections.append(Section(heading="Tasks", table=tasks))
    return write_page(directory / "index.html", title, sections)


def _summary(results: Sequence[SuiteResult]) -> Section:
    rows: list[list[object]] = [["model", "seconds", "failed", "skipped for time"]]
    for result in results:
        failed = "; ".join(f"{task}: {why}" for task, why in result.errors.items())
        rows.append([result.model, sum(result.seconds.values()), failed or "none", ", ".join(result.skipped) or "none"])
    return Section(heading="Evaluations", table=rows)


def _probe_section(cells: Sequence[probes.ProbeRow], figures: Sequence[Path]) -> Section:
    effective = probes.effective_length(cells)
    table: list[list[object]] = [["probe", "model", "effective context (tokens)", "not scored (did not fit)"]]
    for (model, kind), length in effective.items():
        skipped = sum(row.skipped for row in cells if (row.model, row.kind) == (model, kind))
        table.append([kind.replace("_", " "), model, length, skipped])
    note = "Effective context: the longest length up to which at least 90 % of the score at the shortest length is kept."
    return Section(heading="Probes", note=note, figures=figures, table=table)


def _task_table(results: Sequence[SuiteResult]) -> list[list[object]]:
    table: list[list[object]] = [["task", "metric", *(result.model for result in results)]]
    names = dict.fromkeys((task, key) for r in results for task, values in r.tasks.items() for key in values)
    for task, key in names:
        values = [result.tasks.get(task, {}).get(key, math.nan) for result in results]
        if all(isinstance(value, int | float) for value in values):
            table.append([task, key, *values])
    return table


def _write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
