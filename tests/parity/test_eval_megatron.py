"""The Megatron-Core adapter against one uncached pass of the same model; two gloo processes against one."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core")
sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
import gloo
import small_gpt
from megatron.core import parallel_state

from nemo_longctx.adapters.megatron.inference import (
    MCoreCausalModel,
    _our_attention,
    data_group,
    evaluating,
    model_digest,
    vocab_parallel_log_probs,
)
from nemo_longctx.adapters.megatron.rope_module import transform_rope
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.eval.requests import Continuation, Generation, share_work
from nemo_longctx.eval.scoring import Chunks, Scorer
from nemo_longctx.eval.sharing import everywhere, run_shared
from nemo_longctx.eval.suite import HarnessResult, Suite, parse_tasks
from nemo_longctx.rope.variants import DynamicNtkRope, parse

VOCAB = 90  # the head has 96 rows: six are padding
CHUNKS = Chunks(read=7, logits=3 * 4 * VOCAB)


def never(_):
    return False


def requests():
    rng = np.random.default_rng(0)
    document = rng.integers(0, VOCAB, 60).tolist()
    stems = [[*document, *rng.integers(0, VOCAB, 5).tolist()] for _ in range(3)]
    jobs = [Continuation(context=stem, continuation=rng.integers(0, VOCAB, n).tolist()) for stem in stems for n in (1, 4)]
    jobs += [Continuation(context=document[:1], continuation=document[1:])]
    jobs += [Generation(context=document[:n], max_new_tokens=6, stop=never) for n in (60, 20)]
    jobs += [Generation(context=document[:30], max_new_tokens=6, stop=never, temperature=0.8)]
    return jobs


def results(model, jobs, indices=None):
    """index -> log-probabilities or tokens."""
    jobs_here = jobs if indices is None else [jobs[i] for i in indices]
    out = {}
    for place, result, _ in Scorer(model, chunks=CHUNKS).run(jobs_here):
        index = place if indices is None else indices[place]
        out[index] = result if isinstance(result, list) else (result.token_log_probs, result.is_greedy)
    return out


def assert_equal(got, want, atol):
    assert set(got) == set(want)
    for index, value in want.items():
        if isinstance(value, list):
            assert got[index] == value
        else:
            np.testing.assert_allclose(got[index][0], value[0], atol=atol)
            assert got[index][1] == value[1]


def run_one(settings=None, ours=True, **more):
    module = small_gpt.build(small_gpt.config(**(settings or {})), ours=ours, **more)
    widen(module)
    with evaluating(module):
        return results(MCoreCausalModel(module, vocab_size=VOCAB, max_length=256), requests())


def widen(module):
    """Weights wide enough that log-probabilities are far apart; the same for any split of the same tensor."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)


def test_scores_equal_one_uncached_pass():
    with small_gpt.parallel():
        module = small_gpt.build(small_gpt.config())
        widen(module)
        module.eval()
        jobs = requests()
        want = {}
        for index, job in enumerate(jobs):
            if isinstance(job, Continuation):
                tokens = torch.tensor([[*job.context, *job.continuation]])
                with torch.no_grad():
                    logits = module(tokens[:, :-1], torch.arange(tokens.shape[1] - 1)[None], None)[0, :, :VOCAB]
                logits = logits.float().log_softmax(-1)[len(job.context) - 1 :]
                targets = tokens[0, len(job.context) :]
                greedy = bool((logits.argmax(-1) == targets).all())
                want[index] = (logits.gather(-1, targets[:, None])[:, 0].numpy(), greedy)
        with evaluating(module):
            got = results(MCoreCausalModel(module, vocab_size=VOCAB, max_length=256), jobs)
        assert_equal({i: got[i] for i in want}, want, 2e-5)
        for index, job in enumerate(jobs):
            if isinstance(job, Generation):
                assert max(got[index]) < VOCAB
                if job.temperature == 0:
                    tokens = list(job.context)
                    for token in got[index]:
                        with torch.no_grad():
                            logits = module(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, -1, :VOCAB]
                        assert int(logits.argmax()) == token
                        tokens.append(token)


def test_stock_attention_reads_in_chunks_too():
    """Megatron-Core's own kernel drops the causal mask for a second chunk; the evaluation puts ours in its place."""
    with small_gpt.parallel():
        assert_equal(run_one(ours=False), run_one(ours=True), 2e-5)


