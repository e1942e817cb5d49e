"""Megatron-Core's own training step under tensor and context parallelism with our attention and loss, on gloo.

Two processes: CP=2 equals CP=1 in losses and gradients, with and without documents and where one rank's tokens are all
masked. Four processes: TP=2 x CP=2 equals one process and its loss falls.
"""

import gloo
import numpy as np
import pytest

pytestmark = pytest.mark.slow

SEQ, ROWS, STEPS = 32, 2, 4
DOCUMENTS = (0, 3, 19, 32, 50, 64)


def problem():
    import small_gpt
    import torch

    ids, positions, labels = small_gpt.tokens(ROWS, SEQ)
    mask = (torch.rand(ROWS, SEQ, generator=torch.Generator().manual_seed(1)) < 0.7).float()
    return {"tokens": ids, "position_ids": positions, "labels": labels, "loss_mask": mask}


def train(rank, size, tp, cp, packed, one_rank_masked, steps):
    """Losses of `steps` SGD steps, and the first step's gradients by name, whole (gathered over tensor parallel ranks)."""
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "parity"))
    import small_gpt
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.utils import get_batch_on_this_cp_rank

    from nemo_longctx.adapters.megatron.attention import packed_documents
    from nemo_longctx.adapters.megatron.loss import forward_with_chunked_loss, use_chunked_loss

    with small_gpt.model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp):
        settings = small_gpt.config(
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            calculate_per_token_loss=True,
            gated_linear_unit=False,  # one seed lays a gated layer's rows out in another order for each tensor-parallel size
        )
        model = small_gpt.build(settings)
        use_chunked_loss(model)
        ddp = DistributedDataParallel(settings, DistributedDataParallelConfig(), model)
        batch = problem()
        if one_rank_masked:
            batch["loss_mask"][:, : SEQ // 4] = batch["loss_mask"][:, -SEQ // 4 :] = 0  # all that rank 0 of 2 holds
        batch = get_batch_on_this_cp_rank(batch)
        batch["packed_seq_params"] = packed_documents(DOCUMENTS, seq_length=SEQ) if packed else None
        losses, first = [], {}
        for _ in range(steps):
            ddp.zero_grad_buffer()
            per_token = forward_with_chunked_loss(model, batch)
            summed = (per_token * batch["loss_mask"]).sum()
            summed.backward()
            count = batch["loss_mask"].sum()
            finalize_model_grads([ddp], num_tokens=count)
            totals = torch.stack((summed.detach(), batch["loss_mask"].sum()))
            dist.all_reduce(totals, group=ps.get_context_parallel_group())
            losses.append((totals[0] / totals[1]).item())
            with torch.no_grad():
                for name, p in model.named_parameters():
                    first.setdefault(name, whole(p, p.main_grad))
                    p -= 0.5 * p.main_grad
        return losses, first


def whole(parameter, gradient):
    """The gradient of the whole parameter, gathered over the tensor-parallel group where it is split."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    size = ps.get_tensor_model_parallel_world_size()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return gradient.numpy().copy()
    parts = [torch.empty_like(gradient) for _ in range(size)]
    dist.all_gather(parts, gradient.contiguous(), group=ps.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=parameter.partition_dim).numpy()


VARIANTS = {"plain": (False, False), "documents": (True, False), "documents, one rank masked": (True, True)}


def two_ranks(rank, size):
    return {name: train(rank, size, 1, 2, *variant, 1) for name, variant in VARIANTS.items()}


def one_rank(rank, size):
    return {name: train(rank, size, 1, 1, *variant, STEPS) for name, variant in VARIANTS.items()}


def four_ranks(rank, size):
    return train(rank, size, 2, 2, True, False, STEPS)


@pytest.fixture(scope="module")
def alone():
    return gloo.run_on(1, one_rank)[0]


def check(losses, gradients, expected_losses, expected_gradients):
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses, expected_losses[: len(losses)], rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        error = np.linalg.norm(gradient - expected_gradients[name])
        assert error < 1e-5 * np.linalg.norm(expected_gradients[name]), name


def test_two_context_parallel_ranks_equal_one(alone):
    for results in gloo.run_on(2, two_ranks):
        for name, (losses, gradients) in results.items():
            check(losses, gradients, *alone[name])


def test_tensor_and_context_parallel_together_train(alone):
    for losses, gradients in gloo.run_on(4, four_ranks):
        check(losses, gradients, *alone["documents"])
        assert losses[-1] < losses[0]
