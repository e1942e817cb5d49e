"""Our core attention inside Megatron-Core's GPTModel, against the stock local attention with its dense mask."""

import itertools

import pytest
import small_gpt
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_longctx.adapters.megatron.attention import (
    LongContextAttention,
    _documents_to_ours,
    attention_summary,
    check_attention_config,
    packed_documents,
)
from nemo_longctx.config import ConfigError


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    with small_gpt.parallel():
        yield


@pytest.fixture(scope="module")
def pair():
    settings = small_gpt.config()
    ours, stock = small_gpt.build(settings), small_gpt.build(settings, ours=False)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def run(model, *args, **kwargs):
    """Losses and gradients of a sum that weighs every token differently."""
    model.zero_grad()
    losses = model(*args, **kwargs)
    (losses * torch.linspace(0.5, 1.5, losses.numel()).view_as(losses)).sum().backward()
    return losses.detach(), small_gpt.gradients(model)


@pytest.mark.parametrize("batch", [1, 3])
def test_losses_and_gradients_equal_the_stock_layers(pair, batch):
    ours, stock = pair
    ids, positions, labels = small_gpt.tokens(batch, 40)
    mine, my_grads = run(ours, ids, positions, None, labels=labels)
    other, other_grads = run(stock, ids, positions, small_gpt.causal_mask(40), labels=labels)
    close(mine, other)
    assert my_grads.keys() == other_grads.keys()
    for name in my_grads:
        close(my_grads[name], other_grads[name])


def test_packed_windows_equal_each_document_alone(pair):
    ours, stock = pair
    cu_seqlens = (0, 11, 12, 30, 41, 60)  # two windows of 30
    ids, positions, labels = small_gpt.tokens(1, 60)
    packed = packed_documents(cu_seqlens, seq_length=30)
    mine, my_grads = run(ours, ids, positions, None, labels=labels, packed_seq_params=packed)
    stock.zero_grad()
    weights = torch.linspace(0.5, 1.5, 60)
    alone = []
    for a, b in itertools.pairwise(cu_seqlens):
        losses = stock(ids[:, a:b], positions[:, : b - a], small_gpt.causal_mask(b - a), labels=labels[:, a:b])
        (losses * weights[a:b]).sum().backward()
        alone.append(losses.detach())
    close(mine, torch.cat(alone, 1))
    for name, gradient in small_gpt.gradients(stock).items():
        close(my_grads[name], gradient)


class StockAttention(MegatronModule):
    """Transformer Engine's signature; it does whole windows, and no document."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
                 k_channels=None, v_channels=None, cp_comm_type="p2p", pg_collection=None):  # fmt: skip
        super().__init__(config=config)
        self.kept = torch.nn.Parameter(torch.zeros(1))

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None,
                num_splits=None):  # fmt: skip
        assert packed_seq_params is None
        return "its own ring"


def test_under_context_parallelism_only_documents_leave_transformer_engine(pair):
    config = pair[0].config
    core = _documents_to_ours(StockAttention)(config, 1, None, "self", cp_comm_type="p2p").train()
    ours = LongContextAttention(config, 1, None, "self")
    heads, size = config.num_attention_heads, config.kv_channels
    q, k, v = (torch.randn(24, h, size) for h in (heads, config.num_query_groups, config.num_query_groups))
    packed = packed_documents((0, 5, 24))
    whole = [x.unsqueeze(1) for x in (q, k, v)]
    assert core(*whole, None, attn_mask_type=None) == "its own ring"
    close(core(q, k, v, None, packed_seq_params=packed), ours(q, k, v, None, packed_seq_params=packed))
    assert list(core.state_dict()) == ["kept"]
    assert type(core).__name__ == "StockAttention"


@pytest.mark.parametrize(
    ("settings", "layer", "theirs"),
    [
        ({}, 1, False),
        ({"cp_comm_type": "p2p"}, 1, False),
        ({"cp_comm_type": "a2a+p2p"}, 1, False),
        ({"cp_comm_type": "a2a"}, 1, True),
        ({"cp_comm_type": "all_gather"}, 1, True),
        ({}, 2, True),  # a layer that sees all tokens
    ],
)
def test_sliding_windows_leave_a_ring_that_has_none(settings, layer, theirs):
    """Transformer Engine asserts that its ring meets none, in each layer's first step."""
    by_layer = {"window_attn_skip_freq": 2} if "window_attn_skip_freq" in TransformerConfig.__dataclass_fields__ else {}
    if layer == 2 and not by_layer:
        pytest.skip("this Megatron-Core has one window for all layers (window_attn_skip_freq is from 0.15 on)")
    config = small_gpt.config(window_size=(7, 0), **by_layer)
    core = _documents_to_ours(StockAttention)(config, layer, None, "self", **settings).train()
    q, k, v = (torch.randn(24, 1, h, config.kv_channels) for h in (4, 2, 2))
    out = core(q, k, v, None, attn_mask_type=None)
    if theirs:
        assert out == "its own ring"
    else:
        close(out, LongContextAttention(config, layer, None, "self")(q, k, v, None))


def test_a_cache_filled_in_steps_equals_the_full_pass(pair):
    model = pair[0].eval()
    ids, positions, _ = small_gpt.tokens(2, 30)
    with torch.no_grad():
        full = model(ids, positions, None)
        context = StaticInferenceContext(2, 30)
        context.materialize_only_last_token_logits = False
        steps = []
        for start, end in ((0, 12), (12, 20), (20, 21), (21, 30)):
            here = slice(start, end)
            steps.append(model(ids[:, here], positions[:, here], None, inference_context=context, runtime_gather_output=True))
            context.increment_sequence_len_offset(end - start)
    pair[0].train()
    close(torch.cat(steps, 1), full)


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_nothing(granularity):
    extra = {"recompute_method": "uniform", "recompute_num_layers": 1} if granularity == "full" else {}
    ids, positions, labels = small_gpt.tokens(1, 24)
    results = []
    for fields in ({}, {"recompute_granularity": granularity, **extra}):
        model = small_gpt.build(small_gpt.config(**fields))
        packed = packed_documents((0, 7, 24))
        results.append(run(model, ids, positions, None, labels=labels, packed_seq_params=packed))
    close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        close(results[1][1][name], gradient)


def test_what_it_cannot_do_is_refused(pair):
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1: must be 0\.0"):
        small_gpt.build(small_gpt.config(attention_dropout=0.1))
    with pytest.raises(ConfigError, match="window_size"):
        check_attention_config(small_gpt.config(window_size=(128, 4)))  # looks ahead
    if "window_attn_skip_freq" in TransformerConfig.__dataclass_fields__:  # since Megatron-Core 0.15
        with pytest.raises(ConfigError, match="window_attn_skip_freq=2: says which layers have a window, and there is none"):
            check_attention_config(small_gpt.config(window_attn_skip_freq=2))
    ids, positions, _ = small_gpt.tokens(1, 8)
    with pytest.raises(ConfigError, match="packed_seq_params"):
        pair[0](ids, positions, small_gpt.causal_mask(8))
    with pytest.raises(ConfigError, match="boundary at each window"):
        packed_documents((0, 11, 60), seq_length=30)


def test_the_summary_names_every_layer(pair):
    assert attention_summary(pair[0]) == "core attention: LongContextAttention on cpu-flash (2 layers)"
    assert "DotProductAttention (2 layers)" in attention_summary(pair[1])
    assert sum(isinstance(m, LongContextAttention) for m in pair[0].modules()) == 2
