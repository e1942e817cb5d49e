"""Curricula through the example script, as a user runs them: a change of length, and a stage that needs another layout."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import host_server
import numpy as np
import pytest

from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.report.training_log import read_training_log
from nemo_longctx.start import RENDEZVOUS, torchrun

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "megatron_gpt_continual.py"
SMALL = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.kv_channels=16",
    "model.vocab_size=100",
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    for name in ("text", "held_out"):
        with CorpusWriter(directory / name, np.uint16) as writer:
            for _ in range(100):
                writer.add_document(rng.integers(0, 100, rng.integers(3, 200)))
    return directory


def command(corpora, output, stages, *more):
    sets = ", ".join(f"{{name: {n}, path: {corpora}/held_out, seq_length: {n}, samples: 8}}" for n in ("16", "128"))
    return [
        "recipe=tiny_cpu_base", f"output_dir={output}", "data.tokenizer=null", *SMALL,
        f"data.mix.sources=[{{path: {corpora}/text}}]", f"data.validation=[{sets}]", f"curriculum.stages={stages}",
        "curriculum.tokens_per_step=256", "curriculum.total_tokens=2048", "optimizer.warmup_tokens=0",
        "trainer.val_every_tokens=1024", "checkpoint.every_tokens=0", *more,
    ]  # fmt: skip


def run(arguments):
    status, said = host_server.start(EXAMPLE, *arguments).finish()
    assert status == 0, said[-4000:]
    return said


def rows_of(output):
    rows = read_training_log(output / "tiny_cpu_base" / "results" / "training.csv")
    return [row for row in rows if "loss" in row], [row for row in rows if "validation_loss" in row]


@pytest.mark.slow
def test_a_length_changes_in_one_run_and_its_curve_says_so(corpora, tmp_path):
    run(command(corpora, tmp_path, "[{until: 0.5, seq_length: 32, micro_batch_size: 2}, {until: 1.0, seq_length: 128}]"))
    trained, validated = rows_of(tmp_path)
    assert [(row["tokens"], row["seq_length"]) for row in trained] == [(256 * n, 32 if n <= 4 else 128) for n in range(1, 9)]
    assert [row["tokens"] for row in validated] == [1024, 2048]
    for row in validated:
        assert row["validation_loss_16"] > 0
        assert row["validation_loss_128"] > 0
    assert (tmp_path / "tiny_cpu_base" / "results" / "training.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_stage_of_another_layout_ends_the_run_with_a_checkpoint_and_the_next_command(corpora, tmp_path):
    stages = "[{until: 0.5, seq_length: 32, micro_batch_size: 2}, {until: 1.0, seq_length: 128, context_parallel_size: 2}]"
    printed = run(command(corpora, tmp_path, stages))
    assert [row["step"] for row in rows_of(tmp_path)[0]] == [1, 2, 3, 4]
    lines = printed.splitlines()
    [said] = [number for number, line in enumerate(lines) if "the next stage needs other parallel sizes" in line]
    following = shlex.split(lines[said + 1])
    assert following[-1] == "trainer.num_nodes=1"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(following, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "stage 1 from step 4, 1024 tokens: sequences of 128" in done.stdout + done.stderr
    trained, _ = rows_of(tmp_path)
    assert [(row["step"], row["seq_length"]) for row in trained] == [(n, 32 if n <= 4 else 128) for n in range(1, 9)]


@pytest.mark.slow
def test_the_line_of_torchrun_that_we_print_starts_on_two_nodes(corpora, tmp_path):
    """Typed twice on this machine, as on two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, "-m", "torch.distributed.run", *torchrun(2, 1)[1:], "train"]
    words[words.index(RENDEZVOUS)] = endpoint
    asked = command(corpora, tmp_path, "[{until: 1.0, seq_length: 32, micro_batch_size: 2}]", "trainer.num_nodes=2")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"node{number}.log" for number in range(2)]
    nodes = []
    for log in logs:
        with log.open("w") as file:
            nodes.append(subprocess.Popen([*words, *asked], stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        statuses = [node.wait(timeout=400) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    said = [log.read_text() for log in logs]
    assert statuses == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert sum("finished: " in each for each in said) == 1
    trained, validated = rows_of(tmp_path)
    assert [row["tokens"] for row in trained] == [256 * n for n in range(1, 9)]
    assert len(validated) == 2


@pytest.mark.slow
def test_a_full_dry_run_trains_a_step_of_each_stage_and_leaves_nothing(corpora, tmp_path):
    stages = "[{until: 0.5, seq_length: 32, micro_batch_size: 2}, {until: 1.0, seq_length: 128}]"
    asked = command(corpora, tmp_path / "runs", stages)
    status, said = host_server.start("-m", "nemo_longctx", "train", *asked, "--dry-run=full").finish()
    assert status == 0, said[-3000:]
    assert "RoPE verified live" in said
    assert "reached   step 2, 512 tokens" in said
    assert "what it wrote is removed" in said
    assert "finished: " not in said
    assert "nemo-longctx export" not in said
    assert not [path for path in (tmp_path / "runs").iterdir() if "tiny_cpu_base" in path.name]
