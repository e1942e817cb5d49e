"""Tokenize one shard of the input: the function that every engine of `prepare` runs, on this machine or on a Ray cluster.

A shard's files get their names when they are whole, its report last; so a shard is done when its report is there, and a
second run of the same shard writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.engines import Progress
from nemo_longctx.data.inputs import shown
from nemo_longctx.data.long_text import LongText, is_blank, pieces_of
from nemo_longctx.data.pieces import PieceEncoder
from nemo_longctx.data.readers import Part, Record, lines_before, read_part
from nemo_longctx.data.tokenization import encoder
from nemo_longctx.data.writer import CorpusWriter, explain_full_disk
from nemo_longctx.files import write_text

# What one call of the tokenizer gets, in characters and documents: bounds memory, not the result.
_BATCH, _BATCH_DOCUMENTS = 1 << 19, 256
NO_TOKENS = "the tokenizer gives no tokens for it"


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """All that tokenizing one shard depends on.

    Attributes:
        number: position among the shards.
        parts: what to read, in order.
        directory: where the shards' files go; the tokenizer's definition lies there as `tokenizer.json`.
        keys: which texts of a record are taken.
        bos_id: token id that begins each document, or None.
        eod_id: token id that ends each document, or None.
        dtype: NumPy name of the token type.
        skip_bad: leave bad records out (and list them) rather than stop at the first.
        replace: put U+FFFD for what is no Unicode text rather than call the record bad.
        holdout: share of the documents that go to the holdout corpus.
        seed: changes which ones.
        watched: ids of added tokens that are not special, counted where a text spells them.
    """

    number: int
    parts: tuple[Part, ...]
    directory: str
    keys: tuple[str, ...]
    bos_id: int | None
    eod_id: int | None
    dtype: str
    skip_bad: bool
    replace: bool
    holdout: float
    seed: int
    watched: tuple[int, ...] = ()

    @property
    def report_path(self) -> Path:
        """Exists once the shard is done."""
        return Path(self.directory, "reports", f"{self.number:06d}.json")

    @property
    def place_path(self) -> Path:
        """Says while the shard is being made which file and line it is at, for the case that its process is killed."""
        return Path(self.directory, "reports", f"{self.number:06d}.at")

    @property
    def n_bytes(self) -> int:
        """Input that it reads."""
        return sum(part.n_bytes for part in self.parts)

    def run(self, progress: Progress) -> ShardReport:
        """See `tokenize_shard`."""
        return tokenize_shard(self, progress)

    def place(self) -> str:
        """`file:line` that it had come to when its process ended; its first file where it had come nowhere."""
        return place_reached(self.place_path, self.parts)

    def prefix(self, split: str) -> str:
        """Prefix of the shard's files for `train` or `holdout`."""
        return os.path.join(self.directory, split, f"shard-{self.number:06d}")


@dataclass(kw_only=True)
class ShardReport:
    """What a shard held. `bad` and `empty` name records: (file, line, reason) and (file, line).

    `watched` counts, by id, the added tokens that are not special and that a text spelled.
    """

    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "holdout": 0})
    tokens: dict[str, int] = field(default_factory=lambda: {"train": 0, "holdout": 0})
    bad: list[tuple[str, int, str]] = field(default_factory=list)
    empty: list[tuple[str, int]] = field(default_factory=list)
    watched: dict[str, int] = field(default_factory=dict)

    def totals(self) -> tuple[int, int]:
        """Documents and tokens of both splits."""
        return sum(self.documents.values()), sum(self.tokens.values())


class Waiting(NamedTuple):
    """A record that is about to be tokenized."""

    text: str | LongText
    part: Part
    line: int


def is_held_out(text: str | LongText, fraction: float, seed: int) -> bool:
    """Whether a document goes to the holdout corpus: by a hash of its text, so that equal documents go the same way."""
    if fraction == 0:
        return False
    digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))
    for piece in pieces_of(text):
        digest.update(piece.encode())
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64


