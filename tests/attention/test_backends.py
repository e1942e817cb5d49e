"""Which kernel serves which tensors, told without the device: what the context-parallel path does follows from it."""

import pytest
import torch

from nemo_longctx.attention import core
from nemo_longctx.attention.context_parallel import gathers_again, keys_by_segment


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("there", [(), ("flash",), ("varlen",), ("flash", "varlen")])
def test_the_kernel_and_what_it_wants(monkeypatch, device, dtype, there):
    monkeypatch.setattr(core, "flash_attention", lambda: "flash" in there)
    monkeypatch.setattr(core, "torch_varlen", lambda: "varlen" in there)
    device = torch.device(device)
    if device.type == "cpu":
        name = "cpu-flash"
    elif dtype == torch.float32 or not there:
        name = "sdpa"
    else:
        name = "flash-attn-varlen" if "flash" in there else "torch-varlen"
    assert core.backend_name(device, dtype, segmented=True) == name
    assert core.backend_name(device, dtype, segmented=False) == ("cpu-flash" if device.type == "cpu" else "sdpa")
    assert keys_by_segment(device, dtype) == (name in ("flash-attn-varlen", "torch-varlen"))
    assert gathers_again(device, dtype) == (name != "sdpa")
