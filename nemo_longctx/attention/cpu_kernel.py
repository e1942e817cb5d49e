"""Segmented causal attention on the CPU over torch's flash kernel, forward and backward, with or without a sliding window.

Why not `scaled_dot_product_attention` itself: on the CPU it has no form for more keys than queries (its `is_causal` aligns the
first rows; any mask is S x T in memory), and slicing documents out of a packed window makes autograd write a zero-filled
window of gradients for each document. Here every segment writes into one gradient buffer.

What a block of queries sees is split into parts that the kernel knows, a rectangle and triangles (`windows.py`). The results
are merged by their log-sum-exp; in the backward each part is given the merged output and log-sum-exp, which makes its
probabilities and its row sums those of the whole (as in Ring Attention, Liu et al. 2023).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from nemo_longctx.attention.documents import Segment
from nemo_longctx.attention.windows import Block, Part, blocks_of

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_segment_attention(
    q_BSHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    segments: tuple[Segment, ...],
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """`core.causal_attention` on the CPU; `segments` are checked by the caller."""
    groups = q_BSHD.shape[2] // k_BTKD.shape[2]
    if groups > 1 and not shares_heads():
        k_BTKD, v_BTKD = k_BTKD.repeat_interleave(groups, 2), v_BTKD.repeat_interleave(groups, 2)
    return _SegmentAttention.apply(q_BSHD, k_BTKD, v_BTKD, blocks_of(segments, window), scale)


@functools.cache
def shares_heads() -> bool:
    """Whether torch's kernel lets several query heads see one key head.

    That of torch 2.6 takes the next head in memory for each, past the end of what it was given, without a word.
    """
    both = torch.stack([torch.zeros(1, 8), torch.ones(1, 8)]).unsqueeze(0)  # what lies behind the first head is ours
    out, _ = _forward_kernel(torch.ones_like(both), both[:, :1], both[:, :1], 0.0, False, scale=1.0)
    return not out.any().item()


def _rows(x: torch.Tensor, block: Block, part: Part | None = None) -> torch.Tensor:
    """The rows of [B, S, H, D] that a part needs, as [B * repeats, H, rows, D] in the order that its kernel wants."""
    start, size, drop = (block.q_start, block.rows, 0) if part is None else (part.start, part.size, part.size - part.used)
    if block.repeats == 1:
        found = x[:, start : start + size - drop].transpose(1, 2)
    else:
        folded = x[:, start : start + size * block.repeats].unflatten(1, (block.repeats, size)).flatten(0, 1)
        found = folded[:, : size - drop].transpose(1, 2)
    return found.flip(2) if part is not None and part.reversed else found


def _queries(x_BHnD: torch.Tensor, part: Part) -> torch.Tensor:
    """Of a block's queries, heads first, those that see a part; a reversed part's in reverse."""
    return x_BHnD[:, :, : part.queries].flip(2) if part.reversed else x_BHnD


def _attend(
    q_BHnD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, block: Block, part: Part, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and log-sum-exp of a block's queries over one part, in the part's order."""
    k, v = _rows(k_BTKD, block, part), _rows(v_BTKD, block, part)
    return _forward_kernel(_queries(q_BHnD, part), k, v, 0.0, part.causal, scale=scale)


