"""Results of evaluations as files: JSON, CSV, figures, and one page with all of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.eval import context, position, probe_scores, ruler
from nemo_longctx.eval.guard import GuardConfig, judge, seen_percent
from nemo_longctx.eval.results import SuiteResult, as_record, finite, from_record
from nemo_longctx.eval.truncation import TruncationRecord
from nemo_longctx.report.context import LAW_COLUMNS, LAW_NOTE, LINES, context_sections, spread, with_interval
from nemo_longctx.report.html import Section, write_page
from nemo_longctx.report.plots import plot_context_law, plot_loss_by_position, tokens_label
from nemo_longctx.report.probes import probe_sections, ruler_length, title_of
from nemo_longctx.report.training_log import write_json

RECORD = "results.json"
REPLICATES = 300  # of the bootstrap over documents; every evaluation draws the page anew


POSITION_SHOWS = (
    "How the loss runs through a long window. Each position holds other text, so a fall may be the text's and not the "
    "context's: compare models at one position here, and contexts on fixed targets."
)


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
    guard: GuardConfig | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write everything that is known of some evaluations, of one model in time or of several; returns the page.

    Args:
        results: evaluations in order, say before, during and after an extension.
        provenance: what made them (config, versions, seed, data), kept in the JSON and at the foot of the page.
        marks: (position, name) verticals in the figures of loss by position.
        guard: what the run is watched by; None: its defaults.
        notes: what has to be known to read the numbers, a sentence each.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    earlier = _files_of(directory)
    record = {"provenance": dict(provenance), "results": [as_record(result) for result in results]}
    write_json(directory / RECORD, finite(record | {"files": sorted(earlier)}))
    sections = [_summary(results, notes)]
    files: set[str] = set()
    for name in dict.fromkeys(name for result in results for name in result.position):
        sections += _position_sections(directory, name, results, marks)
        files.add(f"loss_by_{name}.csv")
    for name in dict.fromkeys(name for result in results for name in result.context):
        sections += context_sections(directory, name, results, marks)
        files |= {f"loss_by_{name}.csv", f"gain_by_{name}.csv"}
    cells = [row for result in results for row in result.probes]
    if cells:
        sections += probe_sections(directory, cells)
        files.add("probes.csv")
    tasks = _task_table(results)
    if len(tasks) > 1:
        _write_table(directory / "tasks.csv", tasks)
        files.add("tasks.csv")
        note = (
            "“cut” counts samples whose prompt was shortened (truncations.csv), “not_scored” those that lost what is asked. A "
            "score's 95 % interval is about twice its “_stderr” to both sides, were the samples independent of each other."
        )
        sections.append(Section(heading="Tasks", note=note, table=tasks))
    cuts = [[r.model, *astuple(cut)[:-1], " ".join(cut.lost)] for r in results for cut in r.truncations]
    if cuts:
        names: list[object] = [field.name for field in fields(TruncationRecord)]
        _write_table(directory / "truncations.csv", [["model", *names], *cuts])
        files.add("truncations.csv")
    changes = _change_table(results, guard or GuardConfig())
    if len(changes) > 1:
        note = (
            f"The same documents and samples, now and at {results[0].model}: mean of the paired differences and its standard "
            "error; p by sign flips, two-sided. A rise of a loss and a fall of a score are losses of ability. Seen: the "
            "chance that a change of what is allowed would have raised an alarm at that look."
        )
        sections.append(Section(heading="Short-context guard", note=note, table=changes))
    sections.append(Section(heading="What made this", code=json.dumps(provenance, indent=1, default=str)))
    files |= {Path(figure).name for section in sections for figure in section.figures}
    for stale in earlier - files:  # of other tasks than these: beside the new ones they would pass for part of them
        (directory / stale).unlink(missing_ok=True)
    write_json(directory / RECORD, finite(record | {"files": sorted(files)}))
    return write_page(directory / "index.html", title, sections)


def _files_of(directory: Path) -> set[str]:
    """Names of the tables and figures that an earlier evaluation left in `directory`, by its own record."""
    try:
        files = json.loads((directory / RECORD).read_text(encoding="utf-8")).get("files", [])
    except (OSError, ValueError, AttributeError):
        return set()
    return {name for name in map(str, files) if Path(name).name == name and Path(name).suffix in (".csv", ".png")}


def _summary(results: Sequence[SuiteResult], notes: Sequence[str] = ()) -> Section:
    """One line a model: what it can do in one glance, and what went wrong."""
    names = list(dict.fromkeys(name for result in results for name in result.position))
    cells = [row for result in results for row in result.probes]
    kinds = [kind for kind in dict.fromkeys(row.kind for row in cells) if kind not in ruler.KINDS]
    ruled = any(row.kind in ruler.KINDS for row in cells)
    head: list[object] = ["model", *(f"loss, {_label(n)}" for n in names)]
    fixed = list(dict.fromkeys(name for result in results for name in result.context))
    head += [f"gain of {_label(n)} on fixed targets" for n in fixed]
    head += [f"{title_of(kind)}: effective length" for kind in kinds] + ["RULER: effective length"] * ruled
    rows: list[list[object]] = [[*head, "seconds", "not measured"]]
    for result in results:
        effective, weak = probe_scores.effective_length(result.probes), probe_scores.too_weak(result.probes)
        longest = probe_scores.longest_asked(result.probes)
        missing = [f"{task}: {why}" for task, why in result.errors.items()]
        missing += [f"{task}: no time" for task in result.skipped]
        losses: list[object] = [_loss(result.position.get(name, ())) for name in names]
        lengths: list[object] = [probe_scores.told_length((result.model, kind), effective, weak, longest) for kind in kinds]
        lengths += [ruler_length(result.probes)] * ruled
        gains: list[object] = [str(context.gain(result.context[n])) if n in result.context else "–" for n in fixed]
        rows.append([result.model, *losses, *gains, *lengths, f"{sum(result.seconds.values()):.1f}", "; ".join(missing) or "–"])
    notes = [*notes, *(f"Loss, {_label(name)}: {said}." for name in names if (said := _short_documents(results, name)))]
    note = (
        "Loss in nats per token. Effective length: the longest up to which each length keeps 90 % of the score at the shortest "
        f"one, and {probe_scores.FLOOR} at least; a model that scores less at the shortest is too weak to tell."
    )
    return Section(heading="In one glance", note=" ".join([note, *notes]), table=rows)


def _label(name: str) -> str:
    """`position_books_4096`: `4k tokens`."""
    return f"{tokens_label(int(name.rpartition('_')[2]))} tokens"


def _short_documents(results: Sequence[SuiteResult], name: str) -> str:
    """What has to be known where not every document fills the window: the far positions are of fewer documents."""
    told = {}
    for result in (result for result in results if name in result.documents):
        found = result.documents[name]
        read, whole = np.sum(found["counts"], axis=1), found["edges"][-1]
        if (short := int((read < whole).sum())) or len(read) < 2:
            count = f"{short:,} of {len(read):,} documents end before {whole:,} tokens, the longest has {int(read.max()):,}"
            far = f"{count}; far positions are of fewer documents than near ones"
            told[result.model] = far if short else "it is one document's"
    said = list(dict.fromkeys(told.values()))
    return said[0] if len(said) == 1 else "; ".join(f"{model}: {one}" for model, one in told.items())


def _loss(rows: Sequence[position.PositionRow]) -> float:
    tokens = sum(row.tokens for row in rows)
    return sum(row.loss * row.tokens for row in rows) / tokens if tokens else math.nan


def _position_sections(
    directory: Path, name: str, results: Sequence[SuiteResult], marks: Sequence[tuple[float, str]]
) -> list[Section]:
    """Loss by position of one task, and L(c) where it falls."""
    rows = [row for result in results for row in result.position.get(name, [])]
    position.write_csv(directory / f"loss_by_{name}.csv", rows)
    length = tokens_label(max(row.end for row in rows))
    by_model = position.by_model(rows)
    drawn = spread(list(by_model), LINES)
    title = f"Loss by position, {length} tokens"
    figure = plot_loss_by_position(
        {model: by_model[model] for model in drawn}, directory / f"loss_by_{name}.png", marks=marks, title=title
    )
    note = POSITION_SHOWS + " " + _bands(len(drawn), len(by_model))
    if said := _short_documents(results, name):
        note += f" {said[0].upper()}{said[1:]}."
    laws, curves, table = {}, {}, [[*LAW_COLUMNS]]
    refused: dict[str, list[str]] = {}  # why -> models
    for result in (result for result in results if result.model in drawn and name in result.documents):
        contexts, losses = _by_document(result.documents[name])
        test = context.judge_law(contexts, losses, replicates=REPLICATES)
        if test.law is None:
            table.append([result.model, f"not drawn: {test.why}", "", "", str(len(losses))])
            refused.setdefault(test.why, []).append(result.model)
            continue
        laws[result.model], curves[result.model] = test.law, {"context": contexts, "loss": losses.mean(0)}
        table.append([result.model, *(with_interval(test.law, key) for key in ("alpha", "beta", "gamma")), str(len(losses))])
    if refused and not laws:
        named = [why if len(refused) == 1 else f"{_some(models)}: {why}" for why, models in refused.items()]
        note += f" No law L(c) is drawn: {'; '.join(named)}."
    sections = [Section(heading=title, note=note, figures=[figure])]
    if laws:
        title = f"Context scaling law, to {length} tokens"
        figure = plot_context_law(curves, laws, directory / f"context_law_{name}.png", title=title)
        sections.append(Section(heading=title, note=LAW_NOTE, figures=[figure], table=table))
    return sections


def _some(models: Sequence[str]) -> str:
    more = f" and {len(models) - 3} more" if len(models) > 3 else ""
    return f"{', '.join(models[:3])}{more}"


def _bands(drawn: int, known: int) -> str:
    return "Bands: 95 % over documents." + (f" {drawn} of {known} evaluations; the CSV has all." if drawn < known else "")


def _by_document(documents: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Contexts [N] and mean losses [D, N] of the bins and the documents that hold them all."""
    losses = position.PositionLosses(documents["edges"])
    losses.add_sums(documents["sums"], documents["counts"])
    sums, counts = losses.by_document()
    reached = counts.sum(0) > 0
    whole = (counts[:, reached] > 0).all(1)
    return losses.context[reached], sums[whole][:, reached] / counts[whole][:, reached]


