"""How a stratum's documents come: epoch after epoch, each in its own random order, as far as the run's stages ask.

A stratum that was read before goes on: what was read least comes first, alone, until the rest has caught up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from nemo_longctx.data.documents import CHUNK, Documents
from nemo_longctx.data.mixture import ROUNDING, Stratum
from nemo_longctx.data.seen import Remaining

CANDIDATES = 4096  # documents that a stage may end on, to meet a share to the token rather than to the document


@dataclasses.dataclass
class Draw:
    """A stratum's visits through the run, in order."""

    visits: np.ndarray  # uint32 document numbers
    stage_visits: list[int]  # visits up to the end of each stage
    stage_tokens: list[int]  # and their tokens
    epoch_starts: list[int]  # visits with which a second, third, ... epoch begins
    most: int  # how often one document comes at most, what was read before included
    again: int  # tokens of these visits that had been read before


class _Epochs:
    """The epochs of a stratum: visits and tokens of each; `most`: how often one of its documents was read before at most."""

    def __init__(self, documents: Documents, stratum: Stratum, remaining: Remaining | None):
        self.documents, self.tokens = documents, stratum.tokens
        self.members = stratum.members(documents)
        self.level, self.most = 0, 0
        self._known: dict[int, int] = {}
        if remaining is None:
            return
        times = remaining.times[self.members]
        of_piece = remaining.pieces.documents
        inside = np.searchsorted(self.members, of_piece)
        inside[inside == len(self.members)] = 0
        chosen = np.flatnonzero(self.members[inside] == of_piece)
        self._pieces = (len(documents) + chosen).astype(np.uint32)
        self._piece_levels = remaining.times[of_piece[chosen]] - 1
        self.level = int(min(times.min(), self._piece_levels.min(initial=np.iinfo(np.int32).max)))
        self._times, self.most = times, int(times.max())

    def size(self, epoch: int) -> int:
        """Tokens of an epoch."""
        if self._is_whole(epoch):
            return self.tokens
        if epoch not in self._known:
            self._known[epoch] = int(self.documents.lengths(self._chosen(epoch)).sum(dtype=np.int64))
        return self._known[epoch]

    def visits(self, epoch: int, *, last: bool) -> np.ndarray:
        """Document and piece numbers of an epoch, uint32, to be put into any order; `last`: no other epoch is asked for."""
        if not self._is_whole(epoch):
            return self._chosen(epoch)
        return self.members if last else self.members.copy()

    def ends_at(self, tokens: int) -> bool:
        """Whether so many tokens are whole epochs."""
        epoch = 0
        while tokens > 0 and not self._is_whole(epoch):
            tokens, epoch = tokens - self.size(epoch), epoch + 1
        return tokens == 0 or (tokens > 0 and tokens % self.tokens == 0)

    def _is_whole(self, epoch: int) -> bool:
        return self.level + epoch >= self.most

    def _chosen(self, epoch: int) -> np.ndarray:
        level = self.level + epoch
        return np.concatenate([self.members[self._times <= level], self._pieces[self._piece_levels == level]])


def draw(
    documents: Documents, stratum: Stratum, number: int, ends: Sequence[int], seed: Sequence[int], past: Remaining | None
) -> Draw:
    """Go through a stratum until it has given its share of every stage's end.

    Args:
        documents: all, with the pieces of `past`.
        stratum: whose turn it is; `number` is its place in the mix.
        ends: tokens of the order up to the end of each stage.
        seed: of the shuffles.
        past: what was read before; None: nothing.
    """
    epochs = _Epochs(documents, stratum, past)
    targets = [round(stratum.share * end) for end in ends[:-1]]
    targets.append(_last_target(stratum, ends[-1], epochs))
    drawn: list[np.ndarray] = []
    stage_visits: list[int] = []
    stage_tokens: list[int] = []
    starts: list[int] = []
    before = visits = again = 0  # tokens and visits of whole epochs
    while len(stage_visits) < len(targets):
        size = epochs.size(len(drawn))
        order = epochs.visits(len(drawn), last=targets[-1] <= before + size)
        np.random.default_rng([seed[0], 0, number, len(drawn), *seed[1:]]).shuffle(order)
        position, tokens = 0, before
        while len(stage_visits) < len(targets) and targets[len(stage_visits)] <= before + size:
            last = len(stage_visits) == len(targets) - 1
            position, tokens = _advance(documents, order, position, tokens, targets[len(stage_visits)], at_least=last)
            stage_visits.append(visits + position)
            stage_tokens.append(tokens)
        done = len(stage_visits) == len(targets)
        if epochs.level + len(drawn) > 0:
            again += (tokens if done else before + size) - before
        drawn.append(order[:position] if done else order)
        if len(drawn) > 1 and len(drawn[-1]):
            starts.append(visits)
        before, visits = before + size, visits + len(order)
    most = max(epochs.most, epochs.level + sum(1 for each in drawn if len(each)))
    return Draw(drawn[0] if len(drawn) == 1 else np.concatenate(drawn), stage_visits, stage_tokens, starts, most, again)


