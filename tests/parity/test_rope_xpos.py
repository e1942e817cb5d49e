"""xPos beside an independent implementation from PyPI (x-transformers), over random parameters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb

from nemo_longctx.rope.rotation import rotate
from nemo_longctx.rope.variants import XposRope

DIMS = st.sampled_from([4, 10, 34, 64, 128])
BASES = st.floats(2.0, 1e7)
SCALE_BASES = st.floats(16.0, 4096.0)


@settings(max_examples=60, deadline=None)
@given(dim=DIMS, base=BASES, scale_base=SCALE_BASES)
def test_frequencies_and_scales(dim, base, scale_base):
    theirs = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base, base=base)
    variant = XposRope(base=base, scale_base=scale_base)
    np.testing.assert_allclose(variant.inv_freq(dim), theirs.inv_freq.numpy(), rtol=4e-6)
    np.testing.assert_allclose(variant.xpos_scale(dim), theirs.scale.numpy(), rtol=1e-6)
    # Theirs counts from the middle of the window; the ratio of two positions does not.
    length = 64
    scales = theirs(torch.arange(length))[1][0, :, ::2].double().numpy()
    ours = variant.xpos_zeta(dim)[None, :] ** (np.arange(length)[:, None] - length // 2)
    np.testing.assert_allclose(ours, scales, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(dim=DIMS, base=BASES, scale_base=SCALE_BASES, partial=st.booleans(), seed=st.integers(0, 2**16))
def test_scores(dim, base, scale_base, partial, seed):
    """Scores of whole vectors, in x-transformers' interleaved layout; partial rotary leaves the rest of a head alone."""
    length, head_dim = 48, dim * 2 if partial else dim
    q, k = torch.randn(2, 1, 1, length, head_dim, generator=torch.Generator().manual_seed(seed))
    freqs, scale = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base, base=base)(torch.arange(length))
    theirs = apply_rotary_pos_emb(q, freqs, scale)[0, 0] @ apply_rotary_pos_emb(k, freqs, scale**-1)[0, 0].T
    kwargs = {"rotary_dim": dim, "interleaved": True}
    variant, at = XposRope(base=base, scale_base=scale_base), np.arange(length)
    ours = (
        rotate(q[0, 0].numpy(), at, variant, is_key=False, **kwargs)
        @ rotate(k[0, 0].numpy(), at, variant, is_key=True, **kwargs).T
    )
    causal = np.tril(np.ones((length, length), dtype=bool))
    np.testing.assert_allclose(ours[causal], theirs.numpy()[causal], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("gamma", [0.2, 0.4])
def test_gamma_sets_the_fastest_pair(gamma):
    assert XposRope(gamma=gamma).xpos_scale(64)[0] == pytest.approx(gamma / (1 + gamma))
