"""A NeMo checkpoint as a live Megatron-Core model, without a trainer: for evaluation, export checks and `doctor`."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from nemo.collections import llm

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.activations import set_activation_policy
from nemo_longctx.adapters.megatron.inference import MCoreCausalModel, evaluating, model_digest
from nemo_longctx.adapters.megatron.memory_trial import within_memory
from nemo_longctx.adapters.nemo.launch.begin import complete_rope
from nemo_longctx.adapters.nemo.model.config import checkpoint_directory, checkpoint_model, fresh_model, prepare_model
from nemo_longctx.adapters.nemo.model.lora import adapter_base, as_long_context, load_adapters, merge_adapters
from nemo_longctx.compose import compose, groups
from nemo_longctx.config import ConfigError
from nemo_longctx.nemo_files import saved_in, stored_dtype
from nemo_longctx.planning.models import MODELS
from nemo_longctx.precision import PRECISIONS
from nemo_longctx.recipe import RecipeConfig


def initialize_distributed(
    *, tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1, context_parallel_size: int = 1
) -> None:
    """Join the process group that torchrun describes, or make one of this process alone; then Megatron-Core's groups.

    A second call with the same sizes does nothing.
    """
    from megatron.core import parallel_state

    cpu.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
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


def load_model(
    path: str | Path,
    *,
    seq_length: int | None = None,
    merge: bool = False,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
) -> tuple[torch.nn.Module, Any, Any]:
    """The Megatron-Core GPT model of a NeMo checkpoint, in evaluation mode, on this rank's share.

    A checkpoint of LoRA adapters gives its base model with the adapters on.

    Args:
        path: a checkpoint, or a run's directory (its newest finished checkpoint).
        seq_length: longest input, tokens; None keeps the checkpoint's.
        merge: add LoRA adapters to the weights, so that the model is a plain one; only without tensor parallelism.
        tensor_model_parallel_size, pipeline_model_parallel_size: how torchrun's processes divide the model, whatever its
            training did; the rest of the processes hold copies.

    Returns:
        (model, the checkpoint's config with our attention, its tokenizer or None).

    Raises:
        ConfigError: no finished checkpoint at `path`, or a number of processes that the sizes do not divide.
    """
    processes, parts = int(os.environ.get("WORLD_SIZE", "1")), tensor_model_parallel_size * pipeline_model_parallel_size
    if processes % parts:
        mend = f"{processes} processes are no multiple of it; start them with torchrun --nproc-per-node"
        raise ConfigError("tensor_parallel x pipeline_parallel", parts, mend)
    initialize_distributed(
        tensor_model_parallel_size=tensor_model_parallel_size, pipeline_model_parallel_size=pipeline_model_parallel_size
    )
    directory = checkpoint_directory(path)
    nemo_model = checkpoint_model(directory, {}, adapters=True)
    prepare_model(nemo_model, seq_length=seq_length or nemo_model.config.seq_length)
    base = adapter_base(directory)
    weights = base or directory / "weights"
    _take_stored_precision(nemo_model.config, weights)
    _take_parallel_sizes(nemo_model.config)
    module = _build(nemo_model)
    _load_weights(module, weights)
    if base is not None:
        load_adapters(module, as_long_context(nemo_model.model_transform), directory)
        if merge:
            merge_adapters(module)
    module.eval()
    return module, nemo_model.config, nemo_model.tokenizer


def load_nemo_checkpoint(
    path: str,
    *,
    max_length: int | None,
    device: str | None,
    dtype: str,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> tuple[MCoreCausalModel, str, Any]:
    """A NeMo 2 checkpoint for the rest of this process: (model, its digest, its tokenizer or None).

    Raises:
        ConfigError: no finished checkpoint, a device or precision other than the machine's and the checkpoint's own.
    """
    cpu.install()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None and torch.device(device).type != here:
        raise ConfigError("device", device, f"NeMo places models on {here} on this machine; leave it out")
    if dtype != "auto":
        raise ConfigError("dtype", dtype, "a NeMo checkpoint keeps its own precision; leave it out")
    module, config, tokenizer = load_model(
        path,
        seq_length=max_length,
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=pipeline_parallel_size,
    )
    digest = model_digest(module)
    held = contextlib.ExitStack()
    held.enter_context(evaluating(module))
    model = MCoreCausalModel(
        module,
        vocab_size=config.vocab_size,
        max_length=max_length or config.seq_length,
        generation_config=getattr(config, "generation_config", None),
    )
    model.held = held  # the process trains nothing, so the model stays as it is for as long as it lives
    return model, digest, tokenizer


def build_for_test(recipe: RecipeConfig, *, load_weights: bool) -> tuple[torch.nn.Module, Any]:
    """The model of a recipe in one process, by the path that its run would build for its longest stage.

    The config that is returned says the run's parallel sizes.

    Args:
        recipe: its `model`, or the checkpoint at `restore_from`, says the sizes; where that checkpoint is not on this machine,
            the published model or the recipe of its name does.
        load_weights: take the checkpoint's weights too; otherwise they are random.

    Raises:
        ConfigError: nothing says the sizes, or the weights do not fit in memory.
    """
    initialize_distributed()
    nemo_model = _model_for_test(recipe, load_weights=load_weights)
    completed = complete_rope(nemo_model, recipe.rope, seq_length=recipe.seq_length, source=type(nemo_model.config).__name__)
    prepare_model(nemo_model, seq_length=recipe.seq_length, variant=completed.variant if completed else None)
    _take_parallel_sizes(nemo_model.config)
    nemo_model.config.gradient_accumulation_fusion = False  # its kernels add to buffers that only data parallelism makes
    module = within_memory(lambda: _build(nemo_model))
    if module is None:
        mend = "its weights do not fit in this machine's memory; cut layers (model.num_layers=2) or use a larger machine"
        raise ConfigError("--model", recipe.name, mend)
    longest = max(recipe.curriculum.stages, key=lambda stage: stage.seq_length)
    set_activation_policy([module], recompute=longest.recompute, offload=longest.offload)
    if load_weights:
        _load_weights(module, checkpoint_directory(str(recipe.restore_from)) / "weights")
    named = PRECISIONS[recipe.trainer.precision].dtype
    dtype = None if named == "float32" else getattr(torch, named)
    if dtype is not None:  # what the host's mixed precision does when a run begins
        module.to(dtype)
    config = copy.copy(nemo_model.config)
    config.context_parallel_size = recipe.trainer.context_parallel_size
    return module, config


def _model_for_test(recipe: RecipeConfig, *, load_weights: bool) -> Any:
    if load_weights or (recipe.restore_from and Path(recipe.restore_from).exists()):
        return checkpoint_model(str(recipe.restore_from), recipe.model)
    if "config" in recipe.model:
        return fresh_model(recipe.model)
    name, known = Path(str(recipe.restore_from)).name, groups()
    found: dict[str, Any] = {}
    if name in known["model"] or name in known["recipe"]:
        found = compose([f"model={name}" if name in known["model"] else f"recipe={name}"])["model"]
    if "config" not in found:
        mend = (
            "no checkpoint is there to read sizes from, and it has the name of no model or recipe of conf/; give --checkpoint, "
            "or model=NAME restore_from=null"
        )
        raise ConfigError("restore_from", recipe.restore_from, mend)
    model = fresh_model({**found, **recipe.model})
    if name in MODELS:  # which the host's class does not always say
        model.config.seq_length = MODELS[name].seq_length
    return model


def _take_stored_precision(config: Any, weights: Path) -> None:
    """Set a config that says float32 to the half precision that its weights are stored in: a plugin that is not told otherwise,
    NeMo's default, trains them in that and leaves the config as it is. Nothing of them is lost."""
    stored = stored_dtype(weights)
    if config.params_dtype != torch.float32 or stored not in (torch.bfloat16, torch.float16):
        return
    kept = str(stored).removeprefix("torch.")
    rank_zero_info(f"{weights.parent} says float32, and its weights are stored in {kept}: they are read in that")
    config.params_dtype, config.bf16, config.fp16 = stored, stored == torch.bfloat16, stored == torch.float16


def _take_parallel_sizes(config: Any) -> None:
    """Set on `config` the sizes that this process group has, and none of what only serves the speed of training."""
    from megatron.core import parallel_state

    config.tensor_model_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    config.pipeline_model_parallel_size = parallel_state.get_pipeline_model_parallel_world_size()
    config.context_parallel_size = parallel_state.get_context_parallel_world_size()
    config.sequence_parallel = False
    config.pipeline_dtype = config.params_dtype
    for name in ("fp8", "fp4"):  # products that want multiples of 8 tokens, and a GPU that has them
        if hasattr(config, name):
            setattr(config, name, None)


def _build(nemo_model: Any) -> torch.nn.Module:
    module = nemo_model.config.configure_model(nemo_model.tokenizer)
    transform = nemo_model.model_transform
    if isinstance(transform, llm.peft.LoRA):  # its adapters come once the base has its weights
        as_long_context(transform).place_rope(module)
    elif transform is not None:
        transform(module)
    return module.cuda() if torch.cuda.is_available() else module


def _load_weights(module: Any, weights: Path) -> None:
    from megatron.core import dist_checkpointing

    sharded, known = module.sharded_state_dict(prefix="module."), saved_in(weights)
    # What Transformer Engine's layers keep beside their weights is not in a checkpoint that was made without them.
    lacking = [key for key, each in sharded.items() if key.endswith("_extra_state") and known and each.unique_key not in known]
    wanted = {key: each for key, each in sharded.items() if key not in lacking}
    loaded = dist_checkpointing.load({"state_dict": wanted}, str(weights))["state_dict"]
    state = {key.removeprefix("module."): value for key, value in loaded.items()}
    own = module.state_dict() if lacking else {}
    names = [key.removeprefix("module.") for key in lacking]
    module.load_state_dict(state | {name: own[name] for name in names}, strict=True)
