"""The documents of a mix's sources, numbered through; and parts of documents, numbered after them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import Corpus, IndexedCorpus, ShardedCorpus, check_begin_tokens, fingerprints, open_corpus

CHUNK = 1 << 20  # documents looked at together: keeps temporary memory at a few MB whatever the corpus
GATHER = 64  # documents that a window usually touches


class _Mix(Protocol):
    @property
    def sources(self) -> Sequence[Any]: ...


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Parts of documents: tokens [starts, stops) of each of `documents`. All int64 [pieces]."""

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    @classmethod
    def none(cls) -> Pieces:
        """No piece."""
        return cls(*(np.empty(0, np.int64) for _ in range(3)))

    @classmethod
    def join(cls, parts: Sequence[Pieces]) -> Pieces:
        """All of them, one after the other."""
        if not parts:
            return cls.none()
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)))


class Documents:
    """The documents of all sources, numbered through: sources in the order of the config, shards in that of their source.

    Attributes:
        names: the sources' names.
        shards: the opened `.bin/.idx` pairs of all sources.
        shard_offsets: int64 [shards + 1], first number of each shard, then how many documents there are.
        source_of_shard: int64 [shards].
        vocab_size: ids that are read must be below it; None: no window is looked at.
        empty: documents without tokens, which no stratum holds; known after `check`.
        pieces: parts of documents, which have the numbers after the last document's; None: no parts.
    """

    vocab_size: int | None = None

    def __init__(self, names: Sequence[str], corpora: Sequence[Corpus]):
        self.names, self.corpora = tuple(names), tuple(corpora)
        self.pieces: Pieces | None = None
        self.empty = 0
        of_source = [corpus.shards if isinstance(corpus, ShardedCorpus) else (corpus,) for corpus in corpora]
        self.shards = tuple(shard for shards in of_source for shard in shards)
        self.source_of_shard = np.repeat(np.arange(len(corpora)), [len(shards) for shards in of_source])
        self.shard_offsets = np.concatenate([[0], np.cumsum([shard.n_documents for shard in self.shards], dtype=np.int64)])
        if len(self) > 2**32:
            mend = "a mix numbers its documents with 32 bits (4.29 billion); split it into several runs"
            raise ConfigError("data.mix.sources", len(self), mend)

    @classmethod
    def open(cls, mix: _Mix) -> Documents:
        """Open the sources of a mix: a few headers, whatever their size."""
        names, corpora = [source.label for source in mix.sources], [open_corpus(source.path) for source in mix.sources]
        check_begin_tokens(names, corpora)
        return cls(names, corpora)

    def __len__(self) -> int:
        return int(self.shard_offsets[-1])

    def check(self) -> None:
        """`IndexedCorpus.check` on every shard; counts the documents without tokens (`empty`)."""
        # Through maps of its own, so that what it reads leaves the process's memory.
        self.empty = sum(IndexedCorpus(shard.prefix).check() for shard in self.shards)

    def with_pieces(self, pieces: Pieces) -> Documents:
        """The same documents with numbers for parts of them.

        Raises:
            ConfigError: too many for 32 bits.
        """
        if len(self) + len(pieces) > 2**32:
            raise ConfigError("data.mix.sources", len(self), "a mix numbers documents and parts with 32 bits; split it")
        made = copy.copy(self)
        made.pieces = pieces if len(pieces) else None
        return made

    def whole(self, documents: np.ndarray) -> np.ndarray:
        """The documents that some documents or pieces are of, int64."""
        documents = np.asarray(documents).astype(np.int64)
        if self.pieces is not None:
            of_piece = documents >= len(self)
            documents[of_piece] = self.pieces.documents[documents[of_piece] - len(self)]
        return documents

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """The token of its document at which each begins, int64: 0 but for pieces."""
        starts = np.zeros(len(documents), np.int64)
        if self.pieces is not None:
            of_piece = documents >= len(self)
            starts[of_piece] = self.pieces.starts[documents[of_piece].astype(np.int64) - len(self)]
        return starts

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens (int32, or int64 where a corpus has them so) of some documents."""
        if self.pieces is not None and len(documents) and documents.max() >= len(self):
            lengths = self._lengths(self.whole(documents)).astype(np.int64)
            of_piece = documents >= len(self)
            inside = documents[of_piece].astype(np.int64) - len(self)
            lengths[of_piece] = self.pieces.stops[inside] - self.pieces.starts[inside]
            return lengths
        return self._lengths(documents)

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        if len(self.shards) == 1:
            return self.shards[0].lengths[documents]
        if not len(documents):
            return np.empty(0, np.int64)
        first, last = self._shards_of(np.array([documents.min(), documents.max()])).tolist()
        if first == last:
            return self.shards[first].lengths[documents - self.shard_offsets[first]]
        shard = self._shards_of(documents)
        if len(documents) <= 8 * GATHER:  # a few windows' worth: one by one is quicker than by shard
            shards, offsets = self.shards, self.shard_offsets
            inside = (documents - offsets[shard]).tolist()
            return np.array([shards[s].lengths[d] for s, d in zip(shard.tolist(), inside, strict=True)], np.int64)
        by_shard = np.argsort(shard.astype(np.uint16) if len(self.shards) < 65536 else shard, kind="stable")
        edges = np.searchsorted(shard[by_shard], np.arange(len(self.shards) + 1)).tolist()
        lengths = np.empty(len(documents), np.int64)
        for number, (low, high) in enumerate(itertools.pairwise(edges)):
            if low < high:
                chosen = by_shard[low:high]
                lengths[chosen] = self.shards[number].lengths[documents[chosen] - self.shard_offsets[number]]
        return lengths

    def places(self, documents: np.ndarray) -> Iterator[tuple[IndexedCorpus, int]]:
        """For each document: the shard that holds it, and the offset of its first token there."""
        if self.pieces is not None and len(documents) and documents.max() >= len(self):
            starts = self.starts(documents).tolist()
            places = self.places(self.whole(documents))  # whole documents: it comes here once
            return ((corpus, first + start) for (corpus, first), start in zip(places, starts, strict=False))
        if len(self.shards) == 1:
            return zip(itertools.repeat(self.shards[0]), self.shards[0].offsets_of(documents).tolist(), strict=False)
        shard = self._shards_of(documents)
        inside = (documents - self.shard_offsets[shard]).tolist()
        shards = [self.shards[number] for number in shard.tolist()]
        return ((corpus, int(corpus.offsets_of(number))) for corpus, number in zip(shards, inside, strict=True))

    def sources_of(self, documents: np.ndarray) -> np.ndarray:
        """Source numbers (int64) of some documents."""
        return self.source_of_shard[self._shards_of(self.whole(documents) if self.pieces is not None else documents)]

    def label(self, document: int) -> str:
        """A document (or that of a piece) as a user can find it: `SOURCE:NUMBER`, numbered in its source from 0."""
        document = int(self.whole(np.array([document]))[0])
        shard = int(self._shards_of(np.array([document]))[0])
        source = int(self.source_of_shard[shard])
        first = int(self.shard_offsets[int(self.source_of_shard.searchsorted(source))])
        return f"{self.names[source]}:{document - first}"

    def of_source(self, source: int) -> Iterator[tuple[int, np.ndarray]]:
        """The documents of a source in pieces of bounded size: first number, lengths."""
        for shard in np.flatnonzero(self.source_of_shard == source):
            lengths = self.shards[shard].lengths
            for start in range(0, len(lengths), CHUNK):
                yield int(self.shard_offsets[shard]) + start, lengths[start : start + CHUNK]

    def stamps(self) -> list[tuple[str, str, int, int, int]]:
        """Source, file, bytes, and times of change (ns) of the contents and of the file, for every file of every shard."""
        found = []
        for source, shard in zip(self.source_of_shard.tolist(), self.shards, strict=True):
            for path in (os.path.abspath(f"{shard.prefix}.{suffix}") for suffix in ("idx", "bin")):
                stat = os.stat(path)
                found.append((self.names[source], path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        return found

    def renamed(self, names: Sequence[str]) -> Documents:
        """The same documents, their sources under other names."""
        made = copy.copy(self)
        made.names = tuple(names)
        vars(made).pop("fingerprint", None)
        return made

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names and contents: all indices, and all tokens up to 1 GiB, else samples (`IndexedCorpus.fingerprint`)."""
        names = [self.names[source] for source in self.source_of_shard.tolist()]
        parts = list(zip(names, fingerprints(self.shards), strict=True))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def identities(self) -> list[str]:
        """What each shard is known by, whatever lies beside it (`IndexedCorpus.identity`)."""
        return [shard.identity() for shard in self.shards]

    def _shards_of(self, documents: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.shard_offsets, documents, side="right") - 1
