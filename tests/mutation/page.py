"""docs/mutants.md: what run.py planted, and what was caught of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ABOUT = """# Planted faults

A small fault (a bound, a sign, a dropped check or argument) is planted in a copy of the tree, and the default tests that run
its function run until one fails: the likeliest 40 test functions, for at most 20 s. `make mutants` takes a seeded sample of
400 over the package, modules in turn, those last that only tests of training meet, and writes this page anew; it goes on where
it was stopped, and what survived is run again once its tests change.
`make mutants-changed REF=main` takes 40 in the files that differ from REF, for four minutes at most, and fails under 85 %
of those in cores; CI does so for its last commit.
Which test runs which function is in a map that `tests/mutation/collect.py` makes; slow tests are not in it. Faults that change
nothing are in `tests/mutation/equivalent.json` with the reason of each, and are not drawn.
"""

NAMED = """
## Unnoticed once

Faults that a review of the tests found unnoticed. Each was planted again and is caught by the test beside it
(`run.py --named`), save those marked slow.

| fault | where | the test that catches it |
| --- | --- | --- |"""


def page(
    results: Sequence[Mapping[str, Any]], *, asked: int, command: str, tests: int, equivalents: int,
    named: Sequence[Mapping[str, Any]],
) -> str:  # fmt: skip
    """The page.

    Args:
        results: of each mutant its name, line, kind, whether it was caught, how, in how many seconds; `first`: whether by the
            tests that it met when it was drawn. asked: how many were drawn. command: how, and at which commit.
        tests: of the map. equivalents: in their list. named: the content of named.json.
    """
    rooms: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        parts = Path(result["mutant"].split("::")[0]).parts[1:]
        rooms["/".join(parts[:2]) if parts[0] == "adapters" else parts[0] if len(parts) > 1 else "top level"].append(result)
    groups: dict[str, list[Mapping[str, Any]]] = {"**cores**": [], "**adapters**": []}
    for room, found in rooms.items():
        groups["**adapters**" if room.startswith("adapters") else "**cores**"] += found
    seconds = sum(result["seconds"] for result in results)
    lines = [
        ABOUT,
        f"{command}: {len(results)} of {asked} reached, against {tests:,} tests, in {seconds:,.0f} s of test processes;",
        f"{equivalents} equivalents known. The last column is what the tests caught that were there when a fault was first",
        "planted; tests written since caught the rest.",
        "",
        "| where | planted | caught | share | at first |",
        "| --- | --- | --- | --- | --- |",
    ]
    for room, found in [*sorted(rooms.items()), *groups.items()]:
        if found:
            caught, first = (sum(bool(each[key]) for each in found) for key in ("caught", "first"))
            lines.append(
                f"| {room} | {len(found)} | {caught} | {100 * caught / len(found):.0f} % | {100 * first / len(found):.0f} % |"
            )
    lines += ["", "## Survivors", ""]
    for each in sorted((result for result in results if not result["caught"]), key=lambda result: result["mutant"]):
        path, function, change = each["mutant"].split("::", 2)
        lines.append(f"- {path}:{each['line']} `{function}` {each['kind']}: `{change}` ({each['how']})")
    lines.append(NAMED)
    for each in named:
        where, test = each["path"].removeprefix("nemo_longctx/"), each["test"].removeprefix("tests/")
        lines.append(f"| {each['about']} | `{where}` | `{test}`{' (slow)' * bool(each.get('slow'))} |")
    return "\n".join(lines) + "\n"
