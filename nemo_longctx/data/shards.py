"""Tokenize one shard of the input: the function that every engine of `prepare` runs, on this machine or on a Ray cluster.

A shard's files get their names when they are whole, its report last; so a shard is done when its report is there, and a
second run of the same shard writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.readers import Part, Record, lines_before, read_part
from nemo_longctx.data.tokenization import encoder
from nemo_longctx.data.writer import CorpusWriter, explain_full_disk
from nemo_longctx.files import write_text

_BATCH_BYTES, _BATCH_DOCUMENTS = 1 << 20, 256  # what one call of the tokenizer gets: bounds memory, not the result

Progress = Callable[[int, int, int], None]  # input bytes, documents, tokens since the last call


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """All that tokenizing one shard depends on.

    Attributes:
        number: position among the shards.
        parts: what to read, in order.
        directory: where the shards' files go; the tokenizer's definition lies there as `tokenizer.json`.
        keys: which texts of a record are taken.
        eod_id: token id that ends each document, or None.
        dtype: NumPy name of the token type.
        skip_bad: leave bad records out (and list them) rather than stop at the first.
        holdout: share of the documents that go to the holdout corpus.
        seed: changes which ones.
    """

    number: int
    parts: tuple[Part, ...]
    directory: str
    keys: tuple[str, ...]
    eod_id: int | None
    dtype: str
    skip_bad: bool
    holdout: float
    seed: int

    @property
    def report_path(self) -> Path:
        """Exists once the shard is done."""
        return Path(self.directory, "reports", f"{self.number:06d}.json")

    def prefix(self, split: str) -> str:
        """Prefix of the shard's files for `train` or `holdout`."""
        return os.path.join(self.directory, split, f"shard-{self.number:06d}")


@dataclass(kw_only=True)
class ShardReport:
    """What a shard held. `bad` and `empty` name records: (file, line, reason) and (file, line)."""

    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "holdout": 0})
    tokens: dict[str, int] = field(default_factory=lambda: {"train": 0, "holdout": 0})
    bad: list[tuple[str, int, str]] = field(default_factory=list)
    empty: list[tuple[str, int]] = field(default_factory=list)


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document goes to the holdout corpus: by a hash of its text, so that equal documents go the same way."""
    if fraction == 0:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def tokenize_shard(job: ShardJob, progress: Progress) -> ShardReport:
    """Tokenize a shard into `train/` and `holdout/` below the job's directory.

    Raises:
        ConfigError: a bad record, unless the job skips them.
        OSError: a full disk; the shard's partial files are removed.
    """
    report = ShardReport()
    writers = {split: CorpusWriter(job.prefix(split), np.dtype(job.dtype)) for split in ("train", "holdout")}
    try:
        with explain_full_disk(job.directory):
            for texts, n_bytes in _batches(job, report):
                progress(n_bytes, *_write_batch(job, texts, writers, report))
            for split, writer in writers.items():
                if report.documents[split]:
                    writer.finish()
            _save_report(job, report)
    finally:
        for writer in writers.values():
            writer.abandon()
    return report


def _write_batch(job: ShardJob, texts: list[str], writers: dict[str, CorpusWriter], report: ShardReport) -> tuple[int, int]:
    """Documents and tokens written."""
    n_documents = n_tokens = 0
    encodings = encoder(os.path.join(job.directory, "tokenizer.json")).encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        ids = encoding.ids if job.eod_id is None else [*encoding.ids, job.eod_id]
        split = "holdout" if is_held_out(text, job.holdout, job.seed) else "train"
        writers[split].add_document(ids)
        report.documents[split] += 1
        report.tokens[split] += len(ids)
        n_documents, n_tokens = n_documents + 1, n_tokens + len(ids)
    return n_documents, n_tokens


def _batches(job: ShardJob, report: ShardReport) -> Iterator[tuple[list[str], int]]:
    """Texts for one call of the tokenizer, and the bytes of input they stand for; notes what is bad or empty."""
    texts: list[str] = []
    waiting = 0  # characters in `texts`
    owed = 0  # input bytes read and not yet told
    for part in job.parts:
        told = 0
        for record in read_part(part, job.keys):
            if record.error:
                if not job.skip_bad:
                    raise bad_record(part, record)
                report.bad.append((part.path, record.line + lines_before(part), record.error))
            elif not record.text.strip():
                report.empty.append((part.path, record.line + lines_before(part)))
            else:
                texts.append(record.text)
                waiting += len(record.text)
            if waiting >= _BATCH_BYTES or len(texts) >= _BATCH_DOCUMENTS:
                # Compressed input tells its size only at its end; until then the text stands for it.
                step = min(waiting, part.n_bytes - told)
                told += step
                yield texts, owed + step
                texts, waiting, owed = [], 0, 0
        owed += part.n_bytes - told
    if texts or owed:
        yield texts, owed


def bad_record(part: Part, record: Record) -> ConfigError:
    """The error that a bad record ends a run with."""
    where = f"{part.path}:{record.line + lines_before(part)}"
    return ConfigError("input", where, f"{record.error}; mend it, or leave such records out with --on-error skip")


def _save_report(job: ShardJob, report: ShardReport) -> None:
    write_text(job.report_path, json.dumps(asdict(report)))


def load_report(job: ShardJob) -> ShardReport | None:
    """The report of a shard that is done, else None."""
    if not job.report_path.is_file():
        return None
    values = json.loads(job.report_path.read_text("utf-8"))
    values["bad"] = [tuple(each) for each in values["bad"]]
    values["empty"] = [tuple(each) for each in values["empty"]]
    return ShardReport(**values)
