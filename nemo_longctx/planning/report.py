"""A whole plan as one mapping of plain types: what `nemo-longctx plan --json` prints, and what `text.py` makes tables of."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
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
from nemo_longctx.planning.gpus import DEFAULT_GPU, GIB, Gpu, gpu_by_name
from nemo_longctx.planning.layout import Layout, layout_faults
from nemo_longctx.planning.memory import STATED_ERROR as MEMORY_ERROR
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import ModelShape, json_mapping
from nemo_longctx.planning.override import Planned, recipe_override
from nemo_longctx.planning.planner import (
    FILL,
    Candidate,
    Job,
    activation_choices,
    judge,
    longest_length,
    nearest_step,
    search,
)
from nemo_longctx.planning.timing import check_mfu, rates_for, seconds_at_mfu

# Xiong et al. 2023, section 2.1: what the 70B lost in speed from 4,096 to 16,384 tokens.
REPORTED_SLOW_DOWN: dict[str, Any] = {"model": "llama2_70b", "from": 4096, "to": 16384, "share": 0.17}
CPU = "cpu"  # in place of a GPU's name: memory alone is planned, since nothing is known of a CPU's speed


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What a plan is made from. Names are those of the command's options.

    Attributes:
        recipe, overrides: what an override will begin with, and the `key=value` that it will hold too.
        price: of a GPU-hour.
        apply: name of the recipe file that the fastest layout is written to.
        eval_length: longest context of an evaluation inside the run, tokens; 0 for none.
        pinned: fields of `layout` that a search keeps.
        notes: sentences that the user has to read beside the plan.
    """

    recipe: str | None = None
    overrides: Sequence[str] = ()
    model_name: str
    model: ModelShape
    curriculum: Curriculum
    flops: str = "causal"
    vocabulary: bool | None = None
    documents: Sequence[str] = ()
    gpu: str = DEFAULT_GPU
    layout: Layout | None = None
    mfu: float | None = None
    mfu_from: str | None = None
    price: float | None = None
    eval_length: int = 0
    search: bool = False
    apply: str | None = None
    longest: bool = False
    pinned: Collection[str] = ()
    notes: Sequence[str] = ()

    def __post_init__(self):
        wants_gpus = [key for key in ("mfu", "mfu_from", "price") if getattr(self, key) is not None]
        wants_gpus += [key for key in ("search", "longest") if getattr(self, key)]
        if wants_gpus and self.layout is None:
            raise ConfigError("gpus", None, f"say how many GPUs with --gpus; {wants_gpus[0].replace('_', '-')} needs them")
        if wants_gpus and self.gpu == CPU:
            raise ConfigError("gpu", CPU, f"its speed is not known; {wants_gpus[0].replace('_', '-')} needs a GPU, by --gpu")
        if self.mfu is not None and self.mfu_from is not None:
            raise ConfigError("mfu", self.mfu, "give --mfu or --mfu-from, not both")
        if self.gpu != CPU:
            gpu_by_name(self.gpu)
        if self.mfu is not None:
            check_mfu(self.mfu)
        if self.price is not None and not (0 <= self.price < float("inf")):
            raise ConfigError("price", self.price, "must be the price of a GPU-hour, 0 or more")
        if self.eval_length < 0:
            raise ConfigError("eval-length", self.eval_length, "must be a number of tokens, 0 or more")
        if self.documents and self.flops in CONVENTIONS and CONVENTIONS[self.flops].attention != "document":
            mend = f"lengths of documents change nothing in convention {self.flops}; add --flops document"
            raise ConfigError("documents", list(self.documents), mend)


