"""Blind side-by-side comparison of two models by human raters: the page, and the table from the votes.

The page knows left and right only. Which side is whose is a function of the two files and the seed, worked out again when the
votes are counted, so nothing in the page can tell a rater.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_longctx.config import ConfigError

OUTCOMES = ("win", "tie", "loss")
_Z = 1.959963984540054  # the normal's 97.5 % point


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One example; `swapped` where A's answer stands on the right."""

    id: str
    prompt: str
    a: str
    b: str
    swapped: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The examples in the order of the page. `page` names the page that they make."""

    page: str
    pairs: tuple[Pair, ...]


def compare_files(a: Path, b: Path, *, seed: int) -> Comparison:
    """Pair the rows `{"id", "prompt", "response"}` of two files, in random order, each side left equally often.

    Raises:
        ConfigError: bad rows, or files that do not answer the same examples.
    """
    ours, theirs = _responses(a), _responses(b)
    for one, other, path in ((ours, theirs, b), (theirs, ours, a)):
        missing = sorted(set(one) - set(other))
        if missing:
            mend = f"lacks {len(missing)} of the other file's examples, {missing[0]!r} first; both must answer the same"
            raise ConfigError("compare", str(path), mend)
    for example, (prompt, _) in ours.items():
        if theirs[example][0] != prompt:
            raise ConfigError("compare", example, "the two files give this example different prompts")
    facts = json.dumps([sorted(ours.items()), sorted(theirs.items()), seed])
    page = hashlib.sha256(facts.encode()).hexdigest()[:16]
    draw = random.Random(page)
    order = sorted(ours)
    draw.shuffle(order)
    sides = [number % 2 == 1 for number in range(len(order))]
    draw.shuffle(sides)
    pairs = tuple(
        Pair(id=example, prompt=ours[example][0], a=ours[example][1], b=theirs[example][1], swapped=swapped)
        for example, swapped in zip(order, sides, strict=True)
    )
    return Comparison(page=page, pairs=pairs)


def _responses(path: Path) -> dict[str, tuple[str, str]]:
    rows: dict[str, tuple[str, str]] = {}
    for where, row in _json_lines(path):
        fields = [row.get(name) for name in ("prompt", "response")] if isinstance(row, dict) else [None]
        named = isinstance(row, dict) and isinstance(row.get("id"), str | int)
        if not isinstance(row, dict) or not named or not all(isinstance(field, str) for field in fields):
            raise ConfigError("compare", where, 'is no row {"id": ..., "prompt": "...", "response": "..."}')
        if str(row["id"]) in rows:
            raise ConfigError("compare", where, f"gives a second answer to {row['id']!r}")
        rows[str(row["id"])] = (row["prompt"], row["response"])
    if not rows:
        raise ConfigError("compare", str(path), "holds no row")
    return rows


def _json_lines(path: Path) -> Iterable[tuple[str, object]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except ValueError as error:
                    raise ConfigError("compare", f"{path}:{number}", f"is not JSON ({error})") from None


def page_html(comparison: Comparison) -> str:
    """The page, in one file that loads nothing from elsewhere."""
    examples = [
        {
            "id": pair.id,
            "prompt": pair.prompt,
            "left": pair.b if pair.swapped else pair.a,
            "right": pair.a if pair.swapped else pair.b,
        }
        for pair in comparison.pairs
    ]
    # No answer may end the script element that carries it: "<" never appears in it.
    data = json.dumps({"page": comparison.page, "examples": examples}).replace("<", "\\u003c")
    template = (Path(__file__).parent / "compare.html").read_text("utf-8")
    return template.replace("__DATA__", data)


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of the votes with its 95 % interval, each in [0, 1]."""

    share: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """How A fared against B. `agreement`: how often two raters of an example voted alike; None with one rater each. `pairs`:
    examples of the page, voted on or not; 0 where nobody says."""

    shares: Mapping[str, Share]
    votes: int
    examples: int
    raters: int
    agreement: float | None
    pairs: int = 0


def labels(a: Path, b: Path) -> tuple[str, str]:
    """What to call two files: their names, with as many of the folders above as tell them apart.

    Raises:
        ConfigError: both are the same file.
    """
    parts = [(*path.absolute().parts[:-1], path.stem) for path in (a, b)]
    for count in range(1, max(map(len, parts)) + 1):
        one, other = ("/".join(part[-count:]) for part in parts)
        if one != other:
            return one, other
    raise ConfigError("compare", str(a), "is given twice; name the answers of two models")


def cut_short(path: Path) -> int:
    """Answers of a file that ended at their longest length and not by themselves (`generate` and servers say so)."""
    return sum(isinstance(row, dict) and row.get("finish_reason") == "length" for _, row in _json_lines(path))


