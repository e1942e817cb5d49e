"""The windows of a stage under best-fit packing: planned once, kept in memory-mapped files beside the order.

A stage takes documents from the order where the stage before it stopped, until its windows are full. The document at which it
stops gives it whole windows, and what is left to the next stage. Nothing is left out between stages.

Cost: 4 bytes for each rest and window of rests, 16 for each document that is at least as long as the window.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum, Stage
from nemo_longctx.data.order import GROUP, Order, locked
from nemo_longctx.data.packing import assign_bins, count_windows, plan_bins
from nemo_longctx.data.permutation import Permutation
from nemo_longctx.data.windows import ConcatenatedWindows, Sample, StageWindows, Windows, finish_sample, read_documents

ARRAYS = ("long_documents", "long_starts", "long_ends", "pieces", "bin_ends")


@dataclasses.dataclass(frozen=True)
class _Block:
    """Visits between two beginnings of an epoch that are packed together, so that none comes before its time."""

    documents: np.ndarray  # uint32 [n]
    starts: np.ndarray  # int64 [n], token at which the stage's part of each document begins
    lengths: np.ndarray  # int64 [n], tokens of that part
    gap: int  # windows that remain for the document after these


def pack_stage(order: Order, stage: Stage, visit: int, skip: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Fill a stage's windows.

    Args:
        order: the documents.
        stage: how many windows, of what length.
        visit: the first visit that the stage may use.
        skip: tokens of that visit that the stage before used.

    Returns:
        Arrays: `long_documents` uint32, `long_starts` uint32 and `long_ends` int64 (documents with windows of their own: where
        the first begins, windows up to and with it); `pieces` uint32 (documents of the rests, window by window) and `bin_ends`
        uint32 (pieces up to and with each window). Facts: `blocks`, [windows, windows of long documents] of each block; `odd`,
        piece and start of the rest of a document that the stage before had begun; `next`, the next stage's visit and skip;
        `padding`, tokens; `cut`, documents longer than a window.
    """
    n_windows, length = stage.end_sample - stage.first_sample, stage.seq_length
    cuts = [*order.facts["cuts"], len(order.visits)]
    longs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    pieces: list[np.ndarray] = []
    bin_sizes: list[np.ndarray] = []
    facts: dict[str, Any] = {"blocks": [], "odd": [-1, 0], "cut": 0, "used": 0}
    remaining, first_skip = n_windows, skip
    while remaining:
        block = _next_block(order, visit, skip, cuts[bisect.bisect_right(cuts, visit)], remaining, length)
        visit, skip = visit + len(block.documents), 0
        documents, starts, own = block.documents, block.starts, block.lengths // length
        rests = block.lengths % length
        bins = assign_bins(plan_bins(np.bincount(rests, minlength=length), length), rests[rests > 0])
        if block.gap:
            beyond = int(order.documents.lengths(order.visits[visit : visit + 1])[0]) - (
                first_skip if not len(documents) else 0
            )
            if beyond // length >= block.gap:  # the next document fills the stage with whole windows
                begin = first_skip if not len(documents) else 0
                documents, starts = np.append(documents, order.visits[visit]), np.append(starts, begin)
                own, skip = np.append(own, block.gap), begin + block.gap * length
            else:
                bins = _spread(bins, block.gap, stage)
        is_long = own > 0
        longs.append((documents[is_long], starts[is_long], own[is_long]))
        by_bin = np.argsort(bins, kind="stable")
        with_rest = np.flatnonzero(rests)
        if first_skip and not facts["blocks"] and len(rests) and rests[0]:
            facts["odd"] = [int(np.flatnonzero(with_rest[by_bin] == 0)[0]), int(block.starts[0] + block.lengths[0] - rests[0])]
        pieces.append(block.documents[with_rest[by_bin]])
        bin_sizes.append(np.bincount(bins))
        n_own = int(own.sum())
        facts["blocks"].append([n_own + len(bin_sizes[-1]), n_own])
        facts["cut"] += int((block.lengths > length).sum())
        facts["used"] += int(rests.sum()) + n_own * length
        remaining -= facts["blocks"][-1][0]
        first_skip = skip
    facts |= {"next": [visit, skip], "padding": n_windows * length - facts.pop("used")}
    arrays = {
        "long_documents": np.concatenate([documents for documents, _, _ in longs]).astype(np.uint32),
        "long_starts": np.concatenate([starts for _, starts, _ in longs]).astype(np.uint32),
        "long_ends": np.cumsum(np.concatenate([own for _, _, own in longs])),
        "pieces": np.concatenate(pieces),
        "bin_ends": np.cumsum(np.concatenate(bin_sizes)).astype(np.uint32),
    }
    return arrays, facts


