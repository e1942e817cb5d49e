"""Writes settings.md and commands.md from the schema and the command line, so that neither can say what is not so.

python docs/make_reference.py
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_longctx.cli import COMMANDS
from nemo_longctx.compose import groups
from nemo_longctx.eval.config import TASKS
from nemo_longctx.recipe import InstructRecipe, RecipeConfig
from nemo_longctx.reference import Setting, meanings, settings
from nemo_longctx.rope.variants import VARIANTS, Rope

HERE = Path(__file__).parent
FOUND = ("base", "factor", "original_max_position_embeddings")  # what a checkpoint says of a variant


def settings_page() -> str:
    """Every key of a recipe, by group, and the fields of each RoPE variant."""
    lines = [
        "# Settings",
        "",
        "Every key of a recipe (`key=value` on the command line, or YAML), from the schema that checks it. `[]` is any place",
        "in a list; a key without a default has to be set. A group is chosen by one word (`rope=abf`, `trainer=cpu`):",
        "",
        "| group | choices |",
        "| --- | --- |",
        *[f"| `{group}` | {', '.join(f'`{choice}`' for choice in choices)} |" for group, choices in groups().items()],
    ]
    lines += [
        "",
        "A default is the schema's; the files of the groups and the recipe come before it, and the command line before those:",
        "`nemo-longctx train --print-config` says of each value where it comes from. None is YAML's `null`.",
    ]
    found = _by_section(settings(RecipeConfig))
    for group, rows in found.items():
        lines += _table(f"## {group or 'The run'}", rows)
        if group == "eval":
            for kind, task in TASKS.items():
                lines += _table(f"### A block of `eval.tasks` of `kind: {kind}`", settings(task))
    known = {row.key for rows in found.values() for row in rows}
    more = [row for row in settings(InstructRecipe) if row.key not in known or row.key == "data.tokenizer"]
    words = "What `nemo-longctx sft` has besides; its `data` has no `mix`, `packing`, `document_masking` and `after`."
    lines += _table("## Instruction tuning", more, words)
    lines += [
        "",
        "## RoPE variants",
        "",
        "`rope.variant` and its fields. A base, factor or trained length that is not set is the checkpoint's.",
    ]
    lines += [
        "",
        f"Of every variant: `rope.layers`, `all` or `full_attention`; `rope.local_base`: {meanings(Rope)['local_base']}",
    ]
    for name, cls in VARIANTS.items():
        texts = meanings(cls)
        own = [field for field in dataclasses.fields(cls) if field.name != "local_base"]
        fields = ", ".join(f"`{field.name}`" for field in own)
        lines += ["", f"### {name}", "", f"{(cls.__doc__ or '').split(chr(10))[0]} Fields: {fields}.", ""]
        lines += [f"- `{field.name}`{_else(name, field)}: {texts[field.name]}" for field in own]
    return "\n".join(lines).rstrip() + "\n"


def _by_section(rows: list[Setting]) -> dict[str, list[Setting]]:
    """Settings by their first word; those of the run itself under an empty one."""
    sections = {row.key.partition(".")[0].removesuffix("[]") for row in rows if "." in row.key}
    found: dict[str, list[Setting]] = {}
    for row in rows:
        group = row.key.partition(".")[0].removesuffix("[]")
        found.setdefault(group if group in sections else "", []).append(row)
    return found


def _table(title: str, rows: list[Setting], words: str = "") -> list[str]:
    lines = ["", title, *(["", words] if words else []), "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    return lines + [f"| `{row.key}` | {row.kind} | {_code(row.default)} | {_cell(row.meaning)} |" for row in rows]


def commands_page() -> str:
    """The help of every command, as it prints it."""
    lines = ["# Commands", "", "`nemo-longctx COMMAND`. Each is a module that is imported only when it runs.", ""]
    for name, line in COMMANDS.items():
        module = importlib.import_module(f"nemo_longctx.commands.{name.replace('-', '_')}")
        parser = argparse.ArgumentParser(prog=f"nemo-longctx {name}", description=line, formatter_class=_Wide)
        module.configure(parser)
        for under, each in _with_jobs(name, parser):
            lines += [f"##{'#' * (under != name)} {under}", "", "```text", each.format_help().rstrip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _with_jobs(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A command, and what it does by a word of its own (`rope show`)."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, job in action.choices.items():
                job.formatter_class = _Wide
                yield from _with_jobs(f"{name} {word}", job)


class _Wide(argparse.HelpFormatter):
    """The same width whatever the terminal."""

    def __init__(self, prog: str):
        super().__init__(prog, width=100)


def _else(variant: str, field: dataclasses.Field[Any]) -> str:
    """A variant's own default, where it is not the checkpoint's value that stands in for one that is not set."""
    found = field.name in FOUND and (variant, field.name) != ("abf", "base")
    return "" if found or field.default in (dataclasses.MISSING, None) else f" (default {field.default})"


def _code(default: str | None) -> str:
    return "" if default is None else f"`{default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (HERE / "settings.md").write_text(settings_page(), encoding="utf-8")
    (HERE / "commands.md").write_text(commands_page(), encoding="utf-8")
