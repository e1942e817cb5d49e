"""The kit for a machine with a GPU, at toy sizes on this one: every part goes through, and rows before a failure are kept."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_benchmark"] = gpu
SPEC.loader.exec_module(gpu)


def test_what_needs_torch_and_cores_alone_comes_first():
    needs = [bool(modules) for _, modules in gpu.PARTS.values()]
    assert needs == sorted(needs)
    assert sum(share for share, _ in gpu.PARTS.values()) == pytest.approx(1)


def test_documents_fill_the_window():
    for tokens in (64, 131_072):
        lengths = gpu.documents_of(tokens)
        assert (len(lengths), sum(lengths), min(lengths) >= 1) == (18, tokens, True)


def test_rows_that_came_before_a_failure_are_kept(monkeypatch, tmp_path):
    script = tmp_path / "part.py"
    script.write_text('print(\'row: {"what": "first"}\', flush=True)\nraise SystemExit("out of luck")\n')
    monkeypatch.setattr(gpu, "__file__", str(script))
    rows = gpu.run_part("product", gpu.TINY, 60)
    assert rows[0] == {"what": "first"}
    assert "out of luck" in rows[1]["why"]
    script.write_text('import time\nprint(\'row: {"what": "first"}\', flush=True)\ntime.sleep(60)\n')
    rows = gpu.run_part("product", gpu.TINY, 3)
    assert rows[0] == {"what": "first"}
    assert "were up" in rows[1]["why"]


def test_a_part_without_its_packages_says_so(monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "nemo", (0.4, ("no_such_package",)))
    assert gpu.run_part("nemo", gpu.TINY, 60) == [{"what": "nemo", "why": "left out: no_such_package not installed"}]


@pytest.mark.slow
def test_every_part_goes_through_on_a_cpu(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--tiny", "--seconds", "850"]
    done = subprocess.run([*command, "--json", tmp_path / "gpu.json"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == list(gpu.PARTS)
    assert [row for rows in parts.values() for row in rows if "why" in row] == []
    assert {row["what"] for row in parts["nemo"]} == {"tiny 256 begun", "tiny 256 gone on with"}
