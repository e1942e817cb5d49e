"""A local model that answers, in this process or behind a real HTTP server: a tiny Llama, taught to answer in form."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from model_server import serve_checkpoint
from stories import jsonl, story
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.data.sft_instances import LLAMA2_CHAT_TEMPLATE
from nemo_longctx.instruct.client import Call, CallError
from nemo_longctx.instruct.local import LocalCheckpoint, fingerprint

# One reply in the form of both prompts: a question for the one, a verdict for the other.
REPLY = "<question>Who wrote?</question><answer>Harrow.</answer><reason>Said.</reason><verdict>correct</verdict>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder):
    """A Llama of one layer that, after any prompt, says REPLY."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = LLAMA2_CHAT_TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes))
    asked = [{"role": "user", "content": "x"}]
    begin, _, end_of_turn = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True).partition("x")
    first = tokenizer(begin, add_special_tokens=False)["input_ids"]
    mark = tokenizer(f"x{end_of_turn}", add_special_tokens=False)["input_ids"][1:]
    pair = tokenizer(" Who wrote? Harrow.", add_special_tokens=False)["input_ids"]
    reply = tokenizer(f" {REPLY} </s>", add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    text = tokenizer("".join(story(seed, 40) for seed in range(8)), add_special_tokens=False, return_tensors="pt")["input_ids"][
        0
    ]
    losses = [1.0]
    while len(losses) < 2000 and max(losses[-5:]) > 0.005:  # until it says it whatever is asked, with nothing left to luck
        length = int(torch.randint(30, 120, ()))
        starts = torch.randint(0, len(text) - length, (8,)).tolist()
        prompt = torch.stack([text[start : start + length] for start in starts])
        # Half of the prompts end as a critique's does.
        end = pair + mark if length % 2 else mark
        ids = torch.cat((torch.tensor([first] * 8), prompt, torch.tensor([end + reply] * 8)), dim=1)
        labels = ids.clone()
        labels[:, : len(first) + length + len(end)] = -100
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[-5:]) <= 0.005
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generate(checkpoint, tokenizer_folder, documents, output, **settings):
    """The command, with a checkpoint's folder (Path) or a server's URL (str) to answer."""
    settings = {"target_length": 600, "chunk_tokens": 40, "max_answer_tokens": 120, "temperature": 0} | settings
    prompts = output.parent / "prompts"  # short ones: this model has never seen a long prompt
    prompts.mkdir(exist_ok=True)
    for name, text in {
        "question_normal": "{chunk}",
        "question_short": "{chunk}",
        "critique": "{chunk} {question} {answer}",
    }.items():
        (prompts / f"{name}.txt").write_text(text)
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    who = ["--endpoint", checkpoint, "--model", "tiny"] if isinstance(checkpoint, str) else ["--checkpoint", str(checkpoint)]
    line = ["instruct", "generate", str(documents), "--output", str(output), *who, "--prompts", str(prompts)]
    return main([*line, "--tokenizer", str(tokenizer_folder), *flags])


def test_instances_from_a_checkpoint(checkpoint, tokenizer_folder, tmp_path, capsys):
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 4), story(2, 4)])
    out = tmp_path / "out"
    assert generate(checkpoint, tokenizer_folder, documents, out) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    (row,) = [json.loads(line) for line in (out / "instances.jsonl").read_text().splitlines()]
    assert row["provenance"]["question"] == "Who wrote?"
    assert row["messages"][1]["content"] == "Harrow."
    assert row["provenance"]["model"] == fingerprint(checkpoint)
    assert report["yield"].get("near_duplicate", 0) == report["yield"]["parsed"] - 1  # it knows one question only
    assert report["calls"]["completion_tokens"] > 0
    assert generate(checkpoint, tokenizer_folder, documents, out) == 0
    assert json.loads((out / "report.json").read_text())["calls"]["made"] == 0


def test_a_served_checkpoint_gives_the_instances_of_one_in_this_process(checkpoint, tokenizer_folder, tmp_path, capsys):
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 4), story(2, 4)])
    with serve_checkpoint(checkpoint) as (url, asked):
        assert generate(url, tokenizer_folder, documents, tmp_path / "served", timeout_s=120) == 0, capsys.readouterr().err
    assert generate(checkpoint, tokenizer_folder, documents, tmp_path / "here") == 0
    rows = {}
    for name in ("served", "here"):
        rows[name] = [json.loads(line) for line in (tmp_path / name / "instances.jsonl").read_text().splitlines()]
        for row in rows[name]:
            assert row["provenance"].pop("model") == ("tiny" if name == "served" else fingerprint(checkpoint))
    assert rows["served"] == rows["here"] != []
    calls = {name: json.loads((tmp_path / name / "report.json").read_text())["calls"] for name in rows}
    assert calls["served"] == calls["here"]
    assert len(asked) == calls["served"]["made"] > 0


def test_prompts_beyond_the_window_are_refused_with_the_mend(checkpoint, tokenizer_folder, tmp_path, capsys):
    documents = jsonl(tmp_path / "documents.jsonl", [story(seed, 200) for seed in range(4)])
    settings = {"chunk_tokens": 2000, "target_length": 2600, "stop_after_malformed": 3}
    assert generate(checkpoint, tokenizer_folder, documents, tmp_path / "out", **settings) == 2
    assert "do not fit a window of 2048; lower chunk_tokens" in capsys.readouterr().err


def test_a_models_name_tells_its_head_and_its_tail(tmp_path):
    weights = tmp_path / "model.safetensors"
    raw = bytearray(3 << 20)
    weights.write_bytes(raw)
    names = {fingerprint(tmp_path)}
    for place in (0, len(raw) - 1):
        changed = raw.copy()
        changed[place] = 1
        weights.write_bytes(changed)
        names.add(fingerprint(tmp_path))
    assert len(names) == 3


def test_a_folder_without_a_model_is_named(tokenizer_folder, tmp_path, capsys):
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 4)])
    with pytest.raises(ConfigError, match="no weights"):
        fingerprint(tokenizer_folder)
    assert generate(tokenizer_folder, tokenizer_folder, documents, tmp_path / "out") == 2
    assert "no weights" in capsys.readouterr().err


@pytest.mark.parametrize(("end", "said", "reason"), [([7, 2], [7], "stop"), ([2, 7], [2, 7], "length")])
def test_a_call_is_asked_with_its_own_settings(end, said, reason):
    """And no window is longer than the model's."""
    asked = []
    tokenizer = SimpleNamespace(
        eos_token_id=2, apply_chat_template=lambda *_, **__: [1] * 10, decode=lambda made, skip_special_tokens: str(made)
    )
    scorer = SimpleNamespace(model=SimpleNamespace(max_length=15), generate=lambda requests: asked.extend(requests) or [end])
    model = SimpleNamespace(tokenizer=tokenizer, template=None, scorer=scorer)
    call = Call(model="m", prompt="p", max_tokens=5, temperature=0.7, seed=3, attempt=1)
    reply = LocalCheckpoint._answer(model, call)
    (request,) = asked
    assert (request.context, request.max_new_tokens, request.temperature, request.seed) == ([1] * 10, 5, 0.7, 3)
    assert (request.stop([5, 2]), request.stop([2, 5])) == (True, False)
    assert (reply.text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens) == (str(said), reason, 10, 2)
    with pytest.raises(CallError, match="10 tokens and an answer of 6 do not fit a window of 15; lower chunk_tokens"):
        LocalCheckpoint._answer(model, dataclasses.replace(call, max_tokens=6))
