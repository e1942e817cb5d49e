"""Our frequencies beside those of Megatron-Core's own classes, over random parameters and corners.

The classes run on the CPU under the shim. Megatron-Core works in float32, so the two may differ by its rounding.
"""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor,
)

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.rope.rotation import rotate
from nemo_longctx.rope.variants import AbfRope, Llama3Rope, PiRope, Rope, YarnRope

DIMS = st.sampled_from([2, 6, 10, 34, 64, 96, 128])
BASES = st.one_of(st.floats(1.5, 100.0), st.floats(1e3, 1e8))
FACTORS = st.one_of(st.just(1.0), st.floats(1.0, 128.0))


@pytest.fixture(scope="module", autouse=True)
def _shim():
    was_installed = cpu.is_installed()
    cpu.install()
    yield
    if not was_installed:
        cpu.uninstall()


def frequencies(rotary):
    out = rotary(2)
    angles = (out[0] if isinstance(out, tuple) else out)[1, 0, 0].numpy()
    return angles[::2] if rotary.rotary_interleaved else angles[: len(angles) // 2]


def assert_same(variant, dim, theirs, slack=1.0):
    plain = Rope(base=variant.base).theta(dim)
    assert (np.abs(variant.inv_freq(dim).astype(np.float64) - theirs) <= 4e-6 * slack * plain).all()


@settings(max_examples=50, deadline=None)
@given(
    dim=DIMS, base=BASES, factor=st.one_of(st.none(), FACTORS), interleaved=st.booleans(), percent=st.sampled_from([1.0, 0.5])
)
def test_plain_abf_and_pi(dim, base, factor, interleaved, percent):
    rotary_dim = int(dim * percent)
    if rotary_dim % 2:
        return
    theirs = RotaryEmbedding(dim, percent, interleaved, factor, base, use_cpu_initialization=True)
    variant = AbfRope(base=base) if factor is None else PiRope(base=base, factor=factor)
    assert_same(variant, rotary_dim, frequencies(theirs))


@settings(max_examples=50, deadline=None)
@given(dim=DIMS, base=BASES, factor=FACTORS)
def test_llama3(dim, base, factor):
    theirs = RotaryEmbedding(
        dim, 1.0, rotary_base=base, rope_scaling=True, rope_scaling_factor=factor, use_cpu_initialization=True
    )
    assert_same(Llama3Rope(base=base, factor=factor), dim, frequencies(theirs))


@settings(max_examples=100, deadline=None)
@given(
    dim=DIMS,
    base=BASES,
    factor=FACTORS,
    trained=st.integers(2, 2**12),
    beta_slow=st.floats(0.5, 4.0),
    beta_fast=st.floats(8.0, 64.0),
    truncate=st.booleans(),
    mscale=st.sampled_from([1.0, 0.707, 0.0]),
    mscale_all_dim=st.sampled_from([0.0, 0.707]),
)
@example(128, 2.0, 4.0, 2**17, 1.0, 32.0, True, 1.0, 0.0)
@example(128, 10_000.0, 1.0, 4096, 1.0, 32.0, True, 1.0, 0.0)
@example(64, 150_000.0, 32.0, 4096, 1.0, 32.0, False, 1.0, 0.0)
def test_yarn(dim, base, factor, trained, beta_slow, beta_fast, truncate, mscale, mscale_all_dim):
    theirs = YarnRotaryEmbedding(
        dim,
        rotary_base=base,
        use_cpu_initialization=True,
        scaling_factor=factor,
        original_max_position_embeddings=trained,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        correction_range_round_to_int=truncate,
    )
    variant = YarnRope(
        base=base,
        factor=factor,
        original_max_position_embeddings=trained,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        truncate=truncate,
    )
    width = dim * np.log(beta_fast / beta_slow) / (2 * np.log(base))
    assert_same(variant, dim, frequencies(theirs), slack=max(1.0, dim / width / 20))
    assert variant.attention_scaling == pytest.approx(_yarn_get_concentration_factor(factor, mscale, mscale_all_dim), rel=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_our_rotation_is_megatron_cores(interleaved, percent):
    """The plain float64 rotation against the host's function, partial and interleaved layouts included."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    x = torch.randn(50, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    rotary = RotaryEmbedding(32, percent, interleaved, None, 500, use_cpu_initialization=True)
    theirs = _apply_rotary_pos_emb_bshd(x, rotary(50), rotary_interleaved=interleaved)[:, 0, 0]
    ours = rotate(
        x[:, 0, 0].numpy(), np.arange(50), Rope(base=500.0), rotary_dim=int(32 * percent), is_key=False, interleaved=interleaved
    )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)
