"""Best-fit packing: the plan is best-fit-decreasing, and a packed run cuts, loses and repeats nothing that it need not."""

import bisect
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.data.best_fit import open_windows
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.data.mixture import Documents, MixConfig, SourceConfig
from nemo_longctx.data.order import open_order
from nemo_longctx.data.packing import assign_bins, count_windows, plan_bins, window_bound

PER_DOCUMENT = 1000  # tests/data/conftest.py


def best_fit_decreasing(rests, seq_length):
    """One rest at a time, as in the paper: each into the fullest bin that still holds it. Free tokens of every bin."""
    free = []
    for rest in sorted(rests, reverse=True):
        place = bisect.bisect_left(free, rest)
        space = free.pop(place) if place < len(free) else seq_length
        bisect.insort(free, space - rest)
    return free


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seq_length=st.integers(2, 1500))
def test_the_plan_is_best_fit_decreasing(data, seq_length):
    rests = np.array(data.draw(st.lists(st.integers(1, seq_length - 1), max_size=120)), np.int64)
    plan = plan_bins(np.bincount(rests, minlength=seq_length), seq_length)
    bins = assign_bins(plan, rests)
    filled = np.bincount(bins, weights=rests, minlength=plan.n_bins)
    assert sorted((seq_length - filled).tolist()) == best_fit_decreasing(rests.tolist(), seq_length)


def test_a_window_of_an_exact_fit_has_no_rest():
    assert count_windows(np.array([8, 16, 24]), 8) == window_bound(np.array([8, 16, 24]), 8) == 6
    assert count_windows(np.array([9, 7, 5, 5]), 8) == 4
    assert window_bound(np.array([9, 7, 5, 5]), 8) == 4


@st.composite
def runs(draw):
    lengths = draw(st.lists(st.integers(1, 150), min_size=1, max_size=40))
    windows = draw(st.lists(st.sampled_from([8, 16, 32, 64]), min_size=1, max_size=3))
    steps = draw(st.lists(st.integers(1, 5), min_size=len(windows), max_size=len(windows)))
    ends = np.cumsum(steps).tolist()
    stages = [StageConfig(until=end / ends[-1], seq_length=length) for end, length in zip(ends, windows, strict=True)]
    return lengths, Curriculum(stages=stages, tokens_per_step=128, total_tokens=128 * ends[-1])


def open_packed(prefixes, curriculum, cache_dir, *, document_masking=True, seed=1):
    # Document 0 is left out for its length, so that 0 is the value of padding alone.
    mix = MixConfig(sources=[SourceConfig(path=path) for path in prefixes], drop_longer=199, share_tolerance=0.999)
    order = open_order(mix, Documents.open(mix), curriculum, seed=seed, cache_dir=str(cache_dir))
    return open_windows(order, curriculum, packing="best_fit", seed=seed, document_masking=document_masking)


def pieces_of(sample):
    """(document, first position, size) of each piece, padding left out."""
    for begin, end in zip(sample["cu_seqlens"][:-1], sample["cu_seqlens"][1:], strict=True):
        tokens = sample["tokens"][begin:end]
        if tokens.any():
            yield int(tokens[0]) // PER_DOCUMENT, int(tokens[0]) % PER_DOCUMENT, len(tokens)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=runs(), seed=st.integers(0, 99))
def test_nothing_is_cut_lost_or_repeated_that_need_not_be(telling_corpora, tmp_path_factory, run, seed):
    lengths, curriculum = run
    windows = open_packed(telling_corpora([[200, *lengths]]), curriculum, tmp_path_factory.mktemp("cache"), seed=seed)
    times, epoch, missing = Counter(), 0, sum(lengths)
    padding = [0] * len(curriculum.plan)
    for number in range(len(windows)):
        stage, sample = curriculum.stage_of_sample(number), windows[number]
        assert len(sample["tokens"]) == stage.seq_length
        size = 0
        for document, first, piece in pieces_of(sample):
            if lengths[document - 1] <= stage.seq_length and not (first or piece == lengths[document - 1]):
                pytest.fail("a document was cut that is not longer than the window")
            for position in range(first, first + piece):
                times[document, position] += 1
                assert times[document, position] == epoch + 1, "it came again while others had not come"
            missing -= piece
            size += piece
            if missing == 0:
                epoch, missing = epoch + 1, sum(lengths)
        padding[stage.number] += stage.seq_length - size
    assert [packed.facts["padding"] for packed in windows.stages] == padding


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=runs(), masking=st.booleans())
def test_loss_counts_real_labels_only(telling_corpora, tmp_path_factory, run, masking):
    lengths, curriculum = run
    windows = open_packed(
        telling_corpora([[200, *lengths]]), curriculum, tmp_path_factory.mktemp("cache"), document_masking=masking
    )
    for number in range(len(windows)):
        sample = windows[number]
        tokens, labels, mask = sample["tokens"], sample["labels"], sample["loss_mask"]
        assert labels[:-1].tolist() == tokens[1:].tolist()
        follows = labels == tokens + 1
        same_document = (labels % PER_DOCUMENT > 0) & follows
        if masking:
            assert (mask == same_document).all()
        else:
            assert (mask[same_document] == 1).all()
            last = np.flatnonzero(tokens)[-1] if tokens.any() else 0  # nothing after the last real token counts
            assert not mask[last + 1 :].any()
            assert sample["position_ids"].tolist() == list(range(len(tokens)))
            assert (mask[:last] == 1).all()


def test_an_unknown_packing(telling_corpora, tmp_path):
    curriculum = Curriculum.constant(seq_length=8, global_batch_size=2, total_steps=2)
    order = open_packed(telling_corpora([[200] + [10] * 9]), curriculum, tmp_path).order
    with pytest.raises(ConfigError, match=r"data\.packing='first_fit'"):
        open_windows(order, curriculum, packing="first_fit", seed=1, document_masking=False)
