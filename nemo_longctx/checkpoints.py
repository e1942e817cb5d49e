"""Checkpoints of a run as files: which there are, whether their files are whole, and from which one a run goes on.

A checkpoint is a directory in the run's `checkpoints/` that NeMo has written: `weights/` (torch's distributed format) and
`context/`. A manifest that is written with it tells a torn or half-copied one in milliseconds; where there is none, sizes that
torch's own metadata names are compared. Neither host nor torch is imported: all of it is known before either is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.files import first_process, write_text

FOLDER = "checkpoints"
UNREADABLE = "unreadable"  # where a checkpoint is put that cannot be read
MANIFEST = "manifest.json"
UNFINISHED = "-unfinished"  # NeMo's marker beside a checkpoint that is being written or removed
_ENDS = 64 * 2**10  # bytes at each end of a file that its checksum covers: a power failure leaves zeros at the end
_CHANGED_LATER = ("context/tokenizer/",)  # instruction tuning puts its chat template there
_CORRECTED = "weights/adapter_metadata.json"  # where a base was moved to is written into it


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written to its end, by NeMo's account.

    Attributes:
        path: its directory.
        step: optimizer steps behind it; -1 where neither manifest nor name says so.
    """

    path: Path
    step: int


def checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints of the run in `directory`, the newest first; those without an end are left out.

    Of one step the one for going on (`*-last`) comes before the one that is kept for its validation loss. Steps decide, not
    times: a copied directory has the times of its copying.
    """
    return finished_in(directory / FOLDER)


def failed_checkpoint(error: BaseException) -> str | None:
    """What torch says of a checkpoint that ranks could not write or read, in one line; None for any other error.

    Its `CheckpointException` is no `Exception`, and its text holds the traceback of every rank.
    """
    if type(error).__name__ != "CheckpointException":
        return None
    failures = getattr(error, "failures", {})
    said = dict.fromkeys(" ".join(str(failure).split()) for failure, _ in failures.values())
    ranks = ", ".join(map(str, failures))
    return f"a checkpoint failed ({error.args[0]}) on rank {ranks}: {'; '.join(said)[:500]}"


def finished_in(folder: Path) -> list[Checkpoint]:
    """`checkpoints` of the run that has its own in `folder`."""
    if not folder.is_dir():
        return []
    keyed = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the first process puts one aside, or removes it
            if path.is_dir() and not is_unfinished(path):
                keyed.append((step_of(path), path.name.endswith("-last"), path.stat().st_mtime, path))
    return [Checkpoint(path, step) for step, _, _, path in sorted(keyed, reverse=True)]


def is_unfinished(path: Path) -> bool:
    """Whether NeMo's marker is beside a checkpoint, and its files are not those of its manifest.

    The manifest is written when all the rest is there, and goes before anything of it does: a run that was killed between the
    two leaves a marked checkpoint that is whole.
    """
    marked = Path(f"{path}{UNFINISHED}").exists()
    return marked and (read_manifest(path) is None or fault_of(path) is not None)


def unmark_whole(folder: Path) -> None:
    """Keep the checkpoints of a run's `checkpoints/` that are whole behind a marker: NeMo would remove them.

    What it is about to remove is told. Only the run's first process does anything.
    """
    if not first_process():
        return
    for marker in sorted(folder.glob(f"*{UNFINISHED}")):
        checkpoint = Path(str(marker).removesuffix(UNFINISHED))
        if not checkpoint.is_dir():
            continue
        if is_unfinished(checkpoint):
            print(f"{checkpoint} is removed: a run was killed while it wrote or removed it", flush=True)
        else:
            marker.unlink(missing_ok=True)
            print(f"{checkpoint} is kept: a run was killed just when it had written it to its end", flush=True)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` has the parts of a NeMo 2 checkpoint."""
    return (path / "weights").is_dir() and (path / "context").is_dir()


def best_in(folder: Path, *, after: int = -1) -> list[tuple[Path, float]]:
    """The checkpoints that are kept for their validation loss, and that loss as their names have it, the best first.

    Args:
        folder: a run's `checkpoints/`.
        after: only those of a later step: one measured on other sets is no better and no worse.
    """
    found = []
    for each in finished_in(folder):
        named = re.search(r"val_loss=(-?[\d.]+|nan|inf)", each.path.name)
        if named and not each.path.name.endswith("-last") and each.step > after:
            loss = float(named[1].rstrip("."))
            found.append((each.path, math.inf if math.isnan(loss) else loss))
    return sorted(found, key=lambda pair: pair[1])


def checkpoint_to_resume(directory: Path, *, fallback: bool) -> Checkpoint | None:
    """The checkpoint that the run in `directory` goes on from: its newest, or with `fallback` the newest that can be read.

    What cannot be read is put aside into `unreadable/`, where nothing takes it for a checkpoint and nothing is lost.

    Returns:
        None where there is no checkpoint: the run begins.

    Raises:
        ConfigError: the newest cannot be read, and `fallback` is not set or there is none before it.
    """
    found = checkpoints(directory)
    faults: list[tuple[Checkpoint, str]] = []
    for number, each in enumerate(found):
        why = fault_of(each.path)
        if why is None:
            for torn, why_torn in faults:
                set_aside(torn.path, directory, why_torn)
            return each
        faults.append((each, why))
        if not fallback:
            older = next((other for other in found[number + 1 :] if fault_of(other.path) is None), None)
            raise ConfigError(
                "resume.fallback", False, f"the newest checkpoint, {each.path}, cannot be read: {why}; {_mend(older)}"
            )
    if faults:
        each, why = faults[0]
        raise ConfigError(
            "resume.fallback", True, f"no checkpoint can be read, the newest ({each.path}) not: {why}; {_mend(None)}"
        )
    return None


