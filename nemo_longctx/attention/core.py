"""Causal attention that never makes an S x S tensor, behind one signature on every device.

| where | kernel |
| --- | --- |
| CPU, any float dtype | torch's flash kernel for the CPU, one gradient buffer for all segments (`cpu_kernel.py`) |
| CUDA, bf16/fp16, segments or a window | flash-attn's varlen kernel where installed, else torch's (`nn.attention.varlen`) |
| CUDA, fp32 (any, where neither is), a window | `scaled_dot_product_attention` by blocks of one window, one mask for all |
| CUDA, everything else | `scaled_dot_product_attention`, restricted to its flash, cuDNN and memory-efficient kernels |

Shapes: B batch, S query tokens, T key tokens, H query heads, K key/value heads (H is a multiple of K: grouped queries),
D head size. Heads stay where the model has them, before the head size; nothing is expanded or transposed in memory.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from nemo_longctx.attention.cpu_kernel import cpu_segment_attention
from nemo_longctx.attention.documents import Segment
from nemo_longctx.capability import flash_attention
from nemo_longctx.config import ConfigError

# Every kernel of torch but `math`, which builds the score matrix; where none of these fits, torch raises.
LINEAR_MEMORY_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def backend_name(device: torch.device, dtype: torch.dtype, *, segmented: bool) -> str:
    """What `causal_attention` runs for tensors of this device and dtype: `cpu-flash`, `flash-attn-varlen`, `torch-varlen`
    or `sdpa`. `segmented` says whether there are documents, a cache or a context-parallel share."""
    if device.type == "cpu":
        return "cpu-flash"
    if segmented and dtype in (torch.float16, torch.bfloat16):
        if flash_attention():
            return "flash-attn-varlen"
        return "torch-varlen" if torch_varlen() else "sdpa"
    return "sdpa"


def causal_attention(
    q_BSHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    *,
    segments: Sequence[Segment] | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v over the keys that each query may see.

    Args:
        q_BSHD: queries.
        k_BTKD, v_BTKD: keys and values; T >= S. Without `segments` the last query is aligned with the last key, so that a
            KV cache of T - S earlier tokens is seen in full (torch's own `is_causal` aligns the first ones instead).
        segments: which query rows see which key rows (`documents.py`), the same for every row of the batch; they cover
            every query row once.
        scale: factor of the scores; None means D ** -0.5.
        window: tokens that a query looks back on at most, itself included (a sliding window); None for all that it may see.

    Returns:
        out_BSHD in q's dtype; softmax and accumulation are in float32 for half-precision inputs. Differentiable once.

    Raises:
        ConfigError: shapes or dtypes that do not fit together.
    """
    _check(q_BSHD, k_BTKD, v_BTKD)
    S, T = q_BSHD.shape[1], k_BTKD.shape[1]
    scale = q_BSHD.shape[-1] ** -0.5 if scale is None else scale
    whole = (Segment(0, S, 0, T),)
    parts = whole if segments is None else tuple(segments)
    _check_segments(parts, S, T)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ConfigError("window", window, "must be a number of tokens, 1 or more, or None")
    if window is not None and window >= max(part.k_end - part.k_start for part in parts):
        window = None  # covers all that any query may see
    backend = backend_name(q_BSHD.device, q_BSHD.dtype, segmented=parts != whole or S != T or window is not None)
    if backend == "cpu-flash":
        return cpu_segment_attention(q_BSHD, k_BTKD, v_BTKD, parts, scale, window)
    if backend == "sdpa":
        sdpa = _sdpa_segments if window is None else functools.partial(sdpa_windows, window=window)
        return sdpa(q_BSHD, k_BTKD, v_BTKD, parts, scale)
    use_flash_attn = backend == "flash-attn-varlen"
    return _varlen(q_BSHD, k_BTKD, v_BTKD, parts, scale, window, use_flash_attn=use_flash_attn)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        mend = "q must be [B, S, H, D], and k and v [B, T, K, D] of one shape"
        raise ConfigError("attention", (tuple(q.shape), tuple(k.shape), tuple(v.shape)), mend)
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[2] % k.shape[2]:
        mend = "q and k must share batch and head size, and the query heads be a multiple of the key heads"
        raise ConfigError("attention", (tuple(q.shape), tuple(k.shape)), mend)
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError("attention", (q.dtype, k.dtype, v.dtype), "q, k and v must have one dtype")


@functools.lru_cache(maxsize=64)
def _check_segments(segments: tuple[Segment, ...], S: int, T: int) -> None:
    row = 0
    for segment in segments:
        ordered = segment.q_start == row < segment.q_end and segment.k_start >= 0 and segment.k_end <= T
        if not ordered or segment.prefix < 0:
            mend = f"must cover the {S} query rows in order, within {T} keys, with a key for each query"
            raise ConfigError("segments", segment, mend)
        row = segment.q_end
    if row != S:
        raise ConfigError("segments", segments[-1:], f"must end at query row {S}")


