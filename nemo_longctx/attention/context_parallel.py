"""Context parallelism by gathering keys and values: every rank attends its own queries to all keys that they may see.

Each rank holds two chunks of every window, one early and one late (`documents.zigzag_chunks`), so that causal work is even.
Works on any backend of torch.distributed, gloo included. The gathered keys and values are not kept for the backward: they
are gathered again there, so that a rank's memory stays that of its own share. (In float32 on CUDA they are kept: SDPA, which
runs there, saves them segment by segment.)

Shapes: B batch, T tokens of the whole window, N = T / cp_size local tokens, K heads, D head size.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist

from nemo_longctx.attention.core import backend_name, causal_attention
from nemo_longctx.attention.documents import Segment, zigzag_chunks
from nemo_longctx.attention.saved import kept_by_the_outer, saved_tensors_hooks


def slice_zigzag(x: torch.Tensor, cp_rank: int, cp_size: int, *, dim: int = 1) -> torch.Tensor:
    """A rank's two chunks of `x` along `dim`, whose length is a multiple of 2 * cp_size."""
    chunks = x.chunk(2 * cp_size, dim=dim)
    return torch.cat([chunks[c] for c in zigzag_chunks(cp_rank, cp_size)], dim=dim)


def context_parallel_attention(
    q_BNHD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    *,
    segments: tuple[Segment, ...],
    group: dist.ProcessGroup,
    windows: int = 1,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention of this rank's queries to the keys of the whole group.

    Args:
        q_BNHD, k_BNKD, v_BNKD: this rank's tokens, zig-zag halves of `windows` windows one after another.
        segments: `documents.context_parallel_segments` for this rank.
        group: the context-parallel group; all its ranks call this together, forward and backward.
        sliding_window: tokens that a query looks back on at most, itself included; None for all that it may see.

    Returns:
        out_BNHD for this rank's queries. Gradients of keys and values are summed over the group.
    """
    kv_2BNKD = torch.stack((k_BNKD, v_BNKD))
    # A varlen launch reads the keys of each segment in turn: laid out so here, they can be laid out so again in the backward.
    chosen = segments if keys_by_segment(q_BNHD.device, q_BNHD.dtype) else None
    seen = _select(_GatherZigzag.apply(kv_2BNKD, group, windows), chosen)
    if chosen is not None:
        segments = _in_turn(segments)

    if not torch.is_grad_enabled() or not seen.requires_grad or not gathers_again(q_BNHD.device, q_BNHD.dtype):
        return causal_attention(q_BNHD, seen[0], seen[1], segments=segments, scale=scale, window=sliding_window)

    # Which of k (0) and v (1) a saved tensor is shows by where it lies; the tensors themselves would be kept by the closure.
    places = [(part.data_ptr(), part.numel()) for part in seen]

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[int, torch.Size]:
        place = (tensor.data_ptr(), tensor.numel())
        return (places.index(place), tensor.shape) if place in places else tensor

    # This rank's own keys and values, from which the backward gathers, lie where the hooks around this one put what is saved.
    keep, restore = kept_by_the_outer()
    own = keep(kv_2BNKD.detach())
    again: dict[int, torch.Tensor] = {}

    def unpack(saved: torch.Tensor | tuple[int, torch.Size]) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        part, shape = saved
        if not again:
            again.update(enumerate(_select(_gather(restore(own), group, windows), chosen)))
        return again.pop(part).view(shape)

    with saved_tensors_hooks(pack, unpack):
        return causal_attention(q_BNHD, seen[0], seen[1], segments=segments, scale=scale, window=sliding_window)


def keys_by_segment(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel for these tensors wants the keys of each segment one after another, shared ones repeated."""
    return backend_name(device, dtype, segmented=True).endswith("varlen")


def gathers_again(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel for these tensors saves keys and values whole, on every rank alike, so that the backward may gather.

    SDPA saves those of each segment, and of a segment that spans the window it saves the whole: on that rank alone, which would
    then wait for the others in the backward for good. No collective may depend on what a rank itself holds.
    """
    return backend_name(device, dtype, segmented=True) != "sdpa"


def _select(kv_2BTKD: torch.Tensor, segments: tuple[Segment, ...] | None) -> torch.Tensor:
    """The keys and values of each segment in turn; all of them where `segments` is None."""
    if segments is None:
        return kv_2BTKD
    return torch.cat([kv_2BTKD[:, :, s.k_start : s.k_end] for s in segments], dim=2)


def _in_turn(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """`segments` with the key rows that `_select` lays out."""
    ends = list(itertools.accumulate((s.k_end - s.k_start for s in segments), initial=0))
    return tuple(Segment(s.q_start, s.q_end, a, b) for s, (a, b) in zip(segments, itertools.pairwise(ends), strict=True))


def _gather(x: torch.Tensor, group: dist.ProcessGroup, windows: int) -> torch.Tensor:
    """[2, B, N, K, D] of every rank -> [2, B, T, K, D] in window order."""
    size = group.size()
    ranks = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(ranks, x.contiguous(), group=group)
    early, late = zip(*(r.unflatten(2, (windows, 2, -1)).unbind(3) for r in ranks), strict=True)
    return torch.stack((*early, *reversed(late)), dim=3).flatten(2, 4)


class _GatherZigzag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, windows: int) -> torch.Tensor:
        ctx.group, ctx.windows = group, windows
        return _gather(x, group, windows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        size = ctx.group.size()
        chunks = grad.unflatten(2, (ctx.windows, 2 * size, -1)).unbind(3)
        shares = []
        for rank in range(size):
            early, late = zigzag_chunks(rank, size)
            shares.append(torch.stack((chunks[early], chunks[late]), dim=3).flatten(2, 4).contiguous())
        mine = torch.empty_like(shares[0])
        dist.reduce_scatter(mine, shares, group=ctx.group)
        return mine, None, None
