"""Consumed tokens -> stage: sequence length, micro batch, global batch. Tokens per optimizer step never change.

Xiong et al. 2023, section 4.4: the number of tokens in an update stays the same when the length grows, so the batch shrinks as
the sequence grows. Optimizer steps are then proportional to tokens, and whatever counts steps (learning rate, logging,
checkpoints, the end of the run) counts tokens: `tokens = step * tokens_per_step`, in every stage.

The run's samples are numbered through (`sample` below), across stages: the number and the curriculum give stage and window.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from functools import cached_property
from typing import Any

from nemo_longctx.activations import offloaded_layers, recomputed_layers
from nemo_longctx.config import ConfigError

PARALLEL_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage, as the user writes it.

    Attributes:
        until: the share of the run's tokens, in (0, 1], after which the stage is over.
        seq_length: tokens in a window.
        micro_batch_size: windows in one forward pass on one data-parallel rank.
        recompute: what is computed again in the backward pass, as `trainer.recompute`; None: as the run.
        offload: what waits in host memory for the backward pass, as `trainer.offload`; None: as the run.
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size: sizes that this stage needs. A stage
            that needs others than the run has ends the run with a checkpoint; None: as the run.
    """

    until: float
    seq_length: int
    micro_batch_size: int = 1
    recompute: str | None = None
    offload: str | None = None
    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    context_parallel_size: int | None = None

    def __post_init__(self):
        if not 0 < self.until <= 1:
            raise ConfigError("curriculum.stages.until", self.until, "a share of the run in (0, 1]; the last stage ends at 1.0")
        for name in ("seq_length", "micro_batch_size", *PARALLEL_SIZES):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"curriculum.stages.{name}", value, "a whole number of at least 1")
        if self.recompute is not None:
            recomputed_layers(self.recompute, 1, key="curriculum.stages.recompute")
        if self.offload is not None:
            offloaded_layers(self.offload, 1, key="curriculum.stages.offload")

    @property
    def parallel_sizes(self) -> dict[str, int]:
        """The parallel sizes that this stage asks for."""
        return {name: getattr(self, name) for name in PARALLEL_SIZES if getattr(self, name) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage placed in the run: half-open ranges of optimizer steps, of samples and of tokens."""

    number: int
    config: StageConfig
    global_batch_size: int
    first_step: int
    end_step: int
    first_sample: int
    end_sample: int
    first_token: int
    end_token: int

    @property
    def seq_length(self) -> int:
        return self.config.seq_length

    @property
    def micro_batch_size(self) -> int:
        return self.config.micro_batch_size

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Forward passes of one rank in an optimizer step.

        Raises:
            ConfigError: the global batch does not divide by micro batch x ranks.
        """
        together = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % together:
            what = f"stage {self.number} has a global batch of {self.global_batch_size} windows of {self.seq_length} tokens"
            near = max(1, round(self.global_batch_size / together)) * together * self.seq_length
            mend = (
                f"{what}, which micro_batch_size x {data_parallel_size} data-parallel ranks must divide; for this stage the "
                f"nearest curriculum.tokens_per_step is {near}"
            )
            raise ConfigError("curriculum.stages.micro_batch_size", self.micro_batch_size, mend)
        return self.global_batch_size // together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
    """The stages of a run.

    Attributes:
        stages: by growing `until`; the last one's is 1.0.
        tokens_per_step: tokens in one optimizer step, in every stage.
        total_tokens: tokens of the run; a multiple of `tokens_per_step`.

    Raises:
        ConfigError: stages that overlap, are empty or end early, or sizes that do not divide.
    """

    stages: tuple[StageConfig, ...]
    tokens_per_step: int
    total_tokens: int

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ConfigError("curriculum.stages", [], "name at least one stage, such as [{until: 1.0, seq_length: 4096}]")
        if self.tokens_per_step < 1:
            raise ConfigError("curriculum.tokens_per_step", self.tokens_per_step, "at least one token a step")
        if self.total_tokens < 1 or self.total_tokens % self.tokens_per_step:
            near = max(1, round(self.total_tokens / self.tokens_per_step)) * self.tokens_per_step
            mend = f"set a multiple of tokens_per_step ({self.tokens_per_step}); the nearest is {near}"
            raise ConfigError("curriculum.total_tokens", self.total_tokens, mend)
        untils = [stage.until for stage in self.stages]
        for before, after in itertools.pairwise(untils):
            if after <= before:
                raise ConfigError(
                    "curriculum.stages.until", after, f"stages overlap: each must end after the one before ({before})"
                )
        if untils[-1] != 1.0:
            raise ConfigError("curriculum.stages.until", untils[-1], "the last stage must end at 1.0")
        for config in self.stages:
            if self.tokens_per_step % config.seq_length:
                whole = math.lcm(*(stage.seq_length for stage in self.stages))
                near = max(1, round(self.tokens_per_step / whole)) * whole
                mend = f"it must divide tokens_per_step ({self.tokens_per_step}), so that each step has the same tokens"
                mend += f"; the nearest that {'all stages divide' if len(self.stages) > 1 else 'it divides'} is {near}"
                raise ConfigError("curriculum.stages.seq_length", config.seq_length, mend)
        for stage in self.plan:
            if stage.end_step == stage.first_step:
                mend = f"stage {stage.number} gets none of the {self.total_steps} optimizer steps; move it or lengthen the run"
                raise ConfigError("curriculum.stages.until", stage.config.until, mend)

    @classmethod
    def constant(cls, *, seq_length: int, global_batch_size: int, total_steps: int, micro_batch_size: int = 1) -> Curriculum:
        """One length throughout."""
        tokens = seq_length * global_batch_size
        stage = StageConfig(until=1.0, seq_length=seq_length, micro_batch_size=micro_batch_size)
        return cls(stages=(stage,), tokens_per_step=tokens, total_tokens=tokens * total_steps)

    def with_activations(self, *, recompute: str, offload: str) -> Curriculum:
        """This curriculum with the run's recomputation and offload in each stage that names none."""
        stages = [
            dataclasses.replace(
                stage,
                recompute=recompute if stage.recompute is None else stage.recompute,
                offload=offload if stage.offload is None else stage.offload,
            )
            for stage in self.stages
        ]
        return dataclasses.replace(self, stages=tuple(stages))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.total_tokens // self.tokens_per_step

    @property
    def total_samples(self) -> int:
        """Windows of the run."""
        return self.plan[-1].end_sample

    @cached_property
    def plan(self) -> tuple[Stage, ...]:
        """The stages, placed. A stage ends at the optimizer step nearest to its `until`."""
        placed: list[Stage] = []
        step = sample = 0
        for number, config in enumerate(self.stages):
            end_step = round(config.until * self.total_steps)
            batch = self.tokens_per_step // config.seq_length
            end_sample = sample + (end_step - step) * batch
            placed.append(
                Stage(
                    number=number,
                    config=config,
                    global_batch_size=batch,
                    first_step=step,
                    end_step=end_step,
                    first_sample=sample,
                    end_sample=end_sample,
                    first_token=step * self.tokens_per_step,
                    end_token=end_step * self.tokens_per_step,
                )
            )
            step, sample = end_step, end_sample
        return tuple(placed)

    def plan_from(self, token: int) -> tuple[Stage, ...]:
        """The stages from `token` on, at which an optimizer step begins: the first one is what is left of it."""
        if not token:
            return self.plan
        first = self.stage_at_token(token)
        step = token // self.tokens_per_step
        left = dataclasses.replace(first, first_step=step, first_sample=self.samples_at_token(token), first_token=token)
        return (left, *self.plan[first.number + 1 :])

    def stage_at_step(self, step: int) -> Stage:
        """The stage of optimizer step `step` (from 0). A step past the end belongs to the last stage."""
        return self.plan[bisect.bisect_right([stage.first_step for stage in self.plan], max(step, 0)) - 1]

    def stage_at_token(self, token: int) -> Stage:
        """The stage that begins, or goes on, after `token` consumed tokens."""
        return self.stage_at_step(token // self.tokens_per_step)

    def stage_of_sample(self, sample: int) -> Stage:
        """The stage that sample `sample` of the run belongs to.

        Raises:
            IndexError: the run has no such sample.
        """
        if not 0 <= sample < self.total_samples:
            raise IndexError(f"sample {sample} of {self.total_samples}")
        return self.plan[bisect.bisect_right(self._first_samples, sample) - 1]

    def samples_at_token(self, token: int) -> int:
        """How many samples make up the run's first `token` tokens.

        Raises:
            ConfigError: the address does not lie between two windows of the stage that it falls in.
        """
        stage = self.stage_at_token(min(token, self.total_tokens - 1))
        windows, rest = divmod(token - stage.first_token, stage.seq_length)
        if rest or not 0 <= token <= self.total_tokens:
            mend = f"no window begins here: stage {stage.number} has windows of {stage.seq_length} from {stage.first_token}"
            raise ConfigError("token_address", token, mend)
        return stage.first_sample + windows

    def tokens_at_sample(self, sample: int) -> int:
        """Tokens of the run's first `sample` samples: the inverse of `samples_at_token`."""
        if sample == self.total_samples:
            return self.total_tokens
        stage = self.stage_of_sample(sample)
        return stage.first_token + (sample - stage.first_sample) * stage.seq_length

    def as_dict(self) -> dict[str, Any]:
        """What the stream depends on: lengths and ranges, neither micro batches, nor recomputation, nor parallel sizes."""
        stages = [{"seq_length": stage.seq_length, "end_token": stage.end_token} for stage in self.plan]
        return {"tokens_per_step": self.tokens_per_step, "total_tokens": self.total_tokens, "stages": stages}

    @cached_property
    def _first_samples(self) -> list[int]:
        return [stage.first_sample for stage in self.plan]
