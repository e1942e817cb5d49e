"""Best-fit packing: no document that fits into a window is cut (Ding et al. 2024, Fewer Truncations Improve Language Modeling).

A document of `length` tokens gives `length // S` windows of its own and one rest of `length % S` tokens, S being the window.
Rests are packed by best-fit-decreasing. That is planned on the histogram of lengths: equal rests are placed together, so the
cost follows the window, not the documents.
"""

from __future__ import annotations

import dataclasses

import numpy as np

WORD = 512  # bits of a word in the index of free space: two levels find the next free space in two look-ups


@dataclasses.dataclass(frozen=True)
class BinPlan:
    """Where rests go. Placement i puts `each[i]` rests of `lengths[i]` tokens into each of `bins[i]` bins from `firsts[i]`.

    All arrays int64 [placements], in the order of placing: longest rests first.
    """

    n_bins: int
    lengths: np.ndarray
    each: np.ndarray
    firsts: np.ndarray
    bins: np.ndarray


class _FreeSpace:
    """Bins by the tokens free in them: for each amount, ranges of bin numbers; finds the least amount that suffices."""

    def __init__(self, seq_length: int):
        self._words = [0] * (seq_length // WORD + 1)
        self._top = 0
        # Only of amounts that occur: a plan of a few rests must not cost as much as the window is long.
        self._ranges: dict[int, list[tuple[int, int]]] = {}

    def least(self, needed: int) -> int:
        """The least amount of at least `needed` that some bin has free; 0 if none has."""
        word, bit = divmod(needed, WORD)
        here = self._words[word] >> bit
        if here:
            return needed + (here & -here).bit_length() - 1
        above = self._top >> (word + 1)
        if not above:
            return 0
        word += (above & -above).bit_length()
        there = self._words[word]
        return word * WORD + (there & -there).bit_length() - 1

    def add(self, free: int, first: int, count: int) -> None:
        if free:
            self._ranges.setdefault(free, []).append((first, count))
            self._words[free // WORD] |= 1 << (free % WORD)
            self._top |= 1 << (free // WORD)

    def take(self, free: int) -> tuple[int, int]:
        """Remove and return one range of bins with this amount free."""
        ranges = self._ranges[free]
        taken = ranges.pop()
        if not ranges:
            word = free // WORD
            self._words[word] ^= 1 << (free % WORD)
            if not self._words[word]:
                self._top ^= 1 << word
        return taken


def plan_bins(counts: np.ndarray, seq_length: int, begun: int = 0) -> BinPlan:
    """Best-fit-decreasing over a histogram.

    Args:
        counts: how many rests there are of each length, [S] (index = length; those of length 0 are ignored).
        seq_length: S, tokens of a bin.
        begun: tokens that lie in bin 0 already; 0: no bin is there yet.
    """
    free = _FreeSpace(seq_length)
    placements: list[tuple[int, int, int, int]] = []
    n_bins = 0
    if begun:
        free.add(seq_length - begun, 0, 1)
        n_bins = 1
    lengths = np.flatnonzero(counts[1:])[::-1] + 1
    for length, left in zip(lengths.tolist(), counts[lengths].tolist(), strict=True):
        while left:
            space = free.least(length)
            if space:
                first, count = free.take(space)
            else:  # open as many bins as the rest of this length needs
                space = seq_length
                first, count = n_bins, -(-left // (seq_length // length))
                n_bins += count
            # Of equal rests, the next one finds its best fit in the bin that took the last, as long as it fits there.
            each = space // length
            filled = min(count, left // each)
            if filled:
                placements.append((length, each, first, filled))
                free.add(space - each * length, first, filled)
                left -= each * filled
            if filled < count:
                if left and left < each:
                    placements.append((length, left, first + filled, 1))
                    free.add(space - left * length, first + filled, 1)
                    left, filled = 0, filled + 1
                if filled < count:
                    free.add(space, first + filled, count - filled)
    columns = np.array(placements, np.int64).reshape(-1, 4).T
    return BinPlan(n_bins, *columns)


def assign_bins(plan: BinPlan, rests: np.ndarray) -> np.ndarray:
    """A bin for each rest.

    Args:
        plan: `plan_bins` of the rests' histogram.
        rests: tokens of each rest, int [n], none of them 0.

    Returns:
        bin numbers, int64 [n]; of equal rests, those that come first get the bins that were filled first.
    """
    opened = np.cumsum(plan.bins)
    filled = np.repeat(plan.firsts - (opened - plan.bins), plan.bins) + np.arange(opened[-1] if len(opened) else 0)
    slots = np.repeat(filled, np.repeat(plan.each, plan.bins))  # by falling length
    bins = np.empty(len(rests), np.int64)
    bins[_by_falling_length(rests)] = slots
    return bins


def _by_falling_length(rests: np.ndarray) -> np.ndarray:
    """Stable: in two passes of 16 bits, which NumPy sorts by radix."""
    keys = rests.max(initial=0) - rests
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    high = keys >> 16
    return order if not high.any() else order[np.argsort(high[order].astype(np.uint16), kind="stable")]


def count_windows(lengths: np.ndarray, seq_length: int, begun: int = 0) -> int:
    """Windows that best-fit packing makes of documents of these lengths, the one of `begun` tokens included (`plan_bins`)."""
    rests = np.bincount(lengths % seq_length, minlength=seq_length)
    return int((lengths // seq_length).sum()) + plan_bins(rests, seq_length, begun).n_bins


def window_bound(lengths: np.ndarray, seq_length: int) -> int:
    """The fewest windows that any packing needs that cuts documents at multiples of the window only."""
    rests = (lengths % seq_length).sum(dtype=np.int64)
    return int((lengths // seq_length).sum(dtype=np.int64)) + int(-(-rests // seq_length))
