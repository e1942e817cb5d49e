"""A short form of the campaign of benchmarks/faults.py: real processes, real kills, and an end equal to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent.parent.parent / "benchmarks" / "faults.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_faults_at_random_moments_change_no_bit(tmp_path):
    command = [
        sys.executable,
        str(CAMPAIGN),
        "--moments",
        "3",
        "--steps",
        "20",
        "--no-mount",
        "--output",
        str(tmp_path / "faults"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    said = (tmp_path / "faults.md").read_text()
    assert said.startswith("3 moments over ")
    assert ": 3 in runs whose end equals the undisturbed one to the bit" in said
