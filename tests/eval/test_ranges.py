"""Ranges of tokens that are kept together, and the tokens of a stretch of text."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.eval.requests import clip, union
from nemo_longctx.eval.truncation import token_span

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda r: (r[0], r[0] + r[1])), max_size=8)


def points(ranges):
    return {place for start, end in ranges for place in range(start, end)}


@settings(max_examples=200, deadline=None)
@given(RANGES, st.integers(0, 40))
def test_a_union_holds_the_same_tokens_in_the_fewest_ranges(ranges, end):
    merged = union(ranges)
    assert points(merged) == points(ranges)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))
    assert points(clip(ranges, end)) == {place for place in points(ranges) if place < end}
    assert all(start < stop for start, stop in clip(ranges, end))


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [
        (0, 3, (1, 2)),
        (0, 4, (1, 3)),
        (3, 4, (2, 3)),
        (2, 3, (1, 2)),
        (3, 7, (2, 4)),
        (0, 7, (1, 4)),
        (7, 9, (0, 0)),
        (3, 3, (0, 0)),
    ],
)
def test_a_span_has_the_tokens_that_touch_its_characters(start, end, span):
    offsets = [(0, 0), (0, 3), (3, 5), (5, 7), (0, 0)]  # <s>, three tokens, </s>
    assert token_span(offsets, start, end) == span
