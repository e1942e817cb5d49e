"""A run's directory before and after NeMo: one run in it at a time, whether it is finished, how it is stopped, what comes next.

Nothing here imports the host or torch: a second start, a finished run and a torn checkpoint are told before either is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_longctx.checkpoints import checkpoints, fault_of
from nemo_longctx.config import ConfigError
from nemo_longctx.files import first_process, write_text
from nemo_longctx.report.training_log import SET_LOSS, read_training_log

LOCK = ".lock"
FINISHED = "finished.json"
GUARD_STOP = "guard_stop.json"  # among the results of evaluations
REHEARSAL = "-dry-run-"  # in the hidden folder that a full dry run trains in
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_held: dict[Path, tuple[int, int]] = {}  # directory -> open file, times taken by this process
_came: list[int] = []  # stop signals since `stops_at_once` began


class Stopped(SystemExit):
    """A run that a signal ended: its work is saved, its end is not reached. `code` is 128 + the signal's number, as a shell
    has it: 143 after SIGTERM, 130 after SIGINT, 138 after SIGUSR1.
    """

    def __init__(self, signum: int, *, saved: bool = False, at_once: bool = False):
        super().__init__(128 + signum)
        self.signum, self.saved, self.at_once = signum, saved, at_once


class RunError(RuntimeError):
    """A run that cannot go on, said in one sentence with the mend; no mistake in a setting."""


def own_command() -> str:
    """The command that started this run, as it was typed, to start it again; under torchrun torchrun's."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            return shlex.join(Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1])
    return shlex.join([sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def one_run(directory: Path, *, every_process: bool = False) -> Iterator[None]:
    """Let no other run write to `directory` meanwhile. The lock goes with the process, however that ends.

    Only the run's first process takes it, or `every_process`, where each has a directory of its own; a second call in the same
    process does nothing more.

    Raises:
        ConfigError: a run holds it, or the directory cannot be written.
    """
    if not (every_process or first_process()):
        yield
        return
    take_lock(directory)
    try:
        yield
    finally:
        release_lock(directory)


def take_lock(directory: Path) -> None:
    """The first half of `one_run`."""
    directory = directory.absolute()
    if directory in _held:
        file, times = _held[directory]
        _held[directory] = (file, times + 1)
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        mend = f"the run's directory cannot be written ({error.strerror}: {error.filename}); choose another one"
        raise ConfigError("output_dir", str(directory.parent), mend) from None
    try:
        # Record locks, not flock: they are not inherited, so that a killed run's data loaders do not hold its directory.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(file, 4096, 0).decode(errors="replace").strip() or "another process"
        os.close(file)
        mend = f"{holder} is writing to {directory}; wait for its end or stop it, or give this run another name=..."
        raise ConfigError("name", directory.name, mend) from None
    except OSError as error:  # some network file systems keep no locks
        print(f"{directory} cannot be locked ({error.strerror}): see to it that one run writes there at a time", flush=True)
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[directory] = (file, 1)


def release_lock(directory: Path) -> None:
    """The second half of `one_run`."""
    directory = directory.absolute()
    file, times = _held.pop(directory)
    if times > 1:
        _held[directory] = (file, times - 1)
    else:
        os.close(file)


def was_left(directory: Path) -> bool:
    """Whether a process that is gone had locked `directory`: not where nobody did, or where that cannot be known."""
    if directory.absolute() in _held:
        return False
    try:
        with open(directory / LOCK, "r+b") as file:
            if not file.read(1):  # it is being taken: its holder writes its name next
                return False
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_finished(directory: Path, *, total_tokens: int) -> bool:
    """Whether the run in `directory` reached the end that it is asked to reach, and its checkpoint of that end is whole."""
    record, found = read_finished(directory), checkpoints(directory)
    if record is None or record.get("tokens") != total_tokens or not found:
        return False
    return found[0].step == record.get("step") and fault_of(found[0].path) is None


def check_begins(directory: Path) -> None:
    """What lies in the directory of a run that has no checkpoint to go on from: it would begin anew, over its own results.

    Raises:
        ConfigError: the run had reached its end, and its checkpoints are gone.
    """
    if checkpoints(directory):
        return
    if (record := read_finished(directory)) is not None:
        mend = (
            f"the run in {directory} was finished at step {record.get('step')}, and its checkpoints are gone; put them back, "
            f"give another name, or remove {directory / FINISHED} to train anew over its results"
        )
        raise ConfigError("name", directory.name, mend)
    rows = read_training_log(directory / "results" / "training.csv")
    if rows and first_process():
        print(
            f"{directory} has {rows[-1]['step']:,} steps in results/training.csv and no checkpoint of any: the run begins anew",
            flush=True,
        )


def write_finished(directory: Path, *, step: int, tokens: int, evaluated: Sequence[str] = ()) -> None:
    """Note down that the run reached its end with all that belongs to it, evaluation included.

    Args:
        directory: of the run.
        step, tokens: behind it.
        evaluated: lines of `evaluation_lines`, which take longer to read again than a finished run may take to say so.
    """
    write_text(directory / FINISHED, json.dumps({"step": step, "tokens": tokens, "evaluated": list(evaluated)}) + "\n")


def evaluation_lines(scalars: Sequence[Mapping[str, float]], most: int = 8) -> list[str]:
    """Losses and effective lengths of a run's first and last evaluation (`SuiteResult.scalars`), a line each."""
    if not scalars:
        return []
    first, last = scalars[0], scalars[-1]
    names = [name for name in dict.fromkeys([*last, *first]) if name.endswith(("/loss", "/effective_length"))]
    lines = []
    for name in names[:most]:
        before = f"{_told(first[name])} -> " if len(scalars) > 1 and name in first else ""
        lost = "not measured" if name.endswith("/loss") else "too weak to tell, or not measured"
        lines.append(f"{name} {before}{_told(last[name]) if name in last else lost}")
    return lines + ([f"and {len(names) - most} more, on the page of the evaluation"] if len(names) > most else [])


def _told(value: float) -> str:
    """Four digits of a loss, all of a length."""
    return f"{value:,.0f}" if value == int(value) and value >= 1000 else f"{value:,.4g}"


def read_finished(directory: Path) -> dict[str, Any] | None:
    """What `write_finished` wrote, or None."""
    try:
        record = json.loads((directory / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_guard_stop(results: Path, *, step: int, alarms: Sequence[str], guard: Mapping[str, Any]) -> None:
    """Note down among the results of a run's evaluations that the short-context guard, by its fields, stopped the run."""
    write_text(results / GUARD_STOP, json.dumps({"step": step, "alarms": list(alarms), "guard": dict(guard)}) + "\n")


def check_guard(directory: Path, guard: Mapping[str, Any] | None) -> None:
    """Refuse to train on where the short-context guard stopped the run, unless another one is asked for, or none.

    Raises:
        ConfigError: the newest checkpoint is that of the stop, and the guard's fields are the same.
    """
    try:
        record = json.loads((directory / "results" / "eval" / GUARD_STOP).read_text(encoding="utf-8"))
        step, said, had = record["step"], "; ".join(record["alarms"]), record["guard"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    found = checkpoints(directory)
    if found and found[0].step == step and guard == had:
        mend = (
            f"the short-context guard stopped the run in {directory} at step {step} ({said}); set it to warn to train on all "
            "the same, or allow more by eval.guard.loss or eval.guard.score"
        )
        raise ConfigError("eval.guard.action", had.get("action"), mend)


def is_rehearsal(directory: Path) -> bool:
    """Whether a dry run trains here, which removes all that it wrote."""
    return directory.parent.name.startswith(".") and REHEARSAL in directory.parent.name


def reached(directory: Path) -> list[str]:
    """What a run reached: training, validation and evaluation, a line each."""
    rows = read_training_log(directory / "results" / "training.csv")
    lines = []
    trained = [row for row in rows if "loss" in row]
    if trained:
        last = trained[-1]
        lines.append(f"reached   step {last['step']}, {last['tokens']:,} tokens, training loss {last['loss']:.4f}")
    validated = [row for row in rows if "validation_loss" in row]
    if validated:
        sets = ", ".join(
            f"{key.removeprefix(SET_LOSS)} {value:.4f}" for key, value in validated[-1].items() if key.startswith(SET_LOSS)
        )
        lines.append(f"validated {validated[-1]['validation_loss']:.4f}" + (f" ({sets})" if sets else ""))
    return lines + [f"evaluated {line}" for line in (read_finished(directory) or {}).get("evaluated", ())]


def ending(directory: Path) -> str:
    """What a finished run reached, where its weights, results and page are, and the next commands; of a rehearsal the first."""
    lines = reached(directory)
    if is_rehearsal(directory):
        return "\n".join(lines)
    found = checkpoints(directory)
    results, page = directory / "results", directory / "results" / "eval" / "index.html"
    if found:
        lines.append(f"weights   {found[0].path}")
    if results.is_dir():
        lines.append(f"results   {results}" + (" (training.csv, training.png)" if (results / "training.csv").is_file() else ""))
    if page.is_file():
        lines.append(f"page      {page}")
    if found:
        run = shlex.quote(str(directory))
        held = _held_out(directory)
        measured = f"--corpus {shlex.quote(held)}" if held else "--help"
        hf = shlex.quote(f"{directory}-hf")
        lines += [
            "next",
            *(f"  nemo-longctx {each}" for each in (f"export {run} {hf}", f"eval {run} {measured}", f"chat {run}")),
        ]
    return "\n".join(lines)


def _held_out(directory: Path) -> str | None:
    """A corpus that the run validated on, by its own record."""
    try:
        recipe = json.loads((directory / "results" / "settings.json").read_text(encoding="utf-8"))["recipe"]
        path = recipe["data"]["validation"][0]["path"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return path if isinstance(path, str) else None


@contextlib.contextmanager
def stops_at_once() -> Iterator[None]:
    """Before there is anything to save: a stop signal ends the process with the status that it would have later."""

    def stop(signum: int, frame: Any) -> None:
        _came.append(signum)
        raise Stopped(signum)

    _came.clear()
    try:
        before = {signum: signal.signal(signum, stop) for signum in STOP_SIGNALS}
    except ValueError:  # not the main thread, which alone may ask for signals
        yield
        return
    try:
        yield
    except Exception as error:
        if _came:  # a library has caught the stop, and told of it as an error of its own
            raise Stopped(_came[0]) from error
        raise
    finally:
        _came.clear()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_if_asked() -> None:
    """Raise for a stop signal that came while the host was imported: it has places that take whatever is raised for a package
    that is missing, and go on without it.
    """
    if _came:
        raise Stopped(_came[0])


@contextlib.contextmanager
def leaves_nothing(target: Path) -> Iterator[None]:
    """A job whose result appears whole or not at all: a stop signal ends it, and what it wrote beside `target` is removed."""
    try:
        with stops_at_once():
            yield
    except Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        print(f"\nstopped by {name}: nothing was written to {target}; the same command begins anew", file=sys.stderr)
        raise


@dataclasses.dataclass
class StopRequest:
    """The first stop signal that came since `listen`; a second SIGINT ends at once.

    Attributes:
        signum: its number, or 0.
        before: who had the signals before.
    """

    signum: int = 0
    before: dict[int, Any] = dataclasses.field(default_factory=dict)

    def listen(self) -> None:
        """Take over the signals; a second call takes them over again from whoever came between.

        One that came before, and that some place swallowed in which data or a model was opened, counts as come now.
        """
        self.signum = self.signum or (_came[0] if _came else 0)
        for signum in STOP_SIGNALS:
            with contextlib.suppress(ValueError):  # not the main thread
                self.before.setdefault(signum, signal.getsignal(signum))
                signal.signal(signum, self._note)

    def forget(self) -> None:
        """Give the signals back to whom they were taken from."""
        while self.before:
            signum, handler = self.before.popitem()
            with contextlib.suppress(ValueError):
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        if self.signum and signum == signal.SIGINT:
            raise Stopped(signum, at_once=True)
        if not self.signum and first_process():
            again = "; Ctrl-C once more ends at once" if signum == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(signum).name}: this step is finished, then all is saved{again}\n".encode())
        self.signum = self.signum or signum
