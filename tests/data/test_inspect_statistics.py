"""Statistics of lengths against a plain count over the documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.data.statistics import LengthCounts, describe, thresholds

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


def test_what_is_described_is_that_of_the_lengths():
    lengths = [5, 5, 8, 100, 4096, 4097, 5000, 8192, 9000, 1 << 20]
    told = describe(LengthCounts.of([np.array(lengths[:3]), np.array([0, *lengths[3:]])]), 8192)
    mean = sum(lengths) / 10
    assert told["length"] == {"shortest": 5, "median": 4096, "mean": mean, "p90": 9000, "p99": 1 << 20, "longest": 1 << 20}
    assert (told["documents"], told["empty_documents"], told["tokens"]) == (10, 1, sum(lengths))
    assert list(map(int, told["share_of_tokens_at_least"])) == [4096 << n for n in range(9)]
    for length, share in told["share_of_tokens_at_least"].items():
        assert share == pytest.approx(sum(n for n in lengths if n >= int(length)) / sum(lengths))
    chance = [min(1, (n - 1) / 8192) for n in lengths]
    tokens = sum(p * n for p, n in zip(chance, lengths, strict=True)) / sum(lengths)
    cut = {"documents": pytest.approx(sum(chance) / 10), "tokens": pytest.approx(tokens)}
    longer = {"documents": 0.2, "tokens": pytest.approx((9000 + (1 << 20)) / sum(lengths))}
    assert told["cut"] == {"seq_length": 8192, "concatenate_and_chunk": cut, "best_fit": longer}
    assert (thresholds(4095, None), thresholds(4096, 4096), thresholds(8192, 7)) == ([4096], [4096], [7, 4096, 8192])
    assert thresholds(1 << 40, None)[-1] == 4096 << 19
