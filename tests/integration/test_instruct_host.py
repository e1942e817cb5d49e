"""The host's own step over instruction windows: its schedule, loss reduction and gradient normalisation, against a reference.

Megatron-Core's `forward_backward_no_pipelining` and `finalize_model_grads`, NeMo's `MaskedTokenLossReduction`, our windows,
attention and step. The reference: each instance alone through the same model, the loss of each label times its weight, over the
sum of the weights. Data- and context-parallel ranks, among them one without any loss token.
"""

import gloo
import numpy as np
import pytest
from test_instruct_gradients import CASES, SEQ, instances_of, windows_of

NAMES = ("packed", "padded, a tenth of prompt loss", "padded, no prompt loss", "all")


def the_small_gpt():
    """The model of the parity tests, also in a fresh process."""
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "parity"))
    import small_gpt

    return small_gpt


def set_up(cp):
    """The same small model on every rank, wrapped for gradients as the host does it."""
    small_gpt = the_small_gpt()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = small_gpt.config(context_parallel_size=cp, calculate_per_token_loss=True)
    model = small_gpt.build(settings)
    return settings, model, DistributedDataParallel(settings, DistributedDataParallelConfig(), model)


def by_hand(rank, size):
    """{case: (loss, gradients)}: instances one by one, no window."""
    small_gpt = the_small_gpt()
    import torch

    results = {}
    with small_gpt.model_parallel():
        for name in NAMES:
            _, model, _ = set_up(1)
            total, counted = 0.0, 0.0
            for ids, weights in instances_of(CASES[name]):
                ids = torch.from_numpy(ids)
                positions = torch.arange(len(ids) - 1)[None]
                losses = model(ids[None, :-1], positions, None, labels=ids[None, 1:])
                total = total + (losses[0].double() * torch.from_numpy(weights)).sum()
                counted += weights.sum()
            (total / counted).backward()
            results[name] = ((total / counted).item(), gradients_of(model))
    return results


def gradients_of(model):
    return {n: (p.main_grad if p.grad is None else p.grad + p.main_grad).numpy().copy() for n, p in model.named_parameters()}


def through_host(rank, size, split):
    """{case: (loss, gradients)} of the host's step on `size` ranks."""
    small_gpt = the_small_gpt()
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    from nemo_longctx.adapters.megatron.steps import longctx_data_step, longctx_forward_step
    from nemo_longctx.adapters.nemo.data.datasets import collate

    results = {}
    with small_gpt.model_parallel(context_parallel_size=size if split == "cp" else 1):
        for name in NAMES:
            settings, model, ddp = set_up(size if split == "cp" else 1)
            settings.finalize_model_grads_func = finalize_model_grads
            windows = windows_of(CASES[name])
            replicas = ps.get_data_parallel_world_size()
            own = [windows[i] for i in range(ps.get_data_parallel_rank(), len(windows), replicas)]
            while len(own) * replicas < len(windows):  # a rank short of a micro batch gets one without loss
                own.append({**windows[0], "loss_mask": np.zeros(SEQ, np.float32)})
            reduction = MaskedTokenLossReduction()

            def step(iterator, wrapped, reduction=reduction):
                batch = longctx_data_step(iterator)
                losses = longctx_forward_step(wrapped, batch)
                return losses, lambda output: reduction.forward(batch, output)

            ddp.zero_grad_buffer()
            reduced = forward_backward_no_pipelining(
                forward_step_func=step,
                data_iterator=iter([collate([sample]) for sample in own]),
                model=ddp,
                num_microbatches=len(own),
                seq_length=SEQ,
                micro_batch_size=1,
                forward_only=False,
            )
            gradients = {n: p.main_grad.numpy().copy() for n, p in model.named_parameters()}
            results[name] = (reduction.reduce(reduced).item(), gradients)
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("size", "split"), [(1, "dp"), (2, "dp"), (2, "cp")])
def test_the_hosts_step_equals_the_reference(reference, size, split):
    for results in gloo.run_on(size, through_host, split, timeout=600):
        for name, (loss, gradients) in results.items():
            expected_loss, expected = reference[name]
            assert loss == pytest.approx(expected_loss, rel=1e-5), name
            for key, gradient in gradients.items():
                error = np.linalg.norm(gradient - expected[key])
                assert error < 2e-5 * np.linalg.norm(expected[key]), (name, key)


@pytest.fixture(scope="module")
def reference():
    return gloo.run_on(1, by_hand, timeout=600)[0]
