"""Figures of a study's page beside its measures: raw score by distance, L(c), and curves that measures are points of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_longctx.ablation.measured import last_result
from nemo_longctx.ablation.page import write_table
from nemo_longctx.ablation.study import BASE, Run
from nemo_longctx.eval import context
from nemo_longctx.report.context import LAW_NOTE, with_interval
from nemo_longctx.report.html import Section
from nemo_longctx.report.plots import INK, flatten, line_styles, new_figure, plot_context_law, save, tokens_label
from nemo_longctx.report.training_log import read_training_log
from nemo_longctx.rope.figures import plot_decay
from nemo_longctx.rope.variants import Rope

GREY = "#777777"
POINTS = 40  # of a training curve
LOSS = "loss (nats per token)"
HEAD_DIM = 128  # Llama 2's, as in Figure 4


def decay_section(runs: Sequence[Run], directory: Path, *, short: int, distances: int) -> Section:
    """Raw score of each arm's encoding against distance (Xiong et al. 2023, Figure 4); `decay.png` and `decay.csv`.

    Args:
        runs: one an arm. short: the base's length, which factors are counted from. distances: tokens.
    """
    variants = {}
    for run in runs:
        request = run.recipe().rope_variant
        if request is not None:
            variants[run.arm] = request.complete(Rope(), seq_length=distances, trained=short, source="the base").variant
    figure, _ = plot_decay(variants, directory, head_dim=HEAD_DIM, rotary_dim=HEAD_DIM, distances=distances)
    note = (
        f"Computed, not measured: the score of a query and a key of ones (Figure 4), heads of {HEAD_DIM} as Llama 2's, to "
        f"{distances:,} tokens. A score that falls early or swings leaves little to tell far tokens by."
    )
    return Section(heading="Raw score against distance (Figure 4)", note=note, figures=[figure])


def law_section(arms: Mapping[str, Sequence[Run]], task: str, directory: Path) -> Section | None:
    """L(c) of each arm (Figure 1; `law.csv`), a document's losses averaged over seeds; None where no arm was measured."""
    table: list[list[object]] = [
        ["arm", "alpha (tokens)", "beta", "gamma (nats)", "documents", "p of a constant loss", "why not drawn"]
    ]
    laws, curves = {}, {}
    for arm, runs in arms.items():
        found = [result.context[task] for run in runs if (result := last_result(run)) is not None and task in result.context]
        if not found or len(found) < len(runs):
            continue
        losses_DC = np.mean([np.array(scores.losses) for scores in found], axis=0)
        c = np.array(found[0].contexts) + (found[0].targets - 1) / 2
        test = context.judge_law(c, losses_DC)
        p_value = "–" if np.isnan(test.p_value) else f"{test.p_value:.3g}"
        if test.law is None:
            table.append([arm, "–", "–", "–", str(len(losses_DC)), p_value, test.why])
            continue
        laws[arm], curves[arm] = test.law, {"context": c, "loss": losses_DC.mean(axis=0)}
        values = [with_interval(test.law, key) for key in ("alpha", "beta", "gamma")]
        table.append([arm, *values, str(len(losses_DC)), p_value, "–"])
    if len(table) == 1:
        return None
    write_table(directory / "law.csv", table)
    title = "Loss against context by size (Figure 1)"
    figures = [plot_context_law(curves, laws, directory / "law.png", title=title)] if laws else []
    return Section(heading=title, note=f"{LAW_NOTE} A document's losses are averaged over seeds.", figures=figures, table=table)


