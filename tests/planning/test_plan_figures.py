"""Each figure of a plan against the function that it stands for, and the tables that people read against the figures."""

import dataclasses
import json
import re
from dataclasses import replace

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.planning import report, text
from nemo_longctx.planning.flops import CONVENTIONS, parse_curriculum, slow_down, token_flops, training_cost
from nemo_longctx.planning.gpus import GIB, GPUS
from nemo_longctx.planning.layout import Layout, layout_faults
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import MODELS, ModelShape
from nemo_longctx.planning.planner import FILL, Candidate, Job, activation_choices, judge, longest_length, search
from nemo_longctx.planning.report import PlanSettings, make_plan
from nemo_longctx.planning.text import as_text
from nemo_longctx.planning.timing import rates_for

MODEL = ModelShape(num_layers=12, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, vocab_size=4000)
STAGES = (
    StageConfig(seq_length=2048, until=0.25, micro_batch_size=2, recompute="full"),
    StageConfig(seq_length=8192, until=1.0, offload="block:2", context_parallel_size=2),
)
RUN = Curriculum(stages=STAGES, tokens_per_step=2**17, total_tokens=2**17 * 40)
LAYOUT = Layout(gpus=8, tensor_model_parallel_size=2, loss="chunked")
STAGED = (
    replace(LAYOUT, micro_batch_size=2, recompute="full"),
    replace(LAYOUT, offload="block:2", context_parallel_size=2),
)


def settings(**given):
    return PlanSettings(**{"model_name": "small", "model": MODEL, "curriculum": RUN, **given})


def test_a_plan_of_flops_alone_holds_the_costs_of_its_convention():
    plan = make_plan(settings(flops="full", vocabulary=True))
    convention = replace(CONVENTIONS["full"], vocabulary=True, name="full+vocabulary")
    cost = training_cost(MODEL, RUN, convention)
    assert {key: plan[key] for key in cost.as_dict()} == cost.as_dict()
    assert plan["model"] == {"name": "small", **dataclasses.asdict(MODEL), "parameters": MODEL.parameters}
    assert plan["flops_with_recompute"] == {
        name: training_cost(MODEL, RUN, replace(convention, recompute=name)).total_flops
        for name in ("none", "selective", "full")
    }
    assert (plan["slow_down"], plan["notes"]) == ([], [])
    assert not {"machine", "layout", "at_mfu", "search", "longest"} & plan.keys()
    assert make_plan(settings())["convention"]["name"] == "causal"


def test_the_paper_s_slow_down_stands_beside_each_convention():
    rows = make_plan(settings(model_name="llama2_70b", model=MODELS["llama2_70b"]))["slow_down"]
    assert [row["convention"] for row in rows] == ["full", "full_exact", "causal"]
    for row in rows:
        convention = CONVENTIONS[row["convention"]]
        each = [token_flops(MODELS["llama2_70b"], length, convention) for length in (4096, 16_384)]
        assert (row["from"], row["to"], row["reported"]) == (4096, 16_384, 0.17)
        assert (
            row["slow_down"] == slow_down(MODELS["llama2_70b"], 4096, 16_384, convention) == 1 - each[0].total / each[1].total
        )
        assert row["attention_share"] == [one.attention / (one.attention + one.linear) for one in each]


def test_each_stage_of_a_layout_has_the_memory_and_time_of_its_own_settings():
    plan = make_plan(settings(layout=LAYOUT, gpu="h200", price=3.0, eval_length=5000))
    gpu, layout = GPUS["h200"], plan["layout"]
    assert plan["machine"] == {"gpus": 8, **dataclasses.asdict(gpu)}
    hours = []
    for row, stage, staged, steps in zip(layout["stages"], STAGES, STAGED, (10, 30), strict=True):
        sizes = {"model": MODEL, "gpu": gpu, "seq_length": stage.seq_length, "tokens_per_step": 2**17}
        candidate, time = judge(Job(**sizes, steps=steps, eval_length=5000), staged)
        batch = 2**17 // stage.seq_length
        memory = memory_plan(MODEL, staged, seq_length=stage.seq_length, global_batch_size=batch, eval_length=5000)
        hours.append(time.total * steps / 3600)
        assert row == {
            "seq_length": stage.seq_length, "fits": True, "reason": "", "micro_batch_size": staged.micro_batch_size,
            "recompute": staged.recompute, "offload": staged.offload, "memory_gib": memory.as_gib(),
            "host_gib": memory.offloaded / GIB, "seconds_per_step": time.total, "time_parts_seconds": dataclasses.asdict(time),
            "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu, "hours": hours[-1],
        }  # fmt: skip
        assert row["memory_gib"]["total"] == candidate.memory_gib
        assert row["memory_gib"]["kv_cache"] > 0
    assert (layout["hours"], layout["gpu_hours"], layout["cost"]) == pytest.approx(
        (sum(hours), sum(hours) * 8, sum(hours) * 24)
    )
    assert layout["short_name"] == LAYOUT.short_name()
    rates = rates_for(gpu, "bf16")
    assert (layout["rates"], layout["stated_error"]) == (
        dataclasses.asdict(rates),
        {"memory": 0.10, "time": rates.stated_error},
    )
    longest = Job(model=MODEL, gpu=gpu, seq_length=8192, tokens_per_step=2**17, steps=30, eval_length=5000)
    assert layout["activation_choices"] == activation_choices(longest, STAGED[1])
    assert "cost" not in make_plan(settings(layout=LAYOUT))["layout"]


