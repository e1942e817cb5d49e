"""`nemo-longctx train --print-config` and `sft --print-config`: every value of a run, and where it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_longctx.compose import CONF_DIR, chosen_machine, compose, recipe_file
from nemo_longctx.recipe import load_instruct_recipe, load_recipe
from nemo_longctx.resume import flat, plain

COMMAND_LINE, DEFAULT = "command line", "default"


def explained(overrides: Sequence[str], *, config_name: str = "config") -> str:
    """The run's settings as YAML, a comment a line on where each value comes from.

    A value that no file and no override says is the schema's default. What reads as YAML again is the same run.

    Args:
        overrides: `key=value`.
        config_name: the root in conf/: `config`, or `sft` for instruction tuning.

    Raises:
        ConfigError: as the run itself would.
    """
    load = load_instruct_recipe if config_name == "sft" else load_recipe
    values = plain(dataclasses.asdict(load(compose(overrides, config_name=config_name))))
    sources = sources_of(overrides, config_name=config_name)
    lines: list[tuple[str, str | None]] = []
    _write(values, "", 0, sources, lines)
    width = min(72, max(len(line) for line, _ in lines))
    return "\n".join(f"{line:<{width}}  # {source}" if source else line for line, source in lines) + "\n"


def sources_of(overrides: Sequence[str], *, config_name: str = "config") -> dict[str, str]:
    """Dotted key -> the file of conf/ (or of the user) or the command line that says it; the last one that does counts."""
    said: dict[str, str] = {}
    root = yaml.safe_load((CONF_DIR / f"{config_name}.yaml").read_text(encoding="utf-8"))
    chosen: dict[str, str] = {}
    for entry in root.pop("defaults"):
        chosen |= entry if isinstance(entry, dict) else {}
    given = {item.lstrip("+").partition("=")[0]: item.partition("=")[2] for item in overrides if "=" in item}
    # A row of Table 9 is to `sft` what a recipe is to `train`: it speaks of the whole run.
    whole = "sft" if config_name == "sft" else "recipe"
    bodies = list(_recipe_bodies(given.get(whole, chosen.pop(whole)), group=whole))
    for _, body in bodies:
        for entry in body.get("defaults", []):
            if isinstance(entry, dict):
                chosen |= {key.removeprefix("override /"): choice for key, choice in entry.items() if "/" in key}
    chosen |= {group: given[group] for group in chosen if group in given and not given[group].startswith("{")}
    chosen.pop(whole, None)
    said |= dict.fromkeys(_keys(root), f"conf/{config_name}.yaml")
    for group, choice in chosen.items():
        file = CONF_DIR / group / f"{choice}.yaml"
        if file.is_file():
            body = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            said |= dict.fromkeys(_keys({group: body}), f"conf/{group}/{choice}.yaml")
    for name, body in bodies:
        said |= dict.fromkeys(_keys({key: value for key, value in body.items() if key != "defaults"}), name)
    said |= _scaled_keys(overrides, config_name)
    said |= {f"trainer.{key}": f"conf/trainer/{given['trainer']}.yaml" for key in chosen_machine(overrides)}
    said |= {key: COMMAND_LINE for key in given if key not in chosen or given[key].startswith("{")}
    return said


def _scaled_keys(overrides: Sequence[str], config_name: str) -> dict[str, str]:
    """Keys whose values `scale=` made, and the file that says how."""
    chosen = [item.partition("=")[2] for item in overrides if item.startswith("scale=")]
    if not chosen or chosen[-1] == "null":
        return {}
    unscaled = [item for item in overrides if not item.startswith(("scale=", "scale."))]
    full, small = (flat(compose(items, config_name=config_name)) for items in (unscaled, overrides))
    made = [key.partition("[")[0] for key, value in small.items() if full.get(key) != value]
    return dict.fromkeys(made, f"conf/scale/{chosen[-1]}.yaml")


def _recipe_bodies(recipe: str, *, group: str = "recipe") -> Sequence[tuple[str, dict[str, Any]]]:
    """(name, content) of a recipe and, before it, of those that it begins with."""
    file = recipe_file(recipe)
    name = str(file) if file else f"conf/{group}/{recipe}.yaml"
    path = file or CONF_DIR / group / f"{recipe}.yaml"
    if not Path(path).is_file():
        return []
    body = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    before = [each for entry in body.get("defaults", []) if isinstance(entry, str) and entry != "_self_"
              for each in _recipe_bodies(entry)]  # fmt: skip
    return [*before, (name, body)]


def _keys(values: Mapping[str, Any]) -> list[str]:
    """Dotted keys of mappings, those of null values and of the mappings between included; a list is one value."""
    found = []
    for key, value in values.items():
        found.append(str(key))
        if isinstance(value, Mapping):
            found += [f"{key}.{inner}" for inner in _keys(value)]
    return found


def _source(key: str, sources: Mapping[str, str]) -> str:
    """Of a key, or of the nearest that holds it (`model={...}` on the command line says all of model)."""
    parts = key.split(".")
    exact = sources.get(key)
    if exact is not None:
        return exact
    holders = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    return next((COMMAND_LINE for holder in holders if sources.get(holder) == COMMAND_LINE), DEFAULT)


def _write(
    values: Mapping[str, Any], key: str, depth: int, sources: Mapping[str, str], lines: list[tuple[str, str | None]]
) -> None:
    for name, value in values.items():
        dotted, indent = f"{key}.{name}" if key else str(name), "  " * depth
        if isinstance(value, Mapping) and value:
            lines.append((f"{indent}{name}:", None))
            _write(value, dotted, depth + 1, sources, lines)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")
            lines.append((f"{indent}{name}: {text}", _source(dotted, sources)))
