"""What a micro batch is and how a model sees it: the host's `data_step_fn` and `forward_step_fn`, without attention masks.

A batch holds `tokens`, `labels`, `loss_mask`, `position_ids`, each [b, s], and, where documents are masked, `cu_seqlens`:
int32, the boundaries of all documents of all windows laid end to end. The functions stand at module level, since checkpoints
name them in their context.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from nemo_longctx.adapters.megatron.attention import packed_documents
from nemo_longctx.adapters.megatron.host import share_of_context_parallel_rank
from nemo_longctx.adapters.megatron.loss import forward_with_chunked_loss
from nemo_longctx.attention.context_parallel import slice_zigzag

ON_FIRST_STAGE = ("tokens", "position_ids")
ON_LAST_STAGE = ("labels", "loss_mask")


def longctx_data_step(dataloader_iter: Any) -> dict[str, Any]:
    """The next micro batch on this rank's device: what its pipeline stage needs, cut to its context-parallel share.

    Returns:
        `tokens`, `labels`, `position_ids` int64 and `loss_mask` float32, each [b, s / cp] or None on a stage without need
        of it; `packed_seq_params` or None; `loss_tokens`, how many tokens of this rank the mask counts, or None.
    """
    item = next(dataloader_iter)
    batch: dict[str, Any] = item[0] if isinstance(item, tuple) else item
    needed: set[str] = set()
    if parallel_state.is_pipeline_first_stage():
        needed.update(ON_FIRST_STAGE)
    if parallel_state.is_pipeline_last_stage():
        needed.update(ON_LAST_STAGE)
    fields = (*ON_FIRST_STAGE, *ON_LAST_STAGE)
    seq_length = batch["tokens"].shape[1]
    share = {key: batch[key].cuda(non_blocking=True) if key in needed else None for key in fields}
    share = share_of_context_parallel_rank(share)
    share["loss_tokens"] = _counted(batch["loss_mask"]) if "loss_mask" in needed else None
    boundaries = batch.get("cu_seqlens")
    share["packed_seq_params"] = None
    if boundaries is not None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        share["packed_seq_params"] = packed_documents(boundaries.flatten(), seq_length=seq_length, device=device)
    return share


def _counted(loss_mask: torch.Tensor) -> int | None:
    """Tokens of this rank that the mask counts, read on the host before they leave it; None where they have left already."""
    if loss_mask.device.type != "cpu":
        return None
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    mine = loss_mask if size == 1 else slice_zigzag(loss_mask, rank, size)
    return int(mine.count_nonzero())


def longctx_forward_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Per-token losses [b, s] on the last pipeline stage, computed in chunks of tokens; hidden states before it."""
    return forward_with_chunked_loss(model, batch)
