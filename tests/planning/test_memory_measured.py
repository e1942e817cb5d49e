"""Predicted against measured peak memory of real Megatron-Core models on the CPU."""

import importlib.util
from pathlib import Path

import pytest

from nemo_longctx.planning import memory


def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"
    spec = importlib.util.spec_from_file_location("plan_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAN = benchmark()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash_4k", "vocabulary_4k", "recompute_full_4k"])
def test_prediction_is_within_the_stated_error(name):
    shape, layout, seq_length = PLAN.CONFIGS[name]
    batch = layout.micro_batch_size
    predicted = memory.memory_plan(shape, layout, seq_length=seq_length, global_batch_size=batch, framework_bytes=0).total
    assert predicted == pytest.approx(PLAN.measure(name)["bytes"], rel=memory.STATED_ERROR)
