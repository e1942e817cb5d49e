"""Cross entropy of a language-model head over chunks of tokens: no logits of all tokens, forward or backward.

torch's `linear_cross_entropy` and Liger's kernel do this for one whole vocabulary and a summed loss. What they lack is here:
a vocabulary split over tensor-parallel ranks, and one loss per token without computing the logits a second time.

The gradients are computed in the forward, while a chunk's logits are at hand. That takes knowing how much each token will
count: `weights_N`, the loss mask. Where the gradient that comes back is proportional to it, as for any masked sum or mean
with any scale, the gradients made in the forward are scaled and done. Where it is not, they are computed anew, chunk by
chunk: slower, equally exact.

On a GPU the host never waits for the device here: nothing is read back, so that kernels of the next layers queue up behind
these. What a read would tell shows as NaN instead, which the watch over a run's numbers names: the loss of a label outside the
vocabulary, and the gradients where the one that comes back is not proportional to the weights. NEMO_LONGCTX_DEBUG=1 reads: such
labels are then named at once, and such gradients computed anew, as on the CPU, where a read costs nothing.

Shapes: N tokens, C hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from nemo_longctx.config import ConfigError

# Tokens in a chunk and bytes of its float32 logits, whichever is less. Each chunk reads and writes the weight's gradient once,
# so that it must hold enough tokens for the products to take most of the time: some 250 / m of it is lost on a GPU with m
# tokens, 13 / m on a CPU (by the ratio of their arithmetic to their memory bandwidth).
CHUNK_LIMITS = {"cpu": (512, 64 * 2**20), "cuda": (4096, 2 * 2**30)}


def chunk_length(n_tokens: int, vocabulary: int, device_type: str) -> int:
    """Tokens in a chunk: a multiple of 64, and 64 at least, but for a smaller whole."""
    tokens, logit_bytes = CHUNK_LIMITS["cpu" if device_type == "cpu" else "cuda"]
    return min(max(min(tokens, logit_bytes // (4 * vocabulary)) // 64 * 64, 64), max(n_tokens, 1))


def may_read(device: torch.device) -> bool:
    """Whether the host may look at values on `device`: on the CPU it waits for nobody, elsewhere only to find a fault."""
    return device.type == "cpu" or os.environ.get("NEMO_LONGCTX_DEBUG", "") not in ("", "0")


def chunked_cross_entropy(
    hidden_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    weights_N: torch.Tensor | None = None,
    count: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Cross entropy of softmax(hidden weight^T) at `labels`, one loss a token.

    Args:
        hidden_NC: last hidden states. Under tensor parallelism every rank holds all N.
        weight_VC: the head's weight, or this rank's rows of it, in rank order and equal parts.
        labels_N: vocabulary indices (int64), those of the whole vocabulary; read only where the weight is not 0.
        weights_N: how much each token counts in the loss (a mask of 0 and 1, or any number); None counts all alike. A
            token of weight 0 is left out: its loss is 0 and it costs nothing.
        count: how many weights are not 0, where the host knows: on a GPU the others are then left out of the work too. A
            number too high costs time alone; one too low leaves tokens out.
        group: the tensor-parallel group that holds the vocabulary; None means that this rank holds it all.

    Returns:
        losses_N in float32 (float64 for float64 inputs), not multiplied by the weights. The gradient of `hidden` is this
        rank's part of a sum over `group`, as that of any column-parallel product. Differentiable once.

    Raises:
        ConfigError: shapes that do not fit, or (where the host reads) a label outside the vocabulary.
    """
    N = hidden_NC.shape[0]
    if hidden_NC.dim() != 2 or weight_VC.dim() != 2 or hidden_NC.shape[1] != weight_VC.shape[1]:
        raise ConfigError("hidden", tuple(hidden_NC.shape), f"must be [N, C] for a weight of {tuple(weight_VC.shape)}")
    if labels_N.shape != (N,) or (weights_N is not None and weights_N.shape != (N,)):
        raise ConfigError("labels", tuple(labels_N.shape), f"labels and weights must be [N] = [{N}]")
    size = 1 if group is None else group.size()
    vocabulary = weight_VC.shape[0] * size
    index_M = _tokens_that_count(weights_N, count)
    hidden_MC, labels_M, weights_M = hidden_NC, labels_N, weights_N
    if index_M is not None:
        hidden_MC, labels_M = hidden_NC.index_select(0, index_M), labels_N.index_select(0, index_M)
        weights_M = None if weights_N is None else weights_N.index_select(0, index_M)
    if weights_M is None:
        weights_M = hidden_MC.new_ones(hidden_MC.shape[0])
    outside_M = ((labels_M < 0) | (labels_M >= vocabulary)) & (weights_M != 0)
    if may_read(labels_M.device) and bool(outside_M.any()):
        mend = f"must lie in [0, {vocabulary}); give tokens that do not count the weight 0"
        raise ConfigError("labels", (int(labels_M.min()), int(labels_M.max())), mend)
    if not torch.is_grad_enabled():  # a Parameter would have its gradient computed all the same: `apply` does not ask
        hidden_MC, weight_VC = hidden_MC.detach(), weight_VC.detach()
    losses_M = _ChunkedCrossEntropy.apply(hidden_MC, weight_VC, labels_M, weights_M, group)
    if not may_read(labels_M.device):
        losses_M = losses_M.masked_fill(outside_M, torch.nan).masked_fill(weights_M == 0, 0)
    return losses_M if index_M is None else losses_M.new_zeros(N).index_copy(0, index_M, losses_M)


