"""The analysis against direct sums, against the theorem it states, and against the paper's figures."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.rope.analysis import (
    BLOCK,
    advise,
    candidates,
    first_negative,
    granularity,
    helix,
    raw_scores,
    sine_similarity,
    smallest_base,
    wavelengths,
)
from nemo_longctx.rope.rotation import rotate
from nemo_longctx.rope.variants import AbfRope, LongRope, PiRope, Rope, XposRope, YarnRope

YARN = YarnRope(factor=4.0, original_max_position_embeddings=1024)


@pytest.mark.parametrize("variant", [Rope(), AbfRope(), PiRope(factor=4.0), YARN, XposRope()], ids=lambda v: v.variant)
@pytest.mark.parametrize("rotary_dim", [32, 16])
def test_raw_scores_are_the_scores_of_rotated_ones(variant, rotary_dim):
    """Figure 4's shortcut formula against q and k of ones, rotated to their places."""
    ones_TD, kwargs = np.ones((600, 32)), {"rotary_dim": rotary_dim}
    q_TD = rotate(ones_TD, np.arange(600), variant, is_key=False, **kwargs)
    k_1D = rotate(ones_TD[:1], np.zeros(1), variant, is_key=True, **kwargs)
    expected = (q_TD @ k_1D.T)[:, 0] / math.sqrt(32)
    np.testing.assert_allclose(raw_scores(variant, 600, head_dim=32, rotary_dim=rotary_dim), expected, atol=1e-10)


def test_figure_4_starts_at_11_3():
    assert raw_scores(AbfRope(), 1, head_dim=128)[0] == pytest.approx(11.3, abs=0.05)


def test_figure_4_orders_the_variants():
    """RoPE is near 0 by 5,000; ABF decays far more slowly; xPos ABF is smoother than both."""
    far = slice(5000, 32_768)
    rope, abf, xpos = (raw_scores(v, 32_768, head_dim=128)[far] for v in (Rope(), AbfRope(), XposRope(base=500_000.0)))
    assert abs(rope.mean()) < 0.6 < 1.5 < abf.mean()
    assert np.abs(np.diff(xpos)).max() < 0.1 * np.abs(np.diff(abf)).max()


def test_theorem_1_limits_are_the_papers():
    assert granularity(AbfRope(base=500_000.0), 128).limit == pytest.approx(0.076, abs=5e-4)
    assert granularity(PiRope(factor=4.0), 128).limit == pytest.approx(0.027, abs=5e-4)


@settings(max_examples=50, deadline=None)
@given(
    variant=st.sampled_from([Rope(), AbfRope(), PiRope(factor=4.0), YARN]),
    sizes=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=32),
)
def test_theorem_1_bounds_hold_for_any_vector(variant, sizes):
    bounds = granularity(variant, 2 * len(sizes), spread=max(sizes) / min(sizes))
    assert bounds.lower * (1 - 1e-9) <= sine_similarity(variant, sizes) <= bounds.upper * (1 + 1e-9)


def test_theorem_1_is_exact_when_all_pairs_weigh_the_same():
    assert sine_similarity(Rope(), [3.0] * 8) == pytest.approx(granularity(Rope(), 16).value, rel=1e-12)


def test_longrope_has_no_limit():
    variant = LongRope(factor=2.0, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_max_position_embeddings=64)
    assert granularity(variant, 8).limit is None


def test_wavelengths_are_full_turns():
    cos, sin = helix(Rope(), 16, 3, np.array([0.0, wavelengths(Rope(), 16)[3]]))
    np.testing.assert_allclose([cos[1], sin[1]], [cos[0], sin[0]], atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(base=st.floats(10.0, 1e5), length=st.integers(2, 3000))
def test_first_negative_is_the_first(base, length):
    theta = Rope(base=base).theta(32)
    direct = np.cos(np.outer(np.arange(length), theta)).sum(axis=1)
    negative = np.flatnonzero(direct < 0)
    assert first_negative(theta, length) == (int(negative[0]) if negative.size else None)


@pytest.mark.parametrize(
    ("length", "theirs"), [(1024, 4.3e3), (2048, 1.6e4), (4096, 2.7e4), (8192, 8.4e4), (16_384, 3.1e5), (32_768, 6.4e5)]
)
def test_smallest_bases_are_those_of_men_et_al(length, theirs):
    """Men et al. 2024, Table 2; they searched a grid, so we may stop a little lower."""
    found = smallest_base(length, 128)
    assert first_negative(Rope(base=found).theta(128), length + 1) is None
    assert 0.7 * theirs < found < 1.15 * theirs


def test_a_search_from_a_base_that_does_not_reach_ends_at_one_that_does():
    """32,768 is reached from 6.3e5, but not from 1e6: reaching is not monotone."""
    assert smallest_base(32_768, 128) < 1e6
    found = smallest_base(32_768, 128, at_least=1e6)
    assert found > 1e6
    assert first_negative(Rope(base=1e6).theta(128), 32_769) == 27_115
    assert first_negative(Rope(base=found).theta(128), 32_769) is None
    assert smallest_base(32_768, 128, at_least=found) == found


@pytest.mark.parametrize("spread", [0.5, math.nan, math.inf])
def test_a_spread_that_bounds_nothing_is_refused(spread):
    with pytest.raises(ConfigError, match="spread="):
        granularity(Rope(), 16, spread=spread)


def test_advice_knows_what_each_variant_is_for():
    rows = {row.variant["variant"]: row for row in advise(candidates(4096, 32_768, 1e4, 1e7), trained=4096, target=32_768,
                                                          base=1e4, head_dim=128)}  # fmt: skip
    assert rows["rope"].unseen_pairs > 0
    assert rows["pi"].unseen_pairs == 0
    assert rows["abf"].reaches is None
    assert rows["rope"].reaches < 4096
    assert rows["pi"].granularity < rows["yarn"].granularity < rows["rope"].granularity


def test_the_smallest_base_reaches_its_length_and_no_base_of_the_search_before_it_does():
    """`length` itself is reached, too; the distances are summed one by one."""

    rotary_dim = 16

    def reaches(base, length):
        theta = base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
        return all(np.cos(m * theta).sum() >= 0 for m in range(length + 1))

    for length in range(3, 33, 3):
        base = smallest_base(length, rotary_dim)
        assert reaches(base, length)
        assert base == 1.5 or not reaches(base / 1.01, length)
        assert smallest_base(length, rotary_dim, at_least=base) == base
        assert smallest_base(length, rotary_dim, at_least=base / 1.01) == pytest.approx(base)


@pytest.mark.parametrize("variant", [AbfRope(base=5e4), XposRope(base=5e4)], ids=lambda v: v.variant)
def test_a_part_of_the_scores_is_that_part_of_them_all(variant):
    whole = raw_scores(variant, 1500, head_dim=32)
    np.testing.assert_allclose(raw_scores(variant, 1500, head_dim=32, first=4 * BLOCK), whole[4 * BLOCK :], atol=1e-12)


def test_long_targets_take_no_cosine_for_each_pair_and_distance(monkeypatch):
    """`rope advise --to 10M` was silent for half a minute, most of it in xPos' cosines, one for each pair and distance."""
    counted, cos = [], np.cos
    monkeypatch.setattr(np, "cos", lambda values: counted.append(np.size(values)) or cos(values))
    advise(candidates(1024, 40_000, 1e4, 1e6), trained=1024, target=40_000, base=1e4, head_dim=64)
    assert sum(counted) < 40_000 * 32
