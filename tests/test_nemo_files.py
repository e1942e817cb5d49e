"""What a NeMo checkpoint's files say without NeMo: two descriptions that must agree, and a vocabulary left to the tokenizer."""

import contextlib
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from saved_checkpoints import make

from nemo_longctx.config import ConfigError
from nemo_longctx.nemo_files import (
    base_of_adapters,
    check_context,
    check_whole,
    embedding_rows,
    io_config,
    knows_no_engine_norms,
    padded_by_host,
    saved_in,
    stored_dtype,
)
from nemo_longctx.planning.models import parse_model

CONFIG = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 256,
          "rotary_base": 10000, "vocab_size": None}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of stock NeMo, as far as its files say: io.json in fiddle's form, model.yaml, the weights' metadata."""

    def write(shown=None, **loaded):
        values = CONFIG | loaded
        items = [
            [f"Attr(name={k!r})", {"type": "leaf", "value": v, "paths": [f"<root>.model.config.{k}"]}]
            for k, v in values.items()
        ]
        (tmp_path / "context").mkdir(exist_ok=True)
        graph = {
            "root": {"type": "ref", "key": "a"},
            "objects": {"llama_config_1": {"items": items}, "a_set_1": {"items": [["a", "b"]]}},
            "version": "0.0.1",
        }
        (tmp_path / "context" / "io.json").write_text(json.dumps(graph))
        (tmp_path / "context" / "model.yaml").write_text(json.dumps({"config": values | (shown or {})}))
        dcp.save(
            {"module.embedding.word_embeddings.weight": torch.zeros(512, 4)}, checkpoint_id=tmp_path / "weights", no_dist=True
        )
        return tmp_path

    return write


def test_a_base_that_the_two_descriptions_disagree_on_is_refused(checkpoint):
    check_context(checkpoint())
    with pytest.raises(ConfigError, match=r"rotary_base=10000: in context/io.json.* but 500000 in context/model.yaml"):
        check_context(checkpoint({"rotary_base": 500000}))


def test_a_vocabulary_left_to_the_tokenizer_is_the_embeddings(checkpoint):
    """Stock NeMo's default: `vocab_size=None`. plan reads the padded rows, where it said that the size was lacking."""
    made = checkpoint()
    assert (embedding_rows(made), padded_by_host(made), io_config(made)["rotary_base"]) == (512, True, 10000)
    assert parse_model(str(made))[1].vocab_size == 512
    assert not padded_by_host(checkpoint(vocab_size=512))


def test_a_context_of_another_tool_is_refused(checkpoint):
    made = checkpoint()
    (made / "context" / "io.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not what NeMo writes"):
        check_context(made)


@pytest.mark.parametrize(
    ("was", "named", "taken"),
    [
        ("here/step=8-last", "there/step=8-last", "here"),
        ("gone/step=8-last", "there/step=8-last", "there"),
        ("gone/step=8-last/weights", "there/step=8-last", "there"),
        ("gone/step=8-last", "there/base", None),
        ("gone/step=9-last", "there/step=8-last", None),  # the run's newest, which the adapters were not trained on
        ("gone/base", "there/base", "there"),
        ("gone/base", "there/other", None),
        ("gone/base", None, None),
    ],
)
def test_adapters_go_on_with_their_own_base_where_it_was_moved(tmp_path, was, named, taken):
    for each in (was, named):
        if each and not each.startswith("gone"):
            (tmp_path / each / "weights").mkdir(parents=True)
    place = None if named is None else tmp_path / named
    adapters = tmp_path / "run"
    (adapters / "weights").mkdir(parents=True)
    assert base_of_adapters(adapters, place) is None  # whole weights
    note = adapters / "weights" / "adapter_metadata.json"
    note.write_text(json.dumps({"model_ckpt_path": str(tmp_path / was)}))
    if taken:
        assert base_of_adapters(adapters, place) == (tmp_path / was if taken == "here" else place)
        return
    with pytest.raises(ConfigError) as error:
        base_of_adapters(adapters, place)
    asked = None if place is None else str(place)
    said = f"restore_from={asked!r}: the adapters in {adapters} were trained on {tmp_path / was}"
    more = "" if named is None else f", or, where these are its weights under another name, write this path into {note}"
    assert str(error.value) == f"{said}, which is not there; put it back{more}"


def test_a_moved_base_that_has_the_step_in_its_manifest_is_known_under_another_name(tmp_path):
    base = make(tmp_path, 8, name="my base")
    (tmp_path / "run" / "weights").mkdir(parents=True)
    note = tmp_path / "run" / "weights" / "adapter_metadata.json"
    for step, known in ((8, True), (7, False)):
        note.write_text(json.dumps({"model_ckpt_path": f"{tmp_path}/gone/step={step}-last/weights"}))
        with contextlib.nullcontext() if known else pytest.raises(ConfigError):
            assert base_of_adapters(tmp_path / "run", base) == base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_precision_of_weights_is_the_embeddings_not_the_optimizers(tmp_path, dtype):
    name = "embedding.word_embeddings.weight"
    found = {f"optimizer.state.exp_avg.module.{name}": torch.zeros(4, dtype=torch.float64), "module.norm": torch.zeros(1)}
    dcp.save({**found, f"module.{name}": torch.zeros(4, dtype=dtype)}, checkpoint_id=tmp_path / "weights", no_dist=True)
    assert stored_dtype(tmp_path / "weights") == dtype
    assert stored_dtype(tmp_path) is None


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (None, "merge them: nemo-longctx export {} HF_DIR, then nemo-longctx import HF_DIR CKPT"),
        (
            {"variant": "xpos", "base": 10000.0},
            "and of xPos there is none; begin from their base: /base",
        ),
        ({"variant": "rope", "local_base": 1e4}, "and of a RoPE by layer type there is none; begin from their base: /base"),
    ],
)
def test_adapters_alone_are_no_weights_to_begin_from(checkpoint, rope, said):
    """The advice was to merge them by `export`, which refuses these RoPEs."""
    folder = checkpoint()
    check_whole(folder)
    (folder / "weights" / "adapter_metadata.json").write_text('{"model_ckpt_path": "/base"}')
    (folder / "context" / "model.yaml").write_text(json.dumps({"config": CONFIG, "model_transform": {"rope": rope}}))
    with pytest.raises(ConfigError, match="a run begins from whole weights") as error:
        check_whole(folder)
    assert said.format(folder) in str(error.value)


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (["module.decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"], True),  # Megatron-Core's own layers save one too
        (["module.decoder.final_layernorm._extra_state/shard_0_1"], False),
        ([], True),
    ],
)
def test_weights_of_other_norms_than_transformer_engine_s_are_told(tmp_path, names, lacks):
    saved = {name: torch.zeros(1) for name in ["module.decoder.final_layernorm.weight", *names]}
    dcp.save(saved, checkpoint_id=tmp_path / "weights", no_dist=True)
    assert set(saved_in(tmp_path / "weights")) == set(saved)
    assert knows_no_engine_norms(tmp_path) == lacks
    assert saved_in(tmp_path) == {}
    assert not knows_no_engine_norms(tmp_path / "weights")  # nothing can be told
