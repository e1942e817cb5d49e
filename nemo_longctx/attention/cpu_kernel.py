"""Segmented causal attention on the CPU over torch's flash kernel, forward and backward.

Why not `scaled_dot_product_attention` itself: on the CPU it has no form for more keys than queries (its `is_causal` aligns the
first rows; any mask is S x T in memory), and slicing documents out of a packed window makes autograd write a zero-filled
window of gradients for each document. Here every segment writes into one gradient buffer.

More keys than queries are split into a rectangle that every query sees in full and a causal square. The two results are
merged by their log-sum-exp; in the backward each part is given the merged output and log-sum-exp, which makes its
probabilities and its row sums those of the whole (as in Ring Attention, Liu et al. 2023).
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_longctx.attention.documents import Segment

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_segment_attention(
    q_BSHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, segments: tuple[Segment, ...], scale: float
) -> torch.Tensor:
    """`core.causal_attention` on the CPU; `segments` are checked by the caller."""
    return _SegmentAttention.apply(q_BSHD, k_BTKD, v_BTKD, segments, scale)


def _heads_first(x: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Rows [start, end) of [B, S, H, D] as the view [B, H, rows, D] that the kernel wants."""
    return x[:, start:end].transpose(1, 2)


def _segment_forward(
    q_BSHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, segment: Segment, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, n, D] and log-sum-exp [B, H, n] of one segment."""
    q = _heads_first(q_BSHD, segment.q_start, segment.q_end)
    edge = segment.k_start + segment.prefix

    def attend(start: int, end: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward_kernel(q, _heads_first(k_BTKD, start, end), _heads_first(v_BTKD, start, end), 0.0, causal, scale=scale)

    if q.shape[2] == 1:
        return attend(segment.k_start, segment.k_end, False)
    out, lse = attend(edge, segment.k_end, True)
    if segment.prefix:
        out_prefix, lse_prefix = attend(segment.k_start, edge, False)
        merged = torch.logaddexp(lse, lse_prefix)
        weight, weight_prefix = (lse - merged).exp(), (lse_prefix - merged).exp()
        out = (out * weight.unsqueeze(-1) + out_prefix * weight_prefix.unsqueeze(-1)).to(out.dtype)
        lse = merged
    return out, lse


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHD: torch.Tensor,
        k_BTKD: torch.Tensor,
        v_BTKD: torch.Tensor,
        segments: tuple[Segment, ...],
        scale: float,
    ) -> torch.Tensor:
        B, S, H, _ = q_BSHD.shape
        if len(segments) == 1:
            out, lse_BHS = _segment_forward(q_BSHD, k_BTKD, v_BTKD, segments[0], scale)
            out_BSHD = out.transpose(1, 2)
        else:
            out_BSHD = torch.empty_like(q_BSHD, memory_format=torch.contiguous_format)
            accumulate = torch.promote_types(q_BSHD.dtype, torch.float32)
            lse_BHS = torch.empty(B, S, H, dtype=accumulate, device=q_BSHD.device).transpose(1, 2)
            for segment in segments:
                out, lse = _segment_forward(q_BSHD, k_BTKD, v_BTKD, segment, scale)
                out_BSHD[:, segment.q_start : segment.q_end] = out.transpose(1, 2)
                lse_BHS[:, :, segment.q_start : segment.q_end] = lse
        ctx.save_for_backward(q_BSHD, k_BTKD, v_BTKD, out_BSHD, lse_BHS)
        ctx.segments, ctx.scale = segments, scale
        return out_BSHD

    @staticmethod
    def backward(ctx: Any, grad_BSHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q_BSHD, k_BTKD, v_BTKD, out_BSHD, lse_BHS = ctx.saved_tensors
        segments: tuple[Segment, ...] = ctx.segments
        if segments == (Segment(0, q_BSHD.shape[1], 0, k_BTKD.shape[1]),) and segments[0].prefix == 0:
            grads = _backward_kernel(
                *(x.transpose(1, 2) for x in (grad_BSHD, q_BSHD, k_BTKD, v_BTKD, out_BSHD)), lse_BHS, 0.0, True, scale=ctx.scale
            )
            return (*(g.transpose(1, 2) for g in grads), None, None)
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_BSHD, k_BTKD, v_BTKD))
        for segment in segments:
            q, grad, out = (_heads_first(x, segment.q_start, segment.q_end) for x in (q_BSHD, grad_BSHD, out_BSHD))
            lse = lse_BHS[:, :, segment.q_start : segment.q_end]
            edge = segment.k_start + segment.prefix
            for start, end, causal in ((segment.k_start, edge, False), (edge, segment.k_end, True)):
                if start == end:
                    continue
                k, v = _heads_first(k_BTKD, start, end), _heads_first(v_BTKD, start, end)
                parts = _backward_kernel(grad, q, k, v, out, lse, 0.0, causal, scale=ctx.scale)
                _heads_first(dq, segment.q_start, segment.q_end).add_(parts[0])
                _heads_first(dk, start, end).add_(parts[1])
                _heads_first(dv, start, end).add_(parts[2])
        return dq, dk, dv, None, None
