"""Names of lm-eval's tasks, as the text of its files has them: a slip is told in a second, where its index takes many."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_longctx.capability import module_folder
from nemo_longctx.config import ConfigError
from nemo_longctx.config import did_you_mean as nearest
from nemo_longctx.eval.config import HarnessTask

# Code and prose beside the tasks. What they include may be called anything.
_NO_TASKS = (".py", ".pyc", ".md", ".sh", ".json", ".jsonl", ".csv", ".txt")
_LARGEST = 1 << 20  # bytes of a file that tasks include: one's own folder may hold data too
_NAMED = re.compile(rb"""^[ \t-]*["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?(\w[\w.+-]*)""", re.MULTILINE)


def check_spelling(task: HarnessTask) -> None:
    """Refuse a name that stands in no file of tasks, without importing lm-eval. One that does may still be no task.

    Raises:
        ConfigError: with the name that is nearest.
    """
    package = module_folder("lm_eval")
    if package is None:  # its import says how to get it
        return
    folders = [str(Path(__file__).with_name("tasks")), *([task.include_path] if task.include_path else [])]
    folders += [str(package / "tasks")] if task.include_defaults else []
    lost, known = _lost(task.tasks, folders)
    if lost:
        more = "" if task.include_defaults else "; for lm-eval's own set include_defaults: true"
        raise ConfigError("eval.tasks", lost[0], f"no such task, {_meant(lost[0], known)}{more}")


def _meant(name: str, known: set[str]) -> str:
    said = nearest(name, known)
    return said if said.startswith("did you mean") else f"none of {len(known)} is like it"


def _lost(names: Sequence[str], folders: Sequence[str]) -> tuple[list[str], set[str]]:
    """The names that no file has as a word, and those that files call a task, a group or a tag."""
    words = {name: re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])") for name in names}
    known: set[str] = set()
    for text in _texts(folders):
        words = {name: word for name, word in words.items() if name.encode() not in text or not word.search(text)}
        if not words:
            break
        known.update(found.decode("utf-8", "replace") for found in _NAMED.findall(text))
    return list(words), known


def _texts(folders: Sequence[str]) -> Iterator[bytes]:
    for folder in folders:
        for root, _, files in os.walk(folder):
            for name in files:
                path = Path(root, name)
                if name.endswith(_NO_TASKS) or not path.is_file():
                    continue
                if name.endswith("yaml") or path.stat().st_size <= _LARGEST:
                    yield path.read_bytes()
