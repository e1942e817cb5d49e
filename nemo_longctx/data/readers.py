"""Records out of files, one at a time, each with the line it came from: JSONL and text here, the other formats in `tables`.

A reader never drops anything: what it cannot use comes out as a `Record` that says why, and the caller decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import BinaryIO

from nemo_longctx.config import ConfigError
from nemo_longctx.data import long_text
from nemo_longctx.data.inputs import format_of, shown
from nemo_longctx.data.long_text import LongText, TextFile, read_long_line, skip_line
from nemo_longctx.data.opening import DamagedError, can_be_cut, open_bytes, open_raw, size_of
from nemo_longctx.data.records import Key, Part, Record, checked, row_record
from nemo_longctx.data.tables import read_arrow, read_csv, read_json, read_parquet

_BLOCK = 1 << 20
# First bytes of files that a name without their suffix hides.
_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ": ".xz",
    b"BZh": ".bz2",
    b"PAR1": ".parquet",
    b"PK\3\4": ".zip",
}


def read_part(part: Part, keys: Sequence[str], *, replace: bool = False, fields: Sequence[str] = ()) -> Iterator[Record]:
    """The records of a part.

    Args:
        part: what to read.
        keys: see `Key`; the texts of several are joined by an empty line.
        replace: put U+FFFD for bytes that are not UTF-8 and for half a surrogate pair, rather than reject the record.
        fields: keys whose values are given beside the text; a file of text has none of them.
    """
    rows = {"jsonl": _read_jsonl, "json": read_json, "csv": read_csv, "parquet": read_parquet, "arrow": read_arrow}
    wanted = [Key(key) for key in keys] + [Key(key, field=True) for key in fields]
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
        hidden = _hidden(raw) if number == 1 else ""
        return Record("", number, hidden or f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})")
    except (ValueError, RecursionError) as error:
        spread = (
            "; a line is a record here, --format json reads records of several lines" if raw.strip() in (b"{", b"[") else ""
        )
        return Record("", number, f"not JSON ({error}{spread})")
    if isinstance(row, list) and number == 1:
        return Record("", number, "an array, which has no keys; --format json reads the records of one")
    return row_record(row, number, keys, replace)


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
    return row_record(row, number, keys, replace, spelled)


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
        return checked(raw.decode("utf-8-sig", "replace" if replace else "strict"), 1, replace)
    except UnicodeDecodeError as wrong:
        # With a byte order mark the codec counts from behind it.
        place = wrong.start + (len(raw) - len(wrong.object))
        why = _hidden(raw) or f"not UTF-8 (byte 0x{raw[place]:02x} at {place})"
        return Record("", raw.count(b"\n", 0, place) + 1, why)


def _hidden(head: bytes) -> str:
    """What a file is that is no text, where its name lacks a suffix; "" where its first bytes do not tell."""
    suffix = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), None)
    return "" if suffix is None else f"not text, but what is called {suffix}; give its name that suffix"


def _not_text(block: bytes, at: int, line: int) -> Record | None:
    nul = block.find(b"\0")
    if nul < 0:
        return None
    if at == 0 and (hidden := _hidden(block)):
        return Record("", 1, hidden)
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


def split_files(paths: Sequence[str], kind: str, shard_bytes: int | None) -> list[list[Part]]:
    """The input cut into shards: consecutive parts of about the same size in all.

    Args:
        paths: files, in order.
        kind: format of all, or `auto`: by each file's name.
        shard_bytes: input per shard; None is 1/64 of the whole, within 1 to 256 MiB.

    Raises:
        ConfigError: all of it is empty.
    """
    total = sum(map(size_of, paths))
    if total == 0:
        raise ConfigError("input", " ".join(map(shown, paths[:5])), "all of it is empty; name files that hold text")
    target = shard_bytes or min(max(total // 64, _BLOCK), 256 * _BLOCK)
    shards: list[list[Part]] = [[]]
    filled = 0
    for path in paths:
        for part in split_file(path, format_of(path) if kind == "auto" else kind, target):
            if filled and filled + part.n_bytes > target:
                shards.append([])
                filled = 0
            shards[-1].append(part)
            filled += part.n_bytes
    return shards


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
