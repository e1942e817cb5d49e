"""The one way from a mapping (YAML, command line, Python) to a checked, frozen dataclass.

Dataclasses own defaults, units and checks; a mapping only overrides. An unknown key is an error that suggests the nearest
known one; a bad value is a `ConfigError` that names the key, the value and the mend.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A user's mistake, said in one sentence: which key, which value, what is wrong, and what to do instead.

    Args:
        key: dotted name of the setting, as the user wrote it (`data.seq_length`).
        value: what it was set to.
        mend: what is wrong and what to change, without a final full stop.
    """

    def __init__(self, key: str, value: object = None, mend: str | None = None):
        if mend is None:  # torch makes an error of a data loader's worker anew, from the text of its traceback alone
            told = key.strip().rpartition("\n")[2].removeprefix(f"{__name__}.ConfigError: ")
            super().__init__(told)
            key, _, mend = told.partition(": ")
        else:
            super().__init__(f"{key}={value!r}: {mend}")
        self.key, self.value, self.mend = key, value, mend

    def __reduce__(self):  # exceptions cross process pools by pickle
        return (type(self), (self.key, self.value, self.mend))


def is_finite(value: Any) -> bool:
    """Whether a number is one that a float can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'rope'?)` for the nearest of `known`, or the sorted list of them all."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def build(cls: type[T], values: Mapping[str, Any] | None, *, where: str = "") -> T:
    """Make dataclass `cls` from `values`, nested dataclasses included.

    Args:
        cls: a dataclass whose `__post_init__` checks itself.
        values: overrides by field name; None means all defaults.
        where: dotted prefix for messages (`rope` gives `rope.base=...`).

    Raises:
        ConfigError: an unknown key, a required key that is missing, or a value of another type.
    """
    values = dict(values or {})
    hints = _type_hints(cls)  # type: ignore[arg-type]  # a class is hashable
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            raise ConfigError(f"{prefix}{key}", values[key], f"unknown key, {did_you_mean(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{prefix}{name}", None, "missing; set it")
        if name in values:
            values[name] = _nested(hints[name], values[name], f"{prefix}{name}")
    return cls(**values)


_type_hints = functools.cache(typing.get_type_hints)  # 0.2 ms a call, and a mix may have hundreds of sources


def _nested(hint: Any, value: Any, where: str) -> Any:
    """Build dataclasses inside `value` where the type hint asks for them, and refuse what it cannot be at all.

    Checked are numbers, true or false, lists and mappings; bounds are the dataclass's own to check.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in args if a is not types.NoneType]
        if len(inner) > 1:
            inner = [a for a in inner if dataclasses.is_dataclass(a) and isinstance(value, Mapping)]
        return _nested(inner[0], value, where) if inner and value is not None else value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(hint, value, where=where)
        if not isinstance(value, hint):
            keys = ", ".join(field.name for field in dataclasses.fields(hint) if field.init)
            raise ConfigError(where, value, f"takes keys of its own: {keys}")
    elif origin in (tuple, list) and args:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise ConfigError(where, value, f"must be a list{' of numbers' if args[0] in (int, float) else ''}")
        made = [_nested(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(made) if origin is tuple else made
    elif hint in (int, float, bool):
        _check_scalar(hint, value, where)
    return value


def _check_scalar(hint: type, value: Any, where: str) -> None:
    if hint is bool and not isinstance(value, bool):
        raise ConfigError(where, value, "must be true or false")
    if hint is float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise ConfigError(where, value, "not a number; write digits, with a point before an exponent (5.0e+5)")
    if hint is int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        whole = isinstance(value, float) and value.is_integer()
        raise ConfigError(where, value, "must be a whole number" + (f"; write {int(value)}" if whole else ""))
