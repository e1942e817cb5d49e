"""What is asked of a model, and in which order it is read: requests as a tree of common token prefixes.

Requests are sorted by their tokens, which is the depth-first order of their prefix tree: neighbours share the longest
prefixes. Going from one to the next cuts the cache back to their common prefix and reads only what is new. Ranks share the
tree by cost, and a document stays on one rank where that leaves them balanced.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_longctx.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Score `continuation` after `context`: log p(continuation | context). Token ids; `context` must not be empty."""

    context: Sequence[int]
    continuation: Sequence[int]

    @property
    def read(self) -> list[int]:
        """Tokens the model reads: all but the last, which is only predicted."""
        return [*self.context, *self.continuation][:-1]

    @property
    def needed(self) -> tuple[int, int]:
        """Positions whose states are scored, [first, end)."""
        return len(self.context) - 1, len(self.context) + len(self.continuation) - 1


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Continue `context`.

    Args:
        context: token ids, not empty.
        max_new_tokens: most tokens to make.
        stop: called with the tokens made so far after each one; True ends the generation (that token is kept).
        temperature: 0 for greedy. top_p, top_k: nucleus and rank limits of sampling; 1 and 0 for none.
        seed: of the sampling; the draw depends on it and on `context` only, whatever the order or number of ranks.
    """

    context: Sequence[int]
    max_new_tokens: int
    stop: Callable[[list[int]], bool]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError("temperature", self.temperature, "give 0 for greedy decoding or a positive temperature")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "give a share above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError("top_k", self.top_k, "give 0 for no limit or a positive number of tokens")

    @property
    def read(self) -> list[int]:
        return list(self.context)

    @property
    def needed(self) -> tuple[int, int]:
        return len(self.context) - 1, len(self.context)


Request = Continuation | Generation


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of a `Continuation`: float32 log-probability of each token, and whether greedy decoding would produce them all."""

    token_log_probs: NDArray[np.float32]
    is_greedy: bool

    @property
    def log_likelihood(self) -> float:
        return float(self.token_log_probs.sum(dtype=np.float64))


@dataclass(frozen=True)
class Step:
    """One request in reading order: `shared` tokens are in the cache, the rest is read; `later` positions stay wanted."""

    index: int
    tokens: NDArray[np.int64]
    shared: int
    later: tuple[tuple[int, int], ...]


def plan_reading(requests: Sequence[Request], *, share: bool = True) -> list[Step]:
    """Order requests depth-first through their prefix tree, with what each shares with the one before.

    Raises:
        ValueError: a request without context, or a continuation without tokens.
    """
    reads = []
    for number, request in enumerate(requests):
        if not request.context or (isinstance(request, Continuation) and not request.continuation):
            raise ValueError(f"request {number} has an empty context or continuation: give at least one token of each")
        reads.append(np.asarray(request.read, dtype=np.int64))
    # Big-endian bytes sort as the token lists do, at the speed of memcmp.
    keys = [tokens.astype(">u4").tobytes() for tokens in reads]
    order = sorted(range(len(requests)), key=keys.__getitem__)
    shared = [0] + [common_prefix(reads[a], reads[b]) if share else 0 for a, b in itertools.pairwise(order)]
    steps: list[Step] = []
    wanted: list[tuple[int, int]] = []  # of this request and those after it, on this request's path
    for place in range(len(order) - 1, -1, -1):
        after = shared[place + 1] if place + 1 < len(order) else 0
        later = clip(wanted, after)
        steps.append(Step(order[place], reads[order[place]], shared[place], tuple(later)))
        wanted = union([*later, requests[order[place]].needed])
    return steps[::-1]


def common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the longest common prefix of two token arrays."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def clip(ranges: Sequence[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    return [(a, min(b, end)) for a, b in ranges if a < end]


def union(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for a, b in sorted(ranges):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def cost(steps: Sequence[Step]) -> float:
    """Attention work of reading these steps: the growth of the squared length, tokens^2."""
    return float(sum(len(step.tokens) ** 2 - step.shared**2 for step in steps))


def share_work(requests: Sequence[Request], ranks: int) -> list[list[int]]:
    """Divide requests among ranks by cost (length squared), keeping shared prefixes together where that stays balanced.

    The sorted requests are cut where neighbours share least, until no piece costs more than a quarter of a rank's fair
    share; then the dearest pieces go first, each to the rank with least work. A rank may get none.

    Returns:
        Request indices of each rank; the same on every rank that calls it.
    """
    steps = plan_reading(requests)
    if ranks == 1:
        return [[step.index for step in steps]]
    fair = cost(steps) / (4 * ranks)
    pieces, waiting = [], [steps] if steps else []
    while waiting:
        piece = waiting.pop()
        # Near the middle among the cuts that share least; a cut costs reading its shared prefix twice.
        cut = min(range(1, len(piece)), key=lambda i: (piece[i].shared, abs(i - len(piece) // 2)), default=0)
        if not cut or cost(piece) <= fair or piece[cut].shared ** 2 > cost(piece) / 8:
            pieces.append(piece)
        else:
            waiting += [piece[:cut], [_root(piece[cut]), *piece[cut + 1 :]]]
    work: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for piece in sorted(pieces, key=lambda p: (-cost(p), p[0].index)):
        rank = load.index(min(load))
        load[rank] += cost(piece)
        work[rank] += [step.index for step in piece]
    return work


def _root(step: Step) -> Step:
    """The step as the first of its rank, with nothing shared yet."""
    return Step(step.index, step.tokens, 0, step.later)
