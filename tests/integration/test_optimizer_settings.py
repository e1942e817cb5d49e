"""A resumed run's learning rates and decay are its recipe's: what the checkpoint's optimizer brings along is put back."""

from types import SimpleNamespace

import pytest
import torch
from nemo.core.optim.lr_scheduler import CosineAnnealing

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


def test_where_nothing_differs_nothing_is_touched():
    new = trainer()
    settings = optimizer_settings(new)
    assert set(settings["groups"][0][0]) >= {"weight_decay", "betas", "eps", "initial_lr"}
    assert set(settings["schedules"][0]) >= {"max_steps", "warmup_steps", "min_lr", "base_lrs"}
    restored(new, step(trainer(), 25))
    before = rates(new)
    assert not apply_optimizer_settings(new, settings)
    assert rates(new) == before
