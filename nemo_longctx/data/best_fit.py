"""The windows of a stage under best-fit packing: planned once, kept in memory-mapped files beside the order.

A stage takes documents from the order where the stage before it stopped, until its windows are full. The document at which it
stops gives it whole windows, and what is left to the next stage. Nothing is left out between stages.

Windows come in random order between the places where a stratum begins again, so that no document comes a second time before
the others have come. One window may hold the last documents before such a place and the first after it: it comes between.

Cost: 4 bytes for each rest and window of rests, 20 for each document that is at least as long as the window.
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
from nemo_longctx.data.order import GROUP, Order
from nemo_longctx.data.packing import assign_bins, count_windows, plan_bins
from nemo_longctx.data.permutation import Permutation
from nemo_longctx.data.seen import Ranges
from nemo_longctx.data.windows import BLOCK, ConcatenatedWindows, Sample, Windows, finish_sample, read_documents
from nemo_longctx.files import locked

MOST_BLOCKS = 32  # of a stage, each packed by itself: a plan costs as much as the window is long
ARRAYS = ("long_documents", "long_starts", "long_ends", "pieces", "bin_ends")


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
        own, place = self._place(number)
        return self._own_window(place) if own else self._shared_window(place)

    def documents(self, number: int) -> np.ndarray:
        """The documents, int64 [D], of the stage's sample `number`."""
        own, place = self._place(number)
        if own:
            which = int(self.long_ends.searchsorted(place, "right"))
            return self.long_documents[which : which + 1]
        return self.pieces[int(self.bin_ends[place - 1]) if place else 0 : int(self.bin_ends[place])]

    def _place(self, number: int) -> tuple[bool, int]:
        """Whether the window has a document of its own, and its number among those that have, or that have not."""
        block = bisect.bisect_right(self._block_starts, number) - 1
        before = self._block_starts[block]
        place = self._permutations[block][number - before]
        if place < self._own[block]:
            return True, self._own_before[block] + place
        return False, before - self._own_before[block] + place - self._own[block]

    def read(self, samples: int) -> Ranges:
        """What the stage's first `samples` samples hold, padding left out."""
        own, shared = np.zeros(int(sum(self._own)), bool), np.zeros(len(self.bin_ends), bool)
        for block, start in enumerate(self._block_starts):
            if start >= samples:
                break
            dealt, n_own, own_before = self._permutations[block], self._own[block], self._own_before[block]
            places = np.arange(len(dealt))
            if start + len(dealt) > samples:
                places = np.array([dealt[number] for number in range(samples - start)])
            own[own_before + places[places < n_own]] = True
            shared[start - own_before + places[places >= n_own] - n_own] = True
        length, numbers = self.stage.seq_length, np.flatnonzero(own)
        which = self.long_ends.searchsorted(numbers, "right")
        before = np.concatenate([[0], self.long_ends])[which]
        starts = self.long_starts[which] + (numbers - before) * length
        pieces = np.flatnonzero(np.repeat(shared, np.diff(self.bin_ends.astype(np.int64), prepend=0)))
        documents = self.pieces[pieces]
        ends = self.order.documents.lengths(documents).astype(np.int64)
        rests = ends - ends % length
        odd, odd_start = self.facts["odd"]
        rests[pieces == odd] = odd_start
        return Ranges(
            np.concatenate([self.long_documents[which], documents]).astype(np.int64),
            np.concatenate([starts, rests]),
            np.concatenate([starts + length, ends]),
        )

    def parts(self, number: int) -> tuple[np.ndarray, list[int], list[int]]:
        """What sample `number` is made of: documents, the token of each it begins with, and tokens of each, in order."""
        block = bisect.bisect_right(self._block_starts, number) - 1
        before, length = self._block_starts[block], self.stage.seq_length
        place = self._permutations[block][number - before]
        if place < self._own[block]:
            own = self._own_before[block] + place
            which = int(self.long_ends.searchsorted(own, "right"))
            inside = own - (int(self.long_ends[which - 1]) if which else 0)
            documents = self.long_documents[which : which + 1]
            start = int(self.long_starts[which]) + inside * length
            return documents, [start], [min(length, int(self.order.documents.lengths(documents)[0]) - start)]
        shared = before - self._own_before[block] + place - self._own[block]
        low, high = int(self.bin_ends[shared - 1]) if shared else 0, int(self.bin_ends[shared])
        documents = self.pieces[low:high]
        lengths = self.order.documents.lengths(documents)
        starts = lengths - lengths % length
        odd, odd_start = self.facts["odd"]
        if low <= odd < high:
            starts[odd - low] = odd_start
        return documents, starts.tolist(), (lengths - starts).tolist()

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
    """The samples of a run, checked to deliver what the mix asks.

    Args:
        order: `open_order`.
        curriculum: the stages.
        packing: `concatenate` cuts windows from the stream as it comes (the paper); `best_fit` keeps documents whole.
        seed: of the windows' order.
        document_masking: whether documents in a window are kept apart.

    Raises:
        ConfigError: no such packing, documents that cannot fill a stage, or shares that are off (`check_delivery`).
    """
    windows = pack_windows(order, curriculum, packing=packing, seed=seed, document_masking=document_masking)
    check_delivery(windows, packing)
    return windows


