"""Our frequencies beside those of transformers' own functions, asserted directly, over random parameters and corners.

transformers works in float32 throughout, so the two may differ by its rounding: a few parts in a million of the plain angle.
"""

import copy

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_longctx.rope import (
    AbfRope,
    DynamicNtkRope,
    Llama3Rope,
    LongRope,
    NtkByPartsRope,
    NtkRope,
    PiRope,
    Rope,
    RopeVariant,
    YarnRope,
    hf,
)

DIMS = st.sampled_from([4, 6, 10, 18, 34, 64, 80, 96, 128, 256])
BASES = st.one_of(st.floats(1.5, 100.0), st.floats(1e3, 1e8))
FACTORS = st.one_of(st.just(1.0), st.floats(1.0, 128.0))
LONGROPE = {"rope_type": "longrope", "short_factor": [1.25] * 64, "long_factor": [1.0 + j for j in range(64)]}
LENGTHS = st.integers(2, 2**22)


def theirs(variant, head_dim, partial=1.0, seq_length=None):
    """(inv_freq, attention factor) of transformers for the config keys that we write."""
    keys = variant.to_hf(rotary_dim=int(head_dim * partial), max_position_embeddings=2**22, partial_rotary_factor=partial)
    scaling = keys.pop("rope_scaling")
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, **keys)
    config.rope_scaling = scaling  # after the constructor, whose warnings about odd numbers are not at issue
    rope_type = scaling["rope_type"] if scaling else "default"
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, device="cpu", seq_len=seq_length)
    return inv_freq.numpy(), attention_factor


def assert_same(variant, head_dim, partial=1.0, seq_length=None, slack=1.0):
    rotary_dim = int(head_dim * partial)
    inv_freq, attention_factor = theirs(variant, head_dim, partial, seq_length)
    plain = Rope(base=variant.base).theta(rotary_dim)
    ours = variant.inv_freq(rotary_dim, seq_length)
    assert ours.dtype == inv_freq.dtype
    assert (np.abs(ours.astype(np.float64) - inv_freq) <= 4e-6 * slack * plain).all(), (ours, inv_freq)
    assert variant.attention_scaling == pytest.approx(attention_factor, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(cls=st.sampled_from([Rope, AbfRope]), base=BASES, dim=DIMS, partial=st.sampled_from([1.0, 0.5]))
def test_plain_and_abf(cls, base, dim, partial):
    if int(dim * partial) % 2 == 0:
        assert_same(cls(base=base), dim, partial)


@settings(max_examples=60, deadline=None)
@given(cls=st.sampled_from([PiRope, NtkRope]), base=BASES, dim=DIMS, factor=FACTORS)
def test_pi_and_ntk(cls, base, dim, factor):
    assert_same(cls(base=base, factor=factor), dim)


@settings(max_examples=60, deadline=None)
@given(base=BASES, dim=DIMS, factor=FACTORS, trained=LENGTHS, seq_length=st.one_of(st.none(), LENGTHS))
def test_dynamic_ntk(base, dim, factor, trained, seq_length):
    variant = DynamicNtkRope(base=base, factor=factor, original_max_position_embeddings=trained)
    assert_same(variant, dim, seq_length=seq_length)


@settings(max_examples=60, deadline=None)
@given(
    cls=st.sampled_from([Llama3Rope, NtkByPartsRope]),
    base=BASES,
    dim=DIMS,
    factor=FACTORS,
    trained=LENGTHS,
    low=st.floats(0.25, 4.0),
    ratio=st.floats(1.5, 64.0),
)
def test_llama3_and_ntk_by_parts(cls, base, dim, factor, trained, low, ratio):
    names = ("low_freq_factor", "high_freq_factor") if cls is Llama3Rope else ("beta_slow", "beta_fast")
    turns = dict(zip(names, (low, low * ratio), strict=True))
    assert_same(cls(base=base, factor=factor, original_max_position_embeddings=trained, **turns), dim)


@settings(max_examples=150, deadline=None)
@given(
    base=BASES,
    dim=DIMS,
    factor=FACTORS,
    trained=LENGTHS,
    beta_slow=st.floats(0.5, 4.0),
    beta_fast=st.floats(8.0, 64.0),
    truncate=st.booleans(),
    mscale=st.sampled_from([1.0, 0.707, 0.0]),
    mscale_all_dim=st.sampled_from([0.0, 1.0, 0.5]),
)
@example(2.0, 128, 4.0, 2**22, 1.0, 32.0, True, 1.0, 0.0)  # a tiny theta and a long original context: no pair is slow
@example(10_000.0, 128, 4.0, 2, 1.0, 32.0, True, 1.0, 0.0)  # a tiny original context: no pair is fast
@example(10_000.0, 128, 1.0, 4096, 1.0, 32.0, True, 1.0, 0.0)  # factor 1
@example(10_000.0, 128, 40.0, 4096, 1.0, 32.0, True, 0.707, 0.707)  # DeepSeek-V2
@example(150_000.0, 64, 32.0, 4096, 1.0, 32.0, False, 1.0, 0.0)  # gpt-oss
def test_yarn(base, dim, factor, trained, beta_slow, beta_fast, truncate, mscale, mscale_all_dim):
    variant = YarnRope(
        base=base,
        factor=factor,
        original_max_position_embeddings=trained,
        beta_slow=beta_slow,
        beta_fast=beta_fast,
        truncate=truncate,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    # The untruncated ramp divides float32 pair indices by its width; a narrow ramp magnifies transformers' rounding.
    width = dim * np.log(beta_fast / beta_slow) / (2 * np.log(base))
    assert_same(variant, dim, slack=max(1.0, dim / width / 20))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), base=BASES, dim=DIMS, factor=FACTORS, trained=LENGTHS, beyond=st.booleans())
