"""Checksums of a corpus's files: of all their bytes, or of runs spread evenly over a large one."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

PIECE = 1 << 20  # bytes of a file read at once for its fingerprint
RUN = 1 << 14  # bytes of each sample of a larger one
THREADS, SINGLE = 4, 1 << 24  # that read for a fingerprint, and bytes that are not worth a second one


def checksums(file: BinaryIO, starts: Sequence[int], size: int) -> bytes:
    """Checksums (CRC-32) of the `size` bytes from each of `starts` on, by a few threads where there is much to read.

    Read from the file: pages that are read through the map, and those around them, would count as this process's memory.
    """

    def sums(some: Sequence[int]) -> list[int]:
        return [zlib.crc32(os.pread(file.fileno(), size, start)) for start in some]

    share = max(-(-len(starts) // THREADS), -(-SINGLE // size))
    parts = [starts[at : at + share] for at in range(0, len(starts), share)]
    with ThreadPoolExecutor(THREADS) as threads:  # reading and summing both leave the interpreter free
        found = list(threads.map(sums, parts) if len(parts) > 1 else map(sums, parts))
    return np.array([number for part in found for number in part], np.uint32).tobytes()


def spread_runs(size: int, runs: int) -> list[int]:
    """Where so many runs of a file of `size` bytes begin: the first at its start, the last at its end."""
    runs = min(runs, -(-size // RUN))
    return [max(0, number * (size - RUN) // max(1, runs - 1)) for number in range(runs)]
