"""Core attention for Megatron-Core layers without an S x S tensor, and the layer specs that use it.

`LongContextAttention` takes the place of `DotProductAttention` (or, under context parallelism with documents, of
`TEDotProductAttention`) as the `core_attention` submodule of any stock layer spec. It needs no attention mask: causality is
in the kernel, documents come as `packed_seq_params`, and a KV cache shows as more keys than queries.

Shapes follow Megatron-Core: [s, b, heads, head size], or [t, heads, head size] for packed windows (`qkv_format="thd"`).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from nemo_longctx.attention.context_parallel import context_parallel_attention
from nemo_longctx.attention.core import backend_name, causal_attention, on_device
from nemo_longctx.attention.documents import Segment, check_cu_seqlens, context_parallel_segments, document_segments
from nemo_longctx.config import ConfigError


@dataclass
class PackedDocuments(PackedSeqParams):
    """`PackedSeqParams` that also keeps the boundaries on the host, so that no layer waits for the device to read them."""

    boundaries: tuple[int, ...] = ()
    window: int = 0


def packed_documents(
    cu_seqlens: Sequence[int] | torch.Tensor, *, seq_length: int | None = None, device: torch.device | str = "cpu"
) -> PackedDocuments:
    """`packed_seq_params` for a packed window, for `GPTModel.forward(packed_seq_params=...)` with a batch of one row.

    A batch of several windows is passed as one row: flatten [b, s] to [1, b * s] and give the boundaries of all windows.

    Args:
        cu_seqlens: boundaries of the whole window or windows on all context-parallel ranks together, beginning with 0.
        seq_length: tokens of one window on all ranks together; None means that there is one window.
        device: where the model is.

    Returns:
        parameters with `qkv_format="thd"`. Without context parallelism rotary positions restart with each document; with it
        they run on through the window, since Megatron-Core can only restart them where every document is split over the
        ranks (attention scores depend on distances alone, so the two agree but for rounding).
    """
    numbers = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    ends = check_cu_seqlens(numbers, int(numbers[-1]) if len(numbers) else 0)
    window = ends[-1] if seq_length is None else seq_length
    if ends[-1] % window:
        raise ConfigError("cu_seqlens", ends[-1], f"must end at a multiple of the window, {window} tokens")
    if not set(range(0, ends[-1], window)) <= set(ends):
        raise ConfigError("cu_seqlens", ends[:6], f"must have a boundary at each window of {window} tokens")
    cp_size = parallel_state.get_context_parallel_world_size()
    boundaries = on_device(ends, torch.device(device))
    params = PackedDocuments(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, boundaries=ends, window=window,
        max_seqlen_q=max(b - a for a, b in itertools.pairwise(ends)),
    )  # fmt: skip
    if cp_size > 1:
        # Megatron-Core lays out rotary positions by the padded boundaries: here one zig-zag split a window.
        windows = torch.arange(0, ends[-1] + 1, window, dtype=torch.int32, device=device)
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = windows
        params.max_seqlen_q = window
    params.max_seqlen_kv = params.max_seqlen_q
    return params


def check_attention_config(config: Any) -> None:
    """Refuse a model config that asks for what a linear-memory kernel cannot do.

    Raises:
        ConfigError: dropout on attention, a window that is no causal one, a learned sink, or latent attention.
    """
    refused = {"attention_dropout": 0.0, "softmax_type": "vanilla", "multi_latent_attention": False}
    for name, needed in refused.items():
        value = getattr(config, name, needed)
        if value != needed:
            raise ConfigError(name, value, f"must be {needed!r} with this attention, or use Transformer Engine")
    layer_window(config, 1)


def layer_window(config: Any, layer_number: int) -> int | None:
    """Tokens that a layer's queries look back on at most, themselves included; None for all of them.

    Args:
        config: Megatron-Core's: `window_size` is (tokens before the query, tokens after it), -1 for all of them, and
            `window_attn_skip_freq` says which layers have it.
        layer_number: from 1.

    Raises:
        ConfigError: a window that looks ahead, or fields of another form than Megatron-Core's.
    """
    size, skip = getattr(config, "window_size", None), getattr(config, "window_attn_skip_freq", None)
    if not size and skip is not None:
        raise ConfigError(
            "window_attn_skip_freq", skip, "says which layers have a window, and there is none; set window_size too"
        )
    if not size:
        return None
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(isinstance(n, int) and n >= -1 for n in size):
        raise ConfigError("window_size", size, "must be [tokens before the query, 0], such as [4095, 0] for a window of 4,096")
    before, after = size
    if after > 0:
        raise ConfigError("window_size", size, "looks ahead, where attention is causal; write 0 for the second number")
    if isinstance(skip, (tuple, list)) and len(skip) != config.num_layers:
        mend = f"must be one number for each of the {config.num_layers} layers, 1 for those with the window"
        raise ConfigError("window_attn_skip_freq", skip, mend)
    if isinstance(skip, (tuple, list)):
        skip = list(skip)
    elif skip is not None and (isinstance(skip, bool) or not isinstance(skip, int) or skip < 1):
        mend = "must be N (each Nth layer sees all) or one number a layer, 1 for those with the window"
        raise ConfigError("window_attn_skip_freq", skip, mend)
    return before + 1 if before >= 0 and _has_window(skip, layer_number) else None


def _has_window(skip: Any, layer_number: int) -> bool:
    """As Megatron-Core's `is_layer_window_attention` (from 0.15 on): each `skip`th layer sees all, or a number a layer."""
    if isinstance(skip, list):
        return bool(skip[layer_number - 1])
    return skip is None or layer_number % skip != 0


