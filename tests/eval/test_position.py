import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.position import PositionLosses, by_model, geometric_edges, read_csv, uniform_edges, write_csv

rng = np.random.default_rng(0)


def test_mean_of_each_bin_is_the_mean_of_its_tokens():
    losses = rng.normal(3, 1, (7, 40))
    totals = PositionLosses([0, 8, 32, 40])
    totals.add(losses)
    rows = totals.rows("m")
    assert [(r.start, r.end, r.tokens) for r in rows] == [(0, 8, 56), (8, 32, 168), (32, 40, 56)]
    np.testing.assert_allclose([r.loss for r in rows], [losses[:, a:b].mean() for a, b in ((0, 8), (8, 32), (32, 40))])


def test_standard_error_of_equal_documents_is_that_of_their_means():
    losses = rng.normal(3, 1, (50, 16)) + rng.normal(0, 2, (50, 1))
    totals = PositionLosses([0, 16])
    totals.add(losses)
    expected = losses.mean(axis=1).std(ddof=1) / math.sqrt(50)
    assert totals.rows("m")[0].standard_error == pytest.approx(expected)
    naive = losses.std(ddof=1) / math.sqrt(losses.size)
    assert expected > 2 * naive  # the trap that document-wise errors avoid


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(4, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_batches_ranks_and_shards_give_the_same_rows(batch, length, bins, seed):
    rng = np.random.default_rng(seed)
    losses, mask = rng.normal(3, 1, (batch, length)), rng.random((batch, length)) < 0.8
    whole = PositionLosses(uniform_edges(length, bins))
    whole.add(losses, mask_BS=mask)
    parts = PositionLosses(whole.edges)
    order = rng.permutation(length)
    for row in range(batch):  # a document a batch, and its positions dealt to two context parallel ranks
        shards = [
            parts.bin_sums(losses[row : row + 1, c], positions_BS=c, mask_BS=mask[row : row + 1, c])
            for c in (order[: length // 2], order[length // 2 :])
        ]
        parts.add_sums(sum(s for s, _ in shards), sum(n for _, n in shards))
    assert parts.documents == whole.documents == batch
    for a, b in zip(parts.rows("m"), whole.rows("m"), strict=True):
        assert (a.start, a.end, a.tokens) == (b.start, b.end, b.tokens)
        assert a.loss == pytest.approx(b.loss, abs=1e-12)
        assert a.standard_error == pytest.approx(b.standard_error, abs=1e-9, nan_ok=True)


def test_masked_losses_may_be_anything_and_counted_ones_may_not():
    losses = np.array([[1.0, math.nan], [2.0, 3.0]])
    totals = PositionLosses([0, 2])
    totals.add(losses, mask_BS=[[1, 0], [1, 1]])
    assert totals.rows("m")[0].loss == pytest.approx(2.0)
    with pytest.raises(ValueError, match="document 0 at position 1 is nan"):
        totals.add(losses)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000, 32768])
def test_edges_cover_every_position_once(length):
    for edges in (uniform_edges(length), geometric_edges(length)):
        assert edges[0] == 0
        assert edges[-1] == length
        assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize("edges", [[0], [0, 0, 4], [4, 2], [-1, 3], [[0, 1]]])
def test_bad_edges_are_refused(edges):
    with pytest.raises(ConfigError, match="edges"):
        PositionLosses(edges)


def test_edges_by_their_definitions():
    assert uniform_edges(640).tolist() == list(range(0, 641, 10))
    assert uniform_edges(3, 64).tolist() == [0, 1, 2, 3]
    assert uniform_edges(10, 1).tolist() == [0, 10]
    for length in (17, 100, 4096, 5000):
        plain = sorted({0, length, *(n for k in range(60) if (n := math.floor(16 * 2 ** (k / 4))) < length)})
        assert geometric_edges(length).tolist() == plain
    assert geometric_edges(64, per_octave=1, first=1).tolist() == [0, 1, 2, 4, 8, 16, 32, 64]
    assert geometric_edges(16).tolist() == geometric_edges(16, first=99).tolist() == [0, 16]
    for bad in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="both must be at least 1"):
            uniform_edges(*bad)
    for more in ({"seq_length": 0}, {"per_octave": 0}, {"first": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            geometric_edges(**{"seq_length": 64, **more})


def test_a_bin_s_context_is_the_mean_of_its_positions_contexts():
    totals = PositionLosses([0, 1, 5, 8])
    totals.add(np.ones((1, 8)))
    expected = [np.mean([p + 1 for p in range(a, b)]) for a, b in ((0, 1), (1, 5), (5, 8))]
    assert totals.context.tolist() == [row.context for row in totals.rows("m")] == expected


def test_positions_outside_the_edges_are_left_out_and_empty_bins_have_no_row():
    losses = np.arange(10.0)[None]
    totals = PositionLosses([2, 4, 6])
    totals.add(losses)
    assert [(row.start, row.tokens, row.loss) for row in totals.rows("m")] == [(2, 2, 2.5), (4, 2, 4.5)]
    losses[0, 9] = math.nan  # and may be anything
    totals.add(losses, positions_BS=np.arange(10), mask_BS=[1, 1, 0, 0, 1, 1, 1, 1, 1, 1])
    sums, counts = totals.by_document()
    assert (sums.tolist(), counts.tolist()) == ([[5.0, 9.0], [0.0, 9.0]], [[2, 2], [0, 2]])
    empty = PositionLosses([0, 2, 4])
    assert [part.shape for part in empty.by_document()] == [(0, 2), (0, 2)]
    assert (empty.documents, empty.rows("m")) == (0, [])
    for sums, counts in (([[1.0]], [[1]]), ([[1.0, 2.0]], [[1]])):
        with pytest.raises(ValueError, match=r"must be \[documents, 2\]"):
            empty.add_sums(sums, counts)


@pytest.mark.parametrize("count", [2, 5])
def test_the_error_of_documents_of_unlike_length_is_the_ratio_estimator_s(count):
    rng = np.random.default_rng(3)
    losses, mask = rng.normal(3, 1, (count, 8)), rng.random((count, 8)) < 0.6
    totals = PositionLosses([0, 8])
    totals.add(losses, mask_BS=mask)
    sums, counts = [row[keep].sum() for row, keep in zip(losses, mask, strict=True)], mask.sum(1).tolist()
    mean = sum(sums) / sum(counts)
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    (row,) = totals.rows("m")
    assert (row.loss, row.tokens) == (pytest.approx(mean), sum(counts))
    assert row.standard_error == pytest.approx(math.sqrt(count / (count - 1) * squares) / sum(counts))


def test_csv_goes_round(tmp_path):
    totals = PositionLosses([0, 4, 8])
    totals.add(rng.normal(3, 1, (3, 8)))
    single = PositionLosses([0, 8])
    single.add(rng.normal(3, 1, (1, 8)))
    rows = totals.rows("before") + single.rows("after, with comma")
    write_csv(tmp_path / "a" / "b" / "loss.csv", rows)
    back = read_csv(tmp_path / "a" / "b" / "loss.csv")
    assert list(by_model(back)) == ["before", "after, with comma"]
    for a, b in zip(rows, back, strict=True):
        assert (a.model, a.start, a.end, a.tokens) == (b.model, b.start, b.end, b.tokens)
        assert b.loss == pytest.approx(a.loss, abs=1e-6)
        assert (a.documents, b.documents) == ((3, 3) if a.model == "before" else (1, 1))
        assert b.standard_error == pytest.approx(a.standard_error, rel=1e-5, nan_ok=True)
    (tmp_path / "old.csv").write_text("model,start,end,tokens,loss,standard error\na,0,4,9,2.5,0.1\n", encoding="utf-8")
    assert read_csv(tmp_path / "old.csv")[0].documents == 0  # of an earlier version
    (tmp_path / "bad.csv").write_text("model,start\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.csv has no column 'end'"):
        read_csv(tmp_path / "bad.csv")
