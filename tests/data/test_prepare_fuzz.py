"""The short form of benchmarks/data_fuzz.py: mutilated files end in a report whose counts add up, or in one sentence."""

import importlib.util
from pathlib import Path

import pytest

from nemo_longctx.data.engines import ENGINES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data_fuzz.py"


@pytest.mark.parametrize("seed", [1, 2])
def test_mutilated_files_are_counted_or_refused(tmp_path, monkeypatch, seed):
    spec = importlib.util.spec_from_file_location("data_fuzz", SCRIPT)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    monkeypatch.setitem(ENGINES, "processes", fuzz.in_this_process)
    outcomes = fuzz.check(40, seed, tmp_path)
    assert sum(outcomes.values()) == 40
    assert any("left out" in outcome for outcome in outcomes)
