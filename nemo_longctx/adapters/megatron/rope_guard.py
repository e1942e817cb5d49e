"""The guard: what a built model really rotates by, on this rank and in each layer, against the variant that was asked for.

Nothing is read from a config. The model's rotary embedding is run, and its angles at position 1 are its frequencies; each
layer's attention is run on a q and k of ones up to its core attention, where what the variant makes of them must arrive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from nemo_longctx.adapters.megatron.host import fuses_qkv_rope, groups_of, yarn_rounds_always
from nemo_longctx.adapters.megatron.rope_module import (
    TableRotaryEmbedding,
    TwoTablesRotaryEmbedding,
    check_supported,
    check_windows,
    has_no_rope,
    rotary_dim_of,
    score_scale,
    self_attentions,
    variant_of_layer,
)
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.nemo import YARN_FIELDS
from nemo_longctx.rope.variants import Llama3Rope, NtkRope, PiRope, Rope, YarnRope, ntk_base

# The host computes in float32 what we compute in float64: the two agree to this share of the unscaled frequency.
HOST_ROUNDING = 4e-6
PROBE_CHUNK = 2  # positions a context-parallel half in a layer's probe


class LiveRopeError(ConfigError):
    """The running model does not rotate as its config says."""


def verify_live_rope(model: Any, variant: RopeVariant) -> str:
    """Compare a built model with `variant`, on this rank, before its first step.

    Frequencies must equal, bit for bit, those of the variant: our table where ours is in place; where the host's own fields
    say the variant, what the host's code makes of these settings in float32, which in turn must be ours within its rounding.

    Args:
        model: a `megatron.core.models.gpt.GPTModel`; all ranks call this together.
        variant: what the run asked for.

    Returns:
        one line that says what was seen.

    Raises:
        LiveRopeError: the first frequency or layer that differs, with both values.
    """
    check_supported(model.config)
    check_windows(model.config, variant)
    rotary_dim = rotary_dim_of(model.config)
    _check_tables(model, variant, rotary_dim)
    live, expected = live_inv_freq(model), expected_inv_freq(model, variant, rotary_dim)
    _check_frequencies(live, expected, variant, "the model")
    ours = variant.theta(rotary_dim, 2)
    if (np.abs(live - ours) > HOST_ROUNDING * Rope(base=variant.base).theta(rotary_dim)).any():
        _raise_first(live, ours.astype(np.float32), variant, "the model")
    if variant.depends_on_length:
        long = model.config.seq_length
        _check_frequencies(_table(model, long), variant.inv_freq(rotary_dim, long), variant, f"the model at {long} tokens")
    layers = self_attentions(model)
    for attention in layers:
        _verify_layer(model, attention, variant_of_layer(variant, attention), rotary_dim)
    described = ", ".join(f"{key}={value}" for key, value in vars(variant.everywhere).items() if value is not None)
    slowest = f"slowest pair {live[-1]:.6g} rad a token"
    apart = sum(variant_of_layer(variant, each) == variant.local for each in layers)
    counted = f"{len(layers)} layers" if variant.local is None else f"{len(layers) - apart} layers that see all tokens"
    said = f"RoPE verified live: {variant.variant} ({described}), {rotary_dim} dimensions, {counted}, {slowest}"
    return said if variant.local is None else f"{said}; plain rope (base={variant.local_base}) in {apart} layers with a window"


def _check_tables(model: Any, variant: RopeVariant, rotary_dim: int) -> None:
    """Whether layers with a window have a table of their own, and which."""
    rotary, local = model.rotary_pos_emb, variant.local
    has_two = isinstance(rotary, TwoTablesRotaryEmbedding)
    if has_two != (local is not None):
        has, asked = ("two RoPEs", "one") if has_two else ("one RoPE", f"two (local_base={variant.local_base:g})")
        raise LiveRopeError(
            "rope.layers", has, f"in the model, the config asks for {asked}. The checkpoint or a tool changed it"
        )
    if local is not None:
        # Where its second half begins: both tables of two positions, one after the other.
        found = _pairs(rotary, rotary(2, packed_seq=True)[3, 0, 0])
        _check_frequencies(found, local.inv_freq(rotary_dim, 2), local, "the model's layers with a window")


def live_inv_freq(model: Any) -> np.ndarray:
    """The frequencies that `model` rotates by, float32 [rotary_dim / 2]: its angles at position 1."""
    return _frequencies(model.rotary_pos_emb)


def expected_inv_freq(model: Any, variant: RopeVariant, rotary_dim: int) -> np.ndarray:
    """The bits that `live_inv_freq` must be, float32 [rotary_dim / 2]."""
    if isinstance(model.rotary_pos_emb, TableRotaryEmbedding):
        return variant.inv_freq(rotary_dim, 2)
    reference = _host_reference(model, variant, rotary_dim)
    return variant.inv_freq(rotary_dim, 2) if reference is None else _frequencies(reference)


def _frequencies(rotary: torch.nn.Module) -> np.ndarray:
    out = rotary(2, packed_seq=True)  # packed: the whole table, not this rank's part of a window
    return _pairs(rotary, (out[0] if isinstance(out, tuple) else out)[1, 0, 0])


def _pairs(rotary: torch.nn.Module, angles: torch.Tensor) -> np.ndarray:
    pairs = angles[::2] if rotary.rotary_interleaved else angles[: len(angles) // 2]
    return pairs.detach().cpu().numpy()


def _table(model: Any, seq_length: int) -> np.ndarray:
    rotary = model.rotary_pos_emb
    return rotary.table(seq_length).cpu().numpy() if isinstance(rotary, TableRotaryEmbedding) else live_inv_freq(model)


def _host_reference(model: Any, variant: RopeVariant, rotary_dim: int) -> RotaryEmbedding | None:
    """A fresh embedding of the host's for `variant`; None where the host has none, so that the live one must be wrong."""
    config, live = model.config, model.rotary_pos_emb
    common: dict[str, Any] = {
        "kv_channels": rotary_dim,
        "rotary_percent": 1.0,
        "rotary_interleaved": live.rotary_interleaved,
        "use_cpu_initialization": config.use_cpu_initialization,
        "cp_group": live.cp_group,
    }
    if isinstance(variant, YarnRope):
        if type(live) is not YarnRotaryEmbedding:
            return None
        scaling = {
            _YARN_ARGUMENTS.get(host, host.removeprefix("yarn_")): getattr(variant, v) for host, v in YARN_FIELDS.items()
        }
        if yarn_rounds_always():
            scaling.pop("correction_range_round_to_int")
        return YarnRotaryEmbedding(**common, rotary_base=variant.base, **scaling)
    base = ntk_base(variant.base, variant.factor, rotary_dim) if isinstance(variant, NtkRope) else variant.base
    factor = variant.factor if isinstance(variant, PiRope) else None
    rotary = RotaryEmbedding(**common, rotary_base=base, seq_len_interpolation_factor=factor)  # type: ignore[arg-type]
    if isinstance(variant, Llama3Rope):
        # Megatron-Core's arithmetic, which NeMo's Llama31Model repeats operation by operation
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=variant.factor,
            low_freq_factor=variant.low_freq_factor,
            high_freq_factor=variant.high_freq_factor,
            original_max_position_embeddings=variant.original_max_position_embeddings,
        )
    return rotary