def test_frequencies_that_follow_the_length_are_read_whole():
    """Megatron-Core takes the cache's room for the length of the input: a table for 256 would serve 40 tokens."""
    variant = DynamicNtkRope(base=10_000.0, factor=4.0, original_max_position_embeddings=16)
    with small_gpt.parallel():
        module = small_gpt.build(small_gpt.config())
        widen(module)
        transform_rope(module, variant)
        jobs = [job for job in requests() if isinstance(job, Continuation)]
        want = {}
        for index, job in enumerate(jobs):
            tokens = torch.tensor([[*job.context, *job.continuation]])
            with torch.no_grad():
                logits = module(tokens[:, :-1], torch.arange(tokens.shape[1] - 1)[None], None)[0, :, :VOCAB].float()
            logp = logits.log_softmax(-1)[len(job.context) - 1 :].gather(-1, tokens[0, len(job.context) :, None])[:, 0]
            want[index] = logp.numpy()
        with evaluating(module):
            got = results(MCoreCausalModel(module, vocab_size=VOCAB, max_length=256), jobs)
        for index, logp in want.items():
            np.testing.assert_allclose(got[index][0], logp, atol=2e-5)


def test_digest_tells_weights_settings_and_rope_apart():
    with small_gpt.parallel():
        module = small_gpt.build(small_gpt.config())
        digests = [model_digest(module), model_digest(module)]
        module.rotary_pos_emb.inv_freq = module.rotary_pos_emb.inv_freq / 2
        digests.append(model_digest(module))
        module.config.layernorm_epsilon *= 10
        digests.append(model_digest(module))
        with torch.no_grad():
            module.decoder.final_layernorm.weight[0] += 1e-3
        digests.append(model_digest(module))
        assert digests[0] == digests[1]
        assert len(set(digests)) == 4


def test_tied_embeddings():
    with small_gpt.parallel():
        got = run_one(share_embeddings_and_output_weights=True)
        assert np.isfinite(got[0][0]).all()


def test_training_state_is_as_before():
    with small_gpt.parallel():
        module = small_gpt.build(small_gpt.config(), ours=False)
        module.train()
        module.decoder.layers[0].eval()  # a frozen part stays as it was
        cores = [layer.self_attention.core_attention for layer in module.decoder.layers]
        state = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        keys = list(module.state_dict())
        with evaluating(module):
            results(MCoreCausalModel(module, vocab_size=VOCAB, max_length=256), requests())
            random.random(), np.random.rand(), torch.rand(1)
        assert module.training
        assert not module.decoder.layers[0].training
        assert module.decoder.layers[1].training
        assert module.post_process
        assert [layer.self_attention.core_attention for layer in module.decoder.layers] == cores
        assert list(module.state_dict()) == keys
        assert random.getstate() == state[0]
        np.testing.assert_array_equal(np.random.get_state()[1], state[1][1])
        assert torch.equal(torch.get_rng_state(), state[2])


def test_training_goes_on_from_what_layers_keep_of_an_evaluation():
    """Angles, and scales of q and k, are kept by their length: autograd, and the fused rotation, save them in the next step."""
    with small_gpt.parallel():
        module = small_gpt.build(small_gpt.config())
        transform_rope(module, parse({"variant": "xpos", "base": 1e4}))
        tokens, positions, labels = small_gpt.tokens(1, 256)
        with evaluating(module), torch.inference_mode():
            model = MCoreCausalModel(module, vocab_size=VOCAB, max_length=256)
            states = model.extend(tokens[0])
        assert not states.requires_grad
        assert not module.rotary_pos_emb(256, packed_seq=False).is_inference()
        module.train()(tokens, positions, None, labels=labels).mean().backward()


