"""A study's numbers, read from what its runs leave: each measure is that of its words, and what is missing is named."""

import csv
import subprocess

import numpy as np
import pytest

from nemo_longctx.ablation import drawn, measured, runner
from nemo_longctx.ablation.page import measure_table
from nemo_longctx.ablation.study import Measure, Run
from nemo_longctx.ablation.verdict import effect
from nemo_longctx.eval import context
from nemo_longctx.eval.probe_scores import ProbeRow
from nemo_longctx.eval.results import blank_result
from nemo_longctx.report.plots import LEAST_NATS, tokens_label

CONTEXTS = [192, 448, 960, 1984]


def losses(level, *, seed=0, documents=24):
    """Scores of 8 targets whose mean loss at each context is `level(c)`."""
    rng = np.random.default_rng(seed)
    blocks = [
        rng.normal(3, 0.5) + np.array([[level(c)] for c in CONTEXTS])[None] + rng.normal(0, 0.01, (1, 4, 8))
        for _ in range(documents)
    ]
    return context.scores(blocks, documents=range(documents), contexts=CONTEXTS, short=192)


def falling(c):
    return (40 / (c + 3.5)) ** 0.5


def probe(length, score, kind="passkey"):
    return ProbeRow(model="m", kind=kind, length=length, depth=0.5, score=score, answer_loss=score + 1, samples=1, skipped=0)


def evaluated():
    result = blank_result("m")
    result.watched["short"] = [1.0, 2.0]
    result.context["books"] = losses(falling)
    result.probes.extend([probe(512, 1.0), probe(512, 0.5), probe(1024, 0.0), probe(512, 0.0, kind="record")])
    return result


def test_a_measure_of_an_evaluation_is_one_number_a_document():
    result = evaluated()
    each = np.array(result.context["books"].losses)
    assert measured.of_result("watched/short", result, "a").tolist() == [1.0, 2.0]
    # A context is named by all that is read, the 8 targets with it.
    np.testing.assert_array_equal(measured.of_result("context/books/200", result, "a"), each[:, 0])
    np.testing.assert_array_equal(measured.of_result("context/books/968", result, "a"), each[:, 2])
    np.testing.assert_array_equal(measured.of_result("gain/books", result, "a"), each[:, 0] - each[:, 3])
    assert measured.of_result("probes/passkey/512", result, "a").tolist() == [0.75]
    assert measured.of_result("answers/passkey/512", result, "a").tolist() == [1.75]


@pytest.mark.parametrize(
    "path", ["context/books/192", "context/papers/200", "gain/papers", "probes/passkey/256", "watched/long", "unknown/short"]
)
def test_what_was_not_measured_is_named_with_what_was(path):
    cells = ("passkey/1024", "passkey/512", "record/512")
    has = ", ".join(["watched/short", "context/books", *(f"{root}/{cell}" for root in ("answers", "probes") for cell in cells)])
    with pytest.raises(ValueError, match=rf"^arm a did not measure {path}; it has {has}$"):
        measured.of_result(path, evaluated(), "arm a")


def run_in(folder, arm="a", seed=1):
    (folder / "results").mkdir(parents=True, exist_ok=True)
    return Run(arm=arm, seed=seed, folder=folder, overrides=())


def measure(path):
    return Measure(text="M", path=path)


def value(path, run):
    return measured.value(measure(path), run)


def test_a_training_s_loss_hours_and_operations(tmp_path):
    run = run_in(tmp_path)
    for what in ("loss", "hours"):
        with pytest.raises(ValueError, match=r"a, seed 1 has no training\.csv yet"):
            value(f"training/{what}", run)
    with pytest.raises(ValueError, match=r"a, seed 1 has no throughput\.json yet"):
        value("training/flops", run)
    rows = [f"{step},{step * 3600},{30 - step},{2.0 if step % 2 else 4.0}" for step in range(1, 21)]
    lines = ["step,tokens,loss,tokens_per_second", *rows]
    (tmp_path / "results" / "training.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "results" / "throughput.json").write_text('{"planned_total_flops": 1e18}')
    assert value("training/loss", run).tolist() == [10.5]  # the mean of the last tenth of the steps
    assert value("training/hours", run).tolist() == [pytest.approx(10 / 2 + 10 / 4)]
    assert value("training/flops", run).tolist() == [1e18]
    with pytest.raises(
        ValueError, match="training/speed is no measure; there are training/loss, training/hours, training/processor_hours and"
    ):
        value("training/speed", run)
    with pytest.raises(ValueError, match="a, seed 1 has no evaluation yet, so watched/short is not known"):
        value("watched/short", run)


def test_a_table_takes_arms_that_every_seed_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "value", lambda _, run: np.array([run.seed, len(run.arm)], float))
    runs = [run_in(tmp_path, arm, seed) for arm, seed in (("a", 2), ("a", 1), ("bb", 1), ("cc", 1), ("cc", 2))]
    found = measured.table(measure("watched/x"), runs, ["a", "bb", "cc"], [1, 2])
    assert {arm: rows.tolist() for arm, rows in found.items()} == {"a": [[1, 1], [2, 1]], "cc": [[1, 2], [2, 2]]}


