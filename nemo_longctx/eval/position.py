"""Loss by position: what a model gains from each further token of context.

Position `p` (from 0) is the prediction of token p + 1 from the p + 1 tokens before it, so its context is p + 1 tokens.
The independent unit is the document (one sequence), not the token: neighbouring tokens share their text, and an error bar
that counted them as independent would be far too small. So every document keeps its own sum and count in each bin.

Shapes: B documents in a batch, S positions, D documents in all, N bins.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemo_longctx.config import ConfigError

COLUMNS = ("model", "start", "end", "tokens", "loss", "standard error")
MORE_COLUMNS = ("documents",)  # that tables of earlier versions lack


@dataclass(frozen=True, kw_only=True)
class PositionRow:
    """The mean loss of the positions start <= p < end.

    Args:
        model: whose loss it is.
        start, end: first position and the one after the last.
        tokens: how many predictions were averaged.
        loss: mean negative log-likelihood, nats per token.
        standard_error: of `loss`, over documents; NaN where fewer than two documents reach the bin.
        documents: how many reach it; 0 where a table of an earlier version does not say.
    """

    model: str
    start: int
    end: int
    tokens: int
    loss: float
    standard_error: float
    documents: int = 0

    @property
    def context(self) -> float:
        """Mean number of tokens that a prediction in this bin is conditioned on."""
        return (self.start + self.end + 1) / 2


def uniform_edges(seq_length: int, bins: int = 64) -> NDArray[np.int64]:
    """Edges [N + 1] of equal bins; with 65 or so bins over 32,768 it is the paper's "every 500 positions" (Figure 9)."""
    if seq_length < 1 or bins < 1:
        raise ConfigError("bins", bins, f"{seq_length} positions cannot be cut into {bins} bins; both must be at least 1")
    return np.unique(np.linspace(0, seq_length, min(bins, seq_length) + 1).round().astype(np.int64))


def geometric_edges(seq_length: int, per_octave: int = 4, first: int = 16) -> NDArray[np.int64]:
    """Edges [N + 1] that grow by 2^(1/per_octave): even steps of log context, which is what L(c) is fitted on."""
    if seq_length < 1 or per_octave < 1 or first < 1:
        raise ConfigError("per_octave", per_octave, "seq_length, per_octave and first must be at least 1")
    if first >= seq_length:
        return np.array([0, seq_length])
    steps = np.arange(math.floor(math.log2(seq_length / first) * per_octave) + 1)
    inner = np.floor(first * 2.0 ** (steps / per_octave)).astype(np.int64)
    return np.unique(np.concatenate(([0], inner[inner < seq_length], [seq_length])))


