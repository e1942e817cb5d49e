"""Settings of a resumed run through the real NeMo: what may change takes effect and is noted, what may not is refused."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.report.training_log import read_training_log

WORKER = Path(__file__).with_name("resume_worker.py")


def cosine(step, *, lr, min_lr, steps):
    """The rate of optimizer step `step` (from 1) without a warm-up."""
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * (step - 1) / steps))


def overrides(folder, *more):
    validation = f"[{{name: held_out, path: {folder}/corpus, seq_length: 32, micro_batch_size: 2, samples: 4}}]"
    small = ["model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_attention_heads=2",
             "model.num_query_groups=2", "model.kv_channels=16", "model.vocab_size=128"]  # fmt: skip
    clock = ["curriculum.stages=[{until: 1.0, seq_length: 32, micro_batch_size: 2}]", "curriculum.tokens_per_step=128",
             "curriculum.total_tokens=1024", "checkpoint.every_tokens=256", "trainer.val_every_tokens=0"]  # fmt: skip
    return [
        "recipe=tiny_cpu_base", "name=run", f"output_dir={folder}", "data.tokenizer=null", "eval=none", *small, *clock,
        f"data.mix.sources=[{{path: {folder}/corpus}}]", f"data.validation={validation}", f"data.cache_dir={folder}/order",
        "data.num_workers=0", "optimizer.warmup_tokens=0", "optimizer.lr=1e-3", "optimizer.min_lr=0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """One run started again and again: exit statuses, what each start printed, and its record after each."""
    folder, rng = tmp_path_factory.mktemp("resumed"), np.random.default_rng(0)
    with CorpusWriter(folder / "corpus", np.uint16) as writer:
        for _ in range(200):
            writer.add_document(rng.integers(0, 128, rng.integers(3, 120)))
    starts = [
        {"stop": 4, "overrides": overrides(folder)},
        {"stop": None, "overrides": overrides(folder, "rope=abf", "rope.base=1.0e6")},
        {"stop": None, "overrides": overrides(folder, "rope.base=2.0e6"), "remove": str(folder / "run/results/settings.json")},
        {"stop": 6, "overrides": overrides(folder, "optimizer.lr=1e-2", "optimizer.weight_decay=0.5", "optimizer.beta1=0.8")},
        {"stop": None, "overrides": overrides(folder, "optimizer.lr=1e-2", "optimizer.weight_decay=0.5",
                                              "optimizer.beta1=0.8", "trainer.val_every_tokens=128")},
    ]  # fmt: skip
    for number, each in enumerate(starts):
        each["log"] = str(folder / f"{number}.log")
    (folder / "starts.json").write_text(json.dumps(starts))
    done = subprocess.run([sys.executable, WORKER, folder / "starts.json"], capture_output=True, text=True, timeout=900,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, check=False)  # fmt: skip
    logs = [Path(each["log"]).read_text() for each in starts]
    statuses = [int(line) for line in done.stdout.split() if line.lstrip("-").isdigit()]
    assert len(statuses) == len(starts), done.stderr[-3000:]
    return folder, statuses, logs


def steps_of(log):
    """What the worker printed of each step, also where a progress bar had left its line open."""
    return [json.loads(found) for found in re.findall(r"step (\[\d+, [^\n]*?\], [\d.]+\])", log)]


@pytest.mark.slow
def test_rates_decay_and_validation_take_effect_from_the_checkpoint_on(started):
    folder, statuses, logs = started
    assert statuses == [9, 2, 2, 9, 0], logs[-1][-3000:]
    for log, first in ((logs[0], 1), (logs[3], 5), (logs[4], 7)):
        steps = steps_of(log)
        assert steps[0][0] == first
        lr, decay, beta1 = (1e-3, 0.1, 0.9) if log is logs[0] else (1e-2, 0.5, 0.8)
        for step, rate, decays, beta in steps:
            assert rate == pytest.approx(cosine(step, lr=lr, min_lr=0, steps=8), rel=1e-9)
            assert decays == [0.0, decay]
            assert beta == beta1
    rows = read_training_log(folder / "run" / "results" / "training.csv")
    # Every step is validated from the checkpoint on, the step of the checkpoint itself included, which has no row yet.
    assert [row["step"] for row in rows if "validation_loss" in row] == [6, 7, 8]
    assert all(isinstance(row["seq_length"], int) for row in rows)


@pytest.mark.slow
def test_the_history_notes_what_changed_and_the_start_shows_the_checkpoint(started):
    folder, _, logs = started
    record = json.loads((folder / "run" / "results" / "settings.json").read_text())
    assert record["history"] == [
        {
            "step": 4,
            "changed": {
                "optimizer.lr": {"before": 1e-3, "run": 1e-2},
                "optimizer.weight_decay": {"before": 0.1, "run": 0.5},
                "optimizer.beta1": {"before": 0.9, "run": 0.8},
            },
        },
        {"step": 6, "changed": {"trainer.val_every_tokens": {"before": 0, "run": 128}}},
    ]
    assert record["recipe"]["optimizer"]["lr"] == 1e-2
    header = next(line for line in logs[3].splitlines() if line.startswith("setting "))
    assert header.split() == ["setting", "LlamaConfig", "resumed", "run"]
    assert "optimizer.lr: 0.001 -> 0.01 from step 4 on" in logs[3]


@pytest.mark.slow
def test_another_rope_is_refused_with_both_values(started):
    _, _, logs = started
    assert "rope.base=1000000.0" in logs[1] or "rope.variant='abf'" in logs[1]
    assert "'rope'" in logs[1] or "10000.0" in logs[1]
    assert (
        "rope.base=2000000.0: the checkpoint at step 4 was trained with 10000" in logs[2]
    )  # no record beside it: the checkpoint's own
    assert not steps_of(logs[1]) + steps_of(logs[2])
