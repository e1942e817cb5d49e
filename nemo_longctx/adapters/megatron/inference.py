"""A live Megatron-Core GPT model behind the scorer's interface, and back to training as if nothing had happened.

Tensor parallel ranks hold parts of the vocabulary and reduce log-probabilities on the device; pipeline stages pass states on
and the last one tells all the results. Context parallel ranks hold the whole model: during an evaluation each reads documents
of its own, as data parallel ranks do, with a key-value cache in place of a shared sequence.

Shapes: S tokens, K positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from nemo_longctx.adapters.megatron.attention import LongContextAttention
from nemo_longctx.config import ConfigError
from nemo_longctx.eval.generation import ends_of
from nemo_longctx.eval.results_cache import weights_digest
from nemo_longctx.eval.sharing import everywhere

# Of the config and of layers. Buffers of overlapped communication hold the shapes of training, and so do captured graphs; the
# fused rotation of the whole projection knows no cache.
TRAINING_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings", "ub_overlap_ag_fprop",
                     "ub_overlap_rs_fprop", "fused_single_qkv_rope", "enable_cuda_graph")  # fmt: skip
# Of the config. Products in fp8 want multiples of 8 tokens, where the cache reads one, and would move the scales of training.
TRAINING_SETTINGS = {"fp8": None, "fp4": None, "cuda_graph_impl": "none"}


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Inside, `module` (a Megatron-Core `GPTModel`) reads any number of tokens after a cache, alone on its context
    parallel rank. After, its mode, parallel settings and attention, and every random number generator, are as they were.

    Every rank must enter: under context parallelism groups of one rank are made.
    """
    with contextlib.ExitStack() as back:
        back.enter_context(_same_random_numbers())
        for part in module.modules():
            back.callback(setattr, part, "training", part.training)
        module.eval()
        solo = _solo_group()

        def put(owner: Any, name: str, value: Any) -> None:
            back.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for owner in (module.config, *module.modules()):
            for name in TRAINING_SWITCHES:
                if getattr(owner, name, False) is True:
                    put(owner, name, False)
        for name, value in TRAINING_SETTINGS.items():
            if hasattr(module.config, name):
                put(module.config, name, value)
        if module.config.context_parallel_size > 1:
            _leave_context_parallel(module, put, back, solo)
        for layer in module.modules():
            if isinstance(layer, SelfAttention) and not isinstance(layer.core_attention, LongContextAttention):
                # Other kernels take a second chunk of a prompt for a generated token, and see its future.
                put(layer, "core_attention", _our_attention(layer, solo))
        if module.post_process:
            put(module, "post_process", False)  # states instead of logits; the head is called apart
        yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _leave_context_parallel(module: Any, put: Any, back: contextlib.ExitStack, solo: Any) -> None:
    """Let every part of `module` think that it is alone with its sequence."""
    put(module.config, "context_parallel_size", 1)
    for part in module.modules():
        for owner in (part, *part._forward_pre_hooks.values()):
            group = getattr(owner, "cp_group", None)
            if group is not None and group.size() > 1:
                put(owner, "cp_group", solo)
            if hasattr(owner, "_last"):  # scales kept from the layer before are those of the other layout
                put(owner, "_last", None)
        # Rotary tables are kept by length alone, and those of training are one rank's share of a sequence.
        forget = getattr(type(part).forward, "cache_clear", None)
        if forget is not None:
            forget()
            back.callback(forget)


def _our_attention(layer: Any, solo: Any) -> LongContextAttention:
    groups = SimpleNamespace(cp=solo)
    ours = LongContextAttention(
        config=layer.config,
        layer_number=layer.layer_number,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=layer.config.softmax_scale,
        pg_collection=groups,
    )
    theirs = layer.core_attention
    ours._forward_pre_hooks, ours._forward_pre_hooks_with_kwargs = (
        theirs._forward_pre_hooks,
        theirs._forward_pre_hooks_with_kwargs,
    )
    return ours.eval()


