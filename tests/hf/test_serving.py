"""What vLLM reads from an export beside transformers: lengths and attention factors, by the rules of its source."""

import math

import pytest

from nemo_longctx.hf.generation import with_length
from nemo_longctx.hf.serving import reading_lines, readings
from nemo_longctx.hf.tokenizer import NO_LIMIT, with_limit
from nemo_longctx.rope import AbfRope, DynamicNtkRope, Llama3Rope, PiRope, YarnRope

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


def test_limits_of_the_old_model_go_with_the_length():
    assert with_limit(256, LONG) == LONG
    assert with_limit(None, LONG) == with_limit(NO_LIMIT, LONG) == NO_LIMIT
    assert with_length({"max_length": 256, "top_p": 0.6}, LONG) == {"max_length": LONG, "top_p": 0.6}
