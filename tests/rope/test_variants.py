"""What holds for every variant, whatever its numbers."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.rope import (
    VARIANTS,
    AbfRope,
    LongRope,
    NtkByPartsRope,
    NtkRope,
    PiRope,
    Rope,
    RopeVariant,
    YarnRope,
    parse,
    to_dict,
)
from nemo_longctx.rope.rotation import per_dimension, rotate

DIM = 16
LONG = {"short_factor": [1.0] * 8, "long_factor": [1.0 + j for j in range(8)]}
EXAMPLES = {
    "rope": {},
    "abf": {},
    "pi": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "ntk_by_parts": {"factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096},
    "dynamic_ntk": {"factor": 4.0, "original_max_position_embeddings": 4096},
    "llama3": {},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 4096, **LONG},
    "xpos": {"base": 500_000},
}


def example(name, **changes):
    return parse({"variant": name, **EXAMPLES[name], **changes})


def test_every_variant_has_an_example_here():
    assert set(EXAMPLES) == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_frequencies_are_float32_positive_and_never_above_plain_rope(name):
    variant = example(name)
    plain = parse({"variant": "rope", "base": variant.base}).theta(DIM)
    inv_freq = variant.inv_freq(DIM)
    assert inv_freq.dtype == np.float32
    assert inv_freq.shape == (DIM // 2,)
    assert (inv_freq > 0).all()
    assert (variant.theta(DIM) <= plain * (1 + 1e-15)).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_frequencies_are_the_float64_ones_rounded_once(name):
    variant = example(name)
    np.testing.assert_array_equal(variant.inv_freq(DIM), variant.theta(DIM).astype(np.float32))


@pytest.mark.parametrize("name", VARIANTS)
def test_parse_reads_what_to_dict_wrote(name):
    assert parse(to_dict(example(name))) == example(name)


@pytest.mark.parametrize("name", [n for n, v in EXAMPLES.items() if "factor" in v and n != "longrope"])
def test_factor_one_is_plain_rope(name):
    variant = example(name, factor=1.0)
    np.testing.assert_allclose(variant.theta(DIM), parse({"variant": "rope"}).theta(DIM), rtol=1e-15)
    assert variant.attention_scaling == 1.0


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rotary_dim", [0, 1, 15, -2])
def test_a_dimension_that_makes_no_pairs_is_refused(name, rotary_dim):
    with pytest.raises(ConfigError, match="rotary_dim"):
        example(name).inv_freq(rotary_dim)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "yarm", "factor": 2.0}, "did you mean 'yarn'"),
        ({"base": 10_000}, "no such variant, known: abf"),
        ({"variant": "pi"}, "rope.factor=None: missing"),
        ({"variant": "pi", "factr": 2.0}, "did you mean 'factor'"),
        ({"variant": "pi", "factor": 0.25}, "at least 1"),
        ({"variant": "abf", "base": "5e5"}, "not a number"),
        ({"variant": "abf", "base": 1}, "above 1"),
        ({"variant": "abf", "base": math.nan}, "must be a finite number"),
        ({"variant": "abf", "base": True}, "not a number"),
        ({"variant": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096.5}, "whole number"),
        ({"variant": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096, "beta_fast": 1}, "above beta_slow=1"),
        ({"variant": "llama3", "high_freq_factor": 0.5}, "above low_freq_factor=1"),
        ({"variant": "longrope", **EXAMPLES["longrope"], "long_factor": "1.0"}, "list of numbers"),
        ({"variant": "xpos", "scale_base": 0}, "above 0"),
        ({"variant": ["yarn"]}, "rope.variant=.*did you mean 'yarn'"),
        (None, "rope=None: must be a mapping"),
        ([], "must be a mapping"),
        ({"variant": "rope", "base": 10**400}, "must be a finite number"),
    ],
)
def test_a_mistake_is_named_with_its_mend(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(values)


@pytest.mark.parametrize("wrong", [True, False, "5e5", None, math.nan, math.inf])
def test_what_is_no_number_is_refused_from_python_too(wrong):
    """`True` is 1 to Python, and a factor of 1 would be a variant that does nothing."""
    for make, key in ((lambda: Rope(base=wrong), "base"), (lambda: VARIANTS["pi"](factor=wrong), "factor")):
        with pytest.raises(ConfigError, match=rf"rope\.{key}={re.escape(repr(wrong))}: not a number"):
            make()
    assert VARIANTS["pi"](factor=1).factor == 1


@pytest.mark.parametrize("cls", [float, np.float64, np.float32, np.int64])
def test_numbers_of_numpy_are_taken_as_pythons(cls):
    """JSON and YAML cannot hold NumPy's, so none of them stays in a variant."""
    variant = Rope(base=cls(500_000))
    assert variant == Rope(base=500_000.0)
    assert type(variant.base) in (int, float)
    long = LongRope(**EXAMPLES["longrope"] | {"long_factor": np.arange(1, 9, dtype=np.float32)})
    assert long == example("longrope")


