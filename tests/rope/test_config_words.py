"""What configs of transformers and of NeMo say of a variant, key by key, and what is read of theirs."""

import dataclasses
import math

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.rope import VARIANTS, AbfRope, LongRope, PiRope, Rope, RopeVariant, YarnRope
from nemo_longctx.rope.nemo import variant_of_context, variant_of_fields

TRAINED = {"original_max_position_embeddings": 64}
DIVISORS = {"short_factor": (1.0, 1.5, 2.0, 2.5), "long_factor": (1.0, 2.0, 4.0, 8.0)}
DIM = 8
LOCAL = 1_000.0
LINEAR = {"rope_type": "linear", "factor": 8.0}
WRITTEN = {
    "rope": {}, "abf": {}, "ntk": {},
    "pi": {"rope_type": "linear", "factor": 4.0},
    "dynamic_ntk": {"rope_type": "dynamic", "factor": 4.0},
    "ntk_by_parts": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 32.0, **TRAINED},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, **TRAINED},
    "longrope": {"rope_type": "longrope", "factor": 4.0, **{key: list(value) for key, value in DIVISORS.items()}, **TRAINED,
                 "attention_factor": math.sqrt(1 + math.log(4) / math.log(64))},
}  # fmt: skip


@pytest.mark.parametrize("local", [None, LOCAL])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_for_transformers_is_these_keys_and_no_other(name, local):
    known = {field.name for field in dataclasses.fields(VARIANTS[name])}
    given = {key: value for key, value in {"factor": 4, **TRAINED, **DIVISORS}.items() if key in known}
    variant = VARIANTS[name](base=20_000, local_base=local, **given)
    longest = 64 if name == "dynamic_ntk" else 999
    theta = 20_000 * 4 ** (DIM / (DIM - 2)) if name == "ntk" else 20_000
    partial = {"partial_rotary_factor": 0.5}
    for share in ({}, partial):
        four = variant.to_hf(rotary_dim=DIM, max_position_embeddings=999, **share)
        top = TRAINED if name == "longrope" else {}
        windows = {} if local is None else {"rope_local_base_freq": local}
        wanted = {"max_position_embeddings": longest, "rope_scaling": WRITTEN[name] or None, **top, **windows, **share}
        assert four.pop("rope_theta") == pytest.approx(theta)
        assert four == wanted
        five = variant.to_hf(rotary_dim=DIM, max_position_embeddings=999, version=5, **share)
        everywhere = {"rope_type": "default", "rope_theta": pytest.approx(theta), **WRITTEN[name], **share}
        sliding = {"rope_type": "default", "rope_theta": local, **share}
        parameters = everywhere if local is None else {"full_attention": everywhere, "sliding_attention": sliding}
        assert five == {"max_position_embeddings": longest, "rope_parameters": parameters}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"truncate": False}, {"truncate": False}),
        ({"attention_factor": 1.5}, {"attention_factor": 1.5}),
        ({"mscale": 0.5}, {"attention_factor": 0.05 * math.log(4) + 1}),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, {"attention_factor": 1.0}),
    ],
)
def test_yarn_s_own_numbers_are_written_where_transformers_would_take_others(given, said):
    keys = YarnRope(factor=4.0, **TRAINED, **given).to_hf(rotary_dim=DIM, max_position_embeddings=999)["rope_scaling"]
    assert {key: value for key, value in keys.items() if key not in WRITTEN["yarn"]} == pytest.approx(said)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, Rope()),
        ({"model_type": "mixtral"}, Rope(base=1e6)),
        ({"model_type": "smollm3"}, Rope(base=2e6)),
        ({"model_type": "llama4_text"}, Rope(base=5e5)),
        ({"model_type": "gpt_oss"}, Rope(base=1.5e5)),
        ({"model_type": ["mixtral"]}, Rope()),
        ({"model_type": "gemma3"}, Rope(base=1e6, local_base=1e4)),
        ({"model_type": "gemma3", "text_config": {"rope_scaling": LINEAR}}, PiRope(base=1e6, local_base=1e4, factor=8.0)),
        ({"model_type": "llava", "text_config": {"model_type": "mistral", "rope_theta": 1e9}}, Rope(base=1e9)),
        ({"model_type": "x", "thinker_config": {"text_config": {"rope_theta": 1e5}}}, Rope(base=1e5)),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}, "rope_theta": None}, Rope(base=5e5)),
        ({"model_type": "x", "rope_theta": 2e4, "text_config": {"rope_theta": 1e5}}, Rope(base=2e4)),  # its own word first
        ({"model_type": "gemma3_text", "rope_theta": 1e4}, Rope()),  # one RoPE, by two names
        ({"model_type": "olmo3", "rope_theta": 5e5}, Rope(base=5e5)),
        ({"model_type": "olmo3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, PiRope(factor=2.0, local_base=1e4)),
        ({"rope_local_base_freq": 2e4}, Rope(local_base=2e4)),
        ({"model_type": "llama", "rope_local_base_freq": 2e4}, Rope()),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}}, PiRope(factor=2)),
        (
            {"max_position_embeddings": 8.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            VARIANTS["dynamic_ntk"](factor=2.0, original_max_position_embeddings=8),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.5, **TRAINED, "beta_fast": None}},
            YarnRope(factor=2.0, **TRAINED),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 2, "mscale_all_dim": 3, "beta_slow": 2, **TRAINED}},
            YarnRope(factor=2, mscale=2, mscale_all_dim=3, beta_slow=2, **TRAINED),
        ),
        (
            {"max_position_embeddings": 256, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            YarnRope(factor=2.0, original_max_position_embeddings=256),
        ),
        (  # 5 looks at the top first, 4 never
            {**TRAINED, "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
            YarnRope(factor=2.0, original_max_position_embeddings=32),
        ),
        (
            {**TRAINED, "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
            YarnRope(factor=2.0, **TRAINED),
        ),
        (
            {
                "max_position_embeddings": 256, **TRAINED,
                "rope_scaling": {"rope_type": "longrope", "factor": 32.0, **DIVISORS, "attention_factor": 1.25},
            },
            LongRope(factor=4.0, attention_factor=1.25, **TRAINED, **DIVISORS),
        ),
        (
            {"max_position_embeddings": 32, **TRAINED, "rope_scaling": {"rope_type": "longrope", **DIVISORS}},
            LongRope(factor=1.0, **TRAINED, **DIVISORS),
        ),
    ],
)  # fmt: skip
def test_a_config_of_transformers_is_this_variant(config, wanted):
    assert RopeVariant.from_hf(config) == wanted


LLAMA, DYNAMIC = ({"rope_scaling": {"rope_type": name, "factor": 2.0}} for name in ("llama3", "dynamic"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_theta": None}, "rope_theta=None: null, of which no reader makes frequencies"),
        ({"rope_theta": True}, "rope_theta=True: not a number"),
        (LLAMA | {"max_position_embeddings": 9}, "original_max_position_embeddings=None: missing"),
        (DYNAMIC, "max_position_embeddings=None: missing; rope_type 'dynamic' needs it"),
        (DYNAMIC | {"max_position_embeddings": 2**31 + 1}, "is beyond every model"),
        (DYNAMIC | {"max_position_embeddings": 8.5}, "must be a whole number of tokens"),
        (DYNAMIC | {"max_position_embeddings": True}, "must be a whole number of tokens"),
    ],
)
def test_a_config_of_transformers_without_what_it_needs_is_refused(config, said):
    with pytest.raises(ConfigError) as error:
        RopeVariant.from_hf(config)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, Rope(base=1e4)),
        ({"rotary_base": 5e5, "seq_len_interpolation_factor": None}, Rope(base=5e5)),
        ({"rotary_base": 5e5, "seq_len_interpolation_factor": 2}, PiRope(base=5e5, factor=2.0)),
        (
            {"scale_factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "old_context_len": 64},
            VARIANTS["llama3"](base=1e4, factor=8.0, low_freq_factor=2.0, high_freq_factor=3.0, **TRAINED),
        ),
        ({"scale_factor": 1.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "old_context_len": 64}, Rope()),
        ({"scale_factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}, Rope()),
        (
            {"position_embedding_type": "yarn", "rotary_base": 3e4, "yarn_beta_fast": 9.0,
             "yarn_rotary_scaling_factor": 2.0, "yarn_original_max_position_embeddings": 64,
             "yarn_mscale_all_dim": 0.5, "yarn_correction_range_round_to_int": False},
            YarnRope(base=3e4, factor=2.0, beta_fast=9.0, mscale_all_dim=0.5, truncate=False, **TRAINED),
        ),
    ],
)  # fmt: skip
def test_a_nemo_config_is_this_variant(config, wanted):
    assert variant_of_fields(config) == wanted == variant_of_context({"config": config})
    assert variant_of_context({"config": config, "model_transform": {"rope": {"variant": "abf"}}}) == AbfRope()
    assert variant_of_context({"config": config, "model_transform": {"rope": None}}) == wanted
    for context, said in (
        ({"config": {"rotary_base": "x"}}, "says no RoPE that can be read"),
        ({"config": {"rotary_base": 0.5}}, r"^rope\.base=0\.5: must be above 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            variant_of_context(context)
