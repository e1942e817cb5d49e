"""A random permutation that is computed, not stored: where does position i of n go? O(1) time and memory at any n."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property

ROUNDS = 6
SHORT = 256  # below this the permutation is a shuffled list: a network on so few halves reaches few of the n! orders
MASK = (1 << 64) - 1


class Permutation:
    """A permutation of range(n), a pure function of (n, key): `permutation[i]`.

    A Feistel network on pairs (left, right) with left < a, right < b and a * b just over n; results past n are sent through
    again ("cycle walking": Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains). A short one is a list shuffled after
    Fisher and Yates, so that each of its orders comes equally often.

    Args:
        n: length of the range.
        key: what makes it random; any text.
    """

    def __init__(self, n: int, key: str):
        self.n = n
        self._a = max(1, math.isqrt(n))
        self._b = -(-n // self._a)
        seed = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(seed[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.n:
            raise IndexError(f"position {position} of {self.n}")
        if self.n < SHORT:
            return self._shuffled[position]
        a, b, keys = self._a, self._b, self._keys
        while True:
            left, right = position % a, position // a
            for i in range(0, ROUNDS, 2):
                left = (left + _mix(right ^ keys[i])) % a
                right = (right + _mix(left ^ keys[i + 1])) % b
            position = left + a * right
            if position < self.n:
                return position

    @cached_property
    def _shuffled(self) -> list[int]:
        order = list(range(self.n))
        for last in range(self.n - 1, 0, -1):
            draw = _mix(self._keys[0] ^ _mix(self._keys[1] + last & MASK))
            other = draw * (last + 1) >> 64
            order[last], order[other] = order[other], order[last]
        return order


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele et al. 2014): every bit of the result depends on every bit of `value`."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
