"""Figures of the analysis as PNG, each with its data as CSV beside it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_longctx.report.plots import COLOURS, DASHES, FAINT, INK, MARK, new_figure, save, tokens_label
from nemo_longctx.rope.analysis import Advice, helix, raw_scores, wavelengths
from nemo_longctx.rope.base import RopeVariant

DRAWN = 4096  # points of a curve that are drawn: more than the panel has dots; the CSV has them all


def _write_csv(path: Path, columns: Mapping[str, npt.NDArray[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(c.tolist() for c in columns.values()), strict=True))
    return path


def plot_decay(
    variants: Mapping[str, RopeVariant], folder: Path, *, head_dim: int, rotary_dim: int, distances: int
) -> list[Path]:
    """Raw score of all-ones q and k against distance, one line a variant (Xiong et al. 2023, Figure 4)."""
    scores = {name: raw_scores(v, distances, head_dim=head_dim, rotary_dim=rotary_dim) for name, v in variants.items()}
    figure, axes = new_figure()
    shown = np.unique(np.linspace(0, distances - 1, DRAWN).astype(int))
    for i, (name, score) in enumerate(scores.items()):
        axes.plot(shown, score[shown], color=COLOURS[i % len(COLOURS)], linewidth=1.1, label=name)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("distance (tokens)")
    axes.set_ylabel("raw attention score")
    axes.set_title(f"Decay of the score of all-ones q and k, head size {head_dim}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5)
    columns = {"distance": np.arange(distances), **scores}
    return [save(figure, folder / "decay.png"), _write_csv(folder / "decay.csv", columns)]


def plot_wavelengths(variants: Mapping[str, RopeVariant], folder: Path, *, rotary_dim: int, context: int) -> list[Path]:
    """Tokens a full turn of each pair takes, with the context as a line: pairs above it never turn once."""
    figure, axes = new_figure()
    columns: dict[str, npt.NDArray[Any]] = {"pair": np.arange(rotary_dim // 2)}
    for i, (name, variant) in enumerate(variants.items()):
        columns[f"{name}_tokens_a_turn"] = wave = wavelengths(variant, rotary_dim, context)
        columns[f"{name}_turns_in_context"] = context / wave
        (line,) = axes.plot(columns["pair"], wave, color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=name)
        line.set_linestyle(DASHES[i % len(DASHES)])
    axes.axhline(context, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(f"context {tokens_label(context)}", (0, context), xytext=(2, 3), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("pair of dimensions")
    axes.set_ylabel("tokens a turn")
    axes.set_title("Wavelengths", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5)
    return [save(figure, folder / "wavelengths.png"), _write_csv(folder / "wavelengths.csv", columns)]


def plot_helices(
    variants: Mapping[str, RopeVariant], folder: Path, *, rotary_dim: int, pair: int, positions: int
) -> list[Path]:
    """One pair's images of neighbouring positions along their helix (Xiong et al. 2023, Figure 8)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * len(variants), 3.6), dpi=150, layout="constrained")
    columns: dict[str, npt.NDArray[Any]] = {"position": np.arange(positions)}
    fine = np.linspace(0, positions - 1, 40 * positions)
    for i, (name, variant) in enumerate(variants.items()):
        axes = figure.add_subplot(1, len(variants), i + 1, projection="3d")
        axes.plot(*helix(variant, rotary_dim, pair, fine), fine, color="#BBBBBB", linewidth=0.7)
        x, y = helix(variant, rotary_dim, pair, np.arange(positions, dtype=np.float64))
        columns[f"{name}_cos"], columns[f"{name}_sin"] = x, y
        axes.plot(x, y, np.arange(positions), "o", color=COLOURS[i % len(COLOURS)], markersize=2.5)
        axes.set(xlim=(-1, 1), ylim=(-1, 1), xticks=(-1, 0, 1), yticks=(-1, 0, 1))  # one scale, else PI seems to turn
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=6, pad=-2)
    figure.suptitle(f"Pair {pair} at positions 0 to {positions - 1}", fontsize=10)
    return [save(figure, folder / "helices.png"), _write_csv(folder / "helices.csv", columns)]


def _label(row: Advice, rows: Sequence[Advice]) -> str:
    """The variant's name, with its base where another row has the name too."""
    name = row.variant["variant"]
    twice = sum(other.variant["variant"] == name for other in rows) > 1
    return f"{name} {row.variant['base']:,.0f}" if twice else name


def plot_advice(rows: Sequence[Advice], path: Path, *, target: int) -> Path:
    """One line a variant: how far its score stays above a random key's, and how finely it tells neighbours apart."""
    figure, axes = new_figure(width=7.6, height=1.2 + 0.34 * len(rows))
    axes.remove()
    reach_axes, grain_axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2), gridspec_kw={"wspace": 0.1})
    reaches = [target if row.reaches is None else row.reaches for row in rows]
    colours = [COLOURS[0] if row.reaches is None else MARK for row in rows]
    words = ["to the target" if row.reaches is None else f"{row.reaches:,}" for row in rows]
    grains = [row.granularity for row in rows]
    for panel, values, texts in ((reach_axes, reaches, words), (grain_axes, grains, [f"{grain:.3f}" for grain in grains])):
        bars = panel.barh(range(len(rows)), values, color=colours, height=0.6)
        panel.bar_label(bars, texts, padding=4, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True, axis="x", color=FAINT, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8.5)
    reach_axes.set_yticks(range(len(rows)), [_label(row, rows) for row in rows])
    reach_axes.invert_yaxis()
    reach_axes.axvline(target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    reach_axes.set_xscale("log", base=2)
    reach_axes.set_xlim(min(reaches) / 4, target * 4)
    reach_axes.xaxis.set_major_formatter(lambda value, _: tokens_label(round(value)))
    reach_axes.set_xlabel("first distance where a like key\nscores below a random one (tokens)", fontsize=9)
    grain_axes.set_xlim(0, 1.25 * max(grains))
    grain_axes.set_xlabel("granularity C", fontsize=9)
    reach_axes.set_title(f"Variants at {tokens_label(target)} tokens", loc="left", fontsize=11)
    return save(figure, path)