def test_python_callers_are_checked_as_yaml_is():
    with pytest.raises(ConfigError, match="truncate='no': must be true or false"):
        YarnRope(factor=2.0, original_max_position_embeddings=64, truncate="no")
    for wrong in ({1: 2}, {1.0}, (), None, 3.0):
        with pytest.raises(ConfigError, match=r"short_factor=.*: must be a list of numbers"):
            LongRope(**EXAMPLES["longrope"] | {"short_factor": wrong})
    with pytest.raises(ConfigError, match=r"rotary_dim=16.0"):
        Rope().inv_freq(16.0)


@pytest.mark.parametrize(
    "variant",
    [
        PiRope(base=1e300, factor=1e308),  # turns by 0
        LongRope(**EXAMPLES["longrope"] | {"long_factor": [1e-300] * 8}),  # turns by infinity
        NtkRope(base=1e300, factor=1e308),  # a base beyond every number
    ],
    ids=lambda v: v.variant,
)
def test_frequencies_that_float32_cannot_hold_are_refused(variant):
    with pytest.raises(ConfigError, match="rope"):
        variant.inv_freq(DIM)


def test_longrope_needs_one_factor_a_pair():
    with pytest.raises(ConfigError, match=r"long_factor.*needs 4"):
        example("longrope").inv_freq(8)


def test_the_yarn_ramp_keeps_fast_pairs_and_interpolates_slow_ones():
    """The direction, from the definition: a pair that turns more than beta_fast times in the trained length is kept."""
    variant = YarnRope(factor=8.0, original_max_position_embeddings=4096, truncate=False)
    plain = parse({"variant": "rope"}).theta(128)
    turns = 4096 * plain / (2 * math.pi)
    theta = variant.theta(128)
    np.testing.assert_allclose(theta[turns > 32], plain[turns > 32], rtol=1e-12)
    np.testing.assert_allclose(theta[turns < 1], plain[turns < 1] / 8, rtol=1e-12)
    between = theta[(turns < 32) & (turns > 1)] / plain[(turns < 32) & (turns > 1)]
    assert (np.diff(between) < 0).all()


def test_yarn_attention_factor_is_the_papers():
    """Peng et al. 2023, eq. 22: sqrt(1/t) = 0.1 ln(s) + 1."""
    assert example("yarn", factor=8.0).attention_scaling == pytest.approx(0.1 * math.log(8) + 1)


def test_ntk_interpolates_the_slowest_pair_by_the_factor_and_keeps_the_fastest():
    plain, ntk = parse({"variant": "rope"}).theta(DIM), example("ntk").theta(DIM)
    assert ntk[0] == plain[0]
    assert ntk[-1] == pytest.approx(plain[-1] / 4.0, rel=1e-12)


def test_dynamic_ntk_is_plain_up_to_the_trained_length_and_stretches_beyond():
    variant, plain = example("dynamic_ntk", factor=2.0), parse({"variant": "rope"}).theta(DIM)
    np.testing.assert_array_equal(variant.theta(DIM, 4096), plain)
    # At twice the trained length factor 2 stretches by 2 * 2 - 1 = 3.
    assert variant.theta(DIM, 8192)[-1] == pytest.approx(plain[-1] / 3, rel=1e-12)


