"""Generation to a file: what is asked, what comes out, and that `compare` reads it."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from published import STORY
from tiny_models import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.eval import generation
from nemo_longctx.instruct.compare import compare_files
from nemo_longctx.instruct.local import LocalCheckpoint


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
    marked = [tokenizer.bos_token_id, *tokenizer.encode("Yes", add_special_tokens=False)]
    assert generation.answer({"id": "1", "prompt": "?"}, [1], marked, tokenizer, sampling)["response"] == "Yes"


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
        ("--top-k", "40", "--top-k=40: has no effect at --temperature 0"),
        ("--top-p", "0.9", "--top-p=0.9: has no effect at --temperature 0"),
        ("--out", ".", "--out='.': is a folder; name a file in it, say answers.jsonl"),
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


class Letters:
    """A tokenizer of characters."""

    eos_token_id = 0
    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(letter) for letter in text]

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(map(chr, tokens))

    def apply_chat_template(self, turns, *, chat_template, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        return chat_template + "".join(f"[{turn['role']}]{turn['content']}" for turn in turns)


def asked(prompts, max_length=20, **sampling):
    names = [f"p{n}" for n in range(len(prompts))]
    return generation.requests(prompts, Letters(), generation.Sampling(**sampling), names, max_length)


def test_an_answer_is_asked_with_all_its_settings_and_within_what_the_model_reads():
    one, two = asked([[1] * 3, [1] * 19])
    assert (one.context, one.max_new_tokens, two.max_new_tokens) == ([1] * 3, 17, 1)
    assert [request.max_new_tokens for request in asked([[1], [1] * 300], 700)] == [512, 400]
    (full,) = asked([[1] * 3], max_new_tokens=17, temperature=0.5, top_p=0.75, top_k=9, seed=4, stop=("ab",))
    assert (full.max_new_tokens, full.temperature, full.top_p, full.top_k, full.seed) == (17, 0.5, 0.75, 9, 4)
    assert [full.stop([97, 98, *range(65, 65 + n)]) for n in (0, 1, 2, 3)] == [True, True, True, False]  # near the end only
    assert full.stop([97, 0])
    assert not full.stop([97])
    with pytest.raises(ConfigError, match="'p1': has 20 tokens, and the model reads 20; shorten it"):
        asked([[1], [1] * 20])
    with pytest.raises(
        ConfigError, match="'p0': has 3 tokens and is given 18 more, but the model reads 20; shorten it, or lower"
    ):
        asked([[1] * 3], max_new_tokens=18)


def test_prompts_of_a_file_have_ids_and_their_words(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffone  \r\n\n two\n", encoding="utf-8")
    assert generation.read_prompts(tmp_path / "p.txt") == [{"id": "1", "prompt": "one  "}, {"id": "2", "prompt": " two"}]
    turns = [{"role": "user", "content": "Hi"}]
    rows = [{"messages": turns, "id": 7, "more": 1}, {"prompt": "x"}, {"prompt": "y", "id": "b"}, {"messages": turns}]
    (tmp_path / "p.json").write_text("\n".join(json.dumps(row) for row in rows))
    assert generation.read_prompts(tmp_path / "p.json") == [
        {"id": "7", "messages": turns}, {"id": "2", "prompt": "x"}, {"id": "b", "prompt": "y"}, {"id": "4", "messages": turns}
    ]  # fmt: skip
    wrong = [{"messages": []}, {"messages": [{"role": "user"}]}, {"messages": [{"content": "a"}]}, {"messages": ["a"]}, ["a"]]
    for row in [*wrong, {"prompt": ""}, {"prompt": 3}, {"messages": [{"role": "user", "content": None}]}]:
        (tmp_path / "p.json").write_text(json.dumps(row))
        with pytest.raises(ConfigError, match=r"p\.json:1.*is no row"):
            generation.read_prompts(tmp_path / "p.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        generation.read_prompts(tmp_path / "none.txt")


def test_a_prompt_stands_as_it_is_or_as_a_turn():
    user = {"role": "user", "content": "Hi"}
    system = {"role": "system", "content": "Own"}

    def said(row, template, **more):
        return "".join(map(chr, generation.prompt_tokens({"id": "1", **row}, Letters(), template=template, **more)))

    assert said({"prompt": "Hi"}, None) == said({"prompt": "Hi"}, None, system="S") == "\x01Hi"
    assert said({"prompt": "Hi"}, "T") == said({"messages": [user]}, "T") == "T[user]Hi"
    assert said({"messages": [user, user]}, "T", system="S") == "T[system]S[user]Hi[user]Hi"
    assert said({"messages": [system, user]}, "T", system="S") == "T[system]Own[user]Hi"


def test_an_answer_ends_at_the_first_of_its_stops():
    made = [ord(letter) for letter in " ab. cd. ef "]
    found = generation.answer({"id": "1", "prompt": "?"}, [1], made, Letters(), generation.Sampling(stop=("zz", "ef", "cd")))
    assert (found["response"], found["finish_reason"], found["completion_tokens"]) == ("ab.", "stop", 12)
    found = generation.answer({"id": "1", "prompt": "?"}, [1], [], Letters(), generation.Sampling())
    assert (found["response"], found["finish_reason"]) == ("", "length")


@pytest.mark.parametrize(("said", "ends"), [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_a_generation_config_names_what_ends_an_answer(said, ends):
    assert generation.ends_of(SimpleNamespace(eos_token_id=said)) == ends
    model = SimpleNamespace(ends=generation.ends_of(SimpleNamespace(eos_token_id=said)))
    assert generation.end_tokens(model, Letters()) == {0, *ends}
    assert generation.end_tokens(object(), SimpleNamespace(eos_token_id=None)) == set()
    assert generation.ends_of(None) == set()


def test_an_answer_ends_with_any_of_the_model_s_ends_which_is_no_part_of_it():
    """Phi-3's turns end in a token that is not the tokenizer's end."""
    turn = ord("|")
    (request,) = asked([[1]], ends=(turn,))
    assert [request.stop([97, end]) for end in (0, turn, 98)] == [True, True, False]
    for made, how, text in (([97, turn], "stop", "a"), ([97, 98], "length", "ab"), ([turn], "stop", "")):
        found = generation.answer({"id": "1", "prompt": "?"}, [1], made, Letters(), generation.Sampling(ends=(turn,)))
        assert (found["response"], found["finish_reason"], found["completion_tokens"]) == (text, how, len(made))


def test_commands_and_the_local_model_end_where_the_generation_config_says(checkpoint, tmp_path, monkeypatch, capsys):
    folder, question = tmp_path / "chat", "Where was the key?"
    shutil.copytree(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    first = int(model(torch.tensor([tokenizer(question)["input_ids"]])).logits[0, -1].argmax())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id, first]}))
    (tmp_path / "p.txt").write_text(question + "\n")
    assert main(["generate", str(folder), "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "5"]) == 0
    row = json.loads((tmp_path / "p.answers.jsonl").read_text())
    assert (row["finish_reason"], row["completion_tokens"], row["response"]) == ("stop", 1, "")
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(question + "\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.strip() == ""
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    local = LocalCheckpoint(folder, template=str(tmp_path / "t.jinja"))
    call = SimpleNamespace(prompt=question, max_tokens=5, temperature=0.0, seed=0)
    reply = local._answer(call)
    assert (reply.text, reply.finish_reason, reply.completion_tokens) == ("", "stop", 1)


def test_prompts_and_answers_of_another_model_are_not_written_over(tmp_path, capsys):
    """A second model's answers took the place of the first one's, without which there is nothing to compare."""
    prompts, answers = tmp_path / "p.jsonl", tmp_path / "p.answers.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    answers.write_text("the first model's")
    command = ["generate", str(tmp_path / "no model"), "--prompts", str(prompts)]
    for more, said in (
        ([], "p.answers.jsonl': is there already; name another file by --out, or replace it with --force"),
        (["--out", str(prompts), "--force"], "p.jsonl': is the file of prompts, and would be replaced"),
        (["--force"], "checkpoint="),
    ):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err
    assert answers.read_text() == "the first model's"