def tokenize_shard(job: ShardJob, progress: Progress) -> ShardReport:
    """Tokenize a shard into `train/` and `holdout/` below the job's directory.

    Raises:
        ConfigError: a bad record, unless the job skips them.
        OSError: a full disk; the shard's partial files are removed.
    """
    shard = _Shard(job)
    try:
        with explain_full_disk(job.directory):
            for batch, n_bytes in _batches(job, shard.report):
                if batch:
                    job.place_path.write_text(f"{job.parts.index(batch[0].part)} {batch[0].line}")
                progress(n_bytes, *shard.write(batch))
            for split, writer in shard.writers.items():
                if shard.report.documents[split]:
                    writer.finish()
            job.place_path.unlink(missing_ok=True)
            write_text(job.report_path, json.dumps(asdict(shard.report)))
    finally:
        for writer in shard.writers.values():
            writer.abandon()
    return shard.report


class _Shard:
    """The files of a shard that is being made, and its report."""

    def __init__(self, job: ShardJob):
        self.job, self.report = job, ShardReport()
        self.tokenizer = encoder(os.path.join(job.directory, "tokenizer.json"))
        self.in_pieces = PieceEncoder(self.tokenizer)
        self.writers = {split: CorpusWriter(job.prefix(split), np.dtype(job.dtype)) for split in ("train", "holdout")}
        self._bos = [] if job.bos_id is None else [job.bos_id]
        self._eod = [] if job.eod_id is None else [job.eod_id]
        self._watched = np.array(job.watched, np.int64)

    def write(self, batch: Sequence[Waiting]) -> tuple[int, int]:
        """Tokenize records; documents and tokens written."""
        before = self.report.totals()
        if len(batch) == 1 and (isinstance(batch[0].text, LongText) or len(batch[0].text) > _BATCH):
            self._write_long(batch[0])
        else:
            self._write_short(batch)
        after = self.report.totals()
        return after[0] - before[0], after[1] - before[1]

    def _write_short(self, batch: Sequence[Waiting]) -> None:
        """Records that are encoded together, made arrays together: document by document costs a tenth of encoding them."""
        chosen: dict[str, list[list[int]]] = {split: [] for split in self.writers}
        for record, ids in zip(batch, self._encoded(batch), strict=True):
            if isinstance(ids, str):
                self._reject(record, ids)
            elif not ids:
                self._reject(record, NO_TOKENS)
            else:
                split = "holdout" if is_held_out(record.text, self.job.holdout, self.job.seed) else "train"
                chosen[split].append([*self._bos, *ids, *self._eod])
        for split, documents in chosen.items():
            if documents:
                lengths = [len(ids) for ids in documents]
                flat = np.fromiter(chain.from_iterable(documents), self.writers[split].dtype, sum(lengths))
                self._count_watched(flat)
                self.writers[split].add_documents(flat, lengths)
                self.report.documents[split] += len(lengths)
                self.report.tokens[split] += len(flat)

    def _encoded(self, batch: Sequence[Waiting]) -> list[list[int] | str]:
        """Token ids of each record, or why it has none."""
        texts = [record.text for record in batch]
        try:
            with _rust_errors():
                encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                return [encoding.ids for encoding in encodings]
        except EncodingError as error:
            # One record of a batch fails all of it: find it.
            return [self._encoded([record])[0] for record in batch] if len(batch) > 1 else [str(error)]

    def _write_long(self, record: Waiting) -> None:
        try:
            with _rust_errors():
                self._write(record, self.in_pieces.encode(pieces_of(record.text)))
        except EncodingError as error:
            self._reject(record, str(error))

    def _write(self, record: Waiting, pieces: Iterable[np.ndarray]) -> None:
        split = "holdout" if is_held_out(record.text, self.job.holdout, self.job.seed) else "train"
        tokens = self.writers[split].add_pieces(self._with_ends(pieces))
        if tokens:
            self.report.documents[split] += 1
            self.report.tokens[split] += tokens
        else:
            self._reject(record, NO_TOKENS)

    def _with_ends(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The pieces between begin and end tokens; nothing at all where there is no token between them."""
        begun = False
        for ids in pieces:
            if ids.size == 0:
                continue
            self._count_watched(ids)
            if not begun:
                yield np.array(self._bos, np.int64)
            begun = True
            yield ids
        if begun:
            yield np.array(self._eod, np.int64)

    def _count_watched(self, ids: np.ndarray) -> None:
        if self._watched.size and (spelled := ids[np.isin(ids, self._watched)]).size:
            for number, count in zip(*np.unique(spelled, return_counts=True), strict=True):
                self.report.watched[str(number)] = self.report.watched.get(str(number), 0) + int(count)

    def _reject(self, record: Waiting, reason: str) -> None:
        if not self.job.skip_bad:
            raise bad_record(record.part, Record("", record.line, reason))
        self.report.bad.append((record.part.path, record.line + lines_before(record.part), reason))


class EncodingError(Exception):
    """The tokenizer cannot encode a text."""


@contextmanager
def _rust_errors() -> Iterator[None]:
    """What the tokenizer raises, as `EncodingError`.

    Its Rust side raises Exception and nothing narrower; where it panics, something that is no Exception at all.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            why = (str(error).splitlines() or [""])[0]
            raise EncodingError(f"the tokenizer cannot encode it ({why})") from error
        raise


def _batches(job: ShardJob, report: ShardReport) -> Iterator[tuple[list[Waiting], int]]:
    """Records for one call of the tokenizer, and the bytes of input they stand for; notes what is bad or empty.

    A long text is a batch of its own.
    """
    batch: list[Waiting] = []
    waiting = 0  # characters in `batch`
    owed = 0  # input bytes read and not yet told
    for part in job.parts:
        told = 0
        for record in read_part(part, job.keys, replace=job.replace):
            if record.error:
                if not job.skip_bad:
                    raise bad_record(part, record)
                report.bad.append((part.path, record.line + lines_before(part), record.error))
                continue
            if is_blank(record.text):
                report.empty.append((part.path, record.line + lines_before(part)))
                continue
            long = isinstance(record.text, LongText) or len(record.text) > _BATCH
            size = 0 if isinstance(record.text, LongText) else len(record.text)
            if batch and (long or waiting + size > _BATCH or len(batch) == _BATCH_DOCUMENTS):
                # Compressed input tells its size only at its end; until then the text stands for it.
                step = min(waiting, part.n_bytes - told)
                told += step
                yield batch, owed + step
                batch, waiting, owed = [], 0, 0
            batch.append(Waiting(record.text, part, record.line))
            waiting += size
            if long:
                yield batch, owed
                batch, waiting, owed = [], 0, 0
        owed += part.n_bytes - told
    if batch or owed:
        yield batch, owed


def place_reached(path: Path, parts: Sequence[Part]) -> str:
    """`file:line` that a file of a shard's place says; the first of its files where it says nothing."""
    try:
        number, line = map(int, path.read_text().split())
    except (OSError, ValueError):
        return shown(parts[0].path)
    return f"{shown(parts[number].path)}:{line + lines_before(parts[number])}"


def bad_record(part: Part, record: Record) -> ConfigError:
    """The error that a bad record ends a run with."""
    where = f"{shown(part.path)}:{record.line + lines_before(part)}"
    mend = "mend it, or leave such records out with --on-error skip"
    if record.error.startswith(("not UTF-8", "not Unicode")):
        mend = "write it as UTF-8, have U+FFFD there with --replace-invalid, or leave such records out with --on-error skip"
    return ConfigError("input", where, f"{record.error}; {mend}")


def load_report(job: ShardJob) -> ShardReport | None:
    """The report of a shard that is done, else None."""
    if not job.report_path.is_file():
        return None
    values = json.loads(job.report_path.read_text("utf-8"))
    values["bad"] = [tuple(each) for each in values["bad"]]
    values["empty"] = [tuple(each) for each in values["empty"]]
    return ShardReport(**values)
