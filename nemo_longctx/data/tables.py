"""Records out of JSON arrays, CSV, Parquet and Arrow; `readers.read_part` gives each file to the right one."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from nemo_longctx.config import did_you_mean
from nemo_longctx.data.opening import DamagedError, open_bytes, open_raw
from nemo_longctx.data.records import Key, Part, Record, row_record

_ROWS = 64  # rows decoded at once: long documents make large rows
_BLOCK = 1 << 20
_HALF = re.compile("[\ud800-\udfff]")


def read_json(part: Part, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
    """An array of records, or records one after the other, however they are spread over lines. `line` counts records."""
    number = 0
    try:
        with open_bytes(part.path) as raw:
            file = io.TextIOWrapper(raw, "utf-8-sig", "replace" if replace else "strict", newline="")
            for row in _json_values(file):
                number += 1
                yield row_record(row, number, keys, replace)
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


def read_csv(part: Part, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
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
                    if wrong := _separator(names, keys, "\t" if tabs else ","):
                        yield Record("", line, wrong)
                        return
                elif values:
                    yield _csv_record(names, values, line, keys, replace)
    except DamagedError as error:
        yield Record("", line + 1, str(error))


def _separator(names: list[str], keys: Sequence[Key], ours: str) -> str:
    """What is wrong where the line of names is one name that another separator would cut into more, a wanted one among them."""
    for other in ",;\t|" if len(names) == 1 else "":
        if other in names[0] and any(key.name.removesuffix("?") in names[0].split(other) for key in keys):
            return f"its columns are apart by {other!r}, not by {ours!r} as its name says; write it with {ours!r}"
    return ""


def _csv_record(names: list[str], values: list[str], line: int, keys: Sequence[Key], replace: bool) -> Record:
    if len(values) != len(names):
        return Record("", line, f"{len(values)} fields, where the first line names {len(names)}")
    record = row_record(dict(zip(names, values, strict=True)), line, keys, True)
    if record.error or replace:
        return record
    for value in values:
        escaped = _HALF.search(value)
        if escaped:
            return Record("", line, f"not UTF-8 (byte 0x{ord(escaped.group()) & 0xFF:02x})")
    return record


def read_parquet(part: Part, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
    """Rows of the part's row groups."""
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


def read_arrow(part: Part, keys: Sequence[Key], replace: bool) -> Iterator[Record]:
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
                for column in chosen.columns:
                    _check_bounds(column)
                for start in range(0, chosen.num_rows, _ROWS):
                    some = chosen.slice(start, _ROWS)
                    yield from _batch_records(some, number, keys, replace)
                    number += some.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        yield Record("", number + 1, f"not a readable Arrow file ({_first_line(error)})")


def _check_bounds(array: Any) -> None:
    """Refuse offsets that lie outside their values, which Arrow follows without a look; text may hold any bytes.

    Raises:
        ValueError: they do.
    """
    import pyarrow

    array.validate()
    kind = array.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        array.view(pyarrow.binary() if pyarrow.types.is_string(kind) else pyarrow.large_binary()).validate(full=True)
    elif pyarrow.types.is_struct(kind):
        for number in range(kind.num_fields):
            _check_bounds(array.field(number))
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        offsets = array.offsets.to_numpy()
        if offsets[0] < 0 or offsets[-1] > len(array.values) or (offsets[1:] < offsets[:-1]).any():
            raise ValueError("a list's offsets lie outside its values")
        _check_bounds(array.values)
    else:
        array.validate(full=True)


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
        yield row_record(row, before + number + 1, keys, replace)


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
        elif name == key.name and not key.field:
            return (
                [],
                f"no column {name.split('.')[0]!r} ({did_you_mean(name.split('.')[0], names) if names else 'it has none'})",
            )
    return list(dict.fromkeys(columns)), ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
