"""A whole plan as one mapping (for JSON) and as text: what `nemo-longctx plan` prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.curriculum import Curriculum, Stage
from nemo_longctx.planning.flops import (
    CONVENTIONS,
    RECOMPUTE,
    FlopsConvention,
    TrainingCost,
    convention_by_name,
    parse_curriculum,
    slow_down,
    training_cost,
)
from nemo_longctx.planning.gpus import GIB, Gpu, gpu_by_name
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import ModelShape
from nemo_longctx.planning.override import recipe_override
from nemo_longctx.planning.planner import FILL, Candidate, Job, activation_choices, judge, longest_length, search
from nemo_longctx.planning.timing import rates_for, seconds_at_mfu

# Xiong et al. 2023, section 2.1: what the 70B lost in speed from 4,096 to 16,384 tokens.
REPORTED_SLOW_DOWN: dict[str, Any] = {"model": "llama2_70b", "from": 4096, "to": 16384, "share": 0.17}


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What a plan is made from. Names are those of the command's options."""

    model_name: str
    model: ModelShape
    curriculum: Curriculum
    flops: str = "causal"
    vocabulary: bool | None = None
    documents: str | None = None
    gpu: str = "h100"
    layout: Layout | None = None
    mfu: float | None = None
    mfu_from: str | None = None
    price: float | None = None
    eval_length: int = 0
    search: bool = False
    longest: bool = False

    def __post_init__(self):
        wants_gpus = [key for key in ("mfu", "mfu_from", "price", "search", "longest") if getattr(self, key)]
        if wants_gpus and self.layout is None:
            raise ConfigError("gpus", None, f"say how many GPUs with --gpus; {wants_gpus[0].replace('_', '-')} needs them")
        if self.mfu is not None and self.mfu_from is not None:
            raise ConfigError("mfu", self.mfu, "give --mfu or --mfu-from, not both")


def make_plan(settings: PlanSettings) -> dict[str, Any]:
    """Everything that the settings ask for, in plain types.

    Raises:
        ConfigError: a setting that does not fit the others.
    """
    convention = convention_by_name(settings.flops, vocabulary=settings.vocabulary)
    curriculum = settings.curriculum
    lengths = open_corpus(settings.documents).lengths if settings.documents else None
    cost = training_cost(settings.model, curriculum, convention, document_lengths_D=lengths)
    plan: dict[str, Any] = {
        "model": {"name": settings.model_name, **asdict(settings.model), "parameters": settings.model.parameters},
        **cost.as_dict(),
        "flops_with_recompute": {
            recompute: training_cost(
                settings.model, curriculum, replace(convention, recompute=recompute), document_lengths_D=lengths
            ).total_flops
            for recompute in RECOMPUTE
        },
        "slow_down": _slow_downs(settings),
    }
    if settings.layout is None:
        return plan
    gpu = gpu_by_name(settings.gpu)
    plan["machine"] = {"gpus": settings.layout.gpus, **asdict(gpu)}
    plan["layout"] = _layout_plan(settings, settings.layout, gpu, curriculum)
    mfu = _given_mfu(settings, convention)
    if mfu is not None:
        plan["at_mfu"] = _time_at_mfu(settings, gpu, settings.layout.gpus, cost, mfu)
    if settings.search:
        ranked = search(_job(settings, gpu, max(stage.seq_length for stage in curriculum.plan)), settings.layout)
        plan["search"] = [candidate.as_dict() for candidate in ranked]
        if ranked[0].verdict == "fastest":
            plan["override"] = recipe_override(ranked[0], curriculum, settings.model_name, gpu)
        else:
            raise ConfigError("gpus", settings.layout.gpus, f"no layout fits; the nearest {ranked[0].reason}; take more GPUs")
    if settings.longest:
        plan["longest"] = asdict(longest_length(settings.model, gpu, settings.layout))
    return plan


