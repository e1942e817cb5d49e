"""The page of an evaluation: what it says, and that it never outgrows what can be read."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from nemo_longctx.eval.position import PositionLosses, uniform_edges
from nemo_longctx.eval.probe_scores import ProbeRow
from nemo_longctx.eval.results import blank_result
from nemo_longctx.eval.truncation import TruncationRecord
from nemo_longctx.report.evaluation import read_results, spread, write_results


def evaluation(name, level, law=True):
    """A result whose losses follow the law of a model that gains from context, or fall at once and stay."""
    rng, result = np.random.default_rng(0), blank_result(name)
    context = np.arange(1, 513)
    losses = level + ((25.4 / context) ** 0.45 if law else np.where(context < 9, 3.0, 0.0))
    totals = PositionLosses(uniform_edges(512, 32))
    totals.add(losses + rng.normal(0, 0.05, (12, 1)) + rng.normal(0, 0.01, (12, 512)))
    sums, counts = totals.by_document()
    result.position["position_512"] = totals.rows(name)
    result.documents["position_512"] = {"edges": totals.edges.tolist(), "sums": sums.tolist(), "counts": counts.tolist()}
    result.watched["loss_position_512"] = (sums.sum(1) / counts.sum(1)).tolist()
    for length in (256, 512):
        for depth in (0.0, 1.0):
            cell = {"model": name, "length": length, "samples": 2, "skipped": 0, "answer_loss": 2.0}
            result.probes.append(ProbeRow(kind="needle", depth=depth, score=1.0 if length == 256 else 0.5, **cell))
    return result


def test_the_page_says_what_was_found(tmp_path):
    before, after = evaluation("step 0", 1.56), evaluation("step 9", 1.66)
    after.tasks["longctx_qmsum"] = {"rouge_geo": 0.25, "cut": 1, "not_scored": 1}
    cut = TruncationRecord(task="longctx_qmsum", doc_id=3, policy="left", tokens=90, removed=40, lost=("question",))
    after.truncations.append(cut)
    after.errors["longctx_qasper"] = "ConfigError: no data"
    page = write_results(tmp_path, [before, after], provenance={"seed": 7}).read_text(encoding="utf-8")
    told = ("Context scaling law", "+0.1000", "rouge_geo", "longctx_qasper: ConfigError: no data", "&quot;seed&quot;: 7")
    assert [said for said in told if said not in page] == []
    assert page.count("data:image/png;base64,") == 4  # losses, law, and two of probes
    with (tmp_path / "truncations.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {
        "model": "step 9", "task": "longctx_qmsum", "doc_id": "3", "policy": "left", "tokens": "90", "removed": "40",
        "lost": "question",
    }  # fmt: skip
    assert read_results(tmp_path) == [before, after]


def test_files_of_an_earlier_evaluation_do_not_stay_beside_the_new(tmp_path):
    before = evaluation("a", 1.5)
    before.tasks["longctx_qmsum"] = {"rouge_geo": 0.25}
    before.truncations.append(TruncationRecord(task="t", doc_id=3, policy="left", tokens=90, removed=40, lost=()))
    write_results(tmp_path, [before], provenance={})
    (tmp_path / "mine.csv").write_text("a user's own")
    made = {path.name for path in tmp_path.iterdir()}
    assert {"tasks.csv", "truncations.csv", "probes.csv", "probes_score.png", "loss_by_position_512.png"} <= made
    assert "“cut” counts samples whose prompt was shortened" in (tmp_path / "index.html").read_text(encoding="utf-8")
    after = blank_result("b")
    after.tasks["longctx_qasper"] = {"f1": 0.5}
    write_results(tmp_path, [after], provenance={})
    assert {path.name for path in tmp_path.iterdir()} == {"tasks.csv", "mine.csv", "results.json", "index.html"}
    write_results(tmp_path, [before], provenance={})
    assert {path.name for path in tmp_path.iterdir()} == made


def test_results_are_json_that_every_reader_knows(tmp_path):
    result = evaluation("a", 1.5)
    result.tasks["longctx_qasper"] = {"f1": math.nan}
    result.watched["longctx_qasper/f1"] = [math.nan, 1.0]
    result.probes.append(replace(result.probes[0], depth=0.5, score=math.nan))
    result.truncations.append(TruncationRecord(task="t", doc_id=None, policy="left", tokens=90, removed=40, lost=()))
    write_results(tmp_path, [result], provenance={"limit": math.inf})

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    (back,) = read_results(tmp_path)
    assert math.isnan(back.tasks["longctx_qasper"]["f1"])
    assert math.isnan(back.probes[-1].score)
    assert math.isnan(back.watched["longctx_qasper/f1"][0])
    assert back.truncations == result.truncations


def test_losses_that_follow_no_law_get_none(tmp_path):
    page = write_results(tmp_path, [evaluation("a", 1.5, law=False)], provenance={}).read_text(encoding="utf-8")
    assert "Context scaling law" not in page


def test_why_no_law_is_drawn_is_told_once_for_all(tmp_path):
    """Each evaluation of a run repeated the sentence: a page of them on a phone."""
    results = [evaluation(f"step {n}", 2.0) for n in range(5)]
    for result in results:  # of two bins
        rows = result.documents["position_512"]
        rows["edges"] = rows["edges"][:3]
        rows["sums"], rows["counts"] = ([row[:2] for row in rows[key]] for key in ("sums", "counts"))
    why = "it needs 2 documents and 4 contexts, here are 12 and 2."
    page = write_results(tmp_path, results, provenance={}).read_text(encoding="utf-8")
    assert page.count(why) == 1
    assert "No law L(c) is drawn: not fitted: " + why in page


@pytest.mark.parametrize("count", [1, 12])
def test_many_evaluations_stay_readable(tmp_path, count):
    from matplotlib import image

    results = [evaluation(f"step {n}", 2 - 0.01 * n) for n in range(count)]
    page = write_results(tmp_path, results, provenance={}).read_text(encoding="utf-8")
    assert f"step {count - 1}" in page
    assert image.imread(tmp_path / "probes_score.png").shape[1] <= 2400  # pixels
    with (tmp_path / "loss_by_position_512.csv").open(newline="") as file:
        assert len({row["model"] for row in csv.DictReader(file)}) == count


def test_spread_keeps_the_ends():
    assert spread(list("abc"), 4) == list("abc")
    assert spread([str(n) for n in range(30)], 4) == ["0", "10", "19", "29"]


def test_ruler_has_a_table_of_its_own_and_empty_cells_their_reason(tmp_path):
    def row(kind, length, score, reason=""):
        samples = int(score == score)
        return ProbeRow(
            model="m", kind=kind, length=length, depth=0.0, score=score, answer_loss=1.0, samples=samples, skipped=1 - samples,
            reason=reason,
        )  # fmt: skip

    nan = math.nan
    cells = [row("ruler_vt", 4096, 1.0), row("ruler_vt", 8192, 0.9), row("ruler_cwe", 4096, 0.8), row("ruler_cwe", 8192, nan)]
    cells += [row("ruler_qa_1", n, nan, "needs question answering data") for n in (4096, 8192)]
    result = replace(blank_result("m"), probes=cells)
    page = write_results(tmp_path, [result], provenance={}).read_text(encoding="utf-8")
    assert "<td>average</td><td>90.0</td><td>–</td>" in page
    assert "4,096 (2 of 13 tasks)" in page
    assert "<td>ruler qa 1</td><td>4,096</td><td>m</td><td>needs question answering data</td>" in page
    assert "<td>ruler cwe</td><td>8,192</td><td>m</td><td>it is longer than the model reads</td>" in page
    scalars = result.scalars()
    assert scalars["ruler/4096/average"] == pytest.approx(0.9)
    assert "ruler/8192/average" not in scalars
    assert (scalars["ruler/effective_length"], scalars["ruler/tasks"]) == (4096, 2)
    nothing = replace(blank_result("m"), probes=[row("ruler_qa_1", 4096, nan, "needs data")])
    assert "no average" in write_results(tmp_path, [nothing], provenance={}).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["needle", "passkey", "first_sentence", "variable_tracking", "ruler_vt", "mrcr_2"])
def test_a_logger_s_names_have_the_depth_where_a_probe_has_one(kind):
    rows = [
        ProbeRow(model="m", kind=kind, length=4096, depth=depth, score=score, answer_loss=2.0, samples=samples, skipped=0)
        for depth, score, samples in ((0.0, 0.5, 1), (0.25, 0.75, 1), (1.0, 0.1, 0))
    ]
    scalars = replace(blank_result("m"), probes=rows).scalars()
    depths = ["/0.00", "/0.25"] if kind in ("needle", "passkey") else [""]
    assert {name for name in scalars if name.startswith(f"{kind}/4096")} == {
        f"{kind}/4096{depth}/{what}" for depth in depths for what in ("score", "answer_loss")
    }