def training_section(arms: Mapping[str, Sequence[Run]], directory: Path) -> Section | None:
    """Loss while training against tokens (Figures 5a and 6), each point the mean of a fortieth of the run and of all seeds."""
    curves = {}
    for arm, runs in arms.items():
        logs = [[(r["tokens"], r["loss"]) for r in read_training_log(run.folder / "results" / "training.csv") if "loss" in r]
                for run in runs]  # fmt: skip
        if not logs or min(map(len, logs)) < 1:
            continue
        rows_SNC = np.array([log[: min(map(len, logs))] for log in logs])
        parts = np.array_split(rows_SNC, min(POINTS, rows_SNC.shape[1]), axis=1)
        curves[arm] = np.array([[part[0, -1, 0], part[..., 1].mean()] for part in parts])
    note = "The mean of each fortieth of a run, over seeds. Losses of windows of different length are no comparison of models."
    return _curves(curves, directory / "training_curve", heading="Loss while training", x="tokens read", y=LOSS, note=note)


def context_section(arms: Mapping[str, Sequence[Run]], task: str, directory: Path) -> Section | None:
    """Loss on fixed targets against the tokens read (Table 5, Figure 9), over documents and seeds."""
    curves = {}
    for arm, runs in arms.items():
        found = [result.context[task] for run in runs if (result := last_result(run)) is not None and task in result.context]
        if found and len(found) == len(runs):
            read = np.array(found[0].contexts) + found[0].targets
            curves[arm] = np.stack([read, np.mean([np.mean(scores.losses, axis=0) for scores in found], axis=0)], axis=1)
    note = "The same last tokens of the same held-out documents, read with more and more of what stands before them."
    x = "tokens read, the targets among them"
    return _curves(curves, directory / "context_curve", heading="Loss against context", x=x, y=LOSS, note=note, log=True)


def retrieval_section(arms: Mapping[str, Sequence[Run]], kind: str, directory: Path) -> Section | None:
    """Score of a probe by the length of its text (Figure 5b), over depths, samples and seeds."""
    curves = {}
    for arm, runs in arms.items():
        by_length: dict[int, list[float]] = {}
        for run in runs:
            result = last_result(run)
            for row in result.probes if result is not None else ():
                if row.kind == kind and np.isfinite(row.score):
                    by_length.setdefault(row.length, []).append(row.score)
        if by_length:
            curves[arm] = np.array([[length, np.mean(scores)] for length, scores in sorted(by_length.items())])
    name = kind.replace("_", " ")
    note = "1 is all right, 0 nothing. Depths, samples and seeds are averaged."
    heading = f"{name[0].upper()}{name[1:]} by length"
    return _curves(curves, directory / f"{kind}_curve", heading=heading, x="tokens", y="score", note=note, log=True)


def _curves(
    curves: Mapping[str, NDArray[np.float64]], path: Path, *, heading: str, x: str, y: str, note: str, log: bool = False
) -> Section | None:
    """Lines of (x, y), one an arm, as PNG and CSV of the path's name; None where there is none."""
    if not curves:
        return None
    places = sorted({float(place) for points in curves.values() for place in points[:, 0]})
    table: list[list[str]] = [["arm", *(f"{place:,.0f}" for place in places)]]
    for arm, points in curves.items():
        at = {float(place): f"{value:.4f}" for place, value in points}
        table.append([arm, *(at.get(place, "–") for place in places)])
    write_table(path.with_suffix(".csv"), table)
    figure, axes = new_figure()
    for (colour, dashes), (arm, points) in zip(line_styles(len(curves)), curves.items(), strict=True):
        if arm == BASE:  # no arm: what they came from
            colour, dashes = GREY, (0, (1, 2))
        axes.plot(*points.T, marker="o", color=colour, linestyle=dashes, markersize=3, linewidth=1.5, label=arm)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(places)
    else:
        axes.set_xlim(left=0)
        axes.set_xticks(axes.get_xticks())
    axes.set_xticklabels([tokens_label(place) for place in axes.get_xticks()])
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    if y == LOSS:
        flatten(axes)
    figure.legend(frameon=False, fontsize=9, loc="outside upper left", ncols=4)  # within the panel it would lie on lines
    return Section(heading=heading, note=note, figures=[save(figure, path.with_suffix(".png"))], table=table if log else ())