def make_plan(settings: PlanSettings) -> dict[str, Any]:
    """Everything that the settings ask for, in plain types.

    Raises:
        ConfigError: a setting that does not fit the others.
    """
    convention = convention_by_name(settings.flops, vocabulary=settings.vocabulary)
    curriculum = settings.curriculum
    lengths = _document_lengths(settings.documents)
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
        "notes": [*settings.notes, *_model_notes(settings)],
    }
    if settings.layout is None:
        return plan
    if settings.gpu == CPU:
        plan["machine"], plan["layout"] = _cpu_plan(settings, settings.layout)
        return plan
    gpu = gpu_by_name(settings.gpu)
    plan["machine"] = {"gpus": settings.layout.gpus, **asdict(gpu)}
    plan["layout"] = _layout_plan(settings, settings.layout, gpu, curriculum)
    if not settings.search:  # which may find another that can
        plan["notes"] += _batch_notes(settings, settings.layout, gpu, plan["layout"])
    mfu = _given_mfu(settings, convention)
    if mfu is not None:
        plan["at_mfu"] = _time_at_mfu(settings, gpu, settings.layout.gpus, cost, mfu)
    if settings.search:
        ranked = search(_jobs(settings, gpu), settings.layout, settings.pinned)
        plan["search"] = [candidate.as_dict() for candidate in ranked]
        _check_found(ranked, _jobs(settings, gpu))
        plan["notes"] += _search_notes(curriculum)
        if settings.apply:
            plan["override"], notes = recipe_override(_planned(settings, ranked[0], gpu), file_name=Path(settings.apply).name)
            plan["notes"] += notes
    if settings.longest:
        plan["longest"] = asdict(longest_length(settings.model, gpu, settings.layout, settings.pinned))
    return plan


def _document_lengths(prefixes: Sequence[str]) -> Any:
    """Tokens of each document of all the corpora, (D,); None without any."""
    if not prefixes:
        return None
    import numpy as np  # nothing else here needs it

    from nemo_longctx.data.corpus import open_corpus

    return np.concatenate([open_corpus(prefix).lengths for prefix in prefixes])


def _check_found(ranked: Sequence[Candidate], stages: Sequence[Job]) -> None:
    first, gpus = ranked[0], ranked[0].layout.gpus
    if first.verdict == "cannot run":
        nearest = nearest_step(stages, ([each.layout] * len(stages) for each in ranked))
        mend = "change --gpus or --tokens-per-step" + ("" if nearest is None else f"; {_nearest_note(gpus, nearest)}")
        raise ConfigError("gpus", gpus, f"no layout can run: {first.reason}; {mend}")
    if first.verdict != "fastest":
        raise ConfigError("gpus", gpus, f"no layout fits; the nearest {first.reason}; take more GPUs")


def _batch_notes(settings: PlanSettings, layout: Layout, gpu: Gpu, planned: dict[str, Any]) -> list[str]:
    """What to change where a stage cannot run for its batch alone."""
    if "hours" in planned:
        return []
    staged = [_stage_layout(layout, stage) for stage in settings.curriculum.plan]
    nearest = nearest_step(_jobs(settings, gpu), [staged])
    return [] if nearest is None else [_nearest_note(layout.gpus, nearest)]


def _nearest_note(gpus: int, nearest: int) -> str:
    return f"the nearest step that {gpus} GPUs can share is --tokens-per-step {nearest}"


def _planned(settings: PlanSettings, chosen: Candidate, gpu: Gpu) -> Planned:
    return Planned(
        chosen=chosen,
        curriculum=settings.curriculum,
        model_name=settings.model_name,
        model=settings.model,
        gpu=gpu,
        eval_length=settings.eval_length,
        recipe=settings.recipe,
        overrides=settings.overrides,
    )


def _model_notes(settings: PlanSettings) -> list[str]:
    model, longest = settings.model, max(stage.seq_length for stage in settings.curriculum.stages)
    if model.sliding_window is None or model.sliding_window >= longest:
        return []
    which = f"{model.windowed_layers} of {model.num_layers} layers"
    return [f"{which} look back on {model.sliding_window:,} tokens: FLOPs and time of their attention are those of the window"]


def _search_notes(curriculum: Curriculum) -> list[str]:
    """What a search does to stages that have settings of their own."""
    own = {(s.micro_batch_size, s.recompute, s.offload, *s.parallel_sizes.items()) for s in curriculum.stages}
    if len(own) == 1 and not any(stage.parallel_sizes for stage in curriculum.stages):
        return []
    return ["the search gives all stages one layout; micro batches and sizes that stages name for themselves are not kept"]