def _solo_group() -> Any:
    """A group of this rank alone; the context parallel group where that is one."""
    group = parallel_state.get_context_parallel_group()
    return group if group.size() == 1 else dist.new_subgroups(1)[0]


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Python's, NumPy's, torch's and Megatron-Core's generators, as they were before."""
    tracker = get_cuda_rng_tracker()
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state(), dict(tracker.get_states()))
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        tracker.set_states(states[3])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)


class MCoreCausalModel:
    """`nemo_longctx.eval.scoring.CausalModel` over a Megatron-Core `GPTModel`, inside `evaluating`.

    Args:
        module: this rank's pipeline stage.
        vocab_size: tokens that exist; the rest of a padded head is never predicted.
        max_length: longest sequence, tokens.
        generation_config: of its checkpoint, for the tokens that end an answer.

    Raises:
        ConfigError: several model chunks on a rank (interleaved pipeline).
    """

    def __init__(self, module: Any, *, vocab_size: int, max_length: int, generation_config: Any = None):
        chunks = module.config.virtual_pipeline_model_parallel_size or 1
        if chunks > 1:
            raise ConfigError("virtual_pipeline_model_parallel_size", chunks, "evaluation inside a run needs it unset")
        self.module, self.vocab_size, self.max_length = module, vocab_size, max_length
        self.ends = ends_of(generation_config)
        self.device = next(module.parameters()).device
        # What stages hand on. A config may name another type than a run's precision made of the weights.
        whole = getattr(module.config, "fp32_residual_connection", False)
        self.dtype = torch.float32 if whole else next(module.parameters()).dtype
        variant = getattr(getattr(module, "rotary_pos_emb", None), "variant", None)
        self.reads_whole = variant is not None and variant.depends_on_length
        self.held: contextlib.ExitStack | None = None
        self.length = 0
        self._context = StaticInferenceContext(1, 0)

    def truncate(self, length: int) -> None:
        self.length = length

    def release(self) -> None:
        """Give the cache's memory back."""
        self.length, self._context = 0, StaticInferenceContext(1, 0)

    def _reserve(self, tokens: int) -> None:
        """Room for `tokens` in the cache: powers of two, so that few sizes of rotary table are ever made; exactly `tokens`
        where the table follows the length, which Megatron-Core takes to be the room."""
        if self.reads_whole:
            self._context = StaticInferenceContext(1, tokens)
            return
        if tokens <= self._context.max_sequence_length:
            return
        room = min(self.max_length, 1 << max(8, (tokens - 1).bit_length()))
        grown = StaticInferenceContext(1, room)
        for layer, pair in self._context.key_value_memory_dict.items():
            grown.key_value_memory_dict[layer] = tuple(_longer(memory, self.length, room) for memory in pair)
        self._context = grown

    # What layers keep for the next call (angles, scales, boundaries) training gets too, and autograd saves none of that mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def extend(self, tokens_S: Tensor) -> Tensor:
        S = len(tokens_S)
        self._reserve(self.length + S)
        self._context.sequence_len_offset = self.length
        if self._stages > 1 and not self.module.pre_process:
            received = torch.empty(S, 1, self.module.config.hidden_size, dtype=self.dtype, device=self.device)
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            self.module.set_input_tensor(received)
        place_1S = torch.arange(self.length, self.length + S, device=self.device)[None]
        states_S1H = self.module(
            tokens_S[None].to(self.device), place_1S, None, inference_context=self._context, runtime_gather_output=True
        )
        self.length += S
        if self._stages > 1 and not parallel_state.is_pipeline_last_stage():
            dist.send(states_S1H.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return states_S1H[:, 0]

    @property
    def _stages(self) -> int:
        return parallel_state.get_pipeline_model_parallel_world_size()

    def _logits(self, states_KH: Tensor) -> Tensor:
        """This rank's columns of the logits, float32; padding is never likely."""
        weight = self.module.shared_embedding_or_output_weight() if self.module.share_embeddings_and_output_weights else None
        logits, _ = self.module.output_layer(states_KH[:, None], weight=weight, runtime_gather_output=False)
        logits_KV = logits[:, 0].float()
        first = parallel_state.get_tensor_model_parallel_rank() * logits_KV.shape[1]
        if first + logits_KV.shape[1] > self.vocab_size:
            logits_KV[:, max(0, self.vocab_size - first) :] = -torch.inf
        return logits_KV

    @torch.inference_mode()
    def log_probs(self, states_KH: Tensor, targets_K: Tensor) -> tuple[Tensor, Tensor]:
        result_2K = torch.zeros(2, len(targets_K), device=self.device)
        if parallel_state.is_pipeline_last_stage():
            logp_K, greedy_K = vocab_parallel_log_probs(
                self._logits(states_KH), targets_K.to(self.device), parallel_state.get_tensor_model_parallel_group()
            )
            result_2K = torch.stack([logp_K, greedy_K.float()])
        self._tell(result_2K)
        return result_2K[0], result_2K[1] > 0

    @torch.inference_mode()
    def next_logits(self, state_H: Tensor) -> Tensor:
        logits_V = torch.zeros(self.vocab_size, device=self.device)
        if parallel_state.is_pipeline_last_stage():
            group = parallel_state.get_tensor_model_parallel_group()
            parts = [self._logits(state_H[None])[0]]
            if group.size() > 1:
                mine, parts = parts[0], [torch.empty_like(parts[0]) for _ in range(group.size())]
                dist.all_gather(parts, mine, group=group)
            logits_V = torch.cat(parts)[: self.vocab_size].contiguous()
        self._tell(logits_V)
        return logits_V

    def _tell(self, values: Tensor) -> None:
        """Give the last stage's values to all stages."""
        if self._stages > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(values, last, group=parallel_state.get_pipeline_model_parallel_group())


def _longer(memory: Tensor, used: int, room: int) -> Tensor:
    grown = memory.new_empty(room, *memory.shape[1:])
    grown[:used] = memory[:used]
    return grown


def vocab_parallel_log_probs(logits_KV: Tensor, targets_K: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and whether it is the argmax (the first of equals), from each rank's columns.

    Three numbers a row cross the ranks (greatest logit, sum of exponentials, target's logit) and an index, never a row.
    """
    if group.size() == 1:
        picked_K = logits_KV.gather(-1, targets_K[:, None])[:, 0]
        return picked_K - torch.logsumexp(logits_KV, -1), logits_KV.argmax(-1) == targets_K
    columns = logits_KV.shape[1]
    local_K = targets_K - group.rank() * columns
    here_K = (local_K >= 0) & (local_K < columns)
    best_K, at_K = logits_KV.max(-1)
    greatest_K = best_K.clone()
    dist.all_reduce(greatest_K, dist.ReduceOp.MAX, group=group)
    picked_K = logits_KV.gather(-1, local_K.clamp(0, columns - 1)[:, None])[:, 0].masked_fill(~here_K, 0.0)
    sums_2K = torch.stack([(logits_KV - greatest_K[:, None]).exp_().sum(-1), picked_K])
    dist.all_reduce(sums_2K, group=group)
    first_K = torch.where(best_K == greatest_K, at_K + group.rank() * columns, torch.iinfo(torch.int64).max)
    dist.all_reduce(first_K, dist.ReduceOp.MIN, group=group)
    return sums_2K[1] - greatest_K - sums_2K[0].log(), first_K == targets_K


def model_digest(module: Any) -> str:
    """Digest of the whole live model on every rank: weights of all its parts, settings, and RoPE. All ranks must call it."""
    primitive = (str, int, float, bool, type(None), tuple, dict)
    settings = {f.name: v for f in fields(module.config) if isinstance(v := getattr(module.config, f.name), primitive)}
    rotary = getattr(module, "rotary_pos_emb", None)
    rope = {name: v for name, v in vars(rotary).items() if isinstance(v, primitive)} if rotary is not None else {}
    rope |= {"variant": getattr(rotary, "variant", None), "inv_freq": rotary.inv_freq.tolist() if rotary is not None else None}
    said = json.dumps([settings, {k: v for k, v in rope.items() if not k.startswith("_")}], sort_keys=True, default=repr)
    parts = everywhere(weights_digest(module.named_parameters(), said))
    return hashlib.blake2b("".join(sorted(set(parts))).encode(), digest_size=16).hexdigest()


def data_group() -> Any:
    """Ranks that hold the same part of the model and so can read different documents, context parallel ones included."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
