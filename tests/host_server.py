"""Scripts and commands in processes that have the host imported already: importing it takes longer than most tests train.

    started = host_server.start("examples/megatron_gpt_continual.py", "recipe=tiny_cpu_base", ...)
    status, said = started.finish()

One server a test process, which imports once and forks for each start; what is started runs as `__main__`, in a session of
its own, and ends as a process of its own. That importing works, and in which order, is for tests that start Python anew.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULE = "-m"
CODE = "-c"
IMPORTED = (
    "nemo_longctx.adapters.nemo.launch.run",
    "nemo_longctx.adapters.nemo.launch.instruct_run",
    "nemo_longctx.adapters.nemo.recipes",
    "nemo_longctx.commands.export",
    "transformers.models.llama.modeling_llama",
    "lm_eval",
)
_server: subprocess.Popen | None = None
_place = tempfile.TemporaryDirectory(prefix="host_server_", ignore_cleanup_errors=True)  # of what is printed; gone at the end


class Started:
    """One start: `pids` of its ranks; what they print goes into one file."""

    def __init__(self, pids: list[int], log: Path):
        self.pids, self.log = pids, log

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """The status of the first rank that failed, or 0; None while one runs."""
        files = [self.log.with_name(f"{self.log.name}.{pid}") for pid in self.pids]
        if not all(file.exists() for file in files):
            return None
        return next((status for status in (int(file.read_text()) for file in files) if status), 0)

    def kill(self, number: int = signal.SIGKILL) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def finish(self, timeout: float = 600) -> tuple[int, str]:
        """(status, what was printed) once all ranks ended; raises TimeoutError, and ends them, after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s:\n{self.said[-4000:]}")
            time.sleep(0.05)
        return status, self.said


def start(*line: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, processes: int = 1) -> Started:
    """Start `python LINE` (a script, `-m MODULE` or `-c CODE`, and its arguments) as so many ranks of one run."""
    global _server
    if _server is None or _server.poll() is not None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        _server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        atexit.register(_server.kill)
    place = Path(tempfile.mkdtemp(dir=_place.name))
    request = {"line": [str(word) for word in line], "cwd": str(cwd or Path.cwd()), "log": str(place / "log"),
               "env": {**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"}, "processes": processes}  # fmt: skip
    assert _server.stdin is not None
    assert _server.stdout is not None
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    return Started(json.loads(_server.stdout.readline()), place / "log")


def _rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torch.distributed.run gives a rank."""
    if processes == 1:
        return {}
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
              "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    return {key: str(value) for key, value in values.items()}


def _run(request: dict[str, Any], own: dict[str, str]) -> None:
    """Become the process that was asked for."""
    import runpy

    os.setsid()
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["env"] | own)
    os.chdir(request["cwd"])
    first, *arguments = request["line"]
    if first == CODE:
        sys.argv = [CODE, *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == MODULE:
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    import importlib
    import select

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no reply
    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # what it needs says so itself
            importlib.import_module(name)
    logs: dict[int, str] = {}
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.05)
        while logs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid in logs:
                file = Path(f"{logs.pop(pid)}.{pid}")
                file.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
                file.with_suffix(".part").rename(file)
        if not ready:
            continue
        line = sys.stdin.buffer.raw.readline()  # unbuffered: what is read is what select saw
        if not line:
            return
        request = json.loads(line)
        Path(request["log"]).touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(request["processes"]):
            pid = os.fork()
            if not pid:
                return _run(request, _rank_environment(rank, request["processes"], port))
            logs[pid] = request["log"]
            started.append(pid)
        print(json.dumps(started), file=replies, flush=True)


if __name__ == "__main__":
    main()
