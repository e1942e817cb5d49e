"""Windows whose tokens are not in the page cache: with all ranges of a window asked for at once, and touched one by one.

The token file is dropped from the page cache before each window; `warm` is the same window a second time. Fresh processes
in turn.

    python benchmarks/data_cold.py --folder DIR_ON_THE_DISK_TO_MEASURE --documents 200000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import data_corpora
import measure
import numpy as np

TOKENS = 32_768


def one(kind: str, folder: str, windows: int) -> dict:
    from nemo_longctx.data.corpus import IndexedCorpus

    if kind == "one by one":
        IndexedCorpus.will_need = lambda self, start, stop: None  # type: ignore[method-assign]
    prefix = f"{folder}/text"
    total = Path(f"{prefix}.bin").stat().st_size // 2 - 1
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        stages = [{"until": 1.0, "seq_length": TOKENS}]
        data = data_corpora.our_windows([prefix], stages, total, 1 << 18, cache, document_masking=True)
        cold, warm = [], []
        descriptor = os.open(f"{prefix}.bin", os.O_RDONLY)
        for sample in np.random.default_rng(0).permutation(len(data))[:windows].tolist():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            for times in (cold, warm):
                start = time.perf_counter()
                data[sample]
                times.append(time.perf_counter() - start)
        os.close(descriptor)
    return {"cold_ms": 1e3 * statistics.median(cold), "warm_ms": 1e3 * statistics.median(warm)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the synthetic corpus goes; kept if named")
    args = parser.parse_args()
    if args.one:
        measure.report_one(one(**args.one))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        os.makedirs(folder, exist_ok=True)
        data_corpora.make_corpus(f"{folder}/text", args.documents)
        os.sync()
        kinds = ("at once", "one by one")
        cases = [{"kind": kind, "folder": folder, "windows": args.windows} for kind in kinds]
        results = measure.in_turn(__file__, cases, args.rounds)
    for result in results:
        print(
            f"  {result['kind']:<12} a window of {TOKENS:,}: cold {result['cold_ms']:8.2f} ms, warm {result['warm_ms']:8.3f} ms"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"results": results}, indent=1))


if __name__ == "__main__":
    main()
