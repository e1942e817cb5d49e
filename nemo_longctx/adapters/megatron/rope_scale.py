"""The attention factor and xPos inside Megatron-Core's attention: q and k are scaled on their way into the core attention.

A forward pre-hook on each `core_attention` sees q and k after rotation, after the KV cache and before any kernel. The cache
keeps keys as they were rotated; the scaling is of absolute positions, so it is the same for keys that were cached long ago.

Shapes follow Megatron-Core: [s, b, heads, head size], or [t, heads, head size] for packed windows (`qkv_format="thd"`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from nemo_longctx.config import ConfigError
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.rotation import per_dimension

# q before and k after the middle are both large; their product, which causality masks, must not overflow.
SHARE_OF_RANGE = 0.46


class ScoreScale:
    """Scales the rotated dimensions: q by factor^2 * zeta^(t - c), k by zeta^-(t - c), c the middle of the window.

    The middle keeps both within the range of the number format; it cancels in every score. With documents, t counts from a
    document's first token.

    Args:
        variant: gives the attention factor and zeta.
        rotary_dim: dimensions of a head that are rotated, the first ones.
        interleaved: which dimensions make a pair.
        cp_group: the context-parallel group, over which windows are split zig-zag.
    """

    def __init__(self, variant: RopeVariant, *, rotary_dim: int, interleaved: bool, cp_group: Any):
        self.variant, self.rotary_dim, self.cp_group = variant, rotary_dim, cp_group
        self.factor = variant.attention_scaling**2
        zeta = variant.xpos_zeta(rotary_dim)
        self.log_zeta = None if zeta is None else torch.from_numpy(per_dimension(np.log(zeta), interleaved=interleaved))
        self.steepest = 0.0 if self.log_zeta is None else float(-self.log_zeta.min())
        self._last: tuple[tuple, Any, tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(self, core_attention: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook (with keyword arguments) of a core attention: (query, key, ...) -> the same, scaled."""
        query, key, *rest = args
        if self.log_zeta is None:
            return (_times(query, self.factor, self.rotary_dim), key, *rest), kwargs
        q_scale, k_scale = self._tables(query, key, kwargs.get("packed_seq_params"))
        return (_times(query, q_scale, self.rotary_dim), _times(key, k_scale, self.rotary_dim), *rest), kwargs

    def _tables(self, query: torch.Tensor, key: torch.Tensor, packed: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 scales of q and k [tokens, 1.., rotary_dim]; kept for the other layers of the same microbatch."""
        wanted = (query.shape[0], key.shape[0], query.dim(), query.device, query.dtype)
        if self._last is not None and self._last[0] == wanted and self._last[1] is packed:
            return self._last[2]
        if packed is None:
            q_positions, k_positions, length = self._window_positions(query.shape[0], key.shape[0], query.device)
        else:
            q_positions = self._packed_positions(_cu_seqlens(packed, "q"), query.shape[0])
            k_positions = self._packed_positions(_cu_seqlens(packed, "kv"), key.shape[0])
            length = int(max(packed.max_seqlen_q, packed.max_seqlen_kv))
        self._check_range(length, query.dtype)
        middle, heads = length / 2, (1,) * (query.dim() - 2)
        self.log_zeta = self.log_zeta.to(query.device)  # type: ignore[union-attr]  # once: a copy makes the host wait for a GPU

        def scale(positions: torch.Tensor, sign: float) -> torch.Tensor:
            power = (positions.double() - middle) * sign
            table = torch.exp(torch.outer(power, self.log_zeta))  # type: ignore[arg-type]
            return table.float().view(len(positions), *heads, self.rotary_dim)

        tables = (scale(q_positions, 1.0) * self.factor, scale(k_positions, -1.0))
        self._last = (wanted, packed, tables)
        return tables

    def _window_positions(self, queries: int, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size == 1:  # a KV cache shows as more keys than queries; the last query is at the last key
            k_positions = torch.arange(keys, device=device)
            return k_positions[keys - queries :], k_positions, keys
        ends = torch.arange(2, device=device) * (keys * size)  # made there: a copy makes the host wait for a GPU
        positions = packed_positions(ends, keys, rank, size)
        return positions, positions, keys * size

    def _packed_positions(self, cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
        return packed_positions(cu_seqlens, tokens, self.cp_group.rank(), self.cp_group.size())

    def _check_range(self, length: int, dtype: torch.dtype) -> None:
        room = SHARE_OF_RANGE * math.log(torch.finfo(dtype).max)
        if length / 2 * self.steepest > room:
            scale_base = getattr(self.variant, "scale_base", 1.0)
            least = math.ceil(scale_base * length / 2 * self.steepest / room)
            mend = (
                f"{length} tokens leave the range of {dtype}; set it to at least {least}, or use bf16 or fp32 in place of fp16"
            )
            raise ConfigError("rope.scale_base", scale_base, mend)


def packed_positions(cu_seqlens: torch.Tensor, tokens: int, cp_rank: int, cp_size: int) -> torch.Tensor:
    """Position of each local token in its document, int64 [tokens].

    Args:
        cu_seqlens: boundaries over all context-parallel ranks together; under context parallelism each document is split
            into 2 * cp_size chunks, of which a rank has one early and one late, as Megatron-Core lays out `thd`.
        tokens: local tokens.
    """
    ends = cu_seqlens.to(torch.int64) // cp_size
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = (torch.searchsorted(ends, index, right=True) - 1).clamp(max=len(ends) - 2)
    within = index - ends[document]
    if cp_size == 1:
        return within
    half = (ends[document + 1] - ends[document]) // 2
    late = (2 * cp_size - 1 - cp_rank) * half + within - half
    return torch.where(within < half, cp_rank * half + within, late)


def _cu_seqlens(packed: Any, side: str) -> torch.Tensor:
    padded = getattr(packed, f"cu_seqlens_{side}_padded")
    return padded if padded is not None else getattr(packed, f"cu_seqlens_{side}")


def _times(x: torch.Tensor, scale: torch.Tensor | float, rotary_dim: int) -> torch.Tensor:
    """x with its first `rotary_dim` dimensions multiplied in float32 and rounded once."""
    rotated = (x[..., :rotary_dim].float() * scale).to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


def refuse_other_inference(attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a self-attention: inference past the core attention would lose the scaling, and past the layers'
    angles those of layers with a window, in silence."""
    context = kwargs.get("inference_context") or kwargs.get("inference_params")
    if context is None:
        return
    if attention.config.flash_decode or not context.is_static_batching():
        mend = "this RoPE variant works inside each layer's attention, where this engine has its own way; use static batching"
        raise ConfigError("inference_context", type(context).__name__, mend)
