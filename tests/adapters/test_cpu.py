"""The CPU adapter: it takes effect without CUDA, leaves no trace when removed, and touches nothing where CUDA is."""

from types import SimpleNamespace

import pytest
import torch

from nemo_longctx.adapters.megatron import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="replaces what CUDA itself provides")

WATCHED = [
    (torch, "empty"), (torch, "zeros"), (torch, "tensor"), (torch.Tensor, "to"), (torch.Tensor, "type"), (torch.Tensor, "cuda"),
    (torch.nn.Module, "cuda"), (torch.cuda, "Stream"), (torch.cuda, "current_device"), (torch.cuda, "FloatTensor"),
    (torch.cuda, "is_initialized"), (torch.cuda.random, "get_rng_state"), (torch.cuda.nvtx, "range_push"),
]  # fmt: skip


@pytest.fixture
def bare():
    """This process as it was before any `install`, and again as it was afterwards."""
    was_installed = cpu.is_installed()
    cpu.uninstall()
    yield
    cpu.uninstall()
    if was_installed:
        cpu.install()


@pytest.fixture
def installed(bare):
    assert cpu.install()


def test_nothing_changes_where_cuda_is_available(bare, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = [getattr(owner, name) for owner, name in WATCHED]
    assert cpu.install() is False
    assert not cpu.is_installed()
    assert all(now is was for now, was in zip([getattr(o, n) for o, n in WATCHED], before, strict=True))


def test_uninstall_puts_everything_back(bare):
    before = [getattr(owner, name) for owner, name in WATCHED]
    cpu.install()
    changed = [getattr(owner, name) is not was for (owner, name), was in zip(WATCHED, before, strict=True)]
    assert all(changed), [w for w, c in zip(WATCHED, changed, strict=True) if not c]
    cpu.uninstall()
    assert all(getattr(owner, name) is was for (owner, name), was in zip(WATCHED, before, strict=True))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0)])
def test_cuda_means_the_cpu(installed, device):
    made = [
        torch.zeros(2, device=device),
        torch.tensor([1.0], device=device),
        torch.full((2,), 3.0, device=device),
        torch.arange(3, device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device=device, dtype=torch.float64),
        torch.ones(2).cuda(),
        torch.tensor(1, pin_memory=True).to("cuda", non_blocking=True),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[5].dtype == torch.float64


def test_other_devices_are_left_alone(installed):
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.ones(2).to("meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"


def test_tensor_kinds_answer_as_on_cuda(installed):
    tensor = torch.ones(2)
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert isinstance(tensor, torch.cuda.FloatTensor)
    assert tensor.type(torch.float64).dtype == torch.float64


def test_gradients_are_clipped_by_the_hosts_own_function(installed):
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=6.0)
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.5), rtol=1e-5, atol=0)


def test_recomputed_dropout_draws_the_same_numbers(installed):
    """Activation recomputation restores the generator that dropout draws from."""
    from megatron.core.tensor_parallel.random import _get_all_rng_states, _set_all_rng_states

    states = _get_all_rng_states()
    first = torch.nn.functional.dropout(torch.ones(64), 0.5)
    _set_all_rng_states(*states)
    again = torch.nn.functional.dropout(torch.ones(64), 0.5)
    assert torch.equal(first, again)


def test_stock_configs_build_and_fusions_are_off(installed):
    from nemo.collections import llm

    with cpu.stock_configs():
        config = llm.Llama2Config7B()
    assert all(getattr(config, name) == value for name, value in cpu.CPU_MODEL_FIELDS.items() if hasattr(config, name))


def test_a_config_from_a_cpu_gets_its_fusions_back_with_cuda(installed, monkeypatch):
    from nemo.collections import llm

    with cpu.stock_configs():
        config = llm.LlamaConfig(num_layers=1, hidden_size=64, num_attention_heads=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    changes = cpu.machine_fields(config)
    assert changes["use_cpu_initialization"] is False
    assert changes["bias_dropout_fusion"] is True
    assert changes["apply_rope_fusion"] is False  # still no Transformer Engine here


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "packages", [(), ("transformer_engine",), ("transformer_engine", "fused_weight_gradient_mlp_cuda", "amp_C")]
)
def test_with_cuda_no_fusion_stays_that_is_missing_or_turns_other_pairs(monkeypatch, packages, told, interleaved):
    """The fused rotation of documents before Megatron-Core 0.17 passes over `rotary_interleaved`, which that of whole windows,
    and so the live check, hears."""
    from megatron.core.models.common.embeddings import rope_utils

    def without(t, cu_seqlens, freqs, cp_size=1, cp_rank=0):  # Megatron-Core 0.13 to 0.16
        pass

    def fused(t, cu_seqlens, freqs, cp_size=1, cp_rank=0, interleaved=False):  # from 0.17
        pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "has_module", lambda name: name in packages)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", (fused if told else without) if packages else None)
    config = SimpleNamespace(
        rotary_interleaved=interleaved, apply_rope_fusion=True, persist_layer_norm=True, gradient_accumulation_fusion=True
    )
    cpu.adapt_model_config(config)
    assert config.apply_rope_fusion == (bool(packages) and (told or not interleaved))
    assert config.persist_layer_norm == config.gradient_accumulation_fusion == (len(packages) == 3)


@pytest.mark.parametrize("shared", [True, False])
def test_norms_by_torch_know_sequence_parallelism(installed, shared):
    """By the mark that the host adds up gradients by; the config stays what it is."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = SimpleNamespace(
        sequence_parallel=shared,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=False,
        persist_layer_norm=False,
        memory_efficient_layer_norm=False,
    )
    norm = WrappedTorchNorm(config, 8, eps=1e-5)
    assert isinstance(norm, torch.nn.RMSNorm)
    assert [weight.sequence_parallel for weight in norm.parameters()] == [shared]
    assert config.sequence_parallel == shared
    cpu.uninstall()
    if shared:
        with pytest.raises(AssertionError, match="sequence parallel"):
            WrappedTorchNorm(config, 8)