def _jobs(settings: PlanSettings, gpu: Gpu) -> list[Job]:
    return [_job(settings, gpu, stage) for stage in settings.curriculum.plan]


def _job(settings: PlanSettings, gpu: Gpu, stage: Stage) -> Job:
    return Job(
        model=settings.model,
        gpu=gpu,
        seq_length=stage.seq_length,
        tokens_per_step=settings.curriculum.tokens_per_step,
        steps=stage.end_step - stage.first_step,
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
        candidate, time = judge(_job(settings, gpu, stage), staged)
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
                "micro_batch_size": staged.micro_batch_size,
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
    plan = {
        **asdict(layout),
        "short_name": layout.short_name(),
        "rates": asdict(rates),
        "stated_error": {"memory": MEMORY_ERROR, "time": rates.stated_error},
        "stages": stages,
    }
    longest = max(curriculum.plan, key=lambda stage: stage.seq_length)
    plan["activation_choices"] = activation_choices(_job(settings, gpu, longest), _stage_layout(layout, longest))
    if all("hours" in stage for stage in stages):
        plan["gpu_hours"] = hours * layout.gpus
        plan["hours"] = hours
        if settings.price is not None:
            plan["cost"] = hours * layout.gpus * settings.price
    return plan


def _cpu_plan(settings: PlanSettings, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """This machine, and the memory of all processes of a layout on it, stage by stage."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    stages: list[dict[str, Any]] = []
    for stage in settings.curriculum.plan:
        staged = _stage_layout(layout, stage)
        faults = layout_faults(settings.model, staged, stage.seq_length, stage.global_batch_size)
        if faults:
            stages.append({"seq_length": stage.seq_length, "verdict": "cannot run", "reason": "; ".join(faults)})
            continue
        memory = memory_plan(
            settings.model,
            staged,
            seq_length=stage.seq_length,
            global_batch_size=stage.global_batch_size,
            eval_length=settings.eval_length,
            device="cpu",
        )
        total = memory.total * layout.gpus / GIB
        fits = total <= room * FILL
        reason = "" if fits else f"needs {total:.1f} GiB of the {room * FILL:.1f} GiB that may be filled"
        stages.append(
            {
                "seq_length": stage.seq_length,
                "fits": fits,
                "reason": reason,
                "micro_batch_size": staged.micro_batch_size,
                "recompute": staged.recompute,
                "offload": staged.offload,
                "memory_gib": memory.as_gib(),
                "host_gib": memory.offloaded / GIB,
            }
        )
    machine = {"gpus": layout.gpus, "name": CPU, "memory_gib": room}
    stated = {"stated_error": {"memory": MEMORY_ERROR}}
    return machine, {**asdict(layout), "short_name": layout.short_name(), **stated, "stages": stages}


def _stage_layout(layout: Layout, stage: Stage) -> Layout:
    """The layout as one stage of the curriculum has it."""
    values = {**asdict(layout), **stage.config.parallel_sizes, "micro_batch_size": stage.micro_batch_size}
    named = {name: getattr(stage.config, name) for name in ("recompute", "offload")}
    return Layout(**{**values, **{name: value for name, value in named.items() if value is not None}})


def _given_mfu(settings: PlanSettings, convention: FlopsConvention) -> float | None:
    """The MFU that was given, or the one that a run or benchmark measured in the same convention."""
    if settings.mfu_from is None:
        return settings.mfu
    where = settings.mfu_from
    measured = json_mapping(Path(where), key="mfu-from")
    missing = [key for key in ("mfu", "convention") if measured.get(key) is None]
    if missing:
        raise ConfigError("mfu-from", where, f"lacks {' and '.join(missing)}; give a throughput.json of a run on GPUs")
    if measured["convention"] != convention.name:
        mend = f"its MFU is in convention {measured['convention']!r}; plan with --flops {measured['convention']}"
        raise ConfigError("mfu-from", where, mend)
    check_mfu(measured["mfu"], key=f"mfu-from={where}: mfu")
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
