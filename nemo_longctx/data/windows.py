"""Sample number or token address -> sample. A pure function of (seed, config, data): no state, so nothing to lose or to repeat.

Shapes: S = tokens of the window, D = documents (or parts of one) in it.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NotRequired, Protocol, TypedDict

import numpy as np

from nemo_longctx.data.curriculum import Curriculum, Stage
from nemo_longctx.data.documents import Documents
from nemo_longctx.data.order import Order
from nemo_longctx.data.permutation import Permutation
from nemo_longctx.data.seen import Ranges
from nemo_longctx.data.vocabulary import bad_token

BLOCK = 64  # optimizer steps whose windows are dealt in one random order


class Sample(TypedDict):
    """One window.

    tokens int64 [S]; labels int64 [S], the token after each; loss_mask float32 [S], 0 where a label is no continuation;
    position_ids int64 [S]; cu_seqlens int32 [D + 1], where documents begin, then S: only with document masking.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: NotRequired[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Window:
    """Where a sample lies: tokens [address, address + seq_length) of the stream."""

    address: int
    seq_length: int


class ConcatenatedWindows:
    """The windows of one stage, cut from its range of the stream one after the other, and then dealt in random order.

    A window may begin and end inside documents, as in the paper and in Megatron's GPTDataset. Windows are permuted between the
    places where a stratum begins again, so that no document comes a second time before the others have come, and in blocks of
    64 optimizer steps: whatever changes in the middle of a stage finds few documents begun.

    Args:
        order: the document visits of the run.
        stage: the range of the stream, and the length of a window.
        seed: of the permutation.
        document_masking: whether documents are kept apart: `cu_seqlens`, positions that restart, no loss from one to the next.
    """

    def __init__(self, order: Order, stage: Stage, *, seed: int, document_masking: bool):
        self.order, self.stage, self.document_masking = order, stage, document_masking
        n_windows = stage.end_sample - stage.first_sample
        bounds = {*range(0, n_windows, BLOCK * stage.global_batch_size), n_windows}
        for cut in order.facts["cuts"]:
            address = order.origin + order.address_of_visit(cut)
            if stage.first_token < address < stage.end_token:
                whole, inside = divmod(address - stage.first_token, stage.seq_length)
                bounds |= {whole, whole + 1} if inside else {whole}
        self._bounds = sorted(bounds)
        self._permutations = [
            Permutation(high - low, f"{seed} windows {stage.number} {low}")
            for low, high in zip(self._bounds[:-1], self._bounds[1:], strict=True)
        ]

    def window(self, number: int) -> Window:
        """Which window comes as the stage's sample `number`."""
        block = bisect.bisect_right(self._bounds, number) - 1
        low = self._bounds[block]
        place = low + self._permutations[block][number - low]
        return Window(self.stage.first_token + place * self.stage.seq_length, self.stage.seq_length)

    def parts(self, number: int) -> tuple[np.ndarray, list[int], list[int]]:
        """What sample `number` is made of: documents, the token of each it begins with, and tokens of each, in order."""
        window = self.window(number)
        first = window.address - self.order.origin
        last = first + window.seq_length
        documents, lengths, ends = self.order.span(first, last)
        begins = np.maximum(ends - lengths, first)
        return documents, (begins - (ends - lengths)).tolist(), (np.minimum(ends, last) - begins).tolist()

    def sample(self, number: int) -> Sample:
        """The stage's sample `number`."""
        window = self.window(number)
        address = window.address - self.order.origin
        return read_window(self.order, address, window.seq_length, document_masking=self.document_masking)

    def read(self, samples: int) -> Ranges:
        """What the stage's first `samples` samples hold."""
        length, first = self.stage.seq_length, self.stage.first_token - self.order.origin
        bounds = self._bounds
        runs: list[list[int]] = []  # windows one after the other, first and end
        for block, (low, high) in enumerate(itertools.pairwise(bounds)):
            if low >= samples:
                break
            dealt = self._permutations[block]
            places = [low] if high <= samples else sorted(low + dealt[number] for number in range(samples - low))
            width = high - low if high <= samples else 1
            for place in places:
                if runs and runs[-1][1] == place:
                    runs[-1][1] = place + width
                else:
                    runs.append([place, place + width])
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for begin, end in runs:
            start, stop = first + begin * length, first + end * length
            visits, lengths, ends = self.order.span(start, stop)
            begins = ends - lengths
            found.append((visits.astype(np.int64), np.maximum(start - begins, 0), np.minimum(stop, ends) - begins))
        return Ranges(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def documents(self, number: int) -> np.ndarray:
        """The documents, uint32 [D], of the stage's sample `number`."""
        return self.parts(number)[0]


class Stream(Protocol):
    """Documents one after the other: `Order`, or held-out text as it lies in its files."""

    documents: Documents

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Order.span`."""


def read_window(stream: Stream, address: int, seq_length: int, *, document_masking: bool) -> Sample:
    """Tokens [address, address + seq_length) of the stream as a sample."""
    visits, lengths, ends = stream.span(address, address + seq_length + 1)  # the last label is the token after the window
    edges = ends - address
    edges[-1] = seq_length + 1
    skip = address - int(ends[0] - lengths[0])
    tokens = read_documents(stream.documents, visits, edges.tolist(), itertools.chain([skip], itertools.repeat(0)))
    if not document_masking:
        return _plain(tokens)
    return _apart(tokens, edges[:-1])


def read_documents(documents: Documents, visits: np.ndarray, edges: list[int], starts: Iterable[int]) -> np.ndarray:
    """Copy documents one after the other, int64 [edges[-1]].

    Args:
        documents: the sources.
        visits: document numbers, [n].
        edges: where each document ends in the result, [n].
        starts: the token of each document to begin with, at least [n].

    Raises:
        ConfigError: an id that is not below `documents.vocab_size`.
    """
    out = np.empty(edges[-1], np.int64)
    parts = []
    begin = 0
    for (corpus, first), start, end in zip(documents.places(visits), starts, edges, strict=False):
        first += start
        corpus.will_need(first, first + end - begin)
        parts.append((corpus, first, begin, end))
        begin = end
    for corpus, first, begin, end in parts:
        out[begin:end] = corpus.read(first, first + end - begin)
    limit = documents.vocab_size
    if limit is not None and out.view(np.uint64).max() >= limit:  # a negative id is beyond all as well
        raise bad_token(documents.shards, documents.shard_offsets, documents.whole(visits), edges, out, limit)
    return out


def finish_sample(tokens: np.ndarray, ends: list[int], seq_length: int, *, document_masking: bool) -> Sample:
    """A packed window from the tokens of its documents.

    Args:
        tokens: int64 [m], m <= S, or S + 1 where the token after the window continues its last document.
        ends: where documents end, ascending, in [1, m].
        seq_length: S; tokens after the m-th are padding, which counts for nothing whatever its value.
        document_masking: keep documents (and padding) apart.
    """
    size = len(tokens)
    if size <= seq_length:
        tokens = np.concatenate([tokens, np.zeros(seq_length + 1 - size, np.int64)])
    sample = _apart(tokens, np.array(ends, np.int64)) if document_masking else _plain(tokens)
    if size <= seq_length:  # the last token of all has no next one
        sample["loss_mask"] = sample["loss_mask"].copy()
        sample["loss_mask"][size - 1 :] = 0
    return sample


def _plain(tokens: np.ndarray) -> Sample:
    """Causal over the whole window: every label counts."""
    seq_length = len(tokens) - 1
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": _ones(seq_length),
        "position_ids": _counting(seq_length),
    }


def _apart(tokens: np.ndarray, seams: np.ndarray) -> Sample:
    """Documents kept apart. `seams`: where a document ends and another begins, ascending, in [1, S]."""
    seq_length = len(tokens) - 1
    loss_mask = np.ones(seq_length, np.float32)
    loss_mask[seams - 1] = 0
    inside = seams[:-1] if len(seams) and seams[-1] == seq_length else seams
    cu_seqlens = np.empty(len(inside) + 2, np.int32)
    cu_seqlens[0], cu_seqlens[1:-1], cu_seqlens[-1] = 0, inside, seq_length
    position_ids, counting = np.empty(seq_length, np.int64), _counting(seq_length)
    begin = 0
    for end in cu_seqlens[1:].tolist():
        position_ids[begin:end] = counting[: end - begin]
        begin = end
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": loss_mask,
        "position_ids": position_ids,
        "cu_seqlens": cu_seqlens,
    }


@lru_cache(maxsize=8)
def _counting(length: int) -> np.ndarray:
    counting = np.arange(length, dtype=np.int64)
    counting.flags.writeable = False  # shared by all samples
    return counting


@lru_cache(maxsize=8)
def _ones(length: int) -> np.ndarray:
    ones = np.ones(length, np.float32)
    ones.flags.writeable = False
    return ones


class StageWindows(Protocol):
    """A stage's samples by number."""

    def parts(self, number: int) -> tuple[np.ndarray, list[int], list[int]]:
        """Documents of sample `number`, the token of each it begins with, and tokens of each."""

    def sample(self, number: int) -> Sample:
        """The stage's sample `number`."""

    def documents(self, number: int) -> np.ndarray:
        """The documents, uint32 [D], of the stage's sample `number`."""

    def read(self, samples: int) -> Ranges:
        """What the stage's first `samples` samples hold, padding left out."""


class Windows:
    """The run's samples, numbered through across stages: what a dataset of any host wraps. `best_fit.open_windows` makes it.

    Args:
        order: the document visits of the run, or of what is left of it from token `order.origin` on.
        curriculum: the stages of the whole run.
        stages: the windows of each stage of `plan`.
        delivered: tokens of each stratum that each stage of `plan` reads, int64 [stages, strata]; padding is of none.

    Attributes:
        plan: the stages from where the order begins.
    """

    def __init__(self, order: Order, curriculum: Curriculum, stages: Sequence[StageWindows], delivered: np.ndarray):
        self.order, self.curriculum, self.stages, self.delivered = order, curriculum, tuple(stages), delivered
        self.plan = curriculum.plan_from(order.origin)

    def __len__(self) -> int:
        return self.curriculum.total_samples

    def __getitem__(self, sample: int) -> Sample:
        """Sample number `sample` of the run.

        Raises:
            IndexError: the run has no such sample, or it lies before the order's first token.
        """
        place = self._place(sample)
        return self.stages[place].sample(sample - self.plan[place].first_sample)

    def _place(self, sample: int) -> int:
        """Which stage of `plan` a sample of the run lies in."""
        place = self.curriculum.stage_of_sample(sample).number - self.plan[0].number
        if place < 0 or sample < self.plan[place].first_sample:
            raise IndexError(f"sample {sample} lies before token {self.order.origin}, where this part of the stream begins")
        return place

    def read(self, until: int) -> Ranges:
        """Which tokens of which documents the samples up to token `until` of the run hold, padding left out."""
        samples = self.curriculum.samples_at_token(until)
        parts = [
            windows.read(min(samples, stage.end_sample) - stage.first_sample)
            for stage, windows in zip(self.plan, self.stages, strict=True)
            if stage.first_sample < samples
        ]
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in ("documents", "starts", "stops")]
        return Ranges(*columns)

    def documents_of(self, samples: Iterable[int]) -> list[str]:
        """The documents of some samples of the run, each once and in their order: `SOURCE:NUMBER`, numbered in the source."""
        found: dict[int, None] = {}
        for sample in samples:
            place = self._place(sample)
            found |= dict.fromkeys(self.stages[place].documents(sample - self.plan[place].first_sample).tolist())
        return [self.order.documents.label(document) for document in found]

    def at_token(self, address: int) -> Sample:
        """The sample that comes after `address` consumed tokens."""
        return self[self.curriculum.samples_at_token(address)]
