"""One shard of `curate`: each document measured and judged on its own; what stays so far is written with its fingerprints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nemo_longctx.data.curation.config import CurateConfig
from nemo_longctx.data.curation.duplicates import band_hashes, bands_for
from nemo_longctx.data.curation.scores import PERMUTATIONS, Scores, WordHashes, measure
from nemo_longctx.data.engines import Progress
from nemo_longctx.data.long_text import LongText, is_blank, pieces_of
from nemo_longctx.data.pieces import PieceEncoder
from nemo_longctx.data.readers import Part, read_part
from nemo_longctx.data.records import Record
from nemo_longctx.data.shards import place_reached
from nemo_longctx.data.tokenization import encoder
from nemo_longctx.data.writer import explain_full_disk
from nemo_longctx.files import write_text

# A document that stays so far: where its text lies in the shard's file, and what later rules ask for. `digest` has 16 bytes.
ROW = np.dtype(
    [
        ("digest", "S16"),
        ("start", "<i8"),
        ("n_bytes", "<i8"),
        ("length", "<i8"),
        ("characters", "<i8"),
        ("gzip_ratio", "<f4"),
        ("part", "<i4"),
        ("line", "<i8"),
    ]
)
_SAMPLED = 4000  # characters by which the language is told
_TOLD = 64  # documents between two steps of the progress bar


@dataclass(kw_only=True)
class ShardReport:
    """What a shard held.

    Attributes:
        documents, characters: read, bad records aside.
        rejected: (part, line, characters, rule, why), by the rules that look at one document alone.
        sources: what each document that stays was assembled from; empty where documents are taken as they are.
    """

    documents: int = 0
    characters: int = 0
    rejected: list[tuple[int, int, int, str, str]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def totals(self) -> tuple[int, int]:
        """Documents and characters read."""
        return self.documents, self.characters


@dataclass(frozen=True, kw_only=True)
class CurateJob:
    """All that judging one shard depends on; its files lie below `directory`."""

    number: int
    parts: tuple[Part, ...]
    directory: str
    config: CurateConfig

    @property
    def n_bytes(self) -> int:
        """Input that it reads."""
        return sum(part.n_bytes for part in self.parts)

    def path(self, kind: str) -> Path:
        """`text`, `rows.npy`, `signatures.npy`, `bands.npy`, `at` or `json`; the last is there once the shard is done."""
        return Path(self.directory, f"shard-{self.number:06d}.{kind}")

    def place(self) -> str:
        """`file:line` that it had come to."""
        return place_reached(self.path("at"), self.parts)

    def run(self, progress: Progress) -> ShardReport:
        """Measure and judge the shard's documents.

        Raises:
            OSError: a full disk.
        """
        with explain_full_disk(self.directory):
            return _Shard(self).run(progress)

    def load(self) -> ShardReport | None:
        """The report of a shard that is done, else None."""
        if not self.path("json").is_file():
            return None
        values = json.loads(self.path("json").read_text("utf-8"))
        values["rejected"] = [tuple(each) for each in values["rejected"]]
        return ShardReport(**values)


class _Shard:
    """A shard that is being judged."""

    def __init__(self, job: CurateJob):
        self.job, self.config, self.report = job, job.config, ShardReport()
        self._hashes = WordHashes()
        self._rows: list[tuple[Any, ...]] = []
        self._signatures: list[np.ndarray] = []
        definition = os.path.join(job.directory, "tokenizer.json")
        self._encoder = PieceEncoder(encoder(definition)) if self.config.tokenizer else None

    def run(self, progress: Progress) -> ShardReport:
        told = waiting = characters = 0
        with open(self.job.path("text"), "wb") as texts:
            for number, record in self._records():
                before = self.report.characters
                self._take(number, record, texts)
                characters += self.report.characters - before
                waiting += 1
                if waiting == _TOLD or characters > 1 << 20:
                    # Of compressed input the text stands for the bytes until the end.
                    step = min(characters, self.job.n_bytes - told)
                    self.job.path("at").write_text(f"{number} {record.line}")
                    progress(step, waiting, characters)
                    told, waiting, characters = told + step, 0, 0
        progress(self.job.n_bytes - told, waiting, characters)
        np.save(self.job.path("rows.npy"), np.array(self._rows, ROW))
        if self.config.near_duplicates:
            signatures = np.array(self._signatures, np.uint32).reshape(-1, PERMUTATIONS)
            np.save(self.job.path("signatures.npy"), signatures)
            np.save(self.job.path("bands.npy"), band_hashes(signatures, *bands_for(self.config.near_duplicates, PERMUTATIONS)))
        self.job.path("at").unlink(missing_ok=True)
        write_text(self.job.path("json"), json.dumps(asdict(self.report)))
        return self.report

    def _records(self) -> Iterator[tuple[int, Record]]:
        fields = ("source",) if self.config.assemble else ()
        keys = ("text",) if self.config.assemble else self.config.keys
        for number, part in enumerate(self.job.parts):
            for record in read_part(part, keys, fields=fields):
                yield number, record

    def _take(self, number: int, record: Record, texts: BinaryIO) -> None:
        if record.error:
            self._reject(number, record, 0, "bad_record", record.error)
            return
        self.report.documents += 1
        if is_blank(record.text):
            self._reject(number, record, 0, "empty", "no text")
            return
        scores = measure(pieces_of(record.text), self._hashes, signature=bool(self.config.near_duplicates))
        self.report.characters += scores.characters
        length, rule, why = self._judge(record.text, scores)
        if rule:
            self._reject(number, record, scores.characters, rule, why)
            return
        start = texts.tell()
        texts.write(b'{"text": "')
        for piece in pieces_of(record.text):
            texts.write(json.dumps(piece, ensure_ascii=False)[1:-1].encode())
        texts.write(b'"')
        place = (start, texts.tell() - start, length, scores.characters, scores.gzip_ratio, number, record.line)
        self._rows.append((scores.digest, *place))
        if scores.signature is not None:
            self._signatures.append(scores.signature)
        if self.config.assemble:
            self.report.sources.append(str(record.fields[0]))

    def _judge(self, text: str | LongText, scores: Scores) -> tuple[int, str, str]:
        """(length, the rule that the document fails, how); no rule where it passes all."""
        limits = self.config
        for rule, value, limit in (
            ("repeated_lines", scores.repeated_lines, limits.max_repeated_lines),
            ("repeated_words", scores.repeated_words, limits.max_repeated_words),
            ("boilerplate", scores.boilerplate, limits.max_boilerplate),
        ):
            if value > limit:
                return 0, rule, f"{value:.3f} > {limit:g}"
        if limits.languages:
            language = _language(text)
            if language not in limits.languages:
                return 0, "language", language
        length = scores.characters
        if self._encoder is not None:
            length = sum(ids.size for ids in self._encoder.encode(pieces_of(text)))
        if length < limits.min_length:
            return length, "too_short", f"{length} < {limits.min_length}"
        if limits.max_length is not None and length > limits.max_length:
            return length, "too_long", f"{length} > {limits.max_length}"
        return length, "", ""

    def _reject(self, number: int, record: Record, characters: int, rule: str, why: str) -> None:
        self.report.rejected.append((number, record.line, characters, rule, why))


def _language(text: str | LongText) -> str:
    """ISO 639-1, by the text's first characters."""
    from py3langid.langid import classify

    return str(classify(next((piece for piece in pieces_of(text) if piece.strip()), "")[:_SAMPLED])[0])