def test_longrope_takes_the_short_factors_up_to_the_trained_length():
    variant, plain = example("longrope"), parse({"variant": "rope"}).theta(DIM)
    np.testing.assert_array_equal(variant.theta(DIM, 4096), plain)
    np.testing.assert_allclose(variant.theta(DIM, 4097) * np.arange(1.0, 9.0), plain, rtol=1e-15)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from([n for n in VARIANTS if n != "longrope"]),
    interleaved=st.booleans(),
    percent=st.sampled_from([0.25, 0.5, 1.0]),
    shift=st.integers(0, 3000),
    seed=st.integers(0, 2**16),
)
def test_scores_depend_on_distance_alone(name, interleaved, percent, shift, seed):
    """The point of RoPE, and of xPos: moving q and k together changes no score, whatever the layout."""
    rng = np.random.default_rng(seed)
    q_TD, k_TD = rng.standard_normal((2, 1, 32))
    kwargs = {"rotary_dim": int(32 * percent), "interleaved": interleaved}
    variant = example(name)

    def score(m, n):
        q = rotate(q_TD, np.array([m]), variant, is_key=False, **kwargs)
        return float((q @ rotate(k_TD, np.array([n]), variant, is_key=True, **kwargs).T)[0, 0])

    assert score(700 + shift, 300 + shift) == pytest.approx(score(700, 300), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "longrope"])
def test_interleaved_is_the_halves_layout_with_its_dimensions_reordered(name):
    rng = np.random.default_rng(0)
    x_TD, variant = rng.standard_normal((5, DIM)), example(name)
    order = per_dimension(np.arange(DIM // 2) * 2, interleaved=False) + np.repeat([0, 1], DIM // 2)
    halves = rotate(x_TD[:, order], np.arange(5) * 100, variant, rotary_dim=DIM, is_key=True)
    interleaved = rotate(x_TD, np.arange(5) * 100, variant, rotary_dim=DIM, is_key=True, interleaved=True)
    np.testing.assert_allclose(interleaved[:, order], halves, rtol=1e-12)


def test_xpos_damps_fast_pairs_most_and_cancels_at_distance_zero():
    zeta = example("xpos").xpos_zeta(DIM)
    assert ((zeta > 0) & (zeta < 1)).all()
    assert (np.diff(zeta) > 0).all()
    # Sun et al. 2022: zeta_0 = gamma / (1 + gamma), applied over scale_base tokens.
    assert zeta[0] ** 512 == pytest.approx(0.4 / 1.4)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "xpos"])
def test_what_is_written_for_transformers_reads_back_with_the_same_frequencies(name, version):
    variant = example(name)
    keys = variant.to_hf(rotary_dim=DIM, max_position_embeddings=16_384, version=version)
    again = RopeVariant.from_hf(keys)
    for length in (None, 100, 16_384):
        np.testing.assert_array_equal(again.inv_freq(DIM, length), variant.inv_freq(DIM, length))
    assert again.attention_scaling == variant.attention_scaling


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("xpos", "ntk")])
def test_each_variant_reads_its_own_keys_back(name, version):
    """`YarnRope.from_hf` gives a YarnRope: all of its fields, where the config holds them all."""
    variant = example(name)
    again = type(variant).from_hf(variant.to_hf(rotary_dim=DIM, max_position_embeddings=16_384, version=version))
    assert type(again) is type(variant)
    if name != "longrope":  # whose attention factor is written outright
        assert again == variant


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("xpos", "ntk", "longrope")])
def test_layers_with_a_window_are_written_and_read_back(name, version):
    variant = example(name, local_base=1_000.0)
    keys = variant.to_hf(rotary_dim=DIM, max_position_embeddings=16_384, version=version)
    assert type(variant).from_hf(keys) == variant
    assert parse(to_dict(variant)) == variant
    assert "local_base=1000.0" in str(variant)
    assert (
        str(variant.everywhere)
        == str(example(name))
        == repr(example(name)).replace("local_base=None, ", "").replace(", local_base=None", "")
    )
    assert variant.local == Rope(base=1_000.0)
    assert type(variant).from_hf(variant.everywhere.to_hf(rotary_dim=DIM, max_position_embeddings=16_384)) == variant.everywhere


