"""What the index alone says about a corpus: how long its documents are, and what windows will cut. No token is read.

All figures come from one exact count of documents by length (`LengthCounts`), so they cannot disagree, and memory does not
grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_COUNTED = 1 << 20  # lengths below this are counted in an array, longer ones (rare) are kept one by one


@dataclass(frozen=True, kw_only=True)
class LengthCounts:
    """How many documents there are of each length.

    Attributes:
        values: int64 [n], the lengths that occur, in tokens, ascending.
        counts: int64 [n], documents of each.
        empty: documents without tokens, which no other figure holds.
    """

    values: np.ndarray
    counts: np.ndarray
    empty: int = 0

    @classmethod
    def of(cls, pieces: Iterable[np.ndarray]) -> LengthCounts:
        """Count lengths (integer arrays of any size) that come in pieces; documents without tokens are `empty`."""
        counts = np.zeros(_COUNTED, np.int64)
        long: list[np.ndarray] = []
        for lengths in pieces:
            fits = lengths < _COUNTED
            if not fits.all():
                long.append(lengths[~fits].astype(np.int64))
                lengths = lengths[fits]
            counts += np.bincount(lengths, minlength=_COUNTED)
        empty, counts[0] = int(counts[0]), 0
        values = np.flatnonzero(counts)
        long_values, long_counts = np.unique(np.concatenate([np.empty(0, np.int64), *long]), return_counts=True)
        values, counts = np.concatenate([values, long_values]), np.concatenate([counts[values], long_counts])
        return cls(values=values, counts=counts, empty=empty)

    @property
    def documents(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """How many they hold."""
        return int(self.values @ self.counts)

    def quantile(self, share: float) -> int:
        """The shortest length that at least `share` of the documents do not exceed."""
        running = np.cumsum(self.counts)
        return int(self.values[np.searchsorted(running, share * running[-1])])

    def share_of_tokens_at_least(self, length: int) -> float:
        """Share of the tokens that lie in documents of `length` tokens or more."""
        chosen = self.values >= length
        return float(self.values[chosen] @ self.counts[chosen]) / self.tokens

    def histogram(self) -> list[dict[str, int]]:
        """Documents and tokens by powers of two, from the shortest to the longest: `at_least` <= length < `below`."""
        power = np.frexp(self.values.astype(np.float64))[1] - 1
        rows = []
        for exponent in range(int(power[0]), int(power[-1]) + 1):
            chosen = power == exponent
            documents, tokens = int(self.counts[chosen].sum()), int(self.values[chosen] @ self.counts[chosen])
            rows.append({"at_least": 2**exponent, "below": 2 ** (exponent + 1), "documents": documents, "tokens": tokens})
        return rows

    def cut_by_chunks(self, seq_length: int) -> tuple[float, float]:
        """Share of documents and of tokens in documents that a window's edge cuts, when documents are shuffled and joined.

        A document begins anywhere in a window with the same chance, and is whole unless an edge falls on one of the
        `length - 1` seams between its tokens: it is cut with probability min(1, (length - 1) / seq_length).
        """
        chance = np.minimum(1.0, (self.values - 1) / seq_length)
        return float(chance @ self.counts) / self.documents, float((chance * self.values) @ self.counts) / self.tokens

    def cut_by_best_fit(self, seq_length: int) -> tuple[float, float]:
        """The same shares for best-fit packing (Ding et al. 2024), which only cuts what is longer than the window."""
        longer = self.values > seq_length
        tokens = float(self.values[longer] @ self.counts[longer])
        return float(self.counts[longer].sum()) / self.documents, tokens / self.tokens


def describe(counts: LengthCounts, seq_length: int | None) -> dict[str, Any]:
    """The figures of one source, ready for JSON. Shares are fractions of 1, lengths are tokens."""
    values: dict[str, Any] = {
        "documents": counts.documents,
        "empty_documents": counts.empty,
        "tokens": counts.tokens,
        "length": {
            "shortest": int(counts.values[0]),
            "median": counts.quantile(0.5),
            "mean": counts.tokens / counts.documents,
            "p90": counts.quantile(0.9),
            "p99": counts.quantile(0.99),
            "longest": int(counts.values[-1]),
        },
        "share_of_tokens_at_least": {
            str(length): counts.share_of_tokens_at_least(length) for length in thresholds(counts.values[-1], seq_length)
        },
        "histogram": counts.histogram(),
    }
    if seq_length is not None:
        cut = {"concatenate_and_chunk": counts.cut_by_chunks(seq_length), "best_fit": counts.cut_by_best_fit(seq_length)}
        shares = {name: {"documents": documents, "tokens": tokens} for name, (documents, tokens) in cut.items()}
        values["cut"] = {"seq_length": seq_length} | shares
    return values


def thresholds(longest: int, seq_length: int | None) -> Sequence[int]:
    """4k, 8k, ... as far as there are documents, and the window's length."""
    lengths = {4096 << i for i in range(20) if 4096 << i <= longest} | {4096}
    return sorted(lengths | ({seq_length} if seq_length is not None else set()))
