"""Which documents go into which window of a stage under best-fit packing: planned block by block, without a token read."""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Stage
from nemo_longctx.data.order import GROUP, Order
from nemo_longctx.data.packing import assign_bins, count_windows, plan_bins
from nemo_longctx.data.windows import BLOCK

MOST_BLOCKS = 32  # of a stage, each packed by itself: a plan costs as much as the window is long


@dataclasses.dataclass(frozen=True)
class _Block:
    """Visits between two beginnings of an epoch that are packed together, so that none comes before its time."""

    documents: np.ndarray  # uint32 [n]
    starts: np.ndarray  # int64 [n], token at which the stage's part of each document begins
    lengths: np.ndarray  # int64 [n], tokens of that part
    gap: int  # windows that remain for the document after these
    is_last: bool  # the document after these does not fit into the stage


class _Packed:
    """A stage's windows so far, and an open one that is not full: rests of the next block may come to it.

    Rests are known by their visits, counted from the stage's first.
    """

    def __init__(self, seq_length: int):
        self.seq_length, self.windows = seq_length, 0
        self.blocks: list[list[int]] = []  # windows of each block, and those of long documents among them
        self.rests: list[np.ndarray] = []
        self.bin_sizes: list[np.ndarray] = []
        self._open_rests, self._open_sizes = np.empty(0, np.uint32), np.empty(0, np.int64)

    @property
    def begun(self) -> int:
        """Tokens in the open window."""
        return int(self._open_sizes.sum())

    def add(self, own: int, rests: np.ndarray, sizes: np.ndarray, bins: np.ndarray, *, is_last: bool) -> None:
        """Write the windows of a block; keep the emptiest open, unless the block is the stage's last.

        Args:
            own: windows of long documents.
            rests, sizes, bins: rests uint32 [n], their tokens, and the bin of each; bin 0 is the open window if there is one.
            is_last: nothing comes after it.
        """
        was_open = len(self._open_rests)
        bins = np.concatenate([np.zeros(was_open, np.int64), bins])
        by_bin = np.argsort(bins, kind="stable")
        bins, sizes = bins[by_bin], np.concatenate([self._open_sizes, sizes])[by_bin]
        rests = np.concatenate([self._open_rests, rests])[by_bin]
        filled = np.bincount(bins, weights=sizes)
        # What the open window holds comes before all else of this block. It stays open where the block only adds to it.
        first = 1 if was_open and (own or len(filled) > 1 or is_last) else 0
        kept = -1
        if not is_last and len(filled) > first and filled[first:].min() < self.seq_length:
            kept = first + int(filled[first:].argmin())
        if first:
            self._write(0, rests[bins == 0], bins[bins == 0])
        others = (bins >= first) & (bins != kept)
        self._write(own, rests[others], bins[others])
        self._open_rests, self._open_sizes = rests[bins == kept], sizes[bins == kept]

    def _write(self, own: int, rests: np.ndarray, bins: np.ndarray) -> None:
        sizes = np.bincount(bins)
        sizes = sizes[sizes > 0]
        if own + len(sizes):
            self.windows += own + len(sizes)
            self.blocks.append([own + len(sizes), own])
            self.rests.append(rests)
            self.bin_sizes.append(sizes)


