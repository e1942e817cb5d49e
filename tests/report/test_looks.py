"""Pictures look as they did: colours, widths, sizes, places and words of each, in tests/fixtures/looks.json.

A change that is wanted is written there by `python tests/report/test_looks.py`, and looked at.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from nemo_longctx.ablation import drawn, page
from nemo_longctx.eval.context import ContextRow
from nemo_longctx.eval.position import PositionRow
from nemo_longctx.eval.probe_scores import ProbeRow
from nemo_longctx.eval.scaling import ContextLaw
from nemo_longctx.report import lengths, plots

LOOKS = Path(__file__).parents[1] / "fixtures" / "looks.json"


def short(values):
    return [f"{float(value):.5g}" for value in np.ravel(values)]


def words(text):
    if not text.get_text():
        return None
    box = text.get_bbox_patch()
    given = [text.get_text(), text.get_fontsize(), to_hex(text.get_color()), text.get_ha(), text.get_va()]
    given += [short(text.xyann)] if hasattr(text, "xyann") else []
    given += [short(text.xy)] if hasattr(text, "xy") else short(text.get_position())
    return given + ([short([box.get_alpha() or 1, box.get_boxstyle().pad, box.get_linewidth()])] if box else [])


def line(one):
    style = [to_hex(one.get_color()), one.get_linewidth(), str(one._unscaled_dash_pattern), str(one.get_marker())]
    style += [one.get_markersize(), one.get_markeredgewidth(), one.get_alpha(), one.get_zorder(), one.get_label()]
    return [*map(str, style), short(one.get_xdata()), short(one.get_ydata())]


def filled(one):
    corners = [short(path.vertices) for path in one.get_paths()]
    return [to_hex(one.get_facecolor()[0]) if len(one.get_facecolor()) else "", str(one.get_alpha()), one.get_zorder(), corners]


def patch(one):
    stairs = hasattr(one, "get_data")
    values = short(one.get_data().values) + short(one.get_data().edges) if stairs else short(one.get_path().vertices)
    place = short([one.get_x(), one.get_y(), one.get_width(), one.get_height()]) if hasattr(one, "get_width") else []
    return [
        to_hex(one.get_edgecolor()),
        to_hex(one.get_facecolor()),
        str(one.get_linestyle()),
        one.get_linewidth(),
        place,
        values,
    ]


def axis(one, scale):
    locator, formatter = one.get_major_locator(), one.get_major_formatter()
    held = {key: str(getattr(locator, key, "")) for key in ("_nbins", "numticks", "_base")}
    places = short(locator()) if type(locator).__name__ == "FixedLocator" else []
    said = [formatter(value, 0) for value in (512, 4096, 1_500_000)] if type(formatter).__name__ == "FuncFormatter" else []
    ticks = one._major_tick_kw
    return {
        "scale": scale, "locator": [type(locator).__name__, held], "places": places, "said": said,
        "labels": [label.get_text() for label in one.get_ticklabels()] if places and not said else [],
        "rotation": [label.get_rotation() for label in one.get_ticklabels()][:1], "label": words(one.label),
        "ticks": {key: str(ticks[key]) for key in sorted(ticks)}, "minor": len(one.get_minorticklocs()) > 0,
    }  # fmt: skip


def look(figure):
    found = {"size": short([*figure.get_size_inches(), figure.dpi]), "texts": [words(text) for text in figure.texts]}
    found["title"] = words(figure._suptitle) if figure._suptitle else None
    found["legends"] = [
        (legend._fontsize, [text.get_text() for text in legend.get_texts()], legend._ncols) for legend in figure.legends
    ]
    found["axes"] = []
    for axes in figure.axes:
        legend = axes.get_legend()
        found["axes"].append({
            "grid": [str(axes.get_subplotspec())] if axes.get_subplotspec() else [],
            "limits": short([*axes.get_xlim(), *axes.get_ylim()]), "facecolor": to_hex(axes.get_facecolor()),
            "below": str(axes.get_axisbelow()), "title": [words(axes._left_title), words(axes.title)],
            "lines": [line(one) for one in axes.lines], "filled": [filled(one) for one in axes.collections],
            "patches": [patch(one) for one in axes.patches], "texts": [words(text) for text in axes.texts],
            "images": [[image.get_cmap().name, short([image.norm.vmin, image.norm.vmax]),
                        short(np.ma.filled(image.get_array(), np.nan))] for image in axes.images],
            "spines": {side: [spine.get_visible(), to_hex(spine.get_edgecolor())] for side, spine in axes.spines.items()},
            "legend": legend and [legend._fontsize, legend.get_frame_on(), [text.get_text() for text in legend.get_texts()]],
            "x": axis(axes.xaxis, axes.get_xscale()), "y": axis(axes.yaxis, axes.get_yscale()),
        })  # fmt: skip
    return json.loads(json.dumps(found))


def positions(model, end, loss, error=0.02):
    edges = [0, end // 4, end // 2, end]
    return [
        PositionRow(model=model, start=a, end=b, tokens=9, loss=loss - 0.1 * n, standard_error=error)
        for n, (a, b) in enumerate(itertools.pairwise(edges))
    ]


def contexts(model, loss, error=0.02):
    return [
        ContextRow(model=model, context=c, read=c + 64, documents=3, tokens=9, loss=loss - n / 10, standard_error=error)
        for n, c in enumerate((64, 192, 448))
    ]


def cells(model):
    rows = [
        ProbeRow(
            model=model, kind="needle", length=length, depth=depth, score=length / 8192 * (1 - depth / 2),
            answer_loss=1 + depth, samples=2, skipped=0,
        )
        for length in (256, 512, 1024, 2048, 4096, 6144, 8192) for depth in (0.0, 0.5)
    ]  # fmt: skip
    rows[3] = ProbeRow(
        model=model, kind="needle", length=512, depth=0.5, score=math.nan, answer_loss=math.nan, samples=0, skipped=2
    )
    rows += [
        ProbeRow(
            model=model, kind="first_sentence", length=length, depth=0.0, score=0.25, answer_loss=2.0, samples=1, skipped=0
        )
        for length in (4096, 256)
    ]
    return rows


LAW = ContextLaw(
    alpha=20.0, beta=0.5, gamma=1.5, intervals={}, confidence=0.95, bootstrap="documents", replicates=2,
    samples=np.array([[19.0, 0.5, 1.4], [22.0, 0.45, 1.6]]),
)  # fmt: skip
TRAINED = [{"tokens": 100 * n, "loss": 5 - n / 20, "validation_loss_a": 4.0, "validation_loss_b": 3.0} for n in range(1, 45)]
STEPS = [{"step": n, "loss": 2 - n / 99, "validation_loss": "" if n % 3 else "3.0"} for n in range(9)]
ROWS = [
    {"at_least": 16, "below": 32, "documents": 3, "tokens": 20},
    {"at_least": 32, "below": 64, "documents": 1, "tokens": 40},
]
SOURCES = {f"s{i}": [row | {"tokens": row["tokens"] + i} for row in ROWS] for i in range(10)}
SPREAD = np.array([[0.0, 0.1], [0.02, 0.13], [-0.01, 0.08]])  # of an arm, by seed and document
EFFECTS = {name: level + SPREAD * n for n, (name, level) in enumerate((("abf", 3.0), ("pi", 3.4), ("xpos", 2.9)), start=1)}
CURVES = {"abf": np.array([[256.0, 3.0], [1024.0, 2.5]]), "pi": np.array([[256.0, 3.1], [2048.0, 2.6]])}
MARKS = [(100, "trained"), (130, "near the first"), (1900, "at the end"), (9999, "beyond")]
TWO = {"a": positions("a", 2000, 3.0), "b": positions("b", 2000, 2.5, math.nan)}
READ = {"a": contexts("a", 3.0), "b": contexts("b", 2.5, math.nan)}
NOTED = {"heading": "h", "x": "tokens", "note": "n"}
DRAWN = {
    "position": lambda: plots.plot_loss_by_position(TWO, "x", marks=MARKS),
    "position_long": lambda: plots.plot_loss_by_position({"a": positions("a", 32768, 3.0)}, "x"),
    "position_2048": lambda: plots.plot_loss_by_position({"a": positions("a", 2048, 3.0)}, "x"),
    "position_huge": lambda: plots.plot_loss_by_position({"a": positions("a", 1 << 21, 3.0)}, "x"),
    "context": lambda: plots.plot_loss_by_context(READ, "x", marks=MARKS[:1]),
    "training": lambda: plots.plot_training_curve(TRAINED, "x", switches=[(3000, "1k -> 4k")]),
    "steps": lambda: plots.plot_training_curve(STEPS, "x"),
    "law": lambda: plots.plot_context_law({"a": {"context": [64, 128, 512], "loss": [2.1, 1.9, 1.7]}}, {"a": LAW}, "x"),
    "scores": lambda: plots.plot_probes([*cells("a"), *cells("b")], "x"),
    "losses": lambda: plots.plot_probes(cells("a"), "x", value="answer_loss", title="t"),
    "votes": lambda: plots.plot_votes({"A better": (0.6, 0.5, 0.7), "tie": (0.4, 0.3, 0.5)}, "x", title="A against B"),
    "lengths": lambda: lengths.plot_lengths({name: SOURCES[name] for name in ("s0", "s1")}, "x"),
    "lengths_many": lambda: lengths.plot_lengths(SOURCES, "x"),
    "effects": lambda: page.plot_effects(EFFECTS, "x", title="t"),
    "curves": lambda: drawn._curves(CURVES, Path("x"), y=drawn.LOSS, log=True, **NOTED),
    "curves_plain": lambda: drawn._curves({"abf": CURVES["abf"] / 5}, Path("x"), y="score", **NOTED),
}


def looked_at(name, patch):
    figures = []
    for module in (plots, lengths, page, drawn):
        patch.setattr(module, "save", lambda figure, path: figures.append(figure) or Path(path))
    patch.setattr(drawn, "write_table", lambda path, table: None)
    DRAWN[name]()
    (figure,) = figures
    return look(figure)


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_looks_as_it_did(name, monkeypatch):
    assert looked_at(name, monkeypatch) == json.loads(LOOKS.read_text(encoding="utf-8"))[name]


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patched:
        made = {name: looked_at(name, patched) for name in DRAWN}
    LOOKS.write_text(json.dumps(made).replace('}, "', '},\n"') + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {LOOKS}\n")
