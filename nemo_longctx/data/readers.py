"""Records out of JSONL, JSON arrays, CSV, Parquet, Arrow and text files, one at a time, each with the line it came from.

A reader never drops anything: what it cannot use comes out as a `Record` that says why, and the caller decides.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, TextIO

from nemo_longctx.config import did_you_mean
from nemo_longctx.data import long_text
from nemo_longctx.data.inputs import size_of
from nemo_longctx.data.long_text import LongText, TextFile, read_long_line, skip_line
from nemo_longctx.data.opening import DamagedError, can_be_cut, open_bytes, open_raw

_ROWS = 64  # rows decoded at once: long documents make large rows
_BLOCK = 1 << 20
_HALF = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """One document, or what is wrong with it. `line` counts from 1 (rows, in Parquet) from the start of the part."""

    text: str | LongText
    line: int
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one worker reads of one file.

    Attributes:
        path: the file.
        format: one of `inputs.FORMATS`.
        start, stop: bytes of an uncompressed JSONL file (a line belongs to the part where it begins), row groups of a
            Parquet file, otherwise 0 and the size.
        n_bytes: its share of the input, for progress and for cutting shards.
    """

    path: str
    format: str
    start: int
    stop: int
    n_bytes: int


@dataclass(frozen=True)
class Key:
    """A text of a record: its name as it stands there, or a path of names with dots; one that may be missing ends in `?`."""

    name: str

    def of(self, row: Any) -> tuple[Any, str]:
        """(value, what is wrong). None without an error: the key is optional, and not there."""
        here = isinstance(row, dict) and self.name in row  # also one that is called `title?`
        name = self.name if here else self.name.removesuffix("?")
        optional = name != self.name
        value = row
        for step in [name] if isinstance(row, dict) and name in row else name.split("."):
            if not isinstance(value, dict):
                missing = optional and value is None
                return None, "" if missing else f"{name!r} asks for the key {step!r} of something that has no keys"
            if step not in value:
                hint = did_you_mean(step, map(str, value)) if value else "the record has no keys"
                return None, "" if optional else f"no key {name!r} ({hint})"
            value = value[step]
        if value is None and not optional:
            return None, f"{name!r} holds NoneType, not text; write {name + '?'!r} where it may be missing"
        return value, ""


def read_part(part: Part, keys: Sequence[str], *, replace: bool = False) -> Iterator[Record]:
    """The records of a part.

    Args:
        part: what to read.
        keys: see `Key`; the texts of several are joined by an empty line.
        replace: put U+FFFD for bytes that are not UTF-8 and for half a surrogate pair, rather than reject the record.
    """
    rows = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "arrow": _read_arrow}
    wanted = [Key(key) for key in keys]
    try:
        if part.format in rows:
            yield from rows[part.format](part, wanted, replace)
        else:
            yield _read_text(part, replace)
    except PermissionError:
        yield Record("", 1, "no permission to read it")


@lru_cache(maxsize=64)
def lines_before(part: Part) -> int:
    """How many lines (rows) of the file lie before the part; read only when a bad record has to be named."""
    if part.start == 0:
        return 0
    if part.format == "parquet":
        import pyarrow.parquet

        with open_raw(part.path) as file:
            metadata = pyarrow.parquet.read_metadata(file)
        return sum(metadata.row_group(group).num_rows for group in range(part.start))
    count, position = 0, 0
    with open_raw(part.path) as file:
        while position < part.start:
            block = file.read(min(1 << 22, part.start - position))
            count, position = count + block.count(b"\n"), position + len(block)
        # The line that runs into the part from before belongs to the part before.
        return count if block.endswith(b"\n") else count + 1


def _read_jsonl(part: Part, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
    number = 0
    whole = not can_be_cut(part.path)
    try:
        with open_bytes(part.path) as file:
            if part.start:
                file.seek(part.start - 1)
                skip_line(file)
            while whole or file.tell() < part.stop:
                raw = file.readline(long_text.LONG)
                if not raw:
                    return
                number += 1
                if len(raw) >= long_text.LONG and not raw.endswith(b"\n"):
                    yield _long_record(raw, file, number, keys, replace)
                elif raw.strip():
                    yield _json_record(raw, number, keys, replace)
    except DamagedError as error:
        yield Record("", number + 1, str(error))


def _json_record(raw: bytes, number: int, keys: Sequence[Key], replace: bool) -> Record:
    try:
        row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace" if replace else "strict"))
    except UnicodeDecodeError as error:
        return Record("", number, f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})")
    except (ValueError, RecursionError) as error:
        return Record("", number, f"not JSON ({error})")
    return _row_record(row, number, keys, replace)