def _sdpa_segments(
    q_BSHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, segments: tuple[Segment, ...], scale: float
) -> torch.Tensor:
    """Public SDPA, one call a segment. `causal_lower_right` is a marker for the kernels, no mask in memory."""
    outs = []
    copies, grouped = _shared_heads(q_BSHD, k_BTKD)
    queries = q_BSHD.split([s.q_end - s.q_start for s in segments], dim=1)
    with sdpa_kernel(LINEAR_MEMORY_KERNELS):
        for segment, q in zip(segments, queries, strict=True):
            k, v = (x[:, segment.k_start : segment.k_end].transpose(1, 2) for x in (k_BTKD, v_BTKD))
            if copies > 1:
                k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
            square = segment.prefix == 0
            mask = None if square else causal_lower_right(q.shape[1], k.shape[2])
            out = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped
            )
            outs.append(out.transpose(1, 2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _shared_heads(q_BSHD: torch.Tensor, k_BTKD: torch.Tensor) -> tuple[int, bool]:
    """Copies of each key head that SDPA is given, and whether it is to share the keys itself (`enable_gqa`).

    In float32 only the memory-efficient kernel runs on CUDA, and it takes no grouped queries: it gets each key's copies.
    """
    shared = q_BSHD.shape[2] // k_BTKD.shape[2]
    copies = shared if q_BSHD.dtype in (torch.float32, torch.float64) else 1
    return copies, shared > copies


def sdpa_windows(
    q_BSHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    segments: tuple[Segment, ...],
    scale: float,
    *,
    window: int,
) -> torch.Tensor:
    """A sliding window by public SDPA: blocks of `window` queries against the two windows of keys that end with them.

    Memory is linear in the window's length: one mask of [window, 2 * window] serves every block.
    """
    outs = []
    copies, grouped = _shared_heads(q_BSHD, k_BTKD)
    behind = torch.arange(window, device=q_BSHD.device)[:, None] + window - torch.arange(2 * window, device=q_BSHD.device)
    band = (behind >= 0) & (behind < window)  # [query, key]: how far the key lies behind
    for segment in segments:
        for first in range(segment.q_start, segment.q_end, window):
            last = min(first + window, segment.q_end)
            key = segment.k_start + segment.prefix + first - segment.q_start  # the first query's own row
            begin = max(segment.k_start, key - window)
            end = key + last - first
            mask = band[: last - first, begin - key + window : end - key + window]
            q, k, v = (x.transpose(1, 2) for x in (q_BSHD[:, first:last], k_BTKD[:, begin:end], v_BTKD[:, begin:end]))
            if copies > 1:
                k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
            outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1)


def _varlen(
    q_BSHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    segments: tuple[Segment, ...],
    scale: float,
    window: int | None,
    *,
    use_flash_attn: bool,
) -> torch.Tensor:
    """One varlen launch for all segments of all rows. Keys are copied only where segments share or skip some."""
    B, S, H, D = q_BSHD.shape
    contiguous = all(a.k_end == b.k_start for a, b in itertools.pairwise(segments))
    if contiguous and segments[0].k_start == 0 and segments[-1].k_end == k_BTKD.shape[1]:
        k_packed, v_packed = k_BTKD, v_BTKD
    else:
        k_packed = torch.cat([k_BTKD[:, s.k_start : s.k_end] for s in segments], dim=1)
        v_packed = torch.cat([v_BTKD[:, s.k_start : s.k_end] for s in segments], dim=1)
    q_lengths = tuple(s.q_end - s.q_start for s in segments) * B
    k_lengths = tuple(s.k_end - s.k_start for s in segments) * B
    cu_q, cu_k = device_boundaries(q_lengths, q_BSHD.device), device_boundaries(k_lengths, q_BSHD.device)
    sides = (-1, 0) if window is None else (window - 1, 0)  # keys before the query and after it; -1 for all
    q_NHD, k_MKD, v_MKD = q_BSHD.flatten(0, 1), k_packed.flatten(0, 1), v_packed.flatten(0, 1)
    if use_flash_attn:
        out_NHD = _flash_varlen()(
            q_NHD, k_MKD, v_MKD, cu_q, cu_k, max(q_lengths), max(k_lengths), softmax_scale=scale, causal=True, window_size=sides
        )
        if isinstance(out_NHD, tuple):  # some releases of 3 hand on the logsumexp as well
            out_NHD = out_NHD[0]
    else:
        # window_size (-1, 0) is causal, aligned at the last key, as flash-attn is since its version 2.1.
        out_NHD = torch_varlen()(  # type: ignore[misc]
            q_NHD, k_MKD, v_MKD, cu_q, cu_k, max(q_lengths), max(k_lengths),
            scale=scale, window_size=sides, enable_gqa=k_BTKD.shape[2] != H,
        )  # fmt: skip
    return out_NHD.view(B, S, H, D)


@functools.lru_cache(maxsize=32)
def device_boundaries(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Running ends of `lengths` with a leading 0, int32 on `device`.

    Kept for a few micro batches: every layer, forward and computed again, asks for the same ones.
    """
    return on_device([*itertools.accumulate(lengths, initial=0)], device)


def on_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """`numbers` as int32 on `device`, without a wait for what it does: from memory that is not pinned the host would wait for
    all work that was handed to a GPU before."""
    host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@functools.cache
def torch_varlen() -> Callable[..., Any] | None:
    """torch's own varlen kernel, or None where this torch has none, or one without windows and grouped queries (2.10)."""
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    return function if {"scale", "window_size", "enable_gqa"} <= inspect.signature(function).parameters.keys() else None


@functools.cache
def _flash_varlen() -> Callable[..., Any]:
    return importlib.import_module(str(flash_attention())).flash_attn_varlen_func
