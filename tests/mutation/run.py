"""Plant faults one at a time and see whether the tests notice: `run.py [--number N] [--changed REF] [--floor 0.85] ...`.

A seeded sample of mutants (points.py) is planted in a copy of the tree, each in a fresh process forked from one that has
imported the heavy libraries, and the tests that run the mutated function (map of collect.py) run until the first fails. A
mutant is caught by a failing test or by a run that does not end in its time; it survives when all pass, and when no test
runs its function. Equivalents, which change nothing that can be seen, are in equivalent.json with the reason of each.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gzip
import hashlib
import json
import multiprocessing
import queue as queues
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
from choice import SECONDS, digest, tests_of  # noqa: E402
from collect import functions  # noqa: E402
from page import page  # noqa: E402
from planting import work  # noqa: E402
from points import Mutant, mutants  # noqa: E402


def main() -> int:
    options = arguments()
    covering = json.loads(gzip.decompress(Path(options.map).read_bytes()))
    equivalent = {each["mutant"]: each["why"] for each in json.loads(EQUIVALENT.read_text(encoding="utf-8"))}
    files = [] if options.named else changed_files(options.changed) if options.changed else package_files()
    if not files and options.changed:
        why = "no such commit is here" if files is None else "no file of the package differs from it"
        print(f"nothing to plant: {options.changed}: {why}")
        return 0
    every = {path: mutants(path, (ROOT / path).read_text(encoding="utf-8")) for path in files}
    gone = {name for name in equivalent if name.split("::")[0] in every} - {m.name for found in every.values() for m in found}
    if gone and not (options.changed or options.named):
        print(f"{EQUIVALENT}: no longer in the code, take them out: {sorted(gone)}")
        return 2
    chosen = named() if options.named else sample(every, options.number, options.seed, equivalent)
    results = run_all(chosen, covering, options)
    text = report(results, len(chosen), covering, options)
    print(text.split("\n## Unnoticed once")[0])
    if options.report:
        Path(options.report).write_text(text, encoding="utf-8")
    cores = [result["caught"] for result in results if "/adapters/" not in result["mutant"]]
    return 0 if not cores or sum(cores) / len(cores) >= options.floor else 1


LONG = 30.0  # seconds of tests, which train; mutants that need them come last
EQUIVALENT = Path(__file__).with_name("equivalent.json")
NAMED = Path(__file__).with_name("named.json")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=400, help="mutants in all, spread evenly over the modules (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--changed", metavar="REF", help="only files that differ from this commit")
    parser.add_argument("--named", action="store_true", help="the faults of named.json instead of a sample")
    parser.add_argument("--only", nargs="*", default=[""], help="only files whose path contains one of these")
    parser.add_argument("--minutes", type=float, help="stop after so long; the report says how many were not reached")
    parser.add_argument(
        "--floor",
        type=float,
        default=0.0,
        help="end with status 1 below this share caught in cores; slow tests, which no map holds, test adapters too",
    )
    parser.add_argument("--map", default=str(Path(__file__).with_name("map.json.gz")), help="what collect.py wrote")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", help="write the report (Markdown) here, too")
    parser.add_argument("--journal", help="JSON lines of what has been run; a second call goes on behind it")
    return parser.parse_args()


def package_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "nemo_longctx/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def changed_files(reference: str) -> list[str] | None:
    """Files of the package that differ from a commit; None where that commit is not here, as in a clone without its past."""
    known = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}"], cwd=ROOT, capture_output=True
    )
    if known.returncode:
        return None
    command = ["git", "diff", "--name-only", "--diff-filter=d", reference, "--", "nemo_longctx/*.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def sample(every: dict[str, list[Mutant]], number: int, seed: int, equivalent: dict[str, str]) -> list[Mutant]:
    """A round over the modules takes one mutant of each, until there are `number`; no two of one node or of one name.

    The order is by a hash of the name, so that an edit changes the sample only where it changes the code.
    """

    def drawn(name: str) -> str:
        return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()

    piles = {path: sorted(found, key=lambda m: (drawn(m.name), -m.line)) for path, found in every.items()}
    chosen: list[Mutant] = []
    taken: set[object] = set(equivalent)
    while len(chosen) < number and any(piles.values()):
        for path in sorted(piles, key=drawn):
            while piles[path] and len(chosen) < number:
                mutant = piles[path].pop()
                node = (path, mutant.line, mutant.was)
                if not taken & {node, mutant.name} and _parses(mutant.source):
                    taken |= {node, mutant.name}
                    chosen.append(mutant)
                    break
    return chosen


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:  # a change that no file can hold
        return False
    return True


def known_faults() -> list[dict[str, Any]]:
    """Content of named.json."""
    faults: list[dict[str, Any]] = json.loads(NAMED.read_text(encoding="utf-8"))
    return faults


def named() -> list[Mutant]:
    """Faults that a review of the tests found unnoticed once, each a text of a file, what it became, and the test for it.

    Those whose test is slow are left to the slow tests.
    """
    chosen = []
    for each in known_faults():
        if each.get("slow"):
            continue
        source = (ROOT / each["path"]).read_text(encoding="utf-8")
        if source.count(each["was"]) != 1:
            raise SystemExit(f"{NAMED}: {each['path']} holds {each['was']!r} {source.count(each['was'])} times; say it anew")
        line = source[: source.index(each["was"])].count("\n") + 1 + (each["was"][0] in "\n ")
        planted = source.replace(each["was"], each["became"])
        function = functions(source)[line]
        chosen.append(Mutant(each["path"], line, function, each["about"], each["was"], each["became"], planted))
    return chosen


def run_all(chosen: list[Mutant], covering: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    told = {each["about"]: [(each["test"], SECONDS)] for each in known_faults()} if options.named else {}
    tests = {mutant.name: told.get(mutant.kind) or tests_of(mutant, covering) for mutant in chosen}
    against = {name: digest(found) for name, found in tests.items()}  # now, as the workers copy them
    journal = Path(options.journal) if options.journal else None
    done: dict[str, dict[str, Any]] = {}
    first: dict[str, bool] = {}  # whether the tests of then caught it
    if journal is not None and journal.exists():
        for each in map(json.loads, journal.read_text(encoding="utf-8").splitlines()):
            done[each["mutant"]] = each
            first.setdefault(each["mutant"], each["caught"])
    again = set()  # what survived other tests than today's is run again, and counts as it was until then
    for mutant in chosen:
        before = done.get(mutant.name, {"caught": True})
        if not before["caught"] and before["against"] != against[mutant.name]:
            again.add(mutant.name)
            before["how"] += ", which have changed since"
    todo = [m for m in chosen if (m.name not in done or m.name in again) and any(part in m.path for part in options.only)]
    todo.sort(key=lambda m: sum(seconds for _, seconds in tests[m.name]) > LONG)
    queue: Any = multiprocessing.get_context("spawn").Queue()
    queue.cancel_join_thread()  # what is not reached stays in it at the end
    answers: Any = multiprocessing.get_context("spawn").Queue()
    for index, mutant in enumerate(todo):
        queue.put((index, tests[mutant.name]))
    known = frozenset(test for test, _ in covering["tests"])
    workers = []
    for _ in range(min(options.processes, len(todo))):
        queue.put(None)
        worker = multiprocessing.get_context("spawn").Process(target=work, args=(queue, answers, todo, known))
        worker.start()
        workers.append(worker)
    ended = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the workers
    try:
        gather(todo, workers, answers, done, against, journal, options)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join(20)
            worker.kill()
        signal.signal(signal.SIGTERM, ended)
    reached = [mutant for mutant in chosen if mutant.name in done]
    return [done[m.name] | {"line": m.line, "first": first.get(m.name, done[m.name]["caught"])} for m in reached]


def gather(
    todo: list[Mutant], workers: list[Any], answers: Any, done: dict[str, dict[str, Any]],
    against: dict[str, str], journal: Path | None, options: argparse.Namespace,
) -> None:  # fmt: skip
    """Take the workers' answers into `done` and the journal until all are there or the minutes over."""
    began = time.monotonic()
    for number in range(len(todo)):
        answer = None
        while answer is None and (options.minutes is None or time.monotonic() - began < 60 * options.minutes):
            with contextlib.suppress(queues.Empty):
                answer = answers.get(timeout=2)
            if answer is None and not any(worker.is_alive() for worker in workers):
                raise SystemExit("the processes that run the tests have died; what they said stands above")
        if answer is None:
            print(f"{options.minutes:g} minutes are over: {len(todo) - number} of {len(todo)} not reached", flush=True)
            return
        index, caught, how, seconds = answer
        mutant = todo[index]
        result = {
            "mutant": mutant.name,
            "line": mutant.line,
            "kind": mutant.kind,
            "caught": caught,
            "how": how,
            "seconds": seconds,
            "against": against[mutant.name],
        }
        done[mutant.name] = result
        if journal is not None:
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        sign = "caught  " if caught else "SURVIVED"
        print(
            f"{number + 1}/{len(todo)} {sign} {mutant.path}:{mutant.line} {mutant.was} -> {mutant.became} ({how})", flush=True
        )


def report(results: list[dict[str, Any]], asked: int, covering: dict[str, Any], options: argparse.Namespace) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    what = "--named" if options.named else f"--number {options.number} --seed {options.seed}"
    what += f" --changed {options.changed}" if options.changed else ""
    return page(
        results,
        asked=asked,
        command=f"`python tests/mutation/run.py {what}` at {commit.stdout.strip()}",
        tests=len(covering["tests"]),
        equivalents=len(json.loads(EQUIVALENT.read_text(encoding="utf-8"))),
        named=known_faults(),
    )


if __name__ == "__main__":
    sys.exit(main())
