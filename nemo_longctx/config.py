"""The one way from a mapping (YAML, command line, Python) to a checked, frozen dataclass.

Dataclasses own defaults, units and checks; a mapping only overrides. An unknown key is an error that suggests the nearest
known one; a bad value is a `ConfigError` that names the key, the value and the mend.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from fractions import Fraction
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


def size_of_text(value: Any) -> int | None:
    """`16M` -> 16,000,000; K, M, G, T are powers of 1,000, Ki, Mi, Gi, Ti of 1,024. None for what is no size."""
    form = r"(\d{1,30}(?:\.\d{1,30})?)\s*(?:([KMGT])(i?))?B?"
    match = re.fullmatch(form, value.strip(), re.IGNORECASE | re.ASCII) if isinstance(value, str) else None
    if match is None:
        return None
    number, unit, binary = match.groups()
    if unit is None:
        return None if "." in number else int(number)  # there is no half of a byte or token
    return int(Fraction(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper()))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'rope'?)` for the nearest of `known`, or the sorted list of them all."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6) or [each for each in known if each.lower() == word.lower()]
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
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(where or cls.__name__, values, f"takes keys of its own: {_keys_of(cls)}")
    values = dict(values or {})
    hints = _type_hints(cls)  # type: ignore[arg-type]  # a class is hashable
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    whole = _whole.get() or (hints, fields, prefix)
    for key in values:
        if key not in fields:
            raise ConfigError(f"{prefix}{key}", values[key], f"unknown key, {_meant(str(key), (hints, fields, prefix), whole)}")
    told = _whole.set(whole)
    try:
        made = _checked_fields(values, hints, fields, prefix)
        try:
            return cls(**made)
        except ConfigError as error:
            raise _where_it_stands(error, where, fields) from None
    finally:
        _whole.reset(told)


Place = tuple[Mapping[str, Any], Mapping[str, Any], str]  # hints and fields of a dataclass, and the prefix of its keys
_whole: ContextVar[Place | None] = ContextVar("whole", default=None)  # what is built outermost, for hints of keys


def _where_it_stands(error: ConfigError, where: str, fields: Iterable[str]) -> ConfigError:
    """A class knows its keys by the place where it usually stands (`data.mix`); here it may stand elsewhere."""
    usual, _, name = error.key.rpartition(".")
    inside = error.key.startswith((f"{where}.", f"{where}["))
    if (
        not where
        or not usual
        or name not in fields
        or inside
        or usual in (re.sub(r"\[\d+\]", "", where), where.partition(".")[0])
    ):
        return error
    return ConfigError(f"{where}.{name}", error.value, error.mend)


def _checked_fields(values: dict[str, Any], hints: Mapping[str, Any], fields: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{prefix}{name}", None, "missing; set it")
        if name in values:
            if values[name] is None and not _takes_none(hints[name]):
                mend = "missing; set it" if required else "null is no value here; leave it out for the default"
                raise ConfigError(f"{prefix}{name}", None, mend)
            values[name] = checked(hints[name], values[name], f"{prefix}{name}")
    return values


def _meant(key: str, here: Place, whole: Place) -> str:
    """Where the key would stand: in a section below (`lr`: `optimizer.lr`), elsewhere (`trainer.lr`), or a near one here."""
    nearest = did_you_mean(key, here[1])
    if there := _places(key, here):
        return f"did you mean {_named(there)}?"
    if there := _places(key, whole):
        near_here = nearest.removeprefix("did you mean ") if nearest.startswith("did you mean") else "?"
        return f"did you mean {_named(there)}{'?' if near_here == '?' else f', or {near_here}'}"
    return nearest


def belongs_to(key: str) -> str:
    """`'optimizer.lr'`: where a key stands in what is being built outermost; empty for nowhere, or where nothing is."""
    whole = _whole.get()
    return _named(_places(key, whole)) if whole is not None else ""


def _named(places: Sequence[str]) -> str:
    return " or ".join(map(repr, places[:3]))


def _places(key: str, within: Place) -> list[str]:
    hints, fields, prefix = within
    return [f"{prefix}{each}" for each in ([key] if key in fields else sorted(_inside(key, hints, fields)))]


def _inside(key: str, hints: Mapping[str, Any], fields: Iterable[str]) -> Iterator[str]:
    for name in fields:
        for hint, is_listed in _sections(hints[name]):
            place = f"{name}[0]" if is_listed else name
            names = [field.name for field in dataclasses.fields(hint) if field.init]
            if key in names:
                yield f"{place}.{key}"
            yield from (f"{place}.{each}" for each in _inside(key, _type_hints(hint), names))


def _sections(hint: Any, *, is_listed: bool = False) -> Iterator[tuple[Any, bool]]:
    """The dataclasses of a hint, each with whether it is one of a list."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint, is_listed
        return
    is_listed = is_listed or typing.get_origin(hint) in (tuple, list, Sequence)
    for each in typing.get_args(hint):
        yield from _sections(each, is_listed=is_listed)


