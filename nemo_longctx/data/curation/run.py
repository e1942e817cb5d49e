"""`curate` from its inputs to its report: judge shards in parallel, find duplicates over all, write what stays.

Everything lies in `OUTPUT.work/` until it is whole; a killed run goes on from the shards that were judged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curation.assemble import CODE_GLOBS
from nemo_longctx.data.curation.config import CurateConfig
from nemo_longctx.data.curation.duplicates import Shards, bands_for, first_of_equal, near_duplicates
from nemo_longctx.data.curation.grouping import assemble
from nemo_longctx.data.curation.scores import PERMUTATIONS
from nemo_longctx.data.curation.shard import CurateJob, ShardReport
from nemo_longctx.data.engines import Progress, run_shards
from nemo_longctx.data.inputs import Found, check_globs, find_files, printable, shown
from nemo_longctx.data.opening import stamp_of
from nemo_longctx.data.readers import Part, lines_before, split_files
from nemo_longctx.data.tokenization import load_tokenizer
from nemo_longctx.data.writer import explain_full_disk, is_work_directory, remove_work, work_directory
from nemo_longctx.files import read_mapping, write_text
from nemo_longctx.versions import versions_of

_SMALL = 20  # documents of a length bucket from which on its quantiles mean something


def curate(config: CurateConfig, *, say: Callable[[str], None], progress: Callable[[int], Progress]) -> dict[str, Any]:
    """Make OUTPUT, or find it made, or go on where a killed run stopped.

    Args:
        config: settings.
        say: gets a line for the user now and then.
        progress: see `prepare`; its third step counts characters.

    Returns:
        what `OUTPUT.report.json` holds.

    Raises:
        ConfigError: a bad setting or input, an output that is in the way, or nothing that stays.
        OSError: a full disk, a path without permission.
    """
    output = os.path.abspath(config.output)
    names = output_names(output, config.split_lengths)
    work = Path(f"{output}.work")
    check_globs(config.inputs, config.globs)
    globs = config.globs or (CODE_GLOBS if config.assemble == "repositories" and _folders(config) else ())
    found = find_files(config.inputs, globs, exclude=_own_files(output, names, work))
    if found.passed_over or len(found.files) > 1:
        say(found.summary())
    written = {os.path.realpath(name) for name in (*names, f"{_stem(output)}.report.json")}
    if (lost := next((path for path in found.files if os.path.realpath(path) in written), None)) is not None:
        raise ConfigError("output", config.output, f"{shown(lost)} is read, and would be replaced; name another file")
    with explain_full_disk(str(work)), work_directory(work):
        shards = split_files(found.files, config.format, config.shard_bytes)
        definition = load_tokenizer(config.tokenizer).definition if config.tokenizer else ""
        plan = _plan(config, shards, definition)
        begun = (work / "plan").is_file() and (work / "plan").read_text() == plan  # it had leave to write there
        made = None if begun else _already_made(config, output, names, plan)
        if made is not None:
            say(f"{config.output} is already there, made by the same settings from the same input; nothing to do")
            remove_work(work)
            return made
        _begin(work, plan, definition, say)
        before: list[Any] = []
        if config.assemble:
            parts = [part for shard in shards for part in shard]
            path = assemble(config, parts, work, progress(sum(part.n_bytes for part in parts)))
            before = json.loads((work / "assembled.rejected.json").read_text("utf-8"))
            shards = split_files([str(path)], "jsonl", config.shard_bytes)
        jobs = [
            CurateJob(number=number, parts=tuple(parts), directory=str(work), config=_judging(config))
            for number, parts in enumerate(shards)
        ]
        reports = _judge(config, jobs, say, progress)
        corpus = _Corpus(config, jobs, reports)
        corpus.find_duplicates(say)
        corpus.keep_band(say)
        if not corpus.kept.any():
            raise ConfigError("input", " ".join(config.inputs), f"no document stays ({_counts(corpus, before)}); loosen a rule")
        corpus.write(names, work)
        report = corpus.report(names, before) | _provenance(config, found, plan)
        _publish(output, names, work, corpus, before, report)
        remove_work(work)
    return report


def output_names(output: str, edges: tuple[int, ...]) -> list[str]:
    """OUTPUT, or one file a length bucket: `books.8192-32768.jsonl`."""
    if not edges:
        return [output]
    bounds = [*map(str, edges)]
    return [f"{_stem(output)}.{low}-{high}.jsonl" for low, high in zip(["0", *bounds], [*bounds, ""], strict=True)]


def _own_files(output: str, names: list[str], work: Path) -> set[str]:
    """What a run of `curate` wrote under the output's names, or is about to: none of it is input. What another wrote is."""
    notes = f"{_stem(output)}.report.json"
    unfinished = is_work_directory(work)
    own = {f"{_stem(output)}.rejected.tsv", *(_written_before(output))}
    own |= {notes} if unfinished or "plan" in read_mapping(notes) else set()
    return own | {str(work), *names} if unfinished else own


