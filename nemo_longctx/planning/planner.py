"""The fastest layout that fits, why every other one lost, and the longest length that a machine can train."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.planning.gpus import GIB, Gpu
from nemo_longctx.planning.layout import Layout, layout_faults
from nemo_longctx.planning.memory import MemoryPlan, memory_plan
from nemo_longctx.planning.models import ModelShape
from nemo_longctx.planning.timing import StepTime, step_time

# Share of a GPU's memory that a plan may fill: the allocator loses some to fragments, and the prediction has its error.
FILL = 0.92
MICRO_BATCHES = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, judged.

    Attributes:
        layout: what was judged.
        memory_gib: predicted peak of the fullest GPU in the fullest stage; None where the layout cannot run at all.
        seconds: predicted step, the mean over all steps of the run; None likewise.
        tokens_per_second_per_gpu: of that step.
        verdict: `fastest`, `slower`, `does not fit` or `cannot run`.
        reason: why it lost, in a sentence; empty for the fastest.
    """

    layout: Layout
    memory_gib: float | None
    seconds: float | None
    tokens_per_second_per_gpu: float | None
    verdict: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one stage of a run trains, and on what.

    Attributes:
        model: sizes.
        gpu: kind of GPU.
        seq_length: of the stage, tokens.
        tokens_per_step: of an optimizer step.
        steps: optimizer steps of the stage, by which stages are weighed against each other.
        eval_length: longest context of an evaluation inside the run, tokens; 0 for none.
    """

    model: ModelShape
    gpu: Gpu
    seq_length: int
    tokens_per_step: int
    steps: int = 1
    eval_length: int = 0

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step."""
        return self.tokens_per_step // self.seq_length


def judge(job: Job, layout: Layout) -> tuple[Candidate, StepTime | None]:
    """Whether a layout runs and fits, and how fast it is. The verdict of one that fits is `slower` until it is compared."""

    def verdict(kind: str, reason: str, memory: float | None = None, time: StepTime | None = None) -> Candidate:
        return Candidate(
            layout=layout,
            memory_gib=memory,
            seconds=time.total if time else None,
            tokens_per_second_per_gpu=time.tokens_per_second_per_gpu if time else None,
            verdict=kind,
            reason=reason,
        )

    faults = layout_faults(job.model, layout, job.seq_length, job.global_batch_size)
    if faults:
        return verdict("cannot run", "; ".join(faults)), None
    plan = _memory(job, layout)
    memory = plan.total / GIB
    time = step_time(job.model, layout, job.gpu, seq_length=job.seq_length, global_batch_size=job.global_batch_size)
    room = job.gpu.memory_gib * FILL
    if memory > room:
        parts = plan.as_gib()
        del parts["total"]
        largest = max(parts, key=lambda name: parts[name])
        most = f"the largest part is {largest}, {parts[largest]:.0f} GiB"
        reason = f"needs {memory:.0f} GiB of the {room:.0f} GiB that may be filled; {most}"
        return verdict("does not fit", reason, memory, time), time
    return verdict("slower", "", memory, time), time


