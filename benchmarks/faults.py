"""Faults at random moments of a run of the real trainer on two processes; the same command again after each.

    python benchmarks/faults.py --moments 54 --output benchmarks/faults

A curriculum of two lengths with validation and evaluation is run once undisturbed, and then with a fault at each of so many
random moments: SIGKILL and SIGTERM to all, to one rank only, Ctrl-C, a full disk, a torn and a half-copied checkpoint, a
directory that cannot be written. Runs that reach their end are compared with the undisturbed one, to the bit: weights and
moments of the last checkpoint, `training.csv`, validations, evaluations. A disk of its own (tmpfs) is mounted where that is
allowed; else those two faults are left out, and the table says so.

PATH.json is written after every run that has ended; started again, the campaign goes on behind it. Every wait has an end: a
start that makes no step for `STILL` seconds is told, with where each rank stands.

Each start forks its two ranks from a process that has imported the host already: what is killed is a rank as torchrun starts
it, without the half minute of its import. As torchrun does, the others are ended when one is lost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANKS = 2
STEPS = 64
KINDS = ("SIGKILL all", "SIGKILL one rank", "SIGTERM all", "SIGTERM one rank", "SIGINT all", "torn checkpoint",
         "half-copied checkpoint", "full disk", "read-only directory")  # fmt: skip
NEEDS_DISK = ("full disk", "read-only directory")
STILL = 600  # seconds without a step after which a start hangs
IGNORED = ("tokens_per_second", "processor_seconds")  # times


def overrides(place: Path, name: str, steps: int = STEPS) -> list[str]:
    """A tiny model, two lengths, a checkpoint every 3 steps, validation every 8, evaluation every 20 and at both ends."""
    sets = [f"{{name: {n}, path: {place}/held_out, seq_length: {s}, samples: 8}}" for n, s in (("short", 32), ("long", 128))]
    task = f"{{kind: position, corpus: {place}/held_out, seq_length: 128, documents: 4, bins: 4}}"
    return [
        "recipe=tiny_cpu_base", f"output_dir={place}/runs", f"name={name}", f"trainer.devices={RANKS}", "data.tokenizer=null",
        f"data.mix.sources=[{{path: {place}/text}}]", f"data.cache_dir={place}/order", "data.num_workers=1",
        f"data.validation=[{', '.join(sets)}]", f"eval={{tasks: [{task}], every: 20, at_start: true, at_end: true}}",
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.kv_channels=16",
        "model.vocab_size=100",
        "curriculum.stages=[{until: 0.5, seq_length: 64, micro_batch_size: 1}, {until: 1.0, seq_length: 256}]",
        "curriculum.tokens_per_step=512", f"curriculum.total_tokens={512 * steps}", "optimizer.warmup_tokens=0",
        "trainer.val_every_tokens=4096", "checkpoint.every_tokens=1536", "checkpoint.keep_last=3", "resume.fallback=true",
    ]  # fmt: skip


class Start:
    """One start of the command: its ranks, forked, each in its own process group."""

    def __init__(self, arguments: list[str], log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = {rank: self._fork(rank, arguments, port, log) for rank in range(RANKS)}
        self.statuses: dict[int, int] = {}

    def _fork(self, rank: int, arguments: list[str], port: int, log: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "faults",
            }  # fmt: skip
            faulthandler.register(signal.SIGUSR2, all_threads=True)
            from nemo_longctx.launch import main

            status = main(arguments)
        except SystemExit as left:
            status = int(left.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 1
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self) -> dict[int, int]:
        """Statuses of the ranks that have ended; those left are ended as torchrun does once one failed."""
        for rank, pid in self.pids.items():
            if rank not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return self.statuses

    def send(self, signum: int, ranks: Any) -> None:
        """A signal to some ranks, each with its data loaders and writers, as from a terminal or from torchrun."""
        for rank in ranks:
            if rank not in self.poll():
                os.killpg(self.pids[rank], signum)

    def where(self) -> None:
        """Let each rank write its stack to its log."""
        self.send(signal.SIGUSR2, range(RANKS))
        time.sleep(2)

    def wait(self, timeout: float) -> list[int]:
        """Statuses by rank; after the first loss the others have two minutes: torchrun gives half a minute, but a machine that
        does other work besides may need more."""
        end = time.monotonic() + timeout
        while len(self.poll()) < RANKS:
            if self.statuses and any(self.statuses.values()):
                end = min(end, time.monotonic() + 120)
            if time.monotonic() > end:
                self.send(signal.SIGKILL, range(RANKS))
            time.sleep(0.05)
        return [self.statuses[rank] for rank in range(RANKS)]


def steps_of(directory: Path) -> int:
    """Steps in the run's training log."""
    log = directory / "results" / "training.csv"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_moment(start: Start, directory: Path, rng: random.Random) -> None:
    """Three times in four some steps after the first new one, once in four anywhere from the start on.

    Raises:
        RuntimeError: nothing came for `STILL` seconds.
    """
    if rng.random() < 0.25:
        end = time.monotonic() + rng.uniform(0, 12)
        while time.monotonic() < end and not start.poll():
            time.sleep(0.02)
        return
    began, wanted = steps_of(directory), rng.randint(1, 9)
    rows, since = began, time.monotonic()
    while not start.poll() and not began < steps_of(directory) - wanted + 1:
        if steps_of(directory) != rows:
            rows, since = steps_of(directory), time.monotonic()
        if time.monotonic() > since + STILL:
            start.where()
            start.wait(0)
            raise RuntimeError(f"no step came for {STILL} s behind row {rows} of {directory}")
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.3))


