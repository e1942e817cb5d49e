"""How the processes of a run are started, and whether those that were can be it: told before torch or the host is imported."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_longctx.capability import cuda_devices
from nemo_longctx.config import ConfigError
from nemo_longctx.files import first_process
from nemo_longctx.runs import STOP_SIGNALS

if TYPE_CHECKING:
    from nemo_longctx.recipe_parts import TrainerConfig

EXTENSION = "managed_alloc_runtime"  # of megatron.core.inference.unified_memory
BUILD_SECONDS = 120  # a few with a compiler at hand; a lock that is older is nobody's
WORDLESS_SECONDS = 5
OWN_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs")  # others may be shared with machines
RENDEZVOUS = "FIRST_NODE:29500"  # one of the nodes by its name, and a free port there


def torchrun(nodes: int, devices: int) -> list[str]:
    """The words that start `devices` processes of this package, on each node where there are several."""
    if nodes * devices == 1:
        return ["nemo-longctx"]
    words = ["torchrun"]
    if nodes > 1:
        words += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", RENDEZVOUS]
    return [*words, "--nproc-per-node", str(devices), "-m", "nemo_longctx"]


def on_each_node(nodes: int) -> str:
    """A shell comment behind a line of `torchrun`; empty on one node."""
    return f"   # on each of the {nodes} nodes; FIRST_NODE is the name of one" if nodes > 1 else ""


def started_processes() -> int | None:
    """How many processes torchrun or Slurm started; None where this one was started alone."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _count("WORLD_SIZE")
    # As Lightning has it: a shell of Slurm's, in which a command is typed, is no task of a job.
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return _count("SLURM_NTASKS")
    return None


def _count(variable: str) -> int:
    value = os.environ[variable]
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(variable, value, "must be a number of processes, 1 or more; start with torchrun or srun, or unset it")
    return int(value)


def check_start(trainer: TrainerConfig) -> None:
    """Refuse processes and devices that are not those of the layout.

    Raises:
        ConfigError: no CUDA device, fewer than are asked for, or another number of processes than the recipe's.
    """
    if trainer.accelerator == "gpu":
        there = len(cuda_devices())
        if not there:
            mend = "this machine has no CUDA device; set trainer=cpu (nemo-longctx doctor tells more)"
            raise ConfigError("trainer.accelerator", "gpu", mend)
        if there < trainer.devices:
            raise ConfigError("trainer.devices", trainer.devices, f"this machine shows {there} CUDA devices; set that or fewer")
    started, line = started_processes(), " ".join(torchrun(trainer.num_nodes, trainer.devices))
    if started is not None and started != trainer.world_size:
        mend = (
            f"{started} processes were started, and num_nodes x devices are {trainer.world_size}; set both to what was "
            f"started, or start: {line} ..."
        )
        raise ConfigError("trainer.devices", trainer.devices, mend)
    if started is None and trainer.num_nodes > 1 and "NODE_RANK" not in os.environ:
        mend = f"this process was started alone; start on each node: {line} ..."
        raise ConfigError("trainer.num_nodes", trainer.num_nodes, mend)


@contextlib.contextmanager
def main_hidden() -> Iterator[None]:
    """Processes that multiprocessing spawns meanwhile do not import the main script again.

    One that starts its work without `if __name__ == "__main__":` would start it there once more, and end both.
    """
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), main.__spec__
    main.__file__, main.__spec__ = None, None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is None:
            del main.__file__
        else:
            main.__file__ = file


@contextlib.contextmanager
def signals_not_inherited() -> Iterator[None]:
    """Processes that are started meanwhile get no stop signal: Ctrl-C, `scancel` and torchrun's end reach every process of a
    run, and would kill what its checkpoints need.

    For this thread signals wait until the end.
    """
    resource_tracker.ensure_running()  # it lets SIGINT and SIGTERM in again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(process: int) -> None:
    """This process, which `process` started, ends within a second of it, however that ended: SIGKILL tells no child."""

    def watch() -> None:
        while os.getppid() == process:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def remove_stale_locks() -> None:
    """Remove torch's lock on an extension that Megatron-Core builds when it is imported, if its holder is gone.

    torch takes it for the seconds of a build, and every later import waits for its end without a word: one that was killed
    meanwhile would let no run of this user start again. A builder keeps the file open; where that cannot be seen (a home that
    machines share) a lock that lies still for `BUILD_SECONDS` is nobody's, and the wait for that is told.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    asked = os.environ.get("TORCH_EXTENSIONS_DIR")
    pattern = f"{EXTENSION}/lock" if asked else f"*/{EXTENSION}/lock"
    for lock in (Path(asked) if asked else home).glob(pattern):
        with contextlib.suppress(OSError):  # another process of this run removed it, or it is another user's
            _wait_until_nobodys(lock)
            lock.unlink()
            print(f"removed {lock}: a process that was killed while it imported Megatron-Core left it", flush=True)


def _wait_until_nobodys(lock: Path) -> None:
    """Return once nobody holds `lock`; raises OSError as soon as it is gone."""
    began, seen, closed, told = time.monotonic(), lock.stat(), False, False
    while time.time() - seen.st_mtime <= BUILD_SECONDS and time.monotonic() - began <= BUILD_SECONDS:
        was_closed, closed = closed, seen.st_uid == os.getuid() and _on_own_disk(lock) and not _is_open(lock)
        if was_closed and closed:  # once may be between its closing and its removal
            break
        if not told and time.monotonic() - began > WORDLESS_SECONDS and first_process():
            rest = f"at most {BUILD_SECONDS} s, then it is removed"
            print(
                f"waiting for {lock}: another process builds what Megatron-Core needs, or was killed there; {rest}", flush=True
            )
            told = True
        time.sleep(0.1)
        now = lock.stat()
        if (now.st_ino, now.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):  # the next one builds
            began, seen, closed = time.monotonic(), now, False


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has `path` open, as far as this user may look."""
    real = str(path.resolve())
    for file in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(file) == real:
                return True
    return False


def _on_own_disk(path: Path) -> bool:
    """Whether `path` is on a disk of this machine alone, by the kernel's mounts: all who have it open are seen here."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    real = path.resolve()
    behind = [(words[4], words[words.index("-") + 1]) for words in mounts if "-" in words]
    place, kind = max(
        (each for each in behind if real.is_relative_to(each[0])), key=lambda each: len(each[0]), default=("", "")
    )
    return bool(place) and kind in OWN_DISKS


def in_notebook() -> bool:
    """Whether somebody types into this process, in a notebook or at a prompt: as Lightning asks."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)
