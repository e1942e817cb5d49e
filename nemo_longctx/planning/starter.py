"""A recipe of one's own to begin with: a checkpoint, a target length, data and a machine -> commented YAML and next commands.

Every number in it is a choice that the comments give a source for; nothing is trained or loaded here.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import is_corpus
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.hf.other_formats import no_nemo_checkpoint, told_apart
from nemo_longctx.planning.gpus import gpu_by_name
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.models import ModelShape, json_mapping, model_from_hf, model_from_nemo, nemo_context
from nemo_longctx.planning.override import override_values
from nemo_longctx.planning.planner import Candidate, Job, search
from nemo_longctx.rope.analysis import LONGEST, practised_base, smallest_base
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.nemo import variant_of_context
from nemo_longctx.rope.request import describe
from nemo_longctx.start import on_each_node, torchrun

CPU = "cpu"
PLAIN = ("rope", "abf")  # variants that a base says whole
# Of the paper: tokens a step, warm-up of 2,000 steps in 100,000, the final rate a tenth of the peak (Xiong et al. 2023, 2.1).
PAPER_TOKENS_PER_STEP = 4_194_304
WARMUP_SHARE = 0.02
PAPER_LR, PAPER_PARAMETERS = 2.0e-5, 7e9
# Fu et al. 2024 (arXiv 2402.10171): 0.5 to 5 B tokens teach a 7B 128k; the paper itself spent 400 B.
GPU_TOKENS = 2_000_000_000
CPU_STEPS, CPU_WINDOWS = 200, 4  # minutes on a laptop
LOOKS = 10  # validations and checkpoints of a run


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint as `init` reads it.

    Attributes:
        path: as it was given.
        hugging_face: whether it is a Hugging Face directory, which `nemo-longctx import` turns into a NeMo checkpoint first.
        model: its sizes; `seq_length` is the trained length.
        rope: its position encoding.
        tokenizer: the directory of a NeMo checkpoint's tokenizer; None where it carries none.
    """

    path: Path
    hugging_face: bool
    model: ModelShape
    rope: RopeVariant
    tokenizer: Path | None = None

    @property
    def nemo_path(self) -> Path:
        """Where the NeMo checkpoint is, or will be after the import."""
        return Path("checkpoints") / self.path.resolve().name if self.hugging_face else self.path


def read_source(path: Path) -> Source:
    """Sizes and RoPE of a NeMo checkpoint (or run) or a Hugging Face directory, without loading either.

    Raises:
        ConfigError: neither is there, or its sizes or RoPE cannot be read.
    """
    context = nemo_context(path) if path.is_dir() else None
    if context is not None:
        import yaml

        shape = model_from_nemo(context)  # first: it says what is no context
        rope = variant_of_context(yaml.safe_load(context.read_text(encoding="utf-8")))
        carried = context.with_name("tokenizer")
        return Source(path=path, hugging_face=False, model=shape, rope=rope, tokenizer=carried if carried.is_dir() else None)
    if (path / "config.json").is_file():
        shape = model_from_hf(path / "config.json")
        rope = RopeVariant.from_hf(json_mapping(path / "config.json", key="--checkpoint"))
        return Source(path=path, hugging_face=True, model=shape, rope=rope)
    if path.is_dir() and (told := told_apart(path)) is not None:
        raise ConfigError("--checkpoint", str(path), told)
    if (path.parent / "config.json").is_file() and path.is_file():
        raise ConfigError("--checkpoint", str(path), f"is a file; give the directory that it lies in: {path.parent}")
    mend = "give a NeMo checkpoint (a directory with context/), a run's directory, or a Hugging Face directory with config.json"
    raise ConfigError("--checkpoint", str(path), no_nemo_checkpoint(path, f"no checkpoint that can be read; {mend}"))


@dataclass(frozen=True, kw_only=True)
class Starter:
    """What `init` decided.

    Attributes:
        source: the checkpoint.
        target: tokens of the extended context.
        data: prefix of the corpus that the run will read.
        name: of the run.
        base: RoPE base of the run; None keeps the checkpoint's RoPE.
        curriculum: stages, tokens a step, total.
        layout: parallel sizes on GPUs, as the planner's search judged them; None on a CPU.
        gpu: kind of GPU, or `cpu`.
        holdout: whether there is a holdout beside the corpus, or `prepare` is going to make one.
    """

    source: Source
    target: int
    data: str
    name: str
    base: float | None
    curriculum: Curriculum
    layout: Candidate | None
    gpu: str
    holdout: bool

    def steps(self, share: float) -> int:
        """Tokens of about `share` of the run, in whole steps, at least one."""
        return max(1, round(self.curriculum.total_steps * share)) * self.curriculum.tokens_per_step


