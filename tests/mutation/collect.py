"""Which tests run which function: `collect.py MAP.json.gz [pytest's arguments]` runs the tests once under coverage.

`collect.py MAP.json.gz --of MAP...` makes one map of several, so that folders can be measured apart, or one anew: where two
know a test, the later one is believed.

Contexts are tests; a process that a test starts is measured too, and its lines count for that test. Functions rather than
lines are kept, so that the map holds while lines move.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """[run]
source = nemo_longctx
parallel = true
patch = subprocess
context = ${PYTEST_CURRENT_TEST-}
data_file = DATA
"""


class Recorder:
    """A plugin of pytest: the context of the lines that run in a test is the test; how long it took is kept beside."""

    def pytest_runtest_protocol(self, item, nextitem):
        from coverage import Coverage

        current = Coverage.current()
        if current is not None:
            current.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report):
        with open(os.environ["MUTANTS_DURATIONS"], "a", encoding="utf-8") as file:
            file.write(json.dumps([report.nodeid, report.duration, report.outcome]) + "\n")


def functions(source: str) -> list[str]:
    """Name of the innermost function or class of each line of a file, from line 1; "" at its top."""
    names = [""] * (source.count("\n") + 2)

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                inner = f"{prefix}.{child.name}".lstrip(".")
                for line in range(child.body[0].lineno, child.end_lineno + 1):
                    names[line] = inner
            walk(child, inner)

    walk(ast.parse(source), "")
    return names


def main() -> None:
    target, *arguments = sys.argv[1:]
    if arguments[:1] == ["--of"]:
        return join([Path(each) for each in arguments[1:]], Path(target))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "coveragerc").write_text(SETTINGS.replace("DATA", str(place / "data")), encoding="utf-8")
        environment = os.environ | {
            "MUTANTS_DURATIONS": str(place / "durations"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT / 'tests' / 'mutation'}:{ROOT}",
        }  # fmt: skip
        coverage = [sys.executable, "-m", "coverage"]
        command = [*coverage, "run", f"--rcfile={place / 'coveragerc'}", "-m", "pytest", "-p", "collect", *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)  # a failing test still says what it runs
        subprocess.run([*coverage, "combine", f"--rcfile={place / 'coveragerc'}", "--quiet"], cwd=ROOT, check=True)
        write_map(place / "data", place / "durations", Path(target))


def write_map(data: Path, durations: Path, target: Path) -> None:
    """`{"functions": {path: {function: [test's number]}}, "tests": [[node id, seconds]]}`, as gzipped JSON."""
    from coverage import CoverageData

    seconds: dict[str, float] = defaultdict(float)
    failed = set()
    for line in durations.read_text(encoding="utf-8").splitlines():
        node, took, outcome = json.loads(line)
        seconds[node] += took
        if outcome == "failed":
            failed.add(node)
    tests = sorted(set(seconds) - failed)
    number = {node: index for index, node in enumerate(tests)}
    measured, found = CoverageData(basename=str(data)), {}
    measured.read()
    for file in sorted(measured.measured_files()):
        path = Path(file)
        if not path.is_relative_to(ROOT):
            continue
        names = functions(path.read_text(encoding="utf-8"))
        runs: dict[str, set[int]] = defaultdict(set)
        for line, contexts in measured.contexts_by_lineno(file).items():
            for context in contexts:
                node = context.rsplit(" (", 1)[0] if context.endswith(")") else context
                if node in number and line < len(names):
                    runs[names[line]].add(number[node])
        found[str(path.relative_to(ROOT))] = {name: sorted(run) for name, run in sorted(runs.items())}
    save(found, [[node, round(seconds[node], 2)] for node in tests], target)


def join(parts: list[Path], target: Path) -> None:
    """One map of several; functions and tests that are gone from the tree are left out."""
    took: dict[str, float] = {}
    runs: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)  # of a function: test -> whether it runs it
    for part in parts:
        content = json.loads(gzip.decompress(part.read_bytes()))
        names = [node for node, _ in content["tests"]]
        for known in runs.values():
            known.update(dict.fromkeys(known.keys() & set(names), False))
        took.update((node, seconds) for node, seconds in content["tests"] if (ROOT / node.split("::")[0]).exists())
        for path, functions_of in content["functions"].items():
            for name, numbers in functions_of.items():
                runs[path, name].update((names[number], True) for number in numbers)
    tests = sorted(took)
    number = {node: index for index, node in enumerate(tests)}
    found: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for (path, name), known in sorted(runs.items()):
        if (ROOT / path).exists():
            found[path][name] = sorted(number[node] for node, does in known.items() if does and node in number)
    save(dict(found), [[node, took[node]] for node in tests], target)


def save(found: dict[str, dict[str, list[int]]], tests: list[list[str | float]], target: Path) -> None:
    content = {"functions": found, "tests": tests}
    target.write_bytes(gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0))
    print(f"{target}: {len(tests)} tests, {sum(map(len, found.values()))} functions of {len(found)} files")


def pytest_configure(config):
    config.pluginmanager.register(Recorder())


if __name__ == "__main__":
    main()
