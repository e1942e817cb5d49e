"""A run's settings from Python: what each is by default, what must be a whole number, and what the parts say of each other."""

import dataclasses

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data.config import DataConfig, InstructDataConfig
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.data.mixture import MixConfig, SourceConfig
from nemo_longctx.precision import check_speed
from nemo_longctx.recipe import (
    BadNumbersConfig,
    CheckpointConfig,
    InstructRecipe,
    LoRAConfig,
    OptimizerConfig,
    RecipeConfig,
    ResumeConfig,
    TrainerConfig,
    check_run_name,
)

CPU = TrainerConfig(accelerator="cpu")
RUN = Curriculum(stages=(StageConfig(until=1.0, seq_length=64),), tokens_per_step=1024, total_tokens=1024 * 50)


def run(made=RecipeConfig, **given):
    values = {
        "name": "a", "model": {"config": "LlamaConfig"}, "curriculum": RUN, "trainer": CPU,
        "data": DataConfig(mix=MixConfig(sources=(SourceConfig(path="x"),))),
    }  # fmt: skip
    return made(**values | given)


def refusal(call, *args, **given):
    with pytest.raises(ConfigError) as error:
        call(*args, **given)
    return str(error.value)


DEFAULTS = {
    OptimizerConfig: {
        "lr": 2e-5, "min_lr": 2e-6, "warmup_tokens": 0, "schedule": "cosine", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
        "epsilon": 1e-5, "clip_grad": 1.0, "distributed": False,
    },
    TrainerConfig: {
        "accelerator": "gpu", "devices": 1, "num_nodes": 1, "precision": "bf16-mixed", "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None, "context_parallel_size": 1,
        "sequence_parallel": False, "recompute": "none", "offload": "none", "tp_comm_overlap": False, "fsdp": "none",
        "val_every_tokens": 0, "limit_val_batches": 8, "log_every_n_steps": 1,
    },
    CheckpointConfig: {"every_tokens": 0, "keep": 0, "keep_last": 1},
    ResumeConfig: {"fallback": False},
    BadNumbersConfig: {"not_finite": "stop", "spike": "ignore", "spike_factor": 10.0, "spike_window": 64},
    LoRAConfig: {
        "dim": 32, "alpha": 32, "dropout": 0.0, "target_modules": ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
    },
}  # fmt: skip


@pytest.mark.parametrize("made", DEFAULTS)
def test_what_no_recipe_says_is_what_the_docs_say(made):
    assert dataclasses.asdict(made()) == DEFAULTS[made]


