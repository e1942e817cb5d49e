"""Sizes: parameter counts that are published, config.json round trip, messages."""

import json
import os

import pytest
import yaml

from nemo_longctx.config import ConfigError
from nemo_longctx.planning import models
from nemo_longctx.planning.models import CLASSES, MODELS, ModelShape, class_sizes, model_by_name, parse_model, sizes_of

# The checkpoints' own counts (safetensors index of each, in parameters).
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "codellama_34b": 33_743_970_304,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen25_7b": 7_615_616_512,
    "mistral_7b": 7_248_023_552,
}


SMALL = "num_layers=2,hidden_size=64,ffn_hidden_size=96,num_attention_heads=4,vocab_size=8"
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 32}
LLAMA |= {"vocab_size": 100}


def test_parameter_counts_are_the_published_ones():
    assert {name: model.parameters for name, model in MODELS.items()} == PUBLISHED


@pytest.mark.parametrize(
    ("sizes", "published"),
    [  # Llama 3.2 1B and Qwen2.5 0.5B: one table for the embedding and the head
        ({"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32, "num_query_groups": 8,
          "vocab_size": 128256, "seq_length": 8192}, 1_235_814_400),
        ({"num_layers": 24, "hidden_size": 896, "ffn_hidden_size": 4864, "num_attention_heads": 14, "num_query_groups": 2,
          "vocab_size": 151936, "seq_length": 8192, "add_qkv_bias": True}, 494_032_768),
    ],
)  # fmt: skip
def test_a_table_that_is_both_embedding_and_head_counts_once(sizes, published):
    tied, apart = (ModelShape(**sizes, share_embeddings_and_output_weights=shared) for shared in (True, False))
    assert tied.parameters == published
    assert apart.parameters == published + sizes["vocab_size"] * sizes["hidden_size"]


def test_config_json_gives_the_same_model_as_its_name(tmp_path):
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert parse_model(str(tmp_path))[1] == parse_model(str(tmp_path / "config.json"))[1] == MODELS["qwen25_7b"]


def test_sizes_on_the_command_line():
    text = (
        "num_layers=2,hidden_size=64,ffn_hidden_size=96,num_attention_heads=4,num_query_groups=2,vocab_size=100,seq_length=128"
    )
    assert parse_model(text)[1] == ModelShape(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=100,
        seq_length=128,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lama2_7b", "llama2_7b"),
        ("num_layers=2", "missing"),
        ("num_layers=two", "whole number"),
        ("nmu_layers=2", "num_layers"),
        (f"{SMALL},kv_channels=-5", "kv_channels"),
        (f"{SMALL},num_query_groups=-4", "num_query_groups"),
        (f"{SMALL},num_query_groups=0", "num_query_groups"),
        ("num_layers=2,hidden_size=65,ffn_hidden_size=8,num_attention_heads=4,vocab_size=8", "does not divide"),
    ],
)
def test_mistakes_are_named(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_model(text)


def test_a_nemo_checkpoint_gives_its_sizes_and_the_newest_of_a_run(tmp_path):
    fields = {"num_layers": 3, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 2, "vocab_size": 512}
    for step, length in ((1, 64), (2, 256)):
        context = tmp_path / "checkpoints" / f"step={step}-last" / "context"
        context.mkdir(parents=True)
        config = {**fields, "num_query_groups": 1, "seq_length": length, "gated_linear_unit": True, "rotary_base": 10_000}
        (context / "model.yaml").write_text(yaml.safe_dump({"_target_": "nemo.LlamaModel", "config": config}))
        os.utime(context.parent, (step, step))
    wanted = ModelShape(**fields, num_query_groups=1, seq_length=256)
    assert parse_model(str(tmp_path)) == (tmp_path.name, wanted)
    assert parse_model(str(tmp_path / "checkpoints" / "step=1-last"))[1].seq_length == 64


@pytest.mark.parametrize(
    ("config", "says"), [({"num_moe_experts": 8}, "experts"), ({"num_layers": 2, "vocab_size": None}, "vocab_size")]
)
def test_a_nemo_checkpoint_that_cannot_be_planned_says_why(tmp_path, config, says):
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump({"config": config}))
    with pytest.raises(ConfigError, match=says):
        parse_model(str(tmp_path))


