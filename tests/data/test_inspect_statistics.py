"""Statistics of lengths against a plain count over the documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.data.statistics import LengthCounts, describe

lengths_of_documents = st.lists(st.integers(1, 300) | st.integers(1 << 20, 1 << 22), min_size=1, max_size=60)


@settings(max_examples=30, deadline=None)
@given(lengths=lengths_of_documents, n_pieces=st.integers(1, 5), seq_length=st.integers(1, 400))
def test_counts_agree_with_the_documents_one_by_one(lengths, n_pieces, seq_length):
    counts = LengthCounts.of(np.array_split(np.array(lengths, np.int32), n_pieces))
    assert (counts.documents, counts.tokens) == (len(lengths), sum(lengths))
    assert np.repeat(counts.values, counts.counts).tolist() == sorted(lengths)
    rows = counts.histogram()
    assert sum(row["documents"] for row in rows) == len(lengths)
    assert sum(row["tokens"] for row in rows) == sum(lengths)
    for row in rows:
        assert row["documents"] == sum(row["at_least"] <= length < row["below"] for length in lengths)
    for limit in (1, 100, seq_length, 1 << 21):
        expected = sum(length for length in lengths if length >= limit) / sum(lengths)
        assert counts.share_of_tokens_at_least(limit) == pytest.approx(expected)
    for share in (0.1, 0.5, 0.99):
        quantile = counts.quantile(share)
        assert sum(length <= quantile for length in lengths) >= share * len(lengths)
        assert sum(length < quantile for length in lengths) < share * len(lengths)


def test_the_expected_cuts_are_those_of_a_shuffled_stream():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 1.2, size=200_000).astype(np.int64) + 1, 5000)
    ends = np.cumsum(lengths)
    for seq_length in (256, 1024):
        cut = (ends - lengths) // seq_length != (ends - 1) // seq_length
        documents, tokens = LengthCounts.of([lengths]).cut_by_chunks(seq_length)
        assert documents == pytest.approx(cut.mean(), abs=0.005)
        assert tokens == pytest.approx(lengths[cut].sum() / lengths.sum(), abs=0.005)
        documents, tokens = LengthCounts.of([lengths]).cut_by_best_fit(seq_length)
        assert documents == (lengths > seq_length).mean()
        assert tokens == pytest.approx(lengths[lengths > seq_length].sum() / lengths.sum())


def test_thresholds_double_from_4k_to_the_longest_and_include_the_window():
    values = describe(LengthCounts.of([np.array([10, 70_000])]), 2048)
    assert list(values["share_of_tokens_at_least"]) == ["2048", "4096", "8192", "16384", "32768", "65536"]
    assert values["share_of_tokens_at_least"]["65536"] == pytest.approx(70_000 / 70_010)
    assert "cut" not in describe(LengthCounts.of([np.array([10])]), None)
