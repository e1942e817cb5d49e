"""The page of a study: verdicts first, then each measure with the paper's numbers beside ours, as HTML, Markdown, CSV and PNG.

Every number is formatted once, and the same text goes to the page and into the CSV.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_longctx.ablation.study import Measure, Study
from nemo_longctx.ablation.verdict import UNKNOWN, Effect, effect, verdict
from nemo_longctx.files import write_text
from nemo_longctx.report.html import Section, write_page
from nemo_longctx.report.plots import COLOURS, INK, new_figure, save

Found = Mapping[str, Mapping[str, NDArray[np.float64]]]  # measure -> arm -> [S, D]
Table = list[list[str]]
FINEST = 0.002  # of the axis of differences, whose table has four decimals


def claim_table(study: Study, found: Found, barred: Collection[str] = ()) -> Table:
    """One line a claim: the sentence, the arms, the effect with its interval, the verdict, which a barred probe cannot give."""
    table: Table = [["claim", "verdict", "difference (95 % interval)", "of", "where", "seeds", "documents"]]
    for claim in study.claims:
        arms = found.get(claim.measure, {})
        compared = f"{claim.first} − {claim.second}: {study.measures[claim.measure].text}"
        if claim.first not in arms or claim.second not in arms:
            table.append([claim.text, UNKNOWN, "not measured at this scale", compared, claim.where, "–", "–"])
            continue
        seen = effect(arms[claim.first], arms[claim.second])
        says = UNKNOWN if study.measures[claim.measure].probe in barred else verdict(claim, seen)
        row = [claim.text, says, str(seen), compared, claim.where, str(seen.seeds), str(seen.documents)]
        table.append(row)
    return table


def measure_table(measure: Measure, arms: Mapping[str, NDArray[np.float64]], reference: str) -> Table:
    """One line an arm: the mean, its difference from the reference arm with the interval, and the paper's number."""
    table: Table = [["arm", "mean", f"difference from {reference} (95 % interval)"]]
    for arm, values in arms.items():
        against = "–" if arm == reference else str(effect(values, arms[reference]))
        table.append([arm, number(float(values.mean())), against])
    if measure.paper:
        table[0].append(f"paper: {measure.paper_text}")
        for row in table[1:]:
            row.append(f"{measure.paper[row[0]]:g}" if row[0] in measure.paper else "–")
    return table


def number(value: float) -> str:
    """Four decimals; four digits of what is too large for them (operations)."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def write_study(
    directory: Path,
    study: Study,
    found: Found,
    *,
    scale: str,
    provenance: Mapping[str, Any],
    ended: str = "",
    barred: Mapping[str, str] | None = None,
    paths: Mapping[str, str] | None = None,
    more: Sequence[Section] = (),
) -> Path:
    """Write `index.html`, `README.md`, a CSV and a PNG a measure and `claims.csv`; returns the page.

    Args:
        found: measure -> arm -> values [S, D]; arms that a scale leaves out are missing.
        paths: where each measure lies at this scale, for the page; default, as the study says.
        more: sections after the measures.
        ended: why the study ended before its arms were run (the gate), as a sentence.
        barred: probe kind -> why no claim is judged by it (the gate), as a sentence.
    """
    directory.mkdir(parents=True, exist_ok=True)
    claims = claim_table(study, found, barred or {})
    write_table(directory / "claims.csv", claims)
    note = f"{study.paper}. Scale: {scale}. Differences are paired: arms of one seed share weights, stream and documents. "
    note += (
        "A verdict rests on a 95 % interval, so one in twenty of those that should say “cannot be told” says more: of the "
        f"{len(study.claims)} here, {0.05 * len(study.claims):.2g} on average."
    )
    if ended:
        note = f"{ended} {note}"
    elif barred:
        note = f"{' '.join(barred.values())} No claim is judged by {' or '.join(barred)}. {note}"
    sections = [Section(heading="What can be said", note=note, table=claims, said=True)]
    for name, measure in study.measures.items():
        arms = found.get(name, {})
        if not arms:
            continue
        table = measure_table(measure, arms, next(iter(arms)))
        write_table(directory / f"{name}.csv", table)
        figure = plot_effects(arms, directory / f"{name}.png", title=measure.text)
        note = f"Measured as {(paths or {}).get(name, measure.path)}."
        if measure.timed:
            note += " Told, not tested: what else the machine did is in it, and it is never twice the same."
        sections.append(
            Section(
                heading=measure.text,
                note=note,
                figures=[figure],
                table=table,
            )
        )
    sections += more
    made = json.dumps(provenance, indent=1, default=str)
    sections.append(Section(heading="What made this", code=made))
    write_text(directory / "README.md", _markdown(study, sections))
    return write_page(directory / "index.html", study.title, sections)


def plot_effects(arms: Mapping[str, NDArray[np.float64]], path: Path, *, title: str) -> Path:
    """Difference of each arm from the first with its interval; where there is but one arm or seed, each run's mean.

    What the table writes as nothing is drawn as nothing: no axis is narrower than `FINEST`.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(height=1.3 + 0.42 * len(arms))
    names = list(arms)
    reference = names[0]
    for place, arm in enumerate(names):
        colour = COLOURS[place % len(COLOURS)]
        seen = Effect(mean=0, low=0, high=0, seeds=0, documents=0) if arm == reference else effect(arms[arm], arms[reference])
        axes.plot([seen.mean], [place], "o", color=colour, markersize=6, zorder=3)
        if np.isfinite(seen.low) and arm != reference:
            axes.plot([seen.low, seen.high], [place, place], color=colour, linewidth=2.2, zorder=2)
        seeds = arms[arm].mean(axis=1) - arms[reference].mean(axis=1)
        axes.plot(seeds, [place] * len(seeds), "|", color=INK, markersize=7, alpha=0.5, zorder=2)
    axes.axvline(0, color="#777777", linewidth=1)
    low, high = axes.get_xlim()
    if high - low < FINEST:
        axes.set_xlim((low + high - FINEST) / 2, (low + high + FINEST) / 2)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}".replace("-", "−"))
    axes.set_yticks(range(len(names)), [f"{arm} ({number(float(arms[arm].mean()))})" for arm in names], fontsize=9)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=11, color=INK, loc="left", pad=10)
    axes.set_xlabel(f"difference from {reference}; bars: 95 %, ticks: single seeds", fontsize=9.5, color=INK)
    return save(figure, path)


def _markdown(study: Study, sections: Sequence[Section]) -> str:
    lines = [f"# {study.title}", ""]
    for section in sections:
        lines += [f"## {section.heading}", ""]
        if section.note:
            lines += [section.note, ""]
        lines += [f"![{Path(figure).stem}]({Path(figure).name})" for figure in section.figures]
        if section.figures:
            lines.append("")
        for number, row in enumerate(section.table):
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")
            if number == 0:
                lines.append("|" + " --- |" * len(row))
        if section.table:
            lines.append("")
        if section.code:
            lines += ["```", section.code, "```", ""]
    return "\n".join(lines)


def write_table(path: Path, table: Sequence[Sequence[object]]) -> None:
    """The CSV of a table, the header first, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