def test_experts_are_refused_rather_than_counted_wrongly(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ConfigError, match="mixtral"):
        parse_model(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1, 2]", "mapping"),
        ("not json", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (json.dumps({**LLAMA, "num_key_value_heads": "8"}), "num_key_value_heads='8'"),
        (json.dumps({**LLAMA, "num_key_value_heads": -4}), "num_key_value_heads=-4"),
        (json.dumps({**LLAMA, "head_dim": -128}), "head_dim=-128"),
        (json.dumps({**LLAMA, "vocab_size": None}), "vocab_size"),
        (json.dumps({**LLAMA, "attention_bias": "yes"}), "attention_bias='yes'"),
        (json.dumps({**LLAMA, "num_local_experts": 8}), "num_local_experts=8"),
        (json.dumps({**LLAMA, "quantization_config": {"quant_method": "awq"}}), "quantization_config='awq': its weights are"),
        (json.dumps({**LLAMA, "rope_theta": None}), "rope_theta=None: null"),
        (json.dumps({**LLAMA, "rope_scaling": [2.0]}), "rope_scaling=[2.0]: must be a mapping"),
        (json.dumps({**LLAMA, "dtype": "float8_e4m3fn"}), "dtype='float8_e4m3fn': weights of this type"),
        (json.dumps({**LLAMA, "max_position_embeddings": None}), "max_position_embeddings=None: write the longest input"),
    ],
)
def test_a_config_json_that_cannot_be_planned_is_named_with_what_is_wrong(tmp_path, content, says):
    file = tmp_path / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        parse_model(str(file))
    assert says in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("content", ["- 1", "config: [1, 2]", "a: !python/thing {}", "config: {num_layers: ["])
def test_a_nemo_context_that_is_none_is_named(tmp_path, content):
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "model.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.yaml"):
        parse_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("given", [{}, {"num_key_value_heads": None}, {"sliding_window": 64}, {"use_sliding_window": True}])
def test_what_a_config_json_leaves_out_is_what_transformers_takes(tmp_path, kind, given):
    transformers = pytest.importorskip("transformers")
    theirs = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}[kind]
    theirs = getattr(transformers, theirs)(**{**LLAMA, "model_type": kind, **given})
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": kind, **given}))
    ours = parse_model(str(tmp_path))[1]
    assert ours.query_groups == theirs.num_key_value_heads
    assert ours.seq_length == theirs.max_position_embeddings
    assert ours.share_embeddings_and_output_weights == theirs.tie_word_embeddings
    has_one = kind == "mistral" or "sliding_attention" in (getattr(theirs, "layer_types", None) or [])
    assert ours.sliding_window == (theirs.sliding_window if has_one else None)  # a Llama has none to use, nor has a full layer


def test_a_window_of_a_nemo_checkpoint_is_read(tmp_path):
    (tmp_path / "context").mkdir()
    fields = {"num_layers": 3, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 2, "vocab_size": 512}
    (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump({"config": {**fields, "window_size": [4096, 0]}}))
    assert parse_model(str(tmp_path))[1].sliding_window == 4097


SIZES = {"num_layers": 6, "hidden_size": 60, "ffn_hidden_size": 96, "num_attention_heads": 6, "vocab_size": 8}
OPTIONAL = ("num_query_groups", "kv_channels", "sliding_window")


@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "4", None])
def test_sizes_of_a_shape_are_whole_numbers_of_at_least_one(value):
    for key in (*SIZES, "seq_length", *OPTIONAL):
        if key in OPTIONAL and value is None:
            continue
        with pytest.raises(ConfigError) as error:
            ModelShape(**SIZES | {key: value})
        assert str(error.value) == f"model.{key}={value!r}: must be a whole number of 1 or more"


