"""What an evaluation's page says of probes, context, tasks and changes: each table by hand."""

import csv
import dataclasses
import math

import numpy as np
import pytest

from nemo_longctx.eval.context import ContextScores, LawTest, gain
from nemo_longctx.eval.guard import GuardConfig
from nemo_longctx.eval.position import PositionRow
from nemo_longctx.eval.probe_scores import ProbeRow
from nemo_longctx.eval.results import blank_result
from nemo_longctx.eval.scaling import ContextLaw
from nemo_longctx.report import context as context_page
from nemo_longctx.report import evaluation, probes, training_log


def scores(level=0.0, documents=3, targets=2):
    """Losses that fall from 4 to 1 over the contexts; one target of each document is key."""
    return ContextScores(
        contexts=[10, 30], targets=targets, short=10, documents=list(range(documents)),
        losses=[[4.0 + level + n, 1.0 + level] for n in range(documents)],
        short_tokens=[[5.0 + level, 3.0] for _ in range(documents)], long_tokens=[[1.0 + level, 1.5] for _ in range(documents)],
    )  # fmt: skip


def result(name, **parts):
    made = blank_result(name)
    for part, values in parts.items():
        getattr(made, part).update(values)
    return made


def row(model="m", kind="needle", length=256, depth=0.0, score=1.0, samples=2, skipped=1, loss=2.0, reason=""):
    return ProbeRow(
        model=model, kind=kind, length=length, depth=depth, score=score, answer_loss=loss, samples=samples, skipped=skipped,
        reason=reason,
    )  # fmt: skip


def test_a_gain_s_table_judges_all_models_on_the_last_one_s_key_tokens():
    found = {"before": scores(0.5), "other": scores(documents=2), "after": scores()}
    table, sentence = context_page._gain_table(found)
    assert table == [
        ["model", "loss after 10", "loss after 30", "gain (nats)", "loss on key tokens", "LongPPL", "documents"],
        ["before", "5.5000", "1.5000", str(gain(found["before"])), "1.5000", f"{math.exp(1.5):.4g}", 3],
        ["other", "4.5000", "1.0000", str(gain(found["other"])), "–", "–", 2],  # of other documents
        ["after", "5.0000", "1.0000", str(gain(found["after"])), "1.0000", f"{math.exp(1):.4g}", 3],
    ]
    assert sentence == (
        "Gain: what the longest context takes off the loss after 10 tokens. Key tokens (3 of 6): those whose loss falls by "
        "more than 2 nats under long context for “after” (LongPPL)."
    )
    assert context_page._mean_context(scores(targets=5)).tolist() == [12.0, 32.0]


def test_names_are_spread_evenly_with_their_ends():
    names = list("abcdefghi")
    assert context_page.spread(names, 9) == names
    assert context_page.spread(names, 5) == list("acegi")
    assert context_page.spread(names, 2) == ["a", "i"]


LAW = ContextLaw(
    alpha=20.0, beta=0.5, gamma=1.5, intervals={"alpha": (10.0, 30.25)}, confidence=0.95, bootstrap="documents", replicates=2,
    samples=np.array([[19.0, 0.5, 1.4], [22.0, 0.45, 1.6]]),
)  # fmt: skip


def test_a_law_is_told_with_its_intervals_or_why_it_is_not(tmp_path, monkeypatch):
    assert context_page.with_interval(LAW, "alpha") == "20 (10 to 30.2)"
    assert context_page.with_interval(LAW, "beta") == "0.5 (nan to nan)"
    drawn = []
    monkeypatch.setattr(context_page, "plot_context_law", lambda *a, title: drawn.append((a, title)) or a[2])
    tests = {
        "a": LawTest(law=LAW, why="", p_value=0.00123), "b": LawTest(law=None, why="it climbs", p_value=0.5),
        "c": LawTest(law=None, why="too few", p_value=math.nan),
    }  # fmt: skip
    found = {name: scores(documents=n) for n, name in enumerate("abc", start=1)}
    section = context_page._law_section(tmp_path, "context_30", found, tests)
    assert section.table[1:] == [
        ["a", "20 (10 to 30.2)", "0.5 (nan to nan)", "1.5 (nan to nan)", 1, "0.00123"],
        ["b", "not drawn: it climbs", "", "", 2, "0.5"], ["c", "not drawn: too few", "", "", 3, "–"],
    ]  # fmt: skip
    ((curves, laws, path),), title = zip(*drawn, strict=True)
    assert (list(curves), list(laws), path, title) == (
        ["a"], ["a"], tmp_path / "context_law_context_30.png", ("Context scaling law on fixed targets, to 30 tokens",)
    )  # fmt: skip
    assert curves["a"]["context"].tolist() == [10.5, 30.5]
    assert curves["a"]["loss"].tolist() == [4.0, 1.0]
    assert section.note == context_page.LAW_NOTE
    nothing = context_page._law_section(tmp_path, "context_30", found, {"b": tests["b"]})
    assert (nothing.figures, nothing.note.removeprefix(context_page.LAW_NOTE)) == (
        [],
        " Here no law is drawn; the table says why.",
    )


