"""The planner's choices against a plain enumeration: which layouts, in which order, why they lost, and the longest length."""

import dataclasses
import itertools
import math
from dataclasses import replace

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.planning import planner
from nemo_longctx.planning.gpus import GIB, GPUS
from nemo_longctx.planning.layout import Layout, layout_faults
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import ModelShape
from nemo_longctx.planning.planner import FILL, Job, activation_choices, candidates, judge, judge_run, longest_length, search
from nemo_longctx.planning.timing import StepTime, step_time

SMALL = ModelShape(num_layers=12, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, vocab_size=4000)
GPU = replace(GPUS["h100"], memory_gib=8.0, gpus_per_node=4)
JOB = Job(model=SMALL, gpu=GPU, seq_length=4096, tokens_per_step=16 * 4096)
FREE = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size", "micro_batch_size", "recompute",
        "virtual_pipeline_model_parallel_size", "sequence_parallel")  # fmt: skip


def plain_candidates(model, gpu, gpus):
    """What a search tries, by its fields in the order of FREE."""
    for tp, cp, pp, micro in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4)):
        if tp > gpu.gpus_per_node or gpus % (tp * cp * pp) or pp > model.num_layers:
            continue
        layers = model.num_layers / pp
        chunks = [None]
        if pp > 1 and layers == int(layers):
            divisors = [v for v in range(2, int(layers) + 1) if layers % v == 0]
            chunks += sorted({min(divisors), max(divisors)}) if divisors else []
        for chunk in chunks:
            half = max(1, int(layers / (chunk or 1)) // 2)
            for recompute in ("none", "selective", f"block:{half}", "full"):
                yield tp, cp, pp, micro, recompute, chunk, tp > 1


@pytest.mark.parametrize(("gpus", "node"), [(1, 8), (4, 2), (6, 8), (16, 72), (16, 4)])
@pytest.mark.parametrize("layers", [1, 6, 16])
def test_a_search_tries_powers_of_two_within_a_node_and_no_layout_twice(gpus, node, layers):
    model, gpu, base = replace(SMALL, num_layers=layers), replace(GPU, gpus_per_node=node), Layout(gpus=gpus, loss="eager")
    found = list(candidates(model, gpu, base))
    fields = [tuple(getattr(layout, name) for name in FREE) for layout in found]
    assert len(fields) == len(set(fields))
    assert set(fields) == set(plain_candidates(model, gpu, gpus))
    kept = {field.name for field in dataclasses.fields(Layout)} - set(FREE)
    assert all(getattr(layout, name) == getattr(base, name) for layout in found for name in kept)


def parts_of(time):
    """What a step can lose, and the words for it."""
    return {
        "runs layers again for the backward pass": time.compute,
        "tensor-parallel traffic that nothing covers": time.tensor_parallel,
        "context-parallel ring outlasts attention": time.context_parallel,
        "gradient reduction outlasts the backward pass": time.data_parallel,
        "pipeline bubble": time.bubble,
        "activations on their way to host memory and back": time.offload,
    }


def test_a_search_ranks_by_time_then_plainness_then_memory_and_says_why():
    base = Layout(gpus=8, loss="chunked")
    job = replace(JOB, model=replace(SMALL, num_layers=24, hidden_size=2048, ffn_hidden_size=8192))
    judged = [(layout, *judge(job, layout)) for layout in candidates(job.model, GPU, base)]
    ranked = search([job], base)
    assert len(ranked) == len(judged)

    def key(each):
        layout, candidate, time = each
        if time is None:
            return 2, 0.0
        if candidate.verdict == "does not fit":
            return 1, candidate.memory_gib
        plain = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size or 1)
        return 0, round(math.log(time.total) / 0.005), plain, layout.tensor_model_parallel_size, candidate.memory_gib

    wanted = sorted(judged, key=key)
    assert [each.layout for each in ranked] == [layout for layout, _, _ in wanted]
    best = wanted[0][2]
    for place, (candidate, (_, alone, time)) in enumerate(zip(ranked, wanted, strict=True)):
        assert replace(candidate, verdict="", reason="") == replace(alone, verdict="", reason="")
        if alone.verdict != "slower":
            assert candidate == alone
            continue
        assert (candidate.verdict, bool(candidate.reason)) == (("slower", True) if place else ("fastest", False))
        lost = {why: seconds - parts_of(best)[why] for why, seconds in parts_of(time).items()}
        why = max(lost, key=lost.get)
        share = time.total / best.total - 1
        if place and share >= 0.005:
            assert candidate.reason == f"{share:.1%} slower, mostly: {why} (+{lost[why]:.2f} s a step)"
        elif place:
            assert candidate.reason.startswith(f"{share:+.1%}: as fast within what the plan knows")
    assert {each.verdict for each in ranked} == {"fastest", "slower", "does not fit", "cannot run"}