def test_what_a_shape_leaves_out_is_what_most_models_have():
    plain = ModelShape(**SIZES)
    assert (plain.query_groups, plain.head_dim, plain.query_width, plain.kv_width) == (6, 10, 60, 60)
    assert (plain.gated_linear_unit, plain.share_embeddings_and_output_weights, plain.add_qkv_bias) == (True, False, False)
    assert (plain.seq_length, plain.sliding_window, plain.full_layers, plain.windowed_layers) == (4096, None, None, 0)
    for full, windowed in ((None, 6), (0, 6), (2, 4), (6, 0)):
        assert ModelShape(**SIZES, sliding_window=1, full_layers=full).windowed_layers == windowed
    for full in (-1, 7):
        with pytest.raises(ConfigError, match=f"model.full_layers={full}: must be a number of the 6 layers"):
            ModelShape(**SIZES, full_layers=full)
    with pytest.raises(ConfigError, match=r"model\.num_query_groups=4: must divide num_attention_heads=6"):
        ModelShape(**SIZES, num_query_groups=4)
    with pytest.raises(ConfigError, match=r"model\.num_attention_heads=7: does not divide hidden_size=60; set kv_channels"):
        ModelShape(**SIZES | {"num_attention_heads": 7})
    wide = ModelShape(**SIZES | {"num_attention_heads": 7}, kv_channels=16, num_query_groups=1)
    assert (wide.head_dim, wide.query_width, wide.kv_width, wide.query_groups) == (16, 112, 16, 1)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_parameters_are_those_of_each_matrix(gated, bias, shared):
    model = ModelShape(
        **SIZES, num_query_groups=2, kv_channels=16, gated_linear_unit=gated, add_qkv_bias=bias,
        share_embeddings_and_output_weights=shared,
    )  # fmt: skip
    query, key = 60 * 96, 60 * 32
    attention, mlp = query + 2 * key + 96 * 60, (3 if gated else 2) * 60 * 96
    layer = attention + mlp + 2 * 60 + (96 + 2 * 32 if bias else 0)
    assert (model.attention_weights, model.mlp_weights, model.layer_parameters) == (attention, mlp, layer)
    assert (model.embedding_parameters, model.parameters) == (480, 6 * layer + (1 if shared else 2) * 480 + 60)


def test_the_planner_s_sizes_of_nemo_s_classes_are_those_of_their_models():
    for name, model in CLASSES.items():
        sizes = class_sizes({"config": name})
        assert ModelShape(**sizes) == MODELS[model]
        assert None not in sizes.values()
    assert class_sizes({"config": "OtherConfig"}) == class_sizes({}) == {}
    assert {MODELS[name].seq_length for name in ("llama2_7b", "llama2_13b", "codellama_34b", "llama2_70b")} == {4096}
    lengths = {"llama3_8b": 8192, "llama3_70b": 8192, "qwen25_7b": 32_768, "mistral_7b": 32_768}
    assert {name: MODELS[name].seq_length for name in lengths} == lengths
    with pytest.raises(
        ConfigError, match="model='llama3_8': not a model that the planner knows by name, did you mean 'llama3_8b'"
    ):
        model_by_name("llama3_8")