def _job(settings: PlanSettings, gpu: Gpu, seq_length: int) -> Job:
    return Job(
        model=settings.model,
        gpu=gpu,
        seq_length=seq_length,
        tokens_per_step=settings.curriculum.tokens_per_step,
        eval_length=settings.eval_length,
    )


def _slow_downs(settings: PlanSettings) -> list[dict[str, Any]]:
    """Attention's share and the loss of speed at equal FLOP/s by convention, beside the 17 % that the paper reports."""
    if settings.model_name != REPORTED_SLOW_DOWN["model"]:
        return []
    short, long = REPORTED_SLOW_DOWN["from"], REPORTED_SLOW_DOWN["to"]
    rows = []
    for name in ("full", "full_exact", "causal"):
        convention = CONVENTIONS[name]
        costs = training_cost(
            settings.model, parse_curriculum(f"{short}@0.5,{long}", tokens_per_step=4 * long, steps=2), convention
        ).stages
        rows.append(
            {
                "convention": name,
                "from": short,
                "to": long,
                "attention_share": [stage.attention_share for stage in costs],
                "slow_down": slow_down(settings.model, short, long, convention),
                "reported": REPORTED_SLOW_DOWN["share"],
            }
        )
    return rows


def _layout_plan(settings: PlanSettings, layout: Layout, gpu: Gpu, curriculum: Curriculum) -> dict[str, Any]:
    """Memory and time of the given layout, stage by stage."""
    stages: list[dict[str, Any]] = []
    hours = 0.0
    for stage in curriculum.plan:
        staged = _stage_layout(layout, stage)
        candidate, time = judge(_job(settings, gpu, stage.seq_length), staged)
        if time is None:
            stages.append({"seq_length": stage.seq_length, "verdict": candidate.verdict, "reason": candidate.reason})
            continue
        memory = memory_plan(
            settings.model,
            staged,
            seq_length=stage.seq_length,
            global_batch_size=stage.global_batch_size,
            eval_length=settings.eval_length,
        )
        stage_hours = time.total * (stage.end_step - stage.first_step) / 3600
        hours += stage_hours
        stages.append(
            {
                "seq_length": stage.seq_length,
                "fits": candidate.verdict != "does not fit",
                "reason": candidate.reason,
                "recompute": staged.recompute,
                "offload": staged.offload,
                "memory_gib": memory.as_gib(),
                "host_gib": memory.offloaded / GIB,
                "seconds_per_step": time.total,
                "time_parts_seconds": asdict(time),
                "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
                "hours": stage_hours,
            }
        )
    rates = rates_for(gpu, layout.precision)
    plan = {**asdict(layout), "short_name": layout.short_name(), "rates": asdict(rates), "stages": stages}
    longest = max(curriculum.plan, key=lambda stage: stage.seq_length)
    plan["activation_choices"] = activation_choices(_job(settings, gpu, longest.seq_length), _stage_layout(layout, longest))
    if all("hours" in stage for stage in stages):
        plan["gpu_hours"] = hours * layout.gpus
        plan["hours"] = hours
        if settings.price is not None:
            plan["cost"] = hours * layout.gpus * settings.price
    return plan


def _stage_layout(layout: Layout, stage: Stage) -> Layout:
    """The layout as one stage of the curriculum has it."""
    values = {**asdict(layout), **stage.config.parallel_sizes, "micro_batch_size": stage.micro_batch_size}
    named = {name: getattr(stage.config, name) for name in ("recompute", "offload")}
    return Layout(**{**values, **{name: value for name, value in named.items() if value is not None}})


def _given_mfu(settings: PlanSettings, convention: FlopsConvention) -> float | None:
    """The MFU that was given, or the one that a run or benchmark measured in the same convention."""
    if settings.mfu_from is None:
        return settings.mfu
    measured = json.loads(Path(settings.mfu_from).read_text())
    missing = [key for key in ("mfu", "convention") if key not in measured]
    if missing:
        raise ConfigError("mfu-from", settings.mfu_from, f"lacks {' and '.join(missing)}; give a throughput.json of a run")
    if measured["convention"] != convention.name:
        mend = f"its MFU is in convention {measured['convention']!r}; plan with --flops {measured['convention']}"
        raise ConfigError("mfu-from", settings.mfu_from, mend)
    return float(measured["mfu"])


