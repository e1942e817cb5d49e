"""Writes settings.md and commands.md from the schema and the command line, so that neither can say what is not so.

python docs/make_reference.py
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

from nemo_longctx.cli import COMMANDS
from nemo_longctx.compose import groups
from nemo_longctx.recipe import RecipeConfig
from nemo_longctx.reference import Setting, meanings, settings
from nemo_longctx.rope.variants import VARIANTS, Rope

HERE = Path(__file__).parent


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
    found: dict[str, list[Setting]] = {}
    for each in settings(RecipeConfig):
        group, dot, _ = each.key.partition(".")
        found.setdefault(group.removesuffix("[]") if dot else "", []).append(each)
    for group, rows in found.items():
        lines += ["", f"## {group or 'The run'}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{row.key}` | {row.kind} | {_code(row.default)} | {_cell(row.meaning)} |" for row in rows]
    lines += ["", "## RoPE variants", "", "`rope.variant` and its fields; what is not set is the checkpoint's."]
    lines += [
        "",
        f"Of every variant: `rope.layers`, `all` or `full_attention`; `rope.local_base`: {meanings(Rope)['local_base']}",
    ]
    for name, cls in VARIANTS.items():
        texts = meanings(cls)
        own = [field for field in dataclasses.fields(cls) if field.name != "local_base"]
        fields = ", ".join(f"`{field.name}`" for field in own)
        lines += ["", f"### {name}", "", f"{(cls.__doc__ or '').split(chr(10))[0]} Fields: {fields}.", ""]
        lines += [f"- `{field.name}`: {_cell(texts[field.name])}" for field in own if field.name in texts]
    return "\n".join(lines).rstrip() + "\n"


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


def _code(default: str | None) -> str:
    return "" if default is None else f"`{default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (HERE / "settings.md").write_text(settings_page(), encoding="utf-8")
    (HERE / "commands.md").write_text(commands_page(), encoding="utf-8")