def newest(directory: Path) -> Path | None:
    """The newest checkpoint, by the package's own account."""
    from nemo_longctx.checkpoints import checkpoints

    found = checkpoints(directory)
    return found[0].path if len(found) > 1 else None  # one before it must be there to go on from


def inflict(kind: str, start: Start, directory: Path, disk: Path | None, rng: random.Random) -> list[int]:
    """Do it; returns the statuses of the ranks."""
    signum = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(kind.split()[0], signal.SIGKILL)
    if kind in NEEDS_DISK:
        assert disk is not None
        ballast = disk / "ballast"
        if kind == "full disk":
            fill(ballast)
            statuses = start.wait(180)
            ballast.unlink(missing_ok=True)
            return statuses
        with read_only(directory / "checkpoints"):
            return start.wait(180)
    start.send(signum, [rng.randrange(RANKS)] if "one rank" in kind else range(RANKS))
    statuses = start.wait(180)
    if "checkpoint" in kind and (path := newest(directory)) is not None:
        files = sorted(file for file in (path / "weights").iterdir() if file.is_file())
        file = rng.choice(files)
        if kind == "torn checkpoint":
            os.truncate(file, rng.randrange(file.stat().st_size))
        else:
            file.unlink()
    return statuses


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written to `folder` meanwhile: another disk, empty and read-only, lies over it. Files that are open for
    writing, as a run's are, forbid to make its own disk read-only."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def as_promised(kind: str, statuses: list[int]) -> bool:
    """Whether the ranks ended as a run says that it does: by the signal's status once all is saved, with 2 and a sentence where
    a disk refuses, or finished. A rank whose neighbour was lost may end as it likes, but end."""
    if 0 in statuses and set(statuses) <= {0}:
        return True
    if kind.startswith("SIGTERM"):
        return set(statuses) == {143}
    if kind.startswith("SIGINT"):
        return set(statuses) == {130}
    if kind in NEEDS_DISK:
        return 2 in statuses and 0 not in statuses
    return -9 in statuses


def fill(ballast: Path) -> None:
    """Take all the space that is left."""
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            return


