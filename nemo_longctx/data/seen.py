"""How often each document was read, and which parts of it less often: what a stream that goes on has to know of its past.

A token was read some times. All tokens of a document were read as often, or some of them once less: those are its pieces.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nemo_longctx.data.documents import Documents, Pieces


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Tokens [starts, stops) of `documents` that were read, all int64 [n]; a document comes as often as it was read."""

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


@dataclasses.dataclass(frozen=True)
class Remaining:
    """What is left of the documents of a mix.

    Attributes:
        times: int32 [documents], how often each was read: the times of its most read tokens.
        pieces: parts that were read once less than their document.
    """

    times: np.ndarray
    pieces: Pieces

    def tokens_read(self, lengths: np.ndarray, first: int) -> int:
        """Tokens read of the documents from number `first` on, each time counted; those of length 0 are left out."""
        end = first + len(lengths)
        inside = np.flatnonzero((self.pieces.documents >= first) & (self.pieces.documents < end))
        inside = inside[lengths[self.pieces.documents[inside] - first] > 0]
        left = (self.pieces.stops - self.pieces.starts)[inside].sum()
        return int((self.times[first:end] * lengths.astype(np.int64)).sum() - left)


class Seen:
    """How often every document of every shard was read that some stream went through, whether it is in the mix now or not.

    A shard is known by its identity. Where several sources have it (under length rules of their own), what one reads counts for
    all of them: their places in the mix may change.
    """

    def __init__(self, shards: dict[str, tuple[np.ndarray, Pieces]] | None = None):
        self._shards = dict(shards or {})

    def knows(self, identity: str) -> bool:
        """Whether a shard of this identity was gone through."""
        return identity in self._shards

    def of(self, documents: Documents) -> Remaining:
        """What it means for these documents; a shard that was never gone through is unread."""
        times = np.zeros(len(documents), np.int32)
        pieces: list[Pieces] = []
        for identity, first in zip(documents.identities, documents.shard_offsets.tolist(), strict=False):
            if identity in self._shards:
                read, parts = self._shards[identity]
                times[first : first + len(read)] = read
                pieces.append(Pieces(parts.documents + first, parts.starts, parts.stops))
        return Remaining(times, Pieces.join(pieces))

    def after(self, documents: Documents, ranges: Ranges) -> Seen:
        """This, and `ranges` (whose numbers are those of `documents`, pieces included) read on top of it."""
        places: dict[str, int] = {}  # the first shard of each identity, which stands for all
        for number, identity in enumerate(documents.identities):
            places.setdefault(identity, number)
        shift = documents.starts(ranges.documents)
        whole = _in_first(documents, places, documents.whole(ranges.documents))
        now = _read_on(documents, self.of(documents), Ranges(whole, ranges.starts + shift, ranges.stops + shift))
        shards = dict(self._shards)
        offsets = documents.shard_offsets.tolist()
        edges = np.searchsorted(now.pieces.documents, offsets)
        for identity, number in places.items():
            first, end = offsets[number], offsets[number + 1]
            low, high = edges[number], edges[number + 1]
            parts = Pieces(now.pieces.documents[low:high] - first, now.pieces.starts[low:high], now.pieces.stops[low:high])
            shards[identity] = (now.times[first:end], parts)
        return Seen(shards)


def _in_first(documents: Documents, places: dict[str, int], numbers: np.ndarray) -> np.ndarray:
    """Numbers (int64) of the same documents in the first shard of their identity."""
    if len(places) == len(documents.identities):
        return numbers
    offsets = documents.shard_offsets
    back = np.array([offsets[places[identity]] - offsets[shard] for shard, identity in enumerate(documents.identities)])
    return numbers + back[np.searchsorted(offsets, numbers, side="right") - 1]


def _read_on(documents: Documents, before: Remaining, ranges: Ranges) -> Remaining:
    """`before` with `ranges` read on top of it; pieces are by document, ascending."""
    document = documents.whole(ranges.documents)
    shift = documents.starts(ranges.documents)
    starts, stops = ranges.starts + shift, ranges.stops + shift
    lengths = np.concatenate([shard.lengths for shard in documents.shards]).astype(np.int64)
    pieces = before.pieces
    read = before.times * lengths
    np.subtract.at(read, pieces.documents, pieces.stops - pieces.starts)
    read += np.bincount(document, weights=stops - starts, minlength=len(lengths)).astype(np.int64)  # exact up to 2**53
    has = lengths > 0
    times, rest = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    times[has], rest[has] = np.divmod(read[has], lengths[has])
    times[rest > 0] += 1
    parts = np.flatnonzero(rest)
    if not len(parts):
        return Remaining(times.astype(np.int32), Pieces.none())
    # Where in these documents a token was read fewer times than `times`: count how often, from edge to edge.
    is_part = rest > 0
    mine, old = is_part[document], is_part[pieces.documents]
    ones = np.ones(len(parts), np.int64)
    edges = [
        (parts, 0 * ones, before.times[parts].astype(np.int64)),
        (parts, lengths[parts], 0 * ones),
        (pieces.documents[old], pieces.starts[old], np.full(old.sum(), -1)),
        (pieces.documents[old], pieces.stops[old], np.full(old.sum(), 1)),
        (document[mine], starts[mine], np.full(mine.sum(), 1)),
        (document[mine], stops[mine], np.full(mine.sum(), -1)),
    ]
    where, at, change = (np.concatenate(column) for column in zip(*edges, strict=True))
    by_place = np.lexsort((at, where))
    where, at, change = where[by_place], at[by_place], change[by_place]
    new = np.concatenate([[True], (where[1:] != where[:-1]) | (at[1:] != at[:-1])])
    firsts = np.flatnonzero(new)
    where, at, change = where[firsts], at[firsts], np.add.reduceat(change, firsts)
    # Sums that begin anew with each document: what one adds up to in the end is taken off the next.
    sums = np.cumsum(change)
    begins = np.flatnonzero(np.concatenate([[True], where[1:] != where[:-1]]))
    sums -= np.repeat(np.concatenate([[0], sums[begins[1:] - 1]]), np.diff(np.append(begins, len(where))))
    less = np.flatnonzero(sums < times[where])
    less = less[at[less] < lengths[where[less]]]
    joined = np.concatenate([[False], (where[less[1:]] == where[less[:-1]]) & (less[1:] == less[:-1] + 1)])
    heads = np.flatnonzero(~joined)
    tails = np.append(heads[1:], len(less)) - 1
    return Remaining(times.astype(np.int32), Pieces(where[less[heads]], at[less[heads]], at[less[tails] + 1]))
