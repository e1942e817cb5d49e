"""The run's list of document visits: built once, kept in one memory-mapped file that all processes of a node share.

Each stratum (see `mixture`) goes through its documents epoch after epoch, each epoch in its own random order. A stage of the
curriculum takes from every stratum as many of the next documents as bring the stratum to its share of all tokens so far, and
mixes the strata at random, each in its own order. So every stage gets the shares that were asked for, and no document comes
again before all of its stratum have come, stage or no stage.

An order may begin behind what was read before (`history`): its token 0 is then token `origin` of the run, and what was read
least comes first. Parts of documents come where only a part was left.

Cost: 4 bytes a visit (its document number) + 8 bytes every 64 visits (tokens up to there). Nothing is kept per sample.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.documents import CHUNK, Documents, Pieces
from nemo_longctx.data.drawing import Draw, draw, draw_all
from nemo_longctx.data.mixture import MixConfig, Stratum, mix_dict, plan_mix
from nemo_longctx.data.seen import Remaining, Seen
from nemo_longctx.files import locked, read_mapping, written_atomically

GROUP = 64  # visits between two running ends
MAGIC = b"nlc-visits-2\x00\x00\x00\x00"  # first and last bytes of the file; another layout gets another number
HYPERGEOMETRIC_BELOW = 10**9  # NumPy draws from no more


def build_order(
    documents: Documents,
    strata: Sequence[Stratum],
    curriculum: Curriculum,
    *,
    seed: int,
    file: BinaryIO,
    origin: int = 0,
    past: Remaining | None = None,
) -> dict[str, Any]:
    """Write the visits of a whole run, or of what is left of it.

    Args:
        documents: what the strata were planned on.
        strata: `plan_mix`; their shares add up to 1.
        curriculum: the stages.
        seed: of all random choices.
        file: empty and writable.
        origin: the token of the run at which the order begins.
        past: what was read before; None: nothing.

    Returns:
        The facts written at the end of the file: `visits`, `digest` (of all visits), `strata`, `stage_tokens` (for each
        stratum, the tokens meant for the stages up to each one's end), `cuts` (visits before which a stratum began again),
        `origin`, `empty` (documents without tokens), `most_repeats` (of a document of each stratum, what was read before
        included), `read_again` (tokens of each stratum that had been read before).
    """
    stages = curriculum.plan_from(origin)
    ends = [stage.end_token - origin for stage in stages]
    seeds = [seed] if past is None else [seed, 1 + origin]
    pieces = Pieces.none() if past is None else past.pieces
    documents = documents.with_pieces(pieces)
    if len(strata) == 1:
        draws = [draw_all(documents, strata[0], ends, seeds, past)]
    else:
        draws = [draw(documents, stratum, number, ends, seeds, past) for number, stratum in enumerate(strata)]
    writer = _Writer(file, documents)
    cuts: list[int] = []
    done = np.zeros(len(draws), np.int64)
    for place, stage in enumerate(stages):
        until = np.array([each.stage_visits[place] for each in draws])
        rng = np.random.default_rng([seed, 1, stage.number, *seeds[1:]])
        while (left := until - done).any():
            counts = left if left.sum() <= CHUNK else _counts_of_next(left, rng)
            _interleave(draws, done, counts, rng, writer, cuts)
            done += counts
    while writer.tokens <= ends[-1]:  # all strata are at an epoch's end: what follows gives the last label alone
        writer.append(draws[0].visits[:1])
    facts = {
        "strata": [dataclasses.asdict(stratum) for stratum in strata],
        "stage_tokens": [each.stage_tokens for each in draws],
        "cuts": sorted(cuts),
        "origin": origin,
        "empty": documents.empty,
        "most_repeats": [each.most for each in draws],
        "read_again": [each.again for each in draws],
    }
    return writer.finish(facts, pieces)


def _counts_of_next(left: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many of the next CHUNK visits each stratum gives, int64 [strata], where all that are `left` come in random order."""
    if len(left) == 1:
        return np.array([CHUNK])
    total = int(left.sum())
    if total < HYPERGEOMETRIC_BELOW:
        return rng.multivariate_hypergeometric(left, CHUNK, method="marginals")
    # The same distribution: CHUNK different places of all that are left, and whose they are.
    places = rng.choice(total, CHUNK, replace=False, shuffle=False)
    return np.bincount(np.searchsorted(np.cumsum(left), places, side="right"), minlength=len(left))


def _interleave(
    draws: Sequence[Draw], done: np.ndarray, counts: np.ndarray, rng: np.random.Generator, writer: _Writer, cuts: list[int]
) -> None:
    """Write the next `counts` visits of all strata in a random mixture that leaves each stratum in order; note epochs' ends."""
    base, taken = writer.visits, [each.visits[a : a + n] for each, a, n in zip(draws, done, counts, strict=True)]
    if len(draws) == 1:
        slots, mixed = None, taken[0]
    else:
        labels = np.repeat(np.arange(len(draws), dtype=np.uint32 if len(draws) > 65535 else np.uint16), counts)
        rng.shuffle(labels)
        slots = np.argsort(labels, kind="stable")  # of each stratum in turn, ascending
        mixed = np.empty(len(labels), np.uint32)
        mixed[slots] = np.concatenate(taken)
    firsts = np.cumsum(counts) - counts
    for each, first, start, count in zip(draws, firsts, done, counts, strict=True):
        low, high = bisect.bisect_right(each.epoch_starts, start), bisect.bisect_right(each.epoch_starts, start + count)
        for begins in each.epoch_starts[low:high]:
            last = int(first + begins - 1 - start)  # the last visit of the epoch before
            cuts.append(base + 1 + (last if slots is None else int(slots[last])))
    writer.append(mixed)


class _Writer:
    """Writes visits as they come, and keeps the running ends and the digest for the end of the file."""

    def __init__(self, file: BinaryIO, documents: Documents):
        self.file, self.documents, self.visits = file, documents, 0
        self._sums: list[np.ndarray] = []
        self._rest = np.empty(0, np.int64)  # lengths of visits that do not fill a group yet
        self._digest = hashlib.blake2b(digest_size=16)
        file.write(MAGIC)

    def append(self, visits: np.ndarray) -> None:
        for start in range(0, len(visits), CHUNK):
            piece = np.ascontiguousarray(visits[start : start + CHUNK])
            self.file.write(piece.data)
            self._digest.update(piece.data)
            lengths = self.documents.lengths(piece)
            if len(self._rest):
                lengths = np.concatenate([self._rest, lengths])
            whole = len(lengths) - len(lengths) % GROUP
            if whole:
                self._sums.append(lengths[:whole].reshape(-1, GROUP).sum(axis=1, dtype=np.int64))
            self._rest = lengths[whole:].copy()
        self.visits += len(visits)

    @property
    def tokens(self) -> int:
        """Of all visits so far."""
        return sum(int(sums.sum()) for sums in self._sums) + int(self._rest.sum(dtype=np.int64))

    def finish(self, facts: dict[str, Any], pieces: Pieces) -> dict[str, Any]:
        self._sums.append(self._rest.sum(dtype=np.int64, keepdims=True)[: len(self._rest)])
        ends = np.cumsum(np.concatenate(self._sums))
        self.file.write(bytes(-self.file.tell() % 8))
        self.file.write(ends.tobytes())
        for column in (pieces.documents, pieces.starts, pieces.stops):
            self.file.write(column.astype(np.int64).tobytes())
            self._digest.update(column.astype(np.int64).tobytes())
        facts = {"visits": self.visits, "pieces": len(pieces), "digest": self._digest.hexdigest(), **facts}
        text = json.dumps(facts).encode()
        self.file.write(text + len(text).to_bytes(8, "little") + MAGIC)
        return facts


class Order:
    """A written order, memory-mapped: opening reads its end, whatever its size.

    Args:
        path: the file.
        documents: the sources, without pieces.
        share_tolerance: of the mix, for `check_delivery`; 1: anything goes.

    Attributes:
        visits: uint32 [V], document numbers.
        ends: int64 [ceil(V / 64)], tokens up to and with each 64th visit.
        origin: the token of the run that is token 0 here; addresses in here count from it.
        documents: the sources, with the pieces that the order has.
        facts: what `build_order` returned.

    Raises:
        ConfigError: the file is damaged or of another layout.
    """

    def __init__(self, path: str | os.PathLike[str], documents: Documents, *, share_tolerance: float = 1.0):
        self.path, self._sources, self.share_tolerance = os.fspath(path), documents, share_tolerance
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        head, size = len(MAGIC), len(self._map)
        end = size - head - 8
        if size < 2 * head + 8 or self._map[:head] != MAGIC or self._map[size - head :] != MAGIC:
            raise ConfigError(
                "data.cache_dir", self.path, "this order file is damaged or not one; delete it, it is built again"
            )
        text = int.from_bytes(self._map[end : end + 8], "little")
        self.facts: dict[str, Any] = json.loads(self._map[end - text : end])
        n_visits = self.facts["visits"]
        n_groups = -(-n_visits // GROUP)
        self.visits = np.frombuffer(self._map, np.uint32, n_visits, head)
        n_pieces = self.facts["pieces"]
        after_ends = end - text - 24 * n_pieces
        self.ends = np.frombuffer(self._map, np.int64, n_groups, after_ends - 8 * n_groups)
        columns = np.frombuffer(self._map, np.int64, 3 * n_pieces, after_ends).reshape(3, -1)
        self.documents = documents.with_pieces(Pieces(*columns))
        self.origin: int = self.facts["origin"]

    def __reduce__(self):  # data loader workers map the file themselves
        return (type(self), (self.path, self._sources))

    @property
    def digest(self) -> str:
        """Hash of all visits."""
        return self.facts["digest"]

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents whose tokens make up [start, stop) of the stream.

        Returns:
            Document numbers (uint32 [n]), their lengths ([n]), and the address (int64 [n]) at which each ends; the first may
            begin before `start` and the last end after `stop`.
        """
        first = int(self.ends.searchsorted(start, "right"))
        last = int(self.ends.searchsorted(stop, "left"))
        visits = self.visits[first * GROUP : (last + 1) * GROUP]
        lengths = self.documents.lengths(visits)
        ends = np.add.accumulate(lengths, dtype=np.int64)
        if first:
            ends += self.ends[first - 1]
        low, high = ends.searchsorted(start, "right"), ends.searchsorted(stop, "left") + 1
        return visits[low:high], lengths[low:high], ends[low:high]

    def address_of_visit(self, visit: int) -> int:
        """Token address at which visit number `visit` begins."""
        group, inside = divmod(visit, GROUP)
        before = int(self.ends[group - 1]) if group else 0
        if not inside:
            return before
        return before + int(self.documents.lengths(self.visits[group * GROUP : visit]).sum(dtype=np.int64))

    @cached_property
    def strata(self) -> tuple[Stratum, ...]:
        """What was planned."""
        return tuple(Stratum(**values) for values in self.facts["strata"])

    def delivered(self, curriculum: Curriculum) -> np.ndarray:
        """Tokens of each stratum in each stage, int64 [stages, strata]: exact, from the plan and the visits at stage ends.

        Stages are those of `curriculum.plan_from(origin)`. For windows cut from the stream as it comes; `Windows.delivered` is
        for either packing.
        """
        until = np.array(self.facts["stage_tokens"], np.int64).T
        for row, stage in enumerate(curriculum.plan_from(self.origin)):
            planned = int(until[row].sum())  # the visits meant for the stages so far end here, near the stage's end
            end = stage.end_token - self.origin
            near = self.tokens_by_stratum(min(planned, end), max(planned, end))
            until[row] += near if planned < end else -near
        return np.diff(until, axis=0, prepend=0)

    def tokens_by_stratum(self, start: int, stop: int) -> np.ndarray:
        """How many of the stream's tokens [start, stop) each stratum gives, int64 [strata]. Looks at every visit in there."""
        if start == stop:
            return np.zeros(len(self.strata), np.int64)
        visits, lengths, ends = self.span(start, stop)
        return self.count_by_stratum(visits, np.minimum(ends, stop) - np.maximum(ends - lengths, start))

    def count_by_stratum(self, visits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Sums over the strata, int64 [strata], of `tokens` (int [n]), one count for each document of `visits` (uint32 [n])."""
        if len(self.strata) == 1:
            return tokens.sum(dtype=np.int64, keepdims=True)
        first, split = self._strata_of_sources
        source = self.documents.sources_of(visits)
        number = first[source] + (self.documents.lengths(self.documents.whole(visits)) >= split[source])
        return np.bincount(number, weights=tokens, minlength=len(self.strata)).astype(np.int64)  # exact up to 2**53

    @cached_property
    def _strata_of_sources(self) -> tuple[np.ndarray, np.ndarray]:
        """For each source, its first stratum, and the length from which on its documents are of its second one."""
        first = np.zeros(len(self.documents.names), np.int64)
        split = np.full(len(first), np.inf)
        seen: set[int] = set()
        for number, stratum in enumerate(self.strata):
            if stratum.source in seen:
                split[stratum.source] = stratum.shortest
            else:
                first[stratum.source] = number
            seen.add(stratum.source)
        return first, split


class Past(Protocol):
    """What came before an order: `history.History`."""

    @property
    def origin(self) -> int:
        """The token of the run at which the order begins."""

    @property
    def key(self) -> str:
        """A hash of it."""

    def seen(self) -> Seen:
        """How often every document was read."""


def open_order(
    mix: MixConfig, documents: Documents, curriculum: Curriculum, *, seed: int, cache_dir: str, past: Past | None = None
) -> Order:
    """The order of a run, built where `cache_dir` lacks it. Many processes may call this together: one builds.

    Args:
        mix, documents, curriculum, seed: what it depends on.
        cache_dir: a folder that can be written.
        past: what the run, or the run before it, read; None: nothing.

    Raises:
        ConfigError: the data does not give what the mix asks; see `plan_mix`.
    """
    remember_fingerprint(documents, cache_dir)
    path = Path(cache_dir) / f"{order_key(mix, documents, curriculum, seed, past)}.order"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                origin, remaining = (past.origin, past.seen().of(documents)) if past else (0, None)
                strata = plan_mix(mix, documents, curriculum.total_tokens - origin, remaining)
                with written_atomically(path) as file:
                    build_order(documents, strata, curriculum, seed=seed, file=file, origin=origin, past=remaining)
    return Order(path, documents, share_tolerance=mix.share_tolerance)


def remember_fingerprint(documents: Documents, cache_dir: str) -> None:
    """Take the documents' fingerprint from `cache_dir` where no file of theirs was touched since it was read; else read it.

    So one process reads the data once, and those beside it and later runs do not. A file was not touched where its size and
    both of its times are the same; a copy is read anew, and gives the same fingerprint.

    Raises:
        ConfigError: `cache_dir` cannot be written.
    """
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        _remember_fingerprint(documents, Path(cache_dir))
    except OSError as error:
        mend = f"it cannot be written ({error.strerror}); name a folder for the order of documents that can"
        raise ConfigError("data.cache_dir", cache_dir, mend) from error


def _remember_fingerprint(documents: Documents, cache_dir: Path) -> None:
    stamp = hashlib.sha256(json.dumps(documents.stamps()).encode()).hexdigest()[:32]
    path = cache_dir / f"{stamp}.fingerprints"
    with locked(path.with_suffix(".lock")):
        known = read_mapping(path)  # a power failure may have cut it short
        if known.keys() >= {"all", "shards"}:
            documents.fingerprint, documents.identities = known["all"], known["shards"]
        else:
            with written_atomically(path) as file:
                file.write(json.dumps({"all": documents.fingerprint, "shards": documents.identities}).encode())


def order_key(mix: MixConfig, documents: Documents, curriculum: Curriculum, seed: int, past: Past | None = None) -> str:
    """Name of an order: a hash of all it depends on, the data included."""
    parts = [MAGIC.decode(), documents.fingerprint, mix_dict(mix), curriculum.as_dict(), seed, past.key if past else None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
