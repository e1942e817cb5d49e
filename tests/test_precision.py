"""Precision and speed switches: what the schema takes, what it refuses by name, and what the planner makes of them."""

import contextlib
from types import SimpleNamespace

import pytest

from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.planning.layout import PRECISIONS as PLANNED
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.recipe import recipe_plan
from nemo_longctx.precision import CUDA_GRAPHS, PRECISIONS, check_graphs, check_speed
from nemo_longctx.recipe import TrainerConfig, load_recipe

GPU = ["recipe=llama2_7b"]


def recipe(*overrides, base=GPU):
    return load_recipe(compose([*base, *overrides]))


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_is_taken_and_planned(name):
    assert recipe(f"trainer.precision={name}").trainer.precision == name
    assert PRECISIONS[name].planned in PLANNED


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["trainer.precision=fp9"], "trainer.precision", "did you mean 'fp8'"),
        (["trainer.fsdp=megatrom"], "trainer.fsdp", "did you mean 'megatron'"),
        (["trainer.fsdp=megatron", "optimizer.distributed=false"], "trainer.fsdp", "optimizer.distributed=true"),
        (["trainer.fsdp=megatron", "trainer.pipeline_model_parallel_size=2"], "trainer.fsdp", "pipeline"),
        (["trainer.tp_comm_overlap=true", "trainer.tensor_model_parallel_size=1", "trainer.sequence_parallel=false"],
         "trainer.tp_comm_overlap", "sequence_parallel"),
        (["trainer.tp_comm_overlap=true", "trainer.tensor_model_parallel_size=2", "trainer.sequence_parallel=true",
          "trainer.context_parallel_size=1", "curriculum=paper_4k_to_32k", "curriculum.stages.1.micro_batch_size=2"],
         "trainer.tp_comm_overlap", "one size"),
        (["trainer.fsdp=megatron", "eval={tasks: [{kind: position, corpus: c, seq_length: 64}]}"], "trainer.fsdp", "eval out"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused_by_name(overrides, key, said):
    with pytest.raises(ConfigError, match=said) as error:
        recipe(*overrides)
    assert error.value.key == key


@pytest.mark.parametrize("name", CUDA_GRAPHS)
@pytest.mark.parametrize(
    ("lengths", "masked", "refused"),
    [
        ([(64, 1)], False, False), ([(64, 1), (64, 1)], False, False), ([(64, 2), (128, 1)], False, False),
        ([(64, 1), (128, 1)], False, True), ([(2, 3), (1, 4)], False, True), ([(64, 1)], True, True),
    ],
)  # fmt: skip
def test_graphs_of_one_shape_are_refused_where_a_run_has_several(name, lengths, masked, refused):
    stages = [SimpleNamespace(seq_length=length, micro_batch_size=size) for length, size in lengths]
    check_graphs({name: "none"} if name == "cuda_graph_impl" else {name: False}, stages, document_masking=masked)
    asked = {name: "local" if name == "cuda_graph_impl" else True}
    with pytest.raises(ConfigError, match="replays one shape") if refused else contextlib.nullcontext() as error:
        check_graphs(asked, stages, document_masking=masked)
    if refused:
        assert error.value.key == f"model.{name}"


@pytest.mark.parametrize("curriculum", ["paper_4k_to_32k", None])
def test_a_recipe_s_own_graphs_are_looked_at_too(curriculum):
    asked = ["model.enable_cuda_graph=true", *([f"curriculum={curriculum}"] if curriculum else [])]
    with pytest.raises(ConfigError, match="replays one shape") if curriculum else contextlib.nullcontext():
        recipe(*asked)


@pytest.mark.parametrize("asked", ["precision=fp8", "precision=fp8-current", "tp_comm_overlap=true", "fsdp=megatron"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(asked):
    with pytest.raises(ConfigError, match="needs a GPU") as error:
        recipe(f"trainer.{asked}", base=["recipe=tiny_cpu_base"])
    assert error.value.key == f"trainer.{asked.partition('=')[0]}"


def test_fp8_wants_whole_tiles():
    stages = "curriculum.stages=[{until: 1.0, seq_length: 8200, micro_batch_size: 1}]"
    with pytest.raises(ConfigError, match="multiple of"):
        recipe("trainer.precision=fp8", "trainer.context_parallel_size=1", stages, "curriculum.tokens_per_step=4198400",
               "curriculum.total_tokens=4198400000", "trainer.val_every_tokens=0", "checkpoint.every_tokens=0",
               "optimizer.warmup_tokens=0")  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "length", "batch", "refused"),
    [
        (["precision=fp8"], 4096, 1, False),
        (["precision=fp8"], 4088, 2, False),
        (["precision=fp8"], 4088, 1, True),
        (["precision=bf16-mixed"], 4088, 1, False),
        (["tp_comm_overlap=true"], 8192, 1, False),
        (["tp_comm_overlap=true"], 4096, 2, False),
        (["tp_comm_overlap=true"], 4096, 1, True),
        ([], 4096, 1, False),
    ],
)
def test_validation_has_sizes_that_the_kernels_take_too(asked, length, batch, refused):
    """Else the run ends at its first validation, hours later."""
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True} if "tp_comm_overlap=true" in asked else {}
    named = {**sizes, **dict(each.split("=") for each in asked)}
    trainer = TrainerConfig(**{key: value == "true" if value in ("true", "false") else value for key, value in named.items()},
                            devices=2)  # fmt: skip
    curriculum = SimpleNamespace(plan=[SimpleNamespace(seq_length=8192, micro_batch_size=1)])
    validation = [
        SimpleNamespace(seq_length=8192, micro_batch_size=1),
        SimpleNamespace(seq_length=length, micro_batch_size=batch),
    ]
    with pytest.raises(ConfigError, match="validation") if refused else contextlib.nullcontext() as error:
        check_speed(trainer, curriculum, sharded_optimizer=True, validation=validation)
    if refused:
        assert error.value.key == f"trainer.{asked[0].partition('=')[0]}"


def test_the_plan_knows_them():
    def memory(*overrides):
        plan = recipe_plan("llama2_7b", [f"trainer.{each}" for each in overrides])
        return memory_plan(plan.model, plan.layout, seq_length=4096, global_batch_size=1024)

    plain, half = memory("precision=bf16-mixed"), memory("precision=bf16-true")
    assert half.gradients == plain.gradients / 2
    assert half.optimizer == plain.optimizer
    sharded = memory("fsdp=megatron")
    assert sharded.weights < plain.weights / 2
    assert memory("precision=fp8").weights > plain.weights  # the cast and its transpose
