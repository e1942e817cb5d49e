"""What is handed to the host at each joint: every argument of a run's settings, the right device, the right file."""

from types import SimpleNamespace

import nemo.lightning as nl
import numpy as np
import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from nemo.collections import llm  # noqa: F401  (before the callback, which alone meets an import circle of the host)
from tiny_models import byte_tokenizer
from transformers import GenerationConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_longctx.adapters.megatron import optimizer, rope_guard
from nemo_longctx.adapters.nemo import loggers
from nemo_longctx.adapters.nemo.checkpoint import convert, hf_verify, load
from nemo_longctx.adapters.nemo.data import evaluation_loss
from nemo_longctx.adapters.nemo.data.sampler import CurriculumDataSampler
from nemo_longctx.adapters.nemo.evaluation import callback
from nemo_longctx.adapters.nemo.launch import executors, lifecycle, parts, throughput
from nemo_longctx.adapters.nemo.launch.run import prepare_device
from nemo_longctx.adapters.nemo.model import lora
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import MODELS
from nemo_longctx.recipe import load_recipe
from nemo_longctx.rope.variants import DynamicNtkRope, Rope


def recipe(*overrides):
    return load_recipe(compose(["recipe=tiny_cpu_base", *overrides]))


def test_the_strategy_gets_the_layout_of_the_run():
    sizes = {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
        "context_parallel_size": 2, "sequence_parallel": True,
    }  # fmt: skip
    asked = [*(f"trainer.{key}={value}" for key, value in sizes.items()), "trainer.devices=8", "model.num_layers=4"]
    asked += ["curriculum.tokens_per_step=4096", "eval=null"]
    made = parts.trainer_config(recipe(*asked), callbacks=[])
    assert {key: getattr(made.strategy, key) for key in sizes} == sizes
    assert (made.devices, made.num_nodes, made.accelerator, made.__fn_or_cls__) == (8, 1, "cpu", nl.Trainer)


def test_a_cpu_is_refused_where_the_host_would_take_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"trainer\.accelerator='cpu': NeMo moves models to a GPU where there is one"):
        prepare_device(recipe())


