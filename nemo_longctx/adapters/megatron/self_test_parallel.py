"""The self-test's question to context parallelism: is one training step on two ranks the step that one process makes?

Two gloo processes and one alone train one step of a small model through the host's own schedule, data parallel wrapper and
loss reduction, with documents that cross ranks and with all tokens of the first rank masked (where a loss that is averaged
rank by rank comes out wrong, and a loss of no tokens turns to NaN). Losses and gradients must agree.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue as queues
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.attention import layer_window
from nemo_longctx.adapters.megatron.rope_module import transform_rope
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import LongRope

WINDOW, VOCABULARY = 64, 96
SLIDING_WINDOW = 12  # of layers with one: shorter than a document, and than a rank's share of it
DOCUMENTS = (0, 7, 40, 64)
SECONDS = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallLayers:
    """How the two layers of the small model are made like a run's: fields of their config, and RoPE from a transform.

    Attributes:
        fields: of `TransformerConfig`.
        variant: placed on the built model; None leaves its plain RoPE.
    """

    fields: dict[str, Any]
    variant: RopeVariant | None = None


def small_layers(config: Any, variant: RopeVariant | None = None) -> SmallLayers:
    """Windows, layers without RoPE and RoPE by layer type of a run, at the small model's size.

    Args:
        config: the run's.
        variant: what its transform places, if anything; LongRoPE's lists fit the run's heads alone, so that it is left out.
    """
    windows = [layer_window(config, layer + 1) is not None for layer in range(config.num_layers)]
    fields: dict[str, Any] = {}
    if any(windows):
        fields |= {"window_size": (SLIDING_WINDOW - 1, 0)} | ({} if all(windows) else {"window_attn_skip_freq": [1, 0]})
    no_rope = getattr(config, "no_rope_freq", None)
    if no_rope and (isinstance(no_rope, int) or any(no_rope)):
        fields["no_rope_freq"] = [0, 1]
    return SmallLayers(fields=fields, variant=None if isinstance(variant, LongRope) else variant)


def context_parallel_error(
    *,
    calculate_per_token_loss: bool = True,
    like: SmallLayers | None = None,
    prepare: Callable[[], None] | None = None,
) -> float:
    """Largest relative difference between CP=2 and CP=1 in the loss and in every gradient; inf where one is not finite.

    Args:
        calculate_per_token_loss: the run's setting; without it each rank's loss is divided by its own tokens.
        like: what the run's layers are like; None for layers that see all tokens under plain RoPE.
        prepare: called in each process before the model is built; tests plant faults with it.

    Raises:
        RuntimeError: a process failed; its traceback is the message.
    """
    whole, halves = _run_groups((1, 2), calculate_per_token_loss, like or SmallLayers(fields={}), prepare)
    expected = whole[0]
    errors = []
    for rank in halves:
        if rank.keys() != expected.keys():
            raise RuntimeError(f"gradients of {rank.keys() ^ expected.keys()} are missing")
        for name, value in rank.items():
            error = (value - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
            errors.append(error.item() if torch.isfinite(value).all() else float("inf"))
    return max(errors)


def _run_groups(sizes: tuple[int, ...], *args: Any) -> list[list[dict[str, torch.Tensor]]]:
    """Results by group and rank of one process group of each size, all at once, each process without a GPU."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with tempfile.TemporaryDirectory(prefix="nemo_longctx_") as folder:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            workers = [
                context.Process(target=_worker, args=(results, rank, size, str(Path(folder) / f"store{size}"), *args))
                for size in sizes
                for rank in range(size)
            ]
            for worker in workers:
                worker.start()
        finally:
            del os.environ["CUDA_VISIBLE_DEVICES"]
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible
        try:
            found = dict(_collect(results) for _ in workers)
        finally:
            for worker in workers:
                worker.join(5)
                worker.terminate()
    return [[found[(size, rank)] for rank in range(size)] for size in sizes]