@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(StepTime)][:-1])
def test_a_slower_layout_names_the_part_that_it_loses_most_by(part):
    names = [field.name for field in dataclasses.fields(StepTime)]
    best = StepTime(**dict.fromkeys(names, 100.0))
    lost = replace(best, **{part: 107.0})
    for other in set(names) - {part, "tokens_per_second_per_gpu"}:
        why = planner._why_slower(replace(lost, **{other: 106.0}), best)
        assert f" slower, mostly: {next(w for w, s in parts_of(lost).items() if s == 107)} (+7.00 s a step)" in why
    assert planner._why_slower(replace(best, **{part: 103.1}), best).startswith("0.5% slower")  # 3 of 600
    assert planner._why_slower(replace(best, **{part: 102.9}), best).startswith("+0.5%: as fast")


def test_a_layout_fits_up_to_the_share_that_may_be_filled(monkeypatch):
    assert FILL == 0.92
    layout = Layout(gpus=8)
    total = memory_plan(SMALL, layout, seq_length=4096, global_batch_size=16).total / GIB
    monkeypatch.setattr(planner, "FILL", 1.0)
    fits, time = judge(replace(JOB, gpu=replace(GPU, memory_gib=total)), layout)
    alone = step_time(SMALL, layout, GPU, seq_length=4096, global_batch_size=16)
    assert (fits.verdict, fits.reason, fits.memory_gib, time) == ("slower", "", total, alone)
    assert (fits.seconds, fits.tokens_per_second_per_gpu) == (alone.total, alone.tokens_per_second_per_gpu)
    monkeypatch.setattr(planner, "FILL", 0.5)
    job = replace(JOB, gpu=replace(GPU, memory_gib=4.0), eval_length=2**22)
    over, time = judge(job, layout)
    plan = memory_plan(SMALL, layout, seq_length=4096, global_batch_size=16, eval_length=2**22)
    assert (over.verdict, over.memory_gib, over.seconds) == ("does not fit", plan.total / GIB, time.total)
    assert plan.kv_cache > plan.total / 2
    assert over.reason == (
        f"needs {plan.total / GIB:.0f} GiB of the 2 GiB that may be filled; "
        f"the largest part is kv_cache, {plan.kv_cache / GIB:.0f} GiB"
    )
    cannot, time = judge(JOB, replace(layout, virtual_pipeline_model_parallel_size=5))
    faults = layout_faults(SMALL, cannot.layout, 4096, 16)
    assert len(faults) == 2
    assert (cannot.verdict, cannot.reason, cannot.memory_gib, cannot.seconds, time) == (
        "cannot run", "; ".join(faults), None, None, None
    )  # fmt: skip