def _long_record(head: bytes, file: BinaryIO, number: int, keys: Sequence[Key], replace: bool) -> Record:
    """A record of a line that is not held at once."""
    head = head.removeprefix(b"\xef\xbb\xbf") if number == 1 else head
    try:
        row, spelled = read_long_line(head, file, "replace" if replace else "strict")
    except UnicodeDecodeError as error:
        return Record("", number, f"not UTF-8 (byte 0x{error.object[error.start]:02x} in a long line)")
    except (ValueError, RecursionError) as error:
        why = str(error)
        return Record("", number, why if why.startswith("not JSON") else f"not JSON ({why})")
    return _row_record(row, number, keys, replace, spelled)


def _row_record(row: Any, number: int, keys: Sequence[Key], replace: bool, spelled: dict[str, Any] | None = None) -> Record:
    texts: list[Any] = []
    for key in keys:
        value, error = key.of(row)
        if error:
            return Record("", number, error)
        if value is None:
            continue
        if not isinstance(value, str):
            return Record("", number, f"{key.name!r} holds {type(value).__name__}, not text")
        if texts:
            texts.append("\n\n")
        texts.append(spelled.get(value, value) if spelled else value)
    if not spelled or all(isinstance(text, str) for text in texts):
        return _checked("".join(texts), number, replace)
    return _checked_long(LongText(texts, replace=replace), number)


