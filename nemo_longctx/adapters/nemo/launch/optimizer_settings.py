"""Learning rates and decay of a resumed run: those that its recipe asks for, not those of the checkpoint.

Optimizer and schedule keep their settings beside their state, and loading the state restores both. What a run asks for is what
the two have when they are made; it is read there, and put back after the checkpoint is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

GROUP_SETTINGS = ("weight_decay", "betas", "eps", "initial_lr", "max_lr", "min_lr")
SCHEDULE_SETTINGS = ("max_steps", "warmup_steps", "constant_steps", "decay_steps", "hold_steps", "min_lr", "base_lrs")


def when_made(trainer: Any, do: Callable[[], None]) -> None:
    """Call `do` when the optimizers are there and nothing was read into them from a checkpoint.

    At the start of a fit they are there, but for adapters (NeMo's PEFT): these are added, and their optimizer made and read,
    once the epoch has begun, behind every callback's start of training.
    """
    if trainer.optimizers:
        do()
        return
    strategy, make = trainer.strategy, trainer.strategy.setup_optimizers

    def setup_optimizers(of: Any) -> None:
        make(of)
        do()

    strategy.setup_optimizers = setup_optimizers


def optimizer_settings(trainer: Any) -> dict[str, list[Any]]:
    """What optimizers and schedules are set to now: `groups` of each optimizer, and `schedules`."""
    groups = [[_settings(group, GROUP_SETTINGS) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    schedules = [_settings(vars(config.scheduler), SCHEDULE_SETTINGS) for config in trainer.lr_scheduler_configs]
    return {"groups": groups, "schedules": schedules}


def apply_optimizer_settings(trainer: Any, asked: dict[str, list[Any]]) -> bool:
    """Set optimizers and schedules to `asked`, and the rate of the next step by it; where nothing differs, nothing is touched.

    Args:
        trainer: its optimizers and schedules are loaded, and of the same make as when `asked` was read.
        asked: `optimizer_settings` from before the checkpoint was loaded.

    Returns:
        whether anything was changed.
    """
    if optimizer_settings(trainer) == asked:
        return False
    for optimizer, groups in zip(trainer.optimizers, asked["groups"], strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)
    for config, settings in zip(trainer.lr_scheduler_configs, asked["schedules"], strict=True):
        schedule = config.scheduler
        vars(schedule).update(settings)
        with warnings.catch_warnings():  # it is called between two steps on purpose
            warnings.simplefilter("ignore", UserWarning)
            rates = schedule.get_lr()  # a function of the step and of its settings alone
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = list(rates)
    return True


def _settings(values: Any, names: tuple[str, ...]) -> dict[str, Any]:
    found = {name: values[name] for name in names if name in values}
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in found.items()}