def _time_at_mfu(settings: PlanSettings, gpu: Gpu, gpus: int, cost: TrainingCost, mfu: float) -> dict[str, Any]:
    stages = []
    for stage in cost.stages:
        seconds = seconds_at_mfu(stage.flops / stage.steps, gpu, gpus=gpus, mfu=mfu)  # equal FLOP/s in every stage
        stages.append(
            {
                "seq_length": stage.seq_length,
                "seconds_per_step": seconds,
                "tokens_per_second": cost.tokens_per_step / seconds,
                "hours": seconds * stage.steps / 3600,
            }
        )
    hours = sum(stage["hours"] for stage in stages)
    result = {"mfu": mfu, "convention": cost.convention.name, "stages": stages, "hours": hours, "gpu_hours": hours * gpus}
    if settings.price is not None:
        result["cost"] = hours * gpus * settings.price
    return result


def as_text(plan: dict[str, Any], *, rows: int) -> str:
    """Tables for a person.

    Args:
        plan: of `make_plan`.
        rows: how many layouts of each verdict to show.
    """
    lines = _cost_lines(plan)
    if "layout" in plan:
        lines += _layout_lines(plan)
    if "at_mfu" in plan:
        at = plan["at_mfu"]
        lines += [
            "",
            f"at an MFU of {at['mfu']:.1%} ({at['convention']}): {_duration(at['hours'])}, {at['gpu_hours']:,.0f} GPU-hours",
        ]
        lines[-1] += f", cost {at['cost']:,.0f}" if "cost" in at else ""
    if "search" in plan:
        lines += _search_lines(plan["search"], rows)
    if "longest" in plan:
        longest = plan["longest"]
        name = Layout(**longest["layout"]).short_name()
        lines += [
            "",
            f"longest sequence that fits: {longest['seq_length']:,} tokens by {name}, {longest['memory_gib']:.1f} GiB",
        ]
    return "\n".join(lines)


def _cost_lines(plan: dict[str, Any]) -> list[str]:
    convention, model = plan["convention"], plan["model"]
    head = "with the LM head" if convention["vocabulary"] else "without the LM head"
    layers = "12 h^2 a layer" if convention["layers"] == "12h2" else "exact layer sizes"
    lines = [
        f"{model['name']}: {model['parameters'] / 1e9:.2f} B parameters, {plan['tokens'] / 1e9:,.1f} B tokens "
        f"in {plan['steps']:,} steps of {plan['tokens_per_step']:,}",
        f"convention {convention['name']}: {convention['attention']} attention, {layers}, {head}",
        "",
        f"{'length':>9} {'steps':>9} {'batch':>7} {'tokens':>9} {'FLOPs':>10} {'attention':>9} {'speed':>6}",
    ]
    for stage in plan["stages"]:
        lines.append(
            f"{stage['seq_length']:9,} {stage['steps']:9,} {stage['global_batch_size']:7,} {stage['tokens'] / 1e9:8.1f}B "
            f"{stage['flops']:10.3e} {stage['attention_share']:9.1%} {stage['relative_speed']:6.2f}"
        )
    lines += [
        "",
        f"total {plan['total_flops']:.3e} FLOPs; long from the start {plan['long_from_start_flops']:.3e}; "
        f"saving {plan['saving']:.1%}",
        "executed with recomputation: " + ", ".join(f"{k} {v:.3e}" for k, v in plan["flops_with_recompute"].items()),
        f"crossover 6h = {plan['crossover_6h']:,} tokens"
        + (
            f"; attention overtakes the layers at {plan['crossover_tokens']:,.0f} in this convention"
            if plan["crossover_tokens"]
            else ""
        ),
    ]
    for row in plan["slow_down"]:
        shares = " and ".join(f"{share:.1%}" for share in row["attention_share"])
        lines.append(
            f"  {row['convention']:10} attention {shares} at {row['from']:,} and {row['to']:,}: "
            f"{row['slow_down']:.1%} slower (reported: {row['reported']:.0%})"
        )
    return lines


