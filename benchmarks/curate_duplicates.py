"""Near duplicates among many documents, by simulation: signatures of planted groups, memory and time of finding them.

The text stage of `curate` is measured on real files by its own bar; what has to hold all documents at once is this stage. The
signatures lie on disk as `curate` leaves them. A tenth of the documents repeat one before them at a Jaccard similarity of 0.9.

    python benchmarks/curate_duplicates.py --documents 1000000 10000000       # 6.8 GB of disk for 10 M
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time

import measure
import numpy as np

THRESHOLD, SIMILARITY, SHARE = 0.8, 0.9, 0.1
BLOCK = 1 << 16


def one(documents: int, folder: str) -> dict:
    from nemo_longctx.data.curation.duplicates import Shards, band_hashes, bands_for, first_of_equal, near_duplicates

    bands, rows = bands_for(THRESHOLD, 128)
    rng = np.random.default_rng(0)
    planted = np.sort(rng.choice(np.arange(BLOCK // 2, documents), int(SHARE * documents), replace=False))
    of = rng.integers(0, np.minimum(planted, BLOCK // 2))  # repeats of what lies at the beginning
    signatures = np.lib.format.open_memmap(f"{folder}/signatures.npy", "w+", np.uint32, (documents, 128))
    hashes = np.lib.format.open_memmap(f"{folder}/bands.npy", "w+", np.uint64, (bands, documents))
    for start in range(0, documents, BLOCK):
        some = rng.integers(0, 2**32, (min(BLOCK, documents - start), 128), dtype=np.uint32)
        here = (planted >= start) & (planted < start + len(some))
        source = some[of[here]] if start == 0 else signatures[of[here]]
        same = rng.random((int(here.sum()), 128)) < SIMILARITY
        some[planted[here] - start] = np.where(same, source, some[planted[here] - start])
        signatures[start : start + len(some)] = some
        hashes[:, start : start + len(some)] = band_hashes(some, bands, rows)
    del signatures, hashes
    digests = rng.integers(0, 256, (documents, 16), dtype=np.uint8).view("S16").ravel()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    on_disk = np.load(f"{folder}/signatures.npy", mmap_mode="r")
    by_band = np.load(f"{folder}/bands.npy", mmap_mode="r")
    begin = time.perf_counter()
    first_of_equal(digests)
    exact = time.perf_counter() - begin
    first = near_duplicates(lambda band: np.asarray(by_band[band]), bands, Shards([on_disk]), documents, THRESHOLD)
    seconds = time.perf_counter() - begin
    found = first != np.arange(documents)
    hits = int((first[planted] == first[of]).sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name in ("signatures", "bands"):
        os.unlink(f"{folder}/{name}.npy")
    accuracy = {"recall": hits / len(planted), "precision": float(np.isin(np.flatnonzero(found), planted).mean())}
    return {"seconds": seconds, "exact_seconds": exact, "peak_mib": peak, "before_mib": before, **accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help="where the signatures go for as long as they are needed")
    args = parser.parse_args()
    if args.one:
        measure.report_one(one(**args.one))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cases = [{"documents": documents, "folder": folder} for documents in args.documents]
        results = measure.in_turn(__file__, cases, args.rounds)
    for result in results:
        print(
            f"{result['documents']:>12,} documents: {result['seconds']:8.1f} s, peak {result['peak_mib']:,.0f} MiB "
            f"(memory maps included), recall {result['recall']:.4f}, precision {result['precision']:.4f}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"results": results}, file, indent=1)


if __name__ == "__main__":
    main()