def _last_target(stratum: Stratum, total_tokens: int, epochs: _Epochs) -> int:
    """Tokens that a stratum gives at least: its share of one token more than the run, the last window's last label.

    Where the run alone brings it just to an epoch's end, as it does at a cap of its repeats, it begins no other for that label.
    """
    of_run = math.ceil(stratum.share * total_tokens * (1 - ROUNDING))
    if epochs.ends_at(of_run):
        return of_run
    return math.ceil(stratum.share * (total_tokens + 1))


def draw_all(documents: Documents, stratum: Stratum, ends: Sequence[int], seed: Sequence[int], past: Remaining | None) -> Draw:
    """As `draw` for a stratum that is alone: a stage begins where the one before ended, only the run's end is looked for."""
    epochs = _Epochs(documents, stratum, past)
    orders: list[np.ndarray] = []
    starts: list[int] = []
    needed, visits, again = ends[-1] + 1, 0, 0
    while True:
        size = epochs.size(len(orders))
        last = needed <= size
        order = epochs.visits(len(orders), last=last)
        np.random.default_rng([seed[0], 0, 0, len(orders), *seed[1:]]).shuffle(order)
        if orders:
            starts.append(visits)
        if epochs.level + len(orders) > 0:
            again += min(needed - 1, size)
        orders.append(order)
        visits += len(order)
        if last:
            break
        needed -= size
    position, tokens = len(order), size
    while True:  # from behind: a run is mostly about as long as its epochs
        low = max(0, position - CHUNK)
        lengths = documents.lengths(order[low:position])
        before = tokens - np.cumsum(lengths[::-1], dtype=np.int64)[::-1]
        if before[0] < needed:
            orders[-1] = order[: low + int(np.searchsorted(before, needed))]
            break
        position, tokens = low, int(before[0])
    drawn = orders[0] if len(orders) == 1 else np.concatenate(orders)
    more = epochs.level + len(orders) - (needed == 1)  # one token of the last epoch: the last label alone
    most = max(epochs.most, more)
    return Draw(drawn, [len(drawn)] * len(ends), list(ends), starts, most, again)


def _advance(
    documents: Documents, order: np.ndarray, position: int, tokens: int, target: int, *, at_least: bool
) -> tuple[int, int]:
    """Go on in `order` until the tokens come closest to `target` (or just reach it, where `at_least`).

    The document that ends the walk is chosen for its length among the next few thousand, and changes places with the one that
    stood there.

    Returns:
        The position after that document, and the tokens up to it.
    """
    while position < len(order) and tokens < target:
        piece = order[position : position + CHUNK]
        ends = np.cumsum(documents.lengths(piece), dtype=np.int64) + tokens
        over = int(np.searchsorted(ends, target))  # the first that reaches the target
        if over < len(piece):
            position, tokens = position + over, int(ends[over - 1]) if over else tokens
            break
        position, tokens = position + len(piece), int(ends[-1])
    if position == len(order) or tokens >= target:
        return position, tokens
    lengths = documents.lengths(order[position : position + CANDIDATES]).astype(np.int64)
    miss = lengths - (target - tokens)
    if at_least:
        miss = np.where(miss < 0, np.iinfo(np.int64).max, miss)
    best = int(np.argmin(np.abs(miss)))
    if not at_least and abs(int(miss[best])) >= target - tokens:
        return position, tokens  # stopping short is closer than any document
    order[position], order[position + best] = order[position + best], order[position]
    return position + 1, tokens + int(lengths[best])
