"""Shipped recipes as shipped, made small by `scale=tiny`, through the real trainer: killed, resumed, ended, exported.

Here one of each road; `python benchmarks/shipped_recipes.py` takes all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "shipped_recipes.py"
NAMES = (
    "llama2_7b",  # tensor and sequence parallel on two processes, distributed optimizer, a mix that up-weights
    "codellama_34b",  # pipeline
    "llama3_8b",  # context parallel, two lengths, documents apart
    "mistral_7b",  # data parallel, YaRN
    "tiny_cpu_long",  # evaluation and guard
    "sft:self_instruct_prompt_loss",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """All of them, in forks of one process that imports the host once; what one leaves behind holds the pipes, and is seen."""
    command = [sys.executable, str(SCRIPT), *NAMES, "--folder", str(tmp_path_factory.mktemp("shipped"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, (done.stdout + done.stderr)[-4000:]
    return {record["name"]: record for record in lines}


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_is_killed_goes_on_validates_ends_and_is_exported(records, name):
    record = records[name]
    assert "failed" not in record, record["failed"]
    assert record["steps"] == record["checkpoint"] == 12