_YARN_ARGUMENTS = {
    "yarn_rotary_scaling_factor": "scaling_factor",
    "yarn_correction_range_round_to_int": "correction_range_round_to_int",
}


def _check_frequencies(live: np.ndarray, expected: np.ndarray, variant: RopeVariant, where: str) -> None:
    if live.shape != expected.shape:
        mend = f"{where} rotates {2 * len(live)} dimensions of a head, the config {2 * len(expected)}"
        raise LiveRopeError("rotary_dim", 2 * len(live), mend)
    if live.tobytes() != expected.tobytes():
        _raise_first(live, expected, variant, where)


def _raise_first(live: np.ndarray, expected: np.ndarray, variant: RopeVariant, where: str) -> None:
    j = int(np.flatnonzero(live != expected)[0])
    differ = int((live != expected).sum())
    mend = (
        f"{where} has {float(live[j])!r} at pair {j}, the config ({variant.variant}, base {variant.base:g}) asks for "
        f"{float(expected[j])!r}; {differ} of {len(live)} pairs differ. The checkpoint or a tool replaced the RoPE that was set"
    )
    raise LiveRopeError("inv_freq", float(live[j]), mend)


class _ArrivedError(Exception):
    """Carries q and k from a core attention's door back to the probe."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor):
        super().__init__()
        self.query, self.key = query, key


@contextlib.contextmanager
def _ones_for(attention: Any, query: torch.Tensor, key: torch.Tensor) -> Iterator[None]:
    """Let `attention` see `query` and `key` instead of its projections, and stop at the door of its core attention."""

    def stop(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _ArrivedError(args[0], args[1])

    handle = attention.core_attention.register_forward_pre_hook(stop, with_kwargs=True)
    config, was_training, fused = attention.config, attention.training, fuses_qkv_rope(attention.config)
    attention.get_query_key_value_tensors = lambda *args, **kwargs: (query, key, key)
    attention.training = False  # no recomputation around the core attention
    if fused:
        config.fused_single_qkv_rope = False
    try:
        yield
    finally:
        del attention.get_query_key_value_tensors
        attention.training = was_training
        if fused:
            config.fused_single_qkv_rope = True
        handle.remove()


@torch.no_grad()
def _verify_layer(model: Any, attention: Any, variant: RopeVariant, rotary_dim: int) -> None:
    """q and k of ones must arrive at this layer's core attention as `variant`, the layer's own, rotates and scales them."""
    config, rotary = model.config, model.rotary_pos_emb
    cp_size = 1 if rotary.cp_group is None else rotary.cp_group.size()
    weight = next(attention.parameters())
    local = 2 * PROBE_CHUNK
    heads = (attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition)
    query, key = (
        torch.ones(local, 1, n, attention.hidden_size_per_attention_head, dtype=weight.dtype, device=weight.device)
        for n in heads
    )
    out = rotary(local * cp_size)
    handed = out[0] if isinstance(out, tuple) else out
    angles = handed
    if isinstance(rotary, TwoTablesRotaryEmbedding):
        angles = handed.chunk(2)[int(variant == rotary.local.variant)]
    unrotated = has_no_rope(attention)
    mscale = variant.attention_scaling if type(rotary) is YarnRotaryEmbedding else 1.0
    expected = [query, key]
    if not unrotated:
        group = groups_of(attention).cp
        expected = [apply_rotary_pos_emb(x, angles, config=config, mscale=mscale, cp_group=group) for x in expected]
    needs_scale = mscale == 1.0 and (variant.attention_scaling != 1.0 or variant.xpos_zeta(rotary_dim) is not None)
    if needs_scale and not unrotated:
        expected = list(score_scale(variant, model, rotary_dim)(attention.core_attention, tuple(expected), {})[0])
    where = f"layer {attention.layer_number}"
    try:
        with _ones_for(attention, query, key):
            attention(torch.zeros_like(query[..., 0, :]), None, rotary_pos_emb=handed)
    except _ArrivedError as arrived:
        seen = (arrived.query, arrived.key)
    else:
        raise LiveRopeError(where, "no core attention", "was reached, so its rotation cannot be seen")
    for name, got, wanted in zip("qk", seen, expected, strict=True):
        if got.shape == wanted.shape and torch.equal(got, wanted):
            continue
        at = (got != wanted).nonzero()[0].tolist() if got.shape == wanted.shape else [0, 0, 0, 0]
        live, asked = float(got[tuple(at)]), float(wanted[tuple(at)])
        mend = (
            f"{where} turns a {name} of ones into {live!r} at position {at[0]}, dimension {at[-1]}; the config "
            f"({variant.variant}, base {variant.base:g}) asks for {asked!r}. The layer has a RoPE of its own, or lacks scaling"
        )
        raise LiveRopeError(f"{where}.rope", live, mend)