def state_of(directory: Path) -> dict[str, Any]:
    """What must be equal: hash of all tensors of the last checkpoint, rows of `training.csv`, numbers of evaluations."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    from nemo_longctx.checkpoints import checkpoints
    from nemo_longctx.report.training_log import read_training_log

    tensors: dict[str, Any] = {}
    last = checkpoints(directory)[0]
    _load_state_dict(
        tensors, storage_reader=FileSystemReader(last.path / "weights"), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    digest, count = hashlib.sha256(), 0
    for name, value in sorted(flat(tensors)):
        if isinstance(value, torch.Tensor):
            digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
            count += 1
    rows = read_training_log(directory / "results" / "training.csv")
    evaluations = json.loads((directory / "results" / "eval" / "results.json").read_text())
    return {
        "step": last.step,
        "tensors": count,
        "weights": digest.hexdigest(),
        "training": [{key: value for key, value in row.items() if key not in IGNORED} for row in rows],
        "evaluations": without_times(evaluations),
    }


def flat(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested mappings and lists, by their path."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in flat(value, f"{name}.{key}")]
    if isinstance(tree, (list, tuple)):
        return [leaf for key, value in enumerate(tree) for leaf in flat(value, f"{name}.{key}")]
    return [(name, tree)]


def without_times(tree: Any) -> Any:
    """Results of an evaluation without what a clock measured."""
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if "seconds" not in key and "time" not in key}
    return [without_times(each) for each in tree] if isinstance(tree, list) else tree


def make_corpora(place: Path) -> None:
    """Random documents: what is trained on is of no interest here."""
    import numpy as np

    from nemo_longctx.data.writer import CorpusWriter

    rng = np.random.default_rng(0)
    for name in ("text", "held_out"):
        with CorpusWriter(place / name, np.uint16) as writer:
            for _ in range(200):
                writer.add_document(rng.integers(0, 100, rng.integers(20, 400)))


def campaign(
    moments: int, seed: int, place: Path, logs: Path, disk: Path | None, steps: int, seconds: float, keep: Path | None = None
) -> dict[str, Any]:
    """The undisturbed run, then faults for so many moments or seconds, until the run that they fell in has ended.

    With `keep` the record is written there after each run, and what it has already is not done again. What the runs print
    goes to `logs`, on another disk than the one that is filled.
    """
    from nemo_longctx.runs import is_finished

    make_corpora(place)
    undisturbed = Start(overrides(place, "undisturbed", steps), logs / "undisturbed.log").wait(1200)
    if any(undisturbed):
        raise RuntimeError(f"the undisturbed run ended with {undisturbed}: see {logs}/undisturbed.log")
    truth = state_of(place / "runs" / "undisturbed")
    kinds = [kind for kind in KINDS if disk or kind not in NEEDS_DISK]
    record = {
        "seed": seed,
        "ranks": RANKS,
        "steps": steps,
        "kinds": kinds,
        "tensors": truth["tensors"],
        "truth": truth["weights"],
    }
    before = json.loads(keep.read_text()) if keep is not None and keep.exists() else {}
    goes_on = all(before.get(key) == value for key, value in record.items())
    runs: list[dict[str, Any]] = before["runs"] if goes_on else []
    through: list[dict[str, Any]] = before["moments"] if goes_on else []
    ends = time.monotonic() + seconds
    while len(through) < moments and time.monotonic() < ends:
        name = f"disturbed_{len(runs)}"
        directory, log = place / "runs" / name, logs / f"{name}.log"
        arguments = overrides(place, name, steps)
        while True:
            kind, rng = kinds[len(through) % len(kinds)], random.Random(f"{seed} {len(through)}")
            # A run that is finished says so and is gone before a fault could reach it.
            over = is_finished(directory, total_tokens=512 * steps)
            said = log.stat().st_size if log.exists() else 0
            start = Start(arguments, log)
            disturbed = len(through) < moments and time.monotonic() < ends and not over
            if disturbed:
                wait_for_moment(start, directory, rng)
            if disturbed and len(start.poll()) < RANKS:
                at = steps_of(directory)
                statuses = inflict(kind, start, directory, disk, rng)
                through.append({"kind": kind, "run": name, "rows": at, "statuses": statuses})
                print(f"{len(through):3} {kind:24} {name} after {at:3} rows: {statuses}", flush=True)
                if not as_promised(kind, statuses):
                    print(f"    not as promised; it said:\n{log.read_text(errors='replace')[said:][-3000:]}", flush=True)
            else:
                statuses = start.wait(1200)
                if any(statuses):
                    raise RuntimeError(f"{name} ended with {statuses} without a fault: see {log}")
            if not any(statuses):
                break
        found = state_of(directory)
        runs.append({"run": name, "equal": {key: found[key] == truth[key] for key in truth}})
        print(f"{name}: {runs[-1]['equal']}", flush=True)
        if keep is not None:
            keep.write_text(json.dumps(record | {"moments": through, "runs": runs}, indent=1) + "\n")
            keep.with_suffix(".md").write_text(table(record | {"moments": through, "runs": runs}))
    return record | {"moments": through, "runs": runs}


def table(record: dict[str, Any]) -> str:
    """The campaign as Markdown."""
    equal = {run["run"]: all(run["equal"].values()) for run in record["runs"]}
    promised = sum(as_promised(moment["kind"], moment["statuses"]) for moment in record["moments"])
    held = sum(equal[moment["run"]] for moment in record["moments"])
    lines = [
        f"{len(record['moments'])} moments over {len(equal)} runs of {record['steps']} steps on {record['ranks']} processes "
        f"(CPU, gloo), seed {record['seed']}: {held} in runs whose end equals the undisturbed one to the bit "
        f"({record['tensors']} tensors of weights and moments, every row of `training.csv`, every evaluation); "
        f"{promised} ended with the promised status.",
        "",
        "| fault | moments | in runs equal to the bit | statuses of the ranks |",
        "| --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        found = [moment for moment in record["moments"] if moment["kind"] == kind]
        if kind not in record["kinds"]:
            lines.append(f"| {kind} | not tried: no disk of its own could be mounted | | |")
        elif found:
            statuses = collections.Counter(status for moment in found for status in moment["statuses"])
            said = ", ".join(f"{status} ({count})" for status, count in sorted(statuses.items()))
            lines.append(f"| {kind} | {len(found)} | {sum(equal[moment['run']] for moment in found)} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e6, help="no more faults after so long; the table has the number")
    parser.add_argument("--output", type=Path, help="PATH.md and PATH.json are written")
    parser.add_argument("--no-mount", action="store_true", help="leave out the faults that need a disk of their own")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import nemo_longctx.adapters.nemo.launch.run  # noqa: F401  what the forks need not import again

    keep = args.output.with_suffix(".json").absolute() if args.output else None
    with (
        tempfile.TemporaryDirectory(prefix="faults", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(prefix="logs") as log_folder,
    ):
        place, logs, disk = Path(folder), Path(log_folder), None
        if (
            not args.no_mount
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", folder], check=False, capture_output=True
            ).returncode
        ):
            disk = place
        try:
            record = campaign(args.moments, args.seed, place, logs, disk, args.steps, 60 * args.minutes, keep)
        except BaseException:
            for log in sorted(logs.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}", file=sys.stderr)
            raise
        finally:
            if disk is not None:
                subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)
    text = table(record)
    print(text)
    if keep is not None:
        keep.with_suffix(".md").write_text(text)
    promised = all(as_promised(moment["kind"], moment["statuses"]) for moment in record["moments"])
    return 0 if promised and all(all(run["equal"].values()) for run in record["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