def test_a_run_of_nothing_but_its_data():
    made = run()
    assert (made.output_dir, made.restore_from, made.seed, made.rope, made.eval, made.logger) == (
        "runs",
        None,
        1234,
        None,
        None,
        (),
    )
    assert (made.seq_length, made.directory.name, made.directory.parent.name) == (64, "a", "runs")
    assert made.rope_variant is None


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "1", None])
def test_sizes_of_a_trainer_and_of_adapters_are_whole_numbers(value):
    sizes = ("devices", "num_nodes", "limit_val_batches", "log_every_n_steps", "tensor_model_parallel_size")
    for key in (*sizes, "pipeline_model_parallel_size", "context_parallel_size"):
        try:
            said = refusal(TrainerConfig, **{key: value})
        except TypeError:  # a text where the world's size is counted
            continue
        assert said == f"trainer.{key}={value!r}: set a whole number of at least 1"
    for key in ("dim", "alpha"):
        assert refusal(LoRAConfig, **{key: value}) == f"lora.{key}={value!r}: set a whole number of at least 1"
    if value is not None:
        key = "virtual_pipeline_model_parallel_size"
        said = refusal(TrainerConfig, **{key: value, "pipeline_model_parallel_size": 2, "devices": 2})
        assert said == f"trainer.{key}={value!r}: set a whole number of at least 1"


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        (OptimizerConfig, {"lr": 0.0}, "optimizer.lr=0.0: set a peak learning rate between 0 and 1, such as 2e-5"),
        (OptimizerConfig, {"schedule": "cosin"}, "optimizer.schedule='cosin': did you mean 'cosine'?"),
        (OptimizerConfig, {"warmup_tokens": -1}, "optimizer.warmup_tokens=-1: it cannot be negative"),
        (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay=-0.1: it cannot be negative"),
        (OptimizerConfig, {"clip_grad": -0.1}, "optimizer.clip_grad=-0.1: it cannot be negative"),
        (OptimizerConfig, {"epsilon": -1e-9}, "optimizer.epsilon=-1e-09: it cannot be negative"),
        (TrainerConfig, {"precision": "bf16"}, "trainer.precision='bf16': did you mean 'bf16-mixed'?"),
        (TrainerConfig, {"precision": "bf16-tru"}, "trainer.precision='bf16-tru': did you mean 'bf16-true'?"),
        (TrainerConfig, {"recompute": "half"}, "trainer.recompute='half': must be selective, none, full, or block:N"),
        (TrainerConfig, {"offload": "selective"}, "trainer.offload='selective': must be none, full, or block:N"),
        (
            TrainerConfig,
            {"virtual_pipeline_model_parallel_size": 2},
            "trainer.virtual_pipeline_model_parallel_size=2: needs trainer.pipeline_model_parallel_size above 1; leave it out",
        ),
        (
            TrainerConfig,
            {"devices": 6, "num_nodes": 2, "tensor_model_parallel_size": 4, "context_parallel_size": 2},
            "trainer.devices=6: the 12 processes must divide by tensor x pipeline x context = 8",
        ),
        (
            TrainerConfig,
            {"sequence_parallel": True},
            "trainer.sequence_parallel=True: needs trainer.tensor_model_parallel_size",
        ),
        (
            TrainerConfig,
            {"fsdp": "megatron", "accelerator": "cpu"},
            "trainer.fsdp='megatron': needs a GPU; leave it out on the CPU",
        ),
        (
            TrainerConfig,
            {"fsdp": "megatron", "pipeline_model_parallel_size": 2, "devices": 2},
            "trainer.fsdp='megatron': needs trainer.pipeline_model_parallel_size=1",
        ),
        (
            TrainerConfig,
            {"tp_comm_overlap": True, "tensor_model_parallel_size": 2, "devices": 2},
            "trainer.tp_comm_overlap=True: needs trainer.tensor_model_parallel_size above 1 and trainer.sequence_parallel=true",
        ),
        (BadNumbersConfig, {"spike": "skp"}, "bad_numbers.spike='skp': did you mean 'skip'?"),
        (LoRAConfig, {"target_modules": ()}, "lora.target_modules=[]: name at least one layer, such as linear_qkv"),
        (
            LoRAConfig,
            {"target_modules": ("linear_fc1", "q_proj")},
            "lora.target_modules='q_proj': is no linear layer of Megatron-Core",
        ),
        (
            LoRAConfig,
            {"target_modules": ("linear_qkw",)},
            "lora.target_modules='linear_qkw': is no linear layer of Megatron-Core",
        ),
        (LoRAConfig, {"target_modules": ("",)}, "lora.target_modules='': is no linear layer of Megatron-Core"),
    ],
)
def test_a_wrong_setting_is_told_with_its_mend(made, given, said):
    assert refusal(made, **given).startswith(said)


def test_layers_of_adapters_are_megatron_cores_and_theirs_are_told_for_transformers():
    LoRAConfig(target_modules=("linear_qkv", "linear_kv_up_proj", "*.layers.1.*.linear_fc1"))
    for theirs, ours in (
        ("k_proj", "linear_qkv"),
        ("o_proj", "linear_proj"),
        ("up_proj", "linear_fc1"),
        ("down_proj", "linear_fc2"),
    ):
        assert refusal(LoRAConfig, target_modules=(theirs,)).endswith(f"did you mean {ours!r}?")


