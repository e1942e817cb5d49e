"""What a reader gives: a record, or what is wrong with it; and the keys that find its texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nemo_longctx.config import did_you_mean
from nemo_longctx.data.long_text import LongText

_HALF = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """One document, or what is wrong with it. `line` counts from 1 (rows, in Parquet) from the start of the part.

    `fields` are the values of the keys that are no text, None where the record has them not.
    """

    text: str | LongText
    line: int
    error: str = ""
    fields: tuple[Any, ...] = ()


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
    """A text of a record: its name as it stands there, or a path of names with dots; one that may be missing ends in `?`.

    With `field` its value is given beside the text, whatever it is.
    """

    name: str
    field: bool = False

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


def row_record(row: Any, number: int, keys: Sequence[Key], replace: bool, spelled: dict[str, Any] | None = None) -> Record:
    """The texts of a row as a record.

    Args:
        row: what was read; anything.
        number: its line.
        keys: which texts.
        replace: see `readers.read_part`.
        spelled: long texts that are not in the row, by the names that stand for them.
    """
    texts: list[Any] = []
    fields = tuple(key.of(row)[0] for key in keys if key.field)
    for key in keys:
        if key.field:
            continue
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
        record = checked("".join(texts), number, replace)
    else:
        record = checked_long(LongText(texts, replace=replace), number)
    return record._replace(fields=fields) if fields else record


def checked(text: str, number: int, replace: bool) -> Record:
    """JSON may spell half a surrogate pair, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if replace:
            return Record(_HALF.sub("�", text), number)
        return Record("", number, f"not Unicode text (half a surrogate pair at character {error.start})")
    return Record(text, number)


def checked_long(text: LongText, number: int) -> Record:
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