def test_a_config_of_another_variant_is_refused():
    plain = {"rope_theta": 500_000.0, "max_position_embeddings": 64}
    assert AbfRope.from_hf(plain) == AbfRope(base=500_000.0)
    assert NtkByPartsRope.from_hf(example("llama3").to_hf(rotary_dim=DIM, max_position_embeddings=64)).beta_fast == 4.0
    for name, message in (("yarn", "says 'rope', not 'yarn'"), ("ntk", "not 'ntk'"), ("xpos", "transformers has no xPos")):
        with pytest.raises(ConfigError, match=message):
            VARIANTS[name].from_hf(plain)


@pytest.mark.parametrize("version", [4, 5])
def test_partial_rotary_is_written_where_each_version_reads_it(version):
    keys = example("abf").to_hf(rotary_dim=4, max_position_embeddings=64, version=version, partial_rotary_factor=0.25)
    assert (keys["rope_parameters"] if version == 5 else keys)["partial_rotary_factor"] == 0.25


def test_xpos_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="transformers has no xPos"):
        example("xpos").to_hf(rotary_dim=DIM, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "linnear", "factor": 2.0}}, "did you mean 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor=None: missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set a layer type"),
        (
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4}}},
            "rope_parameters.sliding_attention=.*layers with a window can have plain RoPE here",
        ),
        ({"rope_local_base_freq": 0.5}, "rope.local_base=0.5: must be above 1"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear': must be a mapping"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type=None: missing"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "rope_type='linear': .*type='yarn'"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "no variant for it"),
        ({"rope_theta": "abc"}, "rope_theta='abc': not a number"),
        ({"rope_theta": 10**400}, "rope_theta=.*: not a number"),
        (
            {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "longrope", **LONG}},
            "rope_scaling.factor=None: missing",
        ),
        (
            {"max_position_embeddings": 64, "original_max_position_embeddings": "5", "rope_scaling": {"type": "su", **LONG}},
            "original_max_position_embeddings='5': must be a whole number",
        ),
        (None, "config=None: must be a mapping"),
        ([1], "must be a mapping"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        RopeVariant.from_hf(config)


@pytest.mark.parametrize(
    ("parameters", "top", "factor", "trained"),
    [
        ({"factor": 2.0, "original_max_position_embeddings": 1024}, {}, 2.0, 1024),
        ({"original_max_position_embeddings": 1024}, {}, 4.0, 1024),
        ({"original_max_position_embeddings": 1024}, {"original_max_position_embeddings": 2048}, 2.0, 2048),
        ({"factor": 2.0}, {}, 2.0, 4096),
    ],
)
def test_longrope_is_read_by_the_rules_of_transformers_5(parameters, top, factor, trained):
    """Its factor wins over the ratio of the lengths; the trained length is the top's, else its own, else the whole length."""
    config = {"max_position_embeddings": 4096, **top, "rope_parameters": {"rope_type": "longrope", **LONG, **parameters}}
    variant = LongRope.from_hf(config)
    assert (variant.factor, variant.original_max_position_embeddings) == (factor, trained)


def test_transformers_4_reads_the_base_at_the_top_alone():
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0}
    assert RopeVariant.from_hf({"rope_theta": 20_000.0, "rope_scaling": scaling}) == PiRope(base=20_000.0, factor=2.0)
    assert RopeVariant.from_hf({"rope_parameters": scaling}) == PiRope(base=500_000.0, factor=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": -5}, "max_position_embeddings=-5: must be a whole number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"max_position_embeddings": 64.5}, "max_position_embeddings=64.5"),
        ({"partial_rotary_factor": 7}, "partial_rotary_factor=7: a share"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor=0.0: a share"),
        ({"version": 6}, "transformers=6"),
        ({"rotary_dim": DIM - 1}, "rotary_dim=15"),
        ({"rotary_dim": 2 * DIM}, "long_factor.*needs 16"),
    ],
)
def test_what_cannot_be_written_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        example("longrope").to_hf(**{"rotary_dim": DIM, "max_position_embeddings": 64, **changes})
