"""What is said of planted effects: strong ones hold, dead arms cannot be told, and errors are as rare as the intervals say."""

import csv
import json
import math

import numpy as np
import pytest

from nemo_longctx.ablation import page
from nemo_longctx.ablation.page import _markdown, write_study
from nemo_longctx.ablation.study import Measure, load_study
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


@pytest.mark.parametrize(("seeds", "documents"), [(3, 8), (2, 1), (5, 2)])
def test_an_effect_is_that_of_the_formula(seeds, documents):
    """Each part of the error by hand: the spread of seeds' means and of documents', with t of the fewer."""
    d = np.random.default_rng(seeds).normal(0.5, 1, (seeds, documents))
    seen = effect(d + 7, np.full((seeds, documents), 7.0))
    mean, variance = d.sum() / d.size, 0.0
    for means in (d.mean(1), d.mean(0)):
        if len(means) > 1:
            variance += sum((m - means.mean()) ** 2 for m in means) / (len(means) - 1) / len(means)
    freedom = min(n - 1 for n in (seeds, documents) if n > 1)
    half = t_quantile(freedom) * math.sqrt(variance)
    assert (seen.mean, seen.low, seen.high) == pytest.approx((mean, mean - half, mean + half))
    assert (seen.seeds, seen.documents) == (seeds, documents)
    same = effect(np.full((seeds, documents), 2.5), np.full((seeds, documents), 2.0))
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)
    missing = np.full((seeds, documents), 7.0)
    missing[0, 0] = math.nan
    if documents > 1:
        assert effect(d + 7, missing).documents == documents - 1


def test_quantiles_are_symmetric_and_of_any_probability():
    assert t_quantile(4, 0.5) == pytest.approx(0.0, abs=1e-6)
    for freedom, probability, expected in ((1, 0.75, 1.0), (2, 0.975, 4.302653), (3, 0.9, 1.637744), (10, 0.995, 3.169273)):
        assert t_quantile(freedom, probability) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"mean": 0.25, "low": -0.5, "high": 1.0}, "+0.2500 (-0.5000 to +1.0000)"),
        ({"mean": 1e5, "low": 99999.0, "high": -2e5}, "+1e+05 (+99999.0000 to -2e+05)"),
        ({"mean": 1.0, "low": -math.inf, "high": math.inf, "seeds": 1}, "+1.0000 (no interval: 1 seed, 2 documents)"),
        ({"mean": 1.0, "low": -math.inf, "high": math.inf, "documents": 1}, "+1.0000 (no interval: 3 seeds, 1 document)"),
    ],
)
def test_an_effect_in_words(made, said):
    assert str(Effect(**{"seeds": 3, "documents": 2} | made)) == said


@pytest.mark.parametrize(("more", "taken"), [({"margin": 0.0}, True), ({"margin": -0.1}, False), ({"test": "no_worse"}, False)])
def test_a_claim_s_margin_is_none_or_more(more, taken):
    if taken:
        assert claim(**more).margin == 0
    else:
        with pytest.raises(ConfigError, match="0 or more, above 0 for no_worse"):
            claim(**more)


def claims(study, found, barred=()):
    return {row[0]: row for row in page.claim_table(study, found, barred)}


def test_a_claim_s_line_has_its_effect_its_arms_and_its_verdict():
    study = load_study("position")
    one = next(claim for claim in study.claims if study.measures[claim.measure].probe)
    level = {one.first: 0.0, one.second: 1.0}
    found = {one.measure: {arm: level[arm] + np.zeros((3, 1)) + [[0.0], [0.01], [0.02]] for arm in level}}
    seen = effect(*(found[one.measure][arm] for arm in (one.first, one.second)))
    compared = f"{one.first} − {one.second}: {study.measures[one.measure].text}"
    table = claims(study, found)
    assert next(iter(table)) == "claim"
    assert table["claim"] == ["claim", "verdict", "difference (95 % interval)", "of", "where", "seeds", "documents"]
    assert table[one.text] == [one.text, verdict(one, seen), str(seen), compared, one.where, "3", "1"]
    assert claims(study, found, [study.measures[one.measure].probe])[one.text][1:3] == [UNKNOWN, str(seen)]
    without = claims(study, {one.measure: {one.first: found[one.measure][one.first]}})[one.text]
    assert without == [one.text, UNKNOWN, "not measured at this scale", compared, one.where, "–", "–"]


def test_numbers_of_a_measure_and_the_paper_s_beside_them():
    measured = Measure(text="M", path="training/loss", paper={"b": 1.5}, paper_text="nats")
    arms = {"a": np.array([[1.0], [2.0]]), "b": np.array([[3e5], [3e5]])}
    head, a, b = page.measure_table(measured, arms, "a")
    assert head == ["arm", "mean", "difference from a (95 % interval)", "paper: nats"]
    assert a == ["a", "1.5000", "–", "–"]
    assert b == ["b", "3e+05", str(effect(arms["b"], arms["a"])), "1.5"]
    assert [page.number(value) for value in (99999.0, 1e5, -1e5, 0.00004)] == ["99999.0000", "1e+05", "-1e+05", "0.0000"]


def test_a_page_says_its_scale_its_luck_its_gate_and_where_each_measure_lies(tmp_path, monkeypatch):
    study = load_study("position")
    name, timed = next(iter(study.measures)), Measure(text="Hours", path="training/hours")
    object.__setattr__(study, "measures", {**study.measures, "hours": timed})
    monkeypatch.setattr(page, "plot_effects", lambda arms, path, title: path.write_bytes(b"x") and path)
    found = {key: {"abf": np.ones((2, 1)), "pi": np.zeros((2, 1))} for key in (name, "hours")}

    def text(folder="out", **more):
        more = {"scale": "laptop", "provenance": {"commit": "c"}, **more}
        made = write_study(tmp_path / "new" / folder, study, found, **more)
        assert made == tmp_path / "new" / folder / "index.html"
        return (tmp_path / "new" / folder / "README.md").read_text(encoding="utf-8")

    plain = text(paths={name: "here/2048"}, more=[Section(heading="More", note="of it")])
    count = len(study.claims)
    assert f"of the {count} here, {0.05 * count:.2g} on average." in plain
    assert f"\n\n{study.paper}. Scale: laptop. Differences are paired" in plain
    assert "Measured as here/2048.\n" in plain
    assert "Measured as training/hours. Told, not tested:" in plain
    assert plain.index("Told, not tested") < plain.index("## More") < plain.index("## What made this")
    assert plain.startswith(f"# {study.title}\n\n## What can be said\n")
    assert f"Measured as {study.measures[name].path}.\n" in text()
    assert "\n\nIt ended. Position" in text(ended="It ended.", barred={"passkey": "P."}).replace(study.paper, "Position")
    barred = text(barred={"passkey": "P failed.", "code": "C failed."})
    assert "\n\nP failed. C failed. No claim is judged by passkey or code. " in barred
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {
        "claims.csv", f"{name}.csv", f"{name}.png", "hours.csv", "hours.png", "README.md", "index.html"
    }  # fmt: skip


def test_a_page_in_markdown_line_by_line():
    study = load_study("position")
    sections = [Section(heading="H", note="N", figures=["a/b.png", "c.png"], table=[["x", 1], ["y", 2]], code="made")]
    assert _markdown(study, sections) == (
        f"# {study.title}\n\n## H\n\nN\n\n![b](b.png)\n![c](c.png)\n\n| x | 1 |\n| --- | --- |\n| y | 2 |\n\n```\nmade\n```\n"
    )
