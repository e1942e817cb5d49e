"""The order of visits against a plain one that takes a document at a time; and what a written order tells against counting."""

import contextlib
import hashlib
import io
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemo_longctx.data import documents as documents_of
from nemo_longctx.data import drawing, order
from nemo_longctx.data.corpus import ShardedCorpus
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.data.documents import Documents, Pieces
from nemo_longctx.data.mixture import Stratum
from nemo_longctx.data.seen import Remaining


class Shards(ShardedCorpus):
    """A source of which only the lengths are there."""

    def __init__(self, shards):
        self.shards = tuple(SimpleNamespace(n_documents=len(each), lengths=np.array(each, np.int32)) for each in shards)


@st.composite
def orders(draw):
    """Sources of one or two shards, some in two strata, a curriculum, and what was read before its token `origin`."""
    length = st.integers(1, draw(st.sampled_from([3, 12, 40])))
    shard = st.lists(length, min_size=1, max_size=14)
    sources = draw(st.lists(st.lists(shard, min_size=1, max_size=2), min_size=1, max_size=3))
    strata, first = [], 0
    for source, shards in enumerate(sources):
        lengths = list(itertools.chain(*shards))
        bound = draw(st.none() | st.integers(2, 12))
        sides = [(1, math.inf)] if bound is None else [(1, bound - 1), (bound, 35)]
        for low, high in sides:
            members = [first + d for d, n in enumerate(lengths) if low <= n <= high]
            tokens = sum(lengths[d - first] for d in members)
            if members:
                about = {"source": source, "shortest": low, "longest": high, "documents": len(members), "tokens": tokens}
                strata.append((about, members))
        first += len(lengths)
    assume(strata)
    steps = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    ends = np.cumsum(steps).tolist()
    stages = [StageConfig(until=end / ends[-1], seq_length=draw(st.sampled_from([8, 16, 64]))) for end in ends]
    curriculum = Curriculum(stages=stages, tokens_per_step=64, total_tokens=64 * ends[-1])
    lengths = [n for shards in sources for each in shards for n in each]
    past, origin = None, 0
    if draw(st.booleans()):
        origin = 64 * draw(st.integers(0, ends[-1] - 1))
        times = draw(st.lists(st.integers(0, 2), min_size=first, max_size=first))
        parts = []
        for document, (n, came) in enumerate(zip(lengths, times, strict=True)):
            edges = sorted(draw(st.sets(st.integers(0, n), max_size=4))) if came else []
            parts += [(document, *each) for each in zip(edges[::2], edges[1::2], strict=False) if each != (0, n)]
        past = Remaining(np.array(times, np.int32), Pieces(*np.array(parts, np.int64).reshape(-1, 3).T))
    shares = np.array([draw(st.integers(1, 9)) for _ in strata], float)
    total = curriculum.total_tokens - origin
    if len(strata) > 1 and draw(st.booleans()):  # the run ends where an epoch of the first does, as at a cap
        sizes = lengths + ([] if past is None else (past.pieces.stops - past.pieces.starts).tolist())
        epochs = itertools.islice(plain_epochs(strata[0][1], past), draw(st.integers(1, 3)))
        exactly = sum(sizes[d] for documents, _ in epochs for d in documents)
        if exactly < total:
            shares[0] = shares[1:].sum() * exactly / (total - exactly)
    strata = [
        (Stratum(name=f"s{number}", share=share, **about), members)
        for number, (share, (about, members)) in enumerate(zip((shares / shares.sum()).tolist(), strata, strict=True))
    ]
    return sources, lengths, strata, curriculum, past, origin


def plain_epochs(members, past):
    """Of each epoch in turn: what comes in it before it is shuffled, and how often that was read before."""
    times = [0] * (members[-1] + 1) if past is None else past.times.tolist()
    parts = [] if past is None else past.pieces.documents.tolist()
    own = [(len(times) + piece, times[d] - 1) for piece, d in enumerate(parts) if d in members]
    most = max(times[d] for d in members)
    for level in itertools.count(min([times[d] for d in members] + [came for _, came in own])):
        if level >= most:
            yield members, level
        else:
            yield [d for d in members if times[d] <= level] + [piece for piece, came in own if came == level], level


def read_most(members, past):
    """How often one of them had been read at most."""
    return 0 if past is None else max(int(past.times[d]) for d in members)