class LongContextAttention(MegatronModule):
    """`core_attention` for self-attention over `nemo_longctx.attention.core`, with context parallelism.

    Raises:
        ValueError: the config is one that `check_attention_config` refuses.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        model_comm_pgs: Any = None,  # its name before Megatron-Core 0.15
    ):
        super().__init__(config=config)
        if attention_type != "self":
            raise ValueError(f"attention_type={attention_type!r}: only self-attention is causal")
        try:
            check_attention_config(config)
        except ConfigError as error:  # the host builds modules through a wrapper that makes errors anew from one string
            raise ValueError(str(error)) from error
        self.layer_number = layer_number
        self.scale = softmax_scale
        self.window = layer_window(config, layer_number)
        groups = model_comm_pgs if pg_collection is None else pg_collection
        self.cp_group = parallel_state.get_context_parallel_group() if groups is None else groups.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attention output [s, b, heads * head size], or [t, heads * head size] for packed windows.

        In training a dense mask is refused, since what it says could not be kept; in evaluation it is taken to be causal, as
        Transformer Engine takes it. `attn_mask_type` is not needed: the last query is aligned with the last key.
        """
        if attention_bias is not None:
            raise ConfigError("attention_bias", "a tensor", "this attention takes none; use Transformer Engine")
        if attention_mask is not None and self.training:
            mend = "must be None in training: documents are given as packed_seq_params (cu_seqlens), never as a mask"
            raise ConfigError("attention_mask", tuple(attention_mask.shape), mend)
        packed = query.dim() == 3
        q, k, v = ((x.unsqueeze(0) if packed else x.transpose(0, 1)) for x in (query, key, value))
        if self.cp_group.size() > 1:
            out = self._context_parallel(q, k, v, packed_seq_params)
        else:
            segments = None if packed_seq_params is None else document_segments(_boundaries(packed_seq_params, q.shape[1]))
            out = causal_attention(q, k, v, segments=segments, scale=self.scale, window=self.window)
        return out.flatten(2).squeeze(0) if packed else out.transpose(0, 1).flatten(2)

    def _context_parallel(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_seq_params: PackedSeqParams | None
    ) -> torch.Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if q.shape[1] != k.shape[1]:
            raise ConfigError("context_parallel_size", size, "must be 1 for generation with a KV cache")
        tokens = q.shape[1] * size
        boundaries = (0, tokens) if packed_seq_params is None else _boundaries(packed_seq_params, tokens)
        window = getattr(packed_seq_params, "window", 0) or tokens
        segments: tuple[Segment, ...] = context_parallel_segments(boundaries, window, rank, size)
        return context_parallel_attention(
            q,
            k,
            v,
            segments=segments,
            group=self.cp_group,
            windows=tokens // window,
            scale=self.scale,
            sliding_window=self.window,
        )


def _boundaries(params: PackedSeqParams, n_tokens: int) -> tuple[int, ...]:
    host = getattr(params, "boundaries", ())
    return check_cu_seqlens(host or params.cu_seqlens_q.tolist(), n_tokens)


