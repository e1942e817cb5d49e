"""Opening a corpus, reading documents and writing an index: ours beside Megatron-Core's IndexedDataset and its builder.

Each measurement is a fresh process, ours and theirs in turn. The token file is a hole of the right size: opening must not read
it, and reading finds zeros. Time is that of the call alone, imports aside. `open` is the constructor; `read` is the mean over
20,000 random documents after 1,000 to warm up; `write` is 300,000 documents of 100 tokens and their index.

    python benchmarks/corpus_index.py                        # up to 10 M documents (200 MB of index): 2 minutes
    python benchmarks/corpus_index.py --documents 100000000  # 100 M documents: 2 GB of index
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version

import measure
import numpy as np

READS, WARM, WRITTEN = 20_000, 1_000, 300_000


def make(prefix: str, documents: int) -> None:
    """Heavy-tailed lengths (median 500 tokens, sigma 1.5) and a token file of that size without any content."""
    from nemo_longctx.data.writer import write_index

    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(500), 1.5, size=documents), 1e6).astype(np.int32) + 1
    write_index(f"{prefix}.idx", lengths, np.dtype(np.uint16))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))


def one(kind: str, what: str, prefix: str) -> dict[str, float]:
    if what == "write":
        return {"microseconds": write(kind, prefix) / WRITTEN * 1e6}
    if kind == "ours":
        from nemo_longctx.data.corpus import IndexedCorpus as Corpus
    else:
        from megatron.core.datasets.indexed_dataset import IndexedDataset as Corpus
    start = time.perf_counter()
    corpus = Corpus(prefix)
    opened = time.perf_counter() - start
    if what == "open":
        return {"microseconds": opened * 1e6}
    read = corpus.tokens if kind == "ours" else corpus.get
    chosen = np.random.default_rng(1).integers(0, len(corpus), size=WARM + READS).tolist()
    for document in chosen[:WARM]:
        read(document)
    start = time.perf_counter()
    for document in chosen[WARM:]:
        read(document)
    return {"microseconds": (time.perf_counter() - start) / READS * 1e6}


def write(kind: str, prefix: str) -> float:
    """Seconds to write the documents, from arrays in memory, with the index."""
    tokens = np.arange(100, dtype=np.uint16)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(prefix)) as directory:
        path = os.path.join(directory, "c")
        if kind == "ours":
            from nemo_longctx.data.writer import CorpusWriter

            start = time.perf_counter()
            with CorpusWriter(path, np.uint16) as writer:
                for _ in range(WRITTEN):
                    writer.add_document(tokens)
            return time.perf_counter() - start
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        start = time.perf_counter()
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
        for _ in range(WRITTEN):
            builder.add_document(tokens, [len(tokens)])
        builder.finalize(f"{path}.idx")
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="*", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    measure.add_arguments(parser)
    args = parser.parse_args()
    if args.one:
        measure.report_one(one(args.one["kind"], args.one["what"], args.one["prefix"]))
        return
    with tempfile.TemporaryDirectory() as directory:
        cases = []
        for documents in args.documents:
            prefix = os.path.join(directory, str(documents))
            make(prefix, documents)
            for what in ("open", "read"):
                cases += [
                    {"kind": kind, "what": what, "documents": documents, "prefix": prefix} for kind in ("ours", "megatron")
                ]
        cases += [{"kind": kind, "what": "write", "documents": WRITTEN, "prefix": prefix} for kind in ("ours", "megatron")]
        results = measure.in_turn(__file__, cases, args.rounds)
    origin = {name: version(name) for name in ("numpy", "megatron-core", "nemo-longctx")} | {
        "python": platform.python_version()
    }
    print(f"microseconds, medians of {args.rounds} fresh processes; {origin}")
    for mine, theirs in zip(results[::2], results[1::2], strict=True):
        ratio = theirs["microseconds"] / mine["microseconds"]
        print(
            f"  {mine['what']:5} {mine['documents']:>12,} documents: ours {mine['microseconds']:10.1f}, "
            f"megatron-core {theirs['microseconds']:10.1f}, ratio {ratio:.2f}"
        )
    if args.json:
        for result in results:
            del result["prefix"]
        with open(args.json, "w") as file:
            json.dump({"benchmark": "corpus_index", "origin": origin, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
