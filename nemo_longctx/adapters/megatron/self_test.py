"""Does a run's own path keep documents apart, agree with plain arithmetic, scale its loss once, and fit?

`nemo-longctx doctor --model` asks this of the very modules that the run would use, before the run spends its budget:

- leak: one document of a packed window is changed; no other document's losses, nor their gradients, may move.
- reference: attention and loss against explicit scores and logits in float64, forward and backward.
- context parallelism: two gloo processes train one step of a small model like the run's; losses and gradients must be those
  of one process, with documents and a rank whose tokens are all masked (`self_test_parallel.py`).
- memory: a training step at the run's length is tried; where it does not fit, the largest length that does is found.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType

from nemo_longctx.adapters.megatron.attention import LongContextAttention, layer_window, packed_documents
from nemo_longctx.adapters.megatron.loss import forward_with_chunked_loss
from nemo_longctx.adapters.megatron.memory_trial import begin_peak, peak_bytes, within_memory
from nemo_longctx.adapters.megatron.self_test_parallel import context_parallel_error, small_layers
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.base import RopeVariant

# Relative error that rounding explains, by the dtype of the computation; a leak or a wrong scale is of the order of 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
SMALL_WINDOW = 96
SMALL_DOCUMENTS = (0, 17, 18, 50, 96)
SMALL_SLIDING_WINDOW = 24  # shorter than the longest of these documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One question, its answer and the number behind it."""

    name: str
    passed: bool
    detail: str


def leak_finding(model: Any, vocabulary: int, *, document_masking: bool = True) -> Finding:
    """Change each document of a packed window in turn and look at all the others.

    Args:
        model: a Megatron-Core `GPTModel` with embedding and head on this rank, not under context parallelism.
        vocabulary: number of token ids to draw from.
        document_masking: whether the run asks for it. Where it does not, the answer is about what the path can do, and says so.
    """
    if not (model.pre_process and model.post_process):
        raise ConfigError("pipeline_model_parallel_size", "> 1", "the leak test needs a model in one stage; set it to 1 here")
    drawn = torch.randint(0, vocabulary, (1, SMALL_WINDOW + 1), generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    tokens, labels = drawn[:, :-1].to(device), drawn[:, 1:].to(device)
    before = _losses_and_gradients(model, tokens, labels)
    worst, deaf = 0.0, 0
    for a, b in itertools.pairwise(SMALL_DOCUMENTS):
        changed = tokens.clone()
        changed[:, a:b] = (changed[:, a:b] + 1) % vocabulary
        after = _losses_and_gradients(model, changed, labels)
        others = torch.ones(SMALL_WINDOW, dtype=torch.bool, device=device)
        others[a:b] = False
        for x, y in zip(before, after, strict=True):
            worst = max(worst, _relative(y[others], x[others]))
        deaf += _relative(after[0][~others], before[0][~others]) == 0
    bound = TOLERANCE[_dtype(model)]
    detail = f"other documents move by {worst:.1e} of their size (bound {bound:.0e})"
    if deaf:
        detail += f"; {deaf} changed documents did not move either, so that this shows nothing"
    name = "documents are kept apart"
    if not document_masking:
        name = "documents would be kept apart under data.document_masking=true"
        detail += "; this run sets it false: in a window each document is read by those after it, as in the paper"
    return Finding(name=name, passed=worst <= bound and not deaf, detail=detail)


def _losses_and_gradients(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token, and the gradient of their sum at each token's embedding."""
    positions = torch.arange(SMALL_WINDOW, device=tokens.device)[None]
    packed = packed_documents(SMALL_DOCUMENTS, device=tokens.device)
    captured: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    hook = model.embedding.register_forward_hook(keep)
    try:
        batch = {"tokens": tokens, "position_ids": positions, "labels": labels, "packed_seq_params": packed}
        losses = forward_with_chunked_loss(model, batch)
        (losses.sum()).backward()
    finally:
        hook.remove()
        model.zero_grad(set_to_none=True)
    gradient = captured[0].grad
    if gradient is None:
        raise RuntimeError("the model's losses do not depend on its embeddings")
    return losses.detach().view(-1), gradient.view(SMALL_WINDOW, -1)


def attention_finding(model: torch.nn.Module) -> Finding:
    """The core attention of each kind of layer, whole and packed, against explicit scores in float64, with all gradients.

    A layer with a sliding window is asked with a window that ends within the few tokens of the test.
    """
    kinds: dict[int | None, Any] = {}
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "core_attention")]
    for layer in layers:
        kinds.setdefault(layer_window(layer.core_attention.config, layer.layer_number), layer.core_attention)
    if not kinds:
        raise ConfigError("num_layers", 0, "the model has no attention layer on this rank")
    dtype, worst, tried = _dtype(model), 0.0, []
    for window, core in kinds.items():
        ours_to_set = isinstance(core, LongContextAttention) and window is not None and window > SMALL_SLIDING_WINDOW
        asked = SMALL_SLIDING_WINDOW if ours_to_set else window
        if window is not None:
            tried.append(f"{window:,} tokens" + (f" (asked with {asked})" if ours_to_set else ""))
        if ours_to_set:
            core.window = asked
        try:
            worst = max(worst, _attention_error(core, asked, dtype, next(model.parameters()).device))
        finally:
            if ours_to_set:
                core.window = window
    bound, names = TOLERANCE[dtype], " and ".join(sorted({type(core).__name__ for core in kinds.values()}))
    detail = f"{names}: largest relative error {worst:.1e} in output and gradients (bound {bound:.0e})"
    if tried:
        detail += f", layers with a window of {' or '.join(tried)} included"
    return Finding(name="attention equals the float64 reference", passed=worst <= bound, detail=detail)