_type_hints = functools.cache(typing.get_type_hints)  # 0.2 ms a call, and a mix may have hundreds of sources


def _takes_none(hint: Any) -> bool:
    return hint is Any or types.NoneType in typing.get_args(hint)


def checked(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type hint asks for it: dataclasses built, lists made tuples; what it cannot be at all is refused.

    Checked are kinds: finite numbers, true or false, text, choices, lists, mappings. Bounds are the dataclass's own to check.

    Raises:
        ConfigError: by the name `where`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(args, value, where)
    if origin is typing.Literal:
        if isinstance(value, (bool, float)) or value not in args:
            raise ConfigError(where, value, f"no such choice, {did_you_mean(str(value), [str(each) for each in args])}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(hint, value, where=where)
        if not isinstance(value, hint):
            raise ConfigError(where, value, f"takes keys of its own: {_keys_of(hint)}")
        return value
    if origin in _LISTS and args:
        return _list(origin, args[0], value, where)
    if origin in (dict, Mapping, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(where, value, "must be a mapping, such as {key: value}")
        return {str(key): checked(args[1], item, f"{where}.{key}") for key, item in value.items()} if args else value
    if hint in (int, float, bool, str):
        return _scalar(hint, value, where)
    return value


_LISTS = (tuple, list, collections.abc.Sequence)


def _keys_of(cls: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls) if field.init)


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """`value` as the first of some type hints that takes it."""
    if value is None and types.NoneType in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not types.NoneType)
    errors = []
    for hint in hints:
        try:
            return checked(hint, value, where)
        except ConfigError as error:
            errors.append(error)
    # What a mapping has wrong inside, or a list, says more than that it is no text.
    raise next((error for error in errors if error.key != where), errors[0])


def _list(origin: Any, item: Any, value: Any, where: str) -> Any:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ConfigError(where, value, f"must be a list{' of numbers' if item in (int, float) else ''}")
    made = [checked(item, each, f"{where}[{i}]") for i, each in enumerate(value)]
    return made if origin is list else tuple(made)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is bool and not isinstance(value, bool):
        raise ConfigError(where, value, "must be true or false")
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ConfigError(where, value, "not a number; write digits, with a point before an exponent (5.0e+5)")
        if not is_finite(value):
            raise ConfigError(where, value, "must be a finite number")
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            meant = value if isinstance(value, float) and value.is_integer() else size_of_text(value)
            if meant is not None and abs(meant) >= 2**63:
                raise ConfigError(where, value, "must be a whole number of 64 bits")
            raise ConfigError(where, value, "must be a whole number" + ("" if meant is None else f"; write {int(meant)}"))
        if not -(2**63) <= int(value) < 2**63:
            raise ConfigError(where, value, "must be a whole number of 64 bits")
    if hint is str:
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)  # YAML reads `name: 256` as a number
        if not isinstance(value, str):
            mend = "must be text; put it in quotes, which on a command line stand in quotes of the shell: \"'...'\""
            raise ConfigError(where, value, mend)
        if "\0" in value:
            raise ConfigError(where, value, "must be text without a NUL character")
    return value


def refuse_missing(value: Any, where: str = "") -> None:
    """Raise ConfigError for the first `???`, Hydra's word for what a user must set, anywhere in plain values."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_missing(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            refuse_missing(item, f"{where}[{number}]")
    elif isinstance(value, str) and value == "???":
        raise ConfigError(where, value, "missing; set it")


def plain(value: Any) -> Any:
    """Tuples as lists and mappings as dictionaries, all the way down: what JSON, YAML and nemo_run can carry."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def to_values(config: Any) -> dict[str, Any]:
    """The plain mapping that `build` turns back into `config`: only what differs from the defaults.

    A class that is one of several by a word of YAML keeps that word in a class variable `kind`.
    """
    values: dict[str, Any] = {"kind": config.kind} if isinstance(getattr(type(config), "kind", None), str) else {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.init and (default is dataclasses.MISSING or value != default):
            values[field.name] = _plain_item(value)
    return values


def _plain_item(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_values(value)
    if isinstance(value, Mapping):
        return {str(key): _plain_item(item) for key, item in value.items()}
    return [_plain_item(item) for item in value] if isinstance(value, (list, tuple)) else value