@pytest.mark.parametrize(
    ("said", "window", "full"),
    [
        ({"window_size": [127, 0]}, 128, None),
        ({"window_size": (0, 0)}, 1, None),
        ({"window_size": [-1, 0]}, None, None),
        ({"window_size": []}, None, None),
        ({"window_size": 127}, None, None),
        ({"window_size": ["127", 0]}, None, None),
        ({"window_size": [127, 0], "window_attn_skip_freq": [1, 0, 1, 1, 0, 1]}, 128, 2),
        ({"window_size": [127, 0], "window_attn_skip_freq": 3}, 128, 2),
        ({"window_size": [127, 0], "window_attn_skip_freq": 1}, 128, 6),
        ({"window_size": [127, 0], "window_attn_skip_freq": 0}, 128, None),
        ({"window_size": [127, 0], "window_attn_skip_freq": None}, 128, None),
        ({"window_attn_skip_freq": 3}, None, None),
    ],
)
def test_windows_are_megatron_s_and_count_the_query_itself(said, window, full):
    found = sizes_of({**SIZES, **said, "rotary_base": 1e4})
    assert found == SIZES | {k: v for k, v in (("sliding_window", window), ("full_layers", full)) if v is not None}
    if full is not None:
        without = {key: value for key, value in SIZES.items() if key != "num_layers"}
        known = isinstance(said["window_attn_skip_freq"], list)
        assert ("full_layers" in sizes_of({**without, **said})) == known


def test_layers_with_and_without_a_window_are_counted_apart(tmp_path):
    file = tmp_path / "config.json"
    config = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    file.write_text(json.dumps({**config, "num_hidden_layers": 5}))
    model = parse_model(str(file))[1]
    assert (model.sliding_window, model.full_layers, model.windowed_layers) == (64, 1, 4)
    file.write_text(json.dumps({**config, "max_window_layers": 0}))
    model = parse_model(str(file))[1]
    assert (model.sliding_window, model.full_layers, model.windowed_layers) == (64, None, 2)
    file.write_text(json.dumps({**LLAMA, "head_dim": 16}))
    assert parse_model(str(file))[1].kv_channels == 16
    file.write_text(json.dumps({**LLAMA, "head_dim": 2}))
    assert parse_model(str(file))[1].kv_channels is None  # 32 heads of 2 are the 64 of the model


@pytest.mark.parametrize(
    ("kind", "gated", "bias"),
    [("llama", True, False), ("mistral", True, False), ("qwen2", True, True), ("starcoder2", False, True)],
)
def test_each_family_has_its_mlp_and_its_biases(tmp_path, kind, gated, bias):
    said = {**LLAMA, "model_type": kind} | (
        {"hidden_act": "gelu_pytorch_tanh", "use_bias": True} if kind == "starcoder2" else {}
    )
    (tmp_path / "config.json").write_text(json.dumps(said))
    name, model = parse_model(str(tmp_path / "config.json"))
    assert (model.gated_linear_unit, model.add_qkv_bias, name) == (gated, bias, tmp_path.name)


def test_a_vocabulary_left_to_the_tokenizer_is_read_from_the_weights(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "embedding_rows", lambda path: asked.append(path) or 777)
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump({"config": SIZES | {"vocab_size": None}}))
    assert parse_model(str(tmp_path))[1].vocab_size == 777
    assert asked == [tmp_path]
    (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump({"config": SIZES}))
    assert parse_model(str(tmp_path))[1].vocab_size == 8
    assert len(asked) == 1
    (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump({"config": {"vocab_size": 8, "num_layers": 2}}))
    with pytest.raises(ConfigError, match=r"its config lacks hidden_size, ffn_hidden_size, num_attention_heads$"):
        parse_model(str(tmp_path))


def test_flags_and_numbers_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ", ".join(f"{key} = {value}" for key, value in SIZES.items())
    name, model = parse_model(f"{text}, gated_linear_unit=False, add_qkv_bias=TRUE")
    assert (name, model) == ("given sizes", ModelShape(**SIZES, gated_linear_unit=False, add_qkv_bias=True))
    with pytest.raises(ConfigError, match=r"model.num_layers='2\.5': must be a whole number, true or false"):
        parse_model("num_layers=2.5")
    # A folder with a "=" in its name is a folder.
    (tmp_path / "step=1-last" / "context").mkdir(parents=True)
    (tmp_path / "step=1-last" / "context" / "model.yaml").write_text(yaml.safe_dump({"config": SIZES}))
    assert parse_model("step=1-last") == ("step=1-last", ModelShape(**SIZES))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert parse_model("config.json")[0] == "config.json"
