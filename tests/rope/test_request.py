"""What a recipe asks of RoPE takes base, trained length and factor from the checkpoint where it does not say them."""

import dataclasses
import re

import pytest

from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.recipe import load_recipe
from nemo_longctx.resume import check_live, live_settings
from nemo_longctx.rope.request import parse_request
from nemo_longctx.rope.variants import VARIANTS, Llama3Rope, LongRope, PiRope, Rope, YarnRope, to_dict

LLAMA2 = {"under": Rope(base=10_000.0), "trained": 4096}
QWEN = {"under": Rope(base=1_000_000.0), "trained": 32_768}
LLAMA31 = {"under": Llama3Rope(), "trained": 131_072}  # factor 8 from 8,192
TRAINED = {"original_max_position_embeddings": 4096}
DIVISORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def completed(values, *, under, trained, seq_length):
    return parse_request(values).complete(under, seq_length=seq_length, trained=trained)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"abf"}))
@pytest.mark.parametrize("checkpoint", [LLAMA2, QWEN, LLAMA31], ids=["llama2", "qwen", "llama31"])
def test_base_is_the_checkpoints(name, checkpoint):
    values = {"variant": name, **(DIVISORS if name == "longrope" else {})}
    made = completed(values, **checkpoint, seq_length=262_144)
    assert made.variant.base == checkpoint["under"].base
    assert any(note.startswith("rope.base=") for note in made.notes)  # nothing is silent


def test_abf_is_its_base():
    assert completed({"variant": "abf"}, **LLAMA2, seq_length=32_768).variant.base == 500_000


@pytest.mark.parametrize("name", ["pi", "ntk", "ntk_by_parts", "yarn", "llama3", "dynamic_ntk"])
def test_factor_is_the_new_length_over_the_trained_one(name):
    for checkpoint, seq_length, factor, trained in ((LLAMA2, 32_768, 8, 4096), (QWEN, 131_072, 4, 32_768)):
        made = completed({"variant": name}, **checkpoint, seq_length=seq_length).variant
        assert made.factor == factor
        assert getattr(made, "original_max_position_embeddings", trained) == trained


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn", "ntk_by_parts"])
def test_another_variant_takes_the_place_of_llama31s_scaling(name):
    """Its plain frequencies were trained at 8,192 tokens: the new factor covers the whole way, and the notes say so."""
    made = completed({"variant": name}, **LLAMA31, seq_length=262_144)
    assert made.variant.factor == 32
    assert getattr(made.variant, "original_max_position_embeddings", 8192) == 8192
    assert any("takes the place of llama3 (factor 8 from 8,192 tokens) of the checkpoint" in note for note in made.notes)


def test_the_same_variant_goes_on():
    made = completed({"variant": "llama3"}, **LLAMA31, seq_length=262_144).variant
    assert made == Llama3Rope(factor=16.0)
    yarn = YarnRope(base=1e6, factor=4.0, original_max_position_embeddings=32_768, beta_fast=16.0)
    made = completed({"variant": "yarn"}, under=yarn, trained=131_072, seq_length=262_144).variant
    assert made == YarnRope(base=1e6, factor=8.0, original_max_position_embeddings=32_768, beta_fast=16.0)
    same = completed({"variant": "yarn"}, under=yarn, trained=131_072, seq_length=65_536).variant
    assert same == yarn


@pytest.mark.parametrize(("said", "seq_length", "factor"), [
    (32_768, 131_072, 4.0), (40_960, 131_072, 4.0), (40_960, 65_536, 4.0), (32_768, 262_144, 8.0), (131_072, 262_144, 8.0),
    (262_144, 524_288, 8.0),
])  # fmt: skip
def test_yarn_goes_on_from_where_it_reaches(said, seq_length, factor):
    """Qwen's config.json says the length before YaRN (Qwen2.5: 32,768; Qwen3: 40,960), others the one after it."""
    yarn = YarnRope(base=1e6, factor=4.0, original_max_position_embeddings=32_768)
    made = completed({"variant": "yarn"}, under=yarn, trained=said, seq_length=seq_length)
    assert made.variant == dataclasses.replace(yarn, factor=factor)
    reaches = "131,072 tokens that its YaRN reaches" if said < 131_072 else f"{said:,} trained tokens"
    assert f"rope.factor={factor:g}: 4 of the checkpoint x {seq_length:,} / {reaches}" in made.notes


def test_pi_under_another_variant_was_trained_shorter():
    made = completed({"variant": "yarn"}, under=PiRope(factor=8.0), trained=32_768, seq_length=65_536).variant
    assert (made.factor, made.original_max_position_embeddings) == (16, 4096)


