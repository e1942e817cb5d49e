"""A small Megatron-Core GPTModel on the CPU, for the comparisons with the host's own parts."""

import contextlib
import tempfile

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.attention import with_long_context_attention

VOCABULARY = 96


@contextlib.contextmanager
def model_parallel(**sizes):
    """Megatron-Core's process groups over those of torch.distributed, and the CPU shim; both gone afterwards."""
    was_installed = cpu.is_installed()
    cpu.install()
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if not was_installed:
            cpu.uninstall()


@contextlib.contextmanager
def parallel():
    """One gloo process with Megatron-Core's groups."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            with model_parallel():
                yield
        finally:
            dist.destroy_process_group()


def config(**overrides):
    fields = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **{name: value for name, value in cpu.CPU_MODEL_FIELDS.items() if name in TransformerConfig.__dataclass_fields__},
        **overrides,
    }
    return TransformerConfig(**fields)


def build(settings, *, ours=True, seed=0, **kwargs):
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    torch.manual_seed(seed)
    return GPTModel(
        settings,
        with_long_context_attention(spec) if ours else spec,
        vocab_size=VOCABULARY,
        max_sequence_length=256,
        position_embedding_type="rope",
        rotary_base=500_000,
        **kwargs,
    )


def tokens(batch, length, seed=0):
    """Tokens, positions and labels, each [batch, length]."""
    drawn = torch.randint(0, VOCABULARY, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1].contiguous(), torch.arange(length).expand(batch, -1), drawn[:, 1:].contiguous()


def causal_mask(length):
    return torch.ones(1, 1, length, length).triu(1).bool()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
