"""A RoPE variant on a built Megatron-Core GPTModel of any layer spec: its frequencies, and the scaling of q and k."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from nemo_longctx.adapters.megatron.attention import layer_window
from nemo_longctx.adapters.megatron.rope_scale import ScoreScale, refuse_other_inference
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.request import check_layers_differ


def rotary_dim_of(config: Any) -> int:
    """Rotated dimensions of a head of a NeMo GPT config, as Megatron-Core counts them."""
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    percent = getattr(config, "rotary_percent", 1.0)
    return head_dim if percent >= 1.0 else int(head_dim * percent)


def check_supported(config: Any) -> None:
    """Raise ConfigError for models whose RoPE is not one table of Megatron-Core's for all layers."""
    kind = getattr(config, "position_embedding_type", "rope")
    if kind not in ("rope", "yarn"):
        raise ConfigError("position_embedding_type", kind, "only RoPE models can be extended")
    if config.multi_latent_attention:
        raise ConfigError(
            "multi_latent_attention", True, "latent attention keeps a RoPE of its own in each layer; not supported"
        )
    if isinstance(getattr(config, "rotary_base", 0), (tuple, list)):
        raise ConfigError("rotary_base", config.rotary_base, "the host's own mixture of local and global RoPE is not supported")


def check_windows(config: Any, variant: RopeVariant) -> None:
    """Raise ConfigError where layers with a window are to have another RoPE, and a model's layers are all of one type."""
    if variant.local_base is not None:
        check_layers_differ([layer_window(config, layer + 1) is not None for layer in range(config.num_layers)])
        if getattr(config, "mtp_num_layers", None):
            raise ConfigError("mtp_num_layers", config.mtp_num_layers, "is not supported with rope.layers=full_attention")


class TableRotaryEmbedding(RotaryEmbedding):
    """Megatron-Core's rotary embedding with a variant's own frequencies, which may follow the length of the input.

    Args:
        variant: gives the frequencies.
        like: the host's embedding that this one takes the place of.
        rotary_dim: rotated dimensions of a head.
    """

    def __init__(self, variant: RopeVariant, like: RotaryEmbedding, rotary_dim: int):
        torch.nn.Module.__init__(self)  # not the host's: it would compute a table from a base
        self.variant, self.rotary_dim = variant, rotary_dim
        self.rotary_interleaved, self.cp_group = like.rotary_interleaved, like.cp_group
        self.seq_len_interpolation_factor = None
        self.inv_freq = self.table(2).to(like.inv_freq.device)

    def table(self, max_seq_len: int) -> torch.Tensor:
        """float32 [rotary_dim / 2] for an input of `max_seq_len` tokens."""
        if hasattr(self, "inv_freq") and not self.variant.depends_on_length:
            return self.inv_freq
        table = torch.from_numpy(self.variant.inv_freq(self.rotary_dim, max_seq_len))
        return table.to(self.inv_freq.device) if hasattr(self, "inv_freq") else table

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles float32 [max_seq_len, rotary_dim / 2]."""
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=torch.float32) + offset
        return torch.outer(positions, self.table(max_seq_len))


class TwoTablesRotaryEmbedding(TableRotaryEmbedding):
    """Both tables of a model whose layers with a window have plain RoPE: the host hands what this gives to each layer, whose
    `PickTable` takes its part.

    Args: as `TableRotaryEmbedding`; the variant has a `local` one.
    """

    def __init__(self, variant: RopeVariant, like: RotaryEmbedding, rotary_dim: int):
        super().__init__(variant, like, rotary_dim)
        self.local = TableRotaryEmbedding(variant.local, like, rotary_dim)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Angles float32 [2 * positions, 1, 1, rotary_dim]: those of layers that see all tokens, then of those with a window.

        One after the other, so that each part is a tensor of the host's form, without a copy.
        """
        return torch.cat((super().forward(*args, **kwargs), self.local(*args, **kwargs)))


