"""The CUDA kernels behind `causal_attention` and the chunked loss, against explicit scores and logits in float64."""

import pytest
import torch

from nemo_longctx.attention.core import backend_name, causal_attention
from nemo_longctx.attention.documents import Segment, context_parallel_segments, document_segments
from nemo_longctx.attention.loss import chunked_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

FORMS = {
    "whole": (200, 200, None),
    "documents": (300, 300, document_segments((0, 1, 130, 130, 300))),
    "cached": (50, 230, None),
    "context-parallel share": (120, 240, context_parallel_segments((0, 90, 100, 240), 240, 1, 2)),
}


def explicit(q, k, v, segments):
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    for segment in segments:
        for row in range(segment.q_start, segment.q_end):
            hidden[row, segment.k_start : segment.k_start + segment.prefix + row - segment.q_start + 1] = False
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-2)])  # float32 may use TF32
@pytest.mark.parametrize("batch", [1, 2])
def test_matches_float64(form, dtype, bound, batch):
    S, T, segments = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, S, 8, 64), (batch, T, 2, 64), (batch, T, 2, 64))
    q, k, v = (torch.randn(*shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes)
    expected = explicit(q, k, v, segments or (Segment(0, S, 0, T),))
    out = causal_attention(q, k, v, segments=segments)
    grad = torch.randn(out.shape, generator=generator).cuda()
    ours = (out, *torch.autograd.grad(out, (q, k, v), grad.to(dtype)))
    theirs = (expected, *torch.autograd.grad(expected, (q, k, v), grad.double()))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.double() - other).norm() < bound * other.norm(), backend_name(q.device, dtype, segmented=True)


def test_memory_grows_linearly():
    peaks = []
    for S in (16384, 32768):
        q, k, v = (torch.randn(1, S, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        causal_attention(q, k, v, segments=document_segments((0, 5000, S))).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.1 * peaks[0]


def test_chunked_loss():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5000, 256, generator=generator).cuda().requires_grad_()
    weight = (torch.randn(3000, 256, generator=generator) * 0.1).cuda().requires_grad_()
    labels = torch.randint(0, 3000, (5000,), generator=generator).cuda()
    expected = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), labels)
    ours = chunked_cross_entropy(hidden, weight, labels).mean()
    assert abs(ours.item() - expected.item()) < 1e-3
    for mine, other in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert (mine - other).norm() < 1e-2 * other.norm()
