"""Where `prepare` and `curate` run their shards: processes of this machine, or a Ray cluster. Both call `Job.run`."""

from __future__ import annotations

import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from nemo_longctx.config import ConfigError
from nemo_longctx.start import main_hidden

Progress = Callable[[int, int, int], None]  # input bytes, documents, tokens since the last call


class Job(Protocol):
    """One shard's work. It is pickled, and may be run again where its process was killed."""

    @property
    def n_bytes(self) -> int:
        """Input that it reads."""

    def run(self, progress: Progress) -> Any:
        """Do it; what it returns has `totals()`: documents and tokens."""

    def place(self) -> str:
        """`file:line` that it had come to."""


Done = Iterator[tuple[Any, Any]]


class StoppedError(Exception):
    """Raised in a worker when the run has failed elsewhere."""


def run_in_processes(jobs: Sequence[Job], progress: Progress, *, workers: int) -> Done:
    """Run the jobs in `workers` processes; yields each as it ends, in any order.

    Raises:
        ConfigError, OSError: what the first failing shard raised; the others stop within a batch.
    """
    context = multiprocessing.get_context("spawn")  # the tokenizer's threads do not survive a fork
    counters, stop = context.Array("q", 3), context.Event()
    told = [0, 0, 0]

    def tell() -> None:
        now = list(counters.get_obj())  # without the lock: a killed worker may have it
        progress(*(new - old for new, old in zip(now, told, strict=True)))
        told[:] = now

    running: dict[Any, Job] = {}
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counters, stop))
    try:
        # Only a few jobs wait in the pool: a million shards need no million futures.
        todo = iter(jobs)
        while True:
            for job in _next(todo, 2 * workers - len(running)):
                with main_hidden(), _interrupt_held_back():
                    running[pool.submit(_run_in_worker, job)] = job
            if not running:
                return
            done, _ = wait(running, timeout=0.25, return_when=FIRST_COMPLETED)
            tell()
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        started = list(running.values())[:workers]  # jobs are begun in their order
        where = " and ".join(job.place() for job in started)
        mend = "use fewer" if workers > 1 else "free memory, or leave that document out"
        what = f"a worker process was killed (out of memory?) at or soon after {where}"
        raise ConfigError("workers", workers, f"{what}; {mend}, and the same command goes on from here") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Processes started inside are born with SIGINT held back, so that Ctrl-C while they import is not theirs to report."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _next(jobs: Iterator[Job], n: int) -> Iterator[Job]:
    for _ in range(n):
        job = next(jobs, None)
        if job is None:
            return
        yield job


def _start_worker(counters: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and tells us by `stop`
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def progress(*steps: int) -> None:
        if stop.is_set():
            raise StoppedError
        with counters.get_lock():
            for i, step in enumerate(steps):
                counters[i] += step

    global _progress
    _progress = progress


_progress: Progress


def _die_with_parent() -> None:
    """A killed parent must not leave a worker that writes beside the next run's."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run_in_worker(job: Job) -> Any:
    return job.run(_progress)


def run_on_ray(jobs: Sequence[Job], progress: Progress, *, workers: int) -> Done:
    """Run the jobs as Ray tasks of one CPU each, at most `workers` at a time; yields each as it ends.

    Joins the cluster that RAY_ADDRESS names (or the one already joined), else starts Ray on this machine with `workers` CPUs.
    Every node must see the input and the output under the same paths (a shared file system).

    Raises:
        ConfigError: Ray is not installed or does not start, or what the first failing shard raised.
        OSError: likewise.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine", "ray", "Ray is not installed; pip install ray, or use --engine processes")
    import ray

    started = not ray.is_initialized()
    if started:
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level="warning", **here)
        except Exception as error:  # Ray raises no narrower type where a node does not come up
            mend = f"no cluster ({str(error).splitlines()[0]}); see RAY_ADDRESS, or use --engine processes"
            raise ConfigError("engine", "ray", mend) from error
    try:
        task = ray.remote(num_cpus=1, max_retries=3)(_run_on_node)
        todo = iter(jobs)
        running: dict[Any, Job] = {}
        while True:
            for job in _next(todo, workers - len(running)):
                running[task.remote(job)] = job
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                job = running.pop(reference)
                report = _ray_result(ray, reference)
                progress(job.n_bytes, *report.totals())
                yield job, report
    finally:
        if started:
            ray.shutdown()


def _run_on_node(job: Job) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return job.run(lambda n_bytes, documents, tokens: None)


def _ray_result(ray: Any, reference: Any) -> Any:
    """The report, or the worker's own error without Ray's wrapping."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


ENGINES: dict[str, Callable[..., Done]] = {"processes": run_in_processes, "ray": run_on_ray}


def run_shards(
    jobs: Sequence[Any],
    reports: dict[int, Any],
    *,
    engine: str,
    workers: int | None,
    say: Callable[[str], None],
    progress: Callable[[int], Progress],
) -> list[Any]:
    """The report of every job, in their order; those that have one in `reports` (by the job's `number`) are not run again.

    Args:
        workers: at a time; None: one a core, and never more than there are jobs.
        progress: opens a bar over so many bytes of input.
    """
    reports = dict(reports)
    todo = [job for job in jobs if job.number not in reports]
    if reports:
        say(f"going on: {len(reports)} of {len(jobs)} shards were finished before")
    tell = progress(sum(job.n_bytes for job in todo))
    for job, report in ENGINES[engine](todo, tell, workers=min(workers or os.cpu_count() or 1, max(1, len(todo)))):
        reports[job.number] = report
    return [reports[job.number] for job in jobs]