def activation_choices(job: Job, layout: Layout) -> list[dict[str, Any]]:
    """What each recomputation and offload would save and cost in this layout, against keeping everything on the GPU.

    Returns:
        a row each: `recompute`, `offload`, `memory_gib` (the whole peak) and `saves_gib`, `host_gib` (in host memory, a GPU),
        `seconds` (a step) and `costs` (share of the step), `fits`. Empty where the layout cannot run.
    """
    layers = max(1, job.model.num_layers // (layout.pipeline_model_parallel_size * layout.model_chunks))
    block = f"block:{max(1, layers // 2)}"
    named = [("none", "none"), ("selective", "none"), (block, "none"), ("full", "none")]
    named += [("none", "full"), ("selective", "full"), ("full", "full"), (layout.recompute, layout.offload)]
    rows: list[dict[str, Any]] = []
    for recompute, offload in dict.fromkeys(named):
        candidate, time = judge(job, replace(layout, recompute=recompute, offload=offload))
        if time is None or candidate.memory_gib is None:
            return []
        plan = _memory(job, candidate.layout)
        first = rows[0] if rows else {"memory_gib": candidate.memory_gib, "seconds": time.total}
        rows.append(
            {
                "recompute": recompute,
                "offload": offload,
                "memory_gib": candidate.memory_gib,
                "saves_gib": first["memory_gib"] - candidate.memory_gib,
                "host_gib": plan.offloaded / GIB,
                "seconds": time.total,
                "costs": time.total / first["seconds"] - 1,
                "fits": candidate.verdict != "does not fit",
            }
        )
    return rows


def _memory(job: Job, layout: Layout) -> MemoryPlan:
    return memory_plan(
        job.model,
        layout,
        seq_length=job.seq_length,
        global_batch_size=job.global_batch_size,
        eval_length=job.eval_length,
    )


def search(stages: Sequence[Job], base: Layout, pinned: Collection[str] = ()) -> list[Candidate]:
    """Every layout of `base.gpus` GPUs: the fastest that fits first, then the slower, then what does not fit or run.

    Args:
        stages: what is trained, stage by stage; one layout has to serve them all.
        base: number of GPUs, precision, loss, sharding and offload, which every candidate keeps.
        pinned: fields of Layout that keep the value of `base`, such as `tensor_model_parallel_size`.

    Raises:
        ConfigError: no candidate is left by what is pinned.
    """
    model, gpu = stages[0].model, stages[0].gpu
    judged = [judge_run(stages, layout) for layout in candidates(model, gpu, base, pinned)]
    if not judged:
        raise _nothing_left(base, pinned)
    fitting = [(candidate, time) for candidate, time in judged if candidate.verdict == "slower" and time is not None]
    fitting.sort(key=lambda pair: _rank(*pair))
    ranked: list[Candidate] = []
    for candidate, time in fitting:
        if not ranked:
            ranked.append(replace(candidate, verdict="fastest"))
        else:
            ranked.append(replace(candidate, reason=_why_slower(time, fitting[0][1])))
    order = {"does not fit": 0, "cannot run": 1}
    others = [candidate for candidate, _ in judged if candidate.verdict in order]
    return ranked + sorted(others, key=lambda c: (order[c.verdict], c.memory_gib or 0.0))


def judge_run(stages: Sequence[Job], layout: Layout) -> tuple[Candidate, StepTime | None]:
    """`judge` for all stages of a run under one layout: the worst verdict, the highest peak, the mean step."""
    judged = [judge(job, layout) for job in stages]
    if len(judged) == 1:
        return judged[0]
    for verdict in ("cannot run", "does not fit"):
        lost = [(job, candidate) for job, (candidate, _) in zip(stages, judged, strict=True) if candidate.verdict == verdict]
        if lost:
            break
    job, worst = max(lost, key=lambda pair: pair[1].memory_gib or 0.0) if lost else (stages[0], judged[0][0])
    times = [time for _, time in judged if time is not None]
    if len(times) < len(stages):
        return replace(worst, reason=f"at {job.seq_length:,} tokens: {worst.reason}", seconds=None), None
    time = _mean_time(times, [job.steps for job in stages])
    whole = replace(
        worst,
        memory_gib=max(candidate.memory_gib or 0.0 for candidate, _ in judged),
        seconds=time.total,
        tokens_per_second_per_gpu=time.tokens_per_second_per_gpu,
        reason=f"at {job.seq_length:,} tokens: {worst.reason}" if lost else "",
    )
    return whole, time


def _mean_time(times: Sequence[StepTime], steps: Sequence[int]) -> StepTime:
    """The mean step of stages of so many steps; all have the same tokens a step."""
    mean = {
        part.name: sum(getattr(time, part.name) * count for time, count in zip(times, steps, strict=True)) / sum(steps)
        for part in fields(StepTime)
    }
    tokens = times[0].tokens_per_second_per_gpu * times[0].total  # a step and GPU
    whole = StepTime(**mean)
    return replace(whole, tokens_per_second_per_gpu=tokens / whole.total)


def _rank(candidate: Candidate, time: StepTime) -> tuple[float, ...]:
    """By time in steps of half a percent, which is less than the prediction knows; then the plainer layout; then memory."""
    layout = candidate.layout
    plainness = layout.pipeline_model_parallel_size * layout.model_chunks
    return round(math.log(time.total) / 0.005), plainness, layout.tensor_model_parallel_size, candidate.memory_gib or 0.0


def _why_slower(time: StepTime, best: StepTime) -> str:
    """The part of the step in which a layout loses most against the fastest."""
    losses = {
        "runs layers again for the backward pass": time.compute - best.compute,
        "tensor-parallel traffic that nothing covers": time.tensor_parallel - best.tensor_parallel,
        "context-parallel ring outlasts attention": time.context_parallel - best.context_parallel,
        "gradient reduction outlasts the backward pass": time.data_parallel - best.data_parallel,
        "pipeline bubble": time.bubble - best.bubble,
        "activations on their way to host memory and back": time.offload - best.offload,
    }
    why = max(losses, key=lambda name: losses[name])
    share = time.total / best.total - 1
    if share < 0.005:
        return f"{share:+.1%}: as fast within what the plan knows, by a less plain layout or with more memory"
    return f"{share:.1%} slower, mostly: {why} (+{losses[why]:.2f} s a step)"


def candidates(model: ModelShape, gpu: Gpu, base: Layout, pinned: Collection[str] = ()) -> Iterator[Layout]:
    """Layouts worth judging: TP within a node, powers of two, and per size a few micro batches and recomputations.

    Args:
        model, gpu: sizes that bound the choices.
        base: what every candidate keeps: GPUs, precision, loss, sharding, offload.
        pinned: fields that keep the value of `base` too. Sequence parallelism that is not pinned is on wherever TP is over 1.
    """

    def among(name: str, choices: Iterable[Any]) -> Iterable[Any]:
        return [getattr(base, name)] if name in pinned else choices

    for tensor in among("tensor_model_parallel_size", _powers(min(gpu.gpus_per_node, 8, base.gpus))):
        sequence = base.sequence_parallel if "sequence_parallel" in pinned else tensor > 1
        if sequence and tensor == 1:
            continue  # asked for, and impossible
        for context in among("context_parallel_size", _powers(base.gpus // tensor)):
            for pipeline in among(
                "pipeline_model_parallel_size", _powers(min(base.gpus // (tensor * context), model.num_layers))
            ):
                if base.gpus % (tensor * context * pipeline):
                    continue
                for chunks in among("virtual_pipeline_model_parallel_size", _chunk_counts(model, pipeline)):
                    layers = max(1, model.num_layers // (pipeline * (chunks or 1)))
                    recomputations = dict.fromkeys(("none", "selective", f"block:{max(1, layers // 2)}", "full"))
                    for recompute in among("recompute", recomputations):
                        for micro in among("micro_batch_size", MICRO_BATCHES):
                            yield replace(
                                base,
                                tensor_model_parallel_size=tensor,
                                context_parallel_size=context,
                                pipeline_model_parallel_size=pipeline,
                                virtual_pipeline_model_parallel_size=chunks,
                                sequence_parallel=sequence,
                                micro_batch_size=micro,
                                recompute=recompute,
                            )


def nearest_step(stages: Sequence[Job], layouts: Iterable[Sequence[Layout]]) -> int | None:
    """Tokens of an optimizer step, as near as can be to those of `stages`, that can be shared out; None where others are wrong.

    Args:
        layouts: what may be taken: of each, the layout of every stage.
    """
    asked = stages[0].tokens_per_step
    found: set[int] = set()
    for staged in layouts:
        # The windows that go together; model chunks take whole rounds of the pipeline.
        rounds = [each.pipeline_model_parallel_size if each.model_chunks > 1 else 1 for each in staged]
        windows = [each.micro_batch_size * each.data_parallel_size * n for each, n in zip(staged, rounds, strict=True)]
        unit = math.lcm(*(n * job.seq_length for n, job in zip(windows, stages, strict=True)))
        near = max(1, round(asked / unit)) * unit
        together = zip(stages, staged, strict=True)
        if not any(layout_faults(job.model, layout, job.seq_length, near // job.seq_length) for job, layout in together):
            found.add(near)
    return min(found, key=lambda near: (abs(near - asked), near), default=None)


def _nothing_left(base: Layout, pinned: Collection[str]) -> ConfigError:
    kept = ", ".join(f"{name}={getattr(base, name)}" for name in sorted(pinned)) or "nothing"
    return ConfigError("gpus", base.gpus, f"no layout of so many GPUs keeps {kept}; leave one of them to the search")


def _powers(limit: int) -> list[int]:
    return [1 << k for k in range(limit.bit_length()) if 1 << k <= limit]


def _chunk_counts(model: ModelShape, pipeline: int) -> list[int | None]:
    """No interleaving, and the most of it: one layer a chunk needs the least bubble, some layers a chunk less traffic."""
    if pipeline == 1 or model.num_layers % pipeline:
        return [None]
    layers = model.num_layers // pipeline
    finest = [v for v in range(2, layers + 1) if layers % v == 0]
    return [None, *dict.fromkeys((finest[0], finest[-1]))] if finest else [None]


@dataclass(frozen=True, kw_only=True)
class Longest:
    """The longest sequence that fits a machine.

    Attributes:
        seq_length: tokens, a multiple of 1,024.
        layout: the layout that holds it.
        memory_gib: predicted peak there.
    """

    seq_length: int
    layout: Layout
    memory_gib: float


def longest_length(model: ModelShape, gpu: Gpu, base: Layout, pinned: Collection[str] = (), *, limit: int = 1 << 26) -> Longest:
    """The longest sequence for which any layout fits.

    Args:
        model, gpu: what is trained, and on what.
        base: number of GPUs, precision, loss, sharding and offload.
        pinned: fields of Layout that keep the value of `base`; of the others recomputation is full, the micro batch one
            sequence, and the pipeline not interleaved.
        limit: the longest that is tried, tokens.

    Raises:
        ConfigError: not even 1,024 tokens fit, or no layout is left by what is pinned.
    """
    best: Longest | None = None
    least_memory: dict[str, Any] = {"recompute": "full", "micro_batch_size": 1, "virtual_pipeline_model_parallel_size": None}
    base = replace(base, **{name: value for name, value in least_memory.items() if name not in pinned})
    layouts = list(candidates(model, gpu, base, {*pinned, *least_memory}))
    if not layouts:
        raise _nothing_left(base, pinned)
    reasons: list[str] = []
    for layout in layouts:
        unit = math.lcm(1024, 2 * layout.context_parallel_size * layout.tensor_model_parallel_size)  # what the ranks can share
        batch = layout.micro_batch_size * layout.data_parallel_size * layout.pipeline_model_parallel_size
        faults = layout_faults(model, layout, unit, batch)
        if faults:
            reasons.append("; ".join(faults))
            continue
        low, high = 0, limit // unit
        while low < high:
            middle = (low + high + 1) // 2
            fits = _memory_gib(model, layout, middle * unit, batch) <= gpu.memory_gib * FILL
            low, high = (middle, high) if fits else (low, middle - 1)
        if low and (best is None or low * unit > best.seq_length):
            best = Longest(seq_length=low * unit, layout=layout, memory_gib=_memory_gib(model, layout, low * unit, batch))
    if best is None and len(reasons) == len(layouts):
        raise ConfigError("gpus", base.gpus, f"no layout can run: {reasons[0]}")
    if best is None:
        raise ConfigError("gpus", base.gpus, f"{base.gpus} x {gpu.name} cannot hold 1,024 tokens of this model; take more GPUs")
    return best


def _memory_gib(model: ModelShape, layout: Layout, seq_length: int, batch: int) -> float:
    return memory_plan(model, layout, seq_length=seq_length, global_batch_size=batch).total / GIB
