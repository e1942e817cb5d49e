"""Speed settings of NeMo's own recipes that long context does not keep: adapted where nothing is lost, else refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nemo_run as run
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.evaluation import EvaluationConfig
from nemo_longctx.precision import CUDA_GRAPHS, check_graphs


def fit_performance_settings(
    recipe: run.Partial,
    config: run.Config,
    curriculum: Curriculum,
    *,
    document_masking: bool,
    validation: Sequence[EvaluationConfig] = (),
) -> None:
    """Change a recipe of the host's (a copy) so that its speed settings serve windows of several lengths and our loss.

    - `defer_embedding_wgrad_compute` puts the head's gradient off; the loss in chunks has made it by then.
    - Transformer Engine's buffers for overlapped tensor parallelism are made once, for one size of micro batch, and it checks
      them at every copy: with several sizes the overlap is off.

    Args:
        recipe: its trainer's callbacks are changed.
        config: of its model, changed.
        curriculum: of the run.
        document_masking: whether windows come as packed documents, whose boundaries differ.
        validation: sets whose micro batches go through the same layers.

    Raises:
        ConfigError: CUDA graphs, which replay one shape, where there are several.
    """
    graphs = {name: getattr(config, name, None) for name in CUDA_GRAPHS}
    check_graphs(graphs, curriculum.stages, document_masking=document_masking)
    shapes: list[Any] = [*curriculum.stages, *validation]
    sizes = {each.seq_length * each.micro_batch_size for each in shapes}
    if getattr(config, "defer_embedding_wgrad_compute", False):
        config.defer_embedding_wgrad_compute = False
        rank_zero_info("defer_embedding_wgrad_compute is off: the loss in chunks makes the head's gradient in its forward")
    for callback in getattr(recipe.trainer, "callbacks", None) or []:
        if isinstance(callback, run.Config) and issubclass(callback.__fn_or_cls__, MegatronCommOverlapCallback):
            callback.defer_embedding_wgrad_compute = False
            if callback.tp_comm_overlap and len(sizes) > 1:
                callback.tp_comm_overlap, callback.tp_comm_overlap_cfg = False, None
                rank_zero_info("tp_comm_overlap is off: its buffers hold one size of micro batch, and the run has several")


def fit_warmup(recipe: run.Partial, curriculum: Curriculum) -> None:
    """Shorten a warm-up (of a copy of the host's recipe) that would take the whole run to a tenth of it, and say so."""
    schedule: Any = getattr(getattr(recipe, "optim", None), "lr_scheduler", None)
    warmup, total = getattr(schedule, "warmup_steps", None), curriculum.total_steps
    if isinstance(warmup, int) and warmup >= total:
        schedule.warmup_steps = total // 10
        rank_zero_info(f"warmup_steps is {total // 10} in place of {warmup}: the run has {total} steps")