def test_what_is_set_wins():
    values = {"variant": "yarn", "base": 7e5, "factor": 3.0, "original_max_position_embeddings": 2048}
    made = completed(values, **QWEN, seq_length=131_072)
    assert made.variant == YarnRope(base=7e5, factor=3.0, original_max_position_embeddings=2048)
    assert not made.notes
    null = completed({"variant": "yarn", "base": None, "factor": None}, **QWEN, seq_length=131_072)
    assert null == completed({"variant": "yarn"}, **QWEN, seq_length=131_072)


def test_a_base_alone_keeps_the_variant():
    yarn = YarnRope(base=1e6, factor=4.0, original_max_position_embeddings=32_768)
    assert completed({"base": 5e6}, under=yarn, trained=131_072, seq_length=131_072).variant == dataclasses.replace(
        yarn, base=5e6
    )


def test_set_trained_length_gives_the_factor():
    made = completed({"variant": "yarn", "original_max_position_embeddings": 8192}, **LLAMA2, seq_length=32_768).variant
    assert made.factor == 4


def test_nothing_to_stretch_is_factor_one_and_said():
    made = completed({"variant": "pi"}, **QWEN, seq_length=16_384)
    assert made.variant.factor == 1
    assert any("none is stretched" in note for note in made.notes)


def test_longrope_asks_for_its_divisors_or_takes_the_checkpoints():
    with pytest.raises(ConfigError, match=r"rope.short_factor=None: missing: LongRoPE's divisors"):
        completed({"variant": "longrope"}, **LLAMA2, seq_length=32_768)
    under = LongRope(factor=32.0, original_max_position_embeddings=4096, **DIVISORS)
    made = completed({"variant": "longrope"}, under=under, trained=131_072, seq_length=131_072).variant
    assert made == under


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "pi", "bse": 1}, "rope.bse=1: unknown key"),
        ({"variant": "rope", "factor": 2.0}, "rope.factor=2.0: unknown key"),
        ({"variant": "pi", "factor": 0.5}, "rope.factor=0.5: must be at least 1"),
        ({"variant": "pi", "factor": float("nan")}, "rope.factor=nan: must be a finite number"),
        ({"variant": "yarn", "original_max_position_embeddings": 0}, "1 or more"),
        ({"variant": "longrope", "long_factor": "x"}, "must be a list of numbers"),
        ({"variant": 3}, "no such variant"),
        ({"variant": "yran", "factor": 2.0}, "no such variant, did you mean 'yarn'"),
        (["pi"], "must be a mapping"),
        ({}, "no such variant"),
        ({"factor": 2.0}, "name it beside factor"),
        (
            {"variant": "yarn", "layers": ["full_attention"]},
            "rope.layers=.*full_attention leaves layers with a window plain RoPE",
        ),
        ({"full_attention": {"variant": "yarn"}}, "rope.full_attention=.*say rope.layers=full_attention"),
        (
            {"base": 1e6, "rope_local_base_freq": 1e4},
            "rope.rope_local_base_freq=.*base of layers with a window as rope.local_base",
        ),
        ({"base": 0.5}, "rope.base=0.5: must be above 1"),
        (
            {"variant": "yarn", "attention_factor": 1.2, "mscale": 0.7},
            "rope.mscale=0.7: has no effect beside rope.attention_factor",
        ),
        ({"variant": "yarn", "attention_factor": 1.2, "mscale_all_dim": 1}, "rope.mscale_all_dim=1: has no effect beside"),
        (
            {"variant": "longrope", "short_factor": [1.0], "long_factor": [1, 2]},
            "rope.long_factor='2 numbers': must have as many",
        ),
    ],
)
def test_a_bad_request_is_refused_before_a_checkpoint_is_at_hand(values, message):
    with pytest.raises(ConfigError) as raised:
        parse_request(values)
    assert re.search(message, str(raised.value))


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"abf", "rope"}))
def test_layers_with_a_window_keep_the_base_that_they_have(name):
    """OLMo 3's extension: only layers that see all tokens are stretched."""
    values = {"variant": name, "layers": "full_attention", **(DIVISORS if name == "longrope" else {})}
    for checkpoint in (LLAMA2, QWEN):
        made = completed(values, **checkpoint, seq_length=262_144)
        everywhere = completed({**values, "layers": "all"}, **checkpoint, seq_length=262_144).variant
        assert made.variant.local == Rope(base=checkpoint["under"].base)
        assert made.variant.everywhere == everywhere
        assert everywhere.local is None
        assert any(note.startswith("rope.local_base=") for note in made.notes)


