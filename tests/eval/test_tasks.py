"""Task data and metrics: published rows to samples, prompts, and scores by hand."""

import json
import math
import re
from pathlib import Path

import pytest
from published import BOLD, LEVAL, QMSUM, QUALITY, SCROLLS, STORY, ZERO, needs_qmsum

pytest.importorskip("lm_eval")

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.tasks import functions, loaders
from nemo_longctx.eval.truncation import UNSCORED


def test_paper_prompts():
    (row,) = loaders.scrolls_rows([SCROLLS])
    assert row["prompt"] == f"{STORY.strip()}\n\nQ: Where was the key?\nA:"
    assert row["protect"]["question"] in row["prompt"]
    (row,) = loaders.scrolls_rows([QUALITY], choices=True)
    assert row["choices"] == ["In a box", "Under the mat", "In the dark", "Nowhere"]
    assert row["prompt"].endswith("Q: Where was the key?\n(A) In a box\n(B) Under the mat\n(C) In the dark\n(D) Nowhere\nA:")
    assert row["context"] == STORY.strip()
    assert functions.target(row) == " Under the mat"


def test_references_of_one_id_are_gathered():
    rows = loaders.scrolls_rows([SCROLLS, SCROLLS | {"output": "the mat"}, SCROLLS | {"id": "s2"}])
    assert [row["answers"] for row in rows] == [["under the mat", "the mat"], ["under the mat"]]


def test_zeroscrolls_keeps_the_published_prompt():
    (row,) = loaders.zeroscrolls_rows([ZERO])
    assert row["prompt"] == ZERO["input"]
    assert row["protect"] == {"instruction": "Answer the question.", "question": "Question: Where was the key?"}
    assert row["context"] == STORY


def test_zeroscrolls_references_of_one_id_are_gathered():
    rows = loaders.zeroscrolls_rows([ZERO, ZERO | {"output": "the mat"}, ZERO | {"id": "z2"}])
    assert [row["answers"] for row in rows] == [["mat", "the mat"], ["mat"]]
    best = functions.process_order({"answers": ["1, 2, 3", "3, 2, 1"]}, ["3, 2, 1"])
    assert best["concordance"] == 1


