"""The loader's share of a training step on a slow disk: reads held to so many MB/s by the kernel, workers that read ahead.

The token file is dropped from the page cache, and this process and its loader's workers are put into a block-I/O control
group of their own (cgroup v1, root) whose reads the kernel throttles. A step is a sleep of `--step-ms`, in which a GPU would be
busy; what the loop waits for its batch beyond that is the loader's. Fresh processes in turn.

    python benchmarks/data_slow_disk.py --folder DIR_ON_A_DISK --mb-per-second 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import data_corpora
import measure

TOKENS, GROUP = 32_768, Path("/sys/fs/cgroup/blkio/slow_disk_benchmark")


@contextlib.contextmanager
def slow_reads(path: str, mb_per_second: float) -> Iterator[None]:
    """Reads of this process and those it starts, from the disk of `path`, at no more than so many MB (1e6 bytes) a second."""
    device = os.stat(path).st_dev
    number = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    if (number / "partition").exists():  # limits are a whole disk's
        number = number.parent
    GROUP.mkdir(exist_ok=True)
    try:
        limit = f"{(number / 'dev').read_text().strip()} {round(1e6 * mb_per_second)}"
        (GROUP / "blkio.throttle.read_bps_device").write_text(limit)
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (GROUP.parent / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):  # a worker that is about to end still holds it
            GROUP.rmdir()


def one(workers: int, folder: str, steps: int, batch: int, step_ms: float, mb_per_second: float) -> dict:
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Samples(Dataset):
        def __getitem__(self, number):
            return windows[number]

    def collate(samples):
        return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}

    prefix = f"{folder}/text"
    total = Path(f"{prefix}.bin").stat().st_size // 2 - 1
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        stages = [{"until": 1.0, "seq_length": TOKENS}]
        windows = data_corpora.our_windows([prefix], stages, total, 1 << 18, cache)
        windows[0]  # what is opened once is open
        descriptor = os.open(f"{prefix}.bin", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        batches = [list(range(1 + step * batch, 1 + (step + 1) * batch)) for step in range(steps)]
        waits = []
        with slow_reads(folder, mb_per_second):
            loader = iter(DataLoader(Samples(), batch_sampler=batches, num_workers=workers, collate_fn=collate))
            for _ in batches:
                start = time.perf_counter()
                next(loader)
                waits.append(1e3 * (time.perf_counter() - start))
                time.sleep(step_ms / 1e3)
            del loader
    waits = waits[len(waits) // 5 :]  # the first batches fill the pipeline
    mean = statistics.mean(waits)
    return {"wait_ms": mean, "longest_ms": max(waits), "share": mean / (mean + step_ms)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="windows of 32,768 tokens a step")
    parser.add_argument("--step-ms", type=float, default=100)
    parser.add_argument("--mb-per-second", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="slow_disk", help="on the disk to slow down; the synthetic corpus is kept there")
    args = parser.parse_args()
    if args.one:
        measure.report_one(one(**args.one))
        return
    os.makedirs(args.folder, exist_ok=True)
    data_corpora.make_corpus(f"{args.folder}/text", args.documents)
    os.sync()
    fixed = {"folder": args.folder, "steps": args.steps, "batch": args.batch, "step_ms": args.step_ms}
    cases = [{"workers": workers, **fixed, "mb_per_second": args.mb_per_second} for workers in (0, 1, 2)]
    results = measure.in_turn(__file__, cases, args.rounds)
    need = 2 * TOKENS * args.batch / 1e6 / (args.step_ms / 1e3)
    print(f"  {args.mb_per_second:g} MB/s of disk, steps of {args.step_ms:g} ms that read {need:.2f} MB/s:")
    for result in results:
        print(
            f"  data.num_workers={result['workers']}: waits {result['wait_ms']:8.2f} ms a step, at most "
            f"{result['longest_ms']:8.2f}; the loader's share {result['share']:.1%}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"results": results}, indent=1))


if __name__ == "__main__":
    main()