def shuffled(documents, *seed):
    found = np.array(documents, np.uint32)
    np.random.default_rng(seed).shuffle(found)
    return found.tolist()


def plain_draw(stratum, members, number, lengths, ends, seed, past):
    """As `drawing.draw`: visits, those up to each stage's end and their tokens, beginnings of epochs, most, again."""
    total = math.ceil(stratum.share * ends[-1] * (1 - 1e-12))
    sizes = []
    for documents, _ in plain_epochs(members, past):
        if sum(sizes) >= total:
            break
        sizes.append(sum(lengths[d] for d in documents))
    if sum(sizes) != total:
        total = math.ceil(stratum.share * (ends[-1] + 1))
    targets = [*(round(stratum.share * end) for end in ends[:-1]), total]
    visits, stage_visits, stage_tokens, starts, most, again, before = [], [], [], [], None, 0, 0
    for epoch, (documents, level) in enumerate(plain_epochs(members, past)):
        most = level if most is None else most
        left, tokens = shuffled(documents, seed[0], 0, number, epoch, *seed[1:]), before
        size = sum(lengths[d] for d in left)
        begins, taken = len(visits), []
        while targets and targets[0] <= before + size:
            target = targets.pop(0)
            while left and tokens + lengths[left[0]] < target:
                tokens += lengths[left[0]]
                taken.append(left.pop(0))
            if left and tokens < target:
                near = [(abs(lengths[d] - (target - tokens)), at) for at, d in enumerate(left[: drawing.CANDIDATES])]
                if not targets:  # the run's end is reached
                    near = [(miss, at) for miss, at in near if lengths[left[at]] >= target - tokens]
                miss, at = min(near)
                if not targets or miss < target - tokens:
                    left[0], left[at] = left[at], left[0]
                    tokens += lengths[left[0]]
                    taken.append(left.pop(0))
            stage_visits.append(begins + len(taken))
            stage_tokens.append(tokens)
        taken += left if targets else []
        visits += taken
        if taken and epoch:
            starts.append(begins)
        most += bool(taken)
        again += sum(lengths[d] for d in taken) if level else 0
        if not targets:
            return visits, stage_visits, stage_tokens, starts, max(most, read_most(members, past)), again
        before += size
    return None


def plain_draw_all(members, lengths, ends, seed, past):
    """As `drawing.draw_all`."""
    visits, starts, again, tokens, most = [], [], 0, 0, None
    for epoch, (documents, level) in enumerate(plain_epochs(members, past)):
        most = level if most is None else most
        starts += [len(visits)] if epoch else []
        most += tokens < ends[-1]
        for document in shuffled(documents, seed[0], 0, 0, epoch, *seed[1:]):
            again += min(lengths[document], ends[-1] - tokens) if level and tokens < ends[-1] else 0
            visits.append(document)
            tokens += lengths[document]
            if tokens > ends[-1]:
                return visits, [len(visits)] * len(ends), list(ends), starts, max(most, read_most(members, past)), again
    return None


def plain_order(strata, lengths, curriculum, past, origin, seed):
    """As `order.build_order`: visits, stratum of each, and the facts."""
    plan = curriculum.plan_from(origin)
    ends = [stage.end_token - origin for stage in plan]
    seeds = [seed] if past is None else [seed, 1 + origin]
    if len(strata) == 1:
        draws = [plain_draw_all(strata[0][1], lengths, ends, seeds, past)]
    else:
        draws = [plain_draw(*each, number, lengths, ends, seeds, past) for number, each in enumerate(strata)]
    visits, cuts, done = [], [], [0] * len(draws)
    for place, stage in enumerate(plan):
        rng = np.random.default_rng([seed, 1, stage.number, *seeds[1:]])
        while any(left := [each[1][place] - n for each, n in zip(draws, done, strict=True)]):
            counts = left if sum(left) <= order.CHUNK else order._counts_of_next(np.array(left), rng).tolist()
            labels = np.repeat(np.arange(len(draws)), counts)
            if len(draws) > 1:
                rng.shuffle(labels)
            for label in labels.tolist():
                visits.append(draws[label][0][done[label]])
                done[label] += 1
                if done[label] in draws[label][3]:
                    cuts.append(len(visits))
    while sum(lengths[d] for d in visits) <= ends[-1]:
        visits.append(draws[0][0][0])
    facts = {
        "stage_tokens": [each[2] for each in draws],
        "cuts": sorted(cuts),
        "origin": origin,
        "most_repeats": [each[4] for each in draws],
        "read_again": [each[5] for each in draws],
    }
    return visits, facts


