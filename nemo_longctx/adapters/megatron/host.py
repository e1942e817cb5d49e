"""What differs between the versions of Megatron-Core that we run on, found by capability and not by version number.

Seen: 0.13 and 0.14 (NeMo 2.4, 2.5) against 0.15 (NeMo 2.7), which the rest of this room is written in the words of.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
from multiprocessing.managers import SyncManager
from types import SimpleNamespace
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.utils import get_batch_on_this_cp_rank

from nemo_longctx.start import end_with, main_hidden, signals_not_inherited


def groups_of(module: Any) -> Any:
    """The process groups that a module of Megatron-Core was built with: `pg_collection`, before 0.15 `model_comm_pgs`.

    Of 0.13 only attention has them; a model's are then those of this process.
    """
    for name in ("pg_collection", "model_comm_pgs"):
        if hasattr(module, name):
            return getattr(module, name)
    groups = {"tp": parallel_state.get_tensor_model_parallel_group(), "cp": parallel_state.get_context_parallel_group()}
    return SimpleNamespace(**groups)


def fuses_qkv_rope(config: Any) -> bool:
    """Whether the query, key and value projection rotates in one kernel (`fused_single_qkv_rope`, from 0.15)."""
    return bool(getattr(config, "fused_single_qkv_rope", False))


def graphs_off(config: Any) -> str:
    """What to set so that no layer runs as a CUDA graph, by the name of what was set; nothing where none does.

    `enable_cuda_graph` and `external_cuda_graph`, which from 0.15 on set `cuda_graph_impl` in their turn.
    """
    for name in ("enable_cuda_graph", "external_cuda_graph"):
        if getattr(config, name, False):
            return f"{name}=false"
    return "" if getattr(config, "cuda_graph_impl", "none") == "none" else "cuda_graph_impl=none"


def rotates_documents_interleaved() -> bool:
    """Whether the fused rotation of packed documents is told that pairs are interleaved (from 0.17 on).

    Before, it turns the first half of the dimensions with the second one, without a word; whole windows are turned rightly.
    """
    fused = rope_utils.fused_apply_rotary_pos_emb_thd
    return fused is not None and "interleaved" in inspect.signature(fused).parameters


def yarn_rounds_always() -> bool:
    """Whether the host's YaRN has no choice but to round the ends of its ramp to whole pairs (before 0.15)."""
    return "correction_range_round_to_int" not in inspect.signature(YarnRotaryEmbedding.__init__).parameters


def share_of_context_parallel_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's two chunks of each sequence of a batch, as the host cuts them; 0.19 wants to hear of hybrid layouts."""
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False)
    return get_batch_on_this_cp_rank(batch)


def start_results_queue() -> None:
    """Start the process that the writers of checkpoints report to, before the first checkpoint does (0.15 spawns one).

    Spawned there, it imports the main script again: half a minute where that imports NeMo, and a bare EOFError where it has no
    main guard; it outlives a run that is killed, for good, and a signal to all of a run kills it, and with it the last save.
    This one ends with the run and not before.
    """
    if getattr(filesystem_async, "_results_queue", filesystem_async) is None:
        with main_hidden(), signals_not_inherited():
            manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
            manager.start(end_with, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()
