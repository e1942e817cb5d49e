"""The self-test passes on the real path and catches what it is there for: a leak, a wrong kernel, loss or scale."""

import os
import resource
from pathlib import Path

import pytest
import small_gpt
import torch

from nemo_longctx.adapters.megatron import attention, memory_trial, self_test
from nemo_longctx.adapters.megatron.loss import use_chunked_loss
from nemo_longctx.adapters.megatron.rope_module import transform_rope
from nemo_longctx.adapters.megatron.self_test_parallel import SmallLayers, context_parallel_error, small_layers
from nemo_longctx.attention import context_parallel
from nemo_longctx.config import ConfigError
from nemo_longctx.rope import YarnRope
from nemo_longctx.rope.variants import parse


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    with small_gpt.parallel():
        yield


@pytest.fixture(scope="module")
def model():
    return small_gpt.build(small_gpt.config())


def test_the_real_path_passes(model):
    findings = self_test.self_test(model, model.config, seq_length=256)
    assert [f.name for f in findings if not f.passed] == []
    assert len(findings) == 4
    assert "FAILED" not in self_test.findings_text(findings)


def test_the_host_s_own_attention_is_asked_as_the_host_asks_it(model, monkeypatch):
    """Transformer Engine's must be told the kind of mask."""
    original, told = attention.LongContextAttention.forward, []

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
        told.append(attn_mask_type.name)
        return original(self, query, key, value, attention_mask, packed_seq_params=packed_seq_params)

    monkeypatch.setattr(attention.LongContextAttention, "forward", forward)
    assert self_test.attention_finding(model).passed
    assert set(told) == {"causal"}


def test_a_run_without_document_masks_is_told_that_its_documents_are_not_kept_apart(model):
    finding = self_test.leak_finding(model, small_gpt.VOCABULARY, document_masking=False)
    assert finding.passed
    assert "would be" in finding.name
    assert "this run sets it false" in finding.detail


def test_a_planted_leak_is_caught(model, monkeypatch):
    """Document boundaries get lost on the way to the kernel: the whole window is one document."""
    monkeypatch.setattr(attention, "document_segments", lambda boundaries: None)
    finding = self_test.leak_finding(model, small_gpt.VOCABULARY)
    assert not finding.passed
    assert not self_test.attention_finding(model).passed


def test_a_leak_of_gradients_alone_is_caught(model, monkeypatch):
    original = attention.causal_attention

    def leaky(q, k, v, **kwargs):
        out = original(q, k, v, **kwargs)
        return out + (v.sum() - v.sum().detach())  # nothing changes forward

    monkeypatch.setattr(attention, "causal_attention", leaky)
    assert not self_test.leak_finding(model, small_gpt.VOCABULARY).passed


def test_a_model_that_hears_nothing_does_not_pass(model):
    model.embedding.word_embeddings.weight.data.mul_(0)
    try:
        assert "shows nothing" in self_test.leak_finding(model, small_gpt.VOCABULARY).detail
    finally:
        model.load_state_dict(small_gpt.build(small_gpt.config()).state_dict())


def test_a_rank_without_attention_is_refused_and_passes_nothing():
    with pytest.raises(ConfigError, match="no attention layer on this rank") as caught:
        self_test.attention_finding(torch.nn.Linear(2, 2))
    assert (caught.value.key, caught.value.value) == ("num_layers", 0)


def test_a_wrong_scale_of_the_scores_is_caught(model, monkeypatch):
    layer = next(m for m in model.modules() if isinstance(m, attention.LongContextAttention))
    monkeypatch.setattr(layer, "scale", 0.2)
    assert not self_test.attention_finding(model).passed


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"window_size": (15, 0)}, "window of 16 tokens included"),
        ({"window_size": (4095, 0), "window_attn_skip_freq": 2}, r"window of 4,096 tokens (asked with 24) included"),
    ],
)
def test_layers_with_a_window_are_asked_with_theirs(fields, said, monkeypatch):
    """Also where the window is longer than the test's tokens: it is shortened for the question and is its own again."""
    model = small_gpt.build(small_gpt.config(**fields))
    finding = self_test.attention_finding(model)
    assert finding.passed, finding
    assert said in finding.detail
    cores = [m for m in model.modules() if isinstance(m, attention.LongContextAttention)]
    assert [core.window for core in cores if core.window] == [fields["window_size"][0] + 1] * sum(1 for c in cores if c.window)
    original = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda q, k, v, **more: original(q, k, v, **{**more, "window": None}))
    assert not self_test.attention_finding(model).passed  # a window that gets lost


