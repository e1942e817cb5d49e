"""A cheap part of `docs/families.md` again: one family and one option, from import over three steps to the export."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "docs" / "make_families.py"


@pytest.mark.slow
def test_a_part_of_the_families_table_is_made_again():
    names = ["starcoder2", "llama, model.no_rope_freq=4"]
    done = subprocess.run([sys.executable, SCRIPT, *names], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert [line.count("| yes") for line in rows] == [5, 5], rows
