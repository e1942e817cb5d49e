"""Document boundaries of a packed window, and what they mean for attention: which query rows see which key rows.

A packed window of S tokens holds documents back to back. Its boundaries are `cu_seqlens`, the running ends with a leading 0:
`[0, 3, 8]` is one document of 3 tokens and one of 5. Everything else is derived from it here, in time linear in the number
of documents; no mask of S x S is ever made.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nemo_longctx.config import ConfigError


class Segment(NamedTuple):
    """Query rows [q_start, q_end) attend causally to key rows [k_start, k_end), the last query aligned with the last key.

    With as many keys as queries this is the usual causal square; with more keys than queries the first `prefix` keys are
    seen by every query (a KV cache, or the earlier part of a document that another context-parallel rank holds).
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int

    @property
    def prefix(self) -> int:
        """Number of keys that come before the first query."""
        return (self.k_end - self.k_start) - (self.q_end - self.q_start)


def check_cu_seqlens(cu_seqlens: Sequence[int], n_tokens: int, *, key: str = "cu_seqlens") -> tuple[int, ...]:
    """`cu_seqlens` as a tuple of ints, checked.

    Raises:
        ConfigError: it does not begin with 0, does not end with `n_tokens`, or falls.
    """
    ends = tuple(int(end) for end in cu_seqlens)
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != n_tokens:
        shown = ends if len(ends) <= 6 else (*ends[:3], "...", *ends[-2:])
        raise ConfigError(key, shown, f"must begin with 0 and end with the number of tokens, {n_tokens}")
    if any(b < a for a, b in itertools.pairwise(ends)):
        raise ConfigError(key, ends[:6], "must not fall: each entry is the end of a document")
    return ends


def cu_seqlens_from_position_ids(position_ids_S: np.ndarray) -> np.ndarray:
    """Boundaries (int32) from position ids that restart at 0 with each document.

    Raises:
        ConfigError: the first position is not 0 (the window then begins inside a document: pass real boundaries).
    """
    positions = np.asarray(position_ids_S)
    if positions.ndim != 1 or positions.size == 0 or positions[0] != 0:
        raise ConfigError("position_ids", positions[:4].tolist(), "must be one window of positions that begins with 0")
    starts = np.flatnonzero(positions == 0)
    return np.append(starts, positions.size).astype(np.int32)


def position_ids_from_cu_seqlens(cu_seqlens: Sequence[int]) -> np.ndarray:
    """Positions (int64, one a token) that restart at 0 with each document."""
    ends = np.asarray(cu_seqlens, dtype=np.int64)
    return np.arange(ends[-1], dtype=np.int64) - np.repeat(ends[:-1], np.diff(ends))


def document_ids_from_cu_seqlens(cu_seqlens: Sequence[int]) -> np.ndarray:
    """Index of the document (int64) that each token belongs to."""
    return np.repeat(np.arange(len(cu_seqlens) - 1, dtype=np.int64), np.diff(np.asarray(cu_seqlens, dtype=np.int64)))


@functools.lru_cache(maxsize=64)
def document_segments(cu_seqlens: tuple[int, ...]) -> tuple[Segment, ...]:
    """One causal square a document; empty documents vanish."""
    return tuple(Segment(a, b, a, b) for a, b in itertools.pairwise(cu_seqlens) if b > a)


def zigzag_chunks(cp_rank: int, cp_size: int) -> tuple[int, int]:
    """The two chunks of 2 * cp_size that a context-parallel rank holds: an early one and its mirror, so that the causal work
    is the same on every rank (Megatron-Core and Transformer Engine split a sequence in the same way)."""
    return cp_rank, 2 * cp_size - 1 - cp_rank


def zigzag_positions(seq_length: int, cp_rank: int, cp_size: int) -> np.ndarray:
    """Positions in the whole window (int64) of a rank's local tokens, in the order in which it holds them.

    Raises:
        ConfigError: `seq_length` is no multiple of 2 * cp_size.
    """
    chunk = _zigzag_chunk_length(seq_length, cp_size)
    return np.concatenate([np.arange(c * chunk, (c + 1) * chunk) for c in zigzag_chunks(cp_rank, cp_size)])


def _zigzag_chunk_length(seq_length: int, cp_size: int) -> int:
    if seq_length % (2 * cp_size):
        mend = f"must be a multiple of {2 * cp_size} (2 x context_parallel_size)"
        raise ConfigError("seq_length", seq_length, mend)
    return seq_length // (2 * cp_size)


@functools.lru_cache(maxsize=64)
def context_parallel_segments(cu_seqlens: tuple[int, ...], seq_length: int, cp_rank: int, cp_size: int) -> tuple[Segment, ...]:
    """Segments of one rank's queries against the keys of all ranks in sequence order.

    Args:
        cu_seqlens: boundaries of the whole window, all ranks' tokens together; windows of a flattened batch count as
            boundaries too. Documents may cross chunks and ranks freely.
        seq_length: tokens of one window on all ranks together; `cu_seqlens[-1]` is a multiple of it.
        cp_rank, cp_size: place in the context-parallel group.

    Returns:
        segments whose query rows index the local tokens (each window's two chunks in turn) and whose key rows index the
        gathered keys in window order.
    """
    chunk = _zigzag_chunk_length(seq_length, cp_size)
    segments = []
    q_offset = 0
    for window_start in range(0, cu_seqlens[-1], seq_length):
        for index in zigzag_chunks(cp_rank, cp_size):
            begin = window_start + index * chunk
            end = begin + chunk
            for doc_start, doc_end in itertools.pairwise(cu_seqlens):
                a, b = max(doc_start, begin), min(doc_end, end)
                if a < b:
                    segments.append(Segment(q_offset + a - begin, q_offset + b - begin, doc_start, b))
            q_offset += chunk
    return tuple(segments)