def _collect(results: Any) -> tuple[tuple[int, int], dict[str, torch.Tensor]]:
    try:
        key, arrays, failure = results.get(timeout=SECONDS)
    except queues.Empty:
        raise RuntimeError(f"a process of the context-parallel self-test said nothing for {SECONDS:.0f} s") from None
    if failure:
        raise RuntimeError(f"rank {key[1]} of {key[0]} of the context-parallel self-test failed:\n{failure}")
    return key, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _worker(
    results: Any,
    rank: int,
    size: int,
    store: str,
    calculate_per_token_loss: bool,
    like: SmallLayers,
    prepare: Callable[[], None] | None,
) -> None:
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        found = _one_step(size, calculate_per_token_loss, like, prepare)
        results.put(((size, rank), {name: value.numpy() for name, value in found.items()}, None))
        torch.distributed.barrier()
    except Exception:
        results.put(((size, rank), {}, traceback.format_exc()))
        raise


def _one_step(
    size: int, calculate_per_token_loss: bool, like: SmallLayers, prepare: Callable[[], None] | None
) -> dict[str, torch.Tensor]:
    """The reduced loss, and every gradient as the optimizer would see it."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_longctx.adapters.megatron.attention import with_long_context_attention
    from nemo_longctx.adapters.megatron.loss import forward_with_chunked_loss

    cpu.install()
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    if prepare is not None:
        prepare()
    known = {name: value for name, value in cpu.CPU_MODEL_FIELDS.items() if name in TransformerConfig.__dataclass_fields__}
    config = TransformerConfig(
        **known, num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96,
        normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0,
        context_parallel_size=size, calculate_per_token_loss=calculate_per_token_loss,
        finalize_model_grads_func=finalize_model_grads, **like.fields,
    )  # fmt: skip
    torch.manual_seed(0)
    spec = with_long_context_attention(get_gpt_layer_local_spec(normalization="RMSNorm"))
    module = GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=WINDOW, position_embedding_type="rope")
    if like.variant is not None:
        transform_rope(module, like.variant)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), module)

    def forward_step(batches: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        batch = next(batches)
        return forward_with_chunked_loss(chunk, batch), lambda losses: _loss_of(losses, batch["loss_mask"])

    reduced = forward_backward_no_pipelining(
        forward_step_func=forward_step, data_iterator=iter(_batches()), model=model, num_microbatches=2,
        seq_length=WINDOW, micro_batch_size=1,
    )  # fmt: skip
    found = {name: parameter.main_grad.clone() for name, parameter in module.named_parameters()}
    loss, tokens = torch.stack([each["sums"] for each in reduced]).sum(0)
    sums = torch.stack([loss, tokens])
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return {**found, "loss": (sums[0] / sums[1]).reshape(1)}


def _loss_of(losses: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """What Megatron-Core's schedules ask of a micro batch: summed loss, tokens that count, and what to report."""
    loss, tokens = (losses.view(-1) * mask.view(-1)).sum(), mask.sum().to(torch.int)
    return loss, tokens, {"sums": torch.stack([loss.detach(), tokens.float()])}


def _batches() -> list[dict[str, Any]]:
    """This rank's share of two micro batches: a packed window, and one whose first rank of two has no token that counts."""
    from nemo_longctx.adapters.megatron.attention import packed_documents
    from nemo_longctx.adapters.megatron.host import share_of_context_parallel_rank

    drawn = torch.randint(0, VOCABULARY, (2, 1, WINDOW + 1), generator=torch.Generator().manual_seed(1))
    batches = []
    for index, row in enumerate(drawn):
        mask = torch.ones(1, WINDOW)
        if index:
            mask[:, : WINDOW // 4] = mask[:, -WINDOW // 4 :] = 0
        tokens = {"tokens": row[:, :-1], "labels": row[:, 1:], "position_ids": torch.arange(WINDOW)[None], "loss_mask": mask}
        share = share_of_context_parallel_rank({key: value.contiguous() for key, value in tokens.items()})
        batches.append({**share, "packed_seq_params": packed_documents(DOCUMENTS)})
    return batches