class PickTable:
    """Forward pre-hook (with keyword arguments) of a self-attention under `TwoTablesRotaryEmbedding`: its own angles."""

    def __init__(self, attention: Any):
        self.has_window = layer_window(attention.config, attention.layer_number) is not None

    def __call__(self, attention: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Angles of all positions [2 * positions, 1, 1, rotary_dim] -> [positions, 1, 1, rotary_dim]."""
        if kwargs.get("rotary_pos_emb") is None:
            return args, kwargs
        return args, {**kwargs, "rotary_pos_emb": kwargs["rotary_pos_emb"].chunk(2)[self.has_window]}


def variant_of_layer(variant: RopeVariant, attention: Any) -> RopeVariant:
    """What one layer rotates by under `variant` of the model."""
    local = variant.local
    return local if local is not None and PickTable(attention).has_window else variant.everywhere


def transform_rope(model: Any, variant: RopeVariant) -> None:
    """Place `variant` on one built Megatron-Core GPTModel: its frequency table (or both), and the scaling of q and k.

    Args:
        model: `megatron.core.models.gpt.GPTModel`, whatever its layer spec.

    Raises:
        ConfigError: a model whose rotary embedding is not the host's plain one or YaRN, or whose layers do not differ where
            the variant's do.
    """
    check_supported(model.config)
    check_windows(model.config, variant)
    like = model.rotary_pos_emb
    if type(like) not in (RotaryEmbedding, YarnRotaryEmbedding, TableRotaryEmbedding, TwoTablesRotaryEmbedding):
        raise ConfigError(
            "rotary_pos_emb", type(like).__name__, "a rotary embedding of its own, which would be lost; not supported"
        )
    for handle in getattr(model, "_rope_hooks", ()):
        handle.remove()
    rotary_dim = model.rotary_pos_emb.rotary_dim if isinstance(like, TableRotaryEmbedding) else 2 * len(like.inv_freq)
    by_layer = variant.local_base is not None
    model.rotary_pos_emb = (TwoTablesRotaryEmbedding if by_layer else TableRotaryEmbedding)(variant, like, rotary_dim)
    model.position_embedding_type = "rope"
    scales = variant.attention_scaling != 1.0 or variant.xpos_zeta(rotary_dim) is not None
    scale = score_scale(variant, model, rotary_dim) if scales else None
    handles = []
    for attention in self_attentions(model):
        if has_no_rope(attention):
            continue
        picks = PickTable(attention) if by_layer else None
        if picks is not None:
            handles.append(attention.register_forward_pre_hook(picks, with_kwargs=True))
        if scale is not None and not (picks is not None and picks.has_window):
            handles.append(attention.core_attention.register_forward_pre_hook(scale, with_kwargs=True))
        if by_layer or scales:
            handles.append(attention.register_forward_pre_hook(refuse_other_inference, with_kwargs=True))
    model._rope_hooks = tuple(handles)


@contextlib.contextmanager
def temporary_rope(model: Any, variant: RopeVariant) -> Iterator[None]:
    """Inside, one built Megatron-Core GPTModel rotates by `variant`; after, by what it had. Errors as `transform_rope`."""
    was, kind = model.rotary_pos_emb, model.position_embedding_type
    # Megatron-Core applies YaRN's factor of q and k by the config's field, whatever embedding is in place.
    factor = getattr(model.config, "yarn_rotary_scaling_factor", None)
    transform_rope(model, variant)
    if factor is not None:
        model.config.yarn_rotary_scaling_factor = 1.0
    try:
        yield
    finally:
        if factor is not None:
            model.config.yarn_rotary_scaling_factor = factor
        if isinstance(was, TableRotaryEmbedding):
            transform_rope(model, was.variant)
        for handle in () if isinstance(was, TableRotaryEmbedding) else model._rope_hooks:
            handle.remove()
        model.rotary_pos_emb, model.position_embedding_type = was, kind


def has_no_rope(attention: Any) -> bool:
    """Whether a built self-attention leaves q and k unrotated, and so unscaled (`no_rope_freq`; NoPE)."""
    layers = getattr(attention.config, "no_rope_freq", None)
    return bool(layers and layers[attention.layer_number - 1])


def score_scale(variant: RopeVariant, model: Any, rotary_dim: int) -> ScoreScale:
    """The scaling of q and k that `variant` asks of `model`."""
    group = model.rotary_pos_emb.cp_group or parallel_state.get_context_parallel_group()
    return ScoreScale(variant, rotary_dim=rotary_dim, interleaved=model.config.rotary_interleaved, cp_group=group)


def self_attentions(model: Any) -> list[Any]:
    """The self-attention of each layer on this rank, in order (multi-token-prediction layers included)."""
    return [m for m in model.modules() if hasattr(m, "core_attention") and hasattr(m, "get_query_key_value_tensors")]