def _next_block(order: Order, visit: int, skip: int, limit: int, remaining: int, length: int) -> _Block:
    """The most visits from `visit` on, before `limit`, that fit into `remaining` windows."""
    needed = order.address_of_visit(visit) + skip + remaining * length
    limit = min(limit, (int(order.ends.searchsorted(needed, "left")) + 1) * GROUP)
    documents = order.visits[visit:limit]
    lengths = order.documents.lengths(documents).astype(np.int64)
    starts = np.zeros(len(lengths), np.int64)
    starts[0], lengths[0] = skip, lengths[0] - skip
    taken, gap = _fitting(lengths, remaining, length)
    return _Block(documents[:taken], starts[:taken], lengths[:taken], gap)


def _fitting(lengths: np.ndarray, windows: int, length: int) -> tuple[int, int]:
    """How many documents fit, and how many windows they leave empty where another document would not fit."""
    needed = count_windows(lengths, length)
    if needed <= windows:
        return len(lengths), 0
    ends = np.cumsum(lengths)
    high, low = len(lengths), 0
    while needed > windows:  # leave out as many tokens as are too many
        high = min(high, len(lengths))
        low = min(int(ends.searchsorted(ends[high - 1] - (needed - windows) * length)), high - 1)
        needed = count_windows(lengths[:low], length)
        if needed > windows:
            high = low
    while high - low > 1:
        middle = (low + high) // 2
        now = count_windows(lengths[:middle], length)
        if now <= windows:
            low, needed = middle, now
        else:
            high = middle
    return low, windows - needed


def _spread(bins: np.ndarray, more: int, stage: Stage) -> np.ndarray:
    """Move single rests out of shared windows into `more` windows of their own."""
    bins = bins.copy()
    _, firsts = np.unique(bins, return_index=True)
    shared = np.delete(np.arange(len(bins)), firsts)[:more]
    if len(shared) < more:
        mend = f"its documents do not fill stage {stage.number}; lengthen the run, or use packing=concatenate"
        raise ConfigError("data.packing", "best_fit", mend)
    bins[shared] = bins.max() + 1 + np.arange(more)
    return bins