def _tokens_that_count(weights_N: torch.Tensor | None, count: int | None) -> torch.Tensor | None:
    """Indices of the tokens whose weight is not 0, in their order; None for all, also where only the device knows which."""
    if weights_N is None or count == weights_N.shape[0]:
        return None
    used_N = weights_N != 0
    if may_read(weights_N.device):
        return None if bool(used_N.all()) else used_N.nonzero().squeeze(1)
    return None if count is None else used_N.to(torch.uint8).sort(descending=True, stable=True).indices[:count]


class _Chunks:
    """The shared loop of forward and recomputing backward: logits of one chunk, then the gradients that follow from them."""

    def __init__(self, hidden_MC: torch.Tensor, weight_VC: torch.Tensor, labels_M: torch.Tensor, group: Any):
        self.hidden_MC, self.weight_VC, self.labels_M, self.group = hidden_MC, weight_VC, labels_M, group
        self.accumulate = torch.promote_types(hidden_MC.dtype, torch.float32)
        self.first_row = 0 if group is None else group.rank() * weight_VC.shape[0]
        self.length = chunk_length(hidden_MC.shape[0], weight_VC.shape[0], hidden_MC.device.type)
        self.logits_buffer = hidden_MC.new_empty(self.length, weight_VC.shape[0])

    def spans(self) -> list[slice]:
        M = self.hidden_MC.shape[0]
        return [slice(start, min(start + self.length, M)) for start in range(0, M, self.length)]

    def losses_and_softmax(self, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [m] and this rank's part of the softmax less the one-hot labels [m, V], in the accumulation dtype."""
        hidden_mC, labels_m = self.hidden_MC[span], self.labels_M[span] - self.first_row
        buffer = self.logits_buffer[: hidden_mC.shape[0]]
        logits_mV = torch.mm(hidden_mC, self.weight_VC.t(), out=buffer).to(self.accumulate)
        top_m = logits_mV.amax(-1)
        if self.group is not None:
            dist.all_reduce(top_m, op=dist.ReduceOp.MAX, group=self.group)
        logits_mV.sub_(top_m.unsqueeze(-1))
        mine_m = (labels_m >= 0) & (labels_m < self.weight_VC.shape[0])
        column_m1 = labels_m.where(mine_m, 0).unsqueeze(-1)
        target_m = logits_mV.gather(-1, column_m1).squeeze(-1).where(mine_m, 0)
        softmax_mV = logits_mV.exp_()
        sums_2m = torch.stack((softmax_mV.sum(-1), target_m))
        if self.group is not None:
            dist.all_reduce(sums_2m, group=self.group)
        total_m, target_m = sums_2m
        softmax_mV.div_(total_m.unsqueeze(-1))
        softmax_mV.scatter_add_(-1, column_m1, -mine_m.to(softmax_mV.dtype).unsqueeze(-1))
        return total_m.log() - target_m, softmax_mV

    def gradients(
        self,
        span: slice,
        softmax_mV: torch.Tensor,
        scale_m: torch.Tensor,
        dh_MC: torch.Tensor | None,
        dw_VC: torch.Tensor | None,
    ) -> None:
        """Write the chunk's gradient of hidden into `dh_MC`, and add that of the weight to `dw_VC`."""
        grad_mV = softmax_mV.mul_(scale_m.to(softmax_mV.dtype).unsqueeze(-1)).to(self.hidden_MC.dtype)
        if dh_MC is not None:
            torch.mm(grad_mV, self.weight_VC, out=dh_MC[span])
        if dw_VC is None:
            return
        if dw_VC.dtype == grad_mV.dtype:
            dw_VC.addmm_(grad_mV.t(), self.hidden_MC[span])
        else:  # half precision: the sum over chunks is kept in float32
            dw_VC.add_(grad_mV.t() @ self.hidden_MC[span])

    def buffers(self, hidden: bool, weight: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        dh_MC = torch.empty_like(self.hidden_MC) if hidden else None
        return dh_MC, torch.zeros_like(self.weight_VC, dtype=self.accumulate) if weight else None


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MC: torch.Tensor, weight_VC: torch.Tensor, labels_M: torch.Tensor, weights_M: torch.Tensor, group: Any
    ) -> torch.Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        chunks = _Chunks(hidden_MC, weight_VC, labels_M, group)
        losses_M = torch.empty(hidden_MC.shape[0], dtype=chunks.accumulate, device=hidden_MC.device)
        dh_MC, dw_VC = chunks.buffers(needs_hidden, needs_weight)
        for span in chunks.spans():
            losses_M[span], softmax_mV = chunks.losses_and_softmax(span)
            if needs_hidden or needs_weight:
                chunks.gradients(span, softmax_mV, weights_M[span], dh_MC, dw_VC)
        if needs_hidden or needs_weight:
            ctx.save_for_backward(hidden_MC, weight_VC, labels_M, weights_M)
            ctx.ready, ctx.group = (dh_MC, dw_VC), group
        return losses_M

    @staticmethod
    def backward(ctx: Any, grad_M: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden_MC, weight_VC, labels_M, weights_M = ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None  # the buffers become the gradients: a second backward computes them anew
        factor_1 = _common_factor(grad_M, weights_M)
        if ready is not None and not (may_read(grad_M.device) and bool(factor_1.isnan())):
            dh_MC, dw_VC = ready
            for gradient in ready:
                if gradient is not None:
                    _scale(gradient, factor_1)
            # The weight's is scaled first: a sum over many tokens may be beyond float16, where their mean is not.
            return dh_MC, None if dw_VC is None else dw_VC.to(weight_VC.dtype), None, None, None
        chunks = _Chunks(hidden_MC, weight_VC, labels_M, ctx.group)
        dh_MC, dw_VC = chunks.buffers(*ctx.needs_input_grad[:2])
        for span in chunks.spans():
            _, softmax_mV = chunks.losses_and_softmax(span)
            chunks.gradients(span, softmax_mV, grad_M[span], dh_MC, dw_VC)
        return dh_MC, None if dw_VC is None else dw_VC.to(weight_VC.dtype), None, None, None


def _common_factor(grad_M: torch.Tensor, weights_M: torch.Tensor) -> torch.Tensor:
    """The number f [1] with grad = f * weights to rounding, NaN where there is none; at weight 0 nothing is asked."""
    if grad_M.numel() == 0:
        return grad_M.new_ones(1)
    largest_1 = weights_M.abs().argmax().view(1)
    grad_1, weight_1 = (x.index_select(0, largest_1).to(grad_M.dtype) for x in (grad_M, weights_M))
    factor_1 = (grad_1 / weight_1).masked_fill(weight_1 == 0, 0)  # where no token counts
    expected_M = factor_1 * weights_M
    same_M = ((grad_M - expected_M).abs() <= 1e-6 * expected_M.abs()) | (weights_M == 0)
    return factor_1.masked_fill(~same_M.all(), torch.nan)


def _scale(gradient: torch.Tensor, factor_1: torch.Tensor) -> None:
    """Multiply in place by a factor that is kept in its own precision."""
    if may_read(gradient.device):
        if float(factor_1) != 1.0:
            gradient.mul_(float(factor_1))
        return
    for rows in gradient.split(4096):  # a float32 copy of some rows at a time
        rows.copy_(rows * factor_1.view(1, 1))
