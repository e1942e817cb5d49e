"""A resumed run's learning rates and decay are its recipe's: what the checkpoint's optimizer brings along is put back."""

from types import SimpleNamespace

import pytest
import torch
from nemo.core.optim.lr_scheduler import CosineAnnealing

from nemo_longctx.adapters.nemo.launch import lifecycle
from nemo_longctx.adapters.nemo.launch.callbacks import LongContextSettingsCallback
from nemo_longctx.adapters.nemo.launch.optimizer_settings import apply_optimizer_settings, optimizer_settings


def trainer(*, lr=1e-3, decay=0.1, steps=100, warmup=10, betas=(0.9, 0.95), min_lr=1e-5):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))]},
        {"params": [torch.nn.Parameter(torch.ones(3))], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=decay)
    schedule = CosineAnnealing(optimizer, max_steps=steps, warmup_steps=warmup, constant_steps=0, min_lr=min_lr)
    return SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)])


def step(run, count):
    for _ in range(count):
        run.optimizers[0].step()
        run.lr_scheduler_configs[0].scheduler.step()
    return run


def rates(run):
    return [group["lr"] for group in run.optimizers[0].param_groups]


def restored(into, run):
    """As Lightning restores a checkpoint."""
    into.optimizers[0].load_state_dict(run.optimizers[0].state_dict())
    into.lr_scheduler_configs[0].scheduler.load_state_dict(run.lr_scheduler_configs[0].scheduler.state_dict())
    return into


@pytest.mark.parametrize(
    "asked",
    [{"lr": 2e-3}, {"decay": 0.3}, {"steps": 300}, {"warmup": 40}, {"betas": (0.8, 0.9)}, {"min_lr": 5e-4},
     {"lr": 3e-4, "decay": 0.0, "steps": 60, "min_lr": 1e-6}],
    ids=str,
)  # fmt: skip
def test_a_resumed_run_has_the_rates_that_it_asks_for(asked):
    new = trainer(**asked)
    settings = optimizer_settings(new)
    restored(new, step(trainer(), 25))
    assert apply_optimizer_settings(new, settings)
    assert optimizer_settings(new) == settings
    never_stopped = step(trainer(**asked), 25)
    assert rates(new) == pytest.approx(rates(never_stopped))
    assert [group["weight_decay"] for group in new.optimizers[0].param_groups] == [asked.get("decay", 0.1), 0.0]
    assert rates(step(new, 5)) == pytest.approx(rates(step(never_stopped, 5)))


@pytest.mark.parametrize("resumed", [True, False])
def test_adapters_have_the_rates_that_are_asked_for_and_are_watched(tmp_path, monkeypatch, resumed):
    """NeMo makes their optimizer and reads it once the epoch has begun: a resumed run kept the old rates, and its record said
    the new ones; a gradient that was no number was not looked at, under adapters from the first step on."""
    watched = []
    monkeypatch.setattr(lifecycle, "keep_torch_steps_apart", lambda inner: watched.append(("apart", inner, rates(run))))
    monkeypatch.setattr(lifecycle, "ask_before_updates", lambda inner, permit: watched.append(("ask", inner, rates(run))))
    asked, run = trainer(lr=2e-3, decay=0.3), trainer(lr=2e-3, decay=0.3)
    run.optimizers[0].mcore_optimizer = "inner"
    later = run.optimizers, run.lr_scheduler_configs
    run.optimizers, run.lr_scheduler_configs, run.global_step, run.ckpt_path = [], [], 25, "step=25-last" if resumed else None

    def make(of):
        of.optimizers, of.lr_scheduler_configs = later

    run.strategy = SimpleNamespace(setup_optimizers=make)
    settings = LongContextSettingsCallback(directory=str(tmp_path), recipe={})
    callbacks = [settings, lifecycle.LifecycleCallback(directory=str(tmp_path), curriculum=None)]
    for callback in callbacks:
        callback.on_fit_start(run, None)
    settings._go_on(run, None, None)
    assert watched == []
    run.strategy.setup_optimizers(run)
    assert watched == [(kind, "inner", rates(asked)) for kind in ("apart", "ask")]  # before a checkpoint is read
    if resumed:
        restored(run, step(trainer(), 25))
    for _ in range(2):
        callbacks[0].on_train_batch_start(run, None, None, 0)
    assert optimizer_settings(run) == optimizer_settings(asked)
    assert rates(run) == pytest.approx(rates(step(asked, 25 if resumed else 0)))


def test_where_nothing_differs_nothing_is_touched():
    new = trainer()
    settings = optimizer_settings(new)
    assert set(settings["groups"][0][0]) >= {"weight_decay", "betas", "eps", "initial_lr"}
    assert set(settings["schedules"][0]) >= {"max_steps", "warmup_steps", "min_lr", "base_lrs"}
    restored(new, step(trainer(), 25))
    before = rates(new)
    assert not apply_optimizer_settings(new, settings)
    assert rates(new) == before
