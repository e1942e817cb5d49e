"""Causal attention against a plain float64 reference with an explicit mask, in every form: whole, packed, cached, shared."""

import itertools

import pytest
import torch

from nemo_longctx.attention import core, cpu_kernel
from nemo_longctx.attention.core import backend_name, causal_attention
from nemo_longctx.attention.documents import Segment, context_parallel_segments, document_segments
from nemo_longctx.config import ConfigError


def visible(segments, S, T):
    """The mask that `segments` stand for, entry by entry."""
    mask = torch.zeros(S, T, dtype=torch.bool)
    for segment in segments:
        for row in range(segment.q_start, segment.q_end):
            last = segment.k_start + segment.prefix + (row - segment.q_start)
            mask[row, segment.k_start : last + 1] = True
    return mask


def reference(q, k, v, mask, scale=None):
    """softmax(scale q k^T) v in float64, scores and all."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v)


def qkv(B, S, T, H, K, D, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, S, H, D), (B, T, K, D), (B, T, K, D))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def relative_error(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


FORMS = {
    "whole": (37, 37, None),
    "documents": (40, 40, document_segments((0, 1, 14, 14, 40))),
    "cached": (5, 23, None),
    "decode": (1, 23, None),
    "cached documents": (8, 20, (Segment(0, 3, 0, 7), Segment(3, 8, 7, 20))),
    "context-parallel share": (12, 24, context_parallel_segments((0, 9, 10, 24), 24, 0, 2)),
    "mirror share": (12, 24, context_parallel_segments((0, 9, 10, 24), 24, 1, 2)),
}


def test_grouped_queries_on_a_torch_whose_kernel_shares_no_head(monkeypatch):
    """torch 2.6's reads past the end of the keys; here is seen that no kernel is given fewer heads than queries."""
    made = []
    kernel = cpu_kernel._forward_kernel
    monkeypatch.setattr(
        cpu_kernel, "_forward_kernel", lambda q, k, *more, **named: made.append((q, k)) or kernel(q, k, *more, **named)
    )
    inputs = qkv(2, 40, 40, 6, 2, 16)
    expected = causal_attention(*inputs, segments=FORMS["documents"][2])
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    made.clear()
    monkeypatch.setattr(cpu_kernel, "shares_heads", lambda: False)
    out = causal_attention(*inputs, segments=FORMS["documents"][2])
    assert made
    assert all(q.shape[1] == k.shape[1] for q, k in made)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), inputs), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "groups", "batch"), [(4, 4, 1), (6, 2, 2)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_matches_float64_reference(form, heads, groups, batch, dtype, bound):
    S, T, segments = FORMS[form]
    q, k, v = qkv(batch, S, T, heads, groups, 16, dtype)
    mask = visible(segments or (Segment(0, S, 0, T),), S, T)
    expected = reference(q, k, v, mask)
    out = causal_attention(q, k, v, segments=segments)
    assert out.dtype == dtype
    assert relative_error(out, expected) < bound
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(out, (q, k, v), grad.to(dtype))
    theirs = torch.autograd.grad(expected, (q, k, v), grad)
    for mine, other in zip(ours, theirs, strict=True):
        # For one bfloat16 key alone the score's gradient is zero in truth and rounding here: compare against the whole.
        error = (mine.double() - other.double()).norm() / max(other.double().norm().item(), grad.norm().item() * 1e-3)
        assert error < bound


def test_scale_is_used():
    q, k, v = qkv(1, 9, 9, 2, 2, 8)
    mask = visible((Segment(0, 9, 0, 9),), 9, 9)
    torch.testing.assert_close(causal_attention(q, k, v, scale=0.3), reference(q, k, v, mask, scale=0.3))
    segments = (Segment(0, 9, 0, 9),)
    for others in (core._sdpa_segments(q, k, v, segments, 0.3), core.sdpa_windows(q, k, v, segments, 0.3, window=9)):
        torch.testing.assert_close(others, reference(q, k, v, mask, scale=0.3))


def test_packed_equals_each_document_alone():
    cu_seqlens = (0, 7, 8, 30)
    q, k, v = qkv(1, 30, 30, 4, 2, 16, torch.float32)
    packed = causal_attention(q, k, v, segments=document_segments(cu_seqlens))
    grad = torch.randn_like(packed)
    packed_grads = torch.autograd.grad(packed, (q, k, v), grad)
    for a, b in itertools.pairwise(cu_seqlens):
        part = [x.detach()[:, a:b].clone().requires_grad_() for x in (q, k, v)]
        alone = causal_attention(*part)
        torch.testing.assert_close(packed[:, a:b], alone, rtol=1e-6, atol=1e-6)
        for mine, other in zip(packed_grads, torch.autograd.grad(alone, part, grad[:, a:b]), strict=True):
            torch.testing.assert_close(mine[:, a:b], other, rtol=1e-6, atol=1e-6)


def test_a_cached_step_equals_the_full_pass():
    q, k, v = qkv(2, 20, 20, 4, 2, 16, torch.float32)
    full = causal_attention(q, k, v)
    for start, end in ((0, 12), (12, 19), (19, 20)):
        step = causal_attention(q[:, start:end], k[:, :end], v[:, :end])
        torch.testing.assert_close(step, full[:, start:end], rtol=1e-5, atol=1e-6)


def test_no_tensor_grows_with_the_square_of_the_length():
    """Every tensor that the forward and the backward make, seen by a dispatch mode, is linear in the tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    S, H, D = 2048, 2, 8
    for segments in (None, document_segments((0, 100, S)), context_parallel_segments((0, 2 * S), 2 * S, 1, 2)):
        T = S if segments is None or segments[-1].k_end == S else 2 * S
        q, k, v = qkv(1, S, T, H, H, D, torch.float32)
        with Watch():
            causal_attention(q, k, v, segments=segments).sum().backward()
    assert largest <= 2 * S * H * D * 4 < S * S


@pytest.mark.parametrize(
    ("shapes", "segments", "said"),
    [
        (((1, 4, 3, 8), (1, 4, 2, 8)), None, "multiple of the key heads"),
        (((1, 4, 2, 8), (1, 3, 2, 8)), None, "a key for each query"),
        (((1, 4, 2, 8), (1, 4, 2, 8)), (Segment(0, 3, 0, 3),), "must end at query row 4"),
        (((1, 4, 2, 8), (1, 4, 2, 8)), (Segment(0, 4, 1, 5),), "within 4 keys"),
    ],
)
def test_misfits_are_named(shapes, segments, said):
    q, k = torch.zeros(shapes[0]), torch.zeros(shapes[1])
    with pytest.raises(ConfigError, match=said):
        causal_attention(q, k, k, segments=segments)


def test_backend_by_capability():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backend_name(cpu, torch.bfloat16, segmented=True) == "cpu-flash"
    assert backend_name(cuda, torch.float32, segmented=True) == "sdpa"
    assert backend_name(cuda, torch.bfloat16, segmented=False) == "sdpa"
    assert backend_name(cuda, torch.bfloat16, segmented=True) in ("flash-attn-varlen", "torch-varlen", "sdpa")
