"""Megatron's indexed corpus, `.bin` (tokens) + `.idx` (lengths and pointers), read with NumPy alone.

`prepare` writes one sequence per document. A corpus that was split into sentences has several; it is read by documents.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.checksums import PIECE, RUN, checksums, spread_runs
from nemo_longctx.data.index_file import HEADER, check_index_size, map_file, read_header, without_suffix
from nemo_longctx.data.opening import check_local

WHOLE_BELOW = 1 << 30  # bytes of tokens that a fingerprint takes whole: about a second
CHECKED = 1 << 18  # entries of an index that `check` looks at together


class IndexedCorpus:
    """One `.bin/.idx` pair, memory-mapped. Opening reads the header and the last entry, whatever the size.

    Attributes:
        prefix: path without `.bin` / `.idx`.
        n_documents: number of documents.
        n_tokens: number of tokens in the `.bin`.
        dtype: NumPy dtype of a token.

    Args:
        prefix: path without its suffix; a path that ends in `.bin` or `.idx` is taken to mean its prefix.

    Raises:
        ConfigError: a file is missing, empty, not an index, of another version, or the sizes of the two do not agree.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = without_suffix(os.fspath(prefix))
        idx_path, bin_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        for path in (idx_path, bin_path):
            if not os.path.isfile(path):
                raise ConfigError(
                    "corpus", self.prefix, f"{os.path.basename(path)} is missing; `nemo-longctx prepare` makes one"
                )
        self._index = index = map_file(idx_path, self.prefix, "index")
        dtype, n_sequences, n_ends = read_header(index, self.prefix)
        self.dtype = dtype
        check_index_size(len(index), n_sequences, n_ends, self.prefix)
        offset = HEADER.size
        self._sequence_lengths = np.frombuffer(index, np.int32, n_sequences, offset)
        offset += 4 * n_sequences
        self._sequence_pointers = np.frombuffer(index, np.int64, n_sequences, offset)
        offset += 8 * n_sequences
        self._document_indices = np.frombuffer(index, np.int64, n_ends, offset)
        if self._document_indices[0] != 0 or self._document_indices[-1] != n_sequences:
            raise self._broken(f"its documents span {self._document_indices[-1]} sequences, it lists {n_sequences}")
        self.n_documents = n_ends - 1
        # Megatron's GPTDataset, too, takes each sequence for a document when there is one a document.
        self._one_sequence_a_document = n_sequences == self.n_documents
        end_bytes = int(self._sequence_pointers[-1]) + int(self._sequence_lengths[-1]) * dtype.itemsize
        size = os.path.getsize(bin_path)
        if end_bytes != size:
            what = "is truncated" if size < end_bytes else "holds more than its index lists"
            raise self._broken(f"the .bin {what}: {size} bytes, the .idx says {end_bytes}")
        self.n_tokens = size // dtype.itemsize
        if self.n_tokens == 0:
            raise self._broken("it holds no token")
        self._token_map = map_file(bin_path, self.prefix, "token file")
        self._tokens = np.frombuffer(self._token_map, dtype)

    def __reduce__(self):  # data loader workers open their own maps
        return (type(self), (self.prefix,))

    def __len__(self) -> int:
        return self.n_documents

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per document, [n_documents]: the mapped int32, or int64 sums where documents have several sequences."""
        if self._one_sequence_a_document:
            return self._sequence_lengths
        ends = np.concatenate([[0], np.cumsum(self._sequence_lengths, dtype=np.int64)])[self._document_indices]
        return np.diff(ends)

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """Token offset of each document's first token, int64 [n_documents]. Made at first use: 8 bytes a document."""
        return self.offsets_of(slice(None))

    def offsets_of(self, documents: np.ndarray | slice) -> np.ndarray:
        """Token offsets (int64) of some documents' first tokens: reads only their pointers, so it suits a huge corpus."""
        if self._one_sequence_a_document:
            return self._sequence_pointers[documents] // self.dtype.itemsize
        first = self._document_indices[:-1][documents]
        end = int(self.n_tokens)
        inside = np.minimum(first, len(self._sequence_pointers) - 1)
        # A last document without any sequence begins where the tokens end.
        return np.where(first < len(self._sequence_pointers), self._sequence_pointers[inside] // self.dtype.itemsize, end)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of one document: a read-only view of `dtype`, nothing is copied.

        Raises:
            IndexError: no such document, or a range that leaves it.
        """
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents} in {self.prefix}")
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens [{start}, {stop}) of document {document}, which has {length}, in {self.prefix}")
        if self._one_sequence_a_document:
            first = int(self._sequence_pointers[document]) // self.dtype.itemsize
        else:
            first = int(self.document_offsets[document])
        return self._tokens[first + start : first + stop]

    def read(self, token_start: int, token_stop: int) -> np.ndarray:
        """Tokens [token_start, token_stop) of the corpus, across documents: a read-only view of `dtype`.

        Raises:
            IndexError: a range that leaves the corpus.
        """
        if not 0 <= token_start <= token_stop <= self.n_tokens:
            raise IndexError(f"tokens [{token_start}, {token_stop}) of {self.n_tokens} in {self.prefix}")
        return self._tokens[token_start:token_stop]

    def will_need(self, token_start: int, token_stop: int) -> None:
        """Have tokens brought from the disk in the background. Ranges asked for together come together; touched, one by one."""
        begin = token_start * self.dtype.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        if 0 <= token_start < token_stop <= self.n_tokens:  # what else is asked for, `read` refuses
            self._token_map.madvise(mmap.MADV_WILLNEED, begin, token_stop * self.dtype.itemsize - begin)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What `prepare` wrote beside the corpus (PREFIX.json); empty for a corpus that something else wrote."""
        path = Path(f"{self.prefix}.json")
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def fingerprint(self, whole_below: float = WHOLE_BELOW) -> str:
        """A hash of the whole index, and of the tokens: all of them where the `.bin` has at most `whole_below` bytes.

        Of a larger `.bin` it takes its size and runs of 16 KiB spread evenly, `whole_below` / 16 bytes in all, but 8 runs at
        least. What it cannot see: an edit of a large `.bin` that keeps the index and falls between those runs, such as other
        tokens written over a few documents. Anything else that differs goes unseen with a chance of about 2**-32. Reads about
        1.5 GB/s, 20 bytes a document and the tokens as said; neither times nor paths count, so that a corpus may be copied.
        """
        digest = hashlib.sha256(f"{self.dtype.name} {self.n_documents} {self.n_tokens}".encode())
        size = self.n_tokens * self.dtype.itemsize
        with open(f"{self.prefix}.bin", "rb") as tokens:
            digest.update(self._index_sums)
            if size <= whole_below:
                digest.update(checksums(tokens, range(0, size, PIECE), PIECE))
            else:
                digest.update(checksums(tokens, spread_runs(size, max(8, int(whole_below) // 16 // RUN)), RUN))
        return digest.hexdigest()

    def identity(self) -> str:
        """What the corpus is known by wherever it lies, whatever lies beside it: a hash of its index and of runs of its tokens.

        `fingerprint` tells whether anything changed; this tells which corpus it is, and reads 1 MiB of tokens at most.
        """
        digest = hashlib.sha256(f"{self.dtype.name} {self.n_documents} {self.n_tokens}".encode() + self._index_sums)
        with open(f"{self.prefix}.bin", "rb") as tokens:
            digest.update(checksums(tokens, spread_runs(self.n_tokens * self.dtype.itemsize, 64), RUN))
        return digest.hexdigest()[:32]

    @cached_property
    def _index_sums(self) -> bytes:
        with open(f"{self.prefix}.idx", "rb") as index:
            return checksums(index, range(0, len(self._index), PIECE), PIECE)

    def check(self) -> int:
        """Read the whole index (no token) and make sure that it does not lie. Linear in documents: about 10 ns each.

        Returns:
            How many documents have no token, as Megatron's own tools write them for empty text: they are read past.

        Raises:
            ConfigError: a negative length, pointers that are not the running sum of lengths, or documents out of order.
        """
        lengths, pointers, indices = self._sequence_lengths, self._sequence_pointers, self._document_indices
        position = 0
        for start in range(0, len(lengths), CHECKED):  # in pieces: the index of a huge corpus is larger than memory
            piece = lengths[start : start + CHECKED]
            if piece.min() < 0:
                raise self._broken(f"sequence {start + int(piece.argmin())} has a negative length")
            expected = np.empty(len(piece) + 1, np.int64)
            expected[0] = position
            np.cumsum(piece, out=expected[1:])
            expected[1:] *= self.dtype.itemsize
            expected[1:] += position
            wrong = pointers[start : start + CHECKED] != expected[:-1]
            if wrong.any():
                first = start + int(wrong.argmax())
                raise self._broken(f"the pointer of sequence {first} is not the sum of the lengths before it")
            position = int(expected[-1])
            self._index.madvise(mmap.MADV_DONTNEED)  # pages that were read count as this process's memory until then
        for start in range(0, self.n_documents, CHECKED):
            steps = np.diff(indices[start : start + CHECKED + 1])
            if self._one_sequence_a_document and not (steps == 1).all():
                raise self._broken(
                    f"document {start + int(np.flatnonzero(steps != 1)[0])} does not have one sequence, as its counts say"
                )
            if steps.min() < 0:
                raise self._broken(f"document {start + int(steps.argmin())} ends before it begins")
            self._index.madvise(mmap.MADV_DONTNEED)
        return self.n_documents - int(np.count_nonzero(self.lengths))

    def _broken(self, what: str) -> ConfigError:
        return ConfigError("corpus", self.prefix, f"{what}; write it again with `nemo-longctx prepare`")


class ShardedCorpus:
    """Many `.bin/.idx` pairs read as one corpus: documents and tokens count on from shard to shard, in the order given.

    Has the attributes and methods of `IndexedCorpus`. A range of tokens that crosses shards is copied; all else is a view.

    Raises:
        ConfigError: no shard, or shards whose tokens have different dtypes.
    """

    def __init__(self, prefixes: Sequence[str | os.PathLike[str]]):
        if not prefixes:
            raise ConfigError("corpus", list(prefixes), "name at least one prefix")
        _allow_open_files(2 * len(prefixes))
        self.shards = tuple(IndexedCorpus(prefix) for prefix in prefixes)
        self.prefix = self.shards[0].prefix
        self.dtype = self.shards[0].dtype
        for shard in self.shards:
            if shard.dtype != self.dtype:
                mend = f"its tokens are {shard.dtype}, those of {self.prefix} {self.dtype}; prepare all with one tokenizer"
                raise ConfigError("corpus", shard.prefix, mend)
        self._document_ends = np.cumsum([shard.n_documents for shard in self.shards])
        self._token_ends = np.cumsum([shard.n_tokens for shard in self.shards])
        self.n_documents = int(self._document_ends[-1])
        self.n_tokens = int(self._token_ends[-1])

    def __reduce__(self):
        return (type(self), ([shard.prefix for shard in self.shards],))

    def __len__(self) -> int:
        return self.n_documents

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per document, [n_documents], copied out of the shards at first use (4 bytes a document)."""
        return np.concatenate([shard.lengths for shard in self.shards])

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """Token offset of each document's first token in the whole, int64 [n_documents]."""
        return self.offsets_of(np.arange(self.n_documents))

    def offsets_of(self, documents: np.ndarray) -> np.ndarray:
        """Token offsets (int64) of some documents' first tokens in the whole."""
        documents = np.asarray(documents)
        which = np.searchsorted(self._document_ends, documents, side="right")
        offsets = np.empty(documents.shape, np.int64)
        for number in np.unique(which):
            shard, chosen = self.shards[number], which == number
            inside = documents[chosen] - (self._document_ends[number] - shard.n_documents)
            offsets[chosen] = shard.offsets_of(inside) + (self._token_ends[number] - shard.n_tokens)
        return offsets

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of one document, as `IndexedCorpus.tokens`."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents} in the shards from {self.prefix}")
        number = int(np.searchsorted(self._document_ends, document, side="right"))
        shard = self.shards[number]
        return shard.tokens(document - int(self._document_ends[number] - shard.n_documents), start, stop)

    def read(self, token_start: int, token_stop: int) -> np.ndarray:
        """Tokens [token_start, token_stop) of the whole; a copy where they lie in several shards."""
        if not 0 <= token_start <= token_stop <= self.n_tokens:
            raise IndexError(f"tokens [{token_start}, {token_stop}) of {self.n_tokens} in the shards from {self.prefix}")
        pieces, position = [], token_start
        number = min(int(np.searchsorted(self._token_ends, token_start, side="right")), len(self.shards) - 1)
        while True:
            shard, end = self.shards[number], int(self._token_ends[number])
            begin = end - shard.n_tokens
            pieces.append(shard.read(position - begin, min(token_stop, end) - begin))
            if token_stop <= end:
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            position, number = end, number + 1

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What `prepare` wrote beside the first shard or beside its directory; empty where something else wrote it."""
        path = Path(f"{os.path.dirname(self.prefix)}.json")
        return self.shards[0].provenance or (json.loads(path.read_text("utf-8")) if path.is_file() else {})

    def fingerprint(self, whole_below: float = WHOLE_BELOW) -> str:
        """A hash of the shards' own fingerprints, in order; `whole_below` is for all together."""
        return hashlib.sha256("".join(fingerprints(self.shards, whole_below)).encode()).hexdigest()

    def identity(self) -> str:
        """A hash of the shards' own identities, in order."""
        return hashlib.sha256("".join(shard.identity() for shard in self.shards).encode()).hexdigest()

    def check(self) -> int:
        """`IndexedCorpus.check` on every shard."""
        return sum(shard.check() for shard in self.shards)


Corpus = IndexedCorpus | ShardedCorpus


def fingerprints(shards: Sequence[IndexedCorpus], whole_below: float = WHOLE_BELOW) -> list[str]:
    """The fingerprint of each; `whole_below` is for all together, and each reads in proportion to its size."""
    sizes = [shard.n_tokens * shard.dtype.itemsize for shard in shards]
    share = max(1.0, sum(sizes) / whole_below)  # 1: all are read whole
    return [shard.fingerprint(size / share) for shard, size in zip(shards, sizes, strict=True)]


def is_corpus(path: str) -> bool:
    """Whether a corpus lies there that `open_corpus` would open: a prefix, or a directory of shards."""
    return os.path.isfile(f"{path}.idx") or (os.path.isdir(path) and any(Path(path).glob("*.idx")))


def open_corpus(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Corpus:
    """Open a prefix, a directory of shards (every `.idx` in it, by name), or a list of either, as one corpus.

    Raises:
        ConfigError: nothing there, or a broken pair.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    prefixes: list[str] = []
    for each in [os.fspath(item) for item in sources]:
        check_local("corpus", each)
        if os.path.isdir(each) and not os.path.isfile(f"{each}.idx"):
            inside = sorted(str(path)[: -len(".idx")] for path in Path(each).glob("*.idx"))
            if not inside:
                raise ConfigError("corpus", each, "this directory holds no .idx; name a prefix or a directory of shards")
            _refuse_held_out(each, inside)
            prefixes += inside
        else:
            prefixes.append(each.rstrip("/") or each)
    return IndexedCorpus(prefixes[0]) if len(prefixes) == 1 else ShardedCorpus(prefixes)


def _refuse_held_out(directory: str, prefixes: Sequence[str]) -> None:
    """A folder of corpora is read whole, what `prepare --holdout` held out of one of them too: nobody means that."""
    if (both := next((each for each in prefixes if f"{each}_holdout" in prefixes), None)) is not None:
        mend = f"this directory holds {both} and {both}_holdout, which was held out of it; name the prefixes that are meant"
        raise ConfigError("corpus", directory, mend)


def check_begin_tokens(names: Sequence[str], corpora: Sequence[Corpus]) -> None:
    """That sources which `prepare` wrote agree on whether and how a document begins (`--bos`).

    Raises:
        ConfigError: two that do not.
    """
    known = [
        (name, corpus.provenance["tokenizer"])
        for name, corpus in zip(names, corpora, strict=True)
        if corpus.provenance.get("tokenizer")
    ]
    for name, tokenizer in known[1:]:
        first, expected = known[0][0], known[0][1].get("bos_id")
        if tokenizer.get("bos_id") != expected:
            says = {None: "no begin token"}
            ours, theirs = (says.get(number, f"token {number}") for number in (tokenizer.get("bos_id"), expected))
            mend = f"its documents begin with {ours}, those of {first} with {theirs}; prepare both with or without --bos"
            raise ConfigError("data.mix.sources", name, mend)


def _allow_open_files(n: int) -> None:
    """Raise the soft limit on open files: Python holds a descriptor for every map.

    Raises:
        ConfigError: the hard limit is in the way.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + 512  # for all else that the process opens
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigError(
            "corpus",
            f"{n // 2} shards",
            f"they need {wanted} open files, the limit is {hard}; merge them, or raise `ulimit -Hn`",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