def test_what_only_training_can_do_is_off_in_an_evaluation(monkeypatch):
    """Products in fp8 take no single token, captured graphs and buffers of overlapped communication no other shape, and the
    rotation of the whole projection no cache."""
    fields = {"fp8": "hybrid", "enable_cuda_graph": True, "cuda_graph_impl": "local", "fused_single_qkv_rope": True}
    with small_gpt.parallel():
        module = small_gpt.build(small_gpt.config())
        want = run_one()
        widen(module)
        known = {name: value for name, value in fields.items() if hasattr(module.config, name)}
        for name, value in known.items():
            monkeypatch.setattr(module.config, name, value)
        layer = module.decoder.layers[0].self_attention.linear_proj
        layer.ub_overlap_rs_fprop = layer.ub_overlap_ag_fprop = True
        with evaluating(module):
            assert_equal(results(MCoreCausalModel(module, vocab_size=VOCAB, max_length=256), requests()), want, 2e-5)
            off = {"fp8": None, "cuda_graph_impl": "none"}
            assert {name: getattr(module.config, name) for name in known} == {name: off.get(name, False) for name in known}
            assert not layer.ub_overlap_rs_fprop
            assert not layer.ub_overlap_ag_fprop
        assert {name: getattr(module.config, name) for name in known} == known
        assert layer.ub_overlap_rs_fprop
        assert layer.ub_overlap_ag_fprop


@pytest.mark.parametrize("whole", [True, False])
def test_stages_hand_on_what_their_weights_are_of(whole):
    """NeMo's precision leaves float32 in the config of a model in bf16: the next stage then waited for twice the bytes."""
    with small_gpt.parallel():
        module = small_gpt.build(small_gpt.config(fp32_residual_connection=whole)).bfloat16()
        assert module.config.params_dtype == torch.float32
        model = MCoreCausalModel(module, vocab_size=VOCAB, max_length=256)
        assert (
            model.dtype == module.embedding(*small_gpt.tokens(1, 8)[:2]).dtype == (torch.float32 if whole else torch.bfloat16)
        )


def on_rank(rank, size, kind, weights):
    sizes = {
        "tp": {"tensor_model_parallel_size": 2},
        "cp": {"context_parallel_size": 2},
        "dp": {},
        "pp": {"pipeline_model_parallel_size": 2},
    }
    with small_gpt.model_parallel(**sizes[kind]):
        settings = dict(sizes[kind])
        if kind == "pp":
            settings["pipeline_dtype"] = torch.float32
            stage = {"pre_process": rank == 0, "post_process": rank == 1}
        module = small_gpt.build(small_gpt.config(**settings), **(stage if kind == "pp" else {}))
        load_whole(module, rank, size, kind, weights)
        jobs = requests()
        trained = train_once(module) if kind == "cp" else None
        with evaluating(module):
            model = MCoreCausalModel(module, vocab_size=VOCAB, max_length=256)
            out = results(model, jobs, share_work(jobs, size)[rank] if kind in ("cp", "dp") else None)
            if kind in ("cp", "dp"):
                check_sharing(model, jobs, out, rank)
            if kind == "dp":
                check_suite(model, Path(weights).parent, rank)
        if kind == "cp":
            assert torch.equal(trained, train_once(module))  # the rotary tables are the ranks' shares again
        return out


def check_sharing(model, jobs, mine, rank):
    """Every rank gets all results, and hears of an error that only one rank had."""
    together = run_shared(Scorer(model, chunks=CHUNKS), jobs, group=data_group(), quiet=True)
    assert len(together) == len(jobs)
    for index, value in mine.items():
        got = together[index]
        assert value == got if isinstance(value, list) else value[0].tolist() == got.token_log_probs.tolist()

    def stop(made):
        if rank == 1:
            raise OSError("the disk of one rank is full")
        return False

    broken = [Generation(context=[n, 1, 2, 3, n], max_new_tokens=2, stop=stop) for n in range(8)]
    with pytest.raises(RuntimeError, match="rank 1: OSError: the disk of one rank is full"):
        run_shared(Scorer(model, chunks=CHUNKS), broken, group=data_group(), quiet=True)
    only = run_shared(Scorer(model, chunks=CHUNKS), jobs[:1], group=data_group(), quiet=True)  # one rank has no work
    assert len(only) == 1


