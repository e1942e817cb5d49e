"""Offload on a GPU: what layers keep leaves its memory and comes back, and no number changes."""

import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

TOKENS, HIDDEN = 8192, 512


@pytest.fixture(scope="module")
def model():
    sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
    import small_gpt

    with small_gpt.parallel():
        built = small_gpt.build(small_gpt.config(num_layers=4, hidden_size=HIDDEN, ffn_hidden_size=4 * HIDDEN))
        yield built.cuda().bfloat16()


def step(model):
    """Losses, gradients, and the bytes that lie on the GPU between forward and backward."""
    from nemo_longctx.adapters.megatron.loss import forward_with_chunked_loss

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 96, (1, TOKENS), generator=generator).cuda()
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    batch = {"tokens": ids, "position_ids": torch.arange(TOKENS, device="cuda")[None], "labels": ids.roll(-1, 1)}
    losses = forward_with_chunked_loss(model, batch)
    held = torch.cuda.memory_allocated() - before
    losses.sum().backward()
    return losses.detach().clone(), {name: p.grad.clone() for name, p in model.named_parameters()}, held


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_offload_frees_gpu_memory_and_changes_nothing(model, recompute):
    from nemo_longctx.adapters.megatron.activations import set_activation_policy

    set_activation_policy([model], recompute=recompute, offload="none")
    plain = step(model)
    held = {}
    for offload in ("block:2", "full"):
        set_activation_policy([model], offload=offload)
        losses, gradients, held[offload] = step(model)
        torch.testing.assert_close(losses, plain[0])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain[1][name])
    layer_input = TOKENS * HIDDEN * 2
    assert plain[2] - held["full"] >= 4 * layer_input
    assert held["full"] < held["block:2"] < plain[2]