def test_settings_at_their_bounds_are_taken():
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "pipeline_model_parallel_size": 2}
    trainer = TrainerConfig(devices=4, num_nodes=4, **sizes, virtual_pipeline_model_parallel_size=1, sequence_parallel=True)
    assert (trainer.world_size, trainer.model_parallel_size, trainer.data_parallel_size) == (16, 8, 2)
    assert TrainerConfig(tensor_model_parallel_size=2, devices=2, sequence_parallel=True, tp_comm_overlap=True).tp_comm_overlap
    assert TrainerConfig(fsdp="megatron").fsdp == "megatron"
    assert TrainerConfig(precision=32).precision == "32"
    OptimizerConfig(weight_decay=0.0, clip_grad=0.0, epsilon=0.0, warmup_tokens=0, beta1=0.0, schedule="constant")
    for policy in ("stop", "skip", "ignore"):
        BadNumbersConfig(not_finite=policy, spike=policy)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": 0}, "seed=0: set a whole number of at least 1, below 2^32"),
        ({"seed": 2**32}, "seed=4294967296: set a whole number of at least 1, below 2^32"),
        ({"model": {}}, "model.config=None: name a config class such as LlamaConfig, or set restore_from"),
        ({"output_dir": " "}, "output_dir=' ': names no place; leave it out, or name one"),
        ({"restore_from": "a/" + "x" * 256}, "at most 255 bytes"),
        ({"rope": {"variant": "abf", "base": 1.1e15}}, "must be at most 1e+15: nothing turns beyond it"),
        ({"rope": {"variant": "pi", "factor": 2e15}}, "rope.factor=2000000000000000.0: must be at most 1e+15"),
        ({"rope": {"variant": "dynamic_ntk", "factor": 2.0}}, "rope.variant='dynamic_ntk': is for evaluation only"),
        ({"optimizer": OptimizerConfig(warmup_tokens=1024 * 50)}, "warmup_tokens=51200: the run has 51200 tokens, so"),
        (
            {"checkpoint": CheckpointConfig(every_tokens=1)},
            "set a multiple of curriculum.tokens_per_step (1024); the nearest is 1024",
        ),
        ({"checkpoint": CheckpointConfig(every_tokens=1537)}, "the nearest is 2048"),
        ({"checkpoint": CheckpointConfig(keep=1)}, "checkpoint.keep=1: the best are those of the lowest validation loss, and"),
    ],
)
def test_a_run_that_contradicts_itself_is_told(given, said):
    assert said in refusal(run, **given)


def test_a_run_at_its_bounds_is_taken():
    assert run(seed=1).seed == 1
    assert run(seed=2**32 - 1).seed == 2**32 - 1
    assert run(output_dir="a/" + "x" * 255, restore_from="b").restore_from == "b"
    assert run(rope={"variant": "abf", "base": 1e15}).rope_variant.base == 1e15
    made = run(optimizer=OptimizerConfig(warmup_tokens=1024 * 49), checkpoint=CheckpointConfig(every_tokens=2048))
    assert [made.steps("k", tokens) for tokens in (0, 1024, 51_200)] == [0, 1, 50]


def test_offload_needs_a_gpu_in_the_run_and_in_each_stage():
    stages = tuple(StageConfig(until=until, seq_length=64, offload=off) for until, off in ((0.5, None), (1.0, "block:1")))
    staged = dataclasses.replace(RUN, stages=stages)
    mend = "needs a GPU: on the CPU activations lie in host memory already; set none, and recompute to save memory"
    assert refusal(run, curriculum=staged) == f"curriculum.stages[1].offload='block:1': {mend}"
    off = TrainerConfig(accelerator="cpu", offload="full")
    assert refusal(run, trainer=off) == f"trainer.offload='full': {mend}"
    gpu = run(trainer=TrainerConfig(offload="block:3", recompute="full"), curriculum=staged)
    assert [stage.offload for stage in gpu.curriculum.stages] == ["block:3", "block:1"]
    assert {stage.recompute for stage in gpu.curriculum.stages} == {"full"}
    stages = tuple(StageConfig(until=until, seq_length=length) for until, length in ((0.5, 128), (1.0, 64)))
    assert run(curriculum=dataclasses.replace(RUN, stages=stages)).seq_length == 128


def test_rope_by_layer_type_needs_layers_of_two_types():
    by_layer = {"variant": "abf", "base": 1e6, "layers": "full_attention"}
    window, every = {"window_size": [15, 0]}, {"window_attn_skip_freq": 2}
    sizes = {"config": "LlamaConfig", "num_layers": 4}
    for model, taken in (
        (sizes, False),
        (sizes | window, False),
        (sizes | window | every, True),
        (sizes | window | {"window_attn_skip_freq": [1, 1, 1, 1]}, False),
        (sizes | window | {"window_attn_skip_freq": [1, 0, 1, 1]}, True),
        (sizes | every, False),
    ):
        if taken:
            run(model=model, rope=by_layer)
        else:
            assert "layers" in refusal(run, model=model, rope=by_layer)
    run(model=sizes, rope=by_layer, restore_from="a checkpoint, which has its own")


