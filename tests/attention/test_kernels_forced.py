"""The choices that CUDA would make, forced on the CPU, with stand-ins of the published signatures for its kernels."""

import importlib
import sys
import types

import pytest
import torch

from nemo_longctx import capability
from nemo_longctx.attention import core
from nemo_longctx.attention.core import causal_attention, device_boundaries
from nemo_longctx.attention.documents import document_segments

SEGMENTS = document_segments((0, 5, 6, 23, 48))


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 48, heads, 16, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_float32_asks_no_kernel_for_grouped_queries(monkeypatch, segments, window):
    """torch's memory-efficient kernel, the only one for float32 on CUDA, refuses `enable_gqa`."""
    leaves = tensors()
    expected = causal_attention(*leaves, segments=segments, window=window)
    expected_grads = torch.autograd.grad(expected.pow(2).sum(), leaves)
    asked, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def efficient_only(query, key, value, *, enable_gqa=False, **settings):
        asked.append(enable_gqa)
        assert query.shape[1] == key.shape[1]
        return sdpa(query, key, value, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", efficient_only)
    monkeypatch.setattr(core, "backend_name", lambda *args, **kwargs: "sdpa")
    out = causal_attention(*leaves, segments=segments, window=window)
    assert asked
    assert not any(asked)
    torch.testing.assert_close(out, expected)
    for mine, other in zip(torch.autograd.grad(out.pow(2).sum(), leaves), expected_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def old_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """torch 2.10's: neither scale, nor windows, nor grouped queries."""


@pytest.mark.parametrize("module", [None, types.SimpleNamespace(varlen_attn=old_varlen_attn)])
def test_a_torch_without_this_varlen_kernel_runs_on_sdpa(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)  # None: not there to import
    monkeypatch.setattr(core, "flash_attention", lambda: None)
    core.torch_varlen.cache_clear()
    assert core.backend_name(torch.device("cuda"), torch.bfloat16, segmented=True) == "sdpa"
    core.torch_varlen.cache_clear()


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                           causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                           return_attn_probs=False, block_table=None):  # fmt: skip
    """flash-attn 2's signature; its result by torch."""
    assert causal
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    groups, outs = q.shape[1] // k.shape[1], []
    for number in range(len(cu_seqlens_q) - 1):
        (a, b), (c, d) = (boundaries[number : number + 2].tolist() for boundaries in (cu_seqlens_q, cu_seqlens_k))
        keys, values = (x[c:d].float().repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), keys) * softmax_scale
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu((d - c) - (b - a) + 1)
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outs).to(q.dtype)


def test_layers_share_the_boundaries_on_the_device(monkeypatch):
    q, k, v = (x.detach() for x in tensors())
    expected = causal_attention(q, k, v, segments=SEGMENTS)
    monkeypatch.setattr(core, "backend_name", lambda *args, **kwargs: "flash-attn-varlen")
    monkeypatch.setattr(core, "_flash_varlen", lambda: flash_attn_varlen_func)
    copies, tensor = [], torch.tensor

    def counted(*args, device=None, **settings):
        copies.append(device)
        return tensor(*args, device=device, **settings)

    device_boundaries.cache_clear()
    monkeypatch.setattr(torch, "tensor", counted)
    for _ in range(6):  # layers
        out = causal_attention(q, k, v, segments=SEGMENTS)
    torch.testing.assert_close(out, expected)
    assert len(copies) <= 2


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_no_boundaries_make_the_host_wait_for_the_device(monkeypatch, kind):
    """From memory that is not pinned, or with a copy that blocks, it would wait for all that the device has to do."""
    told, device = [], torch.device(kind)

    class Host:
        def to(self, where, non_blocking=False):
            return told.append((where, non_blocking))

    monkeypatch.setattr(torch, "tensor", lambda numbers, dtype, pin_memory: told.append((numbers, dtype, pin_memory)) or Host())
    core.on_device([0, 3], device)
    assert told == [([0, 3], torch.int32, kind == "cuda"), (device, True)]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A function that puts (file -> text) on the path, as an installation would."""

    def install(files):
        for file, text in files.items():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.startswith("flash_attn")]:
            monkeypatch.delitem(sys.modules, name)
        capability.flash_attention.cache_clear()
        return capability.flash_attention()

    yield install
    capability.flash_attention.cache_clear()


def release(version):
    return {"flash_attn-x.dist-info/METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n"}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"flash_attn/cute/__init__.py": ""}, None),  # flash-attn 4: a folder without a package around it
        ({"flash_attn/cute/__init__.py": "", **release("4.0.0")}, None),
        ({"flash_attn/__init__.py": "", **release("2.8.3")}, "flash_attn"),
        ({"flash_attn/__init__.py": "", **release("2.0.9")}, None),
        ({"flash_attn/__init__.py": "", **release("1.0.9")}, None),
        ({"flash_attn/__init__.py": "", **release("2.10.0.post1")}, "flash_attn"),
        ({"flash_attn_interface.py": ""}, "flash_attn_interface"),
        ({"flash_attn_interface.py": "", "flash_attn/__init__.py": "", **release("2.8.3")}, "flash_attn_interface"),
    ],
)
def test_the_flash_attention_that_is_installed(packages, files, found):
    assert packages(files) == found


@pytest.mark.parametrize(
    ("gpus", "found"),
    [
        ([], "flash_attn_interface"),
        ([(9, 0)], "flash_attn_interface"),
        ([(9, 0), (8, 9)], "flash_attn"),
        ([(8, 0)], "flash_attn"),
        ([(10, 0)], "flash_attn"),
    ],
)
def test_flash_attention_3_is_for_hopper_alone(packages, monkeypatch, gpus, found):
    monkeypatch.setattr(capability, "cuda_devices", lambda: [("a GPU", each) for each in gpus])
    assert packages({"flash_attn_interface.py": "", "flash_attn/__init__.py": "", **release("2.8.3")}) == found
