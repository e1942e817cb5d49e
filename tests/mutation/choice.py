"""Which tests a mutant meets: those that run its function, the likeliest to notice first."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from points import Mutant

ROOT = Path(__file__).resolve().parents[2]
TESTS, SECONDS = 40, 20.0  # at most so many test functions and so much of their own time for one mutant
# Train and evaluate in processes forked from one that has the host, whose lines no map holds: tests of what no other runs.
END_TO_END = (
    "tests/integration/test_continual_run.py::test_the_extension_is_shown_verified_and_stored",
    "tests/integration/test_continual_run.py::test_the_training_log_counts_tokens",
    "tests/integration/test_continual_run.py::test_checkpoints_load_with_stock_nemo",
    "tests/integration/test_continual_run.py::test_the_recipe_restores_weights_before_it_trains",
)


def tests_of(mutant: Mutant, covering: dict[str, Any]) -> list[tuple[str, float]]:
    """The tests that run the mutant's function, and their seconds; all of the file's for its top.

    Those first that are quick, that say the words of the mutated line, that stand in a file or have a name that speaks of the
    function's, and that run few of its file; behind the first 30 functions the files of tests take turns.
    """
    runs = covering["functions"].get(mutant.path, {})
    breadth = Counter(test for tests in runs.values() for test in tests)
    wanted = mutant.function
    while wanted not in runs and "." in wanted:
        wanted = wanted.rsplit(".", 1)[0]
    found = runs.get(wanted) or ([] if mutant.function in runs else sorted(breadth))
    if not mutant.function:
        found = sorted(breadth)
    tests, spent, chosen = covering["tests"], 0.0, []
    speaks = re.compile("|".join({*re.findall("[a-z]{4,}", Path(mutant.path).stem + "_" + wanted.lower()), "::::"}))
    near = {index: -len(set(speaks.findall(tests[index][0].lower()))) for index in found}
    file = {index: tests[index][0].split("::")[0] for index in found}
    shared = _shared(covering)
    slow = {index: max(tests[index][1], shared.get(file[index], 0)) > 2 for index in found}
    said = _said(mutant, {tests[index][0].partition("[")[0] for index in found})
    named = {index: tests[index][0].partition("[")[0] for index in found}
    order = sorted(found, key=lambda i: (slow[i], -said[named[i]], near[i], breadth[i], tests[i][1]))
    turns: Counter[str] = Counter()
    turn: dict[str, int] = {}  # of a test function, with all of its parameters
    for index in order:
        if named[index] not in turn:
            turn[named[index]] = 0 if len(turn) < 30 else turns[file[index]]
            turns[file[index]] += 1
    begun: set[str] = set()
    taken: set[str] = set()
    for index in sorted(order, key=lambda i: (slow[i], turn[named[i]])):
        if (named[index] not in taken and len(taken) == TESTS) or not _is_there(tests[index][0]):
            continue
        takes = tests[index][1] + (0 if file[index] in begun else shared.get(file[index], 0))
        if file[index].endswith(f"/test_{Path(mutant.path).stem}.py") and "/integration/" not in file[index]:
            takes = min(takes, 3.0)  # what a test of the file's own imported first is no time of its
        if spent + takes <= SECONDS or not chosen:
            chosen.append((tests[index][0], takes))
            begun.add(file[index])
            taken.add(named[index])
            spent += takes
    chosen = [(test, 1.0) for test in _newer(mutant, set(file.values()), covering)] + chosen
    if "/adapters/" in mutant.path and mutant.function and mutant.function not in runs:
        chosen += [(test, 10.0) for test in END_TO_END]
    return chosen


def _newer(mutant: Mutant, files: set[str], covering: dict[str, Any]) -> list[str]:
    """Tests that were written after the map and speak of the mutant's function, or of its class or file: eight at most.

    Those of files that run the function, or that import its module.
    """
    module = mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parent, _, stem = module.rpartition(".")
    naming = rf"{re.escape(module)}\b|from {re.escape(parent)} import [^)]*?\b{stem}\b"
    if parent.endswith(".commands"):
        naming += rf"|\bmain\(\[\"{stem.replace('_', '-')}\""
    imported = re.compile(naming)
    words = {*mutant.function.lstrip("_").split("."), stem}
    spoken = re.compile("|".join(rf"\b_?{re.escape(word)}" for word in words - {"", "__init__"}) or "$.")
    known = _known(covering)
    measured = {test.split("::")[0] for test in known}
    found = []
    for path in _files():
        imports = imported.search(_text(path)) is not None
        # The file's own tests need not say its name, and those of a new file that imports it neither.
        own = 2 * (Path(path).stem == f"test_{stem}") or int(imports and path not in measured)
        if own or imports or path in files:
            new = {name: text for name, text in _tests(path).items() if f"{path}::{name}" not in known}
            found += [(own + len(spoken.findall(text)), f"{path}::{name}") for name, text in new.items()]
    return [test for speaks, test in sorted(found, reverse=True) if speaks][:8]


def _said(mutant: Mutant, found: set[str]) -> dict[str, float]:
    """How much each test function speaks of what is mutated: the words of the place, the rarer the heavier."""
    words = {word.strip("_") for word in re.findall(r"[A-Za-z_]{4,}", f"{mutant.was} {mutant.became}")} - _COMMON
    texts = {test: _tests(path).get(names[-1], "") for test in found for path, *names in [test.split("::")]}
    score = dict.fromkeys(found, 0.0)
    for word in words - {""}:
        speaking = [test for test, text in texts.items() if word in text]
        for test in speaking:
            score[test] += 1 / len(speaking)
    return score


_COMMON = {
    "None",
    "True",
    "False",
    "self",
    "pass",
    "else",
    "raise",
    "ConfigError",
    "return",
    "with",
    "from",
    "path",
    "name",
    "value",
}
_KNOWN: dict[int, set[str]] = {}


def _known(covering: dict[str, Any]) -> set[str]:
    """Names of the map's tests, without their parameters."""
    return _KNOWN.setdefault(id(covering), {test.partition("[")[0] for test, _ in covering["tests"]})


@functools.lru_cache
def _files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


@functools.lru_cache
def _tests(path: str) -> dict[str, str]:
    """A file's tests and their text with decorators, but for those marked slow or for a GPU."""
    tree = ast.parse(_text(path))
    marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
    if _MARKED.search(" ".join(marks)):
        return {}
    texts = {
        node.name: ast.unparse(node)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        and not _MARKED.search(" ".join(map(ast.unparse, node.decorator_list)))
    }  # fmt: skip
    return texts


_MARKED = re.compile(r"mark\.(slow|gpu)")


def _shared(covering: dict[str, Any]) -> dict[str, float]:
    """Seconds that the first test of a file makes ready what the others read: of files that train or start the host."""
    most: dict[str, float] = defaultdict(float)
    for test, seconds in covering["tests"]:
        most[test.split("::")[0]] = max(most[test.split("::")[0]], seconds)
    return {file: seconds for file, seconds in most.items() if seconds > 10 and "/integration/" in file}


def _is_there(test: str) -> bool:
    """Whether a test of the map is still in the tree under its name."""
    path, *names = test.partition("[")[0].split("::")
    return all(f"{name}(" in _text(path) or f"class {name}" in _text(path) for name in names) and bool(_text(path))


def digest(tests: list[tuple[str, float]]) -> str:
    """Of the tests' names and the text of their files."""
    files = sorted({test.split("::")[0] for test, _ in tests})
    return hashlib.sha256("".join([*(test for test, _ in tests), *map(_text, files)]).encode()).hexdigest()[:16]


@functools.lru_cache
def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