def small(chunk, candidates):
    """Pieces of so many documents, and a choice among so many, in place of those that suit a large corpus."""
    patches = contextlib.ExitStack()
    for module in (order, drawing, documents_of):
        patches.enter_context(mock.patch.object(module, "CHUNK", chunk))
    patches.enter_context(mock.patch.object(drawing, "CANDIDATES", candidates))
    return patches


@settings(max_examples=40, deadline=None)
@given(
    case=orders(),
    seed=st.integers(0, 2**40),
    chunk=st.sampled_from([5, 1 << 20]),
    few=st.sampled_from([2, 4096]),
    data=st.data(),
)
def test_an_order_is_that_of_a_document_at_a_time(tmp_path_factory, case, seed, chunk, few, data):
    """`build_order` with `draw`, `draw_all`, `_advance`, `_Epochs`, `_interleave`, `_Writer`, and `Order` over it."""
    sources, lengths, strata, curriculum, past, origin = case
    documents = Documents([f"n{number}" for number in range(len(sources))], [Shards(each) for each in sources])
    documents.empty, planned, file = 7, [stratum for stratum, _ in strata], io.BytesIO()
    pieces = Pieces.none() if past is None else past.pieces
    lengths, n = lengths + (pieces.stops - pieces.starts).tolist(), len(lengths)
    with small(chunk, few):
        told = order.build_order(documents, planned, curriculum, seed=seed, file=file, origin=origin, past=past)
        visits, facts = plain_order(strata, lengths, curriculum, past, origin, seed)
    columns = [column.astype(np.int64).tobytes() for column in (pieces.documents, pieces.starts, pieces.stops)]
    digest = hashlib.blake2b(np.array(visits, np.uint32).tobytes() + b"".join(columns), digest_size=16).hexdigest()
    facts |= {"visits": len(visits), "pieces": len(pieces), "digest": digest, "empty": 7}
    assert {name: told[name] for name in facts} == facts
    path = tmp_path_factory.mktemp("order") / "a.order"
    path.write_bytes(file.getvalue())
    written = order.Order(path, documents)
    assert (written.strata, written.origin, written.digest, written.facts) == (tuple(planned), origin, digest, told)
    assert written.visits.tolist() == visits
    ends = np.cumsum([lengths[d] for d in visits])
    assert written.ends.tolist() == [*ends[63::64], *ends[-1:][: len(visits) % 64]]
    begins = np.array([0, *ends])
    assert [written.address_of_visit(visit) for visit in range(len(visits))] == begins[:-1].tolist()
    whole = [d if d < n else int(pieces.documents[d - n]) for d in visits]
    of_visit = [next(number for number, (_, members) in enumerate(strata) if d in members) for d in whole]
    of_token = np.repeat(of_visit, np.diff(begins))
    for stage, row in zip(curriculum.plan_from(origin), written.delivered(curriculum).tolist(), strict=True):
        own = of_token[stage.first_token - origin : stage.end_token - origin]
        assert np.bincount(own, minlength=len(strata)).tolist() == row
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(of_token))] * 2)))
    assert written.tokens_by_stratum(start, stop).tolist() == np.bincount(of_token[start:stop], minlength=len(strata)).tolist()
    if start < stop:
        touched = np.flatnonzero((ends > start) & (begins[:-1] < stop))
        found = [column.tolist() for column in written.span(start, stop)]
        assert found == [[visits[v] for v in touched], np.diff(begins)[touched].tolist(), ends[touched].tolist()]


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [(0, True), (3, False), (4, True), (5, False), (10, True), (14, False), (19, False), (20, True), (30, True)],
)
def test_epochs_end_behind_what_is_left_and_then_behind_each_whole_one(tokens, ends):
    epochs = drawing._Epochs.__new__(drawing._Epochs)
    epochs.level, epochs.most, epochs.tokens, epochs._known = 0, 2, 10, {0: 4, 1: 6}  # two epochs of what was left
    assert epochs.ends_at(tokens) is ends
