"""Reading samples: ours beside Megatron-Core's GPTDataset, and a batch as the model gets it without Transformer Engine.

Each measurement is a fresh process, ours and theirs in turn, warm: 50 samples first, then the median of 500 others. `read` is
one sample with positions that restart at documents (ours with cu_seqlens besides) in pure NumPy or, for theirs, as its tensors.
`plain` is one sample without. `batch` is a sample and its collation at 32,768 tokens: ours with cu_seqlens, theirs with the
dense mask that NeMo asks for without Transformer Engine (no documents kept apart), after its first sample, which takes longer.

    python benchmarks/data_reading.py     # 200,000 documents, 600 MB of tokens
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_corpora
import measure
import numpy as np


def one(kind: str, what: str, tokens: int, folder: str) -> dict:
    data_corpora.import_all(kind)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        size, read = (ours if kind == "ours" else theirs)(f"{folder}/text", what, tokens, cache)
        warm, timed = (1, 3) if what == "batch" and kind != "ours" else (50, 500)
        samples = np.random.default_rng(0).permutation(size)[: warm + timed].tolist()
        times = []
        for sample in samples:
            start = time.perf_counter()
            read(sample)
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times[warm:])
    return {"microseconds": seconds * 1e6, "tokens_per_second": tokens / seconds, "first_seconds": times[0]}


def ours(prefix: str, what: str, tokens: int, cache: str) -> tuple[int, Callable[[int], Any]]:
    total = Path(f"{prefix}.bin").stat().st_size // 2 - 1
    stages = [{"until": 1.0, "seq_length": tokens}]
    windows = data_corpora.our_windows([prefix], stages, total, 1 << 18, cache, document_masking=what != "plain")
    if what != "batch":
        return len(windows), windows.__getitem__
    from nemo_longctx.adapters.nemo.data.datasets import collate

    return len(windows), lambda sample: collate([windows[sample]])


def theirs(prefix: str, what: str, tokens: int, cache: str) -> tuple[int, Callable[[int], Any]]:
    dataset = data_corpora.gpt_dataset(prefix, tokens, None, cache, positions=what == "read", dense_mask=what == "batch")
    if what != "batch":
        return len(dataset), dataset.__getitem__
    from torch.utils.data import default_collate

    return len(dataset), lambda sample: default_collate([dataset[sample]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--documents", type=int, default=200_000)
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
        whats = [("read", 4_096), ("read", 32_768), ("plain", 4_096), ("plain", 32_768), ("batch", 32_768)]
        cases = [
            {"kind": kind, "what": what, "tokens": tokens, "folder": folder}
            for what, tokens in whats
            for kind in ("ours", "megatron-core")
        ]
        results = measure.in_turn(__file__, cases, args.rounds)
    by_case = {(result["what"], result["tokens"], result["kind"]): result for result in results}
    print(f"{args.documents:,} documents; medians of {args.rounds} fresh processes")
    ratios = {}
    for what, tokens in whats:
        mine, other = by_case[what, tokens, "ours"], by_case[what, tokens, "megatron-core"]
        ratios[f"{what} {tokens}"] = other["microseconds"] / mine["microseconds"]
        for result in (mine, other):
            shown = f"{result['microseconds']:12.1f} us {result['tokens_per_second']:14,.0f} tokens/s"
            print(f"  {what:6s} {tokens:7d} {result['kind']:14s} {shown}, the first {result['first_seconds']:.3f} s")
        print(f"  {what} at {tokens}: {ratios[f'{what} {tokens}']:.1f} x theirs")
    if args.json:
        Path(args.json).write_text(json.dumps({"results": results, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
