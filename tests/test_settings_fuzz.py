"""A short form of benchmarks/settings_fuzz.py: no mistyped setting ends in a traceback or hangs."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "settings_fuzz.py"


def test_no_mistyped_setting_escapes_the_schema():
    spec = importlib.util.spec_from_file_location("settings_fuzz", SCRIPT)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    found = made.fuzz(400, seed=1)
    assert found["escaped"] == []
    assert sum(found["counts"].values()) == 400
    assert [key for key in found["taken"] if made.reason(key) is None] == []  # each with a reason
    assert found["counts"]["refused"] > 300  # most values are of another kind
