"""The computed permutation: every order of a few comes as often, and of many it mixes neighbours."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from nemo_longctx.data.permutation import SHORT, Permutation


@pytest.mark.parametrize("n", range(1, 7))
def test_all_orders_of_a_few_come_evenly(n):
    """Chi-square over all n! orders, with 20 draws for each; the bound is 6 standard deviations off its mean."""
    draws = 20 * math.factorial(n)
    found = Counter(tuple(permutation[i] for i in range(n)) for permutation in (Permutation(n, f"{k}") for k in range(draws)))
    orders = list(permutations(range(n)))
    chi = sum((found[order] - 20) ** 2 / 20 for order in orders)
    freedom = len(orders) - 1
    assert chi <= freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [1, 2, SHORT - 1, SHORT, SHORT + 1, 1000, 4096])
def test_it_is_a_permutation_of_its_key(n):
    first, again, other = Permutation(n, "a"), Permutation(n, "a"), Permutation(n, "b")
    order = [first[i] for i in range(n)]
    assert sorted(order) == list(range(n))
    assert order == [again[i] for i in range(n)]
    assert n < 3 or order != [other[i] for i in range(n)]
    for outside in (-1, n):
        with pytest.raises(IndexError):
            Permutation(n, "a")[outside]


@pytest.mark.parametrize("n", [1024, 4096])
def test_neighbours_are_not_neighbours_any_more(n):
    """Two rounds of the network leave nearly all steps between neighbours the same, modulo its first half."""
    a = math.isqrt(n)
    steps = np.concatenate([np.diff([p[i] for i in range(n)]) % a for p in (Permutation(n, f"{k}") for k in range(4))])
    assert np.bincount(steps, minlength=a).max() < 4 * len(steps) / a
    for d in (1, a):
        same = np.mean([Permutation(n, "x")[i + d] - Permutation(n, "x")[i] == d for i in range(0, n - d, 7)])
        assert same < 0.05