def transformer_engine_installed() -> bool:
    """Whether Transformer Engine can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def with_long_context_attention(spec: ModuleSpec | TransformerBlockSubmodules) -> ModuleSpec | TransformerBlockSubmodules:
    """A copy of a stock layer (or block) spec whose self-attention uses `LongContextAttention`."""
    spec = copy.deepcopy(spec)
    for layer in spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]:
        layer.submodules.self_attention.submodules.core_attention = LongContextAttention
    return spec


def with_long_context_documents(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a layer spec whose own attention stays for whole windows, and gives packed documents to ours; and all windows
    in layers that look back on some tokens only, unless `cp_comm_type` is one that the stock one can do that with."""
    spec = copy.deepcopy(spec)
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = _documents_to_ours(attention.core_attention)
    return spec


# Transformer Engine's ways between context-parallel ranks that know a sliding window; its ring, the default, does not.
SLIDING_COMM_TYPES = ("a2a", "all_gather")


@functools.cache
def _documents_to_ours(stock: type) -> type:
    """`stock` (Transformer Engine's attention) with documents on `LongContextAttention`, and sliding windows where its way
    between the ranks has none; its state and its name stay."""

    class Attention(stock):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **settings: Any):
            super().__init__(config, layer_number, attn_mask_type, attention_type, **settings)
            names = ("softmax_scale", "pg_collection", "model_comm_pgs")
            ours = {name: settings[name] for name in names if settings.get(name) is not None}
            self._slides_alone = (
                layer_window(config, layer_number) is None or settings.get("cp_comm_type") in SLIDING_COMM_TYPES
            )
            # Made when it is needed: what it refuses (dropout), the stock one may do for whole windows.
            # Not a submodule, so that checkpoints hold the stock one's alone.
            self._ours = functools.cache(
                lambda: LongContextAttention(config, layer_number, attn_mask_type, attention_type, **ours)
            )

        def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **settings: Any) -> torch.Tensor:
            if settings.get("packed_seq_params") is None and self._slides_alone:
                return super().forward(query, key, value, attention_mask, *args, **settings)
            ours = self._ours()
            ours.train(self.training)
            return ours(query, key, value, None, packed_seq_params=settings.get("packed_seq_params"))

    Attention.__name__ = Attention.__qualname__ = stock.__name__
    return Attention


def long_context_layer_spec(config: Any) -> ModuleSpec:
    """For `GPTConfig.transformer_layer_spec`: the stock spec with an attention that fits long windows.

    With Transformer Engine its own attention stays, given `packed_seq_params`; but under context parallelism it splits every
    document over the ranks, which our windows do not, so that there ours takes the windows that come as documents, and its own
    ring, which hides the exchange behind the work, all others (but for layers with a sliding window, which the ring cannot do).
    Without it, the local spec with ours.

    Raises:
        ConfigError: ours would be used and cannot do what the config asks for (with documents under context parallelism: at
            the first of them).
    """
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:  # the stock specs would leave it out without a word
        raise ConfigError("attn_logit_softcapping", cap, "models that cap attention's scores (Gemma 2) are not supported")
    common = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
    }
    if not transformer_engine_installed():
        check_attention_config(config)
        stock = gpt_layer_specs.get_gpt_layer_local_spec(**common, normalization=config.normalization)
        return with_long_context_attention(stock)
    stock = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**common)
    if config.context_parallel_size == 1:
        return stock
    layer_window(config, 1)  # refuses here a form that layers would ask for in vain
    return with_long_context_documents(stock)


def attention_summary(model: torch.nn.Module) -> str:
    """One line for the start of a run: which attention each layer of `model` uses, and on which kernel."""
    kinds: dict[str, int] = {}
    for module in model.modules():
        core = getattr(module, "core_attention", None)
        if core is not None:
            kinds[_describe(core, model)] = kinds.get(_describe(core, model), 0) + 1
    return "core attention: " + ("; ".join(f"{kind} ({n} layers)" for kind, n in kinds.items()) or "none on this rank")


def _describe(core: torch.nn.Module, model: torch.nn.Module) -> str:
    if not isinstance(core, LongContextAttention):
        return type(core).__name__
    weight = next(model.parameters())
    whole, packed = (backend_name(weight.device, weight.dtype, segmented=s) for s in (False, True))
    shared = f", context parallel over {core.cp_group.size()} ranks" if core.cp_group.size() > 1 else ""
    looks_back = f", window of {core.window:,}" if core.window else ""
    return f"LongContextAttention on {whole}{looks_back}" + (f", packed on {packed}" if packed != whole else "") + shared