def _written_before(output: str) -> set[str]:
    """The files that the report of an output names, wherever the folder was then."""
    report = read_mapping(f"{_stem(output)}.report.json")
    listed = report.get("files") if "plan" in report else None
    files = [os.path.basename(str(name)) for name in listed] if isinstance(listed, list) else []
    ours = f"{os.path.basename(_stem(output))}."
    return {os.path.join(os.path.dirname(output), name) for name in files if name.startswith(ours) and name.endswith(".jsonl")}


def _stem(output: str) -> str:
    return output.removesuffix(".jsonl")


def _folders(config: CurateConfig) -> bool:
    return all(os.path.isdir(path) and not _has_records(path) for path in config.inputs)


def _has_records(folder: str) -> bool:
    return any(name.lower().split(".")[-1] in ("jsonl", "gz", "zst", "parquet", "arrow") for name in os.listdir(folder))


def _plan(config: CurateConfig, shards: list[list[Part]], definition: str) -> str:
    stamps = {part.path: stamp_of(part.path) for shard in shards for part in shard}
    settings = {key: value for key, value in asdict(config).items() if key not in ("workers", "engine", "force", "tokenizer")}
    values = [settings, definition, stamps, [[asdict(part) for part in shard] for shard in shards]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _already_made(config: CurateConfig, output: str, names: list[str], plan: str) -> dict[str, Any] | None:
    notes = Path(f"{_stem(output)}.report.json")
    if not notes.is_file() and not any(map(os.path.exists, names)):
        return None
    made = read_mapping(notes)
    if made.get("plan") == plan and all(map(os.path.exists, names)):
        return made
    if config.force or made.get("plan") == plan:
        return None
    mend = f"something else is there{_differs(config, made)}; name another file, or replace it with --force"
    raise ConfigError("output", config.output, mend)


def _differs(config: CurateConfig, made: dict[str, Any]) -> str:
    """` (made with another seed)`: the settings that are others than those of what is there, or that its input has changed."""
    before = made.get("settings")
    if "plan" not in made or not isinstance(before, dict):
        return ""
    now = json.loads(json.dumps(_settings(config)))
    free = ("output", "workers", "engine", "force")
    other = [key for key, value in now.items() if key not in free and before.get(key) != value]
    return f" (made with another {' and another '.join(other)})" if other else " (its input has changed since)"


def _settings(config: CurateConfig) -> dict[str, Any]:
    return asdict(config) | {"inputs": [shown(path) for path in config.inputs]}


def _begin(work: Path, plan: str, definition: str, say: Callable[[str], None]) -> None:
    """Lay out the work directory, keeping what an earlier run of the same plan finished."""
    kept = work / "plan"
    if kept.is_file() and kept.read_text() != plan:
        say("an unfinished run with other settings or other input was here; starting again")
        for path in work.iterdir():
            if path.name != "lock":
                path.unlink()
    if definition:
        (work / "tokenizer.json").write_text(definition, "utf-8")
    kept.write_text(plan)


def _judging(config: CurateConfig) -> CurateConfig:
    """Of assembled documents a shard reads what the run wrote."""
    return replace(config, keys=("text",)) if config.assemble else config


def _judge(
    config: CurateConfig, jobs: list[CurateJob], say: Callable[[str], None], progress: Callable[[int], Progress]
) -> list[ShardReport]:
    reports = {job.number: report for job in jobs if (report := job.load()) is not None}
    return run_shards(jobs, reports, engine=config.engine, workers=config.workers, say=say, progress=progress)


@dataclass
class _Corpus:
    """The documents that passed the shards, and what is decided over all of them."""

    config: CurateConfig
    jobs: list[CurateJob]
    reports: list[ShardReport]
    rows: list[np.ndarray] = field(init=False)
    kept: np.ndarray = field(init=False)  # bool [n]
    rule: dict[int, tuple[str, str]] = field(default_factory=dict)  # document -> (rule, why)
    same: dict[int, int] = field(default_factory=dict)  # document -> the one that it repeats

    def __post_init__(self) -> None:
        self.rows = [np.load(job.path("rows.npy"), mmap_mode="r") for job in self.jobs]
        self.starts = np.concatenate([[0], np.cumsum([len(rows) for rows in self.rows])])
        self.kept = np.ones(int(self.starts[-1]), bool)
        self._before: dict[Part, int] = {}

    def find_duplicates(self, say: Callable[[str], None]) -> None:
        """Drop what repeats a document before it."""
        if not len(self.kept):
            return
        first = first_of_equal(self._column("digest"))
        self._drop_repeats(first, "exact_duplicate")
        threshold = self.config.near_duplicates
        if not threshold:
            return
        say(f"comparing {len(self.kept):,} documents for near duplicates")
        bands = [np.load(job.path("bands.npy"), mmap_mode="r") for job in self.jobs]
        signatures = Shards([np.load(job.path("signatures.npy"), mmap_mode="r") for job in self.jobs])
        n_bands, _ = bands_for(threshold, PERMUTATIONS)
        near = near_duplicates(
            lambda number: np.concatenate([band[number] for band in bands]), n_bands, signatures, len(self.kept), threshold
        )
        self._drop_repeats(near, "near_duplicate")

    def _drop_repeats(self, first: np.ndarray, rule: str) -> None:
        for number in np.flatnonzero((first != np.arange(len(first))) & self.kept).tolist():
            self.kept[number] = False
            self.rule[number] = (rule, "")
            self.same[number] = int(first[number])

    def keep_band(self, say: Callable[[str], None]) -> None:
        """Drop the least and the most compressible of each doubling of length."""
        if self.config.gzip_band is None:
            return
        few = 0
        ratio, doubling = self._column("gzip_ratio"), np.log2(np.maximum(1, self._column("characters"))).astype(int)
        for bucket in np.unique(doubling):
            here = np.flatnonzero((doubling == bucket) & self.kept)
            if len(here) < _SMALL:
                few += len(here)
                continue
            low, high = np.quantile(ratio[here], self.config.gzip_band)
            for number in here[(ratio[here] < low) | (ratio[here] > high)].tolist():
                self.kept[number] = False
                self.rule[number] = ("gzip_band", f"{ratio[number]:.3f} outside {low:.3f} to {high:.3f}")
        if few:
            say(f"--gzip-band leaves {few:,} documents as they are: fewer than {_SMALL} have a length like theirs")

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([rows[name] for rows in self.rows])

    def write(self, names: list[str], work: Path) -> None:
        """Write what stays, in the order of the input, to `work/out-N`."""
        edges = np.array(self.config.split_lengths, np.int64)
        with ExitStack() as stack:
            files = [stack.enter_context(open(work / f"out-{number}", "wb")) for number in range(len(names))]
            for shard, (job, rows) in enumerate(zip(self.jobs, self.rows, strict=True)):
                with open(job.path("text"), "rb") as texts:
                    for number in np.flatnonzero(self.kept[self.starts[shard] : self.starts[shard + 1]]).tolist():
                        row = rows[number]
                        file = files[int(np.searchsorted(edges, row["length"], side="right"))]
                        texts.seek(int(row["start"]))
                        _copy(texts, file, int(row["n_bytes"]))
                        facts = {"source": self.place(shard, number), "length": int(row["length"])}
                        facts["gzip_ratio"] = round(float(row["gzip_ratio"]), 4)
                        file.write(b", " + json.dumps(facts, ensure_ascii=False).encode()[1:] + b"\n")

    def place(self, shard: int, number: int) -> str:
        """Where a document that passed its shard came from: `file:line`, or the group that it was assembled from."""
        if self.config.assemble:
            return self.reports[shard].sources[number]
        row = self.rows[shard][number]
        part = self.jobs[shard].parts[int(row["part"])]
        return f"{shown(part.path)}:{self._line(part, int(row['line']))}"

    def _line(self, part: Part, line: int) -> int:
        if part not in self._before:
            self._before[part] = lines_before(part)
        return self._before[part] + line

    def rejected(self) -> Iterator[tuple[str, int, str, str]]:
        """(where, characters, rule, why) of every document that does not stay."""
        for job, report in zip(self.jobs, self.reports, strict=True):
            for part, line, characters, rule, why in report.rejected:
                path = "assembled" if self.config.assemble else shown(job.parts[part].path)
                yield f"{path}:{self._line(job.parts[part], line)}", characters, rule, why
        for number in sorted(self.rule):
            rule, why = self.rule[number]
            shard = int(np.searchsorted(self.starts, number, side="right")) - 1
            inside = number - int(self.starts[shard])
            if number in self.same:
                other = int(np.searchsorted(self.starts, self.same[number], side="right")) - 1
                why = f"of {self.place(other, self.same[number] - int(self.starts[other]))}"
            yield self.place(shard, inside), int(self.rows[shard][inside]["characters"]), rule, why

    def report(self, names: list[str], before: list[Any]) -> dict[str, Any]:
        """Counts by rule, lengths and compressibility of what stays."""
        rules: dict[str, dict[str, int]] = {}
        everything = [(characters, rule) for _, characters, rule, _ in self.rejected()]
        for characters, rule in [*everything, *((characters, rule) for _, _, characters, rule, _ in before)]:
            counts = rules.setdefault(rule, {"documents": 0, "characters": 0})
            counts["documents"] += 1
            counts["characters"] += characters
        length, characters = self._column("length")[self.kept], self._column("characters")[self.kept]
        edges = 1 << np.arange(8, max(9, int(length.max()).bit_length() + 1))
        bucket = np.searchsorted(edges, length, side="right")
        lengths = [
            {
                "below": int(edge),
                "documents": int((bucket == number).sum()),
                "characters": int(characters[bucket == number].sum()),
            }
            for number, edge in enumerate(edges)
            if (bucket == number).any()
        ]
        quantiles = np.quantile(self._column("gzip_ratio")[self.kept], [0, 0.1, 0.5, 0.9, 1]).round(4).tolist()
        n_rejected = sum(counts["documents"] for counts in rules.values())
        return {
            "documents": int(self.kept.sum()) + n_rejected,
            "kept": {"documents": int(self.kept.sum()), "characters": int(characters.sum()), "length": int(length.sum())},
            "rejected": rules,
            "length_unit": "tokens" if self.config.tokenizer else "characters",
            "lengths": lengths,
            "gzip_ratio_quantiles": dict(zip(("0", "0.1", "0.5", "0.9", "1"), quantiles, strict=True)),
            "files": [shown(name) for name in names],
        }


def _counts(corpus: _Corpus, before: list[Any]) -> str:
    counts: dict[str, int] = {}
    for rule in [*(rule for _, _, rule, _ in corpus.rejected()), *(rule for _, _, _, rule, _ in before)]:
        counts[rule] = counts.get(rule, 0) + 1
    return ", ".join(f"{count:,} {rule}" for rule, count in counts.items()) or "there is none"


def _copy(source: BinaryIO, target: BinaryIO, n_bytes: int) -> None:
    while n_bytes:
        block = source.read(min(n_bytes, 1 << 20))
        target.write(block)
        n_bytes -= len(block)


def _provenance(config: CurateConfig, found: Found, plan: str) -> dict[str, Any]:
    return {
        "settings": _settings(config),
        "passed_over": {shown(path): why for path, why in found.passed_over.items()},
        "versions": {"nemo_longctx": versions_of("nemo-longctx")["nemo-longctx"], "numpy": np.__version__},
        "plan": plan,
    }


def _publish(output: str, names: list[str], work: Path, corpus: _Corpus, before: list[Any], report: dict[str, Any]) -> None:
    """Give everything its name, the report last: it says that all is there."""
    notes, listed = f"{_stem(output)}.report.json", work / "rejected"
    for name in _written_before(output).difference(names):  # of other length buckets
        Path(name).unlink(missing_ok=True)
    Path(notes).unlink(missing_ok=True)
    with open(listed, "w", encoding="utf-8") as file:
        for where, characters, rule, why in corpus.rejected():
            file.write(f"{printable(where)}\t{characters}\t{rule}\t{printable(why)}\n")
        for path, line, characters, rule, why in before:
            file.write(f"{path}:{line}\t{characters}\t{rule}\t{printable(why)}\n")
    os.replace(listed, f"{_stem(output)}.rejected.tsv")
    for number, name in enumerate(names):
        os.replace(work / f"out-{number}", name)
    write_text(notes, json.dumps(report, indent=1) + "\n")
