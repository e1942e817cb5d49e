"""The folder that `generate` writes: nothing that another hand, or other settings, made there is replaced unasked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.files import read_mapping

WRITTEN = ("instances.jsonl", "dropped.jsonl", "report.json")
JOURNAL = "journal.jsonl"


def said(config: Any) -> dict[str, Any]:
    """Settings (`GenerateConfig`) as the report keeps them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}


def check_folder(output: Path, config: Any, *, prompts: str) -> None:
    """Refuse to replace what this command did not make, or made with other settings or words.

    Replies stay in the journal whatever is asked: those that the other settings ask for too are not paid again.

    Args:
        config: `GenerateConfig`. prompts: their version.

    Raises:
        ConfigError: what is there, or by which settings it was made.
    """
    there = [name for name in WRITTEN if (output / name).exists()]
    before = read_mapping(output / "report.json")
    ours = isinstance(before.get("settings"), dict) and "yield" in before
    if not there or (not ours and "report.json" not in there and (output / JOURNAL).exists()):  # killed before its report
        return
    if not ours:
        mend = f"{output / there[0]} is there, and of no run of this command; name another folder, or replace it with --force"
        raise ConfigError("--output", str(output), mend)
    now, then = said(config), before["settings"]
    other = [key for key, value in now.items() if key in then and not _same(key, then[key], value)]
    other += ["prompts"] if before.get("prompt_version") != prompts else []
    if other:
        mend = f"was made with another {' and another '.join(other)}; name another folder, or replace it with --force"
        raise ConfigError("--output", str(output), f"{mend} (replies that are paid for stay either way)")


def _same(key: str, one: Any, other: Any) -> bool:
    if key in ("documents", "tokenizer") and isinstance(one, str):
        return os.path.abspath(one) == os.path.abspath(other)
    return bool(one == other)
