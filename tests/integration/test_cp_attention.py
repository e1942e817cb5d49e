"""Context parallelism on two gloo processes: attention, its gradients and the vocabulary-parallel loss equal one process."""

import itertools

import gloo
import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from nemo_longctx.attention import context_parallel, core
from nemo_longctx.attention import loss as loss_module
from nemo_longctx.attention.context_parallel import slice_zigzag
from nemo_longctx.attention.core import causal_attention
from nemo_longctx.attention.documents import context_parallel_segments, document_segments, zigzag_positions
from nemo_longctx.attention.loss import chunked_cross_entropy

SHAPE = (2, 48, 4, 2, 16)  # B, S, H, K, D
# One document, many (crossing chunks and ranks, one of a single token), two windows of 24 in a row; and how far queries look
# back, where that is not to the document's beginning.
CASES = {
    "none": ((0, 48), 48, None), "documents": ((0, 5, 6, 23, 48), 48, None), "windows": ((0, 10, 24, 31, 48), 24, None),
    "sliding": ((0, 48), 48, 7), "sliding in documents": ((0, 5, 6, 23, 48), 48, 9),
    "sliding in windows": ((0, 10, 24, 31, 48), 24, 13),
}  # fmt: skip


def tensors():
    B, S, H, K, D = SHAPE
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, H, D), (B, S, K, D), (B, S, K, D), (B, S, H, D))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def share(x, rank, size, window):
    """A rank's zig-zag halves of each window of `x` along dimension 1."""
    return torch.cat([slice_zigzag(w, rank, size) for w in x.split(window, dim=1)], dim=1)


def attention_on_rank(rank, size, case, by_segment):
    """Output and gradients, and whether what was gathered was freed. `by_segment` lays keys out as for CUDA's varlen."""
    context_parallel.keys_by_segment = lambda device, dtype: by_segment
    cu_seqlens, window, back = CASES[case]
    q, k, v, grad = (share(x, rank, size, window) for x in tensors())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    segments = context_parallel_segments(cu_seqlens, window, rank, size)
    gathered = []
    originals = context_parallel._gather, context_parallel._select

    def watch(function):
        def watched(*args):
            result = function(*args)
            gathered.append(StorageWeakRef(result.untyped_storage()))
            return result

        return watched

    context_parallel._gather, context_parallel._select = map(watch, originals)
    out = context_parallel.context_parallel_attention(
        *leaves, segments=segments, group=dist.group.WORLD, windows=SHAPE[1] // window, sliding_window=back
    )
    freed = [storage.expired() for storage in gathered]
    context_parallel._gather, context_parallel._select = originals
    grads = torch.autograd.grad(out, leaves, grad)
    return [x.detach().numpy() for x in (out, *grads)], freed


def loss_on_rank(rank, size):
    loss_module.CHUNK_LIMITS["cpu"] = (64, 1)
    hidden, weight, labels, mask = loss_problem()
    rows = weight.shape[0] // size
    part = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    hidden.requires_grad_()
    losses = chunked_cross_entropy(hidden, part, labels, weights_N=mask, group=dist.group.WORLD)
    (losses * mask).sum().backward()
    once = [losses.detach(), hidden.grad.clone(), part.grad.clone()]
    hidden.grad = part.grad = None  # and once more where the gradients must be computed anew
    chunked_cross_entropy(hidden, part, labels, group=dist.group.WORLD).pow(2).sum().backward()
    return [x.numpy() for x in (*once, hidden.grad, part.grad)]


def loss_problem():
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(150, 16, generator=generator), torch.randn(64, 16, generator=generator)
    return hidden, weight, torch.randint(0, 64, (150,), generator=generator), (torch.arange(150) % 3 > 0).float()


def float32_on_cuda(rank, size, case):
    """As CUDA does it in float32: SDPA, segment by segment; one rank's last may span the window, the other's does not."""
    chosen = context_parallel.backend_name, core.backend_name
    context_parallel.backend_name = core.backend_name = lambda *args, **kwargs: "sdpa"
    context_parallel.keys_by_segment = lambda device, dtype: False
    cu_seqlens, window, back = CASES[case]
    q, k, v, grad = (share(x, rank, size, window) for x in tensors())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    segments = context_parallel_segments(cu_seqlens, window, rank, size)
    out = context_parallel.context_parallel_attention(
        *leaves, segments=segments, group=dist.group.WORLD, windows=SHAPE[1] // window, sliding_window=back
    )
    grads = torch.autograd.grad(out, leaves, grad)
    context_parallel.backend_name, core.backend_name = chosen
    return [x.detach().numpy() for x in (out, *grads)]


def both_on_rank(rank, size):
    """Everything in one pair of processes: starting them costs more than what they compute."""
    cases = [(case, by_segment) for case in CASES for by_segment in (False, True)]
    attention = {key: attention_on_rank(rank, size, *key) for key in cases}
    return attention, loss_on_rank(rank, size), {case: float32_on_cuda(rank, size, case) for case in CASES}


def test_two_ranks_equal_one_process():
    ranks = gloo.run_on(2, both_on_rank)
    for case, (cu_seqlens, window, back) in CASES.items():
        q, k, v, grad = tensors()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        whole = causal_attention(*leaves, segments=document_segments(cu_seqlens), window=back)
        expected = [whole.detach(), *torch.autograd.grad(whole, leaves, grad)]
        for rank, by_segment in itertools.product(range(2), (False, True)):
            results, freed = ranks[rank][0][case, by_segment]
            for mine, other in zip(results, expected, strict=True):
                expected_share = share(other, rank, 2, window).numpy()
                assert np.linalg.norm(mine - expected_share) < 1e-6 * np.linalg.norm(expected_share)
            assert freed == [True, True], "gathered keys and values are kept for the backward"
        for rank, (_, _, forced) in enumerate(ranks):
            for mine, other in zip(forced[case], expected, strict=True):
                np.testing.assert_allclose(mine, share(other, rank, 2, window).numpy(), rtol=1e-4, atol=1e-5)
    check_loss([rank[1] for rank in ranks])


def check_loss(ranks):
    hidden, weight, labels, mask = loss_problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    losses = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    once = torch.autograd.grad((losses * mask).sum(), (hidden, weight), retain_graph=True)
    anew = torch.autograd.grad(losses.pow(2).sum(), (hidden, weight))
    for rank, (mine, *_) in enumerate(ranks):
        np.testing.assert_allclose(mine, (losses * mask).detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=f"rank {rank}")
    for (dh, dw), at in ((once, 1), (anew, 3)):
        np.testing.assert_allclose(sum(r[at] for r in ranks), dh.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.concatenate([r[at + 1] for r in ranks]), dw.numpy(), rtol=1e-4, atol=1e-5)


def test_zigzag_positions_are_those_that_slicing_keeps():
    window = torch.arange(24)[None]
    for size in (2, 3):
        held = [slice_zigzag(window, rank, size)[0].numpy() for rank in range(size)]
        for rank in range(size):
            np.testing.assert_array_equal(held[rank], zigzag_positions(24, rank, size))
        np.testing.assert_array_equal(np.sort(np.concatenate(held)), window[0].numpy())
