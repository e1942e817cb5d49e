"""Each variant's table number by number in plain Python, its defaults and its advice."""

import dataclasses
import math

import numpy as np
import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.rope import VARIANTS, AbfRope, LongRope, PiRope, Rope, XposRope, YarnRope, parse
from nemo_longctx.rope.analysis import (
    LARGEST_SPREAD,
    LONGEST,
    PRACTICE,
    Granularity,
    advise,
    candidates,
    describe,
    first_negative,
    fitted_base,
    granularity,
    helix,
    paper_values,
    practised_base,
    raw_scores,
    smallest_base,
)
from nemo_longctx.rope.base import check_length, check_number, powers
from nemo_longctx.rope.request import check_layers_differ, trained_length
from nemo_longctx.rope.request import describe as named

TRAINED = {"original_max_position_embeddings": 64}
DIVISORS = {"short_factor": (1.0, 1.5, 2.0, 2.5), "long_factor": (1.0, 2.0, 4.0, 8.0)}
DIM = 8


def plain_theta(name, dim, length=None, *, base, factor=1.0, trained=None, low=1.0, high=32.0, truncate=True, divisors=None):
    """Angles a position, pair by pair, by the papers' formulas."""
    table = []
    if name == "dynamic_ntk":
        factor = max(1, factor * max(length or trained, trained) / trained - factor + 1)
    for j in range(dim // 2):
        if name in ("ntk", "dynamic_ntk"):
            table.append(1 / (base * factor ** (dim / (dim - 2))) ** (2 * j / dim))
            continue
        theta = 1 / base ** (2 * j / dim)
        if name == "pi":
            theta /= factor
        elif name in ("ntk_by_parts", "llama3"):
            turns = trained * theta / (2 * math.pi)
            kept = min(1, max(0, (turns - low) / (high - low)))
            theta = kept * theta + (1 - kept) * theta / factor
        elif name == "yarn":
            ends = [dim * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (high, low)]
            if truncate:
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            begin, end = max(ends[0], 0), min(ends[1], dim - 1)
            share = min(1, max(0, (j - begin) / (end - begin if end != begin else 0.001)))
            theta = share * theta / factor + (1 - share) * theta
        elif name == "longrope":
            theta /= divisors[j]
        table.append(theta)
    return table


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("dim", "trained"), [(4, 64), (8, 512), (64, 4096), (128, 8192)])
def test_every_table_is_its_formula_pair_by_pair(base, dim, trained):
    for factor in (1.0, 2.5, 8.0):
        for name, given in (
            ("rope", {}), ("abf", {}), ("xpos", {}), ("pi", {}), ("ntk", {}), ("dynamic_ntk", {}),
            ("ntk_by_parts", {}), ("ntk_by_parts", {"low": 2.0, "high": 9.0}), ("llama3", {"high": 4.0}),
            ("llama3", {"low": 0.5, "high": 3.0}), ("yarn", {}), ("yarn", {"truncate": False}),
            ("yarn", {"low": 2.0, "high": 7.0}),
        ):  # fmt: skip
            fields = {field.name for field in dataclasses.fields(VARIANTS[name])}
            words = {
                "low": ("beta_slow", "low_freq_factor"),
                "high": ("beta_fast", "high_freq_factor"),
                "truncate": ("truncate",),
            }
            said = {word: value for key, value in given.items() for word in words[key] if word in fields}
            lengths = {"factor": factor, "original_max_position_embeddings": trained}
            said |= {key: value for key, value in lengths.items() if key in fields}
            variant = parse({"variant": name, "base": base, **said})
            for length in (None, trained, 3 * trained):
                wanted = plain_theta(name, dim, length, base=base, factor=factor, trained=trained, **given)
                np.testing.assert_allclose(variant.theta(dim, length), wanted, rtol=1e-12)
                assert variant.theta(dim, length).dtype == np.float64
            plain = base * factor ** (dim / (dim - 2)) if name == "ntk" else base
            assert variant.plain_base(dim) == pytest.approx(plain)


