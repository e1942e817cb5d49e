"""The order of document visits: sizes that no test corpus has, caps, and where a stratum begins again."""

import numpy as np
import pytest

from nemo_longctx.data import order
from nemo_longctx.data.mixture import CHUNK


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
