"""What the planner knows of each GPU, beside the rows of the makers' sheets."""

import dataclasses

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.planning.gpus import GPUS, gpu_by_name

# GiB that the driver reports; dense TFLOP/s in bf16 and fp8; GB/s of memory, NVLink, network and host; GPUs a node.
SHEET = {
    "a100": (79.0, 312, None, 2039, 300, 25, 32, 8),
    "h100": (79.0, 989, 1979, 3350, 450, 50, 64, 8),
    "h100-96gb": (94.5, 989, 1979, 2400, 450, 50, 64, 8),
    "h200": (139.8, 989, 1979, 4800, 450, 50, 64, 8),
    "b200": (178.0, 2250, 4500, 8000, 900, 50, 64, 8),
    "gb200": (184.0, 2500, 5000, 8000, 900, 50, 225, 72),
}


def test_the_gpus_are_those_of_the_sheets():
    assert {name: dataclasses.astuple(gpu)[1:] for name, gpu in GPUS.items()} == SHEET
    assert all(gpu_by_name(name).name == name for name in SHEET)
    assert all(gpu.fp8_tflops in (None, 2 * gpu.bf16_tflops, 2 * gpu.bf16_tflops + 1) for gpu in GPUS.values())
    with pytest.raises(ConfigError, match="gpu='h10': not a GPU that the planner knows, did you mean 'h100'"):
        gpu_by_name("h10")