def _checked(text: str, number: int, replace: bool) -> Record:
    """JSON may spell half a surrogate pair, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if replace:
            return Record(_HALF.sub("�", text), number)
        return Record("", number, f"not Unicode text (half a surrogate pair at character {error.start})")
    return Record(text, number)


def _checked_long(text: LongText, number: int) -> Record:
    """A long text once read through: what is wrong with it must be known before any of it is used."""
    try:
        for _ in text.pieces():
            pass
    except UnicodeDecodeError as error:
        return Record("", number, f"not UTF-8 (byte 0x{error.object[error.start]:02x} in a long text)")
    except ValueError as error:
        why = str(error)
        return Record("", number, why if why.startswith("not ") else f"not JSON ({why})")
    return Record(text, number)


def _read_json(part: Part, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
    """An array of records, or records one after the other, however they are spread over lines. `line` counts records."""
    number = 0
    try:
        with open_bytes(part.path) as raw:
            file = io.TextIOWrapper(raw, "utf-8-sig", "replace" if replace else "strict", newline="")
            for row in _json_values(file):
                number += 1
                yield _row_record(row, number, keys, replace)
    except DamagedError as error:
        yield Record("", number + 1, str(error))
    except UnicodeDecodeError as error:
        yield Record("", number + 1, f"not UTF-8 (byte 0x{error.object[error.start]:02x})")
    except (ValueError, RecursionError) as error:
        yield Record("", number + 1, f"not JSON ({error})")


def _json_values(file: TextIO) -> Iterator[Any]:
    """The elements of an array, or values that follow each other, as they are read.

    Raises:
        ValueError: not JSON, or an array without its end.
    """
    decoder = json.JSONDecoder()
    buffer, at, need, ended = "", 0, _BLOCK, False
    depth, closed = 0, False
    while True:
        while at < len(buffer) and (
            buffer[at] in " \t\r\n" or (depth and buffer[at] in ",]") or (at == 0 and buffer[0] == "[")
        ):
            depth, closed = (1, False) if buffer[at] == "[" else (0, True) if buffer[at] == "]" else (depth, closed)
            at += 1
        error: Exception | None = None
        if at < len(buffer):
            try:
                row, after = decoder.raw_decode(buffer, at)
                if after < len(buffer) or ended:  # otherwise a number may go on
                    if closed:
                        raise ValueError("something follows the end of the array")
                    at = after
                    yield row
                    continue
            except (ValueError, RecursionError) as wrong:
                error = wrong
        if ended:
            if error is not None:
                raise error
            if depth:
                raise ValueError("the array has no end; the file is cut short")
            return
        block = file.read(need)
        ended = len(block) < need
        buffer, at = buffer[at:] + block, 0
        need = max(_BLOCK, len(buffer))


def _read_csv(part: Part, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
    """Rows below a line of names; `line` is the one where a row ends (a quoted text may hold line ends)."""
    csv.field_size_limit(sys.maxsize)
    errors = "replace" if replace else "surrogateescape"
    line = 0
    try:
        with open_bytes(part.path) as raw:
            tabs = ".tsv" in part.path.lower()
            rows = csv.reader(
                io.TextIOWrapper(raw, "utf-8-sig", errors, newline=""), strict=True, delimiter="\t" if tabs else ","
            )
            names: list[str] | None = None
            while True:
                try:
                    values = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Record("", rows.line_num, f"not CSV ({error})")
                    continue
                line = rows.line_num
                if names is None:
                    names = values
                elif values:
                    yield _csv_record(names, values, line, keys, replace)
    except DamagedError as error:
        yield Record("", line + 1, str(error))


def _csv_record(names: list[str], values: list[str], line: int, keys: Sequence[Key], replace: bool) -> Record:
    if len(values) != len(names):
        return Record("", line, f"{len(values)} fields, where the first line names {len(names)}")
    record = _row_record(dict(zip(names, values, strict=True)), line, keys, True)
    if record.error or replace:
        return record
    for value in values:
        escaped = _HALF.search(value)
        if escaped:
            return Record("", line, f"not UTF-8 (byte 0x{ord(escaped.group()) & 0xFF:02x})")
    return record


def _read_parquet(part: Part, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with open_raw(part.path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            columns, error = _columns(keys, file.schema_arrow.names)
            if error:
                yield Record("", 1, error)
                return
            groups = list(range(part.start, part.stop))
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=columns):
                yield from _batch_records(batch, number, keys, replace)
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        yield Record("", number + 1, f"not a readable Parquet file ({_first_line(error)})")


def _read_arrow(part: Part, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
    """Arrow's IPC file, or its stream, which is what datasets writes."""
    import pyarrow

    number = 0
    try:
        with open_raw(part.path) as raw:
            batches, names = _arrow_batches(raw)
            columns, error = _columns(keys, names)
            if error:
                yield Record("", 1, error)
                return
            for batch in batches:
                chosen = batch.select(columns)
                for start in range(0, chosen.num_rows, _ROWS):
                    some = chosen.slice(start, _ROWS)
                    yield from _batch_records(some, number, keys, replace)
                    number += some.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        yield Record("", number + 1, f"not a readable Arrow file ({_first_line(error)})")


