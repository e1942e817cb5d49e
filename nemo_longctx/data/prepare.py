"""JSONL, Parquet or text files -> Megatron's `.bin/.idx`: in parallel, atomically, and going on where a killed run stopped.

While it runs, everything lies in `PREFIX.work/`: the plan (which bytes of which files make which shard), the tokenizer, and
the shards that are done. Nothing of the output is touched before all shards are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.engines import Progress, run_shards
from nemo_longctx.data.index_file import token_dtype
from nemo_longctx.data.inputs import Found, check_globs, find_files, same_bytes, shown
from nemo_longctx.data.merge import (
    LEAST_END,
    is_shard_directory,
    output_names,
    own_files,
    publish_merged,
    publish_shards,
    report_of,
)
from nemo_longctx.data.opening import can_be_cut, is_url, size_of, stamp_of
from nemo_longctx.data.prepare_config import PrepareConfig
from nemo_longctx.data.prepare_tokenizer import tokenizer_of
from nemo_longctx.data.readers import Part, split_files
from nemo_longctx.data.shards import ShardJob, ShardReport, load_report
from nemo_longctx.data.tokenization import TokenizerInfo, read_back
from nemo_longctx.data.writer import explain_full_disk, remove_work, work_directory
from nemo_longctx.versions import versions_of

# Settings that the report keeps by name, beside tokenizer, seed and inputs.
KEPT = ("keys", "globs", "format", "on_error", "replace_invalid", "holdout", "max_input_bytes", "max_file_bytes")
_PACKED = {"parquet", "arrow"}  # formats whose files may be smaller than their text
_NO_LUCK = 1e-3  # share below which a document that falls to a split by its hash is not to be waited for


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
    _check_free(config, output, work, found.files)
    sources = _sources(config, found.files, say)
    _check_share(config, sources, say)
    with explain_full_disk(str(work)), work_directory(work):
        tokenizer = tokenizer_of(config, sources, _input_hash(config, sources), say)
        if config.append_eod and tokenizer.eod_id is None:
            mend = "it has no eos_token to end documents with; name one by --eod-token, or use --no-append-eod"
            raise ConfigError("tokenizer", config.tokenizer, mend)
        if config.bos and tokenizer.bos_id is None:
            raise ConfigError("bos", True, f"{config.tokenizer} has no bos_token to begin documents with; leave it out")
        _tell_plain_added(tokenizer, say)
        plan = _plan_hash(config, sources, tokenizer)
        made = _already_made(config, tokenizer, output, plan)
        if made is not None:
            say(f"{config.output} is already there, made by the same settings from the same input; nothing to do")
        else:
            jobs = _jobs(config, sources, tokenizer, work, plan, say)
            reports = _run(config, jobs, say, progress)
            made = _provenance(config, sources, found, tokenizer, plan, reports)
            publish = publish_shards if config.keep_shards else publish_merged
            publish(output, jobs, made, reports)
        remove_work(work)
    corpus = open_corpus(output)
    first = read_back(tokenizer.definition, corpus.tokens(0))
    say(f"the first document, read back ({int(corpus.lengths[0]):,} tokens): {first!r}")
    if not config.holdout and report_of(held := f"{output}_holdout").get("settings", {}).get("holdout"):
        say(f"{shown(held)} was held out of the corpus before this one, which holds its text too; remove it, or use --holdout")
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
    check_globs(config.inputs, config.globs)
    found = find_files(config.inputs, config.globs, exclude=own_files(output))
    if config.max_file_bytes is not None:
        sizes = {path: size_of(path) for path in found.files}
        found.passed_over.update({path: "too large" for path in found.files if sizes[path] > config.max_file_bytes})
        found.files = [path for path in found.files if sizes[path] <= config.max_file_bytes]
        if not found.files:
            mend = f"every file is larger, the smallest has {min(sizes.values()):,} bytes; allow as much, or leave it out"
            raise ConfigError("max_file_bytes", config.max_file_bytes, mend)
    return found


def _sources(config: PrepareConfig, paths: list[str], say: Callable[[str], None]) -> list[list[Part]]:
    if config.max_input_bytes is not None:
        sizes = {path: size_of(path) for path in paths}
        paths = _sample_files(paths, sizes, config.max_input_bytes, config.seed)
        taken = sum(sizes[path] for path in paths)
        more = ", more than max_input_bytes" if taken > config.max_input_bytes else ""
        say(f"{len(paths):,} of {len(sizes):,} files are taken, {taken:,} bytes{more}")
    if copies := same_bytes(paths):
        say(_of_copies(copies))
    return split_files(paths, config.format, config.shard_bytes)


def _check_share(config: PrepareConfig, sources: list[list[Part]], say: Callable[[str], None]) -> None:
    """Refuse a share of next to nothing, or to all, before the work, where the files' sizes say that it leaves a split empty.
    Packed files' sizes do not say how much text there is: what may come of them is told.

    A token is a byte or more: a split of fewer bytes than `LEAST_END` has not the tokens that are held out at least. Of larger
    shares luck says whether a document falls to them.

    Raises:
        ConfigError: with the share that is large enough.
    """
    share = min(config.holdout, 1 - config.holdout)
    parts = [part for shard in sources for part in shard]
    size = sum(part.n_bytes for part in parts)
    if not 0 < share < _NO_LUCK or share * size >= LEAST_END:
        return
    split = "holdout" if config.holdout < 0.5 else "train"
    if any(part.format in _PACKED or not can_be_cut(part.path) for part in parts):
        times = f"{LEAST_END / (share * size):,.0f} times as many" if size else "some"
        say(
            f"a holdout of {config.holdout:g} leaves the {split} split empty, which is an error at the end, unless these "
            f"{size:,} bytes unpack to {times} or luck has it; give a share nearer the middle to be sure"
        )
        return
    least = LEAST_END / size if size else 1.0
    mend = f"use {least:.2g} or more" if split == "holdout" else f"use {1 - least:.6g} or less"
    mend = mend if least < 0.5 else "leave it out"
    left = f"of {size:,} bytes this leaves the {split} split {share * size:.2g}, too few for a text"
    raise ConfigError("holdout", config.holdout, f"{left}; {mend}")


def _of_copies(copies: dict[str, str]) -> str:
    """One line for files that hold the same bytes as another, however many they are."""
    (path, first), *more = copies.items()
    if not more:
        return f"{shown(path)} holds the same bytes as {shown(first)}: its documents come once more; leave one out if need be"
    told = f"{shown(path)} those of {shown(first)}"
    return f"{len(copies):,} files hold the same bytes as another, so their documents come once more: {told}, and so on"


def _sample_files(paths: list[str], sizes: dict[str, int], limit: int, seed: int) -> list[str]:
    """Whole files of up to `limit` bytes in all, or one; at random but the same for the same names; in their old order."""
    order = np.random.default_rng(seed).permutation(len(paths))
    running = np.cumsum([sizes[paths[i]] for i in order])
    chosen = sorted(order[: max(1, int(np.searchsorted(running, limit, side="right")))])
    return [paths[i] for i in chosen]


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


def _check_free(config: PrepareConfig, output: str, work: Path, files: list[str]) -> None:
    """Refuse to write over what is read, or over files that `prepare` did not make.

    Raises:
        ConfigError: the file that is in the way.
    """
    suffixes = (".json", ".rejected.tsv") if config.keep_shards else (".bin", ".idx", ".json", ".rejected.tsv")
    names = output_names(output, config.holdout > 0).values()
    if config.keep_shards:
        for name in names:
            if os.path.exists(name) and not (os.path.isdir(name) and is_shard_directory(name)):
                mend = f"{shown(name)} is there, and is no directory of shards alone; name another prefix"
                raise ConfigError("output", config.output, mend)
    there = [path for name in names for suffix in suffixes if os.path.exists(path := f"{name}{suffix}")]
    read = {os.path.realpath(path) for path in files if not is_url(path)}
    if (lost := next((path for path in there if os.path.realpath(path) in read), None)) is not None:
        raise ConfigError("output", config.output, f"{shown(lost)} is read, and would be replaced; name another prefix")
    known = config.force or work.exists() or os.path.exists(f"{output}.idx") or report_of(output)
    if there and not known:
        mend = f"{shown(there[0])} is there, and of no corpus; name another prefix, or replace it with --force"
        raise ConfigError("output", config.output, mend)


def _already_made(config: PrepareConfig, tokenizer: TokenizerInfo, output: str, plan: str) -> dict[str, Any] | None:
    """The report of the same corpus, if it is there.

    Raises:
        ConfigError: something else is there.
    """
    merged = os.path.exists(f"{output}.idx")
    if not merged and not (config.keep_shards and os.path.isdir(output)):
        return None
    made = report_of(output)
    if made.get("plan") == plan and not (made["bad_records"] and config.on_error == "fail"):
        return made if _is_whole(config, output, made) else None
    if config.force:
        return None
    other = _differs(config, tokenizer, made, merged=merged)
    mend = f"another corpus is there{other}; name another prefix, or replace it with --force"
    raise ConfigError("output", config.output, mend)


def _settings(config: PrepareConfig, tokenizer: TokenizerInfo) -> dict[str, Any]:
    """What a corpus was asked to be, as its report keeps it."""
    return {
        "tokenizer": {
            "name": config.tokenizer,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_token": tokenizer.bos_token if config.bos else None,
            "bos_id": tokenizer.bos_id if config.bos else None,
            "eod_token": tokenizer.eod_token if config.append_eod else None,
            "eod_id": tokenizer.eod_id if config.append_eod else None,
        },
        "settings": {key: getattr(config, key) for key in KEPT},
        "seed": config.seed,
        "inputs": [shown(path) for path in config.inputs],
    }


def _differs(config: PrepareConfig, tokenizer: TokenizerInfo, made: dict[str, Any], *, merged: bool) -> str:
    """` (another seed, another holdout)`: with which settings a corpus that is there was made, or that its files changed."""
    if not made:
        return ", without the report of how it was made"
    asked = json.loads(json.dumps(_settings(config, tokenizer)))
    names = {"sha256": "tokenizer", "bos_id": "bos", "eod_id": "eod"}
    other = [name for key, name in names.items() if made["tokenizer"].get(key) != asked["tokenizer"][key]]
    other += [key for key, value in asked["settings"].items() if made["settings"].get(key) != value]
    other += [key for key in ("seed", "inputs") if made.get(key) != asked[key]]
    other += ["keep_shards"] if merged == config.keep_shards else []
    return (
        f" (another {', another '.join(other)})"
        if other
        else " (its inputs have changed since, or its shards have another size)"
    )


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
    return run_shards(jobs, reports, engine=config.engine, workers=config.workers, say=say, progress=progress)


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
        **_settings(config, tokenizer),
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "added_tokens_spelled": spelled,
        "source_files": [{"path": shown(path), "bytes": n_bytes} for path, n_bytes in files.items()],
        "passed_over": {shown(path): why for path, why in found.passed_over.items()},
        "versions": {
            "nemo_longctx": versions_of("nemo-longctx")["nemo-longctx"],
            "python": platform.python_version(),
            **versions_of("tokenizers"),
            "numpy": np.__version__,
        },
        "plan": plan,
    }
