"""Plant one mutant after another in a copy of the tree, and run its tests in forks of a process that has imported the rest.

A fork costs a quarter of a second: the libraries that the tests import are there, and frozen, so that no collection of garbage
walks through them; pytest loads no plugin but those named, and rewrites no assertion; what is unchanged was compiled before.
"""

from __future__ import annotations

import atexit
import compileall
import contextlib
import gc
import os
import py_compile
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import Any

from points import Mutant

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "numpy", "torch", "torch.distributed", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_fast", "tokenizers.trainers",
    "hypothesis.strategies", "hydra", "omegaconf", "yaml", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "pyarrow.parquet", "zstandard", "datasets", "openai", "pytest",
)  # fmt: skip
HOSTED = ("/integration/", "/parity/", "/adapters/")  # tests that import it
HOST = ("nemo.collections.llm", "nemo_run", "megatron.core", "lightning.pytorch", "lm_eval.tasks", "lm_eval.evaluator")
PLUGINS = ("_hypothesis_pytestplugin", "pytest_timeout")
PLAIN = [
    "-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "--assert=plain",
    *(word for name in PLUGINS for word in ("-p", name)),
]  # fmt: skip
AUTOLOAD = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"


def work(queue: Any, answers: Any, todo: list[Mutant], known: frozenset[str]) -> None:
    """One process with its own copy of the tree; every mutant is planted there, run in a fork, and taken out again."""
    Watch.known = known
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the time is over: no copy and no test may stay behind
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "tree"
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
        for name in filter(None, listed):
            if os.path.lexists(ROOT / name):  # the package's conf is a link to a folder
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
        mode = py_compile.PycInvalidationMode.CHECKED_HASH  # by content: a planted file is never taken for the one before it
        for folder in ("nemo_longctx", "tests"):
            compileall.compile_dir(copy / folder, quiet=1, invalidation_mode=mode)
        os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        for name in (*HEAVY, *PLUGINS):
            __import__(name)
        sys.modules["pytest"].main(["--version"])
        _frozen()
        hosted = False
        sound: dict[str, bool] = {}  # of a test that failed once: whether it passes where nothing is planted
        while (item := queue.get()) is not None:
            index, tests = item
            mutant, began = todo[index], time.monotonic()
            if not tests:
                answers.put((index, False, "no test runs it", 0.0))
                continue
            for part in parts(tests):
                if not hosted and any(folder in part[0][0] for folder in HOSTED):
                    for name in HOST:
                        __import__(name)
                    _frozen()
                    hosted = True
                caught, how = planted(mutant, copy / mutant.path, part, sound)
                if caught or how:
                    break
            answers.put((index, caught, how or f"all of its {len(tests)} tests pass", round(time.monotonic() - began, 1)))


def _frozen() -> None:
    """Nothing that is there now is looked through for garbage again: a fork would copy all of it."""
    gc.collect()
    gc.freeze()


