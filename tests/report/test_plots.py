import itertools
import math

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from nemo_longctx.eval.context import ContextRow
from nemo_longctx.eval.intervals import half_width
from nemo_longctx.eval.position import PositionLosses, uniform_edges
from nemo_longctx.report import lengths, plots
from nemo_longctx.report.plots import (
    COLOURS,
    MARK,
    line_styles,
    plot_loss_by_position,
    plot_training_curve,
    plot_votes,
    tokens_label,
)
from nemo_longctx.report.training_log import smoothed


def ink(path, colour):
    """How many pixels have this colour (as #RRGGBB)."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((abs(image.imread(path)[..., :3] - wanted).max(axis=-1) < 0.02).sum())


def kept_figures(monkeypatch, module):
    """What the module draws, before it is a picture."""
    figures = []
    monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure) or path)
    return figures


def test_loss_by_position_draws_every_model(tmp_path):
    rng = np.random.default_rng(0)
    rows = {}
    for name, level in (("before", 3.2), ("after", 2.8)):
        totals = PositionLosses(uniform_edges(8192, 32))
        totals.add(level + rng.normal(0, 0.3, (20, 8192)))
        rows[name] = totals.rows(name)
    one = plot_loss_by_position({"before": rows["before"]}, tmp_path / "x" / "one.png")
    two = plot_loss_by_position(rows, tmp_path / "two.png", marks=[(4096, "trained to 4k")])
    assert ink(one, COLOURS[0]) > 500
    assert ink(one, COLOURS[1]) == 0
    assert ink(two, COLOURS[0]) > 500
    assert ink(two, COLOURS[1]) > 500
    assert ink(two, MARK) > ink(one, MARK) + 200


def test_votes_are_as_wide_as_their_shares(tmp_path):
    shares = {"A better": (0.6, 0.5, 0.7), "tie": (0.3, 0.2, 0.4), "B better": (0.1, 0.05, 0.2)}
    drawn = plot_votes(shares, tmp_path / "votes.png", title="A against B")
    widths = [ink(drawn, COLOURS[place]) for place in range(3)]
    assert widths[0] > 1.7 * widths[1] > 3 * widths[2] > 0


def test_training_curve_takes_csv_text_and_marks_switches(tmp_path):
    rows = [
        {"tokens": str(t), "loss": str(5 / (1 + t / 1e5)), "validation_loss": "" if t % 5 else "2.0"} for t in range(1, 200)
    ]
    plain = plot_training_curve(rows, tmp_path / "plain.png")
    marked = plot_training_curve(rows, tmp_path / "marked.png", switches=[(100, "1k → 4k")])
    assert ink(plain, COLOURS[0]) > 500
    assert ink(plain, COLOURS[1]) > 100
    assert ink(marked, MARK) > ink(plain, MARK) + 200
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_training_curve([{"step": 1}], tmp_path / "none.png")


def test_a_loss_that_is_no_number_is_a_gap_and_not_the_end_of_the_curve(tmp_path, monkeypatch):
    figures = kept_figures(monkeypatch, plots)
    losses = [4.0, 3.0, math.nan, 2.0, math.inf, *[1.0] * 95]
    plot_training_curve([{"step": n, "loss": loss} for n, loss in enumerate(losses)], tmp_path / "x.png")
    raw, smooth = figures[0].axes[0].lines[:2]
    for line in (raw, smooth):
        assert [n for n, value in enumerate(line.get_ydata()) if math.isnan(value)] == [2, 4]
    assert smooth.get_ydata()[3] == (3.0 + 2.0 + 1.0) / 3  # of those there are among the five around it
    assert smooth.get_ydata()[50] == 1.0
    assert smooth.get_label() == "training (smoothed, a gap at 2 rows whose loss was no number)"


@pytest.mark.parametrize(("documents", "half"), [(2, 12.706), (3, 4.303), (0, 1.96), (500, 1.96)])
def test_a_band_of_few_documents_is_as_wide_as_it_has_to_be(documents, half):
    assert half_width(0.1, documents) == pytest.approx(0.1 * half, rel=1e-3)
    assert half_width(math.nan, documents) == 0


def test_plots_leave_no_global_state(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_training_curve([{"step": s, "loss": 1.0} for s in range(3)], tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    import sys

    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(("tokens", "label"), [(512, "512"), (4096, "4k"), (32768, "32k"), (1e6, "1M"), (2.5e9, "2.5B")])
def test_tokens_label(tokens, label):
    assert tokens_label(tokens) == label


def test_each_doubling_of_a_documents_length_is_as_wide_as_the_next(tmp_path, monkeypatch):
    """Its shares are of a doubling each: on an axis of tokens the short documents, which are most, would be a stroke."""
    figures = kept_figures(monkeypatch, lengths)
    rows = [{"at_least": 2**i, "below": 2 ** (i + 1), "documents": i, "tokens": i * 2**i} for i in range(4, 12)]
    lengths.plot_lengths({"books": rows[2:], "web": rows[:5]}, tmp_path / "x.png")
    (axes,) = figures[0].axes
    assert axes.get_xlim() == (16, 4096)
    at = axes.transData.transform([(2**i, 0.0) for i in range(4, 13)])[:, 0]
    np.testing.assert_allclose(np.diff(at), (at[-1] - at[0]) / 8)
    assert [text.get_text() for text in axes.get_xticklabels()] == [tokens_label(2**i) for i in range(4, 13)]
    drawn = [stairs.get_data().values for stairs in axes.patches]
    assert [sum(values) for values in drawn] == pytest.approx([1.0] * 4)  # shares of each source's tokens and documents


def test_of_many_sources_the_largest_are_drawn_and_no_name_lies_on_a_line(tmp_path, monkeypatch):
    figures = kept_figures(monkeypatch, lengths)
    for number in (3, 4, len(COLOURS), len(COLOURS) + 4):
        rows = {f"s{i}": [{"at_least": 16, "below": 32, "documents": 1, "tokens": 20 + i}] for i in range(number)}
        lengths.plot_lengths(rows, tmp_path / "x.png")
        (axes,), drawn = figures[-1].axes, min(number, len(COLOURS))
        legend = figures[-1].legends[0] if number > 3 else axes.get_legend()
        assert [text.get_text() for text in legend.get_texts()][2:] == [f"s{i}" for i in range(number)][-drawn:]
        assert len({handle.get_color() for handle in legend.get_lines()[2:]}) == drawn
        assert (f"{drawn} largest of {number}" in axes.get_title(loc="left")) == (number > drawn)


def test_a_flat_line_looks_flat(tmp_path, monkeypatch):
    """A fall of 0.0003 nats filled the panel from corner to corner, on an axis of +5.901."""
    figures = kept_figures(monkeypatch, plots)
    rows = [
        ContextRow(model="mine", context=c, read=c + 64, documents=1, tokens=64, loss=5.9016 - c / 1e6, standard_error=math.nan)
        for c in (64, 192)
    ]
    plots.plot_loss_by_context({"mine": rows}, tmp_path / "x.png")
    plot_training_curve([{"tokens": t, "loss": 5.9 + t / 1e4} for t in range(9)], tmp_path / "x.png")
    for figure in figures:
        (axes,) = figure.axes
        low, high = axes.get_ylim()
        assert high - low == pytest.approx(plots.LEAST_NATS)
        lines = np.concatenate([line.get_ydata() for line in axes.lines])
        assert (low + high) / 2 == pytest.approx((lines.min() + lines.max()) / 2)
    plot_training_curve([{"tokens": t, "loss": float(t)} for t in range(9)], tmp_path / "x.png")
    assert np.diff(figures[-1].axes[0].get_ylim()) > 8


def test_a_mark_lies_in_the_panel_and_its_name_on_no_other(tmp_path, monkeypatch):
    figures = kept_figures(monkeypatch, plots)
    totals = PositionLosses(uniform_edges(256, 4))
    totals.add(np.full((3, 256), 2.0))
    marks = [(257, "beyond"), (256, "the old length"), (250, "trained to 250"), (40, "early"), (45, "a little later")]
    plot_loss_by_position({"one": totals.rows("one")}, tmp_path / "x.png", marks=marks)
    plot_training_curve([{"tokens": t, "loss": 1.0} for t in range(300)], tmp_path / "x.png", switches=marks[1:])
    for figure in figures:
        (axes,) = figure.axes
        figure.draw_without_rendering()
        names = [text for text in axes.texts if text.get_text()]
        assert [name.get_text() for name in names] == [name for _, name in marks[1:]]
        boxes, panel = [name.get_window_extent() for name in names], axes.get_window_extent()
        assert all(panel.x0 <= box.x0 and box.x1 <= panel.x1 + 1 for box in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_lines_that_lie_on_each_other_are_told_apart():
    assert len(set(map(str, line_styles(32)))) == 32
    dashes = [dash for _, dash in line_styles(8)]
    assert all(a != b for a, b in itertools.pairwise(dashes))


def test_a_loud_last_step_is_no_jump_of_the_smoothed_line():
    """The demo's training seemed to end in a leap from 3.9 to 4.9: its last step, as it was."""
    smooth = smoothed([8.0 - n for n in range(6)] + [2.0] * 194 + [5.0])
    assert smooth[0] == 8.0  # the start is steep, and has nothing before it
    assert smooth[-1] == (5 * 2.0 + 5.0) / 6
    assert smooth[100] == 2.0