def test_longrope_divides_by_its_list_and_warms_by_its_factor():
    variant = LongRope(base=1e4, factor=4.0, **TRAINED, **DIVISORS)
    for length, divisors in ((1, "short_factor"), (64, "short_factor"), (65, "long_factor"), (None, "long_factor")):
        wanted = plain_theta("longrope", DIM, base=1e4, divisors=DIVISORS[divisors])
        np.testing.assert_allclose(variant.theta(DIM, length), wanted, rtol=1e-14)
    assert variant.attention_scaling == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))
    assert dataclasses.replace(variant, attention_factor=2).attention_scaling == 2.0
    assert LongRope(factor=1.0, original_max_position_embeddings=2, **DIVISORS).attention_scaling == 1


@pytest.mark.parametrize(("mscale", "all_dim"), [(1.0, 0.0), (0.0, 0.0), (0.7, 0.3), (2.0, 2.0)])
def test_yarn_s_attention_factor_is_the_ratio_of_its_two_scales(mscale, all_dim):
    variant = YarnRope(factor=16.0, **TRAINED, mscale=mscale, mscale_all_dim=all_dim)
    wanted = (0.1 * mscale * math.log(16) + 1) / (0.1 * all_dim * math.log(16) + 1)
    assert variant.attention_scaling == pytest.approx(wanted)
    assert dataclasses.replace(variant, attention_factor=1).attention_scaling == 1.0


