"""What the CPU benchmarks of attention, loss and training step share: fresh processes in turn, medians, peak memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

THREADS = 2
# Tensors of 1 MiB or more go back to the system when freed, for every kind alike: otherwise the C library keeps them in
# a fragmented heap, and the peak says what was freed and not found again.
ENVIRONMENT = {"OMP_NUM_THREADS": str(THREADS), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
MARK = "measured: "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", help="write the data to this file as well")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)


def step(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one `run()`, by the clock and of all cores together, and the MiB by which it raises the peak resident set.

    Linux only lets a process raise its peak, so memory that was used and given back before hides below the old peak: what
    lies between the present size and the old peak is filled first, so that the rise that follows is all due to `run`.
    """
    import torch

    torch.set_num_threads(THREADS)
    filler = _fill_to_the_peak()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    del filler
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak}


def _fill_to_the_peak() -> bytearray:
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    gap = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
    filler = bytearray(max(gap, 0))
    filler[::4096] = b"\1" * len(filler[::4096])  # touched, so that the pages are there
    return filler


def report_one(result: dict[str, float]) -> None:
    print(MARK + json.dumps(result))


def in_turn(script: str, cases: Sequence[dict], rounds: int, environment: Mapping[str, str] = ENVIRONMENT) -> list[dict]:
    """Each case with the medians over `rounds` fresh processes; within a round the cases take turns, each round with another
    one first, so that none always runs behind the same neighbour."""
    measured: list[list[dict]] = [[] for _ in cases]
    for turn in range(rounds):
        first = turn % len(cases)
        for index in (*range(first, len(cases)), *range(first)):
            case, results = cases[index], measured[index]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", script, "--one", json.dumps(case)],
                capture_output=True, text=True, check=False, env={**os.environ, **environment},
            )  # fmt: skip
            line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
            if line is None:
                raise RuntimeError(f"{case}: status {done.returncode}\n{done.stderr[-2000:]}")
            results.append(json.loads(line.removeprefix(MARK)))
            shown = ", ".join(f"{key} {value:.4g}" for key, value in results[-1].items() if isinstance(value, float))
            print(f"round {turn + 1}: {case}: {shown}", file=sys.stderr, flush=True)
    medians = []
    for case, results in zip(cases, measured, strict=True):
        keys = [key for key, value in results[0].items() if isinstance(value, (int, float))]
        rest = {key: value for key, value in results[0].items() if key not in keys}
        medians.append({**case, **{key: statistics.median(r[key] for r in results) for key in keys}, **rest, "runs": results})
    return medians


def report(name: str, sizes: str, results: list[dict], ratios: dict[str, float], args: argparse.Namespace, **more: Any) -> None:
    """The table, the ratios and where they come from; as JSON, with `more`, where asked for."""
    versions = {package: version(package) for package in ("torch", "megatron-core", "nemo-longctx")}
    origin = {"python": platform.python_version(), **versions, "threads": THREADS, "processor": platform.machine()}
    print(f"{name}: {sizes}; medians of {args.rounds} fresh processes; {origin}")
    for result in results:
        case = ", ".join(str(v) for k, v in result.items() if k in ("kind", "tokens"))
        print(f"  {case:40s} {result['seconds']:9.3f} s {result['cpu_seconds']:9.3f} cpu s {result['peak_mib']:9.0f} MiB")
    for label, ratio in ratios.items():
        print(f"  {label}: {ratio:.2f}")
    if args.json:
        with open(args.json, "w") as file:
            record = {"benchmark": name, "sizes": sizes, "origin": origin, "results": results, "ratios": ratios, **more}
            json.dump(record, file, indent=1)


def one_gloo_process() -> None:
    """Megatron-Core's process groups in this process alone."""
    import tempfile

    import torch.distributed as dist
    from megatron.core import parallel_state

    store = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115  (torch opens it by name)
    dist.init_process_group("gloo", init_method=f"file://{store.name}.store", rank=0, world_size=1)
    os.unlink(store.name)
    parallel_state.initialize_model_parallel()


def transformer_config(**fields: Any) -> Any:
    """A Megatron-Core config without fusions and dropout, as a CPU needs it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_longctx.adapters.megatron.cpu import CPU_MODEL_FIELDS

    known = {name: value for name, value in CPU_MODEL_FIELDS.items() if name in TransformerConfig.__dataclass_fields__}
    return TransformerConfig(**{"num_layers": 1, "attention_dropout": 0.0, "hidden_dropout": 0.0, **known, **fields})
