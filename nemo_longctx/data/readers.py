"""Records out of JSONL (plain, .gz, .zst), Parquet and text files, one at a time, each with the line it came from.

A reader never drops anything: what it cannot use comes out as a `Record` that says why, and the caller decides.
"""

from __future__ import annotations

import fnmatch
import gzip
import io
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from nemo_longctx.config import ConfigError, did_you_mean

FORMATS = ("jsonl", "parquet", "text")
_JSONL = (".jsonl", ".ndjson", ".json")
_COMPRESSED = (".gz", ".zst")
_PARQUET = (".parquet", ".pq")
_PARQUET_ROWS = 64  # rows decoded at once: long documents make large rows


class Record(NamedTuple):
    """One document, or what is wrong with it. `line` counts from 1 (rows, in Parquet) from the start of the part."""

    text: str
    line: int
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one worker reads of one file.

    Attributes:
        path: the file.
        format: one of `FORMATS`.
        start, stop: bytes of an uncompressed JSONL file (a line belongs to the part where it begins), row groups of a
            Parquet file, otherwise 0 and the size.
        n_bytes: its share of the input, for progress and for cutting shards.
    """

    path: str
    format: str
    start: int
    stop: int
    n_bytes: int


def read_part(part: Part, keys: Sequence[str]) -> Iterator[Record]:
    """The records of a part. Texts of several `keys` (dotted for nested ones) are joined by an empty line."""
    if part.format == "jsonl":
        yield from _read_jsonl(part, keys)
    elif part.format == "parquet":
        yield from _read_parquet(part, keys)
    else:
        yield _read_text(part)


@lru_cache(maxsize=64)
def lines_before(part: Part) -> int:
    """How many lines (rows) of the file lie before the part; read only when a bad record has to be named."""
    if part.start == 0:
        return 0
    if part.format == "parquet":
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(part.path)
        return sum(metadata.row_group(group).num_rows for group in range(part.start))
    count, position = 0, 0
    with open(part.path, "rb") as file:
        while position < part.start:
            block = file.read(min(1 << 22, part.start - position))
            count, position = count + block.count(b"\n"), position + len(block)
        # The line that runs into the part from before belongs to the part before.
        return count if block.endswith(b"\n") else count + 1


def _read_jsonl(part: Part, keys: Sequence[str]) -> Iterator[Record]:
    number = 0
    try:
        with _open(part.path) as file:
            compressed = part.path.endswith(_COMPRESSED)
            if part.start:
                file.seek(part.start - 1)
                file.readline()
            while compressed or file.tell() < part.stop:
                raw = file.readline()
                if not raw:
                    return
                number += 1
                if raw.strip():
                    yield _json_record(raw, number, keys)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Record("", number + 1, f"the compressed file is damaged or cut short here ({error})")


def _json_record(raw: bytes, number: int, keys: Sequence[str]) -> Record:
    try:
        row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Record("", number, f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})")
    except (ValueError, RecursionError) as error:
        return Record("", number, f"not JSON ({error})")
    return _row_record(row, number, keys)


def _row_record(row: Any, number: int, keys: Sequence[str]) -> Record:
    texts = []
    for key in keys:
        value = row
        for name in key.split("."):
            if not isinstance(value, dict):
                return Record("", number, f"{key!r} asks for the key {name!r} of something that has no keys")
            if name not in value:
                hint = did_you_mean(name, map(str, value)) if value else "the record has no keys"
                return Record("", number, f"no key {key!r} ({hint})")
            value = value[name]
        if not isinstance(value, str):
            return Record("", number, f"{key!r} holds {type(value).__name__}, not text")
        texts.append(value)
    return _checked("\n\n".join(texts), number)


def _read_parquet(part: Part, keys: Sequence[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(part.path) as file:
            roots = [key.split(".")[0] for key in keys]
            for root in roots:
                if root not in file.schema_arrow.names:
                    yield Record("", 1, f"no column {root!r} ({did_you_mean(root, file.schema_arrow.names)})")
                    return
            groups = range(part.start, part.stop)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=list(groups), columns=roots):
                for row in batch.to_pylist():
                    number += 1
                    yield _row_record(row, number, keys)
    except (pyarrow.ArrowException, OSError) as error:
        yield Record("", number + 1, f"not a readable Parquet file ({str(error).splitlines()[0]})")


def _read_text(part: Part) -> Record:
    try:
        with _open(part.path) as file:
            raw = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return Record("", 1, f"the compressed file is damaged or cut short ({error})")
    except PermissionError:
        return Record("", 1, "no permission to read it")
    nul = raw.find(b"\0")
    if nul >= 0:
        return Record("", raw.count(b"\n", 0, nul) + 1, f"not text (a NUL byte at {nul})")
    try:
        return Record(raw.decode("utf-8-sig"), 1)
    except UnicodeDecodeError as error:
        # With a byte order mark the codec counts from behind it.
        at = error.start + (len(raw) - len(error.object))
        return Record("", raw.count(b"\n", 0, at) + 1, f"not UTF-8 (byte 0x{raw[at]:02x} at {at})")


def _checked(text: str, number: int) -> Record:
    """JSON may spell half a surrogate pair, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Record("", number, f"not Unicode text (half a surrogate pair at character {error.start})")
    return Record(text, number)


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), 1 << 20)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames. zstandard's own stream reader takes a file cut short for one that ends."""

    def __init__(self, path: str):
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._context = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame = self._context.decompressobj()
        self._fresh, self._ready = True, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._fresh = self._context.decompressobj(), True
            raw = raw or self._file.read(1 << 20)
            if not raw:
                if self._fresh:
                    return 0
                raise EOFError("a zstd frame has no end")
            self._fresh = False
            try:
                self._ready = self._frame.decompress(raw)
            except self._error as error:
                raise EOFError(str(error)) from error
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def find_files(inputs: Sequence[str], globs: Sequence[str], *, exclude: Collection[str] = ()) -> list[str]:
    """The files that `inputs` name: files as given; in directories, those that match `globs`, or all JSONL and Parquet.

    Args:
        inputs: files and directories.
        globs: shell patterns for names (`*.py`) or, with a slash, for paths below the directory.
        exclude: absolute paths of files and directories to pass over (the output may lie inside an input directory).

    Raises:
        ConfigError: nothing at a path, nothing that matches in a directory, or a file named twice.
    """
    found: dict[str, str] = {}
    for given in inputs:
        if os.path.isdir(given):
            inside = list(_walk(given, globs, exclude))
            if not inside:
                wanted = (
                    f"nothing matches {' '.join(globs)}" if globs else "no JSONL or Parquet; name text files by --glob '*.txt'"
                )
                raise ConfigError("input", given, f"{wanted} in this directory")
        elif os.path.exists(given):
            inside = [given]
        else:
            raise ConfigError("input", given, "no such file or directory")
        for path in inside:
            if os.path.abspath(path) in found:
                raise ConfigError("input", path, "named twice; name it once")
            found[os.path.abspath(path)] = path
    return list(found.values())


