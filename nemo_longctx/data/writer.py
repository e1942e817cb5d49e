"""Write Megatron's `.bin/.idx` with NumPy alone, byte for byte as Megatron's IndexedDatasetBuilder, one sequence a document."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.index_file import CODE_OF_DTYPE, HEADER, MAGIC

_LONGEST = 2**31 - 1  # lengths are int32
_PIECE = 1 << 20  # documents handled at once while writing an index


class CorpusWriter:
    """Appends documents to `PREFIX.bin.part`; `finish` writes the index and renames both, so no half corpus is ever seen.

    Used as a context manager it finishes on success and removes the partial file on an error.

    Args:
        prefix: path without suffix.
        dtype: integer dtype of the tokens (`corpus.token_dtype`).
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type):
        self.prefix, self.dtype = os.fspath(prefix), np.dtype(dtype)
        if self.dtype not in CODE_OF_DTYPE or not np.issubdtype(self.dtype, np.integer):
            raise ConfigError("dtype", self.dtype.name, "not a type of Megatron's format for tokens; use uint16 or int32")
        self.lengths = array("i")
        self.n_tokens = 0
        self._file = open(f"{self.prefix}.bin.part", "wb")  # noqa: SIM115 (closed by finish or abandon)

    def add_document(self, tokens: np.ndarray | list[int]) -> None:
        """Append one document.

        Raises:
            ConfigError: a document without tokens or of more than 2**31 - 1, or an id that `dtype` cannot hold.
        """
        given = np.asarray(tokens)
        if given.size == 0:
            raise ConfigError("document", len(self.lengths), "it has no tokens; leave it out")
        if given.size > _LONGEST:
            raise ConfigError("document", len(self.lengths), f"{given.size} tokens, the format holds {_LONGEST}; split it")
        if given.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            low, high = int(given.min()), int(given.max())
            if low < limits.min or high > limits.max:
                wrong = low if low < limits.min else high
                raise ConfigError("dtype", self.dtype.name, f"it cannot hold token id {wrong}; use int32")
        self._file.write(given.astype(self.dtype, copy=False).tobytes())
        self.lengths.append(given.size)
        self.n_tokens += given.size

    def add_pieces(self, pieces: Iterable[np.ndarray]) -> int:
        """Append one document that comes in pieces, and give its tokens. An error while they come leaves no part of it.

        Raises:
            ConfigError: as `add_document`, but a document without tokens is not written, and gives 0.
        """
        start, length = self._file.tell(), 0
        try:
            for piece in pieces:
                length += piece.size
                if length > _LONGEST:
                    mend = f"more than the {_LONGEST} tokens that the format holds; split it"
                    raise ConfigError("document", len(self.lengths), mend)
                self._file.write(piece.astype(self.dtype, copy=False).tobytes())
        except BaseException:
            self._file.seek(start)
            self._file.truncate()
            raise
        if length:
            self.lengths.append(length)
            self.n_tokens += length
        return length

    def add_documents(self, tokens: np.ndarray, lengths: list[int]) -> None:
        """Append documents of ordinary size that lie one behind the other, each with at least one token.

        Args:
            tokens: ids that `dtype` holds, [sum of lengths].
            lengths: tokens of each document.
        """
        self._file.write(tokens.astype(self.dtype, copy=False).data)
        self.lengths.extend(lengths)
        self.n_tokens += len(tokens)

    def finish(self) -> None:
        """Flush to the disk, write the index, and give both their names.

        Raises:
            ConfigError: not one document was added.
        """
        if not self.lengths:
            self.abandon()
            raise ConfigError("corpus", self.prefix, "no document was written; the input holds none")
        sync(self._file)
        self._file.close()
        write_index(f"{self.prefix}.idx.part", np.frombuffer(self.lengths, np.int32), self.dtype)
        # Killed between the renames, there is no corpus rather than an index of other tokens.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(f"{self.prefix}.bin.part", f"{self.prefix}.bin")
        os.replace(f"{self.prefix}.idx.part", f"{self.prefix}.idx")

    def abandon(self) -> None:
        """Drop what was written."""
        with suppress(OSError):  # on a full disk closing fails too: it flushes
            self._file.close()
        for suffix in ("bin", "idx"):
            Path(f"{self.prefix}.{suffix}.part").unlink(missing_ok=True)

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()


def write_index(path: str | os.PathLike[str], lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write an `.idx` of one sequence a document, in pieces, so that `lengths` may be a map larger than memory.

    Args:
        path: the file to write.
        lengths: int32 [n_documents], tokens per document.
        dtype: dtype of the tokens in the `.bin`.
    """
    n_documents = len(lengths)
    starts = range(0, n_documents, _PIECE)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, CODE_OF_DTYPE[np.dtype(dtype)], n_documents, n_documents + 1))
        for start in starts:
            file.write(lengths[start : start + _PIECE].astype("<i4").tobytes())
        position = 0
        for start in starts:
            ends = position + np.cumsum(lengths[start : start + _PIECE], dtype=np.int64) * np.dtype(dtype).itemsize
            file.write(np.concatenate([[position], ends[:-1]]).astype("<i8").tobytes())
            position = int(ends[-1])
        for start in range(0, n_documents + 1, _PIECE):
            file.write(np.arange(start, min(start + _PIECE, n_documents + 1), dtype="<i8").tobytes())
        sync(file)


@contextmanager
def explain_full_disk(where: str) -> Iterator[None]:
    """Turn 'no space left' into a sentence that says what is safe and what to do.

    Raises:
        OSError: with the same errno and that sentence; any other error passes unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        mend = "what was there before is unharmed and finished shards are kept; free space and run the same command again"
        raise OSError(error.errno, f"{os.strerror(error.errno)} while writing {where}; {mend}") from error


def sync(file: BinaryIO) -> None:
    """Bring a file's bytes to the disk before a rename makes them count."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def work_directory(work: Path) -> Iterator[None]:
    """Make the folder of a run that has not ended, and let one run at a time in; left empty, it goes.

    Raises:
        ConfigError: another one is at work, or a file is where a folder is needed.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        other = next(path for path in (work, *work.parents) if path.exists())
        raise ConfigError("output", str(work.with_suffix("")), f"{other} is a file; name a place in a folder") from error
    if not is_work_directory(work):
        mend = f"{work} is there, needed for what is unfinished, and of no run; name another output, or move it away"
        raise ConfigError("output", str(work.with_suffix("")), mend)
    with open(work / "lock", "w") as file:
        busy = ConfigError("output", str(work), "another run is writing there; wait for it, or stop it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        if not (work / "lock").exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(work / "lock")):
            raise busy  # it ended between our two looks, and took its lock away
        try:
            yield
        finally:
            if work.is_dir() and os.listdir(work) == ["lock"]:  # nothing to go on from
                remove_work(work)


def is_work_directory(work: Path) -> bool:
    """Whether a folder is of a run that has not ended, or empty, so that removing it loses nothing else."""
    return work.is_dir() and ((work / "lock").exists() or not os.listdir(work))


def remove_work(work: Path) -> None:
    """Remove the folder of a run, its lock last: killed in between, it is still known for what it is."""
    for path in sorted(work.iterdir(), key=lambda path: path.name == "lock"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    work.rmdir()
