"""A NeMo checkpoint as a live Megatron-Core model, without a trainer: for evaluation, export checks and `doctor`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from nemo_longctx.adapters.nemo import cpu
from nemo_longctx.adapters.nemo.model import checkpoint_directory, checkpoint_model, prepare_model


def initialize_distributed(
    *, tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1, context_parallel_size: int = 1
) -> None:
    """Join the process group that torchrun describes, or make one of this process alone; then Megatron-Core's groups.

    A second call with the same sizes does nothing.
    """
    from megatron.core import parallel_state

    cpu.install()
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:
            torch.distributed.init_process_group(backend)
        else:
            store = f"file://{tempfile.mkdtemp(prefix='nemo_longctx_')}/store"
            torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            context_parallel_size=context_parallel_size,
        )


def load_model(path: str | Path, *, seq_length: int | None = None) -> tuple[torch.nn.Module, Any, Any]:
    """The Megatron-Core GPT model of a NeMo checkpoint, in evaluation mode, on this rank's share.

    Args:
        path: a checkpoint, or a run's directory (its newest finished checkpoint).
        seq_length: longest input, tokens; None keeps the checkpoint's.

    Returns:
        (model, the checkpoint's config with our attention, its tokenizer or None).

    Raises:
        ConfigError: no finished checkpoint at `path`.
    """
    from megatron.core import dist_checkpointing, parallel_state

    initialize_distributed()
    directory = checkpoint_directory(path)
    nemo_model = checkpoint_model(directory, {})
    config, tokenizer = nemo_model.config, nemo_model.tokenizer
    prepare_model(nemo_model, seq_length=seq_length or config.seq_length)
    config.tensor_model_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    config.pipeline_model_parallel_size = parallel_state.get_pipeline_model_parallel_world_size()
    config.context_parallel_size = parallel_state.get_context_parallel_world_size()
    config.sequence_parallel = False
    module = config.configure_model(tokenizer)
    if nemo_model.model_transform is not None:
        nemo_model.model_transform(module)
    sharded = {"state_dict": module.sharded_state_dict(prefix="module.")}
    loaded = dist_checkpointing.load(sharded, str(directory / "weights"))
    weights = {key.removeprefix("module."): value for key, value in loaded["state_dict"].items()}
    module.load_state_dict(weights, strict=True)
    module.eval()
    if torch.cuda.is_available():
        module.cuda()
    return module, config, tokenizer