def check_suite(model, place, rank):
    """A task that fails on one rank, before, in or after its work, ends on both, and the next one runs."""
    task = {"kind": "position", "seq_length": 30, "documents": 4, "bins": 2}
    blocks = [
        {**task, "corpus": f"{place}/held_out" if rank == 0 else f"{place}/not_on_this_node"},
        {"kind": "lm_eval", "tasks": ["before", "after"]},
        {**task, "corpus": f"{place}/held_out", "seq_length": 20},
    ]

    def harness(one):
        if rank == 1 and one.tasks == ("before",):
            raise KeyError("no data on this node")
        run_shared(Scorer(model, chunks=CHUNKS), requests(), group=data_group(), quiet=True)
        if rank == 0 and one.tasks == ("after",):
            raise ValueError("no scorer on this node")
        return HarnessResult(tasks={one.tasks[0]: {"f1": 1.0}})

    suite = Suite(parse_tasks(blocks), tokenizer="not used here")
    result = suite.run(model, name="x", harness=harness, group=data_group(), quiet=True)
    assert set(result.position) == {"position_20"}
    assert result.tasks == {}
    assert set(result.errors) == {"position_30", "before", "after"}
    assert result.errors["position_30"].startswith("rank 1: ")
    assert "not_on_this_node" in result.errors["position_30"]
    assert result.errors["before"] == "rank 1: KeyError: 'no data on this node'"
    assert result.errors["after"] == "rank 0: ValueError: no scorer on this node"
    everywhere_same = everywhere((result.position["position_20"], result.errors))
    assert everywhere_same[0] == everywhere_same[1]


def train_once(module):
    tokens, positions, _ = small_gpt.tokens(1, 128)
    with torch.no_grad():
        return module(tokens, positions, None)


def load_whole(module, rank, size, kind, weights):
    """The weights that one process builds from its seed, cut to this rank's share."""
    whole = torch.load(weights)
    layers = len(module.decoder.layers)
    state = {}
    for name, parameter in module.state_dict().items():
        if "_extra_state" in name or parameter is None:
            continue
        source = name
        if kind == "pp" and name.startswith("decoder.layers."):
            number = int(name.split(".")[2])
            source = name.replace(f"layers.{number}.", f"layers.{number + rank * layers}.", 1)
        value = whole[source]
        if value.shape != parameter.shape:
            dim = next(d for d in range(value.dim()) if value.shape[d] != parameter.shape[d])
            if "linear_fc1" in name:  # gate and up are each split over the ranks
                value = torch.cat([half.chunk(size, dim)[rank] for half in value.chunk(2, dim)], dim)
            else:
                value = value.chunk(size, dim)[rank]
        state[name] = value
    module.load_state_dict(state, strict=False)


def every_kind(rank, size, weights):
    """All layouts in one pair of processes: starting one costs more than its work."""
    return {kind: on_rank(rank, size, kind, weights) for kind in ("tp", "cp", "dp", "pp")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Results of one process, and its weights as a file."""
    path = tmp_path_factory.mktemp("weights") / "whole.pt"
    with small_gpt.parallel():
        module = small_gpt.build(small_gpt.config())
        widen(module)
        rng = np.random.default_rng(1)
        with CorpusWriter(path.parent / "held_out", np.uint16) as writer:
            for _ in range(6):
                writer.add_document(rng.integers(0, VOCAB, 40))
        torch.save({k: v for k, v in module.state_dict().items() if v is not None and "_extra_state" not in k}, path)
        with evaluating(module):
            return results(MCoreCausalModel(module, vocab_size=VOCAB, max_length=256), requests()), str(path)


def test_two_processes_equal_one(alone):
    want, weights = alone
    parts = gloo.run_on(2, every_kind, weights)
    for kind in ("tp", "pp"):
        for part in parts:
            assert_equal(part[kind], want, 1e-5)
    for kind in ("cp", "dp"):
        assert not set(parts[0][kind]) & set(parts[1][kind])
        assert_equal(parts[0][kind] | parts[1][kind], want, 1e-5)


def test_argmax_of_equals_is_the_first():
    with small_gpt.parallel():
        group = torch.distributed.group.WORLD
        logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])
        _, greedy = vocab_parallel_log_probs(logits, torch.tensor([2, 0]), group)
        assert greedy.tolist() == [False, True]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_that_replaces_the_host_s_has_its_scale(scale):
    with small_gpt.parallel():
        layer = small_gpt.build(small_gpt.config()).decoder.layers[0].self_attention
        layer.config.softmax_scale = scale
        layer.core_attention.register_forward_pre_hook(never)
        ours = _our_attention(layer, parallel_state.get_context_parallel_group())
        assert ours.scale == scale
        assert ours._forward_pre_hooks is layer.core_attention._forward_pre_hooks
        assert not ours.training