def test_tuning_begins_with_a_checkpoint_and_keeps_one_length():
    data = InstructDataConfig(tokenizer="t", short=("a",), long=("b",), blend={"short": 0.5, "long": 0.5})
    tuned = run(InstructRecipe, data=data, restore_from="base")
    assert tuned.lora is None
    assert refusal(run, InstructRecipe, data=data) == "restore_from=None: name the extended checkpoint to tune"
    stages = tuple(StageConfig(until=until, seq_length=64) for until in (0.5, 1.0))
    several = dataclasses.replace(RUN, stages=stages)
    said = refusal(run, InstructRecipe, data=data, restore_from="base", curriculum=several)
    assert said == "curriculum.stages=2: instruction tuning keeps one window length; name one stage"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/"])
def test_a_name_is_one_folder(name):
    said = "is a folder's name below output_dir: letters, digits, - and _, without a slash"
    assert refusal(check_run_name, name) == f"name={name!r}: {said}"
    assert refusal(check_run_name, name, key="--name") == f"--name={name!r}: {said}"
    for taken in ("...", "x" * 200, "é" * 100):
        check_run_name(taken)
    for long in ("x" * 201, "é" * 101):
        assert "at most 200 bytes" in refusal(check_run_name, long)


@pytest.mark.parametrize(
    ("lengths", "sizes", "sequence", "fits"),
    [
        ((16,), (1, 1), False, True),
        ((8,), (1, 1), False, False),
        ((32, 16), (2, 1), False, False),
        ((32, 64), (2, 1), False, True),
        ((64, 32), (2, 2), True, False),
        ((64,), (2, 2), True, True),
        ((32,), (2, 2), False, True),
    ],
)
def test_fp8_takes_sixteen_tokens_of_each_rank_in_every_stage(lengths, sizes, sequence, fits):
    ends = [(n + 1) / len(lengths) for n in range(len(lengths))]
    stages = tuple(StageConfig(until=until, seq_length=length) for until, length in zip(ends, lengths, strict=True))
    curriculum = Curriculum(stages=stages, tokens_per_step=1024, total_tokens=1024 * 50)
    sizes = {"context_parallel_size": sizes[0], "tensor_model_parallel_size": sizes[1], "sequence_parallel": sequence}
    trainer = TrainerConfig(devices=4, precision="fp8", **sizes)
    if fits:
        check_speed(trainer, curriculum, sharded_optimizer=False)
        return
    shares = sizes["context_parallel_size"] * (sizes["tensor_model_parallel_size"] if sequence else 1)
    said = f"needs micro batches of a multiple of {16 * shares} tokens in all stages and validation, or set bf16-mixed"
    assert refusal(check_speed, trainer, curriculum, sharded_optimizer=False) == f"trainer.precision='fp8': {said}"
    check_speed(dataclasses.replace(trainer, precision="bf16-mixed"), curriculum, sharded_optimizer=False)


def test_one_size_of_micro_batch_is_told_by_its_tokens():
    stages = (StageConfig(until=0.5, seq_length=64, micro_batch_size=2), StageConfig(until=1.0, seq_length=128))
    one = Curriculum(stages=stages, tokens_per_step=1024, total_tokens=1024 * 50)
    overlap = TrainerConfig(tensor_model_parallel_size=2, devices=2, sequence_parallel=True, tp_comm_overlap=True)
    check_speed(overlap, one, sharded_optimizer=False)
    two = dataclasses.replace(one, stages=(stages[0], dataclasses.replace(stages[1], micro_batch_size=2)))
    assert "its buffers hold one size of micro batch" in refusal(check_speed, overlap, two, sharded_optimizer=False)
    check_speed(dataclasses.replace(overlap, tp_comm_overlap=False), two, sharded_optimizer=False)
    sharded = TrainerConfig(fsdp="megatron")
    check_speed(sharded, one, sharded_optimizer=True)
    assert "needs optimizer.distributed=true" in refusal(check_speed, sharded, one, sharded_optimizer=False)
