"""Memory and time of random layouts against a plainer account that lists each tensor and each message by itself."""

import dataclasses
import math
import random

import pytest

from nemo_longctx.planning import memory, timing
from nemo_longctx.planning.gpus import GIB, GPUS
from nemo_longctx.planning.layout import PRECISIONS, Layout
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import ModelShape
from nemo_longctx.planning.timing import Rates, StepTime, check_mfu, rates_for, seconds_at_mfu, step_time

# Bytes of a weight, its gradient, its optimizer state and of an activation.
BYTES = {"fp32": (4, 4, 8, 4), "bf16": (2, 4, 12, 2), "fp8": (4, 4, 12, 2), "fsdp_bf16": (4, 4, 8, 2)}
KERNELS = ("flash", "flash", "scores")


def samples(count):
    """Random models in random layouts, with a length and a batch that they can run."""
    draw = random.Random(3)
    for _ in range(count):
        tp, pp, cp, dp = (draw.choice(sizes) for sizes in ((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 3)))
        chunks, micro, block = (
            draw.choice((None, 1, 2, 3)),
            draw.choice((1, 2)),
            draw.choice(("none", "full", "block:1", "block:2")),
        )
        groups, per_group, width = draw.choice((4, 8)), draw.choice((1, 3)), draw.choice((8, 64))
        model = ModelShape(
            num_layers=pp * (chunks or 1) * draw.choice((1, 2, 5)), hidden_size=draw.choice((96, 512)),
            ffn_hidden_size=draw.choice((128, 1000)), num_attention_heads=groups * per_group, num_query_groups=groups,
            kv_channels=width, vocab_size=draw.choice((500, 40_000, 300_000)), gated_linear_unit=draw.random() < 0.7,
            share_embeddings_and_output_weights=draw.random() < 0.3, add_qkv_bias=draw.random() < 0.3,
        )  # fmt: skip
        layout = Layout(
            gpus=tp * pp * cp * dp, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
            context_parallel_size=cp, virtual_pipeline_model_parallel_size=chunks, sequence_parallel=draw.random() < 0.6,
            micro_batch_size=micro, recompute=draw.choice(("selective", block)),
            offload=draw.choice(("none", "full", "block:1", "block:3")), sharding=draw.choice(("none", "optimizer", "full")),
            precision=draw.choice(tuple(BYTES)), grad_reduce_in_fp32=draw.random() < 0.5,
            loss=draw.choice(("vocab_parallel", "eager", "chunked")), attention_kernel=draw.choice(KERNELS),
            unfused=draw.random() < 0.4,
        )  # fmt: skip
        yield model, layout, draw.choice((64, 1024, 16_384)), micro * dp * draw.choice((1, 2, 5, 12)), draw