class BestFitWindows:
    """The windows of one stage, packed, in random order between the places where a stratum begins again.

    Args:
        order: the document visits of the run.
        stage: how many windows, of what length.
        start: visit and tokens of it at which the stage begins: `next` of the stage before.
        seed: of the windows' order.
        document_masking: as in `ConcatenatedWindows`. Padding counts for nothing.

    Attributes:
        facts: see `pack_stage`.
    """

    def __init__(self, order: Order, stage: Stage, start: tuple[int, int], *, seed: int, document_masking: bool):
        self.order, self.stage, self.start, self.seed, self.document_masking = order, stage, start, seed, document_masking
        directory = Path(order.path).with_suffix(f".stage{stage.number}.bins")
        if not directory.exists():
            with locked(directory.with_suffix(".lock")):
                if not directory.exists():
                    _write(directory, *pack_stage(order, stage, *start))
        self.facts: dict[str, Any] = json.loads((directory / "facts.json").read_text())
        # Plain arrays over the maps: a np.memmap costs 1 us a slice.
        maps = {name: np.load(directory / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ARRAYS}
        self.long_documents, self.long_starts, self.long_ends = (maps[name] for name in ARRAYS[:3])
        self.pieces, self.bin_ends = maps["pieces"], maps["bin_ends"]
        sizes = np.array(self.facts["blocks"], np.int64).reshape(-1, 2)
        self._block_starts = (np.cumsum(sizes[:, 0]) - sizes[:, 0]).tolist()
        self._own, self._own_before = sizes[:, 1].tolist(), (np.cumsum(sizes[:, 1]) - sizes[:, 1]).tolist()
        self._permutations = [
            Permutation(n, f"{seed} windows {stage.number} {start}")
            for n, start in zip(sizes[:, 0].tolist(), self._block_starts, strict=True)
        ]

    def __reduce__(self):  # data loader workers map the files themselves
        return (_reopen, (self.order, self.stage, self.start, self.seed, self.document_masking))

    def sample(self, number: int) -> Sample:
        """The stage's sample `number`."""
        block = bisect.bisect_right(self._block_starts, number) - 1
        before = self._block_starts[block]
        place = self._permutations[block][number - before]
        if place < self._own[block]:
            return self._own_window(self._own_before[block] + place)
        return self._shared_window(before - self._own_before[block] + place - self._own[block])

    def _own_window(self, number: int) -> Sample:
        """A window out of one document."""
        length = self.stage.seq_length
        which = int(self.long_ends.searchsorted(number, "right"))
        inside = number - (int(self.long_ends[which - 1]) if which else 0)
        start = int(self.long_starts[which]) + inside * length
        document = self.long_documents[which : which + 1]
        total = int(self.order.documents.lengths(document)[0])
        size = min(length + 1, total - start)  # one more for the last label, where the document has it
        tokens = read_documents(self.order.documents, document, [size], [start])
        return finish_sample(tokens, [], length, document_masking=self.document_masking)

    def _shared_window(self, number: int) -> Sample:
        """A window of rests."""
        length = self.stage.seq_length
        low, high = int(self.bin_ends[number - 1]) if number else 0, int(self.bin_ends[number])
        documents = self.pieces[low:high]
        lengths = self.order.documents.lengths(documents)
        starts = lengths - lengths % length
        odd, odd_start = self.facts["odd"]
        if low <= odd < high:
            starts[odd - low] = odd_start
        edges = np.cumsum(lengths - starts).tolist()
        tokens = read_documents(self.order.documents, documents, edges, starts.tolist())
        return finish_sample(tokens, edges, length, document_masking=self.document_masking)


def _reopen(order: Order, stage: Stage, start: tuple[int, int], seed: int, document_masking: bool) -> BestFitWindows:
    return BestFitWindows(order, stage, start, seed=seed, document_masking=document_masking)


def _write(directory: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Make the directory appear whole under its name."""
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        (temporary / "facts.json").write_text(json.dumps(facts))
        os.rename(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary)
        raise


Packing = Literal["concatenate", "best_fit"]


def open_windows(
    order: Order, curriculum: Curriculum, *, packing: Packing = "concatenate", seed: int, document_masking: bool
) -> Windows:
    """The samples of a run.

    Args:
        order: `open_order`.
        curriculum: the stages.
        packing: `concatenate` cuts windows from the stream as it comes (the paper); `best_fit` keeps documents whole.
        seed: of the windows' order.
        document_masking: whether documents in a window are kept apart.

    Raises:
        ConfigError: no such packing, or documents that cannot fill a stage.
    """
    stages: list[StageWindows] = []
    start = (0, 0)
    for stage in curriculum.plan:
        if packing == "concatenate":
            stages.append(ConcatenatedWindows(order, stage, seed=seed, document_masking=document_masking))
        elif packing == "best_fit":
            windows = BestFitWindows(order, stage, start, seed=seed, document_masking=document_masking)
            start = tuple(windows.facts["next"])
            stages.append(windows)
        else:
            raise ConfigError("data.packing", packing, f"one of {', '.join(get_args(Packing))}")
    return Windows(order, curriculum, stages)