def test_a_stage_that_cannot_run_has_its_reason_and_the_run_no_hours():
    odd = replace(LAYOUT, virtual_pipeline_model_parallel_size=5)
    for gpu in ("h100", "cpu"):
        plan = make_plan(settings(layout=odd, gpu=gpu))
        layout, shown = plan["layout"], as_text(plan, rows=1)
        for row, stage, staged in zip(layout["stages"], STAGES, STAGED, strict=True):
            faults = layout_faults(MODEL, replace(staged, virtual_pipeline_model_parallel_size=5), stage.seq_length, 16)
            assert row == {"seq_length": stage.seq_length, "verdict": "cannot run", "reason": "; ".join(faults)}
            assert len(faults) == 2
            assert f"\n  {stage.seq_length:,} tokens: cannot run: {'; '.join(faults)}\n" in f"{shown}\n"
        assert not {"hours", "gpu_hours", "cost"} & layout.keys()
    small = make_plan(settings(layout=LAYOUT, eval_length=2**26))["layout"]["stages"]
    assert not any(row["fits"] for row in small)
    assert all(row["reason"].startswith("needs ") for row in small)


def test_a_cpu_s_plan_is_the_memory_of_all_its_processes(monkeypatch):
    def room(gib):
        sizes = {"SC_PHYS_PAGES": gib * 2**18, "SC_PAGE_SIZE": 4096}
        monkeypatch.setattr(report.os, "sysconf", sizes.__getitem__)
        return make_plan(settings(layout=LAYOUT, gpu="cpu", eval_length=99))

    plan = room(64)
    assert plan["machine"] == {"gpus": 8, "name": "cpu", "memory_gib": 64}
    assert plan["layout"]["stated_error"] == {"memory": 0.10}
    assert plan["layout"]["short_name"] == LAYOUT.short_name()
    totals = []
    for row, stage, staged in zip(plan["layout"]["stages"], STAGES, STAGED, strict=True):
        sizes = {"seq_length": stage.seq_length, "global_batch_size": 2**17 // stage.seq_length, "eval_length": 99}
        memory = memory_plan(MODEL, staged, **sizes, device="cpu")
        assert row == {
            "seq_length": stage.seq_length, "fits": True, "reason": "", "micro_batch_size": staged.micro_batch_size,
            "recompute": staged.recompute, "offload": staged.offload, "memory_gib": memory.as_gib(),
            "host_gib": memory.offloaded / GIB,
        }  # fmt: skip
        assert memory.framework == 0
        totals.append(memory.total * 8 / GIB)
    monkeypatch.setattr(report, "FILL", 0.5)
    assert [row["fits"] for row in room(2 * max(totals))["layout"]["stages"]] == [True, True]  # to the last byte
    short = room(2 * max(totals) - 0.1)["layout"]["stages"]
    assert {row["fits"] for row in short} == {True, False}
    (lost,) = (row for row in short if not row["fits"])
    may = max(totals) - 0.05
    assert lost["reason"] == f"needs {max(totals):.1f} GiB of the {may:.1f} GiB that may be filled"


def test_at_an_mfu_each_stage_takes_its_flops_at_that_share_of_the_peak(tmp_path):
    measured = tmp_path / "throughput.json"
    measured.write_text(json.dumps({"mfu": 0.25, "convention": "causal"}))
    cost = training_cost(MODEL, RUN, CONVENTIONS["causal"])
    for given in ({"mfu": 0.25}, {"mfu_from": str(measured)}):
        at = make_plan(settings(layout=LAYOUT, gpu="a100", price=2.0, **given))["at_mfu"]
        for row, stage, steps in zip(at["stages"], cost.stages, (10, 30), strict=True):
            seconds = stage.flops / steps / (8 * 312e12 * 0.25)
            assert row["seq_length"] == stage.seq_length
            assert row["seconds_per_step"] == pytest.approx(seconds)
            assert row["tokens_per_second"] == pytest.approx(2**17 / seconds)
            assert row["hours"] == pytest.approx(seconds * steps / 3600)
        assert at["hours"] == pytest.approx(cost.total_flops / (8 * 312e12 * 0.25) / 3600)
        assert (at["mfu"], at["convention"]) == (0.25, "causal")
        assert (at["gpu_hours"], at["cost"]) == pytest.approx((8 * at["hours"], 16 * at["hours"]))
    assert "cost" not in make_plan(settings(layout=LAYOUT, mfu=0.25))["at_mfu"]
    assert "at_mfu" not in make_plan(settings(layout=LAYOUT))


def test_a_search_is_that_of_all_stages_and_the_longest_length_keeps_what_is_pinned():
    pinned = {"tensor_model_parallel_size"}
    plan = make_plan(settings(layout=LAYOUT, search=True, longest=True, pinned=pinned, eval_length=7))
    gpu = GPUS["h100"]
    jobs = [
        Job(model=MODEL, gpu=gpu, seq_length=length, tokens_per_step=2**17, steps=steps, eval_length=7)
        for length, steps in ((2048, 10), (8192, 30))
    ]
    assert plan["search"] == [each.as_dict() for each in search(jobs, LAYOUT, pinned)]
    assert plan["longest"] == dataclasses.asdict(longest_length(MODEL, gpu, LAYOUT, pinned))
    one = "the search gives all stages one layout; micro batches and sizes that stages name for themselves are not kept"
    assert plan["notes"] == [one]
    assert "override" not in plan
    for stages, said in (
        ([{}], []),
        ([{}, {}], []),
        ([{"micro_batch_size": 2}, {}], [one]),
        ([{"recompute": "full"}, {}], [one]),
        ([{"offload": "full"}, {}], [one]),
        ([{"context_parallel_size": 2}], [one]),
    ):
        ends = [1.0] if len(stages) == 1 else [0.5, 1.0]
        run = [StageConfig(seq_length=2048, until=end, **stage) for end, stage in zip(ends, stages, strict=True)]
        assert report._search_notes(Curriculum(stages=tuple(run), tokens_per_step=2048, total_tokens=8192)) == said


def test_nothing_found_says_what_to_change():
    layout = Layout(gpus=8)
    lost = {"layout": layout, "memory_gib": 90.0, "seconds": 1.0, "tokens_per_second_per_gpu": 1.0}
    stages = [Job(model=MODEL, gpu=GPUS["h100"], seq_length=2048, tokens_per_step=2048 * 15)]
    for verdict, says in (
        (
            "cannot run",
            "gpus=8: no layout can run: the reason; change --gpus or --tokens-per-step; the nearest step that 8 GPUs can share "
            "is --tokens-per-step 32768",
        ),
        ("does not fit", "gpus=8: no layout fits; the nearest the reason; take more GPUs"),
    ):
        with pytest.raises(ConfigError) as error:
            report._check_found([Candidate(**lost, verdict=verdict, reason="the reason")], stages)
        assert str(error.value) == says
    report._check_found([Candidate(**lost, verdict="fastest", reason="")], stages)


@pytest.mark.parametrize(("window", "full", "said"), [(None, None, ""), (8192, None, ""), (8191, None, "12"), (100, 3, "9")])
def test_a_window_shorter_than_the_longest_stage_is_said(window, full, said):
    notes = make_plan(settings(model=replace(MODEL, sliding_window=window, full_layers=full), notes=["first"]))["notes"]
    which = f"{said} of 12 layers look back on {window} tokens: FLOPs and time of their attention are those of the window"
    assert [note.replace(",", "", 1) if window == 8191 else note for note in notes] == ["first", *([which] if said else [])]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mfu": 0.4}, "gpus=None: say how many GPUs with --gpus; mfu needs them"),
        ({"mfu_from": "x"}, "gpus=None: say how many GPUs with --gpus; mfu-from needs them"),
        ({"price": 0.0}, "gpus=None: say how many GPUs with --gpus; price needs them"),
        ({"search": True}, "gpus=None: say how many GPUs with --gpus; search needs them"),
        ({"longest": True}, "gpus=None: say how many GPUs with --gpus; longest needs them"),
        ({"longest": True, "layout": LAYOUT, "gpu": "cpu"}, "gpu='cpu': its speed is not known; longest needs a GPU, by --gpu"),
        ({"mfu": 0.4, "mfu_from": "x", "layout": LAYOUT}, "mfu=0.4: give --mfu or --mfu-from, not both"),
        ({"gpu": "h10"}, "gpu='h10': not a GPU that the planner knows, did you mean 'h100'?"),
        ({"mfu": 3, "layout": LAYOUT}, "mfu=3: must be a share of the bf16 peak, such as 0.4"),
        ({"price": -0.01, "layout": LAYOUT}, "price=-0.01: must be the price of a GPU-hour, 0 or more"),
        ({"price": float("inf"), "layout": LAYOUT}, "price=inf: must be the price of a GPU-hour, 0 or more"),
        ({"eval_length": -1}, "eval-length=-1: must be a number of tokens, 0 or more"),
        (
            {"documents": ["a"]},
            "documents=['a']: lengths of documents change nothing in convention causal; add --flops document",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_go_together_are_refused(given, says):
    with pytest.raises(ConfigError) as error:
        settings(**given)
    assert str(error.value) == says


def test_settings_at_their_bounds_are_taken():
    settings(layout=LAYOUT, price=0.0, mfu=2, eval_length=0)
    settings(documents=["a"], flops="document")
    settings(documents=["a"], flops="no convention")  # which is refused by its name later
    settings(gpu="cpu")
    assert settings().gpu == "h100"


def test_tables_hold_the_figures_of_the_plan():
    plan = make_plan(settings(layout=LAYOUT, price=1e5, mfu=0.3, search=True, longest=True, notes=["mind this"]))
    lines = as_text(plan, rows=3).split("\n")
    assert lines[0] == f"small: {MODEL.parameters / 1e6:,.2f} M parameters, 5.24 M tokens in 40 steps of 131,072"
    assert lines[1] == "convention causal: causal attention, exact layer sizes, with the LM head"
    for line, stage in zip(lines[4:6], plan["stages"], strict=True):
        assert line.split() == [
            f"{stage['seq_length']:,}", str(stage["steps"]), str(stage["global_batch_size"]), f"{stage['tokens'] / 1e6:.2f}M",
            f"{stage['flops']:.3e}", f"{stage['attention_share']:.1%}", f"{stage['relative_speed']:.2f}",
        ]  # fmt: skip
    whole = "\n".join(lines)
    layout, at = plan["layout"], plan["at_mfu"]
    for said in (
        f"total {plan['total_flops']:.3e} FLOPs; long from the start {plan['long_from_start_flops']:.3e}; saving",
        f"crossover 6h = 3,072 tokens; attention overtakes the layers at {plan['crossover_tokens']:,.0f} in this convention",
        "\n8 x h100, TP2 CP1 PP1 DP4 mb1 none, bf16\n",
        f"  rates: {layout['rates']['source']} (no measured run stands behind the time)",
        f"  in all {60 * layout['hours']:.3g} minutes, {layout['gpu_hours']:.3g} GPU-hours, cost {layout['cost']:,.0f}; of its "
        "steps: starts, validation, evaluations and checkpoints come on top\n",
        f"at an MFU of 30.0% (causal): {60 * at['hours']:.3g} minutes, {at['gpu_hours']:.3g} GPU-hours, "
        f"cost {at['cost']:,.0f}\n",
        f"longest sequence that fits: {plan['longest']['seq_length']:,} tokens by ",
    ):
        assert said in whole
    assert lines[-1] == "note: " + plan["notes"][-1]
    assert "\nnote: mind this\n" in whole
    for row in layout["stages"]:
        place = next(i for i, line in enumerate(lines) if line.startswith(f"  {row['seq_length']:,} tokens: "))
        total = row["memory_gib"]["total"]
        speed = f"{row['seconds_per_step']:.2f} s a step, {row['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU"
        assert lines[place] == f"  {row['seq_length']:,} tokens: {total:.1f} of {79 * FILL:.1f} GiB, fits; {speed}"
        parts = dict(part.rsplit(" ", 1) for part in lines[place + 1].strip().split(", "))
        assert parts == {k: f"{v:.1f}" for k, v in row["memory_gib"].items() if v >= 0.05 and k != "total"}
        host = f", {row['host_gib']:.1f} GiB in host memory" if row["host_gib"] else ""
        named = f"micro batch {row['micro_batch_size']}, recompute {row['recompute']}, offload {row['offload']}{host}"
        assert lines[place + 2].strip() == named
    assert [bool(row["host_gib"]) for row in layout["stages"]] == [False, True]
    fp8 = as_text(make_plan(settings(layout=replace(LAYOUT, precision="fp8"))), rows=1)
    assert "(time within 10% of the runs they come from)" in fp8
    rough = as_text(make_plan(settings(flops="full")), rows=1)
    assert "convention full: full attention, 12 h^2 a layer, without the LM head" in rough
    assert "GPU-hours" not in rough


def test_little_is_not_nothing_and_nothing_has_no_sign():
    """A short run took `0.0 hours, 0 GPU-hours, cost 0`, and saved `-0.0%`."""
    assert [text._duration(hours) for hours in (0.004, 0.999, 1, 47.9, 48)] == [
        "0.24 minutes", "59.9 minutes", "1.0 hours", "47.9 hours", "2.0 days",
    ]  # fmt: skip
    assert [text._amount(value) for value in (0, 0.0312, 3.456, 99.9, 100, 12345.6)] == [
        "0", "0.0312", "3.46", "99.9", "100", "12,346",
    ]  # fmt: skip
    plan = make_plan(settings()) | {"saving": -2e-16}
    assert "; saving 0.0%" in as_text(plan, rows=1)
    assert "; saving 12.3%" in as_text(plan | {"saving": 0.123}, rows=1)


def test_a_table_of_a_search_shows_so_many_rows_of_each_kind():
    plan = make_plan(settings(layout=LAYOUT, search=True))
    kinds = {"slower": "are slower", "does not fit": "do not fit", "cannot run": "cannot run"}
    sizes = {kind: sum(row["verdict"] == kind for row in plan["search"]) for kind in kinds}
    sizes["slower"] += 1  # the fastest
    for rows in (1, 2, sizes["slower"]):
        shown = as_text(plan, rows=rows).split(f"{len(plan['search'])} layouts\n")[1]
        for kind, rest in kinds.items():
            left = sizes[kind] - rows
            assert (f"  ... and {left} more that {rest}" in shown) == (left > 0)
    best = plan["search"][0]
    name = Layout(**best["layout"]).short_name()
    said = f"{best['memory_gib']:7.1f} {best['seconds']:8.2f} {best['tokens_per_second_per_gpu']:9,.0f}"
    assert f"\n{name:34} {said}  fastest\n" in as_text(plan, rows=1)
    lost = next(row for row in plan["search"] if row["verdict"] == "cannot run")
    assert f"{Layout(**lost['layout']).short_name():34} {' ' * 25}  {lost['reason']}" in as_text(plan, rows=1)


def test_what_does_not_fit_is_marked_in_the_table_of_choices():
    row = {
        "recompute": "none",
        "offload": "full",
        "memory_gib": 80.0,
        "saves_gib": 1.5,
        "host_gib": 2.0,
        "seconds": 3.0,
        "costs": 0.1,
    }
    assert text._choice_lines([]) == []
    for fits, mark in ((True, ""), (False, " does not fit")):
        line = text._choice_lines([{**row, "fits": fits}])[-1]
        assert re.sub(" +", " ", line) == " none full 80.0 1.5 2.0 3.00 10.0%" + mark


@pytest.mark.parametrize(
    ("tokens", "short", "count"),
    [
        (1e8, "0.1B", "0.10 B"),
        (1e8 - 1, "100.00M", "100.00 M"),
        (2_345_678, "2.35M", "2.35 M"),
        (7.2e12, "7200.0B", "7,200.00 B"),
    ],
)
def test_numbers_are_told_in_the_unit_that_reads_best(tokens, short, count):
    assert (text._short(tokens), text._count(tokens)) == (short, count)
    told = {0.0125: "0.75 minutes", 0.5: "30 minutes", 1: "1.0 hours", 47.94: "47.9 hours", 48: "2.0 days", 60: "2.5 days"}
    assert {hours: text._duration(hours) for hours in told} == told


def test_a_document_s_convention_has_no_crossover_to_tell():
    plan = make_plan(settings(curriculum=parse_curriculum("2048", tokens_per_step=2**17, steps=2)))
    assert "attention overtakes" not in as_text({**plan, "crossover_tokens": None}, rows=1)