def _task_table(results: Sequence[SuiteResult]) -> list[list[object]]:
    table: list[list[object]] = [["task", "metric", *(result.model for result in results)]]
    names = dict.fromkeys((task, key) for r in results for task, values in r.tasks.items() for key in values)
    for task, key in names:
        values = [result.tasks.get(task, {}).get(key, math.nan) for result in results]
        if all(isinstance(value, int | float) or value == "no samples" for value in values):
            table.append([task, key, *values])
    return table


def _change_table(results: Sequence[SuiteResult], guard: GuardConfig) -> list[list[object]]:
    """Paired changes of what is watched, against the first evaluation."""
    table: list[list[object]] = [["measurement", "model", "change", "standard error", "p", "pairs", "allowed", "seen", "alarm"]]
    for look, result in enumerate(results[1:], start=1):
        verdict = judge(results[0].watched, result.watched, guard, look=look)
        for name, change in verdict.changes.items():
            error = "–" if math.isnan(change.standard_error) else f"{change.standard_error:.4f}"
            p_value = f"{change.p_value:.4f}" if change.p_value >= 5e-5 else "below 0.0001"
            row = [f"{change.mean:+.4f}", error, p_value, change.pairs]
            none = "–, too few pairs" if name in verdict.blind else "–"
            alarm = "yes" if any(text.startswith(f"{name} ") for text in verdict.alarms) else none
            table.append([name, result.model, *row, guard.limit(name), seen_percent(verdict.power[name]), alarm])
        for name, why in verdict.unpaired.items():
            table.append([name, result.model, f"not compared: {why}", "", "", 0, guard.limit(name), "–", "–"])
    return table


def _write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