def _batch_records(batch: Any, before: int, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
    """The records of an Arrow batch. Neither Arrow nor Parquet makes sure that a string is UTF-8."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = None
    for number in range(batch.num_rows):
        try:
            row = rows[number] if rows is not None else batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            if not replace:
                yield Record("", before + number + 1, f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})")
                continue
            row = _decoded_row(batch.slice(number, 1))
        yield _row_record(row, before + number + 1, keys, replace)


def _decoded_row(batch: Any) -> dict[str, Any]:
    """One row, with U+FFFD for the bytes of its columns of text that are not UTF-8."""
    import pyarrow

    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            [value] = column.cast(pyarrow.large_binary()).to_pylist()
            row[name] = value if value is None else value.decode("utf-8", "replace")
    return row


def _arrow_batches(raw: Any) -> tuple[Iterator[Any], list[str]]:
    import pyarrow

    if raw.read(6) == b"ARROW1":
        raw.seek(0)
        file = pyarrow.ipc.open_file(raw)
        return (file.get_batch(number) for number in range(file.num_record_batches)), file.schema.names
    raw.seek(0)
    stream = pyarrow.ipc.open_stream(raw)
    return iter(stream), stream.schema.names


def _columns(keys: Sequence[Key], names: Sequence[str]) -> tuple[list[str], str]:
    """The columns that the keys read, and what is wrong with the keys."""
    columns = []
    for key in keys:
        name = key.name.removesuffix("?")
        root = next((each for each in (key.name, name, name.split(".")[0]) if each in names), None)
        if root is not None:
            columns.append(root)
        elif name == key.name:
            return (
                [],
                f"no column {name.split('.')[0]!r} ({did_you_mean(name.split('.')[0], names) if names else 'it has none'})",
            )
    return list(dict.fromkeys(columns)), ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_text(part: Part, replace: bool) -> Record:
    """A whole file: held where it is short, read again in pieces where it is not."""
    try:
        with open_bytes(part.path) as file:
            raw = file.read(long_text.LONG)
            longer = len(raw) == long_text.LONG and bool(file.peek(1))  # type: ignore[attr-defined]
            error = _not_text(raw, 0, 1)
            lines = 1 + raw.count(b"\n")
            at = len(raw)
            while longer and not error and (block := file.read(_BLOCK)):
                error = _not_text(block, at, lines)
                at, lines = at + len(block), lines + block.count(b"\n")
    except DamagedError as damage:
        return Record("", 1, str(damage).replace(" here", ""))
    if error:
        return error
    if longer:
        return _long_file(part.path, replace)
    try:
        return _checked(raw.decode("utf-8-sig", "replace" if replace else "strict"), 1, replace)
    except UnicodeDecodeError as wrong:
        # With a byte order mark the codec counts from behind it.
        place = wrong.start + (len(raw) - len(wrong.object))
        return Record("", raw.count(b"\n", 0, place) + 1, f"not UTF-8 (byte 0x{raw[place]:02x} at {place})")


def _not_text(block: bytes, at: int, line: int) -> Record | None:
    nul = block.find(b"\0")
    if nul < 0:
        return None
    hint = "; UTF-16 needs its byte order mark" if at == 0 and block[1:8:2] == bytes(len(block[1:8:2])) else ""
    return Record("", line + block.count(b"\n", 0, nul), f"not text (a NUL byte at {at + nul}{hint})")


def _long_file(path: str, replace: bool) -> Record:
    text, line = TextFile(path, "replace" if replace else "strict"), 1
    try:
        for piece in text.pieces():
            line += piece.count("\n")
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        return Record("", line, f"not UTF-8 (byte 0x{error.object[error.start]:02x})")
    return Record(LongText([text], replace=replace), 1)


def split_file(path: str, kind: str, shard_bytes: int) -> list[Part]:
    """Cut a file into parts of about `shard_bytes`, where its format lets one begin in the middle."""
    size = size_of(path)
    kind = _json_kind(path) if kind == "json" else kind
    n = max(1, round(size / shard_bytes))
    if kind == "parquet":
        groups = _row_groups(path)
        n = min(n, max(1, groups))
        bounds = [groups * i // n for i in range(n + 1)]
    elif kind == "jsonl" and n > 1 and _is_cuttable(path):
        bounds = [size * i // n for i in range(n + 1)]
    else:
        bounds = [0, size]
    n = len(bounds) - 1
    return [
        Part(path=path, format=kind, start=bounds[i], stop=bounds[i + 1], n_bytes=size * (i + 1) // n - size * i // n)
        for i in range(n)
    ]


def _is_cuttable(path: str) -> bool:
    try:
        return can_be_cut(path)
    except OSError:
        return False  # read_part will say what is wrong with it, as a bad record


def _json_kind(path: str) -> str:
    """`.json` is an array, records over several lines, or, as often, JSONL."""
    try:
        with open_bytes(path) as file:
            head = file.readline(long_text.LONG)
            while head and not head.removeprefix(b"\xef\xbb\xbf").strip():
                head = file.readline(long_text.LONG)
    except (DamagedError, OSError):
        return "jsonl"
    head = head.removeprefix(b"\xef\xbb\xbf").strip()
    if head.startswith(b"["):
        return "json"
    try:
        json.loads(head)
    except RecursionError:
        return "jsonl"
    except ValueError:
        # An object that goes on in the next line, rather than a broken line of JSONL.
        return "json" if head.startswith(b"{") and head.endswith((b"{", b"[", b",", b":")) else "jsonl"
    return "jsonl"


def _row_groups(path: str) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_raw(path) as file:
            return pyarrow.parquet.read_metadata(file).num_row_groups
    except (pyarrow.ArrowException, OSError, ValueError):
        return 0  # read_part will say what is wrong with it, as a bad record