def set_aside(checkpoint: Path, directory: Path, why: str) -> None:
    """Move a checkpoint out of the way of whatever looks for one; only the run's first process does."""
    target = directory / UNREADABLE / checkpoint.name
    if not first_process() or not checkpoint.exists():
        return
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    checkpoint.rename(target)
    print(f"the checkpoint {checkpoint} cannot be read ({why}); it was put aside, into {target.parent}", flush=True)


def write_manifest(checkpoint: Path, *, step: int, tokens: int) -> None:
    """Note down size and checksum (of its ends) of each file of a checkpoint that is on the disk.

    Args:
        checkpoint: its directory.
        step: optimizer steps behind it.
        tokens: consumed tokens behind it.
    """
    files = {name: _look(path) for name, path in _files(checkpoint)}
    write_text(checkpoint / MANIFEST, json.dumps({"step": step, "tokens": tokens, "files": files}, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """What `write_manifest` wrote, or None."""
    try:
        record = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in words, or None. Reads no weights: a few hundred KiB a file at most."""
    try:
        return _fault_of(checkpoint)
    except OSError as error:  # a disk that fails, or a file that another process puts aside meanwhile
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"


def _fault_of(checkpoint: Path) -> str | None:
    weights = checkpoint / "weights"
    if not weights.is_dir() or not any(weights.iterdir()):
        return "it has no weights/"
    if not (checkpoint / "context").is_dir():
        return "it has no context/"
    manifest = read_manifest(checkpoint)
    if manifest is None:
        if (checkpoint / MANIFEST).exists():
            return f"{MANIFEST} is no whole JSON"
        return _fault_without_manifest(weights)
    for name, noted in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if name == _CORRECTED:
            continue
        size, checksum = _look(path)
        if size != noted[0]:
            return f"{name} has {size:,} bytes and had {noted[0]:,} when it was written"
        if checksum != noted[1]:
            return f"{name} is not what was written (another checksum)"
    return None


def _fault_without_manifest(weights: Path) -> str | None:
    """A checkpoint of stock NeMo, or one older than manifests: what torch's metadata says of its files."""
    for name in ("metadata.json", "common.pt", ".metadata"):
        path = weights / name
        if not path.is_file():
            return f"weights/{name} is missing"
        if not path.stat().st_size:
            return f"weights/{name} is empty"
    if not zipfile.is_zipfile(weights / "common.pt"):
        return "weights/common.pt is cut short"
    try:
        ends = _ends_in_metadata(weights / ".metadata")
    except Exception as error:  # pickle raises whatever a torn stream makes of its opcodes
        return f"weights/.metadata is cut short ({type(error).__name__})"
    for name, end in ends.items():
        path = weights / name
        if not path.is_file():
            return f"weights/{name} is missing"
        if path.stat().st_size < end:
            return f"weights/{name} has {path.stat().st_size:,} bytes of at least {end:,}"
    return None


class _Stand:
    """Stands for any class or function that torch's metadata names: keeps its state, runs no code."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Stand:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


class _MetadataReader(pickle.Unpickler):
    """Reads sizes out of `.metadata` without importing, or calling, anything that the file names."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.made: list[_Stand] = []

    def find_class(self, module: str, name: str) -> Any:
        """A class of its own, whose instances are collected."""
        made = self.made

        class Stand(_Stand):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__()

            def __setstate__(self, state: Any) -> None:
                super().__setstate__(state)
                made.append(self)

        return Stand


def _ends_in_metadata(path: Path) -> dict[str, int]:
    """The bytes that each data file holds at least: `_StorageInfo(relative_path, offset, length)` in torch's metadata."""
    with path.open("rb") as file:
        reader = _MetadataReader(file)
        reader.load()
    ends: dict[str, int] = {}
    for each in reader.made:
        values = vars(each)
        if {"relative_path", "offset", "length"} <= set(values):
            end = values["offset"] + values["length"]
            ends[values["relative_path"]] = max(end, ends.get(values["relative_path"], 0))
    return ends


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_file() and name != MANIFEST and not name.startswith(_CHANGED_LATER):
            yield name, path


def _look(path: Path) -> list[int]:
    """Size in bytes, and CRC-32 of the first and the last `_ENDS` bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        checksum = zlib.crc32(file.read(_ENDS))
        if size > _ENDS:
            file.seek(max(_ENDS, size - _ENDS))
            checksum = zlib.crc32(file.read(), checksum)
    return [size, checksum]


def step_of(path: Path) -> int:
    """Optimizer steps behind a checkpoint, by its manifest or its name; -1 where neither says so."""
    manifest = read_manifest(path)
    if manifest is not None and isinstance(manifest.get("step"), int):
        return manifest["step"]
    named = re.search(r"step=(\d+)", path.name)
    return int(named[1]) if named else -1


def _mend(older: Checkpoint | None) -> str:
    if older is None:
        return "restore its files, or remove its directory, and the same command begins anew from restore_from or from scratch"
    return f"restore its files, or set resume.fallback=true, which goes on from the one before it, {older.path.name}"
