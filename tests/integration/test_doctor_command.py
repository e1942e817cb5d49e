"""`nemo-longctx doctor --model`: the self-test of a recipe's own path, from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(recipe, *overrides, cwd=None):
    command = [sys.executable, "-m", "nemo_longctx.cli", "doctor", "--model", recipe, "--json", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)


def doctor(recipe, *overrides, cwd=None):
    done = run(recipe, *overrides, cwd=cwd)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout[done.stdout.index("[") :])}


def test_a_recipe_in_half_precision_with_recomputation_and_context_parallelism_passes():
    overrides = ("trainer.precision=bf16-mixed", "trainer.recompute=selective", "trainer.context_parallel_size=2")
    status, findings = doctor("tiny_cpu_base", *overrides, "trainer.devices=2")
    assert status == 0, findings
    assert "bound 4e-02" in findings["attention equals the float64 reference"]["detail"]  # it was asked in bf16
    assert "two context-parallel ranks equal one process" in findings
    assert "MiB at the peak of a step of one window of 256 tokens" in findings["the run's length fits"]["detail"]


def test_a_recipe_whose_checkpoint_is_not_there_takes_its_sizes_from_the_recipe_or_model_of_that_name(tmp_path):
    status, findings = doctor("tiny_cpu_long", cwd=tmp_path)
    assert status == 0, findings
    assert "of one window of 2,048 tokens" in findings["the run's length fits"]["detail"]
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [llama2_7b, _self_]\nname: own\n")
    cut = ["model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4",
           "model.num_query_groups=2", "model.kv_channels=16"]  # fmt: skip
    more = ["trainer=cpu", "trainer.precision=32", "curriculum=constant_2048", "rope.base=1000000", "optimizer.warmup_tokens=0",
            "trainer.val_every_tokens=0", "checkpoint.every_tokens=0"]  # fmt: skip
    status, findings = doctor(str(own), *cut, *more, cwd=tmp_path)
    assert status == 0, findings
    done = run("tiny_cpu_long", "restore_from=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "no checkpoint is there to read sizes from" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_that_do_not_fit_are_a_sentence(tmp_path):
    """A petabyte of them."""
    done = run(
        "tiny_cpu_base", "model.num_layers=1", "model.hidden_size=16000000", "model.ffn_hidden_size=16000000", cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "do not fit in this machine's memory" in done.stderr
