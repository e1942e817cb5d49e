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
from nemo_longctx.adapters.nemo.launch import parts
from nemo_longctx.adapters.nemo.launch.run import prepare_device
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
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
