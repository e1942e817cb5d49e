"""Parts of NeMo's own recipes, built with what the machine has that builds them.

A recipe may be extended on one machine and run on another: what a machine without CUDA needs is therefore decided where the
parts are built, not where they are written down. With CUDA all of it is NeMo's own, unchanged.
"""

from __future__ import annotations

import inspect
from typing import Any

import nemo.lightning as nl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from nemo_longctx.adapters.megatron import cpu


def config_here(make: Any) -> Any:
    """A model config from a `functools.partial` of its class (or one made already), with the fusions of this machine."""
    if not callable(make):
        return make
    cpu.install()
    with cpu.stock_configs():
        return make()


def trainer_here(**settings: Any) -> nl.Trainer:
    """NeMo's trainer with `settings`; without CUDA on the CPU, by gloo, saving while nothing else runs."""
    if cpu.install():
        if settings.get("accelerator", "auto") != "cpu":
            rank_zero_info("this machine has no CUDA: the recipe runs on the CPU")
        settings["accelerator"] = "cpu"
        # It asks for the GPU's capability, and there is nothing to overlap.
        kept = [each for each in settings.get("callbacks") or [] if not isinstance(each, MegatronCommOverlapCallback)]
        settings["callbacks"] = kept
        strategy = settings.get("strategy")
        if isinstance(strategy, nl.MegatronStrategy):
            strategy.async_save = strategy.parallel_load = False
            for name in ("overlap_grad_reduce", "overlap_param_gather"):
                if hasattr(strategy.ddp_config, name):
                    setattr(strategy.ddp_config, name, False)
    return nl.Trainer(**settings)


trainer_here.__signature__ = inspect.signature(nl.Trainer)  # type: ignore[attr-defined]  # for nemo_run's command line
