"""What is said of planted effects: strong ones hold, dead arms cannot be told, and errors are as rare as the intervals say."""

import csv
import json
import math

import numpy as np
import pytest

from nemo_longctx.ablation import page
from nemo_longctx.ablation.page import _markdown, write_study
from nemo_longctx.ablation.study import load_study
from nemo_longctx.ablation.verdict import HOLDS, NOT, UNKNOWN, Claim, Effect, effect, t_quantile, verdict
from nemo_longctx.config import ConfigError
from nemo_longctx.report.html import Section


def arm(level, *, seeds=3, documents=32, rng=None, noise=0.02, shared=None):
    rng = rng or np.random.default_rng(0)
    shared = np.random.default_rng(9).normal(3, 0.5, (1, documents)) if shared is None else shared
    return shared + level + rng.normal(0, noise, (seeds, 1)) + rng.normal(0, noise, (seeds, documents))


def claim(**more):
    return Claim(**{"text": "b is better than a", "measure": "loss", "first": "b", "second": "a", **more})


def test_a_strong_effect_holds_and_its_reverse_does_not():
    seen = effect(arm(-0.3), arm(0.0, rng=np.random.default_rng(1)))
    assert seen.low < -0.3 < seen.high or seen.high < 0
    assert verdict(claim(), seen) == HOLDS
    assert verdict(claim(test="greater"), seen) == NOT
    assert verdict(claim(margin=0.5), seen) == NOT  # real, and smaller than what the claim needs
    assert verdict(claim(test="no_worse", margin=0.01), seen) == HOLDS


@pytest.mark.parametrize(
    ("test", "margin", "low", "high", "said"),
    [
        ("less", 0.0, -2, -0.1, HOLDS), ("less", 0.0, -2, 0, UNKNOWN), ("less", 0.0, 0, 2, UNKNOWN), ("less", 0.0, 0.1, 2, NOT),
        ("less", 1.0, -3, -1.1, HOLDS), ("less", 1.0, -3, -1, UNKNOWN), ("less", 1.0, -1, -0.1, UNKNOWN),
        ("less", 1.0, -0.9, -0.1, NOT), ("less", 1.0, -0.9, 0, UNKNOWN), ("less", 1.0, -0.9, 0.1, UNKNOWN),
        ("greater", 1.0, 1.1, 3, HOLDS), ("greater", 1.0, 1, 3, UNKNOWN), ("greater", 1.0, 0.1, 0.9, NOT),
        ("greater", 0.0, -2, -0.1, NOT), ("greater", 0.0, -2, 0, UNKNOWN),
        ("no_worse", 1.0, -3, 0.9, HOLDS), ("no_worse", 1.0, -3, 1, UNKNOWN), ("no_worse", 1.0, 1, 3, UNKNOWN),
        ("no_worse", 1.0, 1.1, 3, NOT), ("less", 0.0, -math.inf, -1, UNKNOWN), ("less", 0.0, -3, math.nan, UNKNOWN),
    ],
)  # fmt: skip
def test_an_interval_that_ends_at_the_bound_decides_nothing(test, margin, low, high, said):
    assert (
        verdict(claim(test=test, margin=margin), Effect(mean=(low + high) / 2, low=low, high=high, seeds=3, documents=9))
        == said
    )


def test_a_dead_arm_cannot_be_told():
    same = arm(0.0)
    for test in ("less", "greater"):
        assert verdict(claim(test=test), effect(same, same)) == UNKNOWN
        assert verdict(claim(test=test, margin=0.1), effect(same, same)) == UNKNOWN


def test_one_seed_or_one_number_says_nothing_of_the_next():
    seen = effect(arm(-5, seeds=1), arm(0.0, seeds=1))
    assert math.isinf(seen.low)
    assert verdict(claim(), seen) == UNKNOWN
    assert "no interval" in str(seen)
    assert verdict(claim(), effect([[1.0], [1.1], [0.9]], [[3.0], [3.2], [3.1]])) == HOLDS  # scores: one number a run


