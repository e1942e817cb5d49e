"""Documents too long to be held at once: a line of JSON, or a file, of any size, read again and again in pieces.

A string of more than `LONG` bytes in a line of JSON is put into a scratch file as it is spelled; in the line, a short name
stands for it. What is left is small, and is JSON like any other.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from nemo_longctx.data.opening import open_bytes

LONG = 1 << 22  # bytes of a line, and of a string in it, that are held at once
_BLOCK = 1 << 18
# Characters of a JSON string up to its end or to half an escape.
_INSIDE = re.compile(rb'[^"\\]*+(?:\\[\s\S][^"\\]*+)*+')
# Whole escapes, and no first half of a surrogate pair whose second is still to come.
_WHOLE = re.compile(rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}(?=[\s\S]{6}))*+")
_HALF = re.compile("[\ud800-\udfff]")


class LongText:
    """A document as parts, each a string or a stretch of something that is read again whenever it is asked for.

    Args:
        parts: strings, or objects with `pieces()`.
        replace: put U+FFFD for what is no Unicode text, rather than raise.
    """

    def __init__(self, parts: Iterable[Any], *, replace: bool = False):
        self._parts, self._replace = list(parts), replace

    def pieces(self) -> Iterator[str]:
        """The text, in strings of some hundred thousand characters.

        Raises:
            ValueError: it is not Unicode text, or no JSON string.
        """
        for part in self._parts:
            for piece in [part] if isinstance(part, str) else part.pieces():
                if _HALF.search(piece):
                    if not self._replace:
                        raise ValueError("not Unicode text (half a surrogate pair)")
                    piece = _HALF.sub("�", piece)
                yield piece


def pieces_of(text: str | LongText) -> Iterator[str]:
    """A text in pieces, whether it is held or not."""
    if isinstance(text, LongText):
        yield from text.pieces()
    else:
        for start in range(0, len(text), _BLOCK):
            yield text[start : start + _BLOCK]


def is_blank(text: str | LongText) -> bool:
    """Whether it holds nothing but white space."""
    return not any(piece and not piece.isspace() for piece in pieces_of(text))


class TextFile:
    """The text of a file, decoded while it is read."""

    def __init__(self, path: str, errors: str = "strict"):
        self._path, self._errors = path, errors

    def pieces(self) -> Iterator[str]:
        """The text, without its byte order mark.

        Raises:
            UnicodeDecodeError: not UTF-8; DamagedError, OSError: as `open_bytes`.
        """
        decoder = codecs.getincrementaldecoder("utf-8-sig")(self._errors)
        with open_bytes(self._path) as file:
            while raw := file.read(_BLOCK):
                yield decoder.decode(raw)
            yield decoder.decode(b"", final=True)


class _Spelled:
    """A JSON string as it is spelled, without its quotes, in `n_bytes` of a scratch file."""

    def __init__(self, file: BinaryIO, start: int, n_bytes: int, errors: str):
        self._file, self._start, self._n_bytes, self._errors = file, start, n_bytes, errors

    def pieces(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(self._errors)
        at, end = self._start, self._start + self._n_bytes
        left = b""
        while at < end:
            self._file.seek(at)
            raw = self._file.read(min(_BLOCK, end - at))
            at += len(raw)
            block = left + raw
            match = _WHOLE.match(block)
            cut = match.end() if match and at < end else len(block)
            if len(block) - cut > 12:  # longer than any escape: not JSON, and the parser says why
                cut = len(block)
            left = block[cut:]
            yield json.loads(f'"{decoder.decode(block[:cut], final=at == end)}"')


def read_long_line(head: bytes, file: BinaryIO, errors: str) -> tuple[Any, dict[str, Any]]:
    """Parse a line of JSON of which `head` is the beginning; `file` stands behind it.

    Args:
        head: what was read of the line.
        file: the rest is read from here, up to and with the line's end.
        errors: `strict` or `replace`, for bytes that are not UTF-8.

    Returns:
        the row, and the strings that are not in it: name in the row -> something with `pieces()`.

    Raises:
        ValueError: not JSON, or not UTF-8.
    """
    scratch = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the texts that read from it)
    nonce = f"\0{secrets.token_hex(8)}:"
    outside = bytearray()
    spelled: dict[str, Any] = {}
    held = bytearray()  # the string that is being read, until it is long
    inside = half = False
    start = size = 0
    for block in _rest_of_line(head, file):
        at = 0
        while at < len(block):
            if not inside:
                quote = block.find(b'"', at)
                end = len(block) if quote < 0 else quote + 1
                outside += block[at:end]
                inside, at = quote >= 0, end
                start, size = scratch.tell(), 0
                continue
            begin = at
            if half:  # the escape that the last block broke off in
                at, half = at + 1, False
            match = _INSIDE.match(block, at)
            at = match.end() if match else at
            half = at < len(block) and block[at : at + 1] == b"\\"
            closed = at < len(block) and not half
            stop = at + 1 if half else at
            held += block[begin:stop]
            size += stop - begin
            if size > LONG and held:
                scratch.write(held)
                held.clear()
            at = stop
            if closed:
                if size > LONG:
                    if held:
                        scratch.write(held)
                    name = f"{nonce}{len(spelled)}"
                    spelled[name] = _Spelled(scratch, start, size, errors)
                    outside += json.dumps(name).encode()[1:]
                else:
                    outside += held + b'"'
                held.clear()
                inside, at = False, at + 1
    if inside:
        raise ValueError("not JSON (a string without an end)")
    scratch.flush()
    return json.loads(outside.decode("utf-8", errors)), spelled


def skip_line(file: BinaryIO) -> None:
    """Read to the end of a line, holding little of it."""
    while True:
        block = file.readline(LONG)
        if not block or block.endswith(b"\n"):
            return


def _rest_of_line(head: bytes, file: BinaryIO) -> Iterator[bytes]:
    yield head
    while head and not head.endswith(b"\n"):
        head = file.readline(_BLOCK)
        yield head
