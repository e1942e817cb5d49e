"""Held-out windows: the text in its own order, each token once."""

import numpy as np
import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data.evaluation import (
    EvaluationBatchSampler,
    EvaluationConfig,
    EvaluationSet,
    EvaluationWindows,
    blank,
    spread,
)
from nemo_longctx.data.index_file import HEADER


@pytest.mark.parametrize("shards", [[[5, 9, 3, 30, 1]], [[5, 9], [3, 30, 1]]])
@pytest.mark.parametrize("masking", [False, True])
def test_windows_go_through_the_text_once(telling_corpora, shards, masking):
    config = EvaluationConfig(name="held_out", path=tuple(telling_corpora(shards)), seq_length=7)
    windows = EvaluationWindows(config, document_masking=masking)
    text = np.concatenate([1000 * n + np.arange(length) for n, length in enumerate([5, 9, 3, 30, 1])])
    assert len(windows) == (48 - 1) // 7
    for number in range(len(windows)):
        sample = windows[number]
        assert sample["tokens"].tolist() == text[7 * number : 7 * number + 7].tolist()
        assert sample["labels"].tolist() == text[7 * number + 1 : 7 * number + 8].tolist()
        if masking:
            assert sample["loss_mask"].tolist() == (sample["labels"] == sample["tokens"] + 1).tolist()
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_a_part_of_the_samples_is_spread_over_the_whole_text(telling_corpora):
    (path,) = telling_corpora([[20] * 63])
    windows = EvaluationWindows(EvaluationConfig(name="a", path=path, seq_length=10, samples=16), document_masking=False)
    seen = [set((windows[number]["tokens"] // 1000).tolist()) for number in range(len(windows))]
    first = [min(documents) for documents in seen]
    assert len(windows) == 16
    assert first == sorted(first)
    assert max(np.diff([0, *first, 62])) <= 63 / 16 + 1
    more = EvaluationWindows(EvaluationConfig(name="a", path=path, seq_length=10, samples=1000), document_masking=False)
    assert len(more) == 125


@pytest.mark.parametrize(("samples", "micro_batch_size"), [(15, 1), (15, 2), (1, 4), (16, 2)])
def test_any_number_of_ranks_reads_the_same_windows(samples, micro_batch_size):
    sets = [
        EvaluationSet(name="a", seq_length=16, micro_batch_size=micro_batch_size, first_sample=0, samples=samples),
        EvaluationSet(name="b", seq_length=64, micro_batch_size=1, first_sample=samples, samples=5),
    ]
    for limit in (None, 3):
        whole = None
        for world_size, multiple in ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (1, 4)):
            layout = {"multiple": multiple, "limit": limit, "world_size": world_size}
            samplers = [EvaluationBatchSampler(sets, rank=rank, **layout) for rank in range(world_size)]
            batches = [list(sampler) for sampler in samplers]
            assert len({len(each) for each in batches}) == 1
            assert len(batches[0]) == len(samplers[0]) == sum(samplers[0].steps) * multiple
            read = sorted(number for each in batches for batch in each for number in batch if number >= 0)
            whole = whole or read
            assert read == whole
            assert len(set(read)) == len(read) == min(samples, (limit or samples) * micro_batch_size) + min(5, limit or 5)
            for each in batches:  # a step is of one set, and each of its batches has that set's size
                for number, batch in enumerate(each):
                    of = samplers[0].set_of_step(number // multiple)
                    assert len(batch) == of.micro_batch_size
                    assert {(n if n >= 0 else ~n) < samples for n in batch} == {of.name == "a"}


def test_what_cannot_be_evaluated_is_said(telling_corpora):
    (path,) = telling_corpora([[7]])
    with pytest.raises(ConfigError, match="a window and its last label need 8"):
        EvaluationWindows(EvaluationConfig(name="a", path=path, seq_length=7), document_masking=False)
    with pytest.raises(ConfigError, match="part of a metric's name"):
        EvaluationConfig(name="a/b", path=path, seq_length=7)
    with pytest.raises(ConfigError, match=r"data\.validation\.samples=0"):
        EvaluationConfig(name="a", path=path, seq_length=7, samples=0)


def test_an_index_that_lies_is_refused(telling_corpora):
    (path,) = telling_corpora([[40, 50, 60]])
    with open(f"{path}.idx", "r+b") as file:  # document 1 takes 3 tokens of document 0
        file.seek(HEADER.size)
        file.write(np.array([37, 53, 60], np.int32).tobytes())
    with pytest.raises(ConfigError, match="the pointer of sequence 1 is not the sum"):
        EvaluationWindows(EvaluationConfig(name="a", path=path, seq_length=7), document_masking=False)


@pytest.mark.parametrize(
    ("count", "of", "places"), [(1, 9, [4]), (2, 9, [2, 6]), (3, 4, [0, 2, 3]), (4, 4, range(4)), (9, 4, range(4))]
)
def test_places_are_the_middles_of_their_shares(count, of, places):
    assert list(spread(count, of)) == list(places)


@pytest.mark.parametrize("limit", [None, 1, 2, 50])
def test_batches_are_dealt_rank_by_rank_and_filled_up_with_the_last_window(limit):
    sets = [
        EvaluationSet(name="a", seq_length=16, micro_batch_size=3, first_sample=0, samples=20),
        EvaluationSet(name="b", seq_length=16, micro_batch_size=2, first_sample=20, samples=5),
    ]
    for world_size, multiple in ((1, 1), (2, 1), (3, 2)):
        expected = {rank: [] for rank in range(world_size)}
        for each in sets:
            places = spread(each.samples if limit is None else limit * each.micro_batch_size, each.samples)
            windows = [each.first_sample + place for place in places]
            while len(windows) % (each.micro_batch_size * world_size * multiple):
                windows.append(~(each.first_sample + places[-1]))
            while windows:
                for rank in range(world_size):
                    expected[rank].append(windows[: each.micro_batch_size])
                    del windows[: each.micro_batch_size]
        for rank in range(world_size):
            sampler = EvaluationBatchSampler(sets, multiple=multiple, limit=limit, rank=rank, world_size=world_size)
            assert list(sampler) == expected[rank]
            assert len(sampler) == len(expected[rank])
        in_a = sum(len(batch) == 3 for batch in expected[0]) // multiple
        steps = len(expected[0]) // multiple
        assert [sampler.set_of_step(step).name for step in range(steps + 2)] == ["a"] * in_a + ["b"] * (steps + 2 - in_a)


def test_settings_of_a_set_at_their_bounds(telling_corpora):
    def held_out(**changes):
        return EvaluationConfig(**{"name": "a-b_1", "path": "p", "seq_length": 1, **changes})

    assert (held_out().micro_batch_size, held_out().samples) == (1, None)
    assert held_out(name=256).name == "256"
    held_out(name="a" * 100, micro_batch_size=2**16, samples=1, path=("p", "q"))
    for changes, told in [
        ({"name": "a" * 101}, "name='a+': at most 100 letters"),
        ({"name": "a.b"}, r"name='a\.b': letters, digits"),
        ({"name": "-_"}, "name='-_': letters, digits"),
        ({"path": ""}, "path='': name a prefix"),
        ({"path": ("p", "")}, r"path=\('p', ''\): name a prefix"),
        ({"micro_batch_size": 2**16 + 1}, "micro_batch_size=65537: at most 65,536 windows"),
        ({"micro_batch_size": 0}, "micro_batch_size=0: at least 1"),
        ({"seq_length": 0}, "seq_length=0: at least 1"),
        ({"samples": 0}, "samples=0: at least 1"),
    ]:
        with pytest.raises(ConfigError, match=told):
            held_out(**changes)
    (path,) = telling_corpora([[8]])
    assert len(EvaluationWindows(held_out(path=path, seq_length=7), document_masking=False)) == 1
    for outside in (-1, 1):
        with pytest.raises(IndexError):
            EvaluationWindows(held_out(path=path, seq_length=7), document_masking=False)[outside]


def test_a_blank_window_counts_for_nothing(telling_corpora):
    (path,) = telling_corpora([[30]])
    whole = EvaluationWindows(EvaluationConfig(name="a", path=path, seq_length=7), document_masking=True)[1]
    empty = blank(whole)
    assert (whole["loss_mask"].sum(), empty["loss_mask"].sum(), empty["loss_mask"].dtype) == (7, 0, np.float32)
    assert all(empty[key] is whole[key] for key in whole if key != "loss_mask")