def _layout_lines(plan: dict[str, Any]) -> list[str]:
    layout, machine = plan["layout"], plan["machine"]
    lines = [
        "",
        f"{machine['gpus']} x {machine['name']}, {layout['short_name']}, {layout['precision']}",
        f"  rates: {layout['rates']['source']}",
    ]
    for stage in layout["stages"]:
        if "verdict" in stage:
            lines.append(f"  {stage['seq_length']:,} tokens: {stage['verdict']}: {stage['reason']}")
            continue
        parts = {k: v for k, v in stage["memory_gib"].items() if k != "total" and v >= 0.05}
        fits = "fits" if stage["fits"] else f"does not fit: {stage['reason']}"
        lines.append(
            f"  {stage['seq_length']:,} tokens: {stage['memory_gib']['total']:.1f} of "
            f"{machine['memory_gib'] * FILL:.1f} GiB, {fits}; "
            f"{stage['seconds_per_step']:.2f} s a step, {stage['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU"
        )
        lines.append("    " + ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items()))
        host = f", {stage['host_gib']:.1f} GiB in host memory" if stage["host_gib"] else ""
        lines.append(f"    recompute {stage['recompute']}, offload {stage['offload']}{host}")
    lines += _choice_lines(layout["activation_choices"])
    if "hours" in layout:
        lines.append(f"  in all {_duration(layout['hours'])}, {layout['gpu_hours']:,.0f} GPU-hours")
        lines[-1] += f", cost {layout['cost']:,.0f}" if "cost" in layout else ""
    return lines


def _choice_lines(choices: list[dict[str, Any]]) -> list[str]:
    """Recomputation and offload at the longest stage: what each would save on a GPU and cost a step."""
    if not choices:
        return []
    lines = ["  what is kept for the backward pass, at the longest stage, against keeping all of it:"]
    lines.append(f"    {'recompute':10} {'offload':8} {'GiB':>7} {'saves':>7} {'on host':>8} {'s/step':>8} {'costs':>7}")
    for row in choices:
        memory = f"{row['memory_gib']:7.1f} {row['saves_gib']:7.1f} {row['host_gib']:8.1f}"
        lines.append(
            f"    {row['recompute']:10} {row['offload']:8} {memory} {row['seconds']:8.2f} {row['costs']:7.1%}"
            + ("" if row["fits"] else "  does not fit")
        )
    return lines


def _search_lines(ranked: list[dict[str, Any]], rows: int) -> list[str]:
    lines = ["", f"{len(ranked)} layouts", f"{'layout':34} {'GiB':>7} {'s/step':>8} {'tok/s/GPU':>9}  why"]
    groups = ((("fastest", "slower"), "are slower"), (("does not fit",), "do not fit"), (("cannot run",), "cannot run"))
    for verdicts, rest in groups:
        group = [row for row in ranked if row["verdict"] in verdicts]
        for row in group[:rows]:
            candidate = Candidate(**{**row, "layout": Layout(**row["layout"])})
            numbers = "                         "
            if candidate.memory_gib is not None:
                numbers = f"{candidate.memory_gib:7.1f} {candidate.seconds:8.2f} {candidate.tokens_per_second_per_gpu:9,.0f}"
            lines.append(f"{candidate.layout.short_name():34} {numbers}  {candidate.reason or candidate.verdict}")
        if len(group) > rows:
            lines.append(f"  ... and {len(group) - rows} more that {rest}")
    return lines


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
