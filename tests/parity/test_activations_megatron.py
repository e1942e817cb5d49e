"""Recomputation and offload on live Megatron-Core layers: they take effect, in both directions, and change no number."""

import pytest
import small_gpt
import torch
from torch.autograd.graph import saved_tensors_hooks

from nemo_longctx.adapters.megatron import activations
from nemo_longctx.adapters.megatron.activations import set_activation_policy
from nemo_longctx.adapters.megatron.attention import packed_documents
from nemo_longctx.adapters.megatron.loss import forward_with_chunked_loss
from nemo_longctx.config import ConfigError

LENGTH = 96


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    with small_gpt.parallel():
        yield


@pytest.fixture
def model():
    return small_gpt.build(small_gpt.config(num_layers=3))


def batch():
    ids, positions, labels = small_gpt.tokens(1, LENGTH)
    params = packed_documents((0, 17, 60, LENGTH))
    return {"tokens": ids, "position_ids": positions, "labels": labels, "packed_seq_params": params}


def step(model):
    """Losses, gradients, bytes that the forward kept for the backward, and how often each layer ran."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    runs = [0] * len(model.decoder.layers)

    def count(index):
        def hook(*_):
            runs[index] += 1

        return hook

    handles = [layer.register_forward_hook(count(index)) for index, layer in enumerate(model.decoder.layers)]
    mlp_runs = []
    handles.append(model.decoder.layers[0].mlp.register_forward_hook(lambda *_: mlp_runs.append(1)))
    model.zero_grad()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = forward_with_chunked_loss(model, batch())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = sum(size for place, size in kept.items() if place not in weights)
    (losses * torch.linspace(0.5, 1.5, LENGTH)).sum().backward()
    for handle in handles:
        handle.remove()
    return losses.detach(), small_gpt.gradients(model), held, runs, len(mlp_runs)


def same(one, other):
    """To the last bits: a copy lies otherwise in memory than what it was made of, and products of it round otherwise."""
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=1e-5, atol=2e-6)


def test_recomputation_takes_effect_between_steps_and_changes_nothing(model):
    plain = step(model)
    assert plain[3:] == ([1, 1, 1], 1)
    held = {"none": plain[2]}
    expected = {"selective": ([1, 1, 1], 2), "block:1": ([2, 1, 1], 2), "full": ([2, 2, 2], 2), "none": ([1, 1, 1], 1)}
    for name, runs in expected.items():
        set_activation_policy([model], recompute=name)
        again = step(model)
        same(again, plain)
        assert again[3:] == runs, name
        assert held.setdefault(name, again[2]) == again[2]
    assert held["full"] < held["block:1"] < held["none"]
    assert held["full"] < held["selective"] < held["none"]
    hidden = LENGTH * 32 * 4
    assert held["none"] - held["full"] > 3 * 10 * hidden  # a layer keeps many times its input


def test_more_layers_than_there_are_is_refused(model):
    with pytest.raises(ConfigError, match=r"recompute='block:4': a model chunk has only 3 layers"):
        set_activation_policy([model], recompute="block:4")


def test_offload_is_refused_on_the_cpu_and_leaves_the_model_as_it_was(model):
    before = type(model.decoder)
    with pytest.raises(ConfigError, match=r"offload='full': needs a GPU"):
        set_activation_policy([model], offload="full")
    set_activation_policy([model], offload="none")
    assert type(model.decoder) is before


@pytest.fixture
def forced(monkeypatch):
    """Offload on the CPU: tensors are copied within host memory. All but the transfer itself is what a GPU would do."""
    monkeypatch.setattr(activations, "_check_offload", lambda block, offload: None)
    monkeypatch.setattr(activations, "OFFLOAD_MIN_BYTES", 1024)
    moved = []
    original = activations.HostMemory.pack

    def pack(self, tensor):
        packed = original(self, tensor)
        if not isinstance(packed, torch.Tensor):
            moved.append((self.block.offload_at, packed[1].nbytes, tensor.untyped_storage().data_ptr()))
            assert packed[1].data_ptr() != tensor.data_ptr()
        return packed

    monkeypatch.setattr(activations.HostMemory, "pack", pack)
    return moved


@pytest.mark.parametrize("recompute", ["none", "selective", "block:1", "full"])
def test_offload_moves_what_layers_keep_and_changes_nothing(model, forced, recompute):
    plain = step(model)
    set_activation_policy([model], recompute=recompute, offload="full")
    same(step(model), plain)
    assert {layer for layer, *_ in forced} == {0, 1, 2}
    everything = sum(size for _, size, _ in forced)
    hidden = LENGTH * 32 * 4
    if recompute == "full":  # each layer's input and rotary angles, and what the final norm keeps
        assert 3 * hidden < everything < 8 * hidden
    else:
        assert everything > 10 * hidden
    forced.clear()
    set_activation_policy([model], offload="block:2")
    same(step(model), plain)
    assert {layer for layer, *_ in forced} == {0, 1}
    forced.clear()
    set_activation_policy([model], recompute="none", offload="none")
    same(step(model), plain)
    assert not forced


def test_weights_are_not_moved(model, forced):
    set_activation_policy([model], offload="full")
    step(model)
    weights = {p.untyped_storage().data_ptr() for p in model.decoder.parameters() if p.nbytes >= 1024}
    assert len(weights) == 3 * 4  # query-key-value, projection, and the MLP's two of each layer
    assert forced
    assert not weights & {place for *_, place in forced}


def test_what_offload_cannot_stand_beside(model):
    block = model.decoder.to("meta")  # any device but the CPU
    activations._check_offload(block, "full")
    graphs = [
        ("enable_cuda_graph", True, "false"),
        ("external_cuda_graph", True, "false"),
        ("cuda_graph_impl", "local", "none"),
    ]
    for field, value, said in (
        ("cpu_offloading", True, "host's own"),
        *((name, on, f"CUDA graph; set model.{name}={off} or") for name, on, off in graphs if hasattr(block.config, name)),
        ("gradient_accumulation_fusion", True, "gradient_accumulation_fusion=false"),
    ):
        before = getattr(block.config, field)
        setattr(block.config, field, value)
        with pytest.raises(ConfigError, match=said):
            activations._check_offload(block, "full")
        setattr(block.config, field, before)
    block.config.gradient_accumulation_fusion = True
    set_activation_policy([model], recompute="full")
    activations._check_offload(block, "full")
