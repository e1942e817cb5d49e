"""Hooks on what autograd saves, one inside another: torch itself asks only the innermost pair.

Offload wraps a whole transformer block, context parallelism the attention inside it. What the inner pair leaves as it is goes
to the outer one here, so that attention's queries and outputs reach host memory too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

Pack = Callable[[torch.Tensor], Any]
Unpack = Callable[[Any], torch.Tensor]


class _Outer(NamedTuple):
    """A tensor that the inner pair left to the outer one, as that one packed it."""

    packed: Any


# A thread's own: a backward runs on others, where the hooks of a forward are not in place.
_local = threading.local()


@contextmanager
def saved_tensors_hooks(pack: Pack, unpack: Unpack) -> Iterator[None]:
    """`torch.autograd.graph.saved_tensors_hooks`, where `pack` hands on to the pair around it by returning its own argument."""
    keep, restore = kept_by_the_outer()

    def pack_or_hand_on(tensor: torch.Tensor) -> Any:
        packed = pack(tensor)
        return _Outer(keep(tensor)) if packed is tensor else packed

    def unpack_from_either(packed: Any) -> torch.Tensor:
        return restore(packed.packed) if isinstance(packed, _Outer) else unpack(packed)

    before = getattr(_local, "pair", None)
    _local.pair = (pack_or_hand_on, unpack_from_either)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack_or_hand_on, unpack_from_either):
            yield
    finally:
        _local.pair = before


def kept_by_the_outer() -> tuple[Pack, Unpack]:
    """How a tensor that is kept for the backward by other means than autograd's goes where all others go, and comes back."""
    return getattr(_local, "pair", None) or (_same, _same)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
