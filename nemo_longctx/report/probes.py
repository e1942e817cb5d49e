"""Probes on the page: figures, effective lengths, RULER's table, and why a cell is empty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_longctx.eval import probe_scores, ruler
from nemo_longctx.report.context import spread
from nemo_longctx.report.html import Section
from nemo_longctx.report.plots import plot_probes, tokens_label

PANELS = 4  # evaluations in one figure of probes
Rows = Sequence[probe_scores.ProbeRow]


def title_of(kind: str) -> str:
    return kind.replace("_", " ")


def probe_sections(directory: Path, cells: Rows) -> list[Section]:
    """Of all evaluations: probes.csv, the figures, and a section each for probes, RULER and what is empty."""
    probe_scores.write_csv(directory / "probes.csv", cells)
    sections = [_overview(directory, cells)]
    if any(row.kind in ruler.KINDS for row in cells):
        sections.append(_ruler(cells))
    if empty := _empty(cells):
        note = "No score was made of these, and no average holds them."
        head: list[list[object]] = [["probe", "length (tokens)", "model", "why"]]
        sections.append(Section(heading="Probes that were not measured", note=note, table=head + empty))
    return sections


def _overview(directory: Path, cells: Rows) -> Section:
    models = list(dict.fromkeys(row.model for row in cells))
    shown = spread(models, PANELS)
    drawn = _drawn([row for row in cells if row.model in shown])
    loss = "Probes: loss of the answer (nats per token)"
    figures: list[Path] = []
    if drawn:
        figures = [
            plot_probes(drawn, directory / "probes_score.png", title="Probes: score of the reply"),
            plot_probes(drawn, directory / "probes_answer_loss.png", value="answer_loss", title=loss),
        ]
    table: list[list[object]] = [["probe", "model", "effective length (tokens)", "samples", "did not fit, not scored"]]
    effective, weak = probe_scores.effective_length(cells), probe_scores.too_weak(cells)
    longest = probe_scores.longest_asked(cells)
    for model, kind in (key for key in effective if key[1] not in ruler.KINDS):  # those have a table of their own
        length = probe_scores.told_length((model, kind), effective, weak, longest)
        mine = [row for row in cells if (row.model, row.kind) == (model, kind)]
        table.append([title_of(kind), model, length, sum(r.samples for r in mine), sum(r.skipped for r in mine)])
    note = (
        "Score: ROUGE-L of the first sentence, or the share of hidden answers in the reply; suites by their own rules. The "
        "loss of the answer shows progress long before a model can say it. No probe is ever cut."
    )
    if len(shown) < len(models):
        note += f" {len(shown)} of {len(models)} evaluations are drawn; the CSV has all."
    return Section(heading="Probes", note=note, figures=figures, table=table)


def _drawn(cells: Rows) -> list[probe_scores.ProbeRow]:
    """The cells that figures show: of kinds that were scored at all, and of RULER the mean over its tasks."""
    scored = {row.kind for row in cells if row.samples}
    drawn = [row for row in cells if row.kind in scored and row.kind not in ruler.KINDS]
    for model in dict.fromkeys(row.model for row in cells if row.kind in ruler.KINDS):
        mine = [row for row in cells if row.model == model and row.kind in ruler.KINDS]
        for length, mean in _means(mine)[1].items():
            here = [row for row in mine if row.length == length and row.samples]
            drawn.append(
                replace(
                    here[0],
                    kind=f"RULER, mean of {len(here)} tasks",
                    score=mean,
                    answer_loss=sum(row.answer_loss for row in here) / len(here),
                )
            )
    return drawn


def _means(cells: Rows) -> tuple[list[tuple[str, int, float]], dict[int, float]]:
    triples = [(row.kind, row.length, row.score) for row in cells]
    return triples, ruler.averages(triples)


def ruler_length(cells: Rows) -> str:
    """What the page says of one model: its effective length by RULER's rule, and over how many tasks."""
    triples, means = _means(cells)
    if not means:
        return "no average"
    length = ruler.effective_length(means, ruler.lengths(triples))
    first = min(ruler.lengths(triples))
    tasks = ruler.tasks_scored(triples)
    told = f"below {first:,}"
    if length:
        found = probe_scores.at_least(length, max(ruler.lengths(triples)))
        told = found if isinstance(found, str) else f"{found:,}"
    return told + ("" if tasks == len(ruler.KINDS) else f" ({tasks} of {len(ruler.KINDS)} tasks)")


def _ruler(cells: Rows) -> Section:
    """Tasks and their average at each length, in percent as RULER tells them."""
    ruled = [row for row in cells if row.kind in ruler.KINDS]
    lengths = sorted({row.length for row in ruled})
    table: list[list[object]] = [["model", "task", *(tokens_label(length) for length in lengths)]]
    for model in dict.fromkeys(row.model for row in ruled):
        mine = [row for row in ruled if row.model == model]
        _, means = _means(mine)
        for kind in dict.fromkeys(row.kind for row in mine):
            scores = {row.length: row.score for row in mine if row.kind == kind}
            table.append([model, kind.removeprefix(ruler.PREFIX), *(_percent(scores.get(n, math.nan)) for n in lengths)])
        table.append([model, "average", *(_percent(means.get(n, math.nan)) for n in lengths)])
        at = {n: [(row.score, row.samples) for row in mine if row.length == n and row.samples] for n in means}
        errors = {n: ruler.largest_error(some) for n, some in at.items()}
        table.append([model, "its standard error, at most", *(_percent(errors.get(n, math.nan)) for n in lengths)])
        table.append([model, "effective length", ruler_length(mine), *[""] * (len(lengths) - 1)])
    note = (
        f"RULER's {len(ruler.KINDS)} tasks, in percent, and their mean. A length at which a task was not scored has no mean. "
        f"Effective length: the longest up to which every mean reaches {100 * ruler.THRESHOLD:.1f} % (Llama 2 7B's at 4K). "
        f"{_samples(ruled)} samples a task and length, of RULER's own 500: a mean nearer to that than two standard errors does "
        "not tell on which side of it the model is."
    )
    return Section(heading="RULER", note=note, table=table)


def _samples(cells: Rows) -> str:
    counts = sorted({row.samples for row in cells if row.samples})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0] if counts else 0)


def _percent(score: float) -> str:
    return "–" if math.isnan(score) else f"{100 * score:.1f}"


def _empty(cells: Rows) -> list[list[object]]:
    """A line for each probe and length without a score, with the reason."""
    seen: dict[tuple[str, int, str], str] = {}
    for row in cells:
        if not row.samples:
            seen.setdefault((row.kind, row.length, row.model), row.reason or "it is longer than the model reads")
    return [[title_of(kind), length, model, why] for (kind, length, model), why in seen.items()]