def plan_starter(
    source: Source, *, target: int, data: str, name: str, gpu: str = CPU, gpus: int = 1, tokens: int | None = None
) -> Starter:
    """Decide RoPE, curriculum and layout.

    Args:
        source: the checkpoint to extend.
        target: context to reach, tokens.
        data: corpus prefix.
        name: of the run.
        gpu: `cpu` or a GPU of the planner's.
        gpus: how many.
        tokens: of the whole run; None takes what the comments in the recipe give the source of.

    Raises:
        ConfigError: a target that is no longer than the trained length, too few GPUs, or no layout that fits.
    """
    trained = source.model.seq_length
    if target <= trained:
        mend = f"the checkpoint is trained at {trained:,} tokens already; give a longer target"
        raise ConfigError("--target", target, mend)
    if target > LONGEST:
        raise ConfigError("--target", target, f"is longer than any context: {LONGEST:,} tokens at most")
    if gpus < 1:
        raise ConfigError("--gpus", gpus, "must be 1 or more; leave it out for a CPU")
    if gpu == CPU:
        per_step = CPU_WINDOWS * target
        steps = CPU_STEPS if tokens is None else max(1, tokens // per_step)
    else:
        per_step = _windows(max(1, round(PAPER_TOKENS_PER_STEP / target)), gpus) * target
        steps = max(1, (GPU_TOKENS if tokens is None else tokens) // per_step)
    stage = StageConfig(until=1.0, seq_length=target)
    curriculum = Curriculum(stages=(stage,), tokens_per_step=per_step, total_tokens=steps * per_step)
    return Starter(
        source=source,
        target=target,
        data=data,
        name=name,
        base=_base(source, target),
        curriculum=curriculum,
        layout=None if gpu == CPU else _layout(source.model, curriculum, gpu, gpus),
        gpu=gpu,
        holdout=not is_corpus(data) or is_corpus(f"{data}_holdout"),
    )


def _windows(about: int, gpus: int) -> int:
    """Windows of a step, near `about`, that copies of the model on so many GPUs can share: 120 on 24 for 128."""
    shared = max(each for each in range(1, min(gpus, about) + 1) if gpus % each == 0)
    return max(1, round(about / shared)) * shared


def _base(source: Source, target: int) -> float:
    """The base of a published model trained at such a length, or else the smallest that keeps Men et al.'s bound there."""
    base = source.rope.base
    practised = practised_base(target, base)
    if practised is not None:
        return practised
    return float(f"{smallest_base(target, source.model.head_dim, at_least=base):.3g}")


def _layout(model: ModelShape, curriculum: Curriculum, gpu: str, gpus: int) -> Candidate:
    (stage,) = curriculum.plan
    job = Job(
        model=model,
        gpu=gpu_by_name(gpu),
        seq_length=stage.seq_length,
        tokens_per_step=curriculum.tokens_per_step,
        steps=curriculum.total_steps,
    )
    best = search([job], Layout(gpus=gpus, loss="chunked", sharding="optimizer"))[0]
    if best.verdict != "fastest":
        raise ConfigError(
            "--gpus", gpus, f"no layout of so many {gpu} trains this model at {stage.seq_length:,}: {best.reason}"
        )
    return best


def learning_rate(parameters: int) -> float:
    """Peak rate: the paper's 2e-5 at 7B and 1e-5 beyond 13B (section 2.1); smaller models take more, here by the square root of
    their size, up to 1e-3. A rule of thumb, which the recipe says."""
    if parameters > 15e9:
        return PAPER_LR / 2
    return float(f"{min(1e-3, PAPER_LR * math.sqrt(max(1.0, PAPER_PARAMETERS / parameters))):.2g}")


def _replaced(rope: RopeVariant) -> list[str]:
    """Comments on what this RoPE takes the place of, where the checkpoint's is more than a base."""
    if rope.variant in PLAIN:
        return []
    return [
        f"# The checkpoint's RoPE is {describe(rope)}, whose place this takes: the base alone is what changes its frequencies.",
        "# To keep it, take out `override /rope` and `rope`; to stretch it further, name it (rope=yarn, rope=llama31, ...).",
    ]


def starter_yaml(starter: Starter) -> str:
    """The recipe as commented YAML, which `recipe=FILE` takes."""
    import yaml

    s, curriculum = starter, starter.curriculum
    lr = learning_rate(s.source.model.parameters)
    trainer: dict[str, Any] = {}
    distributed, stages = False, [{"until": 1.0, "seq_length": s.target, "micro_batch_size": 1}]
    if s.layout is not None:
        devices = min(gpu_by_name(s.gpu).gpus_per_node, s.layout.layout.gpus)
        decided = override_values(s.layout.layout, curriculum, devices=devices)
        trainer, distributed, stages = decided["trainer"], decided["optimizer"]["distributed"], decided["curriculum"]["stages"]
    look = s.steps(1 / LOOKS)
    validation = [
        {"name": "long", "path": f"{s.data}_holdout", "seq_length": s.target, "micro_batch_size": 1, "samples": 16},
        {"name": "short", "path": f"{s.data}_holdout", "seq_length": s.source.model.seq_length, "micro_batch_size": 1,
         "samples": 16},
    ]  # fmt: skip

    def block(values: dict[str, Any]) -> str:
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)

    parts: list[str | None] = [
        "# @package _global_",
        f"# Written by `nemo-longctx init`: {s.source.path} from {s.source.model.seq_length:,} to {s.target:,} tokens.",
        "# Change what you like; `nemo-longctx train recipe=THIS_FILE --dry-run` checks all of it before anything is loaded.",
        "defaults:",
        "  - override /model: from_checkpoint",
        "  - override /rope: abf",
        "  - override /data: corpus",
        f"  - override /trainer: {'cpu' if s.gpu == CPU else 'gpu'}",
        "  - _self_",
        "",
        yaml.safe_dump({"name": s.name, "restore_from": str(s.source.nemo_path)}, sort_keys=False, width=1000),
        "",
        f"# Adjusted base frequency: the checkpoint has base {s.source.rope.base:g}. Where {s.base:g} comes from:",
        f"# nemo-longctx rope advise --from {s.source.model.seq_length} --to {s.target} --base {s.source.rope.base:g}",
        *_replaced(s.source.rope),
        block({"rope": {"base": s.base}}),
        "",
        "# The corpus that `nemo-longctx prepare` makes, and its held-out documents at the new and at the old length.",
        block({"data": {"mix": {"sources": [{"path": s.data}]}, "validation": validation if s.holdout else []}}),
        "",
        f"# {curriculum.total_steps:,} steps of {curriculum.tokens_per_step:,} tokens. "
        + (
            "A laptop's minutes: enough to see it work, not to finish."
            if s.gpu == CPU
            else "The paper's 4 Mi tokens a step; Fu et al. 2024 find 0.5 to 5 B tokens enough, the paper spent 400 B."
        ),
        block(
            {
                "curriculum": {
                    "stages": stages,
                    "tokens_per_step": curriculum.tokens_per_step,
                    "total_tokens": curriculum.total_tokens,
                }
            }
        ),
        "",
        "# The paper's 2e-5 for 7B, more for smaller models by a rule of thumb (the square root of the size, up to 1e-3);",
        "# warm-up 2 % of the steps as the paper's 2,000 of 100,000.",
        block(
            {
                "optimizer": {
                    "lr": lr,
                    "min_lr": float(f"{lr / 10:.2g}"),
                    "warmup_tokens": s.steps(WARMUP_SHARE),
                    "distributed": distributed,
                }
            }
        ),
    ]
    if s.layout is not None:
        parts.append(
            f"# The planner's fastest layout on {s.layout.layout.gpus} x {s.gpu}: {s.layout.memory_gib:.0f} GiB a GPU."
        )
    parts += [
        block({"trainer": {**trainer, **({"val_every_tokens": look} if s.holdout else {})}}) if trainer or s.holdout else None,
        block({"checkpoint": {"every_tokens": look}}),
    ]
    return "\n".join(part.rstrip("\n") for part in parts if part is not None) + "\n"


def next_commands(starter: Starter, recipe: str, *, inputs: str | None) -> list[str]:
    """What to type next, in order: import and prepare where they are needed, then train.

    Args:
        recipe: the file that was written.
        inputs: text files or a folder that the corpus is to be made of; None where it is there.
    """
    s, lines = starter, []
    if s.source.hugging_face:
        lines.append(["nemo-longctx", "import", str(s.source.path), str(s.source.nemo_path)])
    if inputs is not None:
        carried = s.source.path if s.source.hugging_face else s.source.tokenizer
        tokenizer = "TOKENIZER" if carried is None else str(carried)
        lines.append(["nemo-longctx", "prepare", inputs, "--output", s.data, "--tokenizer", tokenizer, "--holdout", "0.05"])
    gpus = 1 if s.layout is None else s.layout.layout.gpus
    devices = gpus if s.layout is None else min(gpu_by_name(s.gpu).gpus_per_node, gpus)
    lines.append([*torchrun(gpus // devices, devices), "train", f"recipe={recipe}"])
    said = [shlex.join(words) for words in lines]
    return [*said[:-1], said[-1] + on_each_node(gpus // devices)]
