"""What vLLM reads from an export beside transformers: lengths and attention factors, by the rules of its source."""

import json
import math

import pytest
import transformers

from nemo_longctx.hf.dtypes import by_both_names, in_dtype
from nemo_longctx.hf.generation import read_generation_config, with_length
from nemo_longctx.hf.serving import reading_lines, readings, vllm_attention_factor
from nemo_longctx.hf.tokenizer import NO_LIMIT, with_limit
from nemo_longctx.rope import AbfRope, DynamicNtkRope, Llama3Rope, LongRope, PiRope, YarnRope

LONG = 32_768


def read(variant, limit):
    keys = variant.to_hf(rotary_dim=64, max_position_embeddings=LONG)
    return readings(keys, variant, limit), " ".join(reading_lines(keys, variant, limit))


@pytest.mark.parametrize(
    ("variant", "limit", "length"),
    [
        (AbfRope(), None, LONG),
        (AbfRope(), 4096, 4096),
        (PiRope(factor=8.0), None, 8 * LONG),
        (PiRope(factor=8.0), LONG, LONG),
        (YarnRope(factor=8.0, original_max_position_embeddings=4096), None, LONG),
        (Llama3Rope(), None, LONG),
        (DynamicNtkRope(factor=2.0, original_max_position_embeddings=4096), None, 8192),
    ],
)
def test_the_longest_input_that_vllm_takes(variant, limit, length):
    (theirs, served), lines = read(variant, limit)
    assert served.longest == length
    assert ("--max-model-len" in lines) == (served.longest != theirs.longest and variant.variant != "dynamic_ntk")


def test_an_attention_factor_that_vllm_does_not_read_is_said():
    plain = YarnRope(factor=8.0, original_max_position_embeddings=4096)
    (theirs, served), lines = read(plain, LONG)
    assert served.attention_factor == pytest.approx(theirs.attention_factor) == pytest.approx(0.1 * math.log(8) + 1)
    assert "differs" not in lines
    _, lines = read(YarnRope(factor=8.0, original_max_position_embeddings=4096, attention_factor=1.0), LONG)
    assert "differs: vLLM multiplies q and k by 1.20794, not 1" in lines


@pytest.mark.parametrize(("factor", "told"), [(8.0, False), (4.0, True), (16.0, True), (8.00001, False)])
def test_a_yarn_that_older_transformers_read_otherwise_is_said(factor, told):
    """4.51 and 4.53 divide max_position_embeddings by the trained length and pass over `factor`."""
    _, lines = read(YarnRope(factor=factor, original_max_position_embeddings=4096), LONG)
    assert (f"take the ratio of the lengths, 8, for the factor {factor:g}" in lines) == told
    assert (f"--max-position-embeddings {round(4096 * factor)} for them" in lines) == told


@pytest.mark.parametrize(("trained", "factor"), [(4096, math.sqrt(1 + 3 / 12)), (LONG, 1.0), (2 * LONG, 1.0)])
def test_vllm_counts_longrope_s_factor_from_the_longest_input(trained, factor):
    """Of 32,768 = 2^15 from 4,096 = 2^12: sqrt(1 + log 2^3 / log 2^12)."""
    variant = LongRope(
        short_factor=(1.0,) * 32,
        long_factor=(2.0,) * 32,
        factor=8.0,
        original_max_position_embeddings=trained,
        attention_factor=1.0,
    )
    assert vllm_attention_factor(variant, LONG) == pytest.approx(factor)
    (theirs, served), lines = read(variant, LONG)
    assert (theirs.attention_factor, theirs.longest) == (1.0, LONG)
    assert served.attention_factor == pytest.approx(factor)
    assert ("differs: vLLM multiplies q and k by" in lines) == (factor != 1.0)
    assert lines.startswith("transformers reads: 32,768 tokens, attention factor 1 vLLM reads: 32,768 tokens")


def test_models_are_opened_in_a_type_by_the_word_of_transformers_at_hand():
    major, minor = map(int, transformers.__version__.split(".")[:2])
    assert in_dtype("auto") == {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": "auto"}


def test_the_type_of_the_weights_is_written_by_both_of_its_names(tmp_path):
    file = tmp_path / "config.json"
    for said, wanted in (
        ({"dtype": "bfloat16", "x": 1}, {"dtype": "bfloat16", "torch_dtype": "bfloat16", "x": 1}),
        ({"torch_dtype": "float16"}, {"torch_dtype": "float16"}),
        ({"x": 1}, {"x": 1}),
    ):
        file.write_text(json.dumps(said))
        by_both_names(file)
        assert json.loads(file.read_text()) == wanted
    file.write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    by_both_names(file)
    again = transformers.LlamaConfig.from_pretrained(tmp_path)
    assert str(vars(again).get("dtype", vars(again).get("torch_dtype"))) == "torch.bfloat16"


def test_limits_of_the_old_model_go_with_the_length():
    assert with_limit(256, LONG) == LONG
    assert with_limit(None, LONG) == with_limit(NO_LIMIT, LONG) == NO_LIMIT
    assert with_length({"max_length": 256, "top_p": 0.6}, LONG) == {"max_length": LONG, "top_p": 0.6}


@pytest.mark.parametrize("value", [None, False, [], {}, 0, True, 1, "eager", [1]])
def test_what_is_unset_is_not_told_as_left_behind(value):
    _, notes = read_generation_config({"unknown": value, "_from_model_config": value, "transformers_version": value}, 100)
    assert bool(notes) == (value not in (None, False, [], {}))
    assert all("unknown not carried" in note for note in notes)