def test_a_rope_that_scales_q_and_k_is_no_fault_of_attention():
    """YaRN's factor and xPos's decay come in by hooks before attention, which a self-test of YaRN took for its errors."""
    for variant in (
        YarnRope(base=1e4, factor=8.0, original_max_position_embeddings=32),
        parse({"variant": "xpos", "base": 1e4}),
    ):
        model = small_gpt.build(small_gpt.config())
        transform_rope(model, variant)
        assert self_test.attention_finding(model).passed
        assert self_test.loss_finding(model, small_gpt.VOCABULARY).passed


def test_the_small_model_under_context_parallelism_is_like_the_run_s():
    config = small_gpt.config(window_size=(4095, 0), window_attn_skip_freq=2, no_rope_freq=[0, 1])
    variant = YarnRope(base=1e4, factor=4.0, original_max_position_embeddings=32, local_base=1e4)
    like = small_layers(config, variant)
    assert like.fields == {"window_size": (11, 0), "window_attn_skip_freq": [1, 0], "no_rope_freq": [0, 1]}
    assert like.variant == variant
    assert small_layers(small_gpt.config()).fields == {}


def test_a_wrong_loss_is_caught(model, monkeypatch):
    use_chunked_loss(model)
    original = type(model).compute_language_model_loss
    monkeypatch.setattr(
        type(model), "compute_language_model_loss", lambda self, labels, logits: original(self, labels.flip(1), logits)
    )
    assert not self_test.loss_finding(model, small_gpt.VOCABULARY).passed


def test_a_length_that_does_not_fit_is_halved(model, monkeypatch):
    tried = []

    def peak(_model, _vocabulary, length):
        tried.append(length)
        return None if length > 500 else 1 << 20

    monkeypatch.setattr(self_test, "_peak_of_a_step", peak)
    finding = self_test.memory_finding(model, small_gpt.VOCABULARY, 1024)
    assert tried == [1024, 512, 256]
    assert not finding.passed
    assert "256 tokens" in finding.detail


def test_running_out_of_memory_ends_the_trial_only(model, monkeypatch):
    """With 64 MiB left, a window whose activations need more is refused by the limit; the process lives on without it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(memory_trial, "_available_bytes", lambda: 64 << 20)
    assert self_test._peak_of_a_step(model, small_gpt.VOCABULARY, 1 << 17) is None
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert self_test._peak_of_a_step(model, small_gpt.VOCABULARY, 256) > 1 << 20


def scale_gradients_by_ranks():
    original = context_parallel._GatherZigzag.backward

    def scaled(ctx, grad):
        mine, *rest = original(ctx, grad)
        return mine * ctx.group.size(), *rest

    context_parallel._GatherZigzag.backward = staticmethod(scaled)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (1e-5, True), (1.1e-5, False), (float("inf"), False)])
def test_two_ranks_pass_to_the_bound_and_the_mend_is_told(model, monkeypatch, error, passed, per_token):
    asked = []
    monkeypatch.setattr(self_test, "context_parallel_error", lambda **more: asked.append(more) or error)
    monkeypatch.setattr(model.config, "calculate_per_token_loss", per_token)
    finding = self_test.context_parallel_finding(model.config)
    assert finding.passed == passed
    assert [more["calculate_per_token_loss"] for more in asked] == [per_token]
    assert f"{error:.1e} (bound 1e-05)" in finding.detail
    assert ("would weigh every token alike" in finding.detail) == (not passed and not per_token)


@pytest.mark.slow
def test_context_parallel_passes_and_a_planted_scale_is_caught():
    variant = YarnRope(base=1e4, factor=4.0, original_max_position_embeddings=32, local_base=1e3)
    like = SmallLayers(fields={"window_size": (11, 0), "window_attn_skip_freq": [1, 0]}, variant=variant)
    assert context_parallel_error(like=like) < 1e-5
    assert context_parallel_error(prepare=scale_gradients_by_ranks) > 1e-2


@pytest.mark.slow
def test_means_of_ranks_instead_of_one_mean_are_caught():
    assert torch.tensor(context_parallel_error(calculate_per_token_loss=False)) > 1e-2


def test_a_peak_on_a_gpu_begins_anew(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", begun.append)
    memory_trial.begin_peak(torch.device("cuda", 1))
    assert begun == [torch.device("cuda", 1)]


def test_a_peak_counts_bytes_and_begins_anew():
    device, size = torch.device("cpu"), 64 << 20
    memory_trial.begin_peak(device)
    before = memory_trial.peak_bytes(device)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert 0.9 * resident < before < 1.1 * resident
    block = torch.ones(size, dtype=torch.uint8)
    assert 0.9 * size < memory_trial.peak_bytes(device) - before < 1.5 * size
    del block
    memory_trial.begin_peak(device)
    assert memory_trial.peak_bytes(device) - before < 0.5 * size
    assert 0 < memory_trial._available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
