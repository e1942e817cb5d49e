"""Open a file of text: decompressed, and in UTF-8 whatever its byte order mark says; from a disk or through fsspec."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from nemo_longctx.config import ConfigError

COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*(::|://)")

_BLOCK = 1 << 20
_LEAST_STEP = 64  # packed bytes that are unpacked at once, at first: 64 of zeros may be 2 MiB
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` writes
# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_url(path: str) -> bool:
    """Whether fsspec reads it."""
    return _URL.match(path) is not None


def check_local(key: str, path: str) -> None:
    """Refuse a URL where a file is written, or mapped into memory.

    Raises:
        ConfigError: it is one.
    """
    if is_url(path):
        mend = "input may lie in object storage, a corpus (.bin/.idx) and other output lie on a file system; name a path there"
        raise ConfigError(key, path, mend)


def url_to_fs(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there.

    Raises:
        ConfigError: no such scheme, or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        scheme, colon, rest = url.partition(":")
        mend = f"fsspec cannot read it ({error}); install what it names, or copy the files here"
        if not scheme.islower() and scheme.lower() in fsspec.available_protocols():
            mend = f"its scheme is written in small letters, {scheme.lower()}{colon}{rest}"
        raise ConfigError("input", url, mend) from error


def size_of(path: str) -> int:
    """Bytes of a file as it lies there, compressed or not."""
    if not is_url(path):
        return os.path.getsize(path)
    fs, inside = url_to_fs(path)
    return int(fs.size(inside) or 0)


def stamp_of(path: str) -> Any:
    """Changes when the file does: its time of change, or what its store says for it."""
    if not is_url(path):
        return os.stat(path).st_mtime_ns
    fs, inside = url_to_fs(path)
    info = fs.info(inside)
    known = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "created", "size")
    return [str(info[key]) for key in known if info.get(key) is not None]


def compression_of(path: str) -> str:
    """`.gz`, `.zst`, `.bz2`, `.xz`, or nothing, by the name's end in any case."""
    lower = path.lower()
    found = next((suffix for suffix in COMPRESSED if lower.endswith(suffix)), "")
    return ".zst" if found == ".zstd" else found


class DamagedError(Exception):
    """What lies in the file cannot be unpacked or decoded from here on."""


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """The file's text as a buffered stream of UTF-8 bytes; a plain UTF-8 file can be sought in.

    Raises:
        DamagedError: while it is read: a compressed file that is cut short or broken, or text that its byte order mark belies.
        OSError: as `open`.
    """
    with open_raw(path) as raw, _unpacked(raw, path) as file:
        encoding = _marked_encoding(file)
        stream: Any = io.BufferedReader(_Transcoder(file, encoding), _BLOCK) if encoding else file
        try:
            yield stream
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise DamagedError(f"the compressed file is damaged or cut short here ({error})") from error
        except OSError as error:
            if error.errno is not None or not compression_of(path):  # bz2 says so by an OSError without a number
                raise
            raise DamagedError(f"the compressed file is damaged or cut short here ({error})") from error


@contextmanager
def open_raw(path: str) -> Iterator[Any]:
    """The file's own bytes, which can be sought in."""
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    fs, inside = url_to_fs(path)
    with fs.open(inside, "rb") as file:
        yield file


def can_be_cut(path: str) -> bool:
    """Whether a reader may begin at any byte: neither compressed nor in UTF-16."""
    if compression_of(path):
        return False
    with open_raw(path) as file:
        head = file.read(4)
    return not any(head.startswith(mark) for mark, _ in _MARKS)


def _unpacked(raw: Any, path: str) -> Any:
    kind = compression_of(path)
    if kind == ".gz":
        return gzip.open(raw, "rb")
    if kind == ".bz2":
        return bz2.open(raw, "rb")
    if kind == ".xz":
        return lzma.open(raw, "rb")
    if kind == ".zst":
        return io.BufferedReader(_ZstdFile(raw), _BLOCK)
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, _BLOCK)


def _marked_encoding(file: Any) -> str:
    try:
        head = file.peek(4)[:4]
    except (EOFError, OSError, zlib.error, lzma.LZMAError):
        return ""  # the reader meets the same error, and knows the line
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "")


class _Transcoder(io.RawIOBase):
    """UTF-16 or UTF-32 with its mark -> UTF-8 without one."""

    def __init__(self, file: Any, encoding: str):
        self._file, self._ready = file, b""
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._file.read(_BLOCK)
            try:
                self._ready = self._decoder.decode(raw, final=not raw).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise DamagedError(f"not {error.encoding.upper()}, as its first bytes say ({error.reason})") from error
            if not raw and not self._ready:
                return 0
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames. zstandard's own stream reader takes a file cut short for one that ends."""

    def __init__(self, file: Any):
        import zstandard

        self._file = file
        self._context = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._error = zstandard.ZstdError
        self._frame = self._context.decompressobj()
        self._fresh, self._ready = True, b""
        self._step = _LEAST_STEP

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._fresh = self._context.decompressobj(), True
            raw = raw or self._file.read(self._step)
            if not raw:
                if self._fresh:
                    return 0
                raise EOFError("a zstd frame has no end")
            self._fresh = False
            try:
                self._ready = self._frame.decompress(raw)
            except self._error as error:
                raise EOFError(str(error)) from error
            # What a step unpacks to is held at once: a few MiB, also where a text repeats itself ten thousand times.
            self._step = (
                max(_LEAST_STEP, self._step // 8) if len(self._ready) > 4 * _BLOCK else min(_BLOCK >> 4, 2 * self._step)
            )
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)
