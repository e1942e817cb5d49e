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


def test_parameter_counts_are_the_published_ones():
    assert {name: model.parameters for name, model in MODELS.items()} == PUBLISHED


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