def read_votes(comparison: Comparison, paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """{example: {rater: win, tie or loss of A}} of the saved files; a rater's later vote on an example replaces the earlier.

    Raises:
        ConfigError: votes on another page or example, or of an unknown form.
    """
    pairs = {pair.id: pair for pair in comparison.pairs}
    votes: dict[str, dict[str, str]] = {}
    for path in paths:
        for where, row in _json_lines(path):
            if not isinstance(row, dict) or not {"page", "rater", "id", "vote"} <= row.keys():
                raise ConfigError("votes", where, "is no saved vote")
            if row["page"] != comparison.page:
                raise ConfigError("votes", where, "is a vote on another page; give the files and the seed that made its page")
            if not isinstance(row["id"], str) or row["id"] not in pairs or row["vote"] not in ("left", "tie", "right"):
                raise ConfigError("votes", where, "names no example of the page, or no vote of left, tie and right")
            swapped = pairs[row["id"]].swapped
            outcome = "tie" if row["vote"] == "tie" else "win" if (row["vote"] == "left") != swapped else "loss"
            votes.setdefault(row["id"], {})[str(row["rater"])] = outcome
    if not votes:
        raise ConfigError("votes", [str(path) for path in paths], "hold no vote")
    return votes


def tabulate(votes: Mapping[str, Mapping[str, str]], *, pairs: int = 0) -> Table:
    """Shares of win, tie and loss over all votes, with 95 % intervals that allow for several raters of one example.

    Votes on one example are not independent, so the variance is that of the examples' votes (the ratio estimator for
    clusters: Cochran 1977, section 11.12). It sets an effective number of votes, and that the Wilson interval (Wilson 1927;
    Korn and Graubard 1998 for the device), which stays sensible where a share is near 0 or 1.
    """
    by_example = [list(raters.values()) for raters in votes.values()]
    counts = np.array([len(outcomes) for outcomes in by_example], dtype=float)
    shares = {}
    for outcome in OUTCOMES:
        hits = np.array([outcomes.count(outcome) for outcomes in by_example], dtype=float)
        shares[outcome] = _share(hits, counts)
    alike = [_alike(outcomes) for outcomes in by_example if len(outcomes) > 1]
    return Table(
        shares=shares,
        votes=int(counts.sum()),
        examples=len(by_example),
        raters=len({rater for raters in votes.values() for rater in raters}),
        agreement=float(np.mean(alike)) if alike else None,
        pairs=pairs,
    )


def _share(hits: np.ndarray, counts: np.ndarray) -> Share:
    n, total = len(counts), counts.sum()
    p = hits.sum() / total
    effective = float(n)  # at a share of 0 or 1, or with one example, nothing tells how alike the votes are: assume wholly
    if n > 1 and 0 < p < 1:
        variance = n / (n - 1) * ((hits - p * counts) ** 2).sum() / total**2
        # Not beyond the votes there are, nor below what they would be if the largest example had voted as one.
        effective = float(np.clip(p * (1 - p) / variance, 1.0, total)) if variance > 0 else float(total)
    centre = (p + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
    half = _Z / (1 + _Z**2 / effective) * np.sqrt(p * (1 - p) / effective + _Z**2 / (4 * effective**2))
    return Share(share=float(p), low=float(max(0.0, centre - half)), high=float(min(1.0, centre + half)))


def _alike(outcomes: Sequence[str]) -> float:
    """The share of this example's pairs of raters that voted alike."""
    n = len(outcomes)
    return sum(outcomes.count(outcome) * (outcomes.count(outcome) - 1) for outcome in OUTCOMES) / (n * (n - 1))


def outcome_names(*, a: str, b: str) -> dict[str, str]:
    """What each outcome means where the models are called `a` and `b`."""
    return {"win": f"{a} better", "tie": "tie", "loss": f"{b} better"}


def voted_on(table: Table) -> str:
    """`12 examples`, or `12 of 100 examples` where not all of the page were voted on."""
    return f"{table.examples:,}{f' of {table.pairs:,}' if table.pairs > table.examples else ''} examples"


def table_text(table: Table, *, a: str, b: str) -> str:
    """The table for a terminal."""
    names = outcome_names(a=a, b=b)
    width = max(len(name) for name in names.values())
    lines = [f"{'':{width}}  share   95 % interval"]
    for outcome in OUTCOMES:
        share = table.shares[outcome]
        lines.append(f"{names[outcome]:{width}}  {share.share:6.1%}  [{share.low:.1%}, {share.high:.1%}]")
    agreement = "" if table.agreement is None else f", raters agree on {table.agreement:.1%}"
    lines.append(f"{table.votes:,} votes on {voted_on(table)} by {table.raters} raters{agreement}")
    return "\n".join(lines)
