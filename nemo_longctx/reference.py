"""Every setting of a recipe with its type, default and meaning, read from the schema itself: for `--keys` and for the docs."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One key.

    Attributes:
        key: dotted; `[]` is any place in a list.
        kind: its type, in words.
        default: as YAML would say it; None: it has to be set.
        meaning: the schema's own sentence, with units and source.
    """

    key: str
    kind: str
    default: str | None
    meaning: str


def settings(cls: type, prefix: str = "") -> list[Setting]:
    """All settings of a dataclass of the schema and of the dataclasses in it, in their order.

    A list of dataclasses, and one that may be null, is a setting too, before those in it.
    """
    hints, texts = typing.get_type_hints(cls), meanings(cls)
    found: list[Setting] = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key, hint = f"{prefix}{field.name}", hints[field.name]
        inner, listed = _inner(hint)
        if inner is not None:
            default, meaning = _default(field), texts.get(field.name, "")
            if listed or default == "null":
                kind = "list of mappings" if listed else "mapping or null"
                found.append(Setting(key=key, kind=kind, default=default, meaning=meaning))
            found += settings(inner, f"{key}[]." if listed else f"{key}.")
            continue
        found.append(Setting(key=key, kind=_kind(hint), default=_default(field), meaning=texts.get(field.name, "")))
    return found


def meanings(cls: type) -> dict[str, str]:
    """Field -> its sentence in the `Attributes:` of the docstring of the class, or of the class that it has it from."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        text = inspect.cleandoc(each.__dict__.get("__doc__") or "")
        _, _, listed = text.partition("Attributes:\n")
        lines = listed.splitlines()
        depth = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
        names: list[str] = []
        for line in lines:
            if line.strip() and len(line) - len(line.lstrip()) < depth:
                break
            if start := re.match(rf"^ {{{depth}}}([\w]+(?:, \w+)*): (.*)$", line):
                names = start.group(1).split(", ")
                found |= dict.fromkeys(names, start.group(2).strip())
            elif names and line.strip():
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _inner(hint: Any) -> tuple[type | None, bool]:
    """The dataclass inside a hint, and whether it stands in a list there."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint, False
    if origin in (typing.Union, types.UnionType):
        inside = [_inner(arg) for arg in args if arg is not types.NoneType]
        return next((each for each in inside if each[0] is not None), (None, False)) if len(inside) == 1 else (None, False)
    if origin in (tuple, list) and args:
        return _inner(args[0])[0], True
    return None, False


def _kind(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is types.NoneType else _kind(arg) for arg in args)
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, (tuple, list))):
        return f"list of {_kind(args[0])}" if args else "list"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    return "list" if str(getattr(origin, "__name__", "")) == "Sequence" else "any"


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        return _yaml(field.default_factory())
    return None if field.default is dataclasses.MISSING else _yaml(field.default)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if value == "":
        return '""'
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_yaml, value))}]"
    return "{}" if isinstance(value, Mapping) and not value else str(value)
