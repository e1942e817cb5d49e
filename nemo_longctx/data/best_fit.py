"""The windows of a stage under best-fit packing: planned once, kept in memory-mapped files beside the order.

A stage takes documents from the order where the stage before it stopped, until its windows are full. The document at which it
stops gives it whole windows, and what is left to the next stage. Nothing is left out between stages.

Windows come in random order between the places where a stratum begins again, so that no document comes a second time before
the others have come. One window may hold the last documents before such a place and the first after it: it comes between.

Cost: 4 bytes for each rest and window of rests, 20 for each document that is at least as long as the window.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum, Stage
from nemo_longctx.data.order import Order
from nemo_longctx.data.permutation import Permutation
from nemo_longctx.data.seen import Ranges
from nemo_longctx.data.stage_packing import pack_stage
from nemo_longctx.data.windows import ConcatenatedWindows, Sample, Windows, finish_sample, read_documents
from nemo_longctx.files import locked

ARRAYS = ("long_documents", "long_starts", "long_ends", "pieces", "bin_ends")


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
        try:
            self.facts: dict[str, Any] = json.loads((directory / "facts.json").read_text())
            # Plain arrays over the maps: a np.memmap costs 1 us a slice.
            maps = {name: np.load(directory / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ARRAYS}
        except (OSError, ValueError, EOFError) as error:  # cut short by a power failure
            mend = "these windows are damaged; delete them, they are built again"
            raise ConfigError("data.cache_dir", str(directory), mend) from error
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
        """The documents, uint32 [D], of the stage's sample `number`."""
        return self.parts(number)[0]

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
        own, place = self._place(number)
        return self._own_part(place, self.stage.seq_length) if own else self._shared_parts(place)

    def _own_part(self, number: int, most: int) -> tuple[np.ndarray, list[int], list[int]]:
        """The one part of a window out of one document, `most` tokens of it where it has them."""
        which = int(self.long_ends.searchsorted(number, "right"))
        inside = number - (int(self.long_ends[which - 1]) if which else 0)
        start = int(self.long_starts[which]) + inside * self.stage.seq_length
        document = self.long_documents[which : which + 1]
        return document, [start], [min(most, int(self.order.documents.lengths(document)[0]) - start)]

    def _shared_parts(self, number: int) -> tuple[np.ndarray, list[int], list[int]]:
        """The parts of a window of rests."""
        low, high = int(self.bin_ends[number - 1]) if number else 0, int(self.bin_ends[number])
        documents = self.pieces[low:high]
        lengths = self.order.documents.lengths(documents)
        starts = lengths - lengths % self.stage.seq_length
        odd, odd_start = self.facts["odd"]
        if low <= odd < high:
            starts[odd - low] = odd_start
        return documents, starts.tolist(), (lengths - starts).tolist()

    def _own_window(self, number: int) -> Sample:
        """A window out of one document."""
        length = self.stage.seq_length
        document, starts, sizes = self._own_part(number, length + 1)  # the last label, where the document has it
        tokens = read_documents(self.order.documents, document, sizes, starts)
        return finish_sample(tokens, [], length, document_masking=self.document_masking)

    def _shared_window(self, number: int) -> Sample:
        """A window of rests."""
        documents, starts, sizes = self._shared_parts(number)
        edges = list(itertools.accumulate(sizes))
        tokens = read_documents(self.order.documents, documents, edges, starts)
        return finish_sample(tokens, edges, self.stage.seq_length, document_masking=self.document_masking)


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