def test_a_run_has_the_worst_verdict_of_its_stages_and_their_fullest_peak():
    layout = Layout(gpus=8, tensor_model_parallel_size=4, loss="chunked")
    jobs = [
        replace(JOB, seq_length=length, tokens_per_step=2**18, steps=n) for length, n in ((2048, 5), (2**16, 2), (2**17, 1))
    ]
    alone = [judge(job, layout) for job in jobs]
    room = [candidate.memory_gib / FILL for candidate, _ in alone]
    assert room == sorted(room)
    mean = {
        field.name: sum(job.steps * getattr(time, field.name) for job, (_, time) in zip(jobs, alone, strict=True)) / 8
        for field in dataclasses.fields(StepTime)
    }
    for place, memory in ((0, room[2] * 1.01), (1, room[1] * 1.01), (2, room[0] * 1.01), (3, room[0] * 0.99)):
        stages = [replace(job, gpu=replace(GPU, memory_gib=memory)) for job in jobs]
        whole, time = judge_run(stages, layout)
        assert (whole.verdict, whole.memory_gib) == ("does not fit" if place else "slower", alone[2][0].memory_gib)
        assert bool(whole.reason) == bool(place)
        if place:
            assert whole.reason == f"at {2**17:,} tokens: {judge(stages[2], layout)[0].reason}"
        for part in set(mean) - {"tokens_per_second_per_gpu"}:
            assert getattr(time, part) == pytest.approx(mean[part])
        assert whole.seconds == time.total
        assert time.tokens_per_second_per_gpu == pytest.approx(2**18 / time.total / 8)
        assert whole.tokens_per_second_per_gpu == time.tokens_per_second_per_gpu
    assert judge_run(jobs[1:2], layout) == judge(jobs[1], layout)
    # One that cannot run is worse than one that does not fit, and there is no step to speak of.
    odd = replace(jobs[0], seq_length=2**15 + 2, gpu=replace(GPU, memory_gib=0.1))
    whole, time = judge_run([replace(jobs[2], gpu=odd.gpu), odd], layout)
    assert (whole.verdict, whole.seconds, time) == ("cannot run", None, None)
    assert whole.reason == f"at 32,770 tokens: {judge(odd, layout)[0].reason}"


@pytest.mark.parametrize(("layers", "half"), [(12, 6), (3, 1), (1, 1)])
def test_choices_are_the_named_ones_and_the_layout_s_own(layers, half):
    job = replace(JOB, model=replace(SMALL, num_layers=layers))
    named = [("none", "none"), ("selective", "none"), (f"block:{half}", "none"), ("full", "none"), ("none", "full")]
    named += [("selective", "full"), ("full", "full")]
    rows = activation_choices(job, Layout(gpus=8))
    assert [(row["recompute"], row["offload"]) for row in rows] == named
    own = activation_choices(job, Layout(gpus=8, offload="block:1"))
    assert [(row["recompute"], row["offload"]) for row in own] == [*named, ("none", "block:1")]
    split = Layout(gpus=8, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3)
    assert layers != 12 or ("block:1", "none") in [(row["recompute"], row["offload"]) for row in activation_choices(job, split)]
    kept = judge(job, Layout(gpus=8))
    for row in rows:
        layout = Layout(gpus=8, recompute=row["recompute"], offload=row["offload"])
        candidate, time = judge(job, layout)
        plan = memory_plan(job.model, layout, seq_length=4096, global_batch_size=16)
        assert (row["memory_gib"], row["seconds"]) == (candidate.memory_gib, time.total)
        assert row["saves_gib"] == kept[0].memory_gib - candidate.memory_gib
        assert row["costs"] == time.total / kept[1].total - 1
        assert row["host_gib"] == plan.offloaded / GIB
    between = replace(GPU, memory_gib=(rows[0]["memory_gib"] + rows[3]["memory_gib"]) / 2 / FILL)
    fits = {
        (row["recompute"], row["offload"]): row["fits"] for row in activation_choices(replace(job, gpu=between), Layout(gpus=8))
    }
    assert (fits["none", "none"], fits["full", "none"]) == (False, True)


def test_the_longest_length_is_the_longest_of_all_that_are_tried():
    """Each layout and each length in turn, up to 32 Ki tokens."""
    for base, pinned in ((Layout(gpus=4), ()), (Layout(gpus=4, micro_batch_size=2), ("micro_batch_size",))):
        gpu = replace(GPU, memory_gib=2.6)
        best = 0
        for layout in candidates(SMALL, gpu, base):
            if (layout.recompute, layout.virtual_pipeline_model_parallel_size) != ("full", None):
                continue
            if layout.micro_batch_size != base.micro_batch_size:
                continue
            batch = layout.micro_batch_size * layout.data_parallel_size * layout.pipeline_model_parallel_size
            for length in range(1024, 2**15 + 1, 1024):
                peak = memory_plan(SMALL, layout, seq_length=length, global_batch_size=batch).total / GIB
                if peak <= gpu.memory_gib * FILL and not layout_faults(SMALL, layout, length, batch):
                    best = max(best, length)
        found = longest_length(SMALL, gpu, base, pinned, limit=2**15)
        assert found.seq_length == best
        assert 1024 < best < 2**15
        chosen = found.layout
        assert (chosen.recompute, chosen.micro_batch_size) == ("full", base.micro_batch_size)
        batch = chosen.micro_batch_size * chosen.data_parallel_size * chosen.pipeline_model_parallel_size
        assert found.memory_gib == memory_plan(SMALL, chosen, seq_length=best, global_batch_size=batch).total / GIB
    assert longest_length(SMALL, GPUS["h200"], Layout(gpus=1), limit=9 * 1024).seq_length == 9 * 1024


