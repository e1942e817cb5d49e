"""The order of documents under a curriculum, and blending many sources: ours beside Megatron-Core's datasets.

Each measurement is a fresh process, ours and theirs in turn; time and the rise of peak memory are those of building alone,
imports aside; `reopen` is the same call once more, with the files there. The token file is a hole: no order reads it. A
curriculum of four lengths takes Megatron-Core four GPTDatasets, since the length is part of each. `blend` is one epoch over 512
sources of 2,000 documents. The switch is counted token by token on a small corpus: half of an epoch at 4,096, then the second
half of the samples at 32,768.

    python benchmarks/data_order.py                                     # 10 M documents, 1 GB of disk
    python benchmarks/data_order.py --ours --documents 100000000        # 100 M documents, ours alone: 3 GB of disk
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import data_corpora
import measure
import numpy as np

STAGES = [4_096, 8_192, 32_768, 131_072]
STEP = 1 << 22


def one(kind: str, what: str, folder: str, documents: int) -> dict:
    cache = tempfile.mkdtemp(dir=folder)
    data_corpora.import_all(kind)
    try:
        if what == "switch":
            return switch(kind, f"{folder}/small", cache)
        build = {"curriculum": curriculum, "blend": blend}[what]
        result = measure.step(lambda: build(kind, folder, cache, documents))
        start = time.perf_counter()
        build(kind, folder, cache, documents)
        result["reopen_seconds"] = time.perf_counter() - start
        result["disk_mib"] = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file()) / 2**20
        return result
    finally:
        shutil.rmtree(cache)


def curriculum(kind: str, folder: str, cache: str, documents: int) -> None:
    prefix, tokens = f"{folder}/large", Path(f"{folder}/large.bin").stat().st_size // 2
    if kind == "ours":
        stages = [{"until": (i + 1) / 4, "seq_length": length} for i, length in enumerate(STAGES)]
        windows = data_corpora.our_windows([prefix], stages, tokens - 1, STEP, cache)
        windows[0], windows[len(windows) - 1]
    else:
        for length in STAGES:
            dataset = data_corpora.gpt_dataset(prefix, length, tokens // 4 // length, cache)
            dataset[0], dataset[len(dataset) - 1]


def blend(kind: str, folder: str, cache: str, documents: int) -> None:
    prefixes = [f"{folder}/source{i}" for i in range(512)]
    sizes = [Path(f"{prefix}.bin").stat().st_size // 2 for prefix in prefixes]
    weights = [size / sum(sizes) for size in sizes]
    if kind == "ours":
        windows = data_corpora.our_windows(
            prefixes, [{"until": 1.0, "seq_length": 4_096}], sum(sizes) - 1, 1 << 18, cache, weights=weights
        )
        windows[0], windows[len(windows) - 1]
    else:
        from megatron.core.datasets.blended_dataset import BlendedDataset

        samples = sum(sizes) // 4_096
        datasets = [
            data_corpora.gpt_dataset(prefix, 4_096, int(samples * weight * 1.005) + 1, cache)
            for prefix, weight in zip(prefixes, weights, strict=True)
        ]
        blended = BlendedDataset(datasets, weights, samples, data_corpora.gpt_config(4_096, cache))
        blended[0], blended[len(blended) - 1]


def switch(kind: str, prefix: str, cache: str) -> dict:
    """Shares of tokens that come twice and never when the length changes at half of an epoch."""
    tokens = Path(f"{prefix}.bin").stat().st_size // 2
    total = tokens // (1 << 18) * (1 << 18)
    times = np.zeros(tokens, np.int64)
    if kind == "ours":
        stages = [{"until": 0.5, "seq_length": 4_096}, {"until": 1.0, "seq_length": 32_768}]
        windows = data_corpora.our_windows([prefix], stages, total, 1 << 18, cache)
        order, (corpus,) = windows.order, windows.order.documents.shards
        for stage, placed in zip(windows.curriculum.plan, windows.stages, strict=True):
            for number in range(stage.end_sample - stage.first_sample):
                window = placed.window(number)
                stop = window.address + window.seq_length
                visits, lengths, ends = order.span(window.address, stop)
                first = corpus.offsets_of(visits)
                low, high = np.maximum(window.address - (ends - lengths), 0), np.minimum(stop - (ends - lengths), lengths)
                for begin, a, b in zip(first, low, high, strict=True):
                    times[begin + a : begin + b] += 1
    else:
        for number, length in enumerate((4_096, 32_768)):
            dataset = data_corpora.gpt_dataset(prefix, length, None, cache)
            half = len(dataset) // 2
            for sample in range(half) if number == 0 else range(half, len(dataset)):
                for begin, stop in pieces(dataset, int(dataset.shuffle_index[sample]), length):
                    times[begin:stop] += 1
    seen = times.sum()
    return {"twice": float((times > 1).sum() / seen), "never": float(1 - (times > 0).sum() / min(seen, tokens))}


def pieces(dataset, sample: int, length: int):
    """Token ranges of the corpus that one sample of a GPTDataset reads, without its lookahead token."""
    (first, begin), (last, _) = dataset.sample_index[sample].tolist(), dataset.sample_index[sample + 1].tolist()
    left = length
    for place in range(first, last + 1):
        document = dataset.document_index[place]
        size, offset = dataset.dataset.sequence_lengths[document], dataset.dataset.index.sequence_pointers[document] // 2
        taken = min(left, int(size) - begin)
        yield offset + begin, offset + begin + taken
        left, begin = left - taken, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="measure ours alone")
    parser.add_argument("--folder", help="where the synthetic corpora go; kept if named")
    args = parser.parse_args()
    if args.one:
        measure.report_one(one(**args.one))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        os.makedirs(folder, exist_ok=True)
        data_corpora.make_index(f"{folder}/large", args.documents)
        kinds = ["ours"] if args.ours else ["ours", "megatron-core"]
        whats = ["curriculum"] if args.ours else ["curriculum", "blend", "switch"]
        if not args.ours:
            data_corpora.make_index(f"{folder}/small", 20_000)
            for number in range(512):
                data_corpora.make_index(f"{folder}/source{number}", 2_000, seed=number)
        cases = [
            {"kind": kind, "what": what, "folder": folder, "documents": args.documents} for what in whats for kind in kinds
        ]
        results = measure.in_turn(__file__, cases, args.rounds)
    show(results, args)


def show(results: list[dict], args: argparse.Namespace) -> None:
    tokens = int(data_corpora.lengths_of(args.documents).sum(dtype=np.int64))
    print(
        f"order of {args.documents:,} documents, {tokens:,} tokens, stages {STAGES}; medians of {args.rounds} fresh processes"
    )
    by_case = {(result["what"], result["kind"]): result for result in results}
    for (what, kind), result in by_case.items():
        shown = {
            key: result[key] for key in ("seconds", "reopen_seconds", "peak_mib", "disk_mib", "twice", "never") if key in result
        }
        print(f"  {what:11s} {kind:14s} " + ", ".join(f"{key} {value:.4g}" for key, value in shown.items()))
    ratios = {}
    for what in ("curriculum", "blend"):
        if (what, "megatron-core") in by_case:
            ours, theirs = by_case[what, "ours"], by_case[what, "megatron-core"]
            ratios |= {f"{what} {key}": ours[key] / theirs[key] for key in ("seconds", "peak_mib", "disk_mib")}
    for name, ratio in ratios.items():
        print(f"  ours / theirs, {name}: {ratio:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"results": results, "ratios": ratios}, indent=1))
    ours = by_case["curriculum", "ours"]
    bytes_a_visit, times = ours["disk_mib"] * 2**20 / args.documents, 1e9 / args.documents
    print(f"  bytes a visit: {bytes_a_visit:.3f}; nothing a sample")
    if args.documents < 10_000_000:
        return
    print(
        f"  so 10^12 tokens in 10^9 documents, each once: an order of {bytes_a_visit:.2f} GB, mapped once for all processes of "
        f"a node, beside 20 GB of mapped index; built once, in {times * ours['seconds'] / 60:.1f} minutes and "
        f"{times * ours['peak_mib'] / 1024:.1f} GiB, mapped pages counted, if both grow with the documents; opening it again "
        "does not"
    )


if __name__ == "__main__":
    main()