def test_a_difference_is_counted_from_the_reference():
    rng = np.random.default_rng(0)
    arms = {name: level + rng.normal(0, 0.001, (3, 8)) for name, level in (("base", 2.0), ("less", 1.5))}
    header, base, less = measure_table(measure("watched/x"), arms, "base")
    assert header[2] == "difference from base (95 % interval)"
    assert (base[0], base[2]) == ("base", "–")
    assert less[:2] == ["less", f"{arms['less'].mean():.4f}"]
    seen = effect(arms["less"], arms["base"])
    assert seen.mean == pytest.approx(-0.5, abs=0.01)
    assert less[2] == str(seen)


def test_laws_of_arms_are_drawn_where_every_run_measured(tmp_path, monkeypatch):
    results = {
        ("law", 1): losses(falling), ("law", 2): losses(falling, seed=1), ("flat", 1): losses(lambda c: 0.0, seed=2),
        ("half", 1): losses(falling), ("half", 2): None,
    }  # fmt: skip

    def last(run):
        if (found := results[run.arm, run.seed]) is None:
            return None
        result = blank_result("m")
        result.context["books"] = found
        return result

    monkeypatch.setattr(drawn, "last_result", last)
    arms = {
        arm: [run_in(tmp_path, arm, seed) for name, seed in results if name == arm] for arm in ("law", "flat", "half")
    }  # fmt: skip
    section = drawn.law_section(arms, "books", tmp_path)
    rows = list(csv.reader((tmp_path / "law.csv").open()))
    assert [row[0] for row in rows] == ["arm", "law", "flat"]
    assert rows[1] == [str(cell) for cell in section.table[1]]
    # The curve's context is the mean over the 8 targets of what stands before one.
    mean = np.mean([results["law", seed].losses for seed in (1, 2)], axis=0)
    law = context.judge_law(np.array(CONTEXTS) + 3.5, mean).law
    assert rows[1][1].startswith(f"{law.alpha:.3g}"[:3])
    assert rows[0][-1] == "why not drawn"
    assert rows[1][-1] == "–"
    assert rows[2][1:4] == ["–"] * 3
    assert rows[2][-1].startswith("no better than a constant loss")
    assert section.figures == [tmp_path / "law.png"]
    assert drawn.law_section({"half": arms["half"]}, "books", tmp_path) is None
    assert drawn.law_section(arms, "papers", tmp_path) is None


@pytest.mark.parametrize(("y", "spans"), [(drawn.LOSS, LEAST_NATS), ("score", 0.0003)])
def test_a_fall_of_next_to_nothing_fills_no_panel_of_losses(tmp_path, monkeypatch, y, spans):
    limits = []
    monkeypatch.setattr(drawn, "save", lambda figure, path: limits.append(figure.axes[0].get_ylim()) or path)
    drawn._curves({"a": np.array([[64, 3.0], [128, 2.9997]])}, tmp_path / "c", heading="H", x="x", y=y, note="", log=True)
    assert limits[0][1] - limits[0][0] == pytest.approx(spans, rel=0.2)


def test_a_study_is_stamped_with_its_checkout_s_commit(tmp_path, monkeypatch):
    here = tmp_path / "nemo_longctx" / "ablation" / "runner.py"
    here.parent.mkdir(parents=True)
    monkeypatch.setattr(runner, "__file__", str(here))
    assert runner.commit() == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert runner.commit() == head


def test_loss_against_context_is_drawn_where_every_run_measured(tmp_path, monkeypatch):
    results = {("a", 1): losses(falling), ("a", 2): losses(falling, seed=1), ("half", 1): losses(falling), ("half", 2): None}

    def last(run):
        result = blank_result("m")
        if (found := results[run.arm, run.seed]) is not None:
            result.context["books"] = found
        return result

    drawings = []
    monkeypatch.setattr(drawn, "last_result", last)
    monkeypatch.setattr(drawn, "save", lambda figure, path: drawings.append(figure.axes[0]) or path)
    arms = {arm: [run_in(tmp_path, arm, seed) for seed in (1, 2)] for arm in ("a", "half")}
    section = drawn.context_section(arms, "books", tmp_path)
    header, row = section.table
    read = [context + results["a", 1].targets for context in results["a", 1].contexts]
    assert header == ["arm", *(f"{place:,}" for place in read)]
    mean = np.mean([results["a", seed].losses for seed in (1, 2)], axis=(0, 1))
    assert row == ["a", *(f"{loss:.4f}" for loss in mean)]
    (axes,) = drawings
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == [tokens_label(place) for place in read]
    assert drawn.context_section({"half": arms["half"]}, "books", tmp_path) is None