@pytest.mark.parametrize("available", [True, False])
def test_losses_of_validation_lie_where_the_host_reduces_them(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert evaluation_loss._device() == (torch.device("cuda", 3) if available else torch.device("cpu"))


def test_what_the_sampler_logs_is_exact_and_not_in_the_bar_unless_asked():
    logged = []
    module = SimpleNamespace(device="cpu", log=lambda name, number, **more: logged.append((name, number, more)))
    for shown in ({}, {"prog_bar": True}):
        CurriculumDataSampler._log(None, SimpleNamespace(pl_module=module), "tokens", 2**24 + 1, **shown)
    assert [(name, int(number)) for name, number, _ in logged] == [("tokens", 2**24 + 1)] * 2
    assert [more for *_, more in logged] == [{"prog_bar": shown, "batch_size": 1} for shown in (False, True)]


def test_a_logger_is_told_its_place_and_the_run_that_it_goes_on_with(monkeypatch, tmp_path):
    monkeypatch.setattr(loggers, "kept_ids", lambda directory: {"wandb": f"w {directory}", "mlflow": f"m {directory}"})
    monkeypatch.setattr(loggers, "WandbLogger", lambda **told: told)
    monkeypatch.setattr(loggers, "MLFlowLogger", lambda **told: told)
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    here = str(tmp_path)
    wandb = {"name": "n", "project": "nemo-longctx", "save_dir": here, "id": f"w {here}"}
    mlflow = {"experiment_name": "nemo-longctx", "run_name": "n", "tracking_uri": f"file:{here}/mlruns", "run_id": f"m {here}"}
    assert loggers.wandb_logger(directory=here, name="n") == wandb
    assert loggers.mlflow_logger(directory=here, name="n") == mlflow
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x")
    assert loggers.wandb_logger(directory=here, name="n") == wandb | {"project": "mine"}
    assert loggers.mlflow_logger(directory=here, name="n") == mlflow | {"tracking_uri": "sqlite:///x"}


def test_the_guard_is_told_how_often_it_looked(monkeypatch):
    asked = []

    def judged(start, now, guard, look):
        asked.append((start, now, look))
        return SimpleNamespace(alarms=(), unpaired={}, changes={})

    monkeypatch.setattr(callback, "judge", judged)
    watching = SimpleNamespace(guard=SimpleNamespace(action="stop"), results=[])
    for number in range(4):
        watching.results.append(SimpleNamespace(watched=number, model=f"step {number}"))
        trainer = SimpleNamespace(is_global_zero=False, global_step=number)
        callback.LongContextEvalCallback._watch(watching, trainer, watching.results[-1])
    assert asked == [(0, 1, 1), (0, 2, 2), (0, 3, 3)]


def test_special_tokens_beyond_the_embedding_are_refused_before_weights_are_read():
    tokenizer = byte_tokenizer(["x"], vocab=258)
    config = SimpleNamespace(vocab_size=300, generation_config=GenerationConfig(eos_token_id=300))
    with pytest.raises(ConfigError, match="eos_token_id=300"):
        convert._check_tokens(tokenizer, config)


@pytest.mark.parametrize(("scale", "at"), [(1.0, None), (1.01, 0)])
def test_frequencies_are_asked_at_the_lengths_that_they_are_compared_at(scale, at):
    """Under dynamic NTK they change with each token beyond the trained length."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    theirs = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=64, rope_scaling=scaling)
    model = SimpleNamespace(model=SimpleNamespace(rotary_emb=LlamaRotaryEmbedding(theirs)))
    variant = DynamicNtkRope(base=10_000.0 * scale, factor=4.0, original_max_position_embeddings=64)
    if at is None:
        hf_verify._verify_frequencies(model, variant, 32, {32, 64, 65, 100, 256})
        return
    with pytest.raises(ConfigError, match=r"inv_freq=.* transformers has it at 32 tokens"):
        hf_verify._verify_frequencies(model, variant, 32, {32, 64})


def test_a_host_s_frequencies_beyond_its_rounding_are_told_with_both_values(monkeypatch):
    """The host's own embedding of a variant may round; one that is wrong by more is no better for being its own."""
    theirs = Rope(base=500_000.0).theta(32, 2).astype(np.float32)
    for name in ("check_supported", "check_windows", "_check_tables"):
        monkeypatch.setattr(rope_guard, name, lambda *_: None)
    monkeypatch.setattr(rope_guard, "rotary_dim_of", lambda _: 32)
    monkeypatch.setattr(rope_guard, "live_inv_freq", lambda _: theirs)
    monkeypatch.setattr(rope_guard, "expected_inv_freq", lambda *_: theirs)
    ours = Rope(base=10_000.0)
    with pytest.raises(rope_guard.LiveRopeError) as error:
        rope_guard.verify_live_rope(SimpleNamespace(config=None), ours)
    assert f"the model has {float(theirs[1])!r} at pair 1" in str(error.value)
    assert f"asks for {float(np.float32(ours.theta(32, 2)[1]))!r}; 15 of 16 pairs differ" in str(error.value)


@pytest.mark.parametrize("load_weights", [True, False])
def test_a_checkpoint_that_is_there_gives_the_doctor_its_sizes(monkeypatch, tmp_path, load_weights):
    monkeypatch.setattr(load, "checkpoint_model", lambda path, fields: (path, fields))
    asked = SimpleNamespace(restore_from=tmp_path, model={"config": "LlamaConfig"})
    assert load._model_for_test(asked, load_weights=load_weights) == (str(tmp_path), asked.model)
    monkeypatch.setattr(load, "fresh_model", lambda fields: fields)
    nowhere = SimpleNamespace(restore_from=tmp_path / "none", model={"config": "LlamaConfig"})
    assert load._model_for_test(nowhere, load_weights=False) == nowhere.model


def test_optimizers_over_torch_s_are_changed_once_and_others_never(monkeypatch):
    kept = []

    def apart(each):
        kept.append(each)
        each.load_state_dict = None

    monkeypatch.setattr(optimizer, "_keep_steps_apart", apart)

    def distributed(inner):
        made = DistributedOptimizer.__new__(DistributedOptimizer)
        made.optimizer = inner
        return made

    torch_s, other = distributed(torch.optim.AdamW([torch.zeros(1)])), distributed(SimpleNamespace())
    chained = SimpleNamespace(chained_optimizers=[torch_s, other, SimpleNamespace(optimizer=torch_s.optimizer)])
    assert [optimizer.keep_torch_steps_apart(chained) for _ in range(2)] == [1, 0]
    assert kept == [torch_s]
    alone = distributed(torch.optim.AdamW([torch.zeros(1)]))
    assert [optimizer.keep_torch_steps_apart(alone) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(("schedule", "ends"), [(["min_lr=1e-4", "schedule=cosine"], 1e-4), (["schedule=constant"], 1e-3)])
def test_a_cosine_comes_down_and_a_constant_rate_does_not(schedule, ends):
    made = parts.optimizer_config(recipe("optimizer.lr=1e-3", *(f"optimizer.{each}" for each in schedule)))
    assert (made.config.lr, made.lr_scheduler.min_lr, made.lr_scheduler.constant_steps) == (1e-3, ends, 0)


def test_a_job_on_kubernetes_has_a_process_a_gpu():
    made = executors.longctx_kubernetes()
    assert (made.nprocs_per_node, made.gpus_per_node, made.launcher) == (8, 8, "torchrun")


def test_the_first_process_takes_the_run_s_lock_once(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(lifecycle, "take_lock", taken.append)
    for name in ("keep_own_files_in_place", "start_results_queue"):
        monkeypatch.setattr(lifecycle, name, lambda: None)
    for rank, stages, times in ((0, ["validate"], 0), (1, ["fit"], 0), (0, ["fit", "fit"], 1)):
        taken.clear()
        made = lifecycle.LifecycleCallback.__new__(lifecycle.LifecycleCallback)
        made.directory, made._locked, made.request = tmp_path, False, SimpleNamespace(listen=lambda: None)
        for stage in stages:
            made.setup(SimpleNamespace(is_global_zero=rank == 0, fit_loop=type("Loop", (), {})()), None, stage)
        assert taken == [tmp_path] * times


def test_every_optimizer_of_the_host_is_asked_before_it_updates(monkeypatch):
    apart, asked = [], []
    monkeypatch.setattr(lifecycle, "keep_torch_steps_apart", apart.append)
    monkeypatch.setattr(lifecycle, "ask_before_updates", lambda inner, permit: asked.append((inner, permit)))
    made = SimpleNamespace(_permit=len)
    optimizers = [SimpleNamespace(mcore_optimizer="a"), SimpleNamespace(), SimpleNamespace(mcore_optimizer="b")]
    lifecycle.LifecycleCallback.on_fit_start(made, SimpleNamespace(optimizers=optimizers), None)
    assert apart == ["a", "b"]
    assert asked == [("a", len), ("b", len)]


def test_a_run_is_told_what_the_plan_says_of_each_of_its_stages(monkeypatch):
    layout, shape = Layout(gpus=8, precision="bf16"), MODELS["llama2_7b"]
    monkeypatch.setattr(throughput, "run_layout", lambda trainer, module, stage: layout)
    stages = (StageConfig(until=0.5, seq_length=1024), StageConfig(until=1.0, seq_length=4096))
    curriculum = Curriculum(stages=stages, tokens_per_step=32_768, total_tokens=32_768 * 4)
    trainer = SimpleNamespace(strategy=SimpleNamespace(tensor_model_parallel_size=1))
    found = throughput.planned_stages(trainer, None, shape, curriculum, None)
    sizes = [(stage.seq_length, stage.global_batch_size) for stage in curriculum.plan]
    plans = [
        memory_plan(shape, layout, seq_length=length, global_batch_size=batch, device="cpu", framework_bytes=0)
        for length, batch in sizes
    ]
    assert found == {number: {"memory_gib": plan.total / 2**30} for number, plan in enumerate(plans)}


def test_adapters_are_added_to_the_model_and_filled_alone(monkeypatch, tmp_path):
    walked, filled = [], []
    monkeypatch.setattr(lora.fn, "walk", lambda module, function: walked.append((module, function)))

    def load_checkpoint(asked, folder):
        assert folder == str(tmp_path / "weights")
        return {"state_dict": {key: f"{value} read" for key, value in asked["state_dict"].items()}}

    monkeypatch.setattr(lora.dist_checkpointing, "load", load_checkpoint)
    module = SimpleNamespace(
        sharded_state_dict=lambda prefix: {f"{prefix}a.weight": "w", f"{prefix}a.adapter.weight": "x"},
        load_state_dict=lambda values, strict: filled.append((values, strict)),
    )
    lora.load_adapters(module, SimpleNamespace(transform="added"), tmp_path)
    assert walked == [(module, "added")]
    assert filled == [({"a.adapter.weight": "x read"}, False)]