class PositionLosses:
    """Streaming sums of per-token losses by document and bin; parts from several ranks merge exactly.

    Args:
        edges: [N + 1] rising integers; bin n holds the positions edges[n] <= p < edges[n + 1].
    """

    def __init__(self, edges: ArrayLike):
        self.edges = np.asarray(edges, dtype=np.int64)
        if self.edges.ndim != 1 or len(self.edges) < 2 or (np.diff(self.edges) <= 0).any() or self.edges[0] < 0:
            raise ConfigError("edges", self.edges.tolist(), "give at least two rising, non-negative positions")
        self._sums: list[NDArray[np.float64]] = []
        self._counts: list[NDArray[np.int64]] = []

    @property
    def context(self) -> NDArray[np.float64]:
        """Mean tokens of context in each bin, [N]."""
        return (self.edges[:-1] + self.edges[1:] + 1) / 2

    @property
    def documents(self) -> int:
        return sum(len(part) for part in self._sums)

    def bin_sums(
        self, losses_BS: ArrayLike, *, positions_BS: ArrayLike | None = None, mask_BS: ArrayLike | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sums and counts, both [B, N], of one batch, without adding them.

        Under context parallelism a rank holds some positions of each document: pass them in `positions_BS`, add up the
        results of the ranks, and hand the totals to `add_sums`.

        Args:
            losses_BS: nats per predicted token.
            positions_BS: position of each column; default 0..S-1. Padding may have any position if it is masked.
            mask_BS: non-zero where the loss counts.

        Raises:
            ValueError: shapes differ, or a loss that counts is not finite.
        """
        losses_BS = np.atleast_2d(np.asarray(losses_BS, dtype=np.float64))
        B, S = losses_BS.shape
        positions_BS = np.broadcast_to(np.arange(S) if positions_BS is None else np.asarray(positions_BS), (B, S))
        keep_BS = np.ones((B, S), bool) if mask_BS is None else np.broadcast_to(np.asarray(mask_BS) != 0, (B, S))
        N = len(self.edges) - 1
        bin_BS = np.searchsorted(self.edges, positions_BS, side="right") - 1
        keep_BS = keep_BS & (bin_BS >= 0) & (bin_BS < N)
        if not np.isfinite(losses_BS[keep_BS]).all():
            row, column = np.argwhere(keep_BS & ~np.isfinite(losses_BS))[0]
            raise ValueError(f"loss of document {row} at position {positions_BS[row, column]} is {losses_BS[row, column]}")
        flat = (np.arange(B)[:, None] * N + bin_BS)[keep_BS]
        sums: NDArray[np.float64] = np.bincount(flat, weights=losses_BS[keep_BS], minlength=B * N).astype(np.float64)
        return sums.reshape(B, N), np.bincount(flat, minlength=B * N).reshape(B, N)

    def add(self, losses_BS: ArrayLike, *, positions_BS: ArrayLike | None = None, mask_BS: ArrayLike | None = None) -> None:
        """Add a batch of whole documents, one a row. Arguments and errors as `bin_sums`."""
        self.add_sums(*self.bin_sums(losses_BS, positions_BS=positions_BS, mask_BS=mask_BS))

    def add_sums(self, sums_BN: ArrayLike, counts_BN: ArrayLike) -> None:
        """Add documents already summed by bin (context parallel totals, or another rank's documents)."""
        sums_BN, counts_BN = np.asarray(sums_BN, np.float64), np.asarray(counts_BN, np.int64)
        if sums_BN.shape != counts_BN.shape or sums_BN.shape[-1] != len(self.edges) - 1:
            raise ValueError(f"sums {sums_BN.shape} and counts {counts_BN.shape} must be [documents, {len(self.edges) - 1}]")
        self._sums.append(sums_BN)
        self._counts.append(counts_BN)

    def by_document(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sums and counts, both [D, N], in the order added."""
        N = len(self.edges) - 1
        if not self._sums:
            return np.zeros((0, N)), np.zeros((0, N), np.int64)
        return np.concatenate(self._sums), np.concatenate(self._counts)

    def rows(self, model: str) -> list[PositionRow]:
        """One row for each bin that holds a token.

        The loss is the ratio of two totals over documents, sum(s_d) / sum(n_d); its standard error is the ratio
        estimator's, sqrt(D / (D - 1) sum((s_d - loss n_d)^2)) / sum(n_d) over the D documents that reach the bin
        (Cochran 1977, section 6.4), which allows for documents of different length.
        """
        sums_DN, counts_DN = self.by_document()
        rows = []
        for n, (start, end) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            reach = counts_DN[:, n] > 0
            s, c = sums_DN[reach, n], counts_DN[reach, n]
            if not reach.any():
                continue
            mean, D = s.sum() / c.sum(), len(s)
            error = math.sqrt(D / (D - 1) * ((s - mean * c) ** 2).sum()) / c.sum() if D > 1 else math.nan
            rows.append(
                PositionRow(
                    model=model,
                    start=int(start),
                    end=int(end),
                    tokens=int(c.sum()),
                    loss=float(mean),
                    standard_error=error,
                    documents=D,
                )
            )
        return rows


def write_csv(path: str | Path, rows: Iterable[PositionRow]) -> None:
    """Write rows under the columns of `COLUMNS` and `MORE_COLUMNS`; an unknown standard error is an empty field."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*COLUMNS, *MORE_COLUMNS))
        for row in rows:
            error = "" if math.isnan(row.standard_error) else f"{row.standard_error:.6g}"
            writer.writerow([row.model, row.start, row.end, row.tokens, f"{row.loss:.6f}", error, row.documents])


def read_csv(path: str | Path) -> list[PositionRow]:
    """Read what `write_csv` wrote.

    Raises:
        ValueError: a column is missing, named with the file.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{Path(path).name} has no column {missing[0]!r}; it has {', '.join(reader.fieldnames or [])}")
        return [
            PositionRow(
                model=row["model"],
                start=int(row["start"]),
                end=int(row["end"]),
                tokens=int(row["tokens"]),
                loss=float(row["loss"]),
                standard_error=float(row["standard error"] or math.nan),
                documents=int(row.get("documents") or 0),
            )
            for row in reader
        ]


def by_model(rows: Iterable[PositionRow]) -> Mapping[str, Sequence[PositionRow]]:
    """Group rows by model, models in the order they appear."""
    groups: dict[str, list[PositionRow]] = {}
    for row in rows:
        groups.setdefault(row.model, []).append(row)
    return groups
