"""JSONL, Parquet or text files -> Megatron's `.bin/.idx`: in parallel, atomically, and going on where a killed run stopped.

While it runs, everything lies in `PREFIX.work/`: the plan (which bytes of which files make which shard), the tokenizer, and
the shards that are done. Nothing of the output is touched before all shards are there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.data.corpus import open_corpus, token_dtype
from nemo_longctx.data.engines import ENGINES
from nemo_longctx.data.inputs import FORMATS, Found, find_files, format_of, is_url, shown, size_of, stamp_of
from nemo_longctx.data.long_text import pieces_of
from nemo_longctx.data.merge import is_shard_directory, output_names, own_files, publish_merged, publish_shards
from nemo_longctx.data.readers import Part, read_part, split_file
from nemo_longctx.data.shards import Progress, ShardJob, ShardReport, bad_record, is_held_out, load_report
from nemo_longctx.data.tokenization import TokenizerInfo, check_vocab_size, load_tokenizer, read_back, train_bpe, trained_with
from nemo_longctx.data.writer import explain_full_disk

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of `prepare`.

    Attributes:
        inputs: files, or directories (see `inputs.find_files`), or URLs of either, read through fsspec.
        output: prefix of the corpus, without .bin or .idx; `OUTPUT_holdout` is the holdout's.
        tokenizer: directory or Hugging Face name; with `train_tokenizer`, the directory to save the new one in.
        train_tokenizer: vocabulary of a byte-level BPE to train on the input; None uses `tokenizer` as it is.
        train_tokenizer_bytes: how much text to train it on, spread evenly over the input; None is 16 MiB.
        keys: which texts of a record; several are joined by an empty line, one that ends in `?` may be missing.
        globs: which files of the directories.
        format: one of `inputs.FORMATS`, or `auto`: by the file's name.
        bos: begin each document with the tokenizer's `bos_token`.
        append_eod: end each document with `eod_token` (by default the tokenizer's `eos_token`).
        on_error: `fail` at the first bad record, or `skip` and list them.
        replace_invalid: put U+FFFD for bytes that are not UTF-8 and for half a surrogate pair, rather than call a record bad.
        holdout: share of the documents, by a hash of their text, for the holdout corpus.
        max_input_bytes: take whole files, in an order drawn from `seed`, until they hold so much; None takes all.
        seed: of the holdout and the choice of files.
        workers: processes; None is one a core.
        engine: `processes` or `ray`.
        keep_shards: leave the shards unmerged, as a directory OUTPUT that `corpus.open_corpus` reads as one.
        shard_bytes: input per shard; None is 1/64 of the whole, within 1 to 256 MiB.
        force: replace an output that other settings made.

    Raises:
        ConfigError: a value out of its range.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: str
    train_tokenizer: int | None = None
    train_tokenizer_bytes: int | None = None
    keys: tuple[str, ...] = ("text",)
    globs: tuple[str, ...] = ()
    format: str = "auto"
    bos: bool = False
    append_eod: bool = True
    eod_token: str | None = None
    on_error: str = "fail"
    replace_invalid: bool = False
    holdout: float = 0.0
    max_input_bytes: int | None = None
    seed: int = 1234
    workers: int | None = None
    engine: str = "processes"
    keep_shards: bool = False
    shard_bytes: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for key, known in {"format": ("auto", *FORMATS), "on_error": ("fail", "skip"), "engine": tuple(ENGINES)}.items():
            if getattr(self, key) not in known:
                raise ConfigError(key, getattr(self, key), did_you_mean(str(getattr(self, key)), known))
        for key in ("train_tokenizer_bytes", "max_input_bytes", "workers", "shard_bytes"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "use 1 or more")
        if not 0 <= self.holdout < 1:
            raise ConfigError("holdout", self.holdout, "a share of the documents, from 0 to below 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "use a number from 0 to 2**63 - 1")
        if not self.inputs or not self.keys:
            key = "input" if not self.inputs else "keys"
            raise ConfigError(key, (), "name at least one")
        if self.keep_shards:  # a directory, which may be named with a slash at its end
            object.__setattr__(self, "output", self.output.rstrip("/"))
        _check_output(self.output)
        if self.train_tokenizer is not None:
            check_vocab_size(self.train_tokenizer)
        elif self.train_tokenizer_bytes is not None:
            mend = "has no effect without train_tokenizer, the vocabulary of the tokenizer to train; set both or neither"
            raise ConfigError("train_tokenizer_bytes", self.train_tokenizer_bytes, mend)
        if not self.append_eod and self.eod_token is not None:
            raise ConfigError("eod_token", self.eod_token, "it is not appended with append_eod off; drop one of the two")


def _check_output(output: str) -> None:
    """Refuse an output whose files would not lie where its name says."""
    if output.endswith((".bin", ".idx")):
        raise ConfigError("output", output, f"is a prefix, to which .bin and .idx are added; name it {output[:-4]!r}")
    if os.path.basename(output) in ("", ".", ".."):
        mend = "has no name of its own to which .bin and .idx could be added; put one behind it, say 'data/corpus'"
        raise ConfigError("output", output, mend)


def prepare(config: PrepareConfig, *, say: Callable[[str], None], progress: Callable[[int], Progress]) -> dict[str, Any]:
    """Make the corpus, or find it made by the same settings from the same input, or go on where a killed run stopped.

    Args:
        config: settings.
        say: gets a line for the user now and then.
        progress: called with the bytes of input once they are known; what it returns is called with steps of
            (input bytes, documents, tokens).

    Returns:
        what `OUTPUT.json` holds: counts by split, tokenizer, sources, versions, seed.

    Raises:
        ConfigError: a bad setting, input or tokenizer, a bad record (`on_error=fail`), or an output that is in the way.
        OSError: a full disk, a path without permission.
    """
    output = os.path.abspath(config.output)
    work = Path(f"{output}.work")
    found = _find(config, output)
    if found.passed_over or len(found.files) > 1:
        say(found.summary())
    sources = _sources(config, found.files)
    with explain_full_disk(str(work)), _locked(work):
        tokenizer = _tokenizer(config, sources, say)
        if config.append_eod and tokenizer.eod_id is None:
            mend = "it has no eos_token to end documents with; name one by --eod-token, or use --no-append-eod"
            raise ConfigError("tokenizer", config.tokenizer, mend)
        if config.bos and tokenizer.bos_id is None:
            raise ConfigError("bos", True, f"{config.tokenizer} has no bos_token to begin documents with; leave it out")
        _tell_plain_added(tokenizer, say)
        plan = _plan_hash(config, sources, tokenizer)
        made = _already_made(config, output, plan)
        if made is not None:
            say(f"{config.output} is already there, made by the same settings from the same input; nothing to do")
        else:
            jobs = _jobs(config, sources, tokenizer, work, plan, say)
            reports = _run(config, jobs, say, progress)
            made = _provenance(config, sources, found, tokenizer, plan, reports)
            publish = publish_shards if config.keep_shards else publish_merged
            publish(output, jobs, made, reports)
        shutil.rmtree(work)
    corpus = open_corpus(output)
    first = read_back(tokenizer.definition, corpus.tokens(0))
    say(f"the first document, read back ({int(corpus.lengths[0]):,} tokens): {first!r}")
    if made.get("added_tokens_spelled"):
        say(f"added tokens that texts spelled, and that are one id each: {made['added_tokens_spelled']}")
    return made


def _tell_plain_added(tokenizer: TokenizerInfo, say: Callable[[str], None]) -> None:
    if tokenizer.plain_added:
        some = ", ".join(repr(token) for token in list(tokenizer.plain_added.values())[:5])
        more = ", ..." if len(tokenizer.plain_added) > 5 else ""
        say(
            f"{len(tokenizer.plain_added)} added tokens of the tokenizer are not special: {some}{more}; "
            "where a text spells one it becomes that one id, and is counted"
        )


def _find(config: PrepareConfig, output: str) -> Found:
    if config.globs and not any(os.path.isdir(path) or is_url(path) for path in config.inputs):
        mend = "has no effect: no input is a directory, and files that are named are all taken; leave it out"
        raise ConfigError("glob", " ".join(config.globs), mend)
    return find_files(config.inputs, config.globs, exclude=own_files(output))


def _sources(config: PrepareConfig, paths: list[str]) -> list[list[Part]]:
    """The input cut into shards: consecutive parts of about the same size in all."""
    sizes = {path: size_of(path) for path in paths}
    if config.max_input_bytes is not None:
        paths = _sample_files(paths, sizes, config.max_input_bytes, config.seed)
    total = sum(sizes[path] for path in paths)
    if total == 0:
        raise ConfigError("input", " ".join(config.inputs), "all of it is empty; name files that hold text")
    target = config.shard_bytes or min(max(total // 64, _MIB), 256 * _MIB)
    shards: list[list[Part]] = [[]]
    filled = 0
    for path in paths:
        kind = format_of(path) if config.format == "auto" else config.format
        for part in split_file(path, kind, target):
            if filled and filled + part.n_bytes > target:
                shards.append([])
                filled = 0
            shards[-1].append(part)
            filled += part.n_bytes
    return shards


def _sample_files(paths: list[str], sizes: dict[str, int], limit: int, seed: int) -> list[str]:
    """Whole files that hold up to `limit` bytes in all, at random but the same for the same names; in their old order."""
    order = np.random.default_rng(seed).permutation(len(paths))
    running = np.cumsum([sizes[paths[i]] for i in order])
    chosen = sorted(order[: max(1, int(np.searchsorted(running, limit, side="right")))])
    return [paths[i] for i in chosen]


def _tokenizer(config: PrepareConfig, sources: list[list[Part]], say: Callable[[str], None]) -> TokenizerInfo:
    if config.train_tokenizer is None:
        return load_tokenizer(config.tokenizer, config.eod_token)
    wanted = {
        "vocab_size": config.train_tokenizer,
        "bytes": _training_bytes(config),
        "input": _input_hash(config, sources),
        "tokenizers": version("tokenizers"),
    }
    with _one_at_a_time(config.tokenizer, say):
        _train(config, sources, wanted, say)
    return load_tokenizer(config.tokenizer, config.eod_token)


def _train(config: PrepareConfig, sources: list[list[Part]], wanted: dict[str, Any], say: Callable[[str], None]) -> None:
    """Train the tokenizer, unless the same one is there."""
    vocab_size = wanted["vocab_size"]
    notes = trained_with(config.tokenizer)
    if notes is None:
        total = sum(part.n_bytes for shard in sources for part in shard)
        amount = min(total, _training_bytes(config))
        say(f"training a byte-level BPE of {vocab_size} tokens on {amount / 1e6:.1f} MB of the input")
        train_bpe(_sample_texts(config, sources, total), vocab_size, config.tokenizer, wanted)
    elif notes != wanted:
        changed = ", ".join(sorted(key for key in wanted if notes.get(key) != wanted[key]))
        mend = (
            f"a tokenizer trained otherwise is there ({changed} differ); name another directory, or leave --train-tokenizer out"
        )
        raise ConfigError("tokenizer", config.tokenizer, mend)


@contextmanager
def _one_at_a_time(directory: str, say: Callable[[str], None]) -> Iterator[None]:
    """Two runs that train the same tokenizer: the second waits, and finds it. The lock beside it goes with the last."""
    path = f"{os.path.abspath(directory)}.lock"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another run trains {directory}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not os.path.exists(path) or os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                continue  # the run before took its lock away
            try:
                yield
                return
            finally:
                os.unlink(path)


def _training_bytes(config: PrepareConfig) -> int:
    return 16 * _MIB if config.train_tokenizer_bytes is None else config.train_tokenizer_bytes


def _sample_texts(config: PrepareConfig, sources: list[list[Part]], total: int) -> Iterator[str]:
    """Documents for the tokenizer, up to its bytes, spread evenly over the input; none of the holdout, none that is bad."""
    share = min(1.0, _training_bytes(config) / total)
    allowed = taken = 0.0
    for part in (part for shard in sources for part in shard):
        allowed += share * part.n_bytes
        if taken >= allowed:
            continue
        for record in read_part(part, config.keys, replace=config.replace_invalid):
            if record.error and config.on_error == "fail":
                raise bad_record(part, record)
            if record.error or is_held_out(record.text, config.holdout, config.seed):
                continue
            for piece in pieces_of(record.text):
                yield piece
                taken += len(piece.encode())
                if taken >= allowed:
                    break
            if taken >= allowed:
                break


def _input_hash(config: PrepareConfig, sources: list[list[Part]]) -> str:
    """Which bytes are read and which documents they make. A file that was touched since counts as another."""
    stamps = [[asdict(part) for part in shard] for shard in sources]
    times = {part.path: stamp_of(part.path) for shard in sources for part in shard}
    return _hash([stamps, times, config.keys, config.replace_invalid, config.holdout, config.seed])


def _plan_hash(config: PrepareConfig, sources: list[list[Part]], tokenizer: TokenizerInfo) -> str:
    """Everything that changes a byte of the output, or how it is laid out."""
    eod = tokenizer.eod_id if config.append_eod else None
    bos = tokenizer.bos_id if config.bos else None
    return _hash([_input_hash(config, sources), tokenizer.sha256, bos, eod, config.keep_shards])


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _already_made(config: PrepareConfig, output: str, plan: str) -> dict[str, Any] | None:
    """The report of the same corpus, if it is there.

    Raises:
        ConfigError: something else is there.
    """
    there = os.path.isdir(output) if config.keep_shards else os.path.exists(f"{output}.idx")
    if not there:
        return None
    provenance = Path(f"{output}.json")
    made = json.loads(provenance.read_text("utf-8")) if provenance.is_file() else {}
    if made.get("plan") == plan and not (made["bad_records"] and config.on_error == "fail"):
        return made if _is_whole(config, output, made) else None
    if config.keep_shards and not is_shard_directory(output):
        raise ConfigError("output", config.output, "this directory holds more than shards; name another")
    if config.force:
        return None
    raise ConfigError("output", config.output, "another corpus is there; name another prefix, or replace it with --force")


def _is_whole(config: PrepareConfig, output: str, made: dict[str, Any]) -> bool:
    """Whether the corpora are all there, each with as many documents as the report says."""
    try:
        corpora = {split: open_corpus(name) for split, name in output_names(output, config.holdout > 0).items()}
    except (ConfigError, OSError):
        return False
    return all(corpus.n_documents == made["documents"][split] for split, corpus in corpora.items())


def _jobs(
    config: PrepareConfig,
    sources: list[list[Part]],
    tokenizer: TokenizerInfo,
    work: Path,
    plan: str,
    say: Callable[[str], None],
) -> list[ShardJob]:
    """Lay out the work directory, keeping what an earlier run of the same plan finished."""
    plan_path = work / "plan"
    if plan_path.is_file() and plan_path.read_text() != plan:
        say("an unfinished run with other settings or other input was here; starting again")
        for name in ("train", "holdout", "reports"):
            shutil.rmtree(work / name, ignore_errors=True)
    for name in ("train", "holdout", "reports"):
        (work / name).mkdir(exist_ok=True)
    (work / "tokenizer.json").write_text(tokenizer.definition, "utf-8")
    plan_path.write_text(plan)
    return [
        ShardJob(
            number=number,
            parts=tuple(parts),
            directory=str(work),
            keys=config.keys,
            bos_id=tokenizer.bos_id if config.bos else None,
            eod_id=tokenizer.eod_id if config.append_eod else None,
            dtype=token_dtype(tokenizer.vocab_size).name,
            skip_bad=config.on_error == "skip",
            replace=config.replace_invalid,
            holdout=config.holdout,
            seed=config.seed,
            watched=tuple(tokenizer.plain_added),
        )
        for number, parts in enumerate(sources)
    ]


def _run(
    config: PrepareConfig, jobs: list[ShardJob], say: Callable[[str], None], progress: Callable[[int], Progress]
) -> list[ShardReport]:
    found = {job.number: report for job in jobs if (report := load_report(job)) is not None}
    # A shard that was read with bad records left out is not done for a run that must stop at them.
    reports = {number: report for number, report in found.items() if config.on_error == "skip" or not report.bad}
    todo = [job for job in jobs if job.number not in reports]
    if reports:
        say(f"going on: {len(reports)} of {len(jobs)} shards were finished before")
    tell = progress(sum(part.n_bytes for job in todo for part in job.parts))
    workers = min(config.workers or os.cpu_count() or 1, max(1, len(todo)))
    for job, report in ENGINES[config.engine](todo, tell, workers=workers):
        reports[job.number] = report
    return [reports[job.number] for job in jobs]


def _provenance(
    config: PrepareConfig,
    sources: list[list[Part]],
    found: Found,
    tokenizer: TokenizerInfo,
    plan: str,
    reports: list[ShardReport],
) -> dict[str, Any]:
    files = {part.path: size_of(part.path) for shard in sources for part in shard}
    spelled: dict[str, int] = {}
    for report in reports:
        for number, count in report.watched.items():
            token = tokenizer.plain_added[int(number)]
            spelled[token] = spelled.get(token, 0) + count
    bad = sum(len(report.bad) for report in reports)
    return {
        "documents": {split: sum(report.documents[split] for report in reports) for split in ("train", "holdout")},
        "tokens": {split: sum(report.tokens[split] for report in reports) for split in ("train", "holdout")},
        "bad_records": bad,
        "empty_records": sum(len(report.empty) for report in reports),
        "tokenizer": {
            "name": config.tokenizer,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_token": tokenizer.bos_token if config.bos else None,
            "bos_id": tokenizer.bos_id if config.bos else None,
            "eod_token": tokenizer.eod_token if config.append_eod else None,
            "eod_id": tokenizer.eod_id if config.append_eod else None,
        },
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "settings": {
            key: getattr(config, key)
            for key in ("keys", "globs", "format", "on_error", "replace_invalid", "holdout", "max_input_bytes")
        },
        "seed": config.seed,
        "added_tokens_spelled": spelled,
        "inputs": [shown(path) for path in config.inputs],
        "source_files": [{"path": shown(path), "bytes": n_bytes} for path, n_bytes in files.items()],
        "passed_over": {shown(path): why for path, why in found.passed_over.items()},
        "versions": {
            "nemo_longctx": version("nemo-longctx"),
            "python": platform.python_version(),
            "tokenizers": version("tokenizers"),
            "numpy": np.__version__,
        },
        "plan": plan,
    }


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One run at a time for an output.

    Raises:
        ConfigError: another one is at work.
    """
    work.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError("output", str(work), "another run is writing there; wait for it, or stop it") from error
        try:
            yield
        finally:
            if work.is_dir() and os.listdir(work) == ["lock"]:  # nothing to go on from
                shutil.rmtree(work)
