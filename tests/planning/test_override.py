"""Parts of an applied plan: mappings merged and compared, nodes, and every key that a layout decides."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.eval.config import ContextTask, HarnessTask, PositionTask, ProbeTask
from nemo_longctx.eval.probes import ProbeConfig
from nemo_longctx.planning import override
from nemo_longctx.planning import recipe as planned_recipe
from nemo_longctx.planning.gpus import GPUS
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.models import MODELS
from nemo_longctx.planning.override import override_values
from nemo_longctx.planning.recipe import machine_of, model_of, plan_of
from nemo_longctx.recipe import TrainerConfig

trees = st.recursive(st.none() | st.integers(0, 2), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3))
mappings = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


def leaves(value, where=()):
    """Paths of all that is no mapping with something in it."""
    if isinstance(value, dict) and value:
        return {path: leaf for key, inner in value.items() for path, leaf in leaves(inner, (*where, key)).items()}
    return {where: value}


@settings(max_examples=80, deadline=None)
@given(mappings, mappings)
def test_a_difference_merged_gives_what_was_wanted_and_nothing_is_in_it_twice(wanted, before):
    both = override._merged(before, wanted)
    changed = override._difference(wanted, before)
    assert override._merged(before, changed) == both
    assert override._difference(both, both) == {}
    assert override._differing(both, both) == []
    for path, leaf in leaves(changed).items() if changed else ():
        there = before
        for key in path:
            there = there.get(key, ...) if isinstance(there, dict) else ...
        assert there != leaf
    differing = override._differing(wanted, before)
    assert bool(differing) == (wanted != before)
    assert sorted(differing) == sorted(override._differing(before, wanted))


def test_keys_that_differ_are_named_where_they_stand():
    a = {"x": {"y": 1, "z": {"w": 2}}, "only": 3, "same": [1]}
    b = {"x": {"y": 2, "z": {}}, "same": [1], "kind": {}}
    assert sorted(override._differing(a, b)) == ["kind", "only", "x.y", "x.z.w"]
    assert override._merged({"a": {"b": 1, "c": 2}, "d": {"e": 1}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert override._difference({"a": None, "b": 1}, {"b": 1}) == {"a": None}


@pytest.mark.parametrize(
    ("gpus", "tensor", "context", "trainer", "devices", "said"),
    [
        (4, 1, 1, {}, 4, ""),
        (16, 2, 4, {}, 8, ""),
        (24, 4, 1, {}, 8, ""),
        (12, 2, 1, {}, 6, "12 GPUs as 2 nodes of 6, not of 8"),
        (36, 2, 2, {}, 4, "36 GPUs as 9 nodes of 4, not of 8"),
        (48, 2, 8, {}, 8, ""),  # a ring over nodes: TP stays within one
        (16, 2, 1, {"accelerator": "gpu", "devices": 4, "num_nodes": 2}, 4, ""),
        (16, 2, 1, {"accelerator": "gpu", "devices": 4, "num_nodes": 1}, 8, ""),  # another machine's
        (4, 2, 1, {"accelerator": "gpu", "devices": 4}, 4, ""),
        (16, 2, 1, {"accelerator": "cpu", "devices": 4, "num_nodes": 4}, 8, ""),
        (16, 8, 1, {"accelerator": "gpu", "devices": 4, "num_nodes": 2}, 8, "16 GPUs as 2 nodes of 8, not of 4"),
    ],
)
def test_nodes_are_the_recipe_s_or_the_machine_s(gpus, tensor, context, trainer, devices, said):
    layout = Layout(gpus=gpus, tensor_model_parallel_size=tensor, context_parallel_size=context)
    planned = SimpleNamespace(chosen=SimpleNamespace(layout=layout), gpu=GPUS["h100"])
    assert override._devices(planned, trainer) == (devices, [said] if said else [])


STAGES = (
    StageConfig(until=0.25, seq_length=2048, micro_batch_size=4, recompute="full", tensor_model_parallel_size=2),
    StageConfig(until=1.0, seq_length=8192, offload="full"),
)
RUN = Curriculum(stages=STAGES, tokens_per_step=2**20, total_tokens=2**24)


@pytest.mark.parametrize(
    ("changes", "precision", "distributed", "sequence"),
    [
        ({}, "bf16-mixed", True, True),
        ({"grad_reduce_in_fp32": False}, "bf16-true", True, True),
        ({"grad_reduce_in_fp32": False, "precision": "fp8"}, "fp8", True, True),
        ({"precision": "fp32", "sharding": "none"}, "32", False, True),
        ({"sequence_parallel": False}, "bf16-mixed", True, False),
        ({"tensor_model_parallel_size": 1}, "bf16-mixed", True, False),
    ],
)
def test_a_layout_decides_these_keys_and_no_other(changes, precision, distributed, sequence):
    sizes = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "context_parallel_size": 2}
    layout = Layout(**{
        "gpus": 64, **sizes, "virtual_pipeline_model_parallel_size": 3, "micro_batch_size": 2, "loss": "chunked",
        "recompute": "block:2", "offload": "block:1", **changes,
    })  # fmt: skip
    assert override_values(layout, RUN, devices=8) == {
        "trainer": {
            "accelerator": "gpu", "devices": 8, "num_nodes": 8, "precision": precision, **sizes,
            "tensor_model_parallel_size": layout.tensor_model_parallel_size, "virtual_pipeline_model_parallel_size": 3,
            "sequence_parallel": sequence, "recompute": "block:2", "offload": "block:1",
        },
        "optimizer": {"distributed": distributed},
        "curriculum": {
            "stages": [
                {"until": 0.25, "seq_length": 2048, "micro_batch_size": 2},
                {"until": 1.0, "seq_length": 8192, "micro_batch_size": 2},
            ],
            "tokens_per_step": 2**20,
            "total_tokens": 2**24,
        },
    }  # fmt: skip
    with pytest.raises(ConfigError, match="gpus=64: are no whole number of nodes of 7 GPUs"):
        override_values(layout, RUN, devices=7)
    for stage in override._stages(RUN, layout):
        assert (stage.micro_batch_size, stage.recompute, stage.offload, stage.parallel_sizes) == (2, None, None, {})


def a_recipe(**given):
    """As much of a recipe as the planner reads."""
    trainer = TrainerConfig(**given.pop("trainer", {"accelerator": "gpu"}))
    values = {"model": {"config": "Llama2Config7B"}, "restore_from": None, "eval": None, "curriculum": RUN, "seq_length": 8192}
    return SimpleNamespace(**values | {"optimizer": SimpleNamespace(distributed=False), "trainer": trainer} | given)


@pytest.mark.parametrize(
    ("tasks", "most", "length"),
    [
        ((), None, 0),
        ((), 777, 777),
        ((PositionTask(corpus="c", seq_length=64),), None, 8192),
        ((PositionTask(corpus="c", seq_length=9000), PositionTask(corpus="c", seq_length=8500)), None, 9000),
        ((PositionTask(corpus="c", seq_length=9000),), 500, 500),
        ((ContextTask(corpus="c", contexts=(64, 9000), targets=64),), None, 9064),
        ((ProbeTask(text="t", probes=ProbeConfig(lengths=(512, 10_000, 1024))),), None, 10_000),
        ((HarnessTask(tasks=("a",), metadata={"max_prompt": 20_000}),), None, 20_000),
        ((HarnessTask(tasks=("a",), metadata={"max_prompt": "20000"}),), None, 8192),
    ],
)
def test_the_cache_of_an_evaluation_has_room_for_its_longest_context(tasks, most, length):
    recipe = a_recipe(eval=SimpleNamespace(tasks=tasks, max_length=most))
    assert plan_of(recipe, gpu="h100").eval_length == length
    assert plan_of(a_recipe(), gpu=None).eval_length == 0


@pytest.mark.parametrize(
    ("fsdp", "distributed", "sharding"), [("none", False, "none"), ("none", True, "optimizer"), ("megatron", True, "full")]
)
def test_a_recipe_s_layout_is_that_of_its_trainer_and_first_stage(fsdp, distributed, sharding):
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "context_parallel_size": 4}
    trainer = {"devices": 8, "num_nodes": 3, **sizes, "sequence_parallel": True, "recompute": "full", "offload": "block:3",
               "precision": "bf16-true", "fsdp": fsdp}  # fmt: skip
    recipe = a_recipe(trainer=trainer, optimizer=SimpleNamespace(distributed=distributed))
    assert plan_of(recipe, gpu="h100").layout == Layout(
        gpus=24, **sizes, sequence_parallel=True, micro_batch_size=4, recompute="full", offload="block:3", sharding=sharding,
        precision="bf16", grad_reduce_in_fp32=False, loss="chunked", unfused=False,
    )  # fmt: skip
    split = {"devices": 4, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4, "accelerator": "cpu"}
    layout = plan_of(a_recipe(trainer=split), gpu="cpu").layout
    assert (layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size) == (2, 4)
    assert (layout.precision, layout.grad_reduce_in_fp32, layout.unfused) == ("fp32", True, True)


def test_a_recipe_s_model_is_its_class_with_what_it_says_or_its_checkpoint_s(monkeypatch):
    name, model = model_of(a_recipe(model={"config": "Llama2Config7B", "num_layers": 5, "window_size": [99, 0]}))
    assert (name, model) == ("llama2_7b", dataclasses.replace(MODELS["llama2_7b"], num_layers=5, sliding_window=100))
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    name, model = model_of(a_recipe(model={"config": "OwnConfig", **sizes, "rotary_base": 5}))
    assert (name, dataclasses.asdict(model)["vocab_size"]) == ("OwnConfig", 9)
    with pytest.raises(ConfigError, match=r"model\.num_moe_experts=8: FLOPs of experts are not counted"):
        model_of(a_recipe(model={"config": "OwnConfig", **sizes, "num_moe_experts": 8}))
    given = {"model": {"num_query_groups": 32, "kv_channels": 128, "num_layers": 32}, "restore_from": "x/llama2_7b"}
    assert model_of(a_recipe(**given)) == ("llama2_7b", MODELS["llama2_7b"])
    for key, value, has in (("num_query_groups", 8, 32), ("kv_channels", 64, 128), ("vocab_size", 9, 32_000)):
        with pytest.raises(ConfigError) as error:
            model_of(a_recipe(model={key: value}, restore_from="x/llama2_7b"))
        assert str(error.value) == (
            f"model.{key}={value}: the checkpoint x/llama2_7b has {has}, and its weights have that shape"
        )
    windows = {"window_size": [9, 0], "window_attn_skip_freq": 4, "seq_length": 5}
    shape = model_of(a_recipe(model=windows, restore_from="x/llama2_7b"))[1]
    assert shape == dataclasses.replace(MODELS["llama2_7b"], sliding_window=10, full_layers=8)
    with pytest.raises(
        ConfigError, match=r"restore_from='x/other': no NeMo checkpoint is there to read sizes from.*Face directory"
    ):
        model_of(a_recipe(model={}, restore_from="x/other"))
    asked = []
    monkeypatch.setattr(planned_recipe, "nemo_context", lambda path: path / "model.yaml")
    monkeypatch.setattr(planned_recipe, "model_from_nemo", lambda file: asked.append(file) or MODELS["llama3_8b"])
    assert model_of(a_recipe(model={}, restore_from="x/run7")) == ("run7", MODELS["llama3_8b"])
    assert plan_of(a_recipe(), gpu=None, named=("mine", MODELS["qwen25_7b"])).model_name == "mine"


def test_a_recipe_s_machine_is_the_one_it_chose_last(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "base.yaml").write_text("defaults:\n- override /rope: abf\n- override /trainer: h100\n- _self_\n")
    (folder / "over.yaml").write_text("defaults: [base, _self_]\n")
    (folder / "own.yaml").write_text("defaults:\n- base\n- override /trainer: cpu\n- _self_\n")
    (folder / "none.yaml").write_text("name: a\n")
    (folder / "empty.yaml").write_text("")
    machines = {"base": "h100", "over": "h100", "own": "cpu", "none": None, "empty": None}
    assert {name: machine_of(name, tmp_path) for name in machines} == machines
