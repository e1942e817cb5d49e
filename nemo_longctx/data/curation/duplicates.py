"""Exact and near duplicates among any number of documents: a band of the signatures at a time, everything else on disk.

Two documents are compared where a band of their MinHash signatures agrees (locality-sensitive hashing, Leskovec et al., chapter
3), and are duplicates where the whole signatures agree in the asked share. Of each group that hangs together the first stays.
Memory is some 40 bytes a document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nemo_longctx.config import ConfigError

_RECALL = 0.99  # of pairs exactly at the threshold
_PAIRS = 1 << 16  # pairs compared at once


def bands_for(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows of each) with the fewest needless comparisons that still meet 99 % of the pairs at the threshold.

    Raises:
        ConfigError: too low a threshold for so many permutations.
    """
    for rows in range(permutations // 2, 0, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    raise ConfigError("near_duplicates", threshold, "too low for MinHash to find; use 0.3 or more, or 0 for none")


def band_hashes(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64 [bands, n] of signatures uint32 [n, permutations]."""
    found = np.zeros((bands, len(signatures)), np.uint64)
    for band in range(bands):
        for column in range(band * rows, (band + 1) * rows):
            found[band] = (found[band] ^ signatures[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            found[band] ^= found[band] >> np.uint64(29)
    return found


def first_of_equal(digests: np.ndarray) -> np.ndarray:
    """For each of `digests` (any type that sorts, [n]) the number of the first one that equals it, int64 [n]."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


def near_duplicates(
    band: Callable[[int], np.ndarray], n_bands: int, signatures: Callable[[np.ndarray], np.ndarray], n: int, threshold: float
) -> np.ndarray:
    """The first document of the group that each belongs to, int64 [n]; its own number where it is alone or first.

    Args:
        band: number of a band -> its hashes, uint64 [n].
        n_bands: how many.
        signatures: numbers of documents, int64 [m] -> their signatures, uint32 [m, permutations].
        n: documents.
        threshold: share of a signature that must agree: an estimate of the Jaccard similarity, +- 0.035 at 0.8.
    """
    parent = np.arange(n, dtype=np.int64)
    for number in range(n_bands):
        hashes = band(number)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(np.equal(*_neighbours(hashes[order])))
        if not len(same):
            continue
        # Each member of a run of equal hashes is compared with the one before it and with the run's first.
        starts = same[np.concatenate([[True], np.diff(same) > 1])]
        first = starts[np.searchsorted(starts, same, side="right") - 1]
        left = np.concatenate([order[same], order[first]])
        right = np.concatenate([order[same + 1], order[same + 1]])
        for at in range(0, len(left), _PAIRS):
            a, b = left[at : at + _PAIRS], right[at : at + _PAIRS]
            fresh = _roots(parent, a) != _roots(parent, b)
            a, b = a[fresh], b[fresh]
            alike = (signatures(a) == signatures(b)).mean(axis=1) >= threshold
            _join(parent, a[alike], b[alike])
    return _roots(parent, np.arange(n, dtype=np.int64))


def _neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values[:-1], values[1:]


def _roots(parent: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    found = parent[numbers]
    while True:
        above = parent[found]
        if np.array_equal(above, found):
            return found
        found = above


def _join(parent: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        a, b = _root(parent, a), _root(parent, b)
        if a != b:
            parent[max(a, b)] = min(a, b)


def _root(parent: np.ndarray, number: int) -> int:
    while (above := int(parent[number])) != number:
        parent[number] = parent[above]
        number = above
    return number


class Shards:
    """Rows of the arrays of many shards as those of one, read where they are asked for."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = arrays
        self._starts = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Rows of these numbers, in their order."""
        found = np.empty((len(numbers), *self._arrays[0].shape[1:]), self._arrays[0].dtype)
        shard = np.searchsorted(self._starts, numbers, side="right") - 1
        for each in np.unique(shard):
            here = shard == each
            found[here] = self._arrays[each][numbers[here] - self._starts[each]]
        return found