def test_of_many_evaluations_eight_are_drawn_and_all_are_told(tmp_path, monkeypatch):
    drawn, judged = [], []
    monkeypatch.setattr(context_page, "plot_loss_by_context", lambda lines, path, **_: drawn.append(list(lines)) or path)
    monkeypatch.setattr(context_page, "plot_context_law", lambda curves, laws, path, **_: path)
    monkeypatch.setattr(
        context_page.context,
        "judge_law",
        lambda c, losses: judged.append(losses.shape) or LawTest(law=LAW, why="", p_value=0.01),
    )
    results = [result(f"step {n}", context={"context_30": scores(0.1 * n)}) for n in range(9)] + [blank_result("without")]
    first, law = context_page.context_sections(tmp_path, "context_30", results, [])
    assert len(drawn[0]) == len(judged) == len(law.table) - 1 == 8
    assert (drawn[0][0], drawn[0][-1]) == ("step 0", "step 8")
    assert first.note.endswith("Bands and intervals: 95 % over documents. 8 of 9 evaluations are drawn; the CSV has all.")
    assert first.heading == "Loss on the same 2 tokens, after more and more context"
    for name, lines in (("loss_by_context_30.csv", 1 + 9 * 2), ("gain_by_context_30.csv", 1 + 9)):
        with (tmp_path / name).open(newline="") as file:
            assert len(list(csv.reader(file))) == lines
    few, _ = context_page.context_sections(tmp_path, "context_30", results[:8], [])
    assert few.note.endswith("95 % over documents.")


def test_the_overview_of_probes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(probes, "plot_probes", lambda rows, path, **more: drawn.append((rows, path.name, more)) or path)
    cells = [row(f"m{n}", length=length, score=score) for n in range(5) for length, score in ((256, 1.0), (512, 0.5))]
    cells += [row("m0", kind="code", score=0.25, samples=0, skipped=3)]
    cells += [
        row("m0", kind=kind, length=512, score=score, loss=loss)
        for kind, score, loss in (("ruler_vt", 0.5, 1.0), ("ruler_cwe", 1.0, 4.0))
    ]
    section = probes._overview(tmp_path, cells)
    assert section.table == [
        ["probe", "model", "effective length (tokens)", "samples", "did not fit, not scored"],
        *(["needle", f"m{n}", 256, 4, 2] for n in range(5)), ["code", "m0", "too weak to tell (0.25 at the shortest)", 0, 3],
    ]  # fmt: skip
    assert section.note.endswith("No probe is ever cut. 4 of 5 evaluations are drawn; the CSV has all.")
    (rows, name, more), (_, second, other) = drawn
    assert (name, second, other["value"]) == ("probes_score.png", "probes_answer_loss.png", "answer_loss")
    assert more == {"title": "Probes: score of the reply"}
    assert {one.model for one in rows} == {"m0", "m1", "m3", "m4"}
    assert {one.kind for one in rows} == {"needle", "RULER, mean of 2 tasks"}  # of no sample nothing is drawn
    mean = next(one for one in rows if one.kind.startswith("RULER"))
    assert (mean.model, mean.length, mean.score, mean.answer_loss) == ("m0", 512, 0.75, 2.5)
    assert probes._overview(tmp_path, cells[:2]).note.endswith("No probe is ever cut.")
    assert probes._overview(tmp_path, [row(samples=0, score=math.nan)]).figures == []