@pytest.mark.parametrize("values", [{}, {"variant": "rope"}, {"base": 1e6}, {"variant": "abf", "base": 1e6}])
def test_two_ropes_that_are_one_are_refused(values):
    with pytest.raises(ConfigError, match=r"rope.layers='full_attention': has no effect"):
        completed({**values, "layers": "full_attention"}, **QWEN, seq_length=131_072)


def test_two_bases_are_two_settings():
    """Gemma 3's: 1,000,000 and a factor of 8 where all tokens are seen, 10,000 in layers with a window."""
    values = {"variant": "pi", "base": 1e6, "factor": 8.0, "layers": "full_attention", "local_base": 1e4}
    made = completed(values, **QWEN, seq_length=131_072).variant
    assert made == PiRope(base=1e6, factor=8.0, local_base=1e4)
    assert completed({"base": 5e6}, under=made, trained=131_072, seq_length=131_072).variant.local_base == 1e4
    grown = completed({"variant": "pi"}, under=made, trained=131_072, seq_length=262_144)
    assert grown.variant == PiRope(base=1e6, factor=16.0, local_base=1e4)  # a checkpoint's windows keep theirs
    assert any("rope.local_base=10000: layers with a window keep" in note for note in grown.notes)
    assert completed({"layers": "all"}, under=made, trained=131_072, seq_length=131_072).variant == made.everywhere


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "yarn", "layers": "sliding_attention"}, "rope.layers='sliding_attention': full_attention leaves"),
        ({"variant": "yarn", "layer": "full_attention"}, "rope.layer='full_attention': unknown key, did you mean 'layers'?"),
        ({"variant": "yarn", "layers": "all", "local_base": 1e4}, "rope.local_base=10000.0: has no effect with"),
        ({"variant": "yarn", "layers": "full_attention", "local_base": 1}, "rope.local_base=1: must be above 1"),
        ({"variant": "yarn", "local_base": "1e4"}, "rope.local_base='1e4': not a number"),
    ],
)
def test_a_bad_word_on_layers_is_refused(values, message):
    with pytest.raises(ConfigError) as raised:
        parse_request(values)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "no layer of the model has a window"),
        ({"window_size": [9, 0]}, "every layer of the model has the window"),
        ({"window_size": [9, 0], "window_attn_skip_freq": [1, 1, 1]}, "every layer of the model has the window"),
        ({"window_size": [9, 0], "window_attn_skip_freq": [1, 0, 1]}, None),
        ({"window_size": [9, 0], "window_attn_skip_freq": 3}, None),
        ({"window_size": [9, 0], "window_attn_skip_freq": 4}, "every layer of the model has the window"),
    ],
)
def test_layers_of_one_type_are_refused_before_anything_starts(model, message):
    overrides = [f"++model.{key}={value}" for key, value in model.items()]
    asked = compose(["recipe=tiny_cpu_base", "rope=yarn", "rope.layers=full_attention", *overrides])
    if message is None:
        assert load_recipe(asked).rope_variant.by_layer
        return
    with pytest.raises(ConfigError, match=f"rope.layers='full_attention': {message}"):
        load_recipe(asked)


def test_a_restart_with_other_layers_is_refused():
    settings = {f"rope.{key}": {"run": value} for key, value in to_dict(YarnRope(factor=2.0, **TRAINED)).items()}
    for has, asked in (("all", "full_attention"), ("full_attention", "all")):
        live = live_settings({"settings": {**settings, "rope.layers": {"run": has}}})
        with pytest.raises(ConfigError, match=f"rope.layers='{asked}': it was trained with '{has}'"):
            check_live(live, {"rope.layers": asked}, where="it")
    old = live_settings({"settings": settings})  # of a run before layers could differ
    with pytest.raises(ConfigError, match=r"rope.layers='full_attention': it was trained with 'all'"):
        check_live(old, {"rope.layers": "full_attention"}, where="it")


def test_a_request_knows_its_base_its_layers_and_whether_it_trains():
    for values, base, by_layer, evaluation_only in (
        ({"variant": "abf"}, 5e5, False, False),
        ({"variant": "abf", "base": 7e5, "layers": "all"}, 7e5, False, False),
        ({"variant": "pi", "layers": "full_attention"}, None, True, False),
        ({"variant": "pi", "local_base": 1e4}, None, True, False),
        ({"base": 3e4}, 3e4, False, False),
        ({"layers": "full_attention"}, None, True, False),
        ({"variant": "dynamic_ntk"}, None, False, True),
    ):
        asked = parse_request(values)
        assert (asked.base, asked.by_layer, asked.evaluation_only) == (base, by_layer, evaluation_only)
        assert asked.variant == values.get("variant")
