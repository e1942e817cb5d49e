"""Generation to a file: what is asked, what comes out, and that `compare` reads it."""

import io
import json

import pytest
from published import STORY
from tiny_models import byte_tokenizer, tiny_llama

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.eval import generation
from nemo_longctx.instruct.compare import compare_files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = byte_tokenizer([STORY])
    tiny_llama(vocab=len(tokenizer), length=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_answers_are_what_compare_reads(checkpoint, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "a", "prompt": "Where was the key?"}, {"prompt": "Where was Anna?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["generate", checkpoint, "--prompts", str(prompts), "--max-new-tokens", "5"]
    assert main(command) == 0
    assert main([*command, "--temperature", "1.0", "--seed", "3", "--out", str(tmp_path / "b.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "prompts.answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in answers] == ["a", "2"]
    assert all(row["completion_tokens"] <= 5 and row["finish_reason"] in ("stop", "length") for row in answers)
    assert "2 answers" in capsys.readouterr().out
    pairs = compare_files(tmp_path / "prompts.answers.jsonl", tmp_path / "b.jsonl", seed=1).pairs
    assert {pair.prompt for pair in pairs} == {row["prompt"] for row in rows}


def test_a_talk_on_the_terminal(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Where was the key?\n\n" + "x" * 200 + "\nAnd Anna?\n"))
    assert main(["chat", checkpoint, "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) >= 2
    assert "has 200 tokens and is given 4 more, but the model reads 128" in said.err


def test_an_answer_gets_what_a_short_model_leaves(checkpoint, monkeypatch, capsys):
    """Without an option each turn was refused: 512 tokens do not fit a model that reads 128."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Where was the key?\n\n" + "x" * 200 + "\n"))
    assert main(["chat", checkpoint]) == 0
    said = capsys.readouterr()
    assert said.out.strip()
    assert said.err.count("--prompts=") == 1
    assert "has 200 tokens, and the model reads 128" in said.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}\n', "two prompts have the id '1'"),
        ('{"text": "x"}\n', r"p\.jsonl:1.*is no row"),
        ("\n{x\n", r"p\.jsonl:2.*is not JSON"),
        ("\n", "holds no prompt"),
    ],
)
def test_bad_prompts_are_named_by_file_and_line(text, said, tmp_path):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=said):
        generation.read_prompts(tmp_path / "p.jsonl")


def test_stops_end_an_answer_and_are_left_out():
    tokenizer = byte_tokenizer([STORY], vocab=258)
    sampling = generation.Sampling(stop=("\nQ:",))
    made = tokenizer.encode("It was.\nQ: more")
    stop = generation.ending(tokenizer, sampling.stop)
    assert [stop(made[:n]) for n in range(1, len(made))].index(True) == len(tokenizer.encode("It was.\nQ:")) - 1
    row = generation.answer({"id": "1", "prompt": "?"}, [1], made, tokenizer, sampling)
    assert (row["response"], row["finish_reason"]) == ("It was.", "stop")


def test_a_chat_template_asks_as_a_user():
    tokenizer = byte_tokenizer([STORY])
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    tokens = generation.prompt_tokens({"id": "1", "prompt": "Hi"}, tokenizer, template=template, system="Be brief.")
    assert tokenizer.decode(tokens) == "[system]Be brief.[user]Hi[assistant]"
    with pytest.raises(ConfigError, match="no chat template"):
        generation.prompt_tokens({"id": "1", "messages": [{"role": "user", "content": "Hi"}]}, tokenizer, template=None)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--max-new-tokens", "0", "--max-new-tokens=0: give at least 1"),
        ("--temperature", "-0.1", "temperature=-0.1: give 0 for greedy"),
        ("--top-p", "0", "top_p=0.0: give a share above 0"),
        ("--top-p", "1.01", "top_p=1.01: give a share above 0"),
        ("--top-k", "-1", "top_k=-1: give 0 for no limit"),
    ],
)
def test_options_are_refused_before_a_model_is_opened(option, value, said, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("What?\n")
    assert main(["generate", str(tmp_path / "no model"), "--prompts", str(tmp_path / "p.txt"), option, value]) == 2
    assert said in capsys.readouterr().err


def test_an_answer_ends_with_the_text_s_end_or_its_tokens():
    tokenizer = byte_tokenizer([STORY], vocab=258)
    made = tokenizer.encode("It was.")
    row = {"id": "1", "messages": [{"role": "user", "content": "Où?"}]}
    for tokens, how in ((made, "length"), ([*made, tokenizer.eos_token_id], "stop")):
        found = generation.answer(row, [1, 2], tokens, tokenizer, generation.Sampling())
        assert (found["response"], found["finish_reason"], found["prompt_tokens"]) == ("It was.", how, 2)
        assert found["completion_tokens"] == len(tokens)
        assert json.loads(found["prompt"]) == row["messages"]
        assert "Où" in found["prompt"]