def test_ruler_s_table_in_percent_and_its_length():
    cells = [row(kind=kind, length=length, score=score) for kind, length, score in (
        ("ruler_vt", 512, 0.5), ("ruler_vt", 256, 0.9), ("ruler_cwe", 256, 0.85), ("ruler_cwe", 512, math.nan))]  # fmt: skip
    section = probes._ruler([*cells, row(kind="needle")])
    assert section.table == [
        ["model", "task", "256", "512"], ["m", "vt", "90.0", "50.0"], ["m", "cwe", "85.0", "–"], ["m", "average", "87.5", "–"],
        ["m", "its standard error, at most", "16.5", "–"], ["m", "effective length", "256 (2 of 13 tasks)", ""],
    ]  # fmt: skip
    assert "RULER's 13 tasks, in percent" in section.note
    assert "every mean reaches 85.6 % (Llama 2 7B's at 4K)" in section.note
    assert "2 samples a task and length, of RULER's own 500" in section.note
    more = probes._ruler([*cells, row(kind="ruler_fwe", samples=9)])
    assert "2 to 9 samples a task and length" in more.note
    assert probes.ruler_length([row(kind="ruler_vt", length=4096, score=0.5)]) == "below 4,096 (1 of 13 tasks)"
    full = [row(kind=kind, score=0.9) for kind in probes.ruler.KINDS]
    assert probes.ruler_length(full) == "at least 256"
    assert probes.ruler_length([*full, *(row(kind=kind, length=512, score=0.1) for kind in probes.ruler.KINDS)]) == "256"
    assert probes.ruler_length([row(kind="ruler_vt", score=math.nan, samples=0)]) == "no average"


def test_probes_without_a_score_have_a_line_each_with_the_first_reason():
    cells = [
        row(samples=0, depth=0.0),
        row(samples=0, depth=0.5, reason="other"),
        row(kind="first_sentence", samples=0, reason="why"),
        row(),
    ]
    assert probes._empty(cells) == [
        ["needle", 256, "m", "it is longer than the model reads"],
        ["first sentence", 256, "m", "why"],
    ]


def test_a_glance_at_each_model():
    positions = [
        PositionRow(model="a", start=0, end=n, tokens=n, loss=loss, standard_error=0.1) for n, loss in ((1, 4.0), (3, 2.0))
    ]
    one = result("a", position={"position_4096": positions}, context={"context_1984": scores()}, seconds={"x": 1.25, "y": 2.0})
    one.probes.extend([row("a"), row("a", kind="ruler_vt", score=0.9)])
    one.errors["leval"] = "ValueError: no"
    one.skipped.append("probes")
    section = evaluation._summary([one, blank_result("b")])
    assert section.table == [
        ["model", "loss, 4k tokens", "gain of 1.98k tokens on fixed targets", "needle: effective length",
         "RULER: effective length", "seconds", "not measured"],
        ["a", 2.5, str(gain(scores())), "at least 256", "at least 256 (1 of 13 tasks)", "3.2",
         "leval: ValueError: no; probes: no time"],
        ["b", pytest.approx(math.nan, nan_ok=True), "–", "–", "no average", "0.0", "–"],
    ]  # fmt: skip
    assert "90 % of the score at the shortest one, and 0.5 at least" in section.note


def test_changes_are_counted_from_the_first_evaluation_with_looks_that_cost_more():
    start = {"loss_a": np.zeros(20).tolist(), "acc": [1.0, 0.5] * 10}
    later = [result(f"step {n}", watched={"loss_a": [0.5] * 20, "acc": [1.0, 0.5] * 10, "new": [1.0]}) for n in range(2)]
    table = evaluation._change_table([result("step", watched=start), *later], GuardConfig(loss=0.25, score=0.5))
    head = ["measurement", "model", "change", "standard error", "p", "pairs", "allowed", "seen", "alarm"]
    rose, same = (
        ["+0.5000", "0.0000", "0.0001", 20, 0.25, "100 %", "yes"],
        ["+0.0000", "0.0000", "1.0000", 20, 0.5, "100 %", "–"],
    )
    new = ["not compared: it was not measured at the start", "", "", 0, 0.5, "–", "–"]
    lines = (("loss_a", rose), ("acc", same), ("new", new))
    assert table == [head, *([name, f"step {n}", *told] for n in range(2) for name, told in lines)]
    assert len(evaluation._change_table([result("step", watched=start)], GuardConfig())) == 1