def _block_forward(
    q_BSHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, block: Block, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B * repeats, H, n, D] and log-sum-exp [B * repeats, H, n] of one block."""
    q = _rows(q_BSHD, block)
    out, lse = _attend(q, k_BTKD, v_BTKD, block, block.parts[0], scale)  # the first part is seen by all
    for part in block.parts[1:]:
        more, more_lse = _attend(q, k_BTKD, v_BTKD, block, part, scale)
        if part.reversed:
            more, more_lse = more.flip(2), more_lse.flip(2)
        seen, seen_lse = out[:, :, : part.queries], lse[:, :, : part.queries]
        merged = torch.logaddexp(seen_lse, more_lse)
        weight, weight_more = (seen_lse - merged).exp(), (more_lse - merged).exp()
        seen.copy_(seen * weight.unsqueeze(-1) + more * weight_more.unsqueeze(-1))
        seen_lse.copy_(merged)
    return out, lse


def _block_backward(
    grads: tuple[torch.Tensor, ...], tensors: tuple[torch.Tensor, ...], lse_BHS: torch.Tensor, block: Block, scale: float
) -> None:
    """Add one block's gradients to (dq, dk, dv); `tensors` are (grad, q, k, v, out)."""
    dq, dk, dv = grads
    grad, q, out = (_rows(tensors[i], block) for i in (0, 1, 4))
    lse = lse_BHS[:, :, block.q_start : block.q_end]
    if block.repeats > 1:
        lse = lse.unflatten(2, (block.repeats, block.rows)).transpose(1, 2).flatten(0, 1)
    for part in block.parts:
        k, v = _rows(tensors[2], block, part), _rows(tensors[3], block, part)
        seen = [_queries(x, part) for x in (grad, q)]
        lse_part = lse[:, :, : part.queries].flip(2) if part.reversed else lse
        parts = _backward_kernel(*seen, k, v, _queries(out, part), lse_part, 0.0, part.causal, scale=scale)
        more = [x.flip(2) if part.reversed else x for x in parts]
        _add(dq, more[0], block.q_start, block.rows, block.repeats)
        for target, x in ((dk, more[1]), (dv, more[2])):
            _add(target, x, part.start, part.size, block.repeats)


def _add(target_BSHD: torch.Tensor, x_BHnD: torch.Tensor, start: int, size: int, count: int) -> None:
    """Add rows to those of `target` that `_rows` took, of which the last may be none's."""
    rows = target_BSHD[:, start : start + size * count]
    x = x_BHnD.transpose(1, 2)
    if count == 1:
        rows[:, : x.shape[1]].add_(x)
    else:
        rows.unflatten(1, (count, size))[:, :, : x.shape[1]].add_(x.unflatten(0, (-1, count)))


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHD: torch.Tensor,
        k_BTKD: torch.Tensor,
        v_BTKD: torch.Tensor,
        blocks: tuple[Block, ...],
        scale: float,
    ) -> torch.Tensor:
        B, S, H, _ = q_BSHD.shape
        if len(blocks) == 1 and blocks[0].repeats == 1:
            out, lse_BHS = _block_forward(q_BSHD, k_BTKD, v_BTKD, blocks[0], scale)
            out_BSHD = out.transpose(1, 2)
        else:
            out_BSHD = torch.empty_like(q_BSHD, memory_format=torch.contiguous_format)
            accumulate = torch.promote_types(q_BSHD.dtype, torch.float32)
            lse_BHS = torch.empty(B, S, H, dtype=accumulate, device=q_BSHD.device).transpose(1, 2)
            for block in blocks:
                out, lse = _block_forward(q_BSHD, k_BTKD, v_BTKD, block, scale)
                rows = slice(block.q_start, block.q_end)
                out_BSHD[:, rows].unflatten(1, (block.repeats, block.rows)).copy_(
                    out.transpose(1, 2).unflatten(0, (B, block.repeats))
                )
                lse_BHS[:, :, rows].unflatten(2, (block.repeats, block.rows)).copy_(
                    lse.unflatten(0, (B, block.repeats)).transpose(1, 2)
                )
        ctx.save_for_backward(q_BSHD, k_BTKD, v_BTKD, out_BSHD, lse_BHS)
        ctx.blocks, ctx.scale = blocks, scale
        return out_BSHD

    @staticmethod
    def backward(ctx: Any, grad_BSHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q_BSHD, k_BTKD, v_BTKD, out_BSHD, lse_BHS = ctx.saved_tensors
        blocks: tuple[Block, ...] = ctx.blocks
        first = blocks[0]
        if len(blocks) == 1 and first.repeats == 1 and first.parts == (Part(0, k_BTKD.shape[1], causal=True),):
            grads = _backward_kernel(
                *(x.transpose(1, 2) for x in (grad_BSHD, q_BSHD, k_BTKD, v_BTKD, out_BSHD)), lse_BHS, 0.0, True, scale=ctx.scale
            )
            return (*(g.transpose(1, 2) for g in grads), None, None)
        made = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_BSHD, k_BTKD, v_BTKD))
        for block in blocks:
            _block_backward(made, (grad_BSHD, q_BSHD, k_BTKD, v_BTKD, out_BSHD), lse_BHS, block, ctx.scale)
        return (*made, None, None)
