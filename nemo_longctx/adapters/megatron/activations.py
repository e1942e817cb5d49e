"""Recomputation and offload on a live Megatron-Core model, changed between two steps: a curriculum's stages may differ.

Recomputation is the host's own (`recompute_granularity`, `_method`, `_num_layers`, `_modules`). The host reads what concerns
whole layers at every forward, and what concerns parts of a layer when it builds the layer: both places are set.

Offload is hooks on what autograd saves (`attention/saved.py`), around the host's transformer block, on any layer spec.
Megatron-Core's own `cpu_offloading` needs Transformer Engine, one pipeline stage and no recomputation, and cannot be changed
between steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlock

from nemo_longctx.activations import megatron_fields, offloaded_layers, recompute_name, recomputed_layers
from nemo_longctx.adapters.megatron.host import graphs_off
from nemo_longctx.attention.saved import saved_tensors_hooks
from nemo_longctx.config import ConfigError

# Smaller tensors stay: a transfer of so little costs more than it frees.
OFFLOAD_MIN_BYTES = 2**20


def set_activation_policy(
    modules: Iterable[torch.nn.Module], *, recompute: str | None = None, offload: str | None = None
) -> None:
    """Let every transformer block inside `modules` keep its activations so from the next forward on.

    Args:
        modules: the model chunks of this rank, wrapped or not.
        recompute, offload: names of `nemo_longctx.activations`; None leaves that half as it is.

    Raises:
        ConfigError: a name that means nothing here: more layers than a chunk has, offload without a GPU, or offload beside the
            host's own.
    """
    blocks = [block for module in modules for block in module.modules() if isinstance(block, TransformerBlock)]
    for block in blocks:
        if recompute is not None:
            _check_count("recompute", recompute, len(block.layers))
            _set_recompute(block, recompute)
        if offload is not None:
            _check_count("offload", offload, len(block.layers))
            if offload != "none":
                _check_offload(block, offload)
            _set_offload(block, offloaded_layers(offload, len(block.layers)))


def _check_count(key: str, value: str, layers: int) -> None:
    if value.startswith("block:") and int(value.partition(":")[2]) > layers:
        raise ConfigError(key, value, f"a model chunk has only {layers} layers; set full, or fewer")
    recomputed_layers(value, layers, key=key)


def _set_recompute(block: TransformerBlock, recompute: str) -> None:
    for name, value in megatron_fields(recompute).items():
        setattr(block.config, name, value)
    selective = recompute == "selective"
    for layer in block.layers:
        dense = not isinstance(layer.mlp, MoELayer)
        layer.recompute_mlp = selective and dense
        if not dense:
            layer.mlp.moe_layer_recompute = selective
        layer.self_attention.checkpoint_core_attention = False
        layer.recompute_input_layernorm = layer.recompute_pre_mlp_layernorm = False


def _check_offload(block: TransformerBlock, offload: str) -> None:
    config, layers = block.config, len(block.layers)
    if next(block.parameters()).device.type == "cpu":
        mend = "needs a GPU: on the CPU activations lie in host memory already; set none, and recompute to save memory"
        raise ConfigError("offload", offload, mend)
    if config.cpu_offloading:
        raise ConfigError("offload", offload, "beside the host's own cpu_offloading=True; set one of the two")
    if mend := graphs_off(config):
        raise ConfigError("offload", offload, f"cannot be captured in a CUDA graph; set model.{mend} or offload=none")
    again = recomputed_layers(recompute_name(vars(config)).partition(" ")[0], layers)
    if config.gradient_accumulation_fusion and offloaded_layers(offload, layers) > again:
        # The fused kernels hang gradient buffers on the weight that they saved; what a hook gives back is another tensor.
        mend = "set model.gradient_accumulation_fusion=false, or recompute those layers whole (recompute=full)"
        raise ConfigError("offload", offload, mend)


class _OffloadingBlock:
    """Mixed into the class of a `TransformerBlock`: what its first `offload_layers` layers save goes to host memory."""

    offload_layers = 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        block: Any = self
        if not block.offload_layers or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hooks = HostMemory(block)
        with saved_tensors_hooks(hooks.pack, hooks.unpack):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class HostMemory:
    """The two hooks of one forward: what the first layers save goes to pinned memory, and comes back when the backward asks.

    A layer that is recomputed whole saves its input when its forward ends, so that it too counts to that layer. Weights stay.
    """

    def __init__(self, block: Any):
        self.block = block
        self.weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(self, tensor: torch.Tensor) -> Any:
        stays = self.block.offload_at >= self.block.offload_layers or tensor.nbytes < OFFLOAD_MIN_BYTES
        if stays or tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        on_cuda = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_cuda)
        # On the stream that computes: ordered with the tensor's use, at the price of not overlapping it.
        return tensor.device, host.copy_(tensor, non_blocking=on_cuda)

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True, copy=True)


def _set_offload(block: Any, layers: int) -> None:
    if layers and not isinstance(block, _OffloadingBlock):
        cls = type(block)
        block.__class__ = type(cls.__name__, (_OffloadingBlock, cls), {"__module__": cls.__module__})
        block.offload_at = 0
        for index, layer in enumerate(block.layers):
            layer.register_forward_pre_hook(_counter(block, index))
    if isinstance(block, _OffloadingBlock):
        block.offload_layers = layers


def _counter(block: Any, index: int) -> Any:
    def count(_module: torch.nn.Module, _inputs: Any) -> None:
        block.offload_at = index

    return count
