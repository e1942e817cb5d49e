"""What each process of test_rope_parallel runs. Megatron-Core only, so that a process starts without importing NeMo."""

import itertools

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.attention import packed_documents, with_long_context_attention
from nemo_longctx.adapters.megatron.rope_guard import verify_live_rope
from nemo_longctx.adapters.megatron.rope_module import transform_rope
from nemo_longctx.attention.context_parallel import slice_zigzag
from nemo_longctx.rope.variants import parse

VOCABULARY, LENGTH, DOCUMENTS = 96, 48, (0, 20, 23, 48)
VARIANTS = {
    "xpos": {"variant": "xpos", "base": 500_000, "scale_base": 16},
    "yarn": {"variant": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "abf": {"variant": "abf"},
    "yarn in layers that differ": {"variant": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn by layer type": {"variant": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "local_base": 1_000.0},
}
# One layer has a window of 10 tokens; the other sees all of them, without RoPE or with another one.
LAYERS = {
    "yarn in layers that differ": {"window_size": (9, 0), "window_attn_skip_freq": [1, 0], "no_rope_freq": [0, 1]},
    "yarn by layer type": {"window_size": (9, 0), "window_attn_skip_freq": [0, 1]},
}


def named(name, **sizes):
    """The model of one of `VARIANTS`."""
    return build(VARIANTS[name], **LAYERS.get(name, {}), **sizes)


def build(rope, *, seed=0, **sizes):
    """A small model of whole heads, its weights drawn before they are sharded, with the variant placed."""
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
        "init_method_std": 0.3,
        **{n: v for n, v in cpu.CPU_MODEL_FIELDS.items() if n in TransformerConfig.__dataclass_fields__},
        **sizes,
    }
    torch.manual_seed(seed)
    spec = with_long_context_attention(get_gpt_layer_local_spec(normalization="RMSNorm"))
    kwargs = {"vocab_size": VOCABULARY, "max_sequence_length": 256, "position_embedding_type": "rope", "rotary_base": 10_000}
    config = TransformerConfig(**fields)
    config.seq_length = 256
    model = GPTModel(config, spec, **kwargs).eval()
    transform_rope(model, parse(rope))
    return model


def tokens():
    ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    return ids, torch.arange(LENGTH)[None]


def run(rank, size, kind, results):
    """{name: logits of this rank} of every variant, whole and packed, with `kind` parallelism over all ranks."""
    cpu.install()
    parallel_state.initialize_model_parallel(**{f"{kind}_parallel_size": size})
    model_parallel_cuda_manual_seed(1)
    out = {}
    sizes = {f"{kind}_parallel_size": size}
    for name, rope in VARIANTS.items():
        model = named(name, **sizes)
        model.load_state_dict(shard(results[name, "weights"], model, rank, size))
        verify_live_rope(model, parse(rope))
        ids, positions = tokens()
        if kind == "context":
            ids, positions = (slice_zigzag(x, rank, size) for x in (ids, positions))
        with torch.no_grad():
            whole = model(ids, positions, None, runtime_gather_output=True)
            documents = model(ids, positions, None, packed_seq_params=packed_documents(DOCUMENTS), runtime_gather_output=True)
        out[name] = (whole, documents)
    parallel_state.destroy_model_parallel()
    return out


def shard(weights, model, rank, size):
    """This rank's share of whole weights, by the shapes that the model asks for; fc1's two halves are cut one by one."""
    shares = {}
    for name, like in model.state_dict().items():
        whole = weights.get(name)
        if whole is None or not isinstance(like, torch.Tensor) or whole.shape == like.shape:
            shares[name] = whole if whole is not None else like
            continue
        dim = next(d for d in range(whole.dim()) if whole.shape[d] != like.shape[d])
        parts = whole.chunk(2) if "linear_fc1" in name else (whole,)
        shares[name] = torch.cat([part.chunk(size, dim)[rank] for part in parts], dim)
    return shares


def documents_apart(model):
    """Logits of each document of the packed window alone, one after another."""
    ids, positions = tokens()
    with torch.no_grad():
        pieces = [model(ids[:, a:b], positions[:, : b - a], None) for a, b in itertools.pairwise(DOCUMENTS)]
    return torch.cat(pieces, 1)


def thd(boundaries):
    """Plain Megatron-Core parameters, as another data pipeline would make them."""
    ends = torch.tensor(boundaries, dtype=torch.int32)
    longest = int((ends[1:] - ends[:-1]).max())
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest)