@pytest.mark.parametrize(("seed_noise", "document_noise", "noise"), [(0.03, 0, 0.0), (0.03, 0.05, 0.05), (0, 0.05, 0.02)])
def test_a_dead_arm_is_told_from_its_equal_in_one_study_of_twenty_at_most(seed_noise, document_noise, noise):
    rng, S, D, studies_run = np.random.default_rng(0), 3, 12, 1000
    wrong = inside = 0
    for _ in range(studies_run):
        found = rng.normal(0, seed_noise, (S, 1)) + rng.normal(0, document_noise, (1, D)) + rng.normal(0, noise, (S, D))
        wrong += verdict(claim(), effect(found, np.zeros((S, D)))) != UNKNOWN
        seen = effect(found + 0.02, np.zeros((S, D)))
        inside += seen.low <= 0.02 <= seen.high
    error = 3 * math.sqrt(0.05 * 0.95 / studies_run)  # of counting so many studies
    assert wrong / studies_run <= 0.05 + error
    assert inside / studies_run >= 0.95 - error


def test_quantiles_are_those_of_the_tables():
    for freedom, expected in ((1, 12.706), (2, 4.3027), (5, 2.5706), (30, 2.0423), (1000, 1.9623)):
        assert t_quantile(freedom) == pytest.approx(expected, rel=1e-3)


def test_arms_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        effect(np.zeros((3, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="no document"):
        effect([[math.nan]], [[1.0]])
    with pytest.raises(ConfigError, match="did you mean 'less'"):
        claim(test="les")
    with pytest.raises(ConfigError, match="margin"):
        claim(test="no_worse")


def test_numbers_on_a_page_are_those_of_its_tables(tmp_path):
    study = load_study("curriculum")
    rng = np.random.default_rng(0)
    found = {m: {a: arm(0.01 * n, rng=rng) for n, a in enumerate(study.arms)} for m in study.measures}
    written = write_study(tmp_path, study, found, scale="smoke", provenance={"commit": "abc"}).read_text(encoding="utf-8")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    import html

    for measure in study.measures:
        with (tmp_path / f"{measure}.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) == 1 + len(study.arms)
        for row, values in zip(rows[1:], found[measure].values(), strict=True):
            assert float(row[1]) == pytest.approx(values.mean(), abs=5e-5)
            assert all(html.escape(cell) in written for cell in row)
            assert all(cell in text for cell in row)
    with (tmp_path / "claims.csv").open(newline="") as file:
        claims = list(csv.DictReader(file))
    assert len(claims) == len(study.claims)
    assert {row["verdict"] for row in claims} <= {HOLDS, NOT, UNKNOWN}
    assert "<script" not in written
    assert written.count("data:image/png;base64,") == len(study.measures)
    assert json.loads(json.dumps({"commit": "abc"}))["commit"] in written


@pytest.mark.parametrize(("difference", "narrowest"), [(8e-6, True), (0.5, False), (4e14, False)])
def test_what_the_table_writes_as_nothing_is_drawn_as_nothing(tmp_path, monkeypatch, difference, narrowest):
    """Arms 0.00001 apart stood at the two ends of their picture, over ticks of -8 to 0 with 1e-5 in a corner."""
    figures = []
    monkeypatch.setattr(page, "save", lambda figure, path: figures.append(figure) or path)
    page.plot_effects({"a": np.full((1, 3), 5.0), "b": np.full((1, 3), 5.0 - difference)}, tmp_path / "x.png", title="x")
    (axes,) = figures[0].axes
    low, high = axes.get_xlim()
    assert (high - low == pytest.approx(page.FINEST)) == narrowest
    assert low <= -difference <= 0 <= high
    figures[0].draw_without_rendering()
    assert axes.xaxis.get_offset_text().get_text() == ""
    ticks = [float(text.get_text().replace("−", "-")) for text in axes.get_xticklabels()]
    assert ticks == pytest.approx(list(axes.get_xticks()))


def test_what_a_scale_leaves_out_cannot_be_told(tmp_path):
    study = load_study("position")
    page = write_study(tmp_path, study, {}, scale="smoke", provenance={}, ended="The base cannot do it.")
    text = page.read_text(encoding="utf-8")
    assert "not measured at this scale" in text
    assert "The base cannot do it." in text
    assert str(Effect(mean=1, low=0.5, high=1.5, seeds=3, documents=2)) == "+1.0000 (+0.5000 to +1.5000)"


def test_a_bar_in_a_cell_parts_no_cells():
    sections = [Section(heading="More", note="", table=[["a|b", "c"], ["1|2|3", "4"]]), Section(heading="None", note="n")]
    text = _markdown(load_study("position"), sections)
    assert "## More\n\n| a\\|b | c |\n| --- | --- |\n| 1\\|2\\|3 | 4 |\n\n## None\n\nn\n" in text
