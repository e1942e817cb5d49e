"""The user's labelled texts: what is taken, and each mistake by its row."""

import json

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.question_data import Question, read_labelled, read_questions

GOOD = [{"text": f"text {n}", "label": n % 2} for n in range(4)]


def folder_of(path, rows):
    (path / "icl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_are_kept_by_label_each_once(tmp_path):
    assert read_labelled(tmp_path) == {}
    found = read_labelled(folder_of(tmp_path, [*GOOD, GOOD[1], {"text": "alone", "label": "x"}]))
    assert found == {"0": ["text 0", "text 2"], "1": ["text 1", "text 3"], "x": ["alone"]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a"}], "row 1 is no"),
        ([*GOOD, {"label": "a"}], "row 5 is no"),
        ([GOOD[0], {"text": 3, "label": "a"}], "row 2 is no"),
        ([GOOD[0], ["text", "label"]], "row 2 is no"),
        (GOOD[:3], "needs two labels with two texts each"),
        ([*GOOD[:3], GOOD[1]], "needs two labels with two texts each"),
    ],
)
def test_a_row_that_is_none_is_named_by_its_number(rows, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        read_labelled(folder_of(tmp_path, rows))


def asked(text, answers, holds, near=()):
    return Question(query=text, answers=answers, holds=holds, near=near)


def test_each_layout_gives_its_questions_answers_and_documents(tmp_path):
    squad = [
        {"paragraphs": [
            {"context": "one", "qas": [
                {"question": "a?", "answers": [{"text": "x"}, {"text": "y"}]},
                {"question": "b?", "answers": [{"text": "z"}], "is_impossible": True},
                {"question": "c?", "answers": []},
            ]},
            {"context": "two", "qas": [{"question": "d?", "answers": [{"text": "w"}], "is_impossible": False}]},
            {"context": "one", "qas": []},
        ]},
        {"context": "three", "question": "e?", "answers": {"text": ["v"], "answer_start": [0]}},
        {"context": "two", "question": "f?", "answers": {"text": []}},
        {"context": {"title": ["T", "U"], "sentences": [["s1.", " s2."], ["s3."]]}, "question": "g?", "answer": "yes"},
        {"context": [["T", ["s1.", " s2."]], ["V", ["s4."]]], "question": "h?", "answers": ["u", 7]},
    ]  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps({"data": squad}))
    found = read_questions(tmp_path, "squad")
    assert found.documents == ["one", "two", "three", "T\ns1. s2.", "U\ns3.", "V\ns4."]
    assert found.questions == [
        asked("a?", ["x", "y"], (0,), (1,)), asked("d?", ["w"], (1,), (0, 0)), asked("e?", ["v"], (2,)),
        asked("g?", ["yes"], (3, 4)), asked("h?", ["u", "7"], (3, 5)),
    ]  # fmt: skip
    (tmp_path / "hotpotqa.jsonl").write_text("\n" + json.dumps(squad[3]) + "\n\n" + json.dumps(squad[4]) + "\n")
    assert [one.query for one in read_questions(tmp_path, "hotpotqa").questions] == ["g?", "h?"]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(squad[3]))  # one row, and this name goes first
    assert [one.query for one in read_questions(tmp_path, "hotpotqa").questions] == ["g?"]
    (tmp_path / "hotpotqa.json").write_text(json.dumps([squad[3], {"context": "x"}]))
    with pytest.raises(ConfigError, match=r"hotpotqa\.json.*row 2 is neither SQuAD's nor HotpotQA's \(KeyError: 'answers'\)"):
        read_questions(tmp_path, "hotpotqa")
    (tmp_path / "hotpotqa.json").write_text('\n{"context": 1}\n{x\n')
    with pytest.raises(ConfigError, match=r"hotpotqa\.json:3.*is not JSON"):
        read_questions(tmp_path, "hotpotqa")
    with pytest.raises(ConfigError, match=r"holds none of squad\.json, squad\.jsonl"):
        read_questions(tmp_path / "none", "squad")