def pack_windows(order: Order, curriculum: Curriculum, *, packing: Packing, seed: int, document_masking: bool) -> Windows:
    """As `open_windows`, whatever shares they deliver."""
    if packing == "concatenate":
        plan = curriculum.plan_from(order.origin)
        stages = [ConcatenatedWindows(order, stage, seed=seed, document_masking=document_masking) for stage in plan]
        return Windows(order, curriculum, stages, order.delivered(curriculum))
    if packing != "best_fit":
        raise ConfigError("data.packing", packing, f"one of {', '.join(get_args(Packing))}")
    packed: list[BestFitWindows] = []
    start = (0, 0)
    for stage in curriculum.plan_from(order.origin):
        packed.append(BestFitWindows(order, stage, start, seed=seed, document_masking=document_masking))
        start = tuple(packed[-1].facts["next"])
    return Windows(order, curriculum, packed, np.array([windows.facts["delivered"] for windows in packed], np.int64))


SLIGHT = 0.02  # a share missed by less may be missed by two windows for each part of the mix, else by one in all
REASONS = {
    "concatenate": "as its documents are too long to meet it; set drop_longer, lengthen the stage",
    "best_fit": "as best_fit leaves what does not fit to the next stage; set drop_longer or packing=concatenate, lengthen it",
}


def check_delivery(windows: Windows, packing: Packing) -> list[str]:
    """Make sure that each stage gets the shares that the mix asks, of the tokens that it reads: padding is of no source.

    A stage of few windows cannot meet a share to the tolerance: it may miss it by a window, or by `SLIGHT` and a few windows.

    Returns:
        What misses the tolerance by no more than that, one sentence a stage.

    Raises:
        ConfigError: a share is off by more than `share_tolerance`, and by more than a stage's windows explain.
    """
    strata, tolerance, told = windows.order.strata, windows.order.share_tolerance, []
    asked = np.array([stratum.share for stratum in strata])
    for stage, tokens in zip(windows.plan, windows.delivered, strict=True):
        shares = tokens / tokens.sum()
        worst = int(np.argmax(np.abs(shares - asked)))
        off = abs(shares[worst] - asked[worst])
        if off <= tolerance:
            continue
        what = f"{shares[worst]:.3%} of its tokens from {strata[worst].name}, not the {asked[worst]:.3%} asked"
        n_windows = stage.end_sample - stage.first_sample
        if off * n_windows <= (2 * len(strata) if off < SLIGHT else 1):
            told.append(f"stage {stage.number} gets {what}: it has only {n_windows} windows of {stage.seq_length} tokens")
            continue
        mend = f"stage {stage.number} would get {what}, {REASONS[packing]}, or accept it with a larger tolerance"
        raise ConfigError("data.mix.share_tolerance", tolerance, mend)
    return told
