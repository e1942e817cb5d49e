"""Files that are there whole or not at all, whenever their writer is killed, locks between processes, and who writes."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_RANDOM = 8  # hexadecimal digits behind the name of a file that is being built


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file so that a reader sees the old one or the new one, never half of one; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a JSON file that may be another's says; {} where it is not there, or is no mapping."""
    try:
        said = json.loads(Path(path).read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def can_be_written(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made where it is not there: tried, since rights do not say all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def first_process() -> bool:
    """Whether this is the first of the run's processes, under torchrun, Slurm or alone, before any group is made."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process of all that share the directory in at a time."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is whole: a killed builder leaves nothing that another would open.

    What a killed one left half written is removed by the next of the same name. It is not forced to the disk, which can take as
    long as building it: cut short by a power failure, it is refused.
    """
    temporary, descriptor, held = _begun(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _remove_abandoned(path, besides=temporary)
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(held)


def _begun(path: Path) -> tuple[Path, int, int]:
    """A new hidden file beside `path`, open, and a second descriptor that holds its lock until it has its name."""
    while True:
        temporary = path.parent / f".{path.name}.{secrets.token_hex(_RANDOM // 2)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # who may read it: as of any file
        with contextlib.suppress(OSError):  # a file system without locks: what is left there stays
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():  # else another's `_remove_abandoned` came before the lock
            return temporary, descriptor, os.dup(descriptor)
        os.close(descriptor)


def _remove_abandoned(path: Path, *, besides: Path) -> None:
    """Remove hidden files of earlier builders of `path` whose lock is free, since the process that had it is dead."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{{_RANDOM}}}")
    for left in path.parent.iterdir():
        if name.fullmatch(left.name) and left != besides:
            with contextlib.suppress(OSError), open(left, "r+b") as file:  # network file systems lock what is written alone
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


class OpenFiles:
    """Keeps what cycles hold open from adding up, in a process so large that Python's collector of them seldom comes.

    Args:
        most: files that may be opened above those of the first call, or after a collection, before the next one.
    """

    def __init__(self, most: int = 64):
        self.most, self._base = most, 0

    def bound(self) -> None:
        """Collect cycles if too many files are open by now."""
        now = self._count()
        if not self._base:
            self._base = now
        elif now > self._base + self.most:
            gc.collect()
            self._base = self._count()

    @staticmethod
    def _count() -> int:
        """Files that are open; 0 on a system that does not list them, where nothing is done."""
        return len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0
