"""`nemo-longctx doctor --model`: the self-test of a recipe's own path, from the command line."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def doctor(*overrides):
    command = [sys.executable, "-m", "nemo_longctx.cli", "doctor", "--model", "tiny_cpu_base", "--json", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout[done.stdout.index("[") :])}


def test_a_recipe_in_half_precision_with_recomputation_and_context_parallelism_passes():
    overrides = ("trainer.precision=bf16-mixed", "trainer.recompute=selective", "trainer.context_parallel_size=2")
    status, findings = doctor(*overrides, "trainer.devices=2")
    assert status == 0, findings
    assert "bound 4e-02" in findings["attention equals the float64 reference"]["detail"]  # it was asked in bf16
    assert "two context-parallel ranks equal one process" in findings
    assert "MiB at the peak of a step of one window of 256 tokens" in findings["the run's length fits"]["detail"]