def pack_stage(order: Order, stage: Stage, visit: int, skip: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Fill a stage's windows.

    Args:
        order: the documents.
        stage: how many windows, of what length.
        visit: the first visit that the stage may use.
        skip: tokens of that visit that the stage before used.

    Returns:
        Arrays: `long_documents` uint32, `long_starts` int64 and `long_ends` int64 (documents with windows of their own: where
        the first begins, windows up to and with it); `pieces` uint32 (documents of the rests, window by window) and `bin_ends`
        uint32 (pieces up to and with each window). Facts: `blocks`, [windows, windows of long documents] of each block; `odd`,
        piece and start of the rest of a document that the stage before had begun; `next`, the next stage's visit and skip;
        `padding`, tokens; `cut`, documents longer than a window; `delivered`, tokens of each stratum.
    """
    n_windows, length, first_visit, odd_start = stage.end_sample - stage.first_sample, stage.seq_length, visit, 0
    cuts = sorted({*order.facts["cuts"], *_block_ends(order, stage, visit), len(order.visits)})
    longs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    packed, cut, delivered = _Packed(length), 0, np.zeros(len(order.strata), np.int64)
    while packed.windows < n_windows:
        limit = cuts[bisect.bisect_right(cuts, visit)]
        block = _next_block(order, visit, skip, limit, n_windows - packed.windows, length, packed.begun)
        documents, starts, read, own = block.documents, block.starts, block.lengths, block.lengths // length
        rests = block.lengths % length
        with_rest = np.flatnonzero(rests)
        numbers, sizes = (visit - first_visit + with_rest).astype(np.uint32), rests[with_rest]
        bins = assign_bins(plan_bins(np.bincount(rests, minlength=length), length, packed.begun), sizes)
        if skip and len(rests) and rests[0]:
            odd_start = int(starts[0] + read[0] - rests[0])
        visit, skip = visit + len(rests), 0 if len(rests) else skip
        if block.gap:
            document = order.visits[visit : visit + 1]
            if (int(order.documents.lengths(document)[0]) - skip) // length >= block.gap:  # it fills them with whole windows
                documents, starts = np.append(documents, document), np.append(starts, skip)
                own, read = np.append(own, block.gap), np.append(read, block.gap * length)
                skip += block.gap * length
            else:
                bins = _spread(bins, block.gap, stage, is_open=packed.begun > 0)
        packed.add(int(own.sum()), numbers, sizes, bins, is_last=block.is_last)
        longs.append((documents[own > 0], starts[own > 0], own[own > 0]))
        delivered += order.count_by_stratum(documents, read)
        cut += int((block.lengths > length).sum())
    pieces = np.concatenate(packed.rests)
    odd = [int(np.flatnonzero(pieces == 0)[0]), odd_start] if odd_start else [-1, 0]  # 0: the stage's first visit
    padding = n_windows * length - int(delivered.sum())
    facts = {"blocks": packed.blocks, "odd": odd, "cut": cut, "next": [visit, skip], "padding": padding}
    arrays = {
        "long_documents": np.concatenate([documents for documents, _, _ in longs]).astype(np.uint32),
        "long_starts": np.concatenate([starts for _, starts, _ in longs]),
        "long_ends": np.cumsum(np.concatenate([own for _, _, own in longs])),
        "pieces": order.visits[first_visit:][pieces],
        "bin_ends": np.cumsum(np.concatenate(packed.bin_sizes)).astype(np.uint32),
    }
    return arrays, facts | {"delivered": delivered.tolist()}


def _block_ends(order: Order, stage: Stage, visit: int) -> list[int]:
    """Visits before which the stage's windows are packed and dealt anew: so many that little is left begun by a change."""
    n_windows = stage.end_sample - stage.first_sample
    block = max(BLOCK * stage.global_batch_size, -(-n_windows // MOST_BLOCKS))
    if n_windows <= block:
        return []
    first = order.address_of_visit(visit)
    addresses = first + stage.seq_length * np.arange(block, n_windows, block)
    return [(int(group) + 1) * GROUP for group in order.ends.searchsorted(addresses)]


def _next_block(order: Order, visit: int, skip: int, limit: int, windows: int, length: int, begun: int) -> _Block:
    """The most visits from `visit` on, before `limit`, that fit into `windows`, one of which has `begun` tokens already."""
    needed = order.address_of_visit(visit) + skip + windows * length
    limit = min(limit, (int(order.ends.searchsorted(needed, "left")) + 1) * GROUP)
    documents = order.visits[visit:limit]
    lengths = order.documents.lengths(documents).astype(np.int64)
    starts = np.zeros(len(lengths), np.int64)
    starts[0], lengths[0] = skip, lengths[0] - skip
    taken, gap = _fitting(lengths, windows, length, begun)
    return _Block(documents[:taken], starts[:taken], lengths[:taken], gap, taken < len(lengths))


def _fitting(lengths: np.ndarray, windows: int, length: int, begun: int) -> tuple[int, int]:
    """How many documents fit, and how many windows they leave empty where another document would not fit."""
    needed = count_windows(lengths, length, begun)
    if needed <= windows:
        return len(lengths), 0
    ends = np.cumsum(lengths)
    high, low = len(lengths), 0
    while needed > windows:  # leave out as many tokens as are too many
        high = min(high, len(lengths))
        low = min(int(ends.searchsorted(ends[high - 1] - (needed - windows) * length)), high - 1)
        needed = count_windows(lengths[:low], length, begun)
        if needed > windows:
            high = low
    while high - low > 1:
        middle = (low + high) // 2
        now = count_windows(lengths[:middle], length, begun)
        if now <= windows:
            low, needed = middle, now
        else:
            high = middle
    return low, windows - needed


def _spread(bins: np.ndarray, more: int, stage: Stage, *, is_open: bool) -> np.ndarray:
    """Move single rests out of shared windows (of which 0 `is_open`, with rests of its own) into `more` of their own."""
    bins = bins.copy()
    numbers, firsts = np.unique(bins, return_index=True)
    shared = np.delete(np.arange(len(bins)), firsts[numbers > 0] if is_open else firsts)[:more]
    if len(shared) < more:
        mend = f"its documents do not fill stage {stage.number}; lengthen the run, or use packing=concatenate"
        raise ConfigError("data.packing", "best_fit", mend)
    bins[shared] = bins.max() + 1 + np.arange(more)
    return bins
