"""Figures as PNG. Each takes the rows that its CSV holds, so that picture and data never differ.

Figures are drawn through matplotlib's object interface, without pyplot: a plot made in the middle of a training run leaves
no global state (backend, current figure, rcParams) behind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.intervals import half_width
from nemo_longctx.report.training_log import SET_LOSS, points_of, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nemo_longctx.eval.context import ContextRow
    from nemo_longctx.eval.position import PositionRow
    from nemo_longctx.eval.probe_scores import ProbeRow
    from nemo_longctx.eval.scaling import ContextLaw

# Okabe and Ito's colours (2008): told apart by colour-blind readers and on a grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
INK, FAINT, MARK = "#222222", "#D9D9D9", "#777777"
PROBE_UNITS = {"score": "score (1 is all right)", "answer_loss": "loss (nats per token)"}
LEAST_NATS = 0.1  # that a panel of losses spans: a line that is flat must look flat
Dash = tuple[float, Sequence[float]]
DASHES: tuple[Dash, ...] = ((0, ()), (0, (5, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))


def new_figure(width: float = 7.2, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure of one panel in the house style, inches at 150 dots each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    return figure, axes


def save(figure: Figure, path: str | Path) -> Path:
    """Write the picture, making its folder; returns where it is: `.png` is added to a name without a suffix.

    Raises:
        ConfigError: a suffix that no picture has.
    """
    path = Path(path)
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise ConfigError("figure", str(path), "is no kind of picture; name a .png, .svg or .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def line_styles(n: int) -> list[tuple[str, Dash]]:
    """Colour and dashes of each of n lines: those that lie on each other stay visible, and 32 are told apart."""
    return [(COLOURS[i % len(COLOURS)], DASHES[(i + i // len(COLOURS)) % len(DASHES)]) for i in range(n)]


def tokens_label(tokens: float) -> str:
    """`4096` -> `4k`, `1500000` -> `1.5M`: binary thousands where exact, decimal ones otherwise."""
    if tokens >= 1024 and tokens % 512 == 0 and tokens < 1 << 20:
        return f"{tokens / 1024:g}k"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.3g}"


def _dress(axes: Axes, *, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, color=INK, loc="left", pad=10)
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    if "(nats" in y:
        flatten(axes)


def flatten(axes: Axes) -> None:
    """Let a panel of losses span `LEAST_NATS` at least."""
    low, high = axes.get_ylim()
    if high - low < LEAST_NATS:
        axes.set_ylim((low + high - LEAST_NATS) / 2, (low + high + LEAST_NATS) / 2)


def _mark(axes: Axes, marks: Sequence[tuple[float, str]]) -> None:
    """Dashed verticals with their names at the top, inside the panel: left of the line near its right end, and lower where
    the name of another would be met."""
    for place, _ in marks:
        axes.axvline(place, color=MARK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    taken: list[tuple[int, float, float]] = []  # line of text, and from where to where in the panel
    for place, name in marks:
        at = float((axes.transScale + axes.transLimits).transform((place, axes.get_ylim()[0]))[0])
        width = 0.012 * len(name) + 0.02  # of the panel, a little more than the letters of this size take
        leftwards = at + width > 1
        start, end = (at - width, at) if leftwards else (at, at + width)
        rows = {row for row, low, high in taken if start < high and low < end}
        row = next(row for row in range(len(marks)) if row not in rows)
        taken.append((row, start, end))
        axes.annotate(
            name,
            (place, 0.985 - 0.05 * row),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if leftwards else 4, 0),
            textcoords="offset points",
            ha="right" if leftwards else "left",
            va="top",
            fontsize=8,
            color="#555555",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        )


def _format_tokens(axes: Axes, *, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        low, high = axes.get_xlim()
        if high - low >= 2048:  # ticks on binary thousands: 4k, 8k, ...
            step = 512 * 2 ** max(0, math.ceil(math.log2((high - low) / 512 / 9)))
            if high < 1 << 20:
                axes.set_xticks([t for t in range(0, int(high) + 1, step) if t >= low])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_label(value)))


def plot_loss_by_position(
    rows_by_model: Mapping[str, Sequence[PositionRow]],
    path: str | Path,
    *,
    marks: Sequence[tuple[float, str]] = (),
    title: str = "Loss by position in the context",
) -> Path:
    """Mean loss of each bin of positions, one line a model, with 95 % bands over documents.

    Args:
        rows_by_model: model name -> its rows (`nemo_longctx.eval.position`); names become the legend.
        path: PNG to write.
        marks: (position, name) verticals, say the length that a model was trained at; none beyond the last position.
    """
    figure, axes = new_figure()
    end = max((row.end for rows in rows_by_model.values() for row in rows), default=1)
    for (colour, dashes), (model, rows) in zip(line_styles(len(rows_by_model)), rows_by_model.items(), strict=True):
        rows = sorted(rows, key=lambda row: row.start)
        middle = [(row.start + row.end) / 2 for row in rows]
        loss = [row.loss for row in rows]
        axes.plot(middle, loss, color=colour, linestyle=dashes, linewidth=1.6, label=model, zorder=3)
        half = [half_width(row.standard_error, row.documents) for row in rows]
        if any(half):
            lower = [a - h for a, h in zip(loss, half, strict=True)]
            upper = [a + h for a, h in zip(loss, half, strict=True)]
            axes.fill_between(middle, lower, upper, color=colour, alpha=0.18, linewidth=0, zorder=2)
    axes.set_xlim(0, end)
    _format_tokens(axes, log=False)
    _mark(axes, [(place, name) for place, name in marks if place <= end])
    _dress(axes, title=title, x="position in the sequence (tokens)", y="loss (nats per token)")
    if any(rows_by_model):
        axes.legend(fontsize=8.5, frameon=False)
    return save(figure, path)


def plot_loss_by_context(
    rows_by_model: Mapping[str, Sequence[ContextRow]],
    path: str | Path,
    *,
    marks: Sequence[tuple[float, str]] = (),
    title: str = "Loss on the same tokens, after more and more context",
) -> Path:
    """Mean loss on fixed targets against the tokens that the model reads, one line a model, with 95 % bands over documents.

    Args:
        rows_by_model: model name -> its rows (`nemo_longctx.eval.context`); names become the legend.
        path: PNG to write.
        marks: (tokens read, name) verticals, say the length that a model was trained at.
    """
    figure, axes = new_figure()
    for (colour, dashes), (model, rows) in zip(line_styles(len(rows_by_model)), rows_by_model.items(), strict=True):
        read, loss = [row.read for row in rows], [row.loss for row in rows]
        axes.plot(read, loss, marker="o", color=colour, linestyle=dashes, linewidth=1.8, markersize=4.5, label=model, zorder=3)
        half = [half_width(row.standard_error, row.documents) for row in rows]
        if any(half):
            lower = [a - h for a, h in zip(loss, half, strict=True)]
            upper = [a + h for a, h in zip(loss, half, strict=True)]
            axes.fill_between(read, lower, upper, color=colour, alpha=0.14, linewidth=0, zorder=2)
    _format_tokens(axes, log=True)
    _mark(axes, marks)
    _dress(axes, title=title, x="tokens that the model reads", y="loss on the last tokens (nats)")
    if any(rows_by_model):
        axes.legend(fontsize=8.5, frameon=False)
    return save(figure, path)


def plot_training_curve(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    switches: Sequence[tuple[float, str]] = (),
    title: str = "Training loss",
) -> Path:
    """Loss against consumed tokens (or steps, where rows have no `tokens`), with the stage switches marked.

    Args:
        rows: mappings with `loss`, `tokens` or `step`, and optionally `validation_loss` and `validation_loss_NAME`, drawn
            by name where there are several sets; values may be text, as a CSV reader gives them; a row without a value is
            left out of that line.
        path: PNG to write.
        switches: (tokens or step, name) of each change of stage, say (2e6, "1k -> 4k").

    Raises:
        ValueError: no row has a loss, or rows have neither `tokens` nor `step`.
    """
    clock = "tokens" if rows and "tokens" in rows[0] else "step"
    loss = points_of(rows, clock, "loss")
    if not loss:
        raise ValueError(f"no row has both {clock!r} and 'loss': nothing to draw")
    figure, axes = new_figure()
    x, y = zip(*loss, strict=True)
    gaps = f", a gap at {lost:,} rows whose loss was no number" if (lost := sum(map(math.isnan, y))) else ""
    axes.plot(x, y, color=COLOURS[0], linewidth=0.8, alpha=0.35, zorder=2)
    cuts = [0, *(n for n in range(1, len(x)) if any(x[n - 1] <= place < x[n] for place, _ in switches)), len(x)]
    smooth = [value for a, b in itertools.pairwise(cuts) for value in smoothed(y[a:b])]  # a switch is not smoothed away
    axes.plot(x, smooth, color=COLOURS[0], linewidth=1.8, label=f"training (smoothed{gaps})", zorder=3)
    sets = list(dict.fromkeys(key for row in rows for key in row if key.startswith(SET_LOSS)))
    for name, colour in zip(sets if len(sets) > 1 else ["validation_loss"], itertools.cycle(COLOURS[1:])):
        if points := points_of(rows, clock, name):
            x, y = zip(*points, strict=True)
            label = f"validation {name.removeprefix(SET_LOSS)}" if len(sets) > 1 else "validation"
            axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.2, label=label, zorder=4)
    if clock == "tokens":
        _format_tokens(axes, log=False)
    _mark(axes, switches)
    _dress(axes, title=title, x="tokens consumed" if clock == "tokens" else "step", y="loss (nats per token)")
    axes.legend(fontsize=8.5, frameon=False)
    return save(figure, path)


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def plot_context_law(
    curves: Mapping[str, Mapping[str, Any]],
    laws: Mapping[str, ContextLaw],
    path: str | Path,
    *,
    title: str = "Validation loss against context length",
) -> Path:
    """Points, fitted L(c) and its bootstrap band, one colour a model, as Xiong et al. 2023, Figure 1.

    Args:
        curves: model -> {"context" [N] tokens, "loss" [N]} (`nemo_longctx.eval.scaling.read_curves`).
        laws: model -> its fit.
        path: PNG to write.
    """
    import numpy as np

    figure, axes = new_figure()
    for colour, (model, law) in zip(_cycle(len(laws)), laws.items(), strict=True):
        c = np.asarray(curves[model]["context"], float)
        axes.plot(c, curves[model]["loss"], "o", color=colour, markersize=3.2, alpha=0.65, markeredgewidth=0, zorder=3)
        along = np.geomspace(c.min(), c.max(), 200)
        if law.replicates:
            low, high = law.band(along)
            axes.fill_between(along, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        sign = f"$L(c) = ({law.alpha:.3g}/c)^{{{law.beta:.2f}}} + {law.gamma:.2f}$"
        axes.plot(along, law.loss(along), color=colour, linewidth=1.6, label=f"{model}: {sign}", zorder=4)
    _format_tokens(axes, log=True)
    _dress(axes, title=title, x="context length c (tokens)", y="loss (nats per token)")
    axes.legend(fontsize=8.5, frameon=False)
    return save(figure, path)


def plot_probes(
    rows: Sequence[ProbeRow], path: str | Path, *, value: str = "score", title: str = "Long-context probes"
) -> Path:
    """A row of panels a kind: a heat map of length x depth for each model, or where there is no depth one line a model.

    Args:
        rows: cells of one or more models (`nemo_longctx.eval.probe_scores`).
        path: PNG to write.
        value: `score`, or `answer_loss` (nats per token of the answer).
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row.kind for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    if not kinds:
        raise ValueError("no probe was scored: nothing to draw")
    figure = Figure(figsize=(max(7.2, 3.4 * len(models) + 0.8), 2.7 * len(kinds) + 0.5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    grid = figure.add_gridspec(len(kinds), len(models))
    top = 1.0 if value == "score" else max((getattr(r, value) for r in rows if r.samples), default=1.0) or 1.0
    for line, kind in enumerate(kinds):
        mine = [row for row in rows if row.kind == kind]
        depths = sorted({row.depth for row in mine})
        name = kind.replace("_", " ")
        if len(depths) == 1:
            _probe_lines(figure.add_subplot(grid[line, :]), name, models, mine, value, top)
            continue
        panels = [figure.add_subplot(grid[line, column]) for column in range(len(models))]
        for model, axes in zip(models, panels, strict=True):
            image = _heat_map(axes, [row for row in mine if row.model == model], depths, value, top)
            axes.set_title(f"{name} · {model}", fontsize=9.5, color=INK, loc="left")
        panels[0].set_ylabel("depth of the hidden text", fontsize=8.5, color=INK)
        figure.colorbar(image, ax=panels, label=PROBE_UNITS[value], shrink=0.9)
    return save(figure, path)


def _heat_map(axes: Axes, cells: Sequence[ProbeRow], depths: Sequence[float], value: str, top: float) -> Any:
    import numpy as np

    lengths = sorted({row.length for row in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for row in cells:
        grid[depths.index(row.depth), lengths.index(row.length)] = getattr(row, value)
    # Bright for good: high scores, low losses; told apart without colour too. Cells that were not scored stay grey.
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=top, cmap="viridis" if value == "score" else "viridis_r")
    axes.set_facecolor(FAINT)
    axes.set_xticks(range(len(lengths)), [tokens_label(length) for length in lengths], rotation=45 if len(lengths) > 6 else 0)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("length (tokens)", fontsize=8.5, color=INK)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    for (y, x), number in np.ndenumerate(grid):
        if not math.isnan(number):
            red, green, blue, _ = image.cmap(image.norm(number))
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            axes.annotate(f"{number:.2g}", (x, y), ha="center", va="center", fontsize=7.5, color=INK if bright else "white")
    return image


def _probe_lines(axes: Axes, name: str, models: Sequence[str], rows: Sequence[ProbeRow], value: str, top: float) -> None:
    for (colour, dashes), model in zip(line_styles(len(models)), models, strict=True):
        cells = sorted((row for row in rows if row.model == model), key=lambda row: row.length)
        heights = [getattr(cell, value) for cell in cells]
        lengths = [cell.length for cell in cells]
        axes.plot(lengths, heights, marker="o", color=colour, linestyle=dashes, markersize=4, linewidth=1.5, label=model)
    axes.set_ylim(0, top * 1.05)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _format_tokens(axes, log=True)
    axes.set_xticks(sorted({row.length for row in rows}))
    axes.minorticks_off()
    axes.set_title(name, fontsize=9.5, color=INK, loc="left")
    axes.set_xlabel("length (tokens)", fontsize=8.5, color=INK)
    axes.set_ylabel(PROBE_UNITS[value], fontsize=8.5, color=INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.legend(fontsize=8, frameon=False)


def plot_votes(shares: Mapping[str, tuple[float, float, float]], path: str | Path, *, title: str) -> Path:
    """Shares of votes with their intervals, a bar each, as Xiong et al. 2023, Figure 3.

    Args:
        shares: what was voted -> (share, low, high), each in [0, 1].
        path: PNG to write.
    """
    figure, axes = new_figure(height=0.9 + 0.55 * len(shares))
    for place, (colour, (share, low, high)) in enumerate(zip(_cycle(len(shares)), shares.values(), strict=True)):
        axes.barh(place, 100 * share, color=colour, height=0.6, zorder=2)
        axes.errorbar(100 * share, place, xerr=[[100 * (share - low)], [100 * (high - share)]], color=INK, capsize=4, zorder=3)
        axes.text(100 * high + 1.5, place, f"{share:.1%}", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(shares)), list(shares), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    _dress(axes, title=title, x="share of votes with its 95 % interval, %", y="")
    return save(figure, path)
