"""Segments, with or without a sliding window, as blocks of queries and the parts of the keys that they see.

With a window of w tokens a query at key position c sees the keys max(0, c - w + 1) to c: a band. A block of n <= w queries at
c, ..., c + n - 1 sees

    right   keys c ... c + n - 1            a causal triangle
    middle  keys c + n - w ... c - 1        seen by all, a rectangle
    left    keys c - w + 1 ... c + n - w - 1  key j (from 0) seen by query r <= j: a causal triangle once both are reversed

so that no mask is ever made, and the work is that of the band. Blocks of n = w queries have no middle; those of one segment are
alike and are folded into the batch, so that a window of any size takes a handful of kernel calls.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from nemo_longctx.attention.documents import Segment


class Part(NamedTuple):
    """Keys [start, start + size) that a block's queries see, in the first of its `repeats` repetitions.

    Attributes:
        start, size: rows of the keys; the next repetition's begin `size` rows later.
        causal: query r sees the first r + 1 of them; else all.
        reversed: both run backwards: query r sees the keys from r on, the last query and the last key none.
        queries: how many of the block's queries see any; 0 where that is all of them.
    """

    start: int
    size: int
    causal: bool = False
    reversed: bool = False
    queries: int = 0

    @property
    def used(self) -> int:
        """Keys that are seen."""
        return self.size - 1 if self.reversed and self.queries < self.size else self.size


class Block(NamedTuple):
    """Query rows [q_start, q_start + rows) and what they see, `repeats` times in a row."""

    q_start: int
    rows: int
    repeats: int
    parts: tuple[Part, ...]

    @property
    def q_end(self) -> int:
        """One past the last query row of all repetitions."""
        return self.q_start + self.rows * self.repeats


@functools.lru_cache(maxsize=64)
def blocks_of(segments: tuple[Segment, ...], window: int | None) -> tuple[Block, ...]:
    """Blocks that cover the query rows of `segments` in order.

    Args:
        segments: which query rows see which key rows.
        window: tokens that a query looks back on, itself included; None for all of its segment's.
    """
    return tuple(block for segment in segments for block in _of_segment(segment, window))


def _of_segment(segment: Segment, window: int | None) -> list[Block]:
    n, keys = segment.q_end - segment.q_start, segment.k_end - segment.k_start
    if window is None or keys <= window:
        return [_full(segment.q_start, n, segment.k_start, segment.prefix)]
    blocks = []
    # Queries whose window begins before the segment see all of it that is before them.
    head = min(n, max(0, window - segment.prefix))
    if head:
        blocks.append(_full(segment.q_start, head, segment.k_start, segment.prefix))
    row, key = segment.q_start + head, segment.k_start + segment.prefix + head
    repeats, rest = divmod(n - head, window)
    if repeats and window > 1:
        parts = (Part(key, window, causal=True), Part(key - window + 1, window, causal=True, reversed=True, queries=window - 1))
        blocks.append(Block(row, window, repeats, parts))
    elif repeats:  # each query sees itself alone
        blocks.append(Block(row, 1, repeats, (Part(key, 1),)))
    row, key = row + repeats * window, key + repeats * window
    if rest:
        blocks.append(_tail(row, rest, key, window))
    return blocks


def _full(row: int, n: int, k_start: int, prefix: int) -> Block:
    """`n` queries that see the `prefix` keys before them and each other causally."""
    if n == 1:
        return Block(row, 1, 1, (Part(k_start, prefix + 1),))
    parts = (Part(k_start + prefix, n, causal=True),)
    return Block(row, n, 1, parts + ((Part(k_start, prefix, queries=n),) if prefix else ()))


def _tail(row: int, n: int, key: int, window: int) -> Block:
    """`n` < `window` queries, the first at row `key` of the keys, with a whole window before each."""
    if n == 1:
        return Block(row, 1, 1, (Part(key - window + 1, window),))
    middle = Part(key + n - window, window - n, queries=n)
    left = Part(key - window + 1, n - 1, causal=True, reversed=True, queries=n - 1)
    return Block(row, n, 1, (Part(key, n, causal=True), middle, left))
