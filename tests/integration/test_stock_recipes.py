"""Ten of NeMo's own pretraining recipes, cut small: two lines make each a long-context run on a machine without CUDA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_longctx.data.writer import CorpusWriter

RECIPES = (
    "llama2_7b", "llama3_8b", "llama31_8b", "llama32_1b", "qwen25_7b", "qwen3_8b", "mistral_7b", "nemotron3_4b", "gemma_2b",
    "starcoder2_3b",
)  # fmt: skip


@pytest.mark.slow
def test_ten_of_nemos_recipes_train_long_on_a_cpu_by_two_lines(tmp_path):
    with CorpusWriter(str(tmp_path / "numbers"), np.uint16) as writer:
        for length in (900, 2000, 1500):
            writer.add_document((np.arange(length) % 300).astype(np.uint16))
    worker = Path(__file__).with_name("stock_worker.py")
    command = [sys.executable, str(worker), str(tmp_path / "numbers"), str(tmp_path / "runs"), *RECIPES]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:]
    records = [json.loads(line.removeprefix("RECORD ")) for line in done.stdout.splitlines() if line.startswith("RECORD ")]
    assert [record["name"] for record in records] == list(RECIPES)
    for record in records:
        assert record["rows"] == 4, record
        assert "base=500000" in record["verified"][0], record
        assert "LongContextAttention" in record["attention"], record
