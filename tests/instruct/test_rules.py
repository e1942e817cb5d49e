"""Rules as the one who answers: what they ask has its answer in the text, and their verdict tells right pairs from wrong."""

import asyncio
import json
from pathlib import Path

import pytest
from stories import jsonl, story

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.instruct.client import Call
from nemo_longctx.instruct.output import check_folder, said
from nemo_longctx.instruct.pipeline import GenerateConfig
from nemo_longctx.instruct.prompts import KINDS, FormError, PromptSet, parse_pair, parse_verdict
from nemo_longctx.instruct.rules import Rules, records

RECORDS = (
    "Some text.\nThe number for bade is 12345.\nbade = 12345\nkufi: 54321;\n"
    "more text\nThe code of lame is 11111.\nlame = 22222\n"
)


def ask(prompt, seed=1):
    call = Call(model="rules", prompt=prompt, max_tokens=9, temperature=0, seed=seed, attempt=0)
    return asyncio.run(Rules().complete(call)).text


def test_a_record_told_twice_with_different_values_is_not_asked_for():
    assert records(RECORDS) == {"bade": "12345", "kufi": "54321"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [RECORDS, story(1, 20)])
def test_answers_stand_in_the_part_and_the_verdict_knows(kind, part):
    prompts = PromptSet.load()
    for seed in range(20):
        reply = ask(prompts.fill(f"question_{kind}", chunk=part), seed)
        assert reply == ask(prompts.fill(f"question_{kind}", chunk=part), seed)
        question, answer = parse_pair(reply)
        said = answer.removesuffix(".").split()[-1] if answer.startswith("The number for") else answer
        assert said in " ".join(part.split())
        assert parse_verdict(ask(prompts.fill("critique", chunk=part, question=question, answer=answer)))[0]
        assert not parse_verdict(ask(prompts.fill("critique", chunk=part, question=question, answer="never told")))[0]


def test_too_short_a_part_is_out_of_form():
    with pytest.raises(FormError):
        parse_pair(ask(PromptSet.load().fill("question_short", chunk="four words are few")))


def test_the_generator_takes_rules_and_no_words_that_they_cannot_read(tmp_path, tokenizer_folder, capsys):
    documents = jsonl(tmp_path / "documents.jsonl", [story(seed, 40) + RECORDS for seed in range(3)])
    command = ["instruct", "generate", str(documents), "--rules", "--output", str(tmp_path / "out"), "--target-length", "4096"]
    command += ["--tokenizer", str(tokenizer_folder), "--chunk-tokens", "128"]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/instances.jsonl").read_text().splitlines()]
    assert len(rows) >= 5
    for row in rows:
        assert row["provenance"]["model"] == "rules"
        prompt, answer = (message["content"] for message in row["messages"])
        assert answer.startswith("The number for") or answer in " ".join(prompt.split())
    assert main([*command, "--prompts", str(tmp_path)]) == 2
    assert "rules read the shipped prompts alone" in capsys.readouterr().err


def test_words_follow_words_where_no_record_is_told():
    ask_normal = PromptSet.load().fill("question_normal", chunk="{part}")
    nine = "one two three four five six seven eight nine"
    assert ask(ask_normal.replace("{part}", nine)).startswith(
        "<question>Which words follow “one two three four five”?</question>"
    )
    assert "<answer>six seven eight nine</answer>" in ask(ask_normal.replace("{part}", nine))
    assert "<question></question>" in ask(ask_normal.replace("{part}", nine.removesuffix(" nine")))
    ten = {ask(ask_normal.replace("{part}", f"{nine} ten"), seed) for seed in range(20)}
    assert len(ten) == 2  # begun at the first or the second
    record = "The number for bade is 12345."
    assert "<answer>The number for bade is 12345.</answer>" in ask(ask_normal.replace("{part}", record))
    short = PromptSet.load().fill("question_short", chunk=record)
    assert ask(short) == "<question>What is the number for bade?</question>\n<answer>12345</answer>"


def test_documents_without_an_id_are_named_by_their_line(tmp_path, tokenizer_folder):
    lines = ["", *(json.dumps({"text": story(seed, 12) + RECORDS}) for seed in range(2))]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines) + "\n")
    command = ["instruct", "generate", str(tmp_path / "documents.jsonl"), "--rules", "--output", str(tmp_path / "out")]
    command += ["--target-length", "2048", "--tokenizer", str(tokenizer_folder), "--chunk-tokens", "128"]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "instances.jsonl").read_text().splitlines()]
    assert {row["provenance"]["document_id"] for row in rows} == {"2", "3"}


def test_what_other_settings_made_is_replaced_only_by_force(tmp_path, tokenizer_folder, capsys, monkeypatch):
    """A second command in the folder put other instances in the place of those that a run may be reading."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "documents.jsonl", [story(seed, 40) + RECORDS for seed in range(2)])
    base = ["instruct", "generate", "documents.jsonl", "--rules", "--output", "out", "--tokenizer", str(tokenizer_folder)]
    base += ["--target-length", "4096"]
    command, other = [*base, "--chunk-tokens", "128"], [*base, "--chunk-tokens", "64", "--seed", "5"]
    assert main(command) == 0
    made = (tmp_path / "out" / "instances.jsonl").read_bytes()
    capsys.readouterr()
    assert main(other) == 2
    told = capsys.readouterr().err
    assert "--output='out': was made with another chunk_tokens and another seed; name another folder, or replace it" in told
    assert (tmp_path / "out" / "instances.jsonl").read_bytes() == made
    assert main([str(tmp_path / "documents.jsonl") if word == "documents.jsonl" else word for word in command]) == 0
    assert main([*other, "--force"]) == 0
    assert (tmp_path / "out" / "instances.jsonl").read_bytes() != made
    (tmp_path / "out" / "report.json").unlink()  # as after a kill before it is written
    assert main(command) == 0
    assert (tmp_path / "out" / "instances.jsonl").read_bytes() == made


@pytest.mark.parametrize("name", ["instances.jsonl", "report.json"])
def test_what_another_hand_wrote_is_not_written_over(tmp_path, tokenizer_folder, capsys, name):
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 40) + RECORDS])
    (tmp_path / name).write_text("{}")
    command = [
        "instruct",
        "generate",
        str(documents),
        "--rules",
        "--output",
        str(tmp_path),
        "--tokenizer",
        str(tokenizer_folder),
    ]
    assert main(command) == 2
    assert f"{name} is there, and of no run of this command; name another folder" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "{}"
    assert main([*command, "--force"]) == 0


def test_each_setting_and_the_words_are_compared(tmp_path):
    config = GenerateConfig(documents=Path("d"), model="m", tokenizer="t")
    report = {"yield": {}, "prompt_version": "v", "settings": said(config)}
    for key in said(config):
        before = report | {"settings": report["settings"] | {key: "another"}}
        (tmp_path / "report.json").write_text(json.dumps(before))
        with pytest.raises(ConfigError, match=f"was made with another {key};"):
            check_folder(tmp_path, config, prompts="v")
    (tmp_path / "report.json").write_text(json.dumps(report))
    check_folder(tmp_path, config, prompts="v")
    with pytest.raises(ConfigError, match="another prompts"):
        check_folder(tmp_path, config, prompts="w")