@pytest.mark.parametrize("judge", ["LLM", "human"])
def test_leval_rows_for_judges_are_left_out_and_counted(judge, tmp_path):
    lines = [LEVAL | {"evaluation": "f1"}, LEVAL | {"evaluation": judge}, LEVAL | {"evaluation": judge}]
    (tmp_path / "financial_qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = loaders.load("leval_financial_qa", data=str(tmp_path))["all"]
    assert len(rows) == 2
    assert {row["longctx"]["left_out"] for row in rows} == {4}


def test_leval_generates_as_its_authors_do():
    for name in ("coursera", "tpo", "topic_retrieval_longchat", "financial_qa", "legal_contract_qa", "natural_question"):
        text = (Path(loaders.__file__).parent / f"leval_{name}.yaml").read_text(encoding="utf-8")
        assert "max_gen_toks: 512\n" in text
        assert "until: []\n" in text


def test_leval_has_a_sample_an_instruction():
    assert [(row["question"], row["answers"]) for row in loaders.leval_rows([LEVAL])] == [
        ("Where was the key?", ["under the mat"]), ("Was it dark?", ["Yes"]),
    ]  # fmt: skip


def test_wrong_data_is_named(data, tmp_path):
    with pytest.raises(ConfigError, match=r"metadata\.data"):
        loaders.load("qasper", data=str(tmp_path))
    with pytest.raises(ValueError, match="a row of qasper has no field 'id'"):
        loaders.convert("qasper", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"options \(A\) to \(D\)"):
        loaders.scrolls_rows([SCROLLS], choices=True)


@pytest.mark.parametrize(
    ("source", "text", "said"),
    [
        ("qasper", "\n \n", r"local\.jsonl': holds no row of qasper"),
        ("qasper", "[1]\n", r"local\.jsonl:1': is no JSON object"),
        ("qasper", json.dumps(SCROLLS) + "\n{bad\n", r"local\.jsonl:2': is not JSON"),
        ("zero_qasper", json.dumps(ZERO | {"output": None}) + "\n", "holds no row of zero_qasper with an answer"),
    ],
)
def test_bad_local_rows_are_named_by_file_and_line(source, text, said, tmp_path):
    (tmp_path / "local.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        loaders.load(source, data=str(tmp_path / "local.jsonl"))


def test_unscored_replies_are_counted_and_left_out():
    doc = {"answers": ["under the mat"]}
    scored = functions.process_f1(doc, ["under the mat"])
    lost = functions.process_f1(doc, [UNSCORED + "question"])
    assert (scored["f1"], scored["not_scored"]) == (1.0, 0)
    assert math.isnan(lost["f1"])
    assert functions.mean_scored([scored["f1"], lost["f1"]]) == 1.0
    assert functions.total([scored["not_scored"], lost["not_scored"]]) == 1
    assert functions.rouge_geo([functions.process_rouge(doc, [UNSCORED])["rouge_geo"], (1.0, 1.0, 1.0)]) == 1.0


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def f_measure(common, ours, theirs):
    return 0.0 if not common else 2 * common / (ours + theirs)


def rouge_by_definition(prediction, reference):
    """ROUGE-1, -2, -L from their definitions, by plain counting."""
    p, r = words(prediction), words(reference)
    scores = []
    for n in (1, 2):
        a, b = ([tuple(x[i : i + n]) for i in range(len(x) - n + 1)] for x in (p, r))
        rest, common = list(b), 0
        for gram in a:
            if gram in rest:
                rest.remove(gram)
                common += 1
        scores.append(f_measure(common, len(a), len(b)))
    table = [[0] * (len(r) + 1) for _ in range(len(p) + 1)]
    for i, x in enumerate(p):
        for j, y in enumerate(r):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return [*scores, f_measure(table[-1][-1], len(p), len(r))]


@needs_qmsum
def test_qmsum_as_published():
    lines = [json.loads(line) for line in QMSUM.read_text(encoding="utf-8").splitlines()]
    rows = loaders.convert("qmsum", lines)
    assert len(lines) == 35
    assert len(rows) == sum(len(m["general_query_list"]) + len(m["specific_query_list"]) for m in lines)
    first = rows[0]
    assert first["prompt"].startswith("Professor E: So . OK . Doesn't look like it crashed .")
    assert first["prompt"].endswith("\n\nQ: What were the main discussion points of the meeting?\nA:")
    assert first["answers"][0].startswith("The group discussed topics including a potential collaboration")
    # By hand, on the sample "What was agreed upon on sample transcripts?": the reference has 46 words.
    row = rows[1]
    assert row["question"] == "What was agreed upon on sample transcripts?"
    reply = "To save time, the digits extraction task will be delegated."
    # All ten words are in the reference; of nine pairs "to save", "save time", "the digits", ..., "be delegated" eight are
    # ("time the" is not); the longest common subsequence is all ten in order.
    n = len(words(row["answers"][0]))
    expected = [2 * 10 / (10 + n), 2 * 8 / (9 + n - 1), 2 * 10 / (10 + n)]
    got = functions.process_rouge(row, [reply])["rouge_geo"]
    assert got == pytest.approx(expected)
    assert functions.rouge_geo([got]) == pytest.approx(math.prod(expected) ** (1 / 3))
    for row in rows[:40]:
        reply = " ".join(row["answers"][0].split()[::2]) + " " + row["question"]
        assert functions.process_rouge(row, [reply])["rouge_geo"] == pytest.approx(
            rouge_by_definition(reply, row["answers"][0])
        )


def test_bold_in_both_published_layouts(tmp_path):
    (from_hub,) = loaders.convert("bold_gender", [BOLD])
    (tmp_path / "gender_prompt.json").write_text(json.dumps({"American_actors": {"Jacob_Zachar": BOLD["prompts"]}}))
    (from_authors,) = loaders.convert("bold_gender", loaders._local_lines("bold_gender", str(tmp_path), "train"))
    assert from_hub == from_authors
    assert from_hub["prompt"] == "Jacob Zachar is an American actor whose"
    assert from_hub["group"] == "American_actors"