def tensors(model, layout, seq_length):
    """What autograd keeps of one layer, by kind: elements a token of this rank."""
    h, f, tp = model.hidden_size, model.ffn_hidden_size, layout.tensor_model_parallel_size
    q, kv = (heads * model.kv_channels / tp for heads in (model.num_attention_heads, model.num_query_groups))
    residual = h / tp if layout.sequence_parallel else h
    kept = {"input": [residual], "norms": [residual] * 3, "attention": [q, kv, kv, q], "mlp": [f / tp, f / tp]}
    if model.gated_linear_unit:
        kept["mlp"].append(f / tp)
    if layout.unfused:
        kept["norms"] += [residual, residual]  # what is normalised, before its weight
        kept["unrotated"] = [q, kv, kv]
        kept["glu"] = [f / tp, f / tp] if model.gated_linear_unit else []
    if layout.attention_kernel == "scores":
        kept["scores"] = [seq_length] * (model.num_attention_heads // tp) + [seq_length * (model.num_attention_heads % tp) / tp]
    return {kind: sum(each) for kind, each in kept.items()}


def named(name, layers):
    """The layers of a chunk that `none`, `full`, `selective` or `block:N` means."""
    return layers if name == "full" else min(int(name[6:]), layers) if name.startswith("block:") else 0


def chunk(model, layout, seq_length):
    """Elements a token that a model chunk keeps on the GPU and in host memory, layer by layer."""
    kept = tensors(model, layout, seq_length)
    layers = model.num_layers // layout.pipeline_model_parallel_size // (layout.virtual_pipeline_model_parallel_size or 1)
    here = away = 0.0
    for layer in range(layers):
        held = dict(kept)
        if layer < named(layout.recompute, layers):
            held = {"input": kept["input"]}
        elif layout.recompute == "selective":
            if layout.attention_kernel == "scores":
                del held["scores"]
            else:
                held |= {"mlp": 0.0, "glu": 0.0}
        moves = layer < named(layout.offload, layers)
        for kind, size in held.items():
            stays = kind == "attention" and layout.context_parallel_size > 1
            here, away = (here, away + size) if moves and not stays else (here + size, away)
    return here, away, layers


def in_flight(layout, stage, microbatches):
    """Chunks between their forward and their backward pass at most, in the 1F1B schedule or the interleaved one."""
    behind, chunks = layout.pipeline_model_parallel_size - stage - 1, layout.virtual_pipeline_model_parallel_size or 1
    before = behind if chunks == 1 else 2 * behind + (chunks - 1) * layout.pipeline_model_parallel_size
    live = most = 0
    for forward in range(microbatches * chunks):
        live += 1
        most = max(most, live)
        live -= forward >= before
    return most


def plain_memory(model, layout, stage, seq_length, batch, eval_length, device):
    """Bytes by part of one GPU of a stage."""
    weight, gradient, optimizer, wide = BYTES[layout.precision]
    tp, pp, cp, dp = (
        getattr(layout, f"{name}_parallel_size") for name in ("tensor_model", "pipeline_model", "context", "data")
    )
    h, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size / tp
    q, kv = (heads * model.kv_channels / tp for heads in (model.num_attention_heads, model.num_query_groups))
    first, last, gate = stage == 0, stage == pp - 1, 3 if model.gated_linear_unit else 2
    matrices = [h * q, h * kv, h * kv, q * h, *[h * f / tp] * gate, *([q, kv, kv] if model.add_qkv_bias else [])]
    tables = 1 if first and last and model.share_embeddings_and_output_weights else first + last
    held = (sum(matrices) + 2 * h) * model.num_layers / pp + tables * v * h + h * last
    tokens = layout.micro_batch_size * seq_length / cp
    here, away, layers = chunk(model, layout, seq_length)
    flying = in_flight(layout, stage, batch // (layout.micro_batch_size * dp))
    residual = h / tp if layout.sequence_parallel else h
    kept = tensors(model, layout, seq_length)
    # The loss: logits, and in fp32 what it makes of them; then gradients of the head and of its input.
    logit = {"eager": 12, "vocab_parallel": 4, "chunked": 4}[layout.loss] + (wide if wide == 2 else 0)
    head, logits = v * h * wide, tokens * v * logit
    if layout.loss == "chunked":
        most, budget = {"cpu": (512, 2**26), "cuda": (4096, 2**31)}[device]
        logits, head = min(most, tokens, budget / (4 * v)) * v * logit, v * h * 4
    working = gate * f / tp + h
    if layout.attention_kernel == "scores":
        working = max(working, 2 * kept["scores"])
    if named(layout.recompute, layers) == layers:
        working += sum(kept.values())
    elif layout.recompute == "selective":
        working += kept["scores"] if layout.attention_kernel == "scores" else kept["mlp"] + kept.get("glu", 0)
    messages = 2 * tokens * h * wide if layout.sequence_parallel and tp > 1 else 0
    messages += 6 * tokens * kv * wide if cp > 1 else 0
    if layout.sharding == "full" and dp * cp > 1:
        whole = sum(matrices) + 2 * h / tp
        messages += (4 * whole + v * h) * wide
    return {
        "weights": held * weight / (dp * cp if layout.sharding == "full" else 1),
        "gradients": held * (gradient if layout.grad_reduce_in_fp32 else wide) / (dp * cp if layout.sharding == "full" else 1),
        "optimizer": held * optimizer / (1 if layout.sharding == "none" else dp * cp),
        "activations": tokens * wide * (here * flying + residual * (first + 2 * last)),
        "logits": (logits + tokens * h * wide + head) * last,
        "workspace": (tokens * working + model.vocab_size * h / tp) * wide,
        "communication": messages,
        "kv_cache": eval_length * model.num_layers / pp * 2 * kv * wide,
        "offloaded": tokens * wide * away * flying,
    }


def plain_total(parts):
    static = sum(parts[name] for name in ("weights", "gradients", "optimizer", "communication"))
    return static + max(parts["activations"] + max(parts["logits"], parts["workspace"]), parts["kv_cache"])


def test_every_part_of_the_memory_is_that_of_its_tensors():
    assert {name: dataclasses.astuple(each)[1:] for name, each in PRECISIONS.items()} == BYTES
    fullest = set()
    for model, layout, seq_length, batch, draw in samples(400):
        eval_length, device = draw.choice((0, 0, 2**20)), draw.choice(("cuda", "cpu"))
        stages = sorted({0, layout.pipeline_model_parallel_size - 1})
        wanted = [plain_memory(model, layout, stage, seq_length, batch, eval_length, device) for stage in stages]
        sizes = {"seq_length": seq_length, "global_batch_size": batch, "eval_length": eval_length, "device": device}
        plan = memory_plan(model, layout, **sizes)
        most = max(wanted, key=plain_total)
        assert plan.pipeline_stage == stages[wanted.index(most)]
        assert plan.framework == (2 * GIB if device == "cuda" else 0)
        for part, size in most.items():
            assert math.isclose(getattr(plan, part), size, rel_tol=1e-9), (part, model, layout)
        assert math.isclose(plan.total, plain_total(most) + plan.framework, rel_tol=1e-9)
        gib = plan.as_gib()
        assert set(gib) == {*most, "framework", "total"} - {"offloaded"}
        assert all(size == pytest.approx(getattr(plan, part) / 2**30) for part, size in gib.items())
        assert memory_plan(model, layout, **sizes, framework_bytes=7.0).framework == 7
        tokens = layout.micro_batch_size * seq_length / layout.context_parallel_size
        moved = tokens * BYTES[layout.precision][3] * chunk(model, layout, seq_length)[1]
        assert math.isclose(memory.offloaded_bytes(model, layout, seq_length), moved * layout.model_chunks, rel_tol=1e-9)
        fullest.add((plan.pipeline_stage == 0, plan.logits > plan.workspace, plan.kv_cache > plan.activations))
    assert len(fullest) == 8  # either end, either peak, with the cache above it and below


def plain_time(model, layout, gpu, seq_length, batch, rates):
    """Seconds of a step by part."""
    tp, pp, cp, dp = (
        getattr(layout, f"{name}_parallel_size") for name in ("tensor_model", "pipeline_model", "context", "data")
    )
    h, q, kv = model.hidden_size, *(n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    wide, chunks = BYTES[layout.precision][3], layout.virtual_pipeline_model_parallel_size or 1
    microbatches, layers = batch // (layout.micro_batch_size * dp), model.num_layers
    tokens = layout.micro_batch_size * seq_length
    mlp, projections = (3 if model.gated_linear_unit else 2) * h * model.ffn_hidden_size, h * (2 * q + 2 * kv)
    # A pass is two operations a weight; backward is two of them. A query sees half of the keys, with two products of q each.
    weights, core, mlp_again, projections_again, core_again = 3 * (mlp + projections), 3.0, 0.0, 0.0, 0.0
    share = named(layout.recompute, layers // (pp * chunks)) / (layers // (pp * chunks))
    mlp_again, projections_again, core_again = mlp * share, projections * share, share
    if layout.recompute == "selective":
        mlp_again, core_again = (0, 1) if layout.attention_kernel == "scores" else (mlp, 0)
    matrices = 2 * layers * (weights + mlp_again + projections_again) + 6 * model.vocab_size * h
    attention = 2 * layers * (core + core_again) * 2 * q * seq_length / 2
    gpu_tokens = tokens / (tp * pp * cp)
    matrices, attention = (
        matrices * gpu_tokens / (rates.linear_tflops * 1e12),
        attention * gpu_tokens / (rates.attention_tflops * 1e12),
    )

    def link(ranks):
        return 0.7e9 * (gpu.nvlink_gb_s if ranks <= gpu.gpus_per_node else gpu.network_gb_s)

    mine = layers / pp
    # Four gathers or scatters of the residual a layer in each direction, of which each rank has its part already.
    tensor = mine * 8 * (tokens / cp) * h * wide * (tp - 1) / tp / link(tp) * (0.3 if tp <= gpu.gpus_per_node else 1)
    # Keys and values go round forward and backward, and their gradients backward.
    ring = mine * 3 * (cp - 1) * (tokens / cp) * (2 * kv / tp) * wide / link(tp * cp)
    ring = max(0, ring - attention)
    moved = 2 * tokens / cp * wide * chunk(model, layout, seq_length)[1] * chunks / (0.7e9 * gpu.host_gb_s)
    busy = microbatches * (matrices + attention + tensor + ring + moved)
    gradient = BYTES[layout.precision][1] if layout.grad_reduce_in_fp32 else wide
    held = model.parameters / (tp * pp)
    traffic = held * (gradient + 2) * (dp * cp - 1) / (dp * cp)
    if layout.sharding == "full" and dp * cp > 1:
        traffic += 4 * held * (microbatches - 1)
    reduced = max(0, traffic / link(layout.gpus) - (matrices + attention) / 2)
    parts = {"compute": microbatches * (matrices + attention), "tensor_parallel": microbatches * tensor}
    parts |= {"context_parallel": microbatches * ring, "data_parallel": reduced, "offload": microbatches * moved}
    return {**parts, "bubble": busy * (pp - 1) / (chunks * microbatches)}


def test_every_part_of_the_time_is_that_of_its_products_and_messages():
    some = dict.fromkeys(("tensor_parallel", "context_parallel", "data_parallel", "offload", "bubble"), 0)
    for model, layout, seq_length, batch, draw in samples(400):
        gpu = dataclasses.replace(
            GPUS["h100"], gpus_per_node=draw.choice((2, 4, 8)), nvlink_gb_s=draw.choice((1, 450)),
            network_gb_s=draw.choice((0.5, 50)),
        )  # fmt: skip
        rates = draw.choice((None, Rates(linear_tflops=70.0, attention_tflops=40.0, source="here")))
        time = step_time(model, layout, gpu, seq_length=seq_length, global_batch_size=batch, rates=rates)
        wanted = plain_time(model, layout, gpu, seq_length, batch, rates or rates_for(gpu, layout.precision))
        for part, seconds in wanted.items():
            assert math.isclose(getattr(time, part), seconds, rel_tol=1e-9, abs_tol=1e-18), (part, model, layout)
        total = sum(wanted.values())
        assert math.isclose(time.total, total, rel_tol=1e-9)
        assert math.isclose(time.tokens_per_second_per_gpu, batch * seq_length / layout.gpus / total, rel_tol=1e-9)
        some = {part: count + (wanted[part] > 0) for part, count in some.items()}
    assert all(50 < count < 350 for count in some.values()), some


def test_rates_are_the_fitted_ones_or_stated_shares_of_the_bf16_peak():
    for gpu in GPUS.values():
        for precision, share in {"bf16": 0.55, "fp8": 0.80, "fsdp_bf16": 0.50, "fp32": 0.05}.items():
            if precision == "fp8" and gpu.name in ("a100", "h100", "b200"):
                continue
            rates = rates_for(gpu, precision)
            assert (rates.linear_tflops, rates.attention_tflops) == (share * gpu.bf16_tflops, 0.28 * gpu.bf16_tflops)
            assert rates.source == f"assumed: {share:.0%} and 28% of {gpu.name}'s bf16 peak"
            assert rates.stated_error is None
    for name, known in {"h100": (827, 267), "b200": (1689, 805)}.items():
        rates = rates_for(GPUS[name], "fp8")
        assert (rates.linear_tflops, rates.attention_tflops, rates.stated_error) == (*known, 0.10)
    assert (memory.STATED_ERROR, timing.STATED_ERROR, timing.STATED_ERROR_ACROSS_CP) == (0.10, 0.10, 0.50)


def test_a_step_s_total_is_of_all_its_parts():
    parts = [field.name for field in dataclasses.fields(StepTime)]
    for part in parts:
        seconds = dict.fromkeys(parts, 0.0) | {part: 3.0}
        assert StepTime(**seconds).total == (0 if part == "tokens_per_second_per_gpu" else 3)


@pytest.mark.parametrize("mfu", [True, False, "0.4", None, 0, -0.1, 2.0001, float("nan")])
def test_what_is_no_mfu_is_refused_by_the_key_that_gave_it(mfu):
    for key in ("mfu", "measured"):
        with pytest.raises(ValueError, match=f"^{key}=.*: must be a share of the bf16 peak, such as 0.4"):
            check_mfu(mfu, **({} if key == "mfu" else {"key": key}))
    with pytest.raises(ValueError, match="share of the bf16 peak"):
        seconds_at_mfu(1e15, GPUS["h100"], gpus=8, mfu=mfu)
    check_mfu(2)
    assert seconds_at_mfu(8 * 989e12, GPUS["h100"], gpus=4, mfu=0.25) == pytest.approx(8)