def parts(tests: list[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """The tests of the two likeliest files, those of the others, and those that start the host: a file takes long to open."""
    files = list(dict.fromkeys(test.split("::")[0] for test, _ in tests))
    hosted = [file for file in files if any(folder in file for folder in HOSTED)]
    plain = [file for file in files if file not in hosted]
    groups = [plain[:2], plain[2:], hosted]
    return [chosen for group in groups if (chosen := [each for each in tests if each[0].split("::")[0] in group])]


def planted(mutant: Mutant, target: Path, tests: list[tuple[str, float]], sound: dict[str, bool]) -> tuple[bool, str]:
    """Whether the tests catch the mutant, and how; "" where all pass."""
    original = target.read_bytes()
    limit = 20 + 4 * sum(seconds for _, seconds in tests)
    while tests:
        target.write_text(mutant.source, encoding="utf-8")
        try:
            status, failed = forked([test for test, _ in tests], limit)
        finally:
            target.write_bytes(original)
        if status < 0:
            ends = forked([test for test, _ in tests], limit)[0] >= 0
            return ends, "no end in time" if ends else "its tests do not end in time, planted or not"
        if not failed and status > 0:
            runs = forked([test for test, _ in tests], limit)[0] == 0
            return runs, "its tests do not run" if runs else "its tests do not run, planted or not: make the map anew"
        if not failed:
            return False, ""
        if failed not in sound:  # a test that fails by itself, or for the machine's load, catches nothing
            sound[failed] = "::" not in failed or forked([failed], 600)[0] == 0
        if sound[failed]:
            return True, failed
        tests = [each for each in tests if each[0] != failed]
    return False, ""


class Watch:
    """A plugin of pytest: runs the tests in the order given; the name of the one, or of the file, that fails goes to a pipe.

    Of a test with parameters those that were chosen, all where it was named without any, and those that the map did not know.
    """

    known: frozenset[str] = frozenset()  # the map's tests

    def __init__(self, tests: list[str], pipe: int):
        self.order, self.pipe, self.whole = {test: place for place, test in enumerate(tests)}, pipe, set(tests)
        for place, test in enumerate(tests):
            self.order.setdefault(test.partition("[")[0], place)

    def pytest_sessionstart(self):
        os.environ.pop(AUTOLOAD, None)  # a test that starts pytest starts it as people do

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid not in self.known or self.is_asked(item.nodeid)]
        items.sort(key=lambda item: self.order.get(item.nodeid, self.order.get(item.nodeid.partition("[")[0], len(self.order))))

    def is_asked(self, test: str) -> bool:
        return test in self.order or test.partition("[")[0] in self.whole

    def pytest_runtest_logreport(self, report):
        if report.failed:
            os.write(self.pipe, report.nodeid.encode()[:500] + b"\n")

    pytest_collectreport = pytest_runtest_logreport


def forked(tests: list[str], limit: float) -> tuple[int, str]:
    """Run the tests in a fork of this process: its status, -1 where it did not end within `limit` seconds of processor time,
    and the first test that failed."""
    began = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sink = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(sink, stream)
        import pytest

        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 20))
        os.environ[AUTOLOAD] = "1"
        try:
            if any("host_server" in Path(file).read_text(encoding="utf-8") for file in {test.split("::")[0] for test in tests}):
                _serve_the_host()
            functions = dict.fromkeys(test.partition("[")[0] for test in tests)
            os._exit(int(pytest.main([*PLAIN, *functions], plugins=[Watch(tests, writer)])))
        except BaseException:  # whatever a mutant does to the process of its tests is noticed
            os._exit(3)
    os.close(writer)
    os.set_blocking(reader, False)  # a process that a test left may hold the other end open
    try:
        while time.monotonic() - began < min(40 + 3 * limit, 600):  # a busy machine gives a process a third of its time
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                first = ""
                with contextlib.suppress(BlockingIOError):
                    first = os.read(reader, 2000).decode(errors="replace").partition("\n")[0]
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
                    return -1, ""
                return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 3, first
            time.sleep(0.02)
        _end_group(child)
        os.waitpid(child, 0)
        return -1, ""
    finally:
        _end_group(child)
        os.close(reader)


def _serve_the_host() -> None:
    """A fork of this process as the server of tests/host_server.py: it has the host, which a new one imports for half a minute.

    The package it imports itself, with what is planted there.
    """
    sys.path.insert(0, "tests")
    import host_server

    requests, asks = os.pipe()
    says, replies = os.pipe()
    if os.fork():
        os.close(requests)
        os.close(replies)
        host_server._server = types.SimpleNamespace(poll=lambda: None, stdin=os.fdopen(asks, "w"), stdout=os.fdopen(says))
        return
    os.close(asks)
    os.close(says)
    os.dup2(requests, 0)
    os.dup2(replies, 1)
    sys.stdin = os.fdopen(0)
    atexit._clear()  # what this process would clear away belongs to the one it was forked from
    status: Any = 1
    try:
        host_server.main()  # returns in each process that it starts, too
        status = 0
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


def _end_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(child, signal.SIGKILL)
