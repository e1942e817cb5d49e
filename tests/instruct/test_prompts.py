"""Prompts are files with checked holes, and replies are parsed strictly."""

import re

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.instruct.prompts import HOLES, FormError, PromptSet, parse_pair, parse_verdict


def test_every_prompt_ships_and_fills():
    prompts = PromptSet.load()
    for name, holes in HOLES.items():
        filled = prompts.fill(name, **{hole: f"<<{hole}>>" for hole in holes})
        assert all(f"<<{hole}>>" in filled for hole in holes)


def test_braces_of_a_document_survive():
    filled = PromptSet.load().fill("train_normal", document="{question} {x} \\1", question="{document}?")
    assert "{question} {x} \\1" in filled
    assert "Question: {document}?" in filled


def test_own_file_replaces_one_prompt_and_changes_the_version(tmp_path):
    (tmp_path / "train_short.txt").write_text("{document}\n\nIn few words: {question}")
    own, shipped = PromptSet.load(tmp_path), PromptSet.load()
    assert own.fill("train_short", document="D", question="Q") == "D\n\nIn few words: Q"
    assert own.texts["critique"] == shipped.texts["critique"]
    assert own.version != shipped.version


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("train_shrot", "{document} {question}", "train_short"),
        ("train_short", "{document}", "has no {question}"),
        ("train_short", "{document} {question} {anwser}", "unknown hole"),
    ],
)
def test_wrong_prompt_files_are_named(tmp_path, name, text, said):
    (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(ConfigError, match=said):
        PromptSet.load(tmp_path)


@pytest.mark.parametrize(("size", "shown"), [(40, "x" * 40), (41, "x" * 37 + "...")])
def test_a_wrong_prompt_is_shown_by_its_head(tmp_path, size, shown):
    (tmp_path / "train_short.txt").write_text("x" * size)
    with pytest.raises(ConfigError, match=re.escape(f"='{shown}': ")):
        PromptSet.load(tmp_path)


def test_folder_without_prompts_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \.txt"):
        PromptSet.load(tmp_path)


def test_pair_in_form():
    text = "Sure.\n<question> What?\nWhen? </question>\n<answer>a < b</answer> done"
    assert parse_pair(text) == ("What?\nWhen?", "a < b")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("What? This.", "no_tags"),
        ("<question>What?</question>", "missing_answer"),
        ("<question>What?</question><answer> \n</answer>", "empty_answer"),
        ("<question>a</question><question>b</question><answer>c</answer>", "repeated_question"),
        ("<question>What?<answer>This.</answer></question>", "nested_tags"),
        ("</question>What?<question><answer>This.</answer>", "nested_tags"),
    ],
)
def test_pair_out_of_form(text, reason):
    with pytest.raises(FormError) as error:
        parse_pair(text)
    assert error.value.reason == reason


def test_verdicts():
    assert parse_verdict("<reason>Stated.</reason><verdict> Correct. </verdict>") == (True, "Stated.")
    assert parse_verdict("<verdict>incorrect</verdict><reason>Wrong year.</reason>") == (False, "Wrong year.")
    with pytest.raises(FormError, match="unknown_verdict"):
        parse_verdict("<reason>Stated.</reason><verdict>not correct</verdict>")


@pytest.mark.parametrize(
    "text",
    [
        "<think>Shall I? <question>no</question></think>\n<question>What?</question><answer>This.</answer>",
        "Shall I? </think><question>What?</question><answer>This.</answer>",  # the server keeps the opening tag back
        "<Question>What?</QUESTION>\n<Answer>This.</answer>",
        "<question>What?</question>\n<answer>This.",
        "< question >What?</question ><answer>This.</answer>",
    ],
)
def test_replies_of_other_peoples_models_are_read(text):
    assert parse_pair(text) == ("What?", "This.")


def test_nothing_but_thoughts_is_no_reply():
    with pytest.raises(FormError, match="no_tags"):
        parse_pair("<think><question>What?</question><answer>This.</answer>")
