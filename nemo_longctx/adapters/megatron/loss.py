"""The chunked head loss in Megatron-Core's `GPTModel`: training without the logits of all tokens.

`use_chunked_loss(model)` is a model transform: it changes a model that is already built, whatever its architecture, and
changes no parameter, name or checkpoint. Afterwards `model(..., labels=labels, loss_mask=loss_mask)` returns the losses of
the tokens [b, s] as before, computed from the hidden states in chunks; without labels it returns logits as before.

The output layer is still called as a module, so that hooks on it (the distributed optimizer's gathering of parameters) run;
given labels it hands on its input and weight in place of the product, and the model's own loss method does the rest. That
keeps tied embeddings, pipeline stages and sequence parallelism, which all go by these two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_size

from nemo_longctx.adapters.megatron.host import groups_of
from nemo_longctx.attention.loss import chunked_cross_entropy
from nemo_longctx.config import ConfigError


class HeadInput(NamedTuple):
    """What the output layer would multiply: hidden [s, b, h] of all the sequence, and this rank's rows of the weight."""

    hidden: torch.Tensor
    weight: torch.Tensor


class _DeferredOutputLayer:
    """Mixed into the class of `GPTModel.output_layer`: hands on its input and weight while the model computes losses."""

    defers = False

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> Any:
        if not self.defers:
            return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)  # type: ignore[misc]
        layer: Any = self
        if layer.sequence_parallel:  # its backward sums the ranks' partial gradients and scatters them
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=layer.tp_group)
        else:  # its backward sums the ranks' partial gradients
            hidden = copy_to_tensor_model_parallel_region(input_, group=layer.tp_group)
        return HeadInput(hidden, layer.weight if weight is None else weight), None


class _ChunkedLossModel:
    """Mixed into the class of a `GPTModel` that has an output layer."""

    _loss_mask: torch.Tensor | None = None
    _loss_tokens: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        model: Any = self
        labels = args[4] if len(args) > 4 else kwargs.get("labels")  # input_ids, position_ids, mask, decoder_input, labels
        model.output_layer.defers = labels is not None
        model._loss_mask = kwargs.get("loss_mask")
        model._loss_tokens = kwargs.pop("loss_tokens", None)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            model.output_layer.defers = False
            model._loss_mask = model._loss_tokens = None

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor | HeadInput) -> torch.Tensor:
        """Losses [b, s] of labels [b, s]; tokens that the loss mask leaves out have the loss 0."""
        if not isinstance(logits, HeadInput):
            return super().compute_language_model_loss(labels, logits)  # type: ignore[misc]
        model: Any = self
        b, s = labels.shape
        mask = None if model._loss_mask is None else model._loss_mask.t().reshape(-1)
        tensor_group = groups_of(model).tp
        losses = chunked_cross_entropy(
            logits.hidden.flatten(0, 1),
            logits.weight,
            labels.t().reshape(-1),
            weights_N=mask,
            count=None if mask is None else model._loss_tokens,
            group=tensor_group if get_pg_size(tensor_group) > 1 else None,
        )
        return losses.view(s, b).t().contiguous()


def use_chunked_loss(model: torch.nn.Module) -> int:
    """Let every `GPTModel` with a head inside `model` compute its losses in chunks; a second call changes nothing.

    Returns:
        how many models on this rank have a head and so were changed: 0 on the earlier stages of a pipeline.

    Raises:
        ConfigError: a head with a bias or factor, a deferred weight gradient or multi-token prediction: the chunks serve none.
    """
    if isinstance(model, _ChunkedLossModel):
        return 1
    changed = 0
    for module in list(model.modules()):
        if not isinstance(module, GPTModel) or not module.post_process:
            continue
        changed += 1
        if isinstance(module, _ChunkedLossModel):
            continue
        if module.output_layer.bias is not None:
            raise ConfigError("add_bias_output", True, "the chunked loss takes no bias on the head; leave it off")
        if module.mtp_process:
            raise ConfigError("mtp_num_layers", module.config.mtp_num_layers, "must be 0 or None with the chunked loss")
        if module.config.defer_embedding_wgrad_compute:
            raise ConfigError("defer_embedding_wgrad_compute", True, "must be False with the chunked loss")
        if getattr(module.config, "use_mup", False):  # from Megatron-Core 0.17 on: a factor of the logits
            raise ConfigError("use_mup", True, "must be False with the chunked loss, which has no scaled logits")
        # Only the behaviour changes, so the instances keep their parameters, names, hooks and places in a checkpoint.
        _mix_into(module, _ChunkedLossModel)
        _mix_into(module.output_layer, _DeferredOutputLayer)
    return changed


def _mix_into(module: torch.nn.Module, mixin: type) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


def forward_with_chunked_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Losses of the tokens of a batch, for a config's `forward_step_fn`; hidden states on earlier pipeline stages.

    The first call gives the model the chunked loss (`use_chunked_loss`).

    Args:
        model: NeMo's `GPTModel` (its `module` is called, since its own forward passes no loss mask), or Megatron-Core's.
        batch: this rank's `tokens`, `position_ids`, `labels`, `loss_mask`, each [b, s], and `packed_seq_params`
            (`attention.packed_documents`); `loss_tokens`, how many of them the mask counts, where the host knows it, so that
            no work is done for the others (`chunked_cross_entropy(count=)`). What a pipeline
            stage does not need may be None or absent.

    Returns:
        losses [b, s] in float32, 0 where the loss mask is 0.
    """
    host: Any = model if isinstance(model, MegatronModule) else model.module
    inner = host
    while not isinstance(inner, GPTModel):  # precision's and data parallelism's wrappers
        inner = inner.module
    has_head = bool(use_chunked_loss(inner))
    names = ("tokens", "position_ids", "labels", "loss_mask")
    fields = {name: batch.get(name) for name in names}
    shape = next((x.shape for x in fields.values() if x is not None), None)
    extra: dict[str, Any] = {}
    if has_head and batch.get("loss_tokens") is not None:
        extra["loss_tokens"] = batch["loss_tokens"]
    if batch.get("packed_seq_params") is not None:
        extra["packed_seq_params"] = batch["packed_seq_params"]
        # The windows of a packed batch go through the layers, and from stage to stage of a pipeline, as one row.
        fields = {name: None if x is None else x.reshape(1, -1) for name, x in fields.items()}
    out = host(fields["tokens"], fields["position_ids"], None, labels=fields["labels"], loss_mask=fields["loss_mask"], **extra)
    return out.view(shape) if fields["labels"] is not None and out.dim() == 2 else out