def test_longrope(data, base, dim, factor, trained, beyond):
    pairs = st.lists(st.floats(1.0, 64.0), min_size=dim // 2, max_size=dim // 2)
    original = max(2, trained // 2)
    variant = LongRope(
        base=base,
        factor=factor,
        original_max_position_embeddings=original,
        short_factor=tuple(data.draw(pairs)),
        long_factor=tuple(data.draw(pairs)),
    )
    assert_same(variant, dim, seq_length=original + 1 if beyond else original)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.5},
        {"rope_type": "yarn", "factor": 8.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.5, "mscale_all_dim": 1.0, "beta_fast": 0},
        {"type": "yarn", "factor": 8.0, "attention_factor": 1.5, "truncate": False},
        {"type": "linear", "factor": 8.0},
        {"rope_type": "dynamic", "factor": 8.0, "original_max_position_embeddings": 1024},
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
        {**LONGROPE, "factor": 2.0},
        {**LONGROPE, "factor": 2.0, "original_max_position_embeddings": 64},
        {**LONGROPE, "attention_factor": 1.25},
        {**LONGROPE, "factor": 0.5, "attention_factor": 1.25, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("top", [{}, {"original_max_position_embeddings": 1024}], ids=["", "trained length at the top"])
def test_configs_are_read_as_transformers_reads_them(scaling, top):
    """Keys that transformers ignores, or fills in, must not change what we read."""
    config = LlamaConfig(max_position_embeddings=4096, rope_theta=50_000.0, **top)
    config.rope_scaling = scaling
    rope_type = scaling.get("rope_type", scaling.get("type"))
    variant = RopeVariant.from_hf({**config.to_dict(), "rope_scaling": scaling})
    for length in (64, 65, 1024, 1025, 4096, 4097, 8192):
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, device="cpu", seq_len=length)
        np.testing.assert_allclose(variant.inv_freq(128, length), inv_freq.numpy(), rtol=4e-6)
        assert variant.attention_scaling == pytest.approx(attention_factor)


@pytest.mark.parametrize("family", ["olmo3", "gemma3_text"])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
                                     {"rope_type": "linear", "factor": 8.0}], ids=str)  # fmt: skip
def test_families_of_two_ropes_are_read_as_transformers_reads_them(family, scaling):
    """OLMo 3 stretches layers that see all tokens alone; Gemma 3 has another base in layers with a window too."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    config = AutoConfig.for_model(family, hidden_size=256, num_attention_heads=4, head_dim=64, num_hidden_layers=4,
                                  max_position_embeddings=4096, rope_theta=50_000.0, rope_scaling=scaling)  # fmt: skip
    variant = RopeVariant.from_hf(config.to_dict())
    whole, windowed = rotary_embeddings(config)
    for ours, module in ((variant.everywhere, whole), (variant.local or variant.everywhere, windowed)):
        np.testing.assert_allclose(ours.inv_freq(64), module.inv_freq.numpy(), rtol=4e-6)
        assert ours.attention_scaling == pytest.approx(module.attention_scaling)


def rotary_embeddings(config):
    """transformers' own modules of a family: of layers that see all tokens, and of those with a window."""
    if config.model_type == "olmo3":
        from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

        return Olmo3RotaryEmbedding(config), Olmo3RotaryEmbedding(config, rope_type="default")
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    local = copy.deepcopy(config)
    local.rope_theta, local.rope_scaling = config.rope_local_base_freq, {"rope_type": "default"}
    return Gemma3RotaryEmbedding(config), Gemma3RotaryEmbedding(local)


def test_a_config_that_names_no_base_has_that_of_its_family():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = [family for family in hf._BASES if family in CONFIG_MAPPING]
    assert len(known) > 4
    for family in known:
        assert hf._BASES[family] == CONFIG_MAPPING[family]().get_text_config().rope_theta, family
    plain = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "olmo2", "qwen3_moe")
    assert {CONFIG_MAPPING[family]().rope_theta for family in plain} == {10_000.0}
