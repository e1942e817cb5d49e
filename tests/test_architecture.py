"""The rules that the folders state: cores import no host, the room for Megatron-Core neither NeMo nor Lightning, and no circle
of imports. And the proof that the tests of the rules can fail."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import nemo_longctx

PACKAGE = Path(nemo_longctx.__file__).parent
CORES = ("hf", "rope", "attention", "data", "instruct", "eval", "planning", "report", "ablation")

HOST = ("nemo", "megatron", "lightning", "lm_eval", "nemo_run")

# Imports modules with some packages made impossible to import; the command line names both.
PROBE = """
import importlib, sys

HOST = set(sys.argv[1].split(","))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HOST:
            raise ImportError(f"a core imports the host: {name}")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def import_without(packages: tuple[str, ...], modules: list[str], *, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROBE, ",".join(packages), *modules]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)


def modules_in(folder: Path) -> list[str]:
    files = sorted(folder.rglob("*.py"))
    assert files, folder
    parts = [file.relative_to(PACKAGE.parent).with_suffix("").parts for file in files]
    return [".".join(each[:-1] if each[-1] == "__init__" else each) for each in parts]


def core_modules() -> list[str]:
    found = [
        "nemo_longctx.config",
        "nemo_longctx.recipe",
        "nemo_longctx.compose",
        "nemo_longctx.capability",
        "nemo_longctx.nemo_files",
        "nemo_longctx.cli",
    ]
    for core in CORES:
        found += modules_in(PACKAGE / core)
    return found


def test_cores_import_without_the_host():
    result = import_without(HOST, core_modules())
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_rule_can_be_broken(tmp_path):
    (tmp_path / "planted_core.py").write_text("def f():\n    pass\n\nimport megatron.core\n")
    result = import_without(HOST, ["planted_core"], cwd=tmp_path)
    assert result.returncode != 0
    assert "a core imports the host: megatron" in result.stderr


def test_the_room_for_megatron_core_knows_neither_nemo_nor_lightning():
    result = import_without(("nemo", "lightning", "nemo_run", "lm_eval"), modules_in(PACKAGE / "adapters" / "megatron"))
    assert result.returncode == 0, result.stderr[-2000:]


def imports_of(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the same tree that it names anywhere, in functions too."""
    files = {}
    for file in root.rglob("*.py"):
        parts = file.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    edges: dict[str, set[str]] = {}
    for name, file in files.items():
        named = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= (inside & files.keys()) or {node.module}
        edges[name] = (named & files.keys()) - {name}
    return edges


def circle_in(edges: dict[str, set[str]]) -> list[str] | None:
    """The modules of one circle, in the order in which they import each other; None where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return None
        for other in sorted(edges[name]):
            if (found := walk(other, [*path, name])) is not None:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := walk(name, [])) is not None), None)


def test_imports_form_no_circle():
    assert circle_in(imports_of(PACKAGE)) is None


def test_a_circle_is_found(tmp_path):
    package = tmp_path / "planted"
    package.mkdir()
    (package / "one.py").write_text("from planted.two import f\n")
    (package / "two.py").write_text("def f():\n    from planted import three\n    return three\n")
    (package / "three.py").write_text("import planted.one\n")
    assert circle_in(imports_of(package)) == ["planted.one", "planted.two", "planted.three"]


def test_no_two_files_of_tests_have_one_name():
    """Folders of tests are no packages: of two files of one name pytest collects the first."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_each_fault_that_was_unnoticed_once_can_be_planted_again():
    """What `tests/mutation/run.py --named` plants stands once in its file, and its test is there."""
    root = Path(__file__).parent
    for fault in json.loads((root / "mutation" / "named.json").read_text(encoding="utf-8")):
        assert (root.parent / fault["path"]).read_text(encoding="utf-8").count(fault["was"]) == 1, fault["about"]
        path, _, name = fault["test"].partition("::")
        assert f"def {name.partition('[')[0]}(" in (root.parent / path).read_text(encoding="utf-8"), fault["about"]
