"""Losses of validation and test sets over all their tokens, the same in every layout, under the host's own names.

The host averages the steps of an evaluation as if each had as many tokens, and over several sets by the size of the last
training batch. Here losses and tokens are summed by set, over ranks and steps, and divided once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state


class EvaluationLossCallback(Callback):
    """Logs `val_loss_NAME` of each set and `val_loss`, the mean over the tokens of all; `test_loss...` in a test.

    The host has logged a `val_loss` of its own by then: one that is logged at the end of the epoch takes its place, also for
    the checkpoints that are kept by it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, outputs: Sequence[Any]) -> None:
        """Note a step's micro batches of set `name`: `loss_sum_and_ub_size`, [losses summed, tokens], as the host makes them.

        A rank without the head (the earlier stages of a pipeline) has no outputs, and notes the set all the same, so that all
        ranks know the same sets.
        """
        noted = self._sums.get(name)
        for output in outputs:
            sums = output["loss_sum_and_ub_size"].detach().double()
            noted = sums if noted is None else noted + sums
        self._sums[name] = noted if noted is not None else torch.zeros(2, dtype=torch.float64, device=_device())

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._sums = {}

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._sums = {}

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._log(pl_module, "val_loss")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(pl_module, "test_loss")

    def _log(self, pl_module: Any, metric: str) -> None:
        if not self._sums:
            return
        sums_N2 = torch.stack(list(self._sums.values()))
        torch.distributed.all_reduce(sums_N2, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:  # the last stage has the losses, the others 0
            torch.distributed.all_reduce(sums_N2, group=parallel_state.get_pipeline_model_parallel_group())
        means = dict(zip([f"{metric}_{name}" for name in self._sums], sums_N2[:, 0] / sums_N2[:, 1], strict=True))
        total, tokens = sums_N2.sum(0)
        for name, mean in {**means, metric: total / tokens}.items():
            pl_module.log(name, mean.float(), prog_bar=name == metric, on_step=False, on_epoch=True, batch_size=1)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