def test_hours_and_losses_are_of_the_rows_that_have_them(tmp_path):
    run = run_in(tmp_path)
    lines = ["step,tokens,loss,tokens_per_second,processor_seconds", "1,7200,9.0,2,1800", "2,10800,,5,", "3,14400,3.0,,5400"]
    (tmp_path / "results" / "training.csv").write_text("\n".join(lines) + "\n")
    assert value("training/loss", run).tolist() == [3.0]
    assert value("training/hours", run).tolist() == [1.0]  # 7200 tokens at two a second; the third has no rate
    assert value("training/processor_hours", run).tolist() == [2.0]
    rows = [f"{n},{n},{float(n)},1," for n in range(1, 31)]
    (tmp_path / "results" / "training.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    assert value("training/loss", run).tolist() == [29.0]  # of 28, 29 and 30


def test_an_arm_whose_seeds_measured_unlike_documents_has_no_table(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "value", lambda _, run: np.zeros(run.seed))
    runs = [run_in(tmp_path, "a", seed) for seed in (1, 2)]
    assert measured.table(measure("watched/x"), runs, ["a"], [1, 2]) == {}


def test_curves_of_arms_are_means_over_seeds_depths_and_fortieths(tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(drawn, "_curves", lambda curves, path, **more: made.update({path.name: (curves, more)}))
    arms = {"a": [run_in(tmp_path / "a1", "a", 1), run_in(tmp_path / "a2", "a", 2)], "none": [run_in(tmp_path / "n", "none")]}
    for number, run in enumerate(arms["a"]):
        rows = [f"{n},{n * 10},{n + 100 * number}" for n in range(1, 83 + number)]
        (run.folder / "results" / "training.csv").write_text("\n".join(["step,tokens,loss", *rows]) + "\n")
    drawn.training_section(arms, tmp_path)
    curve = made["training_curve"][0]["a"]
    assert list(made["training_curve"][0]) == ["a"]
    parts = np.array_split(np.arange(1, 83), 40)  # of the steps that all seeds have
    assert curve[:, 0].tolist() == [part[-1] * 10 for part in parts]
    assert curve[:, 1] == pytest.approx([part.mean() + 50 for part in parts])
    results = {
        "a1": [(256, 0.0, 1.0), (256, 0.5, 0.5), (512, 0.0, float("nan"))],
        "a2": [(256, 0.0, 0.0), (512, 0.0, 0.25)],
        "n": [],
    }

    def last(run):
        if not results[run.folder.name]:
            return None
        result = blank_result("m")
        result.probes.extend(probe(length, score) for length, _, score in results[run.folder.name])
        result.probes.append(probe(256, 1.0, kind="code"))
        return result

    monkeypatch.setattr(drawn, "last_result", last)
    drawn.retrieval_section(arms, "passkey", tmp_path)
    curves, more = made["passkey_curve"]
    assert {arm: points.tolist() for arm, points in curves.items()} == {"a": [[256, 0.5], [512, 0.25]]}
    assert (more["heading"], more["log"], more["y"]) == ("Passkey by length", True, "score")


def test_curves_have_a_table_of_all_their_places(tmp_path):
    curves = {"a": np.array([[1024.0, 1.5], [256.0, 2.0]]), "b": np.array([[2048.0, 1.0]])}
    section = drawn._curves(curves, tmp_path / "x_curve", heading="H", x="tokens", y="score", note="N", log=True)
    table = [["arm", "256", "1,024", "2,048"], ["a", "2.0000", "1.5000", "–"], ["b", "–", "–", "1.0000"]]
    assert section.table == table
    assert list(csv.reader((tmp_path / "x_curve.csv").open())) == table
    assert section.figures == [tmp_path / "x_curve.png"]
    plain = drawn._curves(curves, tmp_path / "y", heading="H", x="t", y="score", note="N")
    assert (list(plain.table), plain.heading, plain.note) == ([], "H", "N")
    assert drawn._curves({}, tmp_path / "z", heading="H", x="t", y="s", note="N") is None