def _walk(directory: str, globs: Sequence[str], exclude: Collection[str]) -> Iterator[str]:
    for root, directories, names in os.walk(directory):
        here = os.path.abspath(root)
        directories[:] = sorted(n for n in directories if not n.startswith(".") and os.path.join(here, n) not in exclude)
        for name in sorted(names):
            if os.path.join(here, name) in exclude:
                continue
            path = os.path.join(root, name)
            below = os.path.relpath(path, directory)
            if globs:
                wanted = any(fnmatch.fnmatch(below if "/" in glob else name, glob) for glob in globs)
            else:
                # A lone .json beside data is settings more often than records.
                wanted = format_of(name) != "text" and not name.lower().endswith(".json")
            if wanted and os.path.isfile(path):
                yield path


def format_of(path: str) -> str:
    """The format that a file's name says: JSONL (.jsonl, .ndjson, .json), Parquet, otherwise text; .gz and .zst aside."""
    stem = path.lower()
    if stem.endswith(_PARQUET):
        return "parquet"
    for suffix in _COMPRESSED:
        stem = stem.removesuffix(suffix)
    return "jsonl" if stem.endswith(_JSONL) else "text"


def split_file(path: str, kind: str, shard_bytes: int) -> list[Part]:
    """Cut a file into parts of about `shard_bytes`, where its format lets one begin in the middle."""
    size = os.path.getsize(path)
    n = max(1, round(size / shard_bytes))
    if kind == "parquet":
        groups = _row_groups(path)
        n = min(n, max(1, groups))
        bounds = [groups * i // n for i in range(n + 1)]
    elif kind == "jsonl" and not path.endswith(_COMPRESSED):
        bounds = [size * i // n for i in range(n + 1)]
    else:
        bounds = [0, size]
    n = len(bounds) - 1
    return [
        Part(path=path, format=kind, start=bounds[i], stop=bounds[i + 1], n_bytes=size * (i + 1) // n - size * i // n)
        for i in range(n)
    ]


def _row_groups(path: str) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_row_groups
    except (pyarrow.ArrowException, OSError):
        return 0  # read_part will say what is wrong with it, as a bad record
