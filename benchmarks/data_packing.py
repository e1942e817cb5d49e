"""Best-fit packing: time, bins against the bound, padding and cut documents; beside NeMo's first-fit-decreasing.

Each measurement is a fresh process, ours and theirs in turn. Ours plans on the histogram of lengths and gives each rest a
bin. NeMo's `first_fit_decreasing` looks at every bin for every document, so it gets fewer documents, cut to the window as
NeMo's preparation does; time alone is compared, per document.

    python benchmarks/data_packing.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import data_corpora
import measure
import numpy as np

THEIR_DOCUMENTS = 20_000


def one(kind: str, documents: int, window: int) -> dict:
    lengths = data_corpora.lengths_of(documents)
    if kind != "ours":
        from nemo.utils.sequence_packing_utils import first_fit_decreasing

        whole = np.minimum(lengths, window).tolist()
        bins: list = []
        result = measure.step(lambda: bins.extend(first_fit_decreasing(whole, window)))
        return result | {"windows": len(bins), "padding": 1 - sum(whole) / (len(bins) * window)}
    from nemo_longctx.data.packing import assign_bins, plan_bins, window_bound

    done = {}

    def pack() -> None:
        rests = lengths % window
        plan = plan_bins(np.bincount(rests, minlength=window), window)
        done["bins"], done["windows"] = assign_bins(plan, rests[rests > 0]), int((lengths // window).sum()) + plan.n_bins

    result = measure.step(pack)
    rests = lengths[lengths % window > 0] % window
    filled = np.bincount(done["bins"], weights=rests)
    if filled.max() > window:
        raise RuntimeError("a window holds more than it can")
    bound, tokens = window_bound(lengths, window), int(lengths.sum(dtype=np.int64))
    return result | {
        "windows": done["windows"],
        "over_bound": done["windows"] / bound - 1,
        "padding": 1 - tokens / (done["windows"] * window),
        "cut": int((lengths > window).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.one:
        measure.report_one(one(**args.one))
        return
    cases = [{"kind": "ours", "documents": args.documents, "window": window} for window in (4_096, 32_768, 131_072)]
    cases.append({"kind": "nemo", "documents": THEIR_DOCUMENTS, "window": 32_768})
    results = measure.in_turn(__file__, cases, args.rounds)
    for result in results:
        shown = ", ".join(f"{key} {result[key]:.4g}" for key in ("seconds", "over_bound", "padding", "cut") if key in result)
        print(f"  {result['kind']:5s} {result['documents']:>10,} documents into {result['window']:>7,}: {shown}")
    each = {(result["kind"], result["window"]): result["seconds"] / result["documents"] for result in results}
    print(f"  NeMo's time a document / ours, 32,768: {each['nemo', 32_768] / each['ours', 32_768]:.0f}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
