"""Sizes: parameter counts that are published, config.json round trip, messages."""

import json
import os

import pytest
import yaml

from nemo_longctx.config import ConfigError
from nemo_longctx.planning.models import MODELS, ModelShape, parse_model

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
