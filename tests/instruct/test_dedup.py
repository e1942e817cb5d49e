"""Near-duplicate questions: as an exhaustive exact search finds them."""

import random

import numpy as np
import pytest

from nemo_longctx.instruct import dedup
from nemo_longctx.instruct.dedup import NearDuplicates, _shingles


def test_a_signature_s_hash_changes_half_of_its_bits_with_any_bit_of_a_shingle():
    near = NearDuplicates(0.6)
    draw = random.Random(1)
    values = [draw.getrandbits(32) for _ in range(20)]

    def bits(value):
        return np.unpackbits(near._signature(frozenset([value])).view(np.uint8))

    flips = [np.mean(bits(value) != bits(value ^ (1 << bit))) for value in values for bit in range(0, 32, 3)]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.01)
    assert min(flips) > 0.45


def test_agrees_with_exhaustive_search():
    draw = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    questions = []
    for _ in range(150):
        question = [draw.choice(words) for _ in range(draw.randint(6, 20))]
        questions.append(question)
        for _ in range(draw.randint(0, 2)):  # variants with a word or two changed
            variant = list(question)
            for _ in range(draw.randint(0, 2)):
                variant[draw.randrange(len(variant))] = draw.choice(words)
            questions.append(variant)
    threshold, near, kept = 0.6, NearDuplicates(0.6), []
    missed = 0
    for index, question in enumerate(questions):
        text = " ".join(question) + "?"
        shingles = _shingles(text)
        exact = any(len(shingles & other) >= threshold * len(shingles | other) for other in kept)
        found = near.add(str(index), text) is not None
        assert not found or exact  # never drops what is no near-duplicate
        missed += exact and not found
        if not found:
            kept.append(shingles)
    assert len(kept) < len(questions)
    assert missed <= 2  # 4 in a hundred pairs at exactly 0.6 share no band


def test_case_punctuation_and_names():
    near = NearDuplicates(0.8)
    assert near.add("a", "Who commanded the Resolution in 1773?") is None
    assert near.add("b", "who commanded  the “Resolution”, in 1773") == "a"
    assert near.add("c", "Who built the Adventure in 1771?") is None
    assert near.add("d", "???") is None
    assert near.add("e", "???") == "d"
    assert near.add("f", "!!!") is None


@pytest.mark.parametrize(("similarity", "found"), [(0.67, 0.9993), (0.5, 0.87)])
def test_a_pair_shares_a_band_as_often_as_is_said(similarity, found):
    digits = len(str(found)) - 2
    assert round(1 - (1 - similarity**dedup._ROWS) ** dedup._BANDS, digits) == found
