"""Predicted against measured peak memory of real runs on a GPU."""

import importlib.util
from pathlib import Path

import pytest
import torch

from nemo_longctx.planning.memory import STATED_ERROR

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "plan_gpu.py"
    spec = importlib.util.spec_from_file_location("plan_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["4k", "16k", "64k_full"])
def test_peak_of_tensors_is_within_the_stated_error(name, tmp_path):
    plan = benchmark()
    gpus, seq_length, overrides = plan.CONFIGS[name]
    plan.write_corpus(tmp_path / "corpus", (plan.STEPS + 2) * seq_length * gpus)
    record = plan.measure(tmp_path / name, gpus, seq_length, overrides, device="gpu")
    assert plan.row_of(name, seq_length, record)["memory_ratio"] == pytest.approx(1, abs=STATED_ERROR)
