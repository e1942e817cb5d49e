"""Finished shards -> the output of `prepare`: one `.bin/.idx` a split, or a directory of shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import IndexedCorpus
from nemo_longctx.data.inputs import printable, shown
from nemo_longctx.data.shards import ShardJob, ShardReport
from nemo_longctx.data.writer import is_work_directory, sync, write_index
from nemo_longctx.files import read_mapping, write_text

LEAST_END = 16  # tokens that are worth holding out


def output_names(output: str, holdout: bool) -> dict[str, str]:
    """Prefix of the corpus of each split; `train` last, since it is published last and so says that all is there."""
    return {"holdout": f"{output}_holdout", "train": output} if holdout else {"train": output}


def own_files(output: str) -> set[str]:
    """The paths of an output that `prepare` or `inspect` wrote: none of them is its input.

    A report or a folder of those names that is another's is no part of it: it is read where the input holds it.
    """
    found = set()
    for name in output_names(output, holdout=True).values():
        found |= {f"{name}{suffix}" for suffix in (".bin", ".idx", ".rejected.tsv", ".lengths.png", ".lengths.csv")}
        found |= {f"{name}.json"} if report_of(name) else set()
        found |= {name} if os.path.isdir(name) and is_shard_directory(name) else set()
    work = Path(f"{output}.work")
    return found | {str(work)} if is_work_directory(work) else found


def report_of(output: str) -> dict[str, Any]:
    """The report of a corpus; {} where none of `prepare` is there."""
    made = read_mapping(f"{output}.json")
    ours = all(isinstance(made.get(key), dict) for key in ("tokenizer", "settings")) and "bad_records" in made
    return made if ours else {}


def publish_merged(output: str, jobs: Sequence[ShardJob], made: dict[str, Any], reports: Sequence[ShardReport]) -> None:
    """Concatenate the shards in their order and give the result its names, `.idx` last.

    Raises:
        ConfigError: a split got no document.
    """
    names = output_names(output, made["settings"]["holdout"] > 0)
    from_end = _from_end(made)
    if not from_end:
        _check_documents(names, made, reports)
    for split in names:
        prefixes = [job.prefix(split) for job, report in zip(jobs, reports, strict=True) if report.documents[split]]
        partial = os.path.join(jobs[0].directory, split)
        try:
            _concatenate(prefixes, partial, np.dtype(made["dtype"]))
        except OSError:
            for suffix in ("bin.part", "idx.part", "lengths"):  # room for whatever filled the disk
                Path(f"{partial}.{suffix}").unlink(missing_ok=True)
            raise
    if from_end:
        _hold_out_end(jobs[0].directory, made, from_end)
    # No index of the old corpus may outlive its tokens: killed from here on, the next run finishes from the shards.
    for name in names.values():
        Path(f"{name}.idx").unlink(missing_ok=True)
    _publish_notes(output, made, reports)
    for split, name in names.items():
        partial = os.path.join(jobs[0].directory, split)
        for suffix in ("bin", "idx"):
            os.replace(f"{partial}.{suffix}.part", f"{name}.{suffix}")


def _concatenate(prefixes: Sequence[str], partial: str, dtype: np.dtype) -> None:
    with open(f"{partial}.bin.part", "wb") as tokens, open(f"{partial}.lengths", "wb") as lengths:
        for prefix in prefixes:
            lengths.write(IndexedCorpus(prefix).lengths.tobytes())
            with open(f"{prefix}.bin", "rb") as shard:
                shutil.copyfileobj(shard, tokens, 1 << 22)
        sync(tokens)
    # A file that nothing was written to cannot be mapped.
    written = np.memmap(f"{partial}.lengths", np.int32, mode="r") if prefixes else np.zeros(0, np.int32)
    write_index(f"{partial}.idx.part", written, dtype)


def _from_end(made: dict[str, Any]) -> int:
    """Tokens to hold out from the end of the corpus, where no document fell to the holdout: one text, or a few.

    0 where some did, or where the share of so few tokens is next to nothing.
    """
    share, tokens = made["settings"]["holdout"], made["tokens"]["train"]
    wanted = 0 if made["documents"]["holdout"] else round(share * tokens)
    return wanted if LEAST_END <= wanted <= tokens - LEAST_END else 0


def _hold_out_end(directory: str, made: dict[str, Any], tokens: int) -> None:
    """Move the last `tokens` of the merged documents to the holdout, cutting the one in which they begin.

    Both halves of a cut document end as documents do. What was counted in `made` is counted anew.
    """
    train, held = os.path.join(directory, "train"), os.path.join(directory, "holdout")
    dtype, eod = np.dtype(made["dtype"]), made["tokenizer"]["eod_id"]
    lengths = np.fromfile(f"{train}.lengths", np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    cut = int(ends[-1]) - tokens
    whole = int(np.searchsorted(ends, cut, side="right"))  # documents that stay as they are
    inside = cut - (int(ends[whole - 1]) if whole else 0)  # tokens of the next one that stay too
    with open(f"{train}.bin.part", "r+b") as file:
        file.seek(cut * dtype.itemsize)
        Path(f"{held}.bin.part").write_bytes(file.read())
        file.truncate(cut * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        if inside and eod is not None:
            file.write(np.array([eod], dtype).tobytes())
        sync(file)
    kept = [*lengths[:whole], *([inside + (eod is not None)] if inside else [])]
    taken = [lengths[whole] - inside, *lengths[whole + 1 :]]
    for split, prefix, parts in (("train", train, kept), ("holdout", held, taken)):
        write_index(f"{prefix}.idx.part", np.array(parts, np.int32), dtype)
        made["documents"][split], made["tokens"][split] = len(parts), int(sum(parts))
    made["held_out_from_end"] = tokens


def publish_shards(output: str, jobs: Sequence[ShardJob], made: dict[str, Any], reports: Sequence[ShardReport]) -> None:
    """Make each split's directory of shards the output, as it is.

    Raises:
        ConfigError: a split got no document.
    """
    names = output_names(output, made["settings"]["holdout"] > 0)
    _check_documents(names, made, reports)
    # An empty directory of shards: an earlier run was stopped after it moved this split.
    waiting = {split: name for split, name in names.items() if os.listdir(os.path.join(jobs[0].directory, split))}
    for name in waiting.values():
        shutil.rmtree(name, ignore_errors=True)
    for name in waiting.values():
        for suffix in ("idx", "bin"):  # of a merged corpus before, which would be read in the place of the shards
            Path(f"{name}.{suffix}").unlink(missing_ok=True)
    _publish_notes(output, made, reports)
    for split, name in waiting.items():
        os.rename(os.path.join(jobs[0].directory, split), name)


def is_shard_directory(path: str) -> bool:
    """Whether a directory holds nothing but shards, so that replacing it loses nothing else."""
    return all(name.startswith("shard-") and name.endswith((".bin", ".idx")) for name in os.listdir(path))


def _check_documents(names: dict[str, str], made: dict[str, Any], reports: Sequence[ShardReport]) -> None:
    for split in names:
        if made["documents"][split] == 0:
            if split == "train" and made["settings"]["holdout"] == 0:
                counts = f"{made['bad_records']} bad and {made['empty_records']} empty records"
                bad = (f" (the first, {shown(path)}:{line}: {why})" for report in reports for path, line, why in report.bad)
                first = next(bad, "")
                mend = f"it holds no document, only {counts}{first}; name other input"
                raise ConfigError("input", " ".join(made["inputs"]), mend)
            mend = f"no document fell to the {split} split; use a share nearer the middle, or more documents"
            raise ConfigError("holdout", made["settings"]["holdout"], mend)


def _publish_notes(output: str, made: dict[str, Any], reports: Sequence[ShardReport]) -> None:
    """OUTPUT.json, OUTPUT_holdout.json, and OUTPUT.rejected.tsv: each record left out, with its file, line and reason."""
    for name in output_names(output, made["settings"]["holdout"] > 0).values():
        write_text(f"{name}.json", json.dumps(made, indent=1) + "\n")
    rejected = [(path, line, reason) for report in reports for path, line, reason in report.bad]
    rejected += [(path, line, "empty") for report in reports for path, line in report.empty]
    lines = [f"{shown(path)}\t{line}\t{printable(reason)}\n" for path, line, reason in rejected]
    if lines:
        write_text(f"{output}.rejected.tsv", "".join(lines))
    else:
        Path(f"{output}.rejected.tsv").unlink(missing_ok=True)