def _attention_error(core: Any, window: int | None, dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of one core attention that looks back on `window` tokens, None for all.

    Its hooks are left out: YaRN's and LongRoPE's factor and xPos's decay are on q and k before attention, and the live check of
    RoPE asks for them.
    """
    config, worst = core.config, 0.0
    for packed in (False, True):
        generator = torch.Generator().manual_seed(1)
        heads = (config.num_attention_heads, config.num_query_groups, config.num_query_groups)
        drawn = [torch.randn(SMALL_WINDOW, 1, h, config.kv_channels, generator=generator) for h in heads]
        q, k, v = (x.to(device, dtype).requires_grad_() for x in drawn)
        boundaries = SMALL_DOCUMENTS if packed else (0, SMALL_WINDOW)
        expected = _explicit_attention(q, k, v, boundaries, window)
        if packed:
            params = packed_documents(boundaries, device=device)
            out = core.forward(q.squeeze(1), k.squeeze(1), v.squeeze(1), None, AttnMaskType.causal, packed_seq_params=params)
        else:
            out = core.forward(q, k, v, None, AttnMaskType.causal)
        grad = torch.randn(expected.shape, generator=generator).to(device, dtype)
        ours = (out.view(expected.shape), *torch.autograd.grad(out, (q, k, v), grad.view(out.shape)))
        theirs = (expected, *torch.autograd.grad(expected, (q, k, v), grad.to(expected.dtype)))
        worst = max(worst, *(_relative(x, y) for x, y in zip(ours, theirs, strict=True)))
    return worst


def _explicit_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, boundaries: tuple[int, ...], window: int | None
) -> torch.Tensor:
    """[s, 1, heads * head size] in float64, from [s, 1, heads, head size], with the whole score matrix."""
    q, k, v = (x.double().squeeze(1) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    position = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(position, torch.tensor(boundaries[1:], device=q.device), right=True)
    back = position[:, None] - position
    hidden = (back < 0) | (document[:, None] != document) | (back >= (window or len(position)))
    scores = torch.einsum("shd,thd->hst", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hst,thd->shd", weights, v).flatten(1).unsqueeze(1)


def loss_finding(model: torch.nn.Module, vocabulary: int) -> Finding:
    """The losses that training uses against float64 cross entropy of the model's own logits."""
    drawn = torch.randint(0, vocabulary, (1, SMALL_WINDOW + 1), generator=torch.Generator().manual_seed(2))
    drawn = drawn.to(next(model.parameters()).device)
    tokens, labels = drawn[:, :-1], drawn[:, 1:]
    positions = torch.arange(SMALL_WINDOW, device=drawn.device)[None]
    batch = {"tokens": tokens, "position_ids": positions, "labels": labels}
    with torch.no_grad():
        losses = forward_with_chunked_loss(model, batch)
        logits = model(tokens, positions, None, runtime_gather_output=True).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    error, bound = _relative(losses.flatten(), expected), TOLERANCE[_dtype(model)]
    detail = f"relative error {error:.1e} over {SMALL_WINDOW} tokens (bound {bound:.0e})"
    return Finding(name="loss equals the float64 reference", passed=error <= bound, detail=detail)


def memory_finding(model: torch.nn.Module, vocabulary: int, seq_length: int) -> Finding:
    """Forward and backward of one window at `seq_length`; where memory runs out, at half of it, and so on.

    Without CUDA the process's address space is limited to the memory that the machine has left, for the time of the trial, so
    that a length which does not fit fails here and harms nothing else. Peak memory counts weights and gradients, not
    optimizer state.
    """
    length = seq_length
    while length >= 128:
        peak = _peak_of_a_step(model, vocabulary, length)
        if peak is not None:
            fits = length == seq_length
            detail = f"{peak / 2**20:,.0f} MiB at the peak of a step of one window of {length:,} tokens"
            if not fits:
                detail += f"; {seq_length:,} tokens do not fit"
            return Finding(name="the run's length fits", passed=fits, detail=detail)
        length //= 2
    return Finding(name="the run's length fits", passed=False, detail="not even 128 tokens fit")


def _peak_of_a_step(model: torch.nn.Module, vocabulary: int, length: int) -> int | None:
    """Bytes, or None where they are not to be had."""
    device = next(model.parameters()).device
    begin_peak(device)

    def step() -> bool:
        drawn = torch.randint(0, vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(3)).to(device)
        positions = torch.arange(length, device=device)[None]
        batch = {"tokens": drawn[:, :-1], "position_ids": positions, "labels": drawn[:, 1:]}
        forward_with_chunked_loss(model, batch).mean().backward()
        return True

    try:
        done = within_memory(step)
    finally:
        model.zero_grad(set_to_none=True)
    return peak_bytes(device) if done else None


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def context_parallel_finding(config: Any, variant: RopeVariant | None = None) -> Finding:
    """Two ranks against one, with the run's own way of averaging the loss, its kinds of layers and RoPE.

    Args:
        config: the run's.
        variant: its RoPE, where the model has it from a transform.
    """
    per_token = bool(config.calculate_per_token_loss)
    error = context_parallel_error(calculate_per_token_loss=per_token, like=small_layers(config, variant))
    passed = error <= TOLERANCE[torch.float32]
    detail = f"largest relative difference of loss and gradients {error:.1e} (bound {TOLERANCE[torch.float32]:.0e})"
    if not passed and not per_token:
        detail += "; calculate_per_token_loss=True would weigh every token alike on all ranks"
    return Finding(name="two context-parallel ranks equal one process", passed=passed, detail=detail)


def self_test(model: Any, config: Any, *, seq_length: int, document_masking: bool = True) -> list[Finding]:
    """All questions about a built model, the quick ones first.

    Args:
        model: the run's Megatron-Core `GPTModel`, weights loaded or not, on one rank; its gradients are used and cleared.
        config: its config; with `context_parallel_size > 1` the context-parallel question is asked too.
        seq_length: the run's longest window, tokens.
        document_masking: the run's `data.document_masking`.

    Returns:
        findings in the order asked; the run can be trusted where all have passed.
    """
    was_training = model.training
    model.train()
    vocabulary = int(model.vocab_size)
    findings = [attention_finding(model), loss_finding(model, vocabulary)]
    findings.append(leak_finding(model, vocabulary, document_masking=document_masking))
    if config.context_parallel_size > 1:
        findings.append(context_parallel_finding(config, getattr(model.rotary_pos_emb, "variant", None)))
    findings.append(memory_finding(model, vocabulary, seq_length))
    model.train(was_training)
    return findings


def findings_text(findings: list[Finding]) -> str:
    """One line a finding, for the terminal."""
    return "\n".join(f"{'passed' if f.passed else 'FAILED'}  {f.name}: {f.detail}" for f in findings)
