"""What blocks, segments and boundaries stand for, counted pair by pair without torch."""

import random

import numpy as np
import pytest

from nemo_longctx.attention.documents import (
    Segment,
    check_cu_seqlens,
    context_parallel_segments,
    cu_seqlens_from_position_ids,
    document_ids_from_cu_seqlens,
    document_segments,
    position_ids_from_cu_seqlens,
    zigzag_chunks,
    zigzag_positions,
)
from nemo_longctx.attention.windows import Block, Part, blocks_of
from nemo_longctx.config import ConfigError


def seen(blocks):
    """(query row, key row) of each part of each block, as the parts are defined; none may come twice."""
    found = []
    for block in blocks:
        for repeat in range(block.repeats):
            for part in block.parts:
                queries, first = part.queries or block.rows, part.start + repeat * part.size
                for row in range(queries):
                    if part.reversed:
                        keys = range(row, part.used)
                        assert part.causal
                    else:
                        keys = range(row + 1) if part.causal else range(part.size)
                    query = block.q_start + repeat * block.rows + row
                    found += [(query, first + key) for key in keys]
    assert len(found) == len(set(found))
    return set(found)


def band(segments, window):
    return {
        (row, key)
        for s in segments
        for row in range(s.q_start, s.q_end)
        for own in [s.k_start + (s.k_end - s.k_start) - (s.q_end - row)]
        for key in range(max(s.k_start, own - window + 1) if window else s.k_start, own + 1)
    }


def segments_of(draw):
    made, row, key = [], 0, draw.choice((0, 3))
    for _ in range(draw.randint(1, 3)):
        n, prefix = draw.randint(1, 12), draw.choice((0, 0, 1, 2, 9))
        made.append(Segment(row, row + n, key, key + n + prefix))
        assert made[-1].prefix == prefix
        row, key = row + n, key + n + prefix
    return tuple(made)


def test_blocks_are_the_band_and_nothing_else():
    draw, kinds = random.Random(1), set()
    for _ in range(300):
        segments, window = segments_of(draw), draw.choice((None, 1, 2, 3, 5, 8, 40))
        blocks = blocks_of(segments, window)
        assert seen(blocks) == band(segments, window)
        # The rows of queries are covered in order, once each.
        rows = [row for block in blocks for row in range(block.q_start, block.q_end)]
        assert rows == list(range(segments[-1].q_end))
        for block in blocks:
            assert block.repeats == 1 or window is not None
            kinds |= {(part.causal, part.reversed) for part in block.parts}
    assert kinds == {(True, False), (False, False), (True, True)}


def test_blocks_of_a_window_are_a_handful_whatever_the_length():
    for length in (64, 640, 6400):
        blocks = blocks_of((Segment(0, length, 0, length),), 8)
        assert len(blocks) == 2
        assert sum(block.rows * block.repeats for block in blocks) == length
    (block,) = blocks_of((Segment(0, 5, 0, 5),), None)
    assert block == Block(0, 5, 1, (Part(0, 5, causal=True),))
    assert blocks_of((Segment(0, 1, 2, 6),), None) == (Block(0, 1, 1, (Part(2, 4),)),)
    part = Part(0, 4)
    assert (part.causal, part.reversed, part.queries, part.used) == (False, False, 0, 4)
    assert [Part(0, 4, causal=True, reversed=True, queries=n).used for n in (3, 4)] == [3, 4]


@pytest.mark.parametrize(
    ("ends", "shown", "said"),
    [
        ((), "()", "must begin with 0 and end with the number of tokens, 9"),
        ((9,), "(9,)", "must begin with 0"),
        ((0,), "(0,)", "must begin with 0"),
        ((1, 9), "(1, 9)", "must begin with 0"),
        ((0, 8), "(0, 8)", "must begin with 0"),
        ((0, 1, 2, 3, 4, 10), "(0, 1, 2, 3, 4, 10)", "must begin with 0"),
        ((0, 1, 2, 3, 4, 5, 10), "(0, 1, 2, '...', 5, 10)", "must begin with 0"),
        ((0, 5, 4, 9), "(0, 5, 4, 9)", "must not fall: each entry is the end of a document"),
        ((0, 5, 4, 6, 7, 8, 9), "(0, 5, 4, 6, 7, 8)", "must not fall"),
    ],
)
def test_boundaries_that_are_none_are_shown(ends, shown, said):
    for key in ("cu_seqlens", "mine"):
        with pytest.raises(ConfigError) as error:
            check_cu_seqlens(ends, 9, key=key)
        assert str(error.value).startswith(f"{key}={shown}: {said}")
    assert check_cu_seqlens(np.array([0, 4, 4, 9]), 9) == (0, 4, 4, 9)
    assert check_cu_seqlens((0, 0), 0) == (0, 0)


@pytest.mark.parametrize("wrong", [[], [[0, 1]], [1, 2], [-1, 0]])
def test_positions_that_are_of_no_window_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"position_ids=.*: must be one window of positions that begins with 0"):
        cu_seqlens_from_position_ids(np.array(wrong))


def test_positions_documents_and_boundaries_are_of_one_window():
    ends = np.array([0, 3, 3, 4, 9])
    assert position_ids_from_cu_seqlens(ends).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert document_ids_from_cu_seqlens(ends).tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 3]
    found = cu_seqlens_from_position_ids(position_ids_from_cu_seqlens(ends))
    assert (found.tolist(), found.dtype) == ([0, 3, 4, 9], np.int32)
    assert document_segments((0, 3, 3, 4, 9)) == (Segment(0, 3, 0, 3), Segment(3, 4, 3, 4), Segment(4, 9, 4, 9))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_rank_holds_an_early_chunk_and_its_mirror(size):
    chunks = [zigzag_chunks(rank, size) for rank in range(size)]
    assert sorted(each for pair in chunks for each in pair) == list(range(2 * size))
    assert all(early < size and early + late == 2 * size - 1 for early, late in chunks)
    length = 6 * size
    for rank, (early, late) in enumerate(chunks):
        wanted = [*range(3 * early, 3 * early + 3), *range(3 * late, 3 * late + 3)]
        assert zigzag_positions(length, rank, size).tolist() == wanted
    for call in (lambda n: zigzag_positions(n, 0, size), lambda n: context_parallel_segments((0, n), n, 0, size)):
        with pytest.raises(ConfigError) as error:
            call(length + 1)
        mend = f"must be a multiple of {2 * size} (2 x context_parallel_size)"
        assert str(error.value) == f"seq_length={length + 1}: {mend}"


def test_segments_of_a_rank_are_pieces_of_documents_with_all_that_is_before_them():
    """Two windows of 8 tokens on two ranks; documents of 5, 3, 2 and 6."""
    ends = (0, 5, 8, 10, 16)
    assert context_parallel_segments(ends, 8, 0, 2) == (
        Segment(0, 2, 0, 2), Segment(2, 4, 5, 8), Segment(4, 6, 8, 10), Segment(6, 8, 10, 16)
    )  # fmt: skip
    assert context_parallel_segments(ends, 8, 1, 2) == (
        Segment(0, 2, 0, 4), Segment(2, 3, 0, 5), Segment(3, 4, 5, 6), Segment(4, 6, 10, 12), Segment(6, 8, 10, 14)
    )  # fmt: skip
