"""The rule that the folders state: cores import no host. And the proof that the test of the rule can fail."""

import subprocess
import sys
from pathlib import Path

import nemo_longctx

PACKAGE = Path(nemo_longctx.__file__).parent
CORES = ("rope", "attention", "data", "instruct", "eval", "planning", "report")

# Imports every module named on the command line with the host made impossible to import.
PROBE = """
import importlib, sys

HOST = {"nemo", "megatron", "lightning", "lm_eval", "nemo_run"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HOST:
            raise ImportError(f"a core imports the host: {name}")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def import_without_host(modules: list[str], *, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PROBE, *modules], capture_output=True, text=True, cwd=cwd, timeout=240)


def core_modules() -> list[str]:
    found = [
        "nemo_longctx.config",
        "nemo_longctx.recipe",
        "nemo_longctx.compose",
        "nemo_longctx.capability",
        "nemo_longctx.cli",
    ]
    for core in CORES:
        files = sorted((PACKAGE / core).rglob("*.py"))
        assert files, core
        for file in files:
            parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_cores_import_without_the_host():
    result = import_without_host(core_modules())
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_rule_can_be_broken(tmp_path):
    (tmp_path / "planted_core.py").write_text("def f():\n    pass\n\nimport megatron.core\n")
    result = import_without_host(["planted_core"], cwd=tmp_path)
    assert result.returncode != 0
    assert "a core imports the host: megatron" in result.stderr