def test_xpos_scales_are_sun_et_al_s():
    variant = XposRope(scale_base=100.0, gamma=0.25)
    wanted = [(2 * j / DIM + 0.25) / 1.25 for j in range(DIM // 2)]
    np.testing.assert_allclose(variant.xpos_scale(DIM), wanted, rtol=1e-15)
    np.testing.assert_allclose(variant.xpos_zeta(DIM) ** 100, wanted, rtol=1e-12)
    assert Rope().xpos_zeta(DIM) is None


DEFAULTS = {
    "rope": {"base": 1e4}, "abf": {"base": 5e5}, "pi": {"base": 1e4}, "ntk": {"base": 1e4}, "dynamic_ntk": {"base": 1e4},
    "ntk_by_parts": {"base": 1e4, "beta_slow": 1.0, "beta_fast": 32.0},
    "llama3": {"base": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0},
    "yarn": {"base": 1e4, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0, "truncate": True,
             "attention_factor": None},
    "longrope": {"base": 1e4, "attention_factor": None}, "xpos": {"base": 1e4, "scale_base": 512.0, "gamma": 0.4},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_defaults_are_the_published_ones(name):
    found = {f.name: f.default for f in dataclasses.fields(VARIANTS[name]) if f.default is not dataclasses.MISSING}
    assert found == {"local_base": None, **DEFAULTS[name]}
    assert VARIANTS[name].evaluation_only == (name == "dynamic_ntk")
    assert VARIANTS[name].depends_on_length == (name in ("dynamic_ntk", "longrope"))


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("rope", {"base": 1.0}, "rope.base=1.0: must be above 1"),
        ("rope", {"local_base": 1.0}, "rope.local_base=1.0: must be above 1"),
        ("pi", {"factor": 0.999}, "rope.factor=0.999: must be at least 1"),
        ("dynamic_ntk", {"original_max_position_embeddings": 0}, "must be a whole number of tokens, 1 or more"),
        ("ntk_by_parts", {"beta_slow": 0.0}, "rope.beta_slow=0.0: must be above 0"),
        ("ntk_by_parts", {"beta_slow": 4.0, "beta_fast": 4.0}, "rope.beta_fast=4.0: must be above beta_slow=4"),
        ("llama3", {"low_freq_factor": -1.0}, "rope.low_freq_factor=-1.0: must be above 0"),
        ("llama3", {"high_freq_factor": 0.0}, "rope.high_freq_factor=0.0: must be above 0"),
        ("yarn", {"mscale": -0.1}, "rope.mscale=-0.1: must be at least 0"),
        ("yarn", {"mscale_all_dim": -0.1}, "rope.mscale_all_dim=-0.1: must be at least 0"),
        ("yarn", {"attention_factor": 0.0}, "rope.attention_factor=0.0: must be above 0"),
        ("yarn", {"truncate": 1}, "rope.truncate=1: must be true or false"),
        ("longrope", {"attention_factor": 0.0}, "rope.attention_factor=0.0: must be above 0"),
        ("longrope", {"long_factor": (1.0, 0.0, 1.0, 1.0)}, "rope.long_factor[1]=0.0: must be above 0"),
        ("xpos", {"gamma": 0.0}, "rope.gamma=0.0: must be above 0"),
        ("xpos", {"scale_base": -1.0}, "rope.scale_base=-1.0: must be above 0"),
        ("pi", {"factor": None}, "rope.factor=None: not a number; write digits, with a point before an exponent (5.0e+5)"),
    ],
)
def test_numbers_out_of_their_bounds_are_refused_from_python(name, fields, said):
    needed = {"factor": 2.0, **TRAINED, **DIVISORS}
    known = {field.name for field in dataclasses.fields(VARIANTS[name])}
    with pytest.raises(ConfigError) as error:
        VARIANTS[name](**{key: value for key, value in needed.items() if key in known} | fields)
    assert said in str(error.value)


def test_lengths_and_numbers_at_their_bounds_are_taken():
    check_number("x", 1.0, at_least=1.0)
    check_number("x", 1.0000001, above=1.0)
    for taken in (1, 2**31):
        check_length("x", taken)
    for refused, said in (
        (2**31 + 1, "is beyond every model (2,147,483,648 tokens at most)"),
        (0, "1 or more"),
        (True, "1 or"),
    ):
        with pytest.raises(ConfigError) as error:
            check_length("x", refused)
        assert said in str(error.value)
    np.testing.assert_array_equal(powers(100.0, 2), [1.0])
    with pytest.raises(ConfigError, match=r"rotary_dim=2: NTK scaling has no base to change with one pair; use pi"):
        VARIANTS["ntk"](factor=2.0).theta(2)
    YarnRope(factor=1.0, **TRAINED, mscale=0.0, mscale_all_dim=0.0)


def test_granularity_is_the_mean_sine_between_its_bounds():
    variant = PiRope(factor=2.0)
    mean = sum(math.sin(10_000 ** (-2 * j / DIM) / 2) for j in range(DIM // 2)) / (DIM // 2)
    found = granularity(variant, DIM, spread=3.0)
    limit = sum(10_000 ** (-j / 2**16) / 2 for j in range(2**16)) / 2**16
    wanted = Granularity(value=mean, lower=mean / 9, upper=mean * 9, limit=limit)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(wanted))
    assert granularity(variant, DIM).upper == pytest.approx(4 * mean)
    for spread in (1, LARGEST_SPREAD):
        granularity(variant, DIM, spread=spread)
    for pair in (0, 3):
        cos, sin = helix(variant, DIM, pair, np.array([0.0, 5.0]))
        angle = 5 * 10_000 ** (-2 * pair / DIM) / 2
        np.testing.assert_allclose((cos, sin), [[1, math.cos(angle)], [0, math.sin(angle)]], atol=1e-12)
    for pair in (-1, 4):
        with pytest.raises(ConfigError, match=f"pair={pair}: must be between 0 and 3"):
            helix(variant, DIM, pair, np.array([0.0]))


def test_a_practised_base_is_the_smallest_above_that_a_model_of_such_a_length_had():
    assert LONGEST == 2**24
    assert {(base, longest) for base, longest, _ in PRACTICE} == {(5e5, 32_768), (1e6, 16_384), (5e5, 8192), (1e6, 32_768)}
    for length, base, found in (
        (8192, 1e4, 5e5), (32_768, 1e4, 5e5), (32_769, 1e4, None), (32_768, 5e5, 1e6), (16_384, 499_999, 5e5), (8, 1e6, None)
    ):  # fmt: skip
        assert practised_base(length, base) == found
    assert fitted_base(4096) == pytest.approx(0.0424 * 4096**1.628)
    with pytest.raises(ConfigError, match="length=16777217: is longer than any context: 16,777,216 tokens at most"):
        smallest_base(2**24 + 1, DIM)


def test_what_the_paper_measured_stands_beside_its_variants_alone():
    assert paper_values(Rope(), 128) == paper_values(XposRope(), 128) == {"raw_score_at_0": 11.3}
    assert paper_values(AbfRope(), 128) == {"raw_score_at_0": 11.3, "granularity_limit": 0.076}
    assert paper_values(PiRope(factor=4.0), 64) == {"granularity_limit": 0.027}
    assert paper_values(AbfRope(base=1e6), 64) == paper_values(YarnRope(factor=4.0, **TRAINED), 128) == {}


@pytest.mark.parametrize("length", [None, 100])
def test_a_description_holds_each_figure(length):
    variant = YarnRope(factor=4.0, **TRAINED)
    facts = describe(variant, head_dim=16, rotary_dim=DIM, spread=2.0, seq_length=length)
    grain, theta = granularity(variant, DIM, spread=2.0), variant.theta(DIM)
    assert facts["inv_freq"] == [float(np.float32(each)) for each in theta]
    assert facts["attention_factor"] == variant.attention_scaling
    assert (facts["granularity"], facts["granularity_limit"]) == (grain.value, grain.limit)
    assert facts["granularity_bounds"] == [grain.lower, grain.upper]
    assert facts["raw_score_at_0"] == pytest.approx((DIM * variant.attention_scaling**2 + 8) / 4)
    assert facts["wavelengths"] == pytest.approx([2 * math.pi / each for each in theta])
    assert facts.get("turns") == (None if length is None else pytest.approx([length * each / 2 / math.pi for each in theta]))
    assert "xpos_scale" not in facts
    assert (
        describe(XposRope(), head_dim=8, rotary_dim=8, spread=1, seq_length=None)["xpos_scale"]
        == XposRope().xpos_scale(8).tolist()
    )


def test_candidates_take_the_two_lengths_and_each_new_base():
    made = candidates(64, 256, 2e4, 1e5, 2e5)
    stretched = {"base": 2e4, "factor": 4.0}
    assert made == [
        Rope(base=2e4), AbfRope(base=1e5), AbfRope(base=2e5), XposRope(base=1e5), XposRope(base=2e5), PiRope(**stretched),
        VARIANTS["ntk"](**stretched), *(VARIANTS[name](**stretched, **TRAINED) for name in ("ntk_by_parts", "yarn", "llama3")),
    ]  # fmt: skip


def test_advice_is_its_figures_one_by_one():
    base, dim, trained, target = 100.0, 16, 64, 256
    made = candidates(trained, target, base, 5000.0)
    for variant, row in zip(made, advise(made, trained=trained, target=target, base=base, head_dim=dim), strict=True):
        theta = variant.theta(dim, target)
        seen = [min(2 * math.pi, trained * base ** (-2 * j / dim)) for j in range(dim // 2)]
        new = [min(2 * math.pi, target * each) for each in theta]
        scores = raw_scores(variant, target + 1, head_dim=dim)
        below = [m for m in range(target + 1) if scores[m] < 0]
        assert row.unseen_pairs == sum(each > was * (1 + 1e-6) for each, was in zip(new, seen, strict=True))
        assert row.reaches == (below[0] if below else None)
        assert row.score_at_target == pytest.approx(scores[target], abs=1e-12)
        assert row.granularity == pytest.approx(np.sin(theta).mean())
        assert (row.attention_factor, row.variant["variant"]) == (variant.attention_scaling, variant.variant)
    assert first_negative(Rope(base=100.0).theta(dim), 0) is None


def test_a_checkpoint_s_plain_length_and_its_words():
    yarn = YarnRope(factor=4.0, original_max_position_embeddings=8192)
    assert [trained_length(each, 32_768) for each in (Rope(), PiRope(factor=8.0), yarn)] == [32_768, 4096, 8192]
    assert trained_length(PiRope(factor=9.0), 4) == 1
    assert [named(each) for each in (Rope(), PiRope(factor=8.0), yarn)] == [
        "rope", "pi (factor 8)", "yarn (factor 4 from 8,192 tokens)"
    ]  # fmt: skip
    check_layers_differ([True, False])
    for windows, said in (([False], "no layer of the model has a window"), ([True, True], "every layer of the model has the")):
        with pytest.raises(ConfigError, match=f"rope.layers='full_attention': {said}"):
            check_layers_differ(windows)
