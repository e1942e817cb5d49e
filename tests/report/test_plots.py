import matplotlib
import numpy as np
import pytest
from matplotlib import image

from nemo_longctx.eval.position import PositionLosses, uniform_edges
from nemo_longctx.report.plots import COLOURS, MARK, plot_loss_by_position, plot_training_curve, plot_votes, tokens_label


def ink(path, colour):
    """How many pixels have this colour (as #RRGGBB)."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((abs(image.imread(path)[..., :3] - wanted).max(axis=-1) < 0.02).sum())


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
