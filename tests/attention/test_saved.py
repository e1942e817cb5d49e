"""Hooks inside hooks: what attention under context parallelism keeps for its backward goes where those around it send it."""

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from nemo_longctx.attention import context_parallel
from nemo_longctx.attention.documents import context_parallel_segments
from nemo_longctx.attention.saved import saved_tensors_hooks


class Elsewhere:
    """Offload's pair: each saved tensor goes to another place, and comes back from there."""

    def __init__(self):
        self.bytes = 0

    def pack(self, tensor):
        self.bytes += tensor.nbytes
        return ("elsewhere", tensor.detach().clone())

    @staticmethod
    def unpack(packed):
        return packed[1]


def test_the_inner_pair_hands_on_what_it_leaves():
    outer, inner = Elsewhere(), Elsewhere()
    x = torch.arange(4.0, requires_grad=True)
    with saved_tensors_hooks(outer.pack, outer.unpack):
        with saved_tensors_hooks(lambda t: t if t.numel() == 4 else inner.pack(t), inner.unpack):
            y = x * x.detach().clone().requires_grad_(False)
            z = (y[:2] * y[:2]).sum()
        w = x.exp().sum()
    (z + w).backward()
    torch.testing.assert_close(x.grad[2:], x[2:].exp().detach())
    assert inner.bytes == 2 * 2 * 4
    assert outer.bytes >= 2 * 4 * 4


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


@pytest.mark.parametrize("by_segment", [False, True])
def test_offload_takes_attention_under_context_parallelism(group, monkeypatch, by_segment):
    monkeypatch.setattr(context_parallel, "keys_by_segment", lambda device, dtype: by_segment)
    segments = context_parallel_segments((0, 5, 6, 23, 48), 48, 0, 1)
    leaves = [torch.randn(2, 48, heads, 16, requires_grad=True) for heads in (4, 2, 2)]

    def attend():
        """Attention of what a layer makes of its input, and whether what it made is still in memory afterwards."""
        q, k, v = (leaf * 2 for leaf in leaves)
        made = [StorageWeakRef(x.untyped_storage()) for x in (q, k, v)]
        out = context_parallel.context_parallel_attention(q, k, v, segments=segments, group=group)
        made.append(StorageWeakRef(out.untyped_storage()))
        loss = out.pow(2).sum()
        del q, k, v, out
        return loss, [not ref.expired() for ref in made]

    loss, kept = attend()
    expected = torch.autograd.grad(loss, leaves)
    assert any(kept)
    away = Elsewhere()
    with saved_tensors_hooks(away.pack, away.unpack):
        loss, kept = attend()
    assert not any(kept), "queries, keys, values and output stay on the device"
    for mine, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(mine, other)
