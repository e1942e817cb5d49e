"""LoRA on Megatron-Core's own layers: NeMo's parts, put together here as NeMo does it where Transformer Engine is."""

import fiddle as fdl
import pytest
import small_gpt
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from nemo.collections import llm
from nemo.collections.llm import fn
from nemo.collections.llm.peft.lora import LoRALinear

from nemo_longctx.adapters.megatron.rope_guard import verify_live_rope
from nemo_longctx.adapters.nemo.model.lora import LongContextLoRA, as_long_context, merge_adapters
from nemo_longctx.capability import has_module
from nemo_longctx.rope.variants import YarnRope, to_dict


@pytest.fixture(autouse=True)
def groups():
    with small_gpt.parallel():
        yield


def logits(model, length=48):
    ids, positions, _ = small_gpt.tokens(2, length)
    with torch.no_grad():
        return model(ids, positions, None)


def fill(model):
    """Adapters as training leaves them: no matrix is zero."""
    draw = torch.Generator().manual_seed(3)
    adapters = [module.adapter for module in model.modules() if isinstance(module, LoRALinear)]
    for adapter in adapters:
        adapter.linear_out.weight.data.normal_(0, 0.2, generator=draw)
    return adapters


@pytest.mark.skipif(has_module("transformer_engine"), reason="with Transformer Engine the stock class works")
def test_the_stock_class_needs_transformer_engine_to_ask_a_question():
    with pytest.raises(Exception, match="transformer_engine") as raised:
        fn.walk(small_gpt.build(small_gpt.config()), llm.peft.LoRA(dim=4).transform)
    assert type(raised.value).__name__ == "UnavailableError"


def test_every_linear_layer_gets_an_adapter_that_begins_at_nothing():
    model = small_gpt.build(small_gpt.config())
    before = logits(model)
    fn.walk(model, LongContextLoRA(dim=4, alpha=8).transform)
    wrapped = {name.rsplit(".", 1)[1] for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert wrapped == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert torch.equal(logits(model), before)
    assert len(fill(model)) == 8
    assert (logits(model) - before).abs().max() > 0.1


def test_a_layer_is_its_formula():
    """W x + alpha / dim B A x (Hu et al. 2021, eq. 3), in float64."""
    model = small_gpt.build(small_gpt.config())
    fn.walk(model, LongContextLoRA(dim=4, alpha=8).transform)
    fill(model)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            assert isinstance(module.to_wrap, (ColumnParallelLinear, RowParallelLinear))
            module.double()
            w, a, b = module.to_wrap.weight, module.adapter.linear_in.weight, module.adapter.linear_out.weight
            x = torch.randn(5, 2, w.shape[1], dtype=torch.float64)
            torch.testing.assert_close(module(x)[0], x @ (w + 8 / 4 * b @ a).T, rtol=1e-12, atol=1e-12)


def test_merged_weights_are_the_model_with_adapters():
    model = small_gpt.build(small_gpt.config())
    names = set(model.state_dict())
    fn.walk(model, LongContextLoRA(dim=4, alpha=8).transform)
    fill(model)
    live = logits(model)
    merge_adapters(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-5)


def test_targets_may_be_named_by_layer():
    model = small_gpt.build(small_gpt.config())
    fn.walk(model, LongContextLoRA(target_modules=["*.layers.1.*.linear_qkv"], dim=4).transform)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert wrapped == ["decoder.layers.1.self_attention.linear_qkv"]


def test_rope_is_placed_with_the_adapters():
    variant = YarnRope(base=500_000.0, factor=4.0, original_max_position_embeddings=64)
    model = small_gpt.build(small_gpt.config())
    lora = LongContextLoRA(dim=4, rope=to_dict(variant))
    assert lora.variant == variant
    lora.place_rope(model)
    lora.place_rope(model)
    verify_live_rope(model, variant)
    assert LongContextLoRA(dim=4).variant is None


def test_checkpoints_name_the_stock_class_where_it_says_all():
    plain = LongContextLoRA(dim=4, alpha=8, dropout=0.1)
    assert plain.__io__.__fn_or_cls__ is llm.peft.LoRA
    assert (plain.__io__.dim, plain.__io__.alpha, plain.__io__.dropout) == (4, 8, 0.1)
    back = as_long_context(llm.peft.LoRA(dim=4, alpha=8, dropout=0.1))
    assert (back.dim, back.alpha, back.dropout, back.rope) == (4, 8, 0.1, None)
    variant = YarnRope(base=10_000.0, factor=2.0, original_max_position_embeddings=64)
    with_rope = LongContextLoRA(dim=4, rope=to_dict(variant))
    assert with_rope.__io__.__fn_or_cls__ is LongContextLoRA
    assert fdl.build(with_rope.__io__) == with_rope
    assert with_rope.variant == variant