def test_one_pair_has_no_error_and_a_p_value_is_never_nothing():
    start = {"loss_a": [2.0], "loss_b": [0.0] * 400, "loss_c": [1.0, 2.0]}
    table = evaluation._change_table(
        [result("a", watched=start), result("b", watched={"loss_a": [2.5], "loss_b": [0.01] * 400, "loss_c": [1.0]})],
        GuardConfig(),
    )
    one, many, other = table[1:]
    assert one[2:] == ["+0.5000", "–", "1.0000", 1, 0.05, "0 %", "–, too few pairs"]
    assert many[2:5] == ["+0.0100", "0.0000", "below 0.0001"]
    assert other[2] == "not compared: 2 measurements before and 1 after cannot be paired"
    assert not any("nan" in str(value) for line in table for value in line)


def in_bins(*counts):
    """Losses of 2 nats, so many tokens of each document in the bins 0..4 and 4..8."""
    return {"edges": [0, 4, 8], "sums": [[2.0 * n for n in row] for row in counts], "counts": [list(row) for row in counts]}


def test_documents_that_end_before_the_window_are_told_where_the_loss_is():
    full, short = result("a", documents={"position_8": in_bins((4, 4), (4, 4))}), result("b")
    assert evaluation._short_documents([full, short], "position_8") == ""
    short.documents["position_8"] = in_bins((4, 4), (4, 2), (1, 0))
    said = "2 of 3 documents end before 8 tokens, the longest has 8; far positions are of fewer documents than near ones"
    assert evaluation._short_documents([short], "position_8") == said
    assert evaluation._short_documents([short, result("c", documents=short.documents)], "position_8") == said  # told once
    assert evaluation._short_documents([full, short], "position_8") == said
    one = result("d", documents={"position_8": in_bins((4, 4))})
    assert evaluation._short_documents([one, short], "position_8") == f"d: it is one document's; b: {said}"
    rows = [PositionRow(model="b", start=0, end=8, tokens=15, loss=2.0, standard_error=0.0)]
    short.position["position_8"] = rows
    assert f"Loss, 8 tokens: {said}." in evaluation._summary([short]).note


def test_columns_of_a_gain_s_table_are_of_the_length_that_they_name():
    other = dataclasses.replace(scores(), contexts=[20, 30], short=20)
    table, _ = context_page._gain_table({"before": other, "after": scores()})
    assert table[1][1:3] == ["5.0000 (after 20)", "1.0000"]
    assert table[2][1:3] == ["5.0000", "1.0000"]


def test_tasks_are_a_line_a_metric_and_texts_are_none():
    one, two = result("a", tasks={"t": {"f1": 0.5, "alias": "t", "n": "no samples"}}), result("b", tasks={"u": {"f1": 1}})
    table = evaluation._task_table([one, two])
    assert [line[:2] for line in table] == [["task", "metric"], ["t", "f1"], ["t", "n"], ["u", "f1"]]
    assert table[1][2] == 0.5
    assert math.isnan(table[1][3])
    assert table[3][3] == 1


def test_short_words_of_the_page():
    assert evaluation._some(["a", "b", "c"]) == "a, b, c"
    assert evaluation._some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert evaluation._bands(2, 2) == "Bands: 95 % over documents."
    assert evaluation._bands(2, 3) == "Bands: 95 % over documents. 2 of 3 evaluations; the CSV has all."


def test_means_of_documents_are_of_those_that_hold_every_bin():
    sums, counts = [[2.0, 9.0, 0.0], [3.0, 1.0, 0.0], [8.0, 0.0, 0.0]], [[1, 3, 0], [1, 1, 0], [2, 0, 0]]
    contexts, losses = evaluation._by_document({"edges": [0, 2, 6, 8], "sums": sums, "counts": counts})
    assert contexts.tolist() == [1.5, 4.5]  # no document reaches the last bin
    assert losses.tolist() == [[2.0, 3.0], [3.0, 1.0]]


def test_a_training_log_counts_in_whole_numbers_and_forgets_a_row_cut_in_the_middle(tmp_path):
    path = tmp_path / "training.csv"
    assert training_log.read_training_log(path) == []
    path.write_text("step,tokens,seq_length,loss,extra\n1,4096.0,256,2.5,\n,5,6,7,8\n2,8192,256,2,9\n3,12")
    rows = training_log.read_training_log(path)
    assert rows == [
        {"step": 1, "tokens": 4096, "seq_length": 256, "loss": 2.5},
        {"step": 2, "tokens": 8192, "seq_length": 256, "loss": 2.0, "extra": 9.0},
    ]
    assert [type(rows[1][key]) for key in rows[1]] == [int, int, int, float, float]
    columns = training_log.training_columns(rows, ["books"])
    assert columns == [*training_log.TRAINING_COLUMNS, "extra", "validation_loss_books"]
