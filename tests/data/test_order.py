"""The order of document visits: sizes that no test corpus has, caps, and where a stratum begins again."""

import os

import numpy as np
import pytest

from nemo_longctx.config import build
from nemo_longctx.data import order
from nemo_longctx.data.best_fit import open_windows
from nemo_longctx.data.corpus import IndexedCorpus
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.mixture import CHUNK, Documents, MixConfig


@pytest.mark.parametrize("left", [[10**9 - 5, 5], [3 * 10**9, 10**9, 7], [4 * 10**9], [CHUNK + 1, 3]])
def test_the_next_visits_of_any_number_that_are_left(left):
    left = np.array(left)
    counts = order._counts_of_next(left, np.random.default_rng(0))
    assert counts.sum() == CHUNK
    assert (counts <= left).all()
    expected = CHUNK * left / left.sum()
    assert (np.abs(counts - expected) <= 6 * np.sqrt(expected + 1)).all()


def test_both_ways_to_draw_have_one_distribution(monkeypatch):
    """Few are left beside what is drawn, where drawing with and without replacement differ most."""
    monkeypatch.setattr(order, "CHUNK", 60)
    left, means, variances = np.array([70, 25, 5]), [], []
    for below in (10**9, 0):
        monkeypatch.setattr(order, "HYPERGEOMETRIC_BELOW", below)
        rng = np.random.default_rng(3)
        drawn = np.array([order._counts_of_next(left, rng) for _ in range(4000)])
        means.append(drawn.mean(0))
        variances.append(drawn.var(0))
    share = left / 100
    np.testing.assert_allclose(means, [60 * share] * 2, rtol=0.03)
    np.testing.assert_allclose(variances, [60 * share * (1 - share) * 40 / 99] * 2, rtol=0.12)


def windows_of(prefixes, curriculum, cache_dir, packing="concatenate", **rules):
    mix = build(MixConfig, {"sources": [{"path": path} for path in prefixes], "share_tolerance": 0.999} | rules)
    opened = order.open_order(mix, Documents.open(mix), curriculum, seed=1, cache_dir=str(cache_dir))
    return open_windows(opened, curriculum, packing=packing, seed=1, document_masking=False)


def times_read(windows):
    """How often each token was read, the padding's 0 left out: document 0 is not in these mixes."""
    tokens = np.concatenate([windows[number]["tokens"] for number in range(len(windows))])
    return np.unique(tokens[tokens > 0], return_counts=True)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("cap", [1, 1.5, 2, 3])
def test_no_document_comes_more_often_than_its_cap(telling_corpora, tmp_path, packing, cap):
    few, many = [150, *[10] * 40, *[20] * 5], np.random.default_rng(0).integers(5, 60, 800).tolist()
    sources = [{"path": path, "weight": 0.5} for path in telling_corpora([few, many])]
    curriculum = Curriculum.constant(seq_length=64, global_batch_size=16, total_steps=16)
    rules = {"sources": sources, "drop_longer": 100, "max_repeats": cap, "on_cap": "renormalize"}
    windows = windows_of([], curriculum, tmp_path, packing, **rules)
    capped = windows.order.strata[0]
    assert capped.repeats(curriculum.total_tokens) == pytest.approx(cap)
    assert capped.most_repeats(curriculum.total_tokens) == np.ceil(cap)
    assert np.bincount(windows.order.visits)[1:46].max() == np.ceil(cap)
    documents, times = times_read(windows)
    assert times[documents < 46_000].max() == np.ceil(cap)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_run_that_reads_everything_once_reads_it_once(telling_corpora, tmp_path, packing):
    """The last label needs one token more than there are."""
    prefixes = telling_corpora([[200, *[8] * 32], [16] * 16])
    curriculum = Curriculum.constant(seq_length=32, global_batch_size=4, total_steps=4)
    windows = windows_of(prefixes, curriculum, tmp_path, packing, drop_longer=100, max_repeats=1)
    tokens, times = times_read(windows)
    assert len(tokens) == curriculum.total_tokens
    assert times.max() == 1


@pytest.mark.parametrize("steps", [4, 7, 20])
def test_what_is_read_again_is_told(telling_corpora, tmp_path, steps):
    """The share of a run that repeats what it has read: all that is beyond one pass."""
    few, many = telling_corpora([[16] * 20, [16] * 4000])
    curriculum = Curriculum.constant(seq_length=32, global_batch_size=4, total_steps=steps)
    once, total = 20 * 16, curriculum.total_tokens
    (alone,) = windows_of([few], curriculum, tmp_path).order.facts["read_again"]
    assert alone == pytest.approx(max(total - once, 0), abs=16)  # to the document that the run ends in
    sources = [{"path": few, "weight": 0.5}, {"path": many, "weight": 0.5}]
    again = windows_of([], curriculum, tmp_path, sources=sources).order.facts["read_again"]
    assert again == [pytest.approx(max(total / 2 - once, 0), abs=16), 0]


@pytest.mark.parametrize("sources", [1, 2])
def test_each_epoch_has_an_order_of_its_own(telling_corpora, tmp_path, sources):
    prefixes = telling_corpora([[16] * 40] * sources)
    curriculum = Curriculum.constant(seq_length=32, global_batch_size=4, total_steps=15 * sources)
    visits = windows_of(prefixes, curriculum, tmp_path).order.visits
    for source in range(sources):
        own = visits[(visits >= 40 * source) & (visits < 40 * source + 40)]
        epochs = [own[at : at + 40].tolist() for at in (0, 40)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(40 * source, 40 * source + 40))] * 2
        assert epochs[0] != epochs[1]


def test_data_is_read_once_for_its_fingerprint_until_a_file_is_touched(telling_corpora, tmp_path, monkeypatch):
    (prefix,) = telling_corpora([[100] * 50])
    curriculum = Curriculum.constant(seq_length=64, global_batch_size=4, total_steps=4)
    read, whole = [], IndexedCorpus.fingerprint
    monkeypatch.setattr(IndexedCorpus, "fingerprint", lambda self, *a: read.append(self.prefix) or whole(self, *a))

    def opened():
        order_ = windows_of([prefix], curriculum, tmp_path / "cache").order
        return order_.path, order_.documents.fingerprint

    first = opened()
    assert opened() == first
    assert len(read) == 1
    os.utime(f"{prefix}.idx")
    assert opened() == first  # touched, and the same
    assert len(read) == 2
    with open(f"{prefix}.bin", "r+b") as tokens:
        tokens.write(b"\xff\x01")
    stat = os.stat(f"{prefix}.bin")
    os.utime(f"{prefix}.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))  # as a tool that keeps times would leave it
    assert opened()[1] != first[1]
    assert len(read) == 3
