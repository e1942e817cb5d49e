"""Each kind of field of a `config.json` to its bounds, and what is said of fields that nothing reads."""

import json

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import DTYPES, family_rope, read_config, read_json
from nemo_longctx.hf.layers import FULL, SLIDING, attention_values
from nemo_longctx.rope import LongRope, PiRope, Rope

SIZES = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MOST = {"head_dim": 2**16, "num_hidden_layers": 2**16, "num_attention_heads": 2**20, "hidden_size": 2**24}


def read(**changes):
    return read_config(LLAMA | changes)


def refusal(**changes):
    with pytest.raises(ConfigError) as error:
        read(**changes)
    return str(error.value)


@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"])
def test_sizes_are_whole_numbers_below_what_any_model_has(key):
    for value in (0, -1, True, 1.5, "8", [8], float("inf")):
        assert refusal(**{key: value}) == f"{key}={value!r}: must be a whole number of 1 or more, in config.json"
    most = MOST.get(key, 2**31)
    assert refusal(**{key: most + 1}) == f"{key}={most + 1}: is beyond every model ({most:,} at most); mend config.json"
    if key in ("vocab_size", "intermediate_size", "max_position_embeddings", "num_hidden_layers", "head_dim"):
        assert read(**{key: most}).values[key] == most
        assert read(**{key: 8.0}).values[key] == 8
    if key in SIZES:
        said = "missing in config.json; take it from the model that the weights are of"
        assert refusal(**{key: None}) == f"{key}=None: {said}"


def test_heads_that_say_nothing_are_those_of_the_sizes():
    found = read(num_key_value_heads=None, head_dim=None)
    assert (found.values["num_key_value_heads"], found.values["head_dim"], found.rotary_dim) == (4, 16, 16)
    assert read(head_dim=8).rotary_dim == 8
    assert refusal(num_key_value_heads=3) == "num_key_value_heads=3: must divide num_attention_heads=4"
    assert refusal(hidden_size=66) == "num_attention_heads=4: does not divide hidden_size=66; set head_dim"
    assert read(hidden_size=66, head_dim=16).values["hidden_size"] == 66
    assert refusal(max_position_embeddings=None).startswith("max_position_embeddings=None: write the longest input in tokens")


@pytest.mark.parametrize("key", ["rms_norm_eps", "initializer_range"])
def test_numbers_are_of_nothing_or_more(key):
    for value in (0, 0.0, 3, 1e-6):
        assert read(**{key: value}).values[key] == value
    for value in (-1e-9, True, "1e-6", None, float("nan")):
        assert refusal(**{key: value}) == f"{key}={value!r}: must be a number of 0 or more, in config.json"


def test_flags_are_true_false_or_null():
    assert read(tie_word_embeddings=None).values["tie_word_embeddings"] is False
    assert read(tie_word_embeddings=True).values["tie_word_embeddings"] is True
    assert refusal(tie_word_embeddings=1) == "tie_word_embeddings=1: must be true or false, in config.json"
    for value in (0, 0.5, None):
        read(attention_dropout=value)
    for value in (True, "0.1"):
        assert refusal(attention_dropout=value) == f"attention_dropout={value!r}: must be a number, in config.json"


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_weights_that_are_quantised_are_refused(key):
    assert refusal(**{key: {"quant_method": "awq"}}).startswith(f"{key}='awq': its weights are quantised")
    assert refusal(**{key: {"bits": 4}}).startswith(f"{key}={{'bits': 4}}: its weights")
    assert refusal(**{key: "x"}).startswith(f"{key}='x': its weights")
    read(**{key: None})


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["LlamaForCausalLM"], False), (["LlamaModel"], False), ([3, "LlamaModel"], False),
        ("LlamaForTokenClassification", False),
        (["LlamaForTokenClassification"], True), (["LlamaModel", "LlamaForQuestionAnswering"], True),
    ],
)  # fmt: skip
def test_a_head_that_would_be_lost_is_refused(names, refused):
    if refused:
        assert "another head than a language model's, which would be lost" in refusal(architectures=names)
    else:
        read(architectures=names)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_of_the_weights_is_one_that_trains(key):
    for name in DTYPES:
        assert read(**{key: name}).values["dtype"] == read(**{key: f"torch.{name}"}).values["dtype"] == name
    for value in ("auto", None):
        assert "dtype" not in read(**{key: value}).values
    for value in ("int8", "float64", 3):
        assert refusal(**{key: value}).startswith(f"dtype={value!r}: weights of this type cannot be trained; known: float32, ")
    assert read(dtype="float16", torch_dtype="bfloat16").values["dtype"] == "float16"


@pytest.mark.parametrize(
    ("family", "act", "taken"),
    [
        ("llama", "silu", "silu"), ("llama", "swish", "silu"), ("llama", "gelu", None), ("llama", None, None),
        ("starcoder2", "gelu", "gelu"), ("starcoder2", "gelu_pytorch_tanh", "gelu_pytorch_tanh"), ("starcoder2", "silu", None),
    ],
)  # fmt: skip
def test_activations_are_those_that_the_host_has(family, act, taken):
    more = {} if family == "llama" else {"use_bias": True}
    if taken is None:
        known = "silu" if family == "llama" else "gelu_pytorch_tanh"
        said = f"hidden_act={act!r}: a {family} model of the host has {known!r} and would not compute the same"
        assert refusal(model_type=family, hidden_act=act, **more) == said
    else:
        assert read(model_type=family, hidden_act=act, **more).values["hidden_act"] == taken


