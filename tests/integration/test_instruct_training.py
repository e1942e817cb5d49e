"""Instruction tuning end to end, by the example script: an extended checkpoint -> tuned weights or LoRA -> chat export."""

import csv
import json
import time
from pathlib import Path

import host_server
import pytest

from nemo_longctx.data.sft_instances import LLAMA2_CHAT_TEMPLATE
from nemo_longctx.data.tokenization import train_bpe

ROOT = Path(__file__).parents[2]
STEPS = "curriculum={stages: [{until: 1.0, seq_length: %d, micro_batch_size: 2}], tokens_per_step: 512, total_tokens: %d}"


def run(*line: str, expected: int = 0) -> str:
    status, said = host_server.start(*line, cwd=ROOT).finish()
    assert status == expected, said[-5000:]
    return said


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder with a tokenizer, a corpus, conversations, and a base of two steps at 64 tokens extended to 128 in two more."""
    folder = tmp_path_factory.mktemp("sft")
    texts = [f"What is {i} and {i + 1}? It is {i * i}, said the captain. " * 6 for i in range(200)]
    train_bpe(texts, 400, str(folder / "tokenizer"), {})
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = ["prepare", str(folder / "texts.jsonl"), "--output", str(folder / "corpus"), "--append-eod"]
    run("-m", "nemo_longctx.cli", *corpus, "--tokenizer", str(folder / "tokenizer"))
    for name, words in (("short", 3), ("long", 30)):
        rows = [[("user", "captain " * words + f"{i}?"), ("assistant", f"It is {i}.")] for i in range(60)]
        lines = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = f"[{{name: held, path: {folder}/corpus, seq_length: 64, micro_batch_size: 2, samples: 2}}]"
    data = f"data={{tokenizer: {folder}/tokenizer, mix: {{sources: [{{path: {folder}/corpus}}]}}, validation: {held}}}"
    off = ["trainer.val_every_tokens=0", "checkpoint.every_tokens=0", "optimizer.warmup_tokens=0", f"output_dir={folder}", data]
    script, small = "examples/megatron_gpt_continual.py", ["model.vocab_size=400", "model.num_layers=2"]
    run(script, "recipe=tiny_cpu_base", *small, *off, "name=base", STEPS % (64, 1024))
    run(script, "recipe=tiny_cpu_long", f"restore_from={folder}/base", *off, "eval=none", "name=extended", STEPS % (128, 1024))
    return folder


def tuning(parts: Path, name: str, *more: str) -> list[str]:
    """The command of a run of eight steps on all three kinds of data."""
    return [
        "examples/megatron_gpt_sft.py", f"restore_from={parts}/extended", f"output_dir={parts}", f"name={name}", "trainer=cpu",
        f"data.tokenizer={parts}/tokenizer", f"data.short=[{parts}/short.jsonl]", f"data.long=[{parts}/long.jsonl]",
        f"data.pretraining={{sources: [{{path: {parts}/corpus}}], share_tolerance: 0.9}}", "data.num_workers=0",
        "data.blend={short: 0.4, long: 0.4, pretraining: 0.2}", "data.prompt_loss_weight=0.5", "optimizer.lr=3e-3",
        STEPS % (128, 4096), *more,
    ]  # fmt: skip


def curve(parts: Path, name: str) -> list[tuple[str, ...]]:
    """(step, loss, lr, gradient norm) of each step, with all digits."""
    path = parts / name / "results" / "training.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [tuple(row[key] for key in ("step", "loss", "lr", "grad_norm")) for row in csv.DictReader(file) if row["loss"]]


def check_chat_export(folder: Path) -> None:
    """transformers loads it, with the extended RoPE, the chat template and an end; it is asked by the template and answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.chat_template == LLAMA2_CHAT_TEMPLATE
    assert model.config.rope_theta == 500_000
    assert model.config.max_position_embeddings == 128
    assert model.config.eos_token_id == tokenizer.eos_token_id
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answered = model.generate(asked, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answered.shape[1] == asked.shape[1] + 5
    assert answered[0, : asked.shape[1]].tolist() == asked[0].tolist()


@pytest.fixture(scope="module")
def tuned(parts):
    """The folder of all, with a fully tuned chat model in chat/, exported to hf/."""
    run(*tuning(parts, "chat"))
    run("-m", "nemo_longctx.cli", "export", str(parts / "chat"), str(parts / "hf"))
    return parts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tuned_and_exported(tuned):
    losses = [float(loss) for _, loss, _, _ in curve(tuned, "chat")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    check_chat_export(tuned / "hf")
    assert "blend" in run(*tuning(tuned, "chat"), "data.blend={shrot: 1.0}", expected=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tuned_model_served_over_http_never_answers_in_form(tuned, monkeypatch, tmp_path, capsys):
    """The project's own small model behind a real server: it was trained for seconds, so the run must stop early and say so."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "instruct"))
    from model_server import serve_checkpoint

    from nemo_longctx.cli import main

    (tmp_path / "prompts").mkdir()
    for name, text in {"question_normal": "{chunk}", "question_short": "{chunk}"}.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    with serve_checkpoint(tuned / "hf") as (url, asked):
        line = ["instruct", "generate", str(tuned / "texts.jsonl"), "--output", str(tmp_path / "out"), "--endpoint", url]
        line += ["--model", "chat", "--tokenizer", str(tuned / "tokenizer"), "--prompts", str(tmp_path / "prompts")]
        line += ["--target-length", "128", "--template-tokens", "16", "--chunk-tokens", "32", "--max-answer-tokens", "24"]
        assert main([*line, "--stop-after-malformed", "6", "--concurrency", "2"]) == 2
    said = capsys.readouterr().err
    assert "the last 6 calls gave nothing in form" in said
    assert "stopped after" in said
    assert 6 <= len(asked) <= 7
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == len(asked)  # what was answered is kept


LORA = ["lora={dim: 4, alpha: 8}", "checkpoint.every_tokens=1024"]


@pytest.fixture(scope="module")
def adapted(parts):
    """The folder of all, with LoRA adapters in lora/."""
    run(*tuning(parts, "lora", *LORA))
    return parts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lora_trains_adapters_alone_and_exports_merged(adapted):
    import torch
    from megatron.core import dist_checkpointing
    from nemo.lightning import io
    from transformers import AutoModelForCausalLM

    from nemo_longctx.adapters.nemo.checkpoint.load import load_model
    from nemo_longctx.adapters.nemo.model.config import checkpoint_directory

    losses = [float(loss) for _, loss, _, _ in curve(adapted, "lora")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    directory = checkpoint_directory(adapted / "lora")
    weights = [key for key in dist_checkpointing.load_tensors_metadata(str(directory / "weights")) if "optimizer" not in key]
    # Four linear layers in each of two, stacked by Megatron-Core or not, two matrices each; nothing of the base.
    assert weights
    assert all(".adapter.linear_" in key for key in weights)
    assert {key.rsplit(".adapter.")[0].rsplit(".", 1)[1] for key in weights} == {
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    }
    from nemo.collections import llm

    assert type(io.load_context(directory / "context", subpath="model.model_transform")) is llm.peft.LoRA
    run("-m", "nemo_longctx.cli", "export", str(adapted / "lora"), str(adapted / "lora_hf"))
    check_chat_export(adapted / "lora_hf")
    live, _, _ = load_model(adapted / "lora")
    base, _, _ = load_model(adapted / "extended")
    ids = torch.randint(0, 400, (2, 128), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(128).expand(2, -1)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(adapted / "lora_hf").eval()(ids).logits
        with_adapters, without = (model(ids, positions, None)[..., :400] for model in (live, base))
    torch.testing.assert_close(merged, with_adapters, rtol=1e-4, atol=1e-5)
    assert (with_adapters - without).abs().max() > 0.01  # adapters do something
    said = run(*tuning(adapted, "again", f"restore_from={adapted}/lora"), expected=2)
    assert "holds LoRA adapters alone" in said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_lora_goes_on_as_if_never_killed(adapted):
    process = host_server.start(*tuning(adapted, "killed", *LORA), cwd=ROOT)
    while process.poll() is None and len(curve(adapted, "killed")) < 6:
        time.sleep(0.05)
    process.kill()
    _, said = process.finish()
    assert len(curve(adapted, "killed")) >= 6, said[-3000:]
    run(*tuning(adapted, "killed", *LORA))
    assert curve(adapted, "killed") == curve(adapted, "lora")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lora_beside_a_rope_variant_that_needs_the_transform(parts):
    yarn = "rope={variant: yarn, base: 10000, factor: 2.0, original_max_position_embeddings: 64}"
    assert "RoPE verified live: yarn" in run(*tuning(parts, "yarn", "lora={dim: 4}", yarn))
    run("-m", "nemo_longctx.cli", "export", str(parts / "yarn"), str(parts / "yarn_hf"))
    config = json.loads((parts / "yarn_hf" / "config.json").read_text())
    assert config["rope_scaling"]["rope_type"] == "yarn"
    by_layer = ["model.window_size=[31,0]", "model.window_attn_skip_freq=2", yarn[:-1] + ", layers: full_attention}"]
    said = run(*tuning(parts, "by_layer", "lora={dim: 4}", *by_layer))
    assert "1 layers that see all tokens" in said
    assert "plain rope (base=500000.0) in 1 layers with a window" in said
    refused = run("-m", "nemo_longctx.cli", "export", str(parts / "by_layer"), str(parts / "by_layer_hf"), expected=2)
    assert "rope.layers='full_attention': no class of transformers" in refused
