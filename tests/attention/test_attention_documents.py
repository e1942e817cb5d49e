"""Boundaries, positions and segments say the same thing in every form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.attention.core import _sdpa_segments, causal_attention
from nemo_longctx.attention.documents import (
    check_cu_seqlens,
    context_parallel_segments,
    cu_seqlens_from_position_ids,
    document_ids_from_cu_seqlens,
    document_segments,
    position_ids_from_cu_seqlens,
    zigzag_positions,
)
from nemo_longctx.config import ConfigError

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(LENGTHS)
def test_positions_and_boundaries_are_each_others_inverse(lengths):
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    positions = position_ids_from_cu_seqlens(cu_seqlens)
    np.testing.assert_array_equal(cu_seqlens_from_position_ids(positions), cu_seqlens)
    np.testing.assert_array_equal(np.bincount(document_ids_from_cu_seqlens(cu_seqlens)), lengths)
    assert positions.max() == max(lengths) - 1


def pairs(segments):
    """Every (query row, key row) that `segments` let see each other."""
    return {
        (row, key)
        for s in segments
        for row in range(s.q_start, s.q_end)
        for key in range(s.k_start, s.k_start + s.prefix + row - s.q_start + 1)
    }


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]))
def test_the_ranks_together_see_what_one_process_sees(lengths, cp_size, windows):
    window = 12 * cp_size
    ends = {min(int(end), windows * window) for end in np.cumsum(lengths)}
    cu_seqlens = tuple(sorted({0, *range(0, windows * window + 1, window), *ends}))
    whole = pairs(document_segments(cu_seqlens))
    shared = set()
    for rank in range(cp_size):
        held = np.concatenate([w * window + zigzag_positions(window, rank, cp_size) for w in range(windows)])
        segments = context_parallel_segments(cu_seqlens, window, rank, cp_size)
        mine = {(int(held[row]), key) for row, key in pairs(segments)}
        assert not mine & shared
        shared |= mine
    assert shared == whole


def test_zigzag_shares_the_work_evenly():
    counts = [len(pairs(context_parallel_segments((0, 64), 64, rank, 4))) for rank in range(4)]
    assert len(set(counts)) == 1


@pytest.mark.parametrize("wrong", [(), (0,), (1, 8), (0, 7), (0, 5, 3, 8)])
def test_wrong_boundaries_are_refused(wrong):
    with pytest.raises(ConfigError, match="cu_seqlens"):
        check_cu_seqlens(wrong, 8)


def test_an_empty_document_is_a_boundary_too():
    assert check_cu_seqlens((0, 3, 3, 8), 8) == (0, 3, 3, 8)
    assert pairs(document_segments((0, 3, 3, 8))) == pairs(document_segments((0, 3, 8)))


def test_a_window_that_begins_inside_a_document_is_refused():
    with pytest.raises(ConfigError, match="begins with 0"):
        cu_seqlens_from_position_ids(np.array([3, 4, 0, 1]))


def test_a_length_that_cannot_be_halved_for_every_rank_is_refused():
    with pytest.raises(ConfigError, match="multiple of 4"):
        zigzag_positions(30, 0, 2)


def test_public_sdpa_form_agrees():
    """What CUDA runs for float32, on the CPU's kernel, for the segments that it has here (as many keys as queries)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 30, h, 16, generator=generator) for h in (4, 2, 2))
    segments = document_segments((0, 9, 30))
    torch.testing.assert_close(_sdpa_segments(q, k, v, segments, 0.25), causal_attention(q, k, v, segments=segments))
