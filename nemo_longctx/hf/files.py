"""Files as downloads, caches and full disks leave them, and the place where a result may be written."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable
from pathlib import Path

from nemo_longctx.config import ConfigError

KEY = "HF_DIR"
_TEXT = (".json", ".txt", ".jinja")
_POINTER = b"version https://git-lfs"


def check_files(directory: Path, names: Iterable[str]) -> None:
    """Refuse files of a directory that stand for something that is not there.

    Args:
        directory: a Hugging Face model directory.
        names: the files that will be read; one that is absent is another check's concern.

    Raises:
        ConfigError: an empty file, a pointer of Git LFS, a link to nothing, a folder of a file's name, or text behind
            a byte order mark.
    """
    for name in names:
        path = directory / name
        if path.is_symlink() and not path.exists():
            raise ConfigError(KEY, str(path), f"is a link to {os.readlink(path)}, which is not there; download the model again")
        if path.is_dir():
            raise ConfigError(KEY, str(path), "is a folder, where a file of this name was looked for")
        if not path.is_file():
            continue
        if path.stat().st_size == 0:
            raise ConfigError(KEY, str(path), "is empty; copy or download it again")
        with open(path, "rb") as file:
            begins = file.read(len(_POINTER))
        if begins == _POINTER:
            raise ConfigError(KEY, str(path), "is a pointer of Git LFS, not the file; run `git lfs pull` in its directory")
        if name.endswith(_TEXT) and begins.startswith(codecs.BOM_UTF8):
            mend = "begins with a byte order mark, which transformers cannot read; save it as UTF-8 without one"
            raise ConfigError(KEY, str(path), mend)


def check_target(target: Path, source: Path) -> None:
    """Refuse a place that a result cannot be written to, before any work is done.

    Raises:
        ConfigError: it is taken, lies inside what is read, or cannot be made.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError("target", str(target), "exists already; remove it or name another")
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError("target", str(target), f"lies inside {source}, which is read; name a place outside of it")
    above = next(parent for parent in target.absolute().parents if parent.exists() or parent.is_symlink())
    if not above.is_dir():
        raise ConfigError("target", str(target), f"cannot be made: {above} is no directory; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError("target", str(target), f"cannot be made: {above} may not be written to; name another place")