def test_what_nothing_reads_is_said():
    assert read().notes == ()
    (note,) = read(auto_map={"AutoConfig": "x.Y"}).notes
    assert note == "the code that comes with the directory (auto_map) is not run: it is taken as transformers' own llama"
    without = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    (note,) = read_config(without).notes
    assert note == "max_position_embeddings is not said: 2,048 tokens, as transformers takes it for llama"
    (note,) = read(is_causal=False).notes
    assert note == "is_causal=false: transformers' llama does not read it; each token sees those before it alone"
    assert read(is_causal=True).notes == ()
    window = {"model_type": "mistral", "sliding_window": 64}
    assert read(**window).notes == read(**window, use_sliding_window=True).notes == ()
    (note,) = read(**window, use_sliding_window=False).notes
    assert note == "use_sliding_window=false: transformers' mistral does not read it and keeps its window; write null there"
    (note,) = read(rope_scaling={"rope_type": "linear", "factor": 2.0, "b": 1, "a": 2}).notes
    assert note == "rope_scaling: a, b is read by no RoPE of transformers' llama; left out"
    assert any(
        "transformers 4 does not read rope_parameters" in note for note in read(rope_parameters={"rope_theta": 5e5}).notes
    )


def test_the_keys_that_say_a_layer_s_window_are_those_of_its_family():
    no = (False, False)
    assert attention_values("llama", (None, None), no) == {"sliding_window": None}
    assert attention_values("mistral", (64, 64), no) == {"sliding_window": 64}
    assert attention_values("mistral", (None, None), no) == {"sliding_window": None}
    qwen = {"use_sliding_window": True, "sliding_window": 64, "layer_types": [FULL, SLIDING], "max_window_layers": 0}
    assert attention_values("qwen2", (None, 64), no) == qwen
    none = {"use_sliding_window": False, "sliding_window": None, "layer_types": [FULL, FULL], "max_window_layers": 2}
    assert attention_values("qwen3", (None, None), no) == none
    del none["max_window_layers"]
    assert attention_values("smollm3", (None, None), (False, True)) == none | {"no_rope_layers": [1, 0]}
    for family, windows, no_rope, said in (
        ("qwen2", (32, 64), no, "window_size=[32, 64]: transformers has one window for all layers with one"),
        ("qwen2", (None, None), (True, False), "no_rope_freq=[1, 0]: transformers' qwen2 has RoPE in every layer"),
        ("llama", (64, 64), no, "window_size=64: transformers' llama has no window; its mistral has"),
        ("mistral", (None, 64), no, "window_attn_skip_freq=[None, 64]: transformers' mistral has one window in every layer"),
    ):
        with pytest.raises(ConfigError) as error:
            attention_values(family, windows, no_rope)
        assert str(error.value) == said


def test_phi3_says_longrope_in_its_own_words():
    lists = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    long = LongRope(factor=2.0, original_max_position_embeddings=64, **lists)
    for variant, wanted in ((Rope(), None), (long, {"type": "longrope", **lists})):
        keys = variant.to_hf(rotary_dim=4, max_position_embeddings=128)
        assert family_rope("llama", variant, keys) == keys
        found = family_rope("phi3", variant, keys)
        assert found["rope_scaling"] == wanted
        assert found["original_max_position_embeddings"] == (64 if wanted else 128)
    with pytest.raises(ConfigError, match=r"rope\.variant='pi': transformers' phi3 takes no scaling of RoPE but longrope"):
        family_rope("phi3", PiRope(factor=2.0), PiRope(factor=2.0).to_hf(rotary_dim=4, max_position_embeddings=128))
    with pytest.raises(ConfigError, match=r"rope\.layers='full_attention': no class of transformers has"):
        family_rope("llama", Rope(local_base=5.0), {})
    phi3 = {"model_type": "phi3", "num_key_value_heads": 4, "original_max_position_embeddings": 64, "hidden_size": 16}
    for name in ("longrope", "su"):
        assert read(**phi3, rope_scaling={"type": name, **lists}).variant == LongRope(
            factor=4.0, original_max_position_embeddings=64, **lists
        )
    for scaling in (
        {"type": "linear", "factor": 2.0},
        {"type": "su", **lists, "factor": 2.0},
        {"rope_type": "longrope", **lists},
    ):
        assert "transformers' phi3 takes type 'longrope', short_factor and long_factor" in refusal(**phi3, rope_scaling=scaling)


def test_a_file_that_is_no_mapping_is_told(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        read_json(file)
    for content, said in ((b"\xff", "is not JSON"), (b"{", "is not JSON"), (b"[1]", "holds a list, where a mapping")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            read_json(file)
    file.write_text(json.dumps(LLAMA))
    assert read_json(file) == LLAMA
