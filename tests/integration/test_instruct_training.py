"""Instruction tuning end to end, by the example script: checkpoint -> tuned checkpoint -> chat export, on the CPU."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_longctx.data.sft_instances import LLAMA2_CHAT_TEMPLATE
from nemo_longctx.data.tokenization import train_bpe

ROOT = Path(__file__).parents[2]
STEPS = "curriculum={stages: [{until: 1.0, seq_length: 128, micro_batch_size: 2}], tokens_per_step: 512, total_tokens: %d}"


def run(*line: str, expected: int = 0) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=env, timeout=500, cwd=ROOT)
    assert done.returncode == expected, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder with a tokenizer, a corpus, conversations, and a base checkpoint of two steps."""
    folder = tmp_path_factory.mktemp("sft")
    texts = [f"What is {i} and {i + 1}? It is {i * i}, said the captain. " * 6 for i in range(200)]
    train_bpe(texts, 400, str(folder / "tokenizer"), {})
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [
        "-m",
        "nemo_longctx.cli",
        "prepare",
        str(folder / "texts.jsonl"),
        "--output",
        str(folder / "corpus"),
        "--append-eod",
    ]
    run(*command, "--tokenizer", str(folder / "tokenizer"))
    for name, words in (("short", 3), ("long", 30)):
        rows = [[("user", "captain " * words + f"{i}?"), ("assistant", f"It is {i}.")] for i in range(60)]
        lines = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = f"[{{name: held, path: {folder}/corpus, seq_length: 128, micro_batch_size: 2, samples: 2}}]"
    mix = f"data={{tokenizer: {folder}/tokenizer, mix: {{sources: [{{path: {folder}/corpus}}]}}, validation: {held}}}"
    base = ["examples/megatron_gpt_continual.py", "recipe=tiny_cpu_base", "model.vocab_size=400", f"output_dir={folder}", mix]
    off = [
        "trainer.val_every_tokens=0",
        "checkpoint.every_tokens=0",
        "optimizer.warmup_tokens=0",
        "trainer.limit_val_batches=1",
    ]
    run(*base, *off, "name=base", STEPS % 1024)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tuned_and_exported(parts):
    line = ["examples/megatron_gpt_sft.py", f"restore_from={parts}/base", f"output_dir={parts}", "name=chat", "trainer=cpu"]
    line += [f"data.tokenizer={parts}/tokenizer", f"data.short=[{parts}/short.jsonl]", f"data.long=[{parts}/long.jsonl]"]
    line += [f"data.pretraining={{sources: [{{path: {parts}/corpus}}], share_tolerance: 0.9}}", "data.num_workers=0"]
    line += ["data.blend={short: 0.4, long: 0.4, pretraining: 0.2}", "data.prompt_loss_weight=0.5", "optimizer.lr=3e-3"]
    run(*line, STEPS % 4096)
    with open(parts / "chat" / "results" / "training.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    run("-m", "nemo_longctx.cli", "export", str(parts / "chat"), str(parts / "hf"))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts / "hf")
    assert tokenizer.chat_template == LLAMA2_CHAT_TEMPLATE
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "What?"}], return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(parts / "hf").generate(asked, max_new_tokens=2).shape[1] == asked.shape[1] + 2
    assert "blend" in run(*line, "data.blend={shrot: 1.0}", expected=2)
