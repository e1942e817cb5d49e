"""xPos and the attention factor under a KV cache, packing, tensor and context parallelism: always the whole model's logits."""

import dataclasses
import math
import re
import tempfile
import types

import gloo
import numpy as np
import pytest
import rope_worker as worker
import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.rope_guard import LiveRopeError, verify_live_rope
from nemo_longctx.adapters.megatron.rope_module import self_attentions, temporary_rope
from nemo_longctx.adapters.megatron.rope_scale import ScoreScale, packed_positions
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.rotation import rotate
from nemo_longctx.rope.variants import Rope, parse


@pytest.fixture(scope="module", autouse=True)
def _single_process():
    was_installed = cpu.is_installed()
    cpu.install()
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    if not was_installed:
        cpu.uninstall()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "layer"), [*((name, 0) for name in worker.VARIANTS), ("yarn by layer type", 1)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_are_those_of_the_float64_rotation(name, layer, interleaved):
    """What reaches the core attention, as scores, against the plain NumPy path."""
    rope = parse(worker.VARIANTS[name])
    rope = Rope(base=rope.local_base) if layer else rope.everywhere
    model = worker.named(name, rotary_interleaved=interleaved)
    seen, given = [], []
    attention = self_attentions(model)[layer]
    project = attention.get_query_key_value_tensors
    attention.get_query_key_value_tensors = lambda *a, **k: given.append(project(*a, **k)) or given[-1]
    attention.core_attention.register_forward_pre_hook(lambda m, args: seen.append(args[:2]))
    with torch.no_grad():
        model(*worker.tokens(), None)
    (query, key), (q_raw, k_raw, _) = seen[0], given[0]
    at, kwargs = np.arange(worker.LENGTH), {"rotary_dim": 8, "interleaved": interleaved}
    ours = query[:, 0, 0].double() @ key[:, 0, 0].double().T
    expected = (
        rotate(q_raw[:, 0, 0].numpy(), at, rope, is_key=False, **kwargs)
        @ rotate(k_raw[:, 0, 0].numpy(), at, rope, is_key=True, **kwargs).T
    )
    causal = np.tril(np.ones_like(expected, dtype=bool))
    np.testing.assert_allclose(ours.numpy()[causal], expected[causal], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", worker.VARIANTS)
def test_a_cache_filled_in_steps_equals_the_full_pass(name):
    model = worker.named(name)
    ids, positions = worker.tokens()
    with torch.no_grad():
        full = model(ids, positions, None)
        context = StaticInferenceContext(1, worker.LENGTH)
        context.materialize_only_last_token_logits = False
        steps = []
        for start, end in ((0, 20), (20, 21), (21, 40), (40, worker.LENGTH)):
            here = slice(start, end)
            steps.append(model(ids[:, here], positions[:, here], None, inference_context=context, runtime_gather_output=True))
            context.increment_sequence_len_offset(end - start)
    close(torch.cat(steps, 1), full)


@pytest.mark.parametrize("name", worker.VARIANTS)
def test_packed_documents_equal_each_alone(name):
    model = worker.named(name)
    with torch.no_grad():
        together = model(*worker.tokens(), None, packed_seq_params=worker.thd(worker.DOCUMENTS))
    close(together, worker.documents_apart(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor_model", "context"])
def test_ranks_together_equal_one_process(kind):
    whole, given = {}, {}
    for name in worker.VARIANTS:
        model = worker.named(name)
        given[name, "weights"] = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
        with torch.no_grad():
            whole[name] = model(*worker.tokens(), None), worker.documents_apart(model)
    results = gloo.run_on(2, worker.run, kind, given)
    for name in worker.VARIANTS:
        for case in (0, 1):
            parts = [result[name][case] for result in results]
            if kind == "context":
                early, late = zip(*(part.chunk(2, 1) for part in parts), strict=True)
                parts = [torch.cat([*early, *reversed(late)], 1)]
            for part in parts:
                close(part, whole[name][case])


def test_positions_of_packed_documents():
    ends = torch.tensor([0, 8, 12])
    assert packed_positions(ends, 12, 0, 1).tolist() == [*range(8), *range(4)]
    assert packed_positions(ends, 6, 0, 2).tolist() == [0, 1, 6, 7, 0, 3]
    assert packed_positions(ends, 6, 1, 2).tolist() == [2, 3, 4, 5, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_positions_lie_on_the_device_of_the_queries(ranks):
    """Positions left on the CPU meet frequencies of a GPU. `meta` is a device without memory, so no GPU is needed."""
    group = types.SimpleNamespace(size=lambda: ranks, rank=lambda: ranks - 1)
    scale = ScoreScale(parse({"variant": "xpos"}), rotary_dim=8, interleaved=False, cp_group=group)
    for device in ("meta", "cpu"):
        q_positions, k_positions, length = scale._window_positions(4, 4, torch.device(device))
        assert {q_positions.device.type, k_positions.device.type} == {device}
        assert length == 4 * ranks
    assert k_positions.tolist() == ([0, 1, 2, 3] if ranks == 1 else [2, 3, 4, 5])


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
def test_windows_that_leave_the_number_format_are_refused(dtype, fits):
    """512 tokens a decay carry 32,768 positions in bf16 and fp32, as in the paper; not in fp16, nor twice as many."""
    scale = ScoreScale(
        parse({"variant": "xpos"}), rotary_dim=64, interleaved=False, cp_group=parallel_state.get_context_parallel_group()
    )
    x = torch.ones(2, 1, 1, 64, dtype=dtype)
    long = torch.ones(1, 1, 1, 64, dtype=dtype).expand(32_768, 1, 1, 64)
    if fits:
        (q, k), _ = scale(None, (x, long), {})
        assert q.isfinite().all()
        assert k.isfinite().all()
        assert (k != 0).all()
    with pytest.raises(ConfigError, match="set it to at least"):
        scale(None, (x, torch.cat([long, long]) if fits else long), {})


def test_a_refused_scale_base_names_one_that_fits():
    rope = {"variant": "xpos", "scale_base": 8.0}
    model = worker.build(rope)
    ids = torch.zeros(1, 2048, dtype=torch.long)
    with pytest.raises(ConfigError) as caught, torch.no_grad():
        model(ids, torch.arange(2048)[None], None)
    least = int(caught.value.mend.split("at least ")[1].split(",")[0])
    model = worker.build({**rope, "scale_base": least})
    with torch.no_grad():
        assert model(ids, torch.arange(2048)[None], None).isfinite().all()
    assert math.isclose(least, 8.0 * 1024 * -math.log(parse(rope).xpos_zeta(8)[0]) / (0.46 * math.log(3.4028e38)), abs_tol=1.01)


def test_inference_past_the_core_attention_is_refused():
    model = worker.build(worker.VARIANTS["xpos"])
    model.config.flash_decode = True
    context = StaticInferenceContext(1, 8)
    with pytest.raises(ConfigError, match="static batching"), torch.no_grad():
        self_attentions(model)[0](torch.zeros(4, 1, 32), None, inference_context=context)


def test_another_rope_in_one_layer_type_is_seen_live():
    """The guard reads each layer type's own frequencies, whatever the config says of them."""
    name = "yarn by layer type"
    asked, model = parse(worker.VARIANTS[name]), worker.named(name)
    assert "plain rope (base=1000.0) in 1 layers with a window" in verify_live_rope(model, asked)
    for other, message in (
        (dataclasses.replace(asked, local_base=1_001.0), "the model's layers with a window has"),
        (dataclasses.replace(asked, factor=5.0), "the model has"),
        (asked.everywhere, "rope.layers='two RoPEs'"),
    ):
        with pytest.raises(LiveRopeError, match=message):
            verify_live_rope(model, other)
    model._rope_hooks[0].remove()  # the layer that sees all tokens takes both tables for one
    with pytest.raises((LiveRopeError, RuntimeError)):
        verify_live_rope(model, asked)
    model = worker.named(name)
    model.rotary_pos_emb.local.inv_freq *= 2  # a tool's own table, in layers with a window alone
    type(model.rotary_pos_emb.local).forward.cache_clear()
    with pytest.raises(LiveRopeError, match="the model's layers with a window has"):
        verify_live_rope(model, asked)


def test_a_temporary_rope_leaves_two_tables_as_they_were():
    name = "yarn by layer type"
    asked, model = parse(worker.VARIANTS[name]), worker.named(name)
    with torch.no_grad():
        before = model(*worker.tokens(), None)
        with temporary_rope(model, Rope()):
            verify_live_rope(model, Rope())
            assert not torch.equal(model(*worker.tokens(), None), before)
        assert torch.equal(model(*worker.tokens(), None), before)
    verify_live_rope(model, asked)


def test_the_guard_says_of_which_layers_it_speaks():
    names = ("yarn", "yarn by layer type")
    plain, typed = (verify_live_rope(worker.named(name), parse(worker.VARIANTS[name])) for name in names)
    assert "layers that see all tokens" not in plain
    assert re.search(r", 2 layers, slowest pair [\d.e-]+ rad a token$", plain)
    assert re.search(r", 1 layers that see all tokens, .*; plain rope \(base=[\d.]+\) in 1 layers with a window$", typed)


@pytest.mark.parametrize("layers", [{}, {"window_size": (9, 0)}])
def test_two_ropes_need_layers_of_two_types(layers):
    with pytest.raises(ConfigError, match=r"rope.layers='full_attention': (no|every) layer of the model"):
        worker.build(worker.VARIANTS["yarn by layer type"], **layers)
