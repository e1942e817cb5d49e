"""Values of `key=value`: what a user types, in the grammar that Hydra reads, and the places that they name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nemo_longctx.config import ConfigError

# Text that Hydra reads as itself. Words of its own (`null`, `true`), numbers and all else are put in quotes.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)(?:[A-Za-z_/]|\.(?!\d))[\w./-]*", re.IGNORECASE | re.ASCII)
# What a value of the command line is made of where Hydra's grammar need not be asked: no text of another meaning.
_SIMPLE = re.compile(r"[\w.+/-]*", re.ASCII)
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")


def hydra_text(value: Any) -> str:
    """A value in Hydra's grammar.

    Args:
        value: None, truth, number, text, path, and lists and mappings of them; arrays and their numbers too.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {hydra_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(hydra_text, value)) + "]"
    if isinstance(value, (int, float)):
        return repr(value)
    text = os.fspath(value)
    return text if _PLAIN.fullmatch(text) else _quoted(text)


def readable(key: str, value: str) -> str:
    """What the command line says, so that Hydra reads what was meant.

    Hydra's grammar has no unquoted `~`, `#`, comma, bracket or letter beyond ASCII, and the shell takes the quotes away: plain
    text that it cannot read, or would sweep over, is quoted; a list or mapping is read as YAML, whose flow style it is.
    """
    if _SIMPLE.fullmatch(value):
        return value
    if value[0] not in "[{'\"":
        return value if "=" not in value and _is_read(key, value) else _quoted(value)
    if _is_read(key, value):
        return value
    made = _as_yaml(value)
    return hydra_text(made) if isinstance(made, (list, dict)) else value


def _quoted(text: str) -> str:
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _is_read(key: str, value: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return not OverridesParser.create().parse_override(f"++{key}={value}").is_sweep_override()
    except HydraException:
        return False


def _as_yaml(value: str) -> Any:
    """A list or mapping in YAML's flow style, as Hydra reads its files (5e5 is a number); None where it is none."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {value}"))["value"]  # type: ignore[call-overload,index]
    except (yaml.YAMLError, OmegaConfBaseException, KeyError, ValueError):
        return None


def typed_keys(items: Iterable[str]) -> Iterator[str]:
    """The dotted keys that overrides give a value, those inside a mapping (`eval={every: 5}`) each by itself."""
    for item in items:
        key, _, value = item.lstrip("+").partition("=")
        made = _as_yaml(value) if value.startswith("{") else None
        yield from _dotted(key, made) if isinstance(made, dict) else [key]


def _dotted(key: str, values: Any) -> Iterator[str]:
    if not isinstance(values, dict):
        yield key
        return
    for name, value in values.items():
        yield from _dotted(f"{key}.{name}", value)


def places(values: Any, where: str = "") -> Any:
    """Plain values with `~` at the front of a path read as the shell does.

    Raises:
        ConfigError: text that begins with `$NAME`, which no shell will replace any more: a folder of that name would be made.
    """
    if isinstance(values, Mapping):
        # What stands outermost first: paths within are made of it (`${output_dir}/data`).
        order = sorted(values, key=lambda key: isinstance(values[key], (Mapping, list)))
        read = {key: places(values[key], f"{where}.{key}" if where else str(key)) for key in order}
        return {key: read[key] for key in values}
    if isinstance(values, list):
        return [places(each, f"{where}[{number}]") for number, each in enumerate(values)]
    if not isinstance(values, str):
        return values
    if (found := _VARIABLE.match(values)) and values[found.end() :][:1] in ("", "/"):
        raise ConfigError(where, values, f"an environment variable is written ${{oc.env:{found[1]}}} here")
    return os.path.expanduser(values) if values.startswith("~/") else values