@pytest.mark.parametrize(("context", "tensor", "unit"), [(3, 1, 3072), (2048, 1, 4096), (1024, 2, 4096), (5, 2, 5120)])
def test_the_longest_length_is_one_that_its_ranks_can_share(context, tensor, unit):
    """With --cp 3 a length was named that no run takes: 2 x CP did not divide it."""
    sizes = {"context_parallel_size": context, "tensor_model_parallel_size": tensor}
    base = Layout(gpus=context * tensor, **sizes)
    found = longest_length(SMALL, GPU, base, sizes, limit=unit * 5 + unit // 2)
    assert found.seq_length == unit * 5
    assert not layout_faults(SMALL, found.layout, found.seq_length, 1)


def test_what_no_layout_can_do_is_said():
    with pytest.raises(ConfigError) as error:
        longest_length(SMALL, replace(GPU, memory_gib=2.0), Layout(gpus=2))
    assert str(error.value) == "gpus=2: 2 x h100 cannot hold 1,024 tokens of this model; take more GPUs"
    pinned = ("tensor_model_parallel_size", "sequence_parallel")
    for call in (lambda base: longest_length(SMALL, GPU, base, pinned), lambda base: search([JOB], base, pinned)):
        with pytest.raises(ConfigError) as error:
            call(Layout(gpus=2))
        kept = "sequence_parallel=True, tensor_model_parallel_size=1"
        wanted = "gpus=2: no layout of so many GPUs keeps {}; leave one of them to the search"
        assert str(error.value).startswith(wanted.split("{}", maxsplit=1)[0])
        assert kept in str(error.value)
    odd = replace(SMALL, num_attention_heads=1, ffn_hidden_size=1407)
    with pytest.raises(ConfigError, match="gpus=3: no layout can run: TP 3 does not divide the 1 key/value heads"):
        longest_length(odd, GPU, Layout(gpus=3, tensor_model_parallel_size=3), ("tensor_model_parallel_size",))


@pytest.mark.parametrize("lengths", [(4096,), (2048, 6144)])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(gpus=3),
        Layout(gpus=6, tensor_model_parallel_size=2, micro_batch_size=2),
        Layout(gpus=12, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=3),
    ],
    ids=lambda layout: layout.short_name(),
)
def test_the_nearest_step_is_the_nearest_of_all_that_run(layout, lengths):
    stages = [replace(JOB, seq_length=length, tokens_per_step=64 * 6144) for length in lengths]
    runs = [
        tokens
        for tokens in range(6144, 128 * 6144, 2048)
        if all(tokens % job.seq_length == 0 for job in stages)
        and not any(layout_faults(SMALL, layout, job.seq_length, tokens // job.seq_length) for job in stages)
    ]
    staged = [layout] * len(stages)
    best = min(abs(tokens - 64 * 6144) for tokens in runs)
    assert abs(planner.nearest_step(stages, [staged]) - 64 * 6144) == best
    odd = [replace(layout, context_parallel_size=3, gpus=3 * layout.gpus)] * len(stages)  # 2 x 3 does not divide the tokens
    assert planner.nearest_step(stages, [odd, staged]) == planner.nearest_step(stages, [staged])
    assert planner.nearest_step([replace(JOB, seq_length=4096)], [odd[:1]]) is None


def test_a_job_s_batch_is_its_whole_sequences():
    assert (JOB.global_batch_size, replace(JOB, seq_length=4097).global_batch_size) == (16, 15)
    assert (JOB.steps, JOB.eval_length) == (1, 0)
    assert judge(JOB, Layout(gpus=8))[0].as_dict()["layout"] == dataclasses.asdict(Layout(gpus=8))
