"""What a start says of a base and its sizes before it imports the host."""

import json

import pytest

from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.dry_run import check_base
from nemo_longctx.recipe import load_instruct_recipe, load_recipe

TINY = ["recipe=tiny_cpu_long", "data.tokenizer=null", "eval=none"]


def checkpoint(folder, **config):
    """The context of a checkpoint of NeMo, as far as its sizes go."""
    (folder / "context").mkdir(parents=True)
    (folder / "weights").mkdir()
    leaves = [{"type": "leaf", "value": value, "paths": [f"<root>.model.config.{key}"]} for key, value in config.items()]
    (folder / "context" / "io.json").write_text(json.dumps({"objects": {"x": {"items": [[None, leaf] for leaf in leaves]}}}))
    (folder / "context" / "model.yaml").write_text("config: {}\n")
    return folder


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (["trainer.devices=2", "trainer.pipeline_model_parallel_size=2"], "pipeline_model_parallel_size=2: the 3 layers"),
        (["trainer.devices=4", "trainer.tensor_model_parallel_size=4"], "tensor_model_parallel_size=4: the 6 attention heads"),
    ],
)
def test_the_checkpoint_s_sizes_are_held_against_the_layout(tmp_path, layout, said):
    base = checkpoint(tmp_path / "base", num_layers=3, num_attention_heads=6, num_query_groups=6)
    with pytest.raises(ConfigError, match=said):
        check_base(load_recipe(compose([*TINY, f"restore_from={base}", *layout])))


def test_adapters_of_another_base_are_told_before_the_host_is_imported(tmp_path):
    base, run = checkpoint(tmp_path / "base"), tmp_path / "runs" / "mine" / "checkpoints" / "step=3-last"
    files = ["data.tokenizer=t", "data.short=[a]", "data.long=[a]", "trainer=cpu", "lora={dim: 4}"]
    asked = [f"restore_from={base}", f"output_dir={tmp_path / 'runs'}", "name=mine", *files]
    recipe = load_instruct_recipe(compose(asked, config_name="sft"))
    (run / "weights").mkdir(parents=True)
    for noted, refused in ((tmp_path / "other", True), (base, False)):
        (run / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(noted)}))
        if refused:
            with pytest.raises(ConfigError, match=r"were trained on .*other, which is not there; put it back"):
                check_base(recipe)
        else:
            check_base(recipe)


@pytest.mark.parametrize(
    ("model", "layout", "said"),
    [
        ("llama2_7b", "trainer.pipeline_model_parallel_size=3", "the 32 layers must divide"),
        ("llama3_8b", "trainer.tensor_model_parallel_size=3", "the 32 attention heads must divide"),
    ],
)
def test_the_class_s_sizes_are_held_against_the_layout(model, layout, said):
    asked = [f"recipe={model}", f"model={model}", "restore_from=null", "rope=null", layout, "trainer.num_nodes=3"]
    asked += ["trainer.context_parallel_size=1", "trainer.sequence_parallel=false"]
    asked += ["trainer.tensor_model_parallel_size=1"] if "pipeline" in layout else []
    with pytest.raises(ConfigError, match=said):
        load_recipe(compose(asked))


@pytest.mark.parametrize(
    ("has", "asked", "said"),
    [
        ({}, [], "no layer of the model has a window"),
        ({"window_size": [9, 0]}, [], "every layer of the model has the window"),
        ({"window_size": [9, 0], "window_attn_skip_freq": [1, 0, 1]}, ["++model.window_size=null"], "no layer of the model"),
        ({"window_size": [9, 0], "window_attn_skip_freq": [1, 0, 1]}, [], None),
        ({}, ["++model.window_size=[9,0]", "++model.window_attn_skip_freq=3"], None),
    ],
)
def test_rope_by_layer_type_is_held_against_the_checkpoint_s_windows(tmp_path, has, asked, said):
    sizes = {"num_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 512}
    base = checkpoint(tmp_path / "base", **sizes)
    (base / "context" / "model.yaml").write_text(json.dumps({"config": sizes | {"num_query_groups": 2} | has}))
    recipe = load_recipe(compose([*TINY, f"restore_from={base}", "rope=yarn", "rope.layers=full_attention", *asked]))
    if said is None:
        check_base(recipe)
        return
    with pytest.raises(ConfigError, match=f"rope.layers='full_attention': {said}"):
        check_base(recipe)


def test_a_base_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no finished NeMo checkpoint is there; make one with `nemo-longctx import"):
        check_base(load_recipe(compose([*TINY, f"restore_from={tmp_path / 'none'}"])))
