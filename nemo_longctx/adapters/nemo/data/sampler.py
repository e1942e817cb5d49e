"""The curriculum as NeMo's data sampler: one run, one data loader, sequence length and batch that change between two steps.

NeMo asks its data sampler before every step for sequence length, micro batch size and number of micro batches, and then takes
so many micro batches from the loader. Both are derived here from the same number, the optimizer step, so they cannot part: the
step gives the consumed tokens, and those the stage and the samples.
"""

from __future__ import annotations

import atexit
import dataclasses
import math
import os
import shlex
import signal
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from megatron.core import num_microbatches_calculator, parallel_state
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader

from nemo_longctx.adapters.megatron.activations import set_activation_policy
from nemo_longctx.adapters.nemo.data.evaluation_loss import EvaluationLossCallback
from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum, Stage
from nemo_longctx.data.evaluation import EvaluationBatchSampler, EvaluationSet
from nemo_longctx.runs import STOP_SIGNALS


class CurriculumBatchSampler:
    """The sample numbers of one data-parallel rank's micro batches, from a sample of the run to its end.

    Args:
        curriculum: the stages.
        first_sample: where to begin: a multiple of the stage's global batch after its first sample.
        rank, world_size: data-parallel rank, and how many there are.
    """

    def __init__(self, curriculum: Curriculum, *, first_sample: int, rank: int, world_size: int):
        self.curriculum, self.first_sample, self.rank, self.world_size = curriculum, first_sample, rank, world_size

    def __len__(self) -> int:
        """Micro batches from `first_sample` on, and one for each step before it.

        That is what Lightning takes to have been fetched before a restart; it validates where the last batch is reached.
        """
        begun = self.curriculum.tokens_at_sample(self.first_sample) // self.curriculum.tokens_per_step
        return begun + sum(
            (stage.end_step - max(stage.first_step, begun)) * stage.num_microbatches(self.world_size)
            for stage in self.curriculum.plan
            if stage.end_step > begun
        )

    def __iter__(self) -> Iterator[list[int]]:
        for stage in self.curriculum.plan:
            size = stage.micro_batch_size
            start = max(stage.first_sample, self.first_sample)
            for first in range(start + self.rank * size, stage.end_sample, size * self.world_size):
                yield list(range(first, first + size))


class CurriculumDataSampler(MegatronDataSampler):
    """NeMo's data sampler under a curriculum. Consumed tokens are `trainer.global_step * tokens_per_step`, always.

    Args:
        curriculum: the stages; the data module may replace it before `setup`, once the trainer tells the run's length.
        document_masking: windows of a micro batch are laid end to end, so pipeline stages exchange one row of them.
        output_log: log consumed tokens and samples, sequence length and global batch size.
    """

    def __init__(self, curriculum: Curriculum, *, document_masking: bool = False, output_log: bool = True):
        first = curriculum.plan[0]
        super().__init__(
            seq_len=first.seq_length,
            micro_batch_size=first.micro_batch_size,
            global_batch_size=first.global_batch_size,
            output_log=output_log,
        )
        self.curriculum, self.document_masking = curriculum, document_masking
        self.start_token = 0  # consumed tokens at the start or the restart
        self.evaluation: dict[str, EvaluationBatchSampler] = {}
        self.evaluation_limits: dict[str, int | None] = {}
        self.evaluation_losses = EvaluationLossCallback()
        self.global_rank = 0
        self._stage: Stage | None = None
        self._activations: tuple[str | None, str | None] = (None, None)
        for name in ("recompute", "offload"):
            values = [getattr(stage, name) for stage in curriculum.stages]
            if None in values and any(values):
                mend = "name it in every stage or in none: a stage without would keep that of the stage before"
                raise ConfigError(f"curriculum.stages.{name}", values, mend)
        self._started = False

    def setup(self, global_rank: int) -> None:
        """Check that every stage's batch divides over the ranks, and set up the calculator for the first stage."""
        self.global_rank = global_rank
        for stage in self.curriculum.plan:
            stage.num_microbatches(self.data_parallel_size)
        self._enter(self.curriculum.stage_at_token(self.start_token))

    def connect(self, trainer: Any) -> None:
        """The host's hook: the losses of evaluation sets are of the trainer's own hooks."""
        super().connect(trainer)
        if self.evaluation_losses not in trainer.callbacks:
            trainer.callbacks.append(self.evaluation_losses)

    def resume_at(self, token: int) -> None:
        """Go on after `token` consumed tokens: before the loaders are made, and before the first step."""
        self.start_token = token
        self._enter(self.curriculum.stage_at_token(token))

    @property
    def data_parallel_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    @property
    def evaluation_microbatches(self) -> int:
        """Micro batches of an evaluation step: one, or what an interleaved pipeline needs at least."""
        virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        return parallel_state.get_pipeline_model_parallel_world_size() if virtual else 1

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """The loader of this rank: training goes on at `start_token`, evaluation goes through all its sets."""
        mode = getattr(dataloader, "mode", "train")
        rank, world_size = parallel_state.get_data_parallel_rank(), self.data_parallel_size
        batch_sampler: Any
        dataset: Any = dataloader.dataset
        if mode == "train":
            first = self.curriculum.samples_at_token(self.start_token)
            batch_sampler = CurriculumBatchSampler(self.curriculum, first_sample=first, rank=rank, world_size=world_size)
        else:
            batch_sampler = self.evaluation[mode] = EvaluationBatchSampler(
                dataset.sets,
                multiple=self.evaluation_microbatches,
                limit=self.evaluation_limits.get(mode),
                rank=rank,
                world_size=world_size,
            )
        return _Loader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=dataloader.num_workers,
            pin_memory=dataloader.pin_memory,
            persistent_workers=dataloader.persistent_workers,
            collate_fn=dataloader.collate_fn,
            worker_init_fn=_leave_stops_to_the_run,
        )

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """Samples of the run so far, over all stages and restarts. The argument, NeMo's, is not needed."""
        step = self.trainer.global_step if hasattr(self, "trainer") else 0
        return self.curriculum.samples_at_token(step * self.curriculum.tokens_per_step)

    # Megatron callbacks

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """Shapes of this step: those of the curriculum's stage, or of the evaluation set."""
        shapes: Stage | EvaluationSet
        if step.trainer.training:
            stage = self.curriculum.stage_at_step(step.step_i)
            self._set_activations(step, stage)
            if stage is not self._stage or not self._started:
                self._enter(stage)
                rank_zero_info(
                    f"stage {stage.number} from step {stage.first_step}, {stage.first_token} tokens: sequences of "
                    f"{stage.seq_length}, global batch {stage.global_batch_size}, micro batch {stage.micro_batch_size}, "
                    f"recompute {stage.config.recompute or 'as the model'}, offload {stage.config.offload or 'none'}"
                )
            self._check_clock(step.step_i)
            shapes, num_microbatches = stage, stage.num_microbatches(self.data_parallel_size)
        else:
            shapes, num_microbatches = self._evaluated(step), self.evaluation_microbatches
        seq_length, micro_batch_size = shapes.seq_length, shapes.micro_batch_size
        if self.document_masking:
            seq_length, micro_batch_size = seq_length * micro_batch_size, 1
        return dataclasses.replace(
            step, seq_length=seq_length, micro_batch_size=micro_batch_size, num_microbatches=num_microbatches
        )

    def _check_clock(self, step: int) -> None:
        """At the first step: the loader and the trainer begin at the same address."""
        token = step * self.curriculum.tokens_per_step
        if not self._started and token != self.start_token:
            what = f"the trainer goes on at {token} tokens, the checkpoint's data at {self.start_token}"
            raise ConfigError("resume", step, f"{what}; it is not of this data module, so start from its weights alone")
        self._started = True

    def on_megatron_microbatches_start(self, step: MegatronStep) -> None:
        """Nothing: a change of the global batch is no end of a run here."""

    def on_megatron_step_end(self, step: MegatronStep, microbatch_outputs: Sequence[Any] = ()) -> None:
        """Log the clock or note the set's losses; stop before a stage that this run cannot hold."""
        if not step.trainer.training:
            self.evaluation_losses.add(self._evaluated(step).name, microbatch_outputs)
            return
        done = step.step_i + 1
        stage = self.curriculum.stage_at_step(step.step_i)
        if self.output_log:
            tokens = done * self.curriculum.tokens_per_step
            samples = self.curriculum.samples_at_token(tokens)
            self._log(step, "consumed_tokens", tokens)
            self._log(step, "consumed_samples", samples)
            self._log(step, "seq_length", stage.seq_length, prog_bar=True)
            self._log(step, "global_batch_size", stage.global_batch_size, prog_bar=True)
        if done < self.curriculum.total_steps:
            missing = self.missing_sizes(self.curriculum.stage_at_step(done))
            if missing:
                step.trainer.should_stop = True
                rank_zero_info(f"the next stage needs other parallel sizes; go on with\n  {command_with(missing)}")

    def missing_sizes(self, stage: Stage) -> dict[str, int]:
        """The parallel sizes that `stage` asks for and this run does not have."""
        live = live_sizes()
        return {name: size for name, size in stage.config.parallel_sizes.items() if live[name] != size}

    def _enter(self, stage: Stage) -> None:
        """Let the host's calculator and the fields that NeMo's own code reads speak of `stage`."""
        num_microbatches_calculator.reconfigure_num_microbatches_calculator(
            self.global_rank,
            None,
            stage.global_batch_size,
            stage.micro_batch_size,
            self.data_parallel_size,
        )
        self.seq_len, self.micro_batch_size = stage.seq_length, stage.micro_batch_size
        self.global_batch_size, self._stage = stage.global_batch_size, stage

    def _set_activations(self, step: MegatronStep, stage: Stage) -> None:
        """Recomputation and offload of `stage`, from its first step on, also where a run begins or goes on inside it."""
        wanted = (stage.config.recompute, stage.config.offload)
        if wanted != self._activations:
            set_activation_policy(step.pipeline, recompute=wanted[0], offload=wanted[1])
            self._activations = wanted

    def _evaluated(self, step: MegatronStep) -> EvaluationSet:
        """The set that this evaluation step belongs to."""
        trainer = step.trainer
        if trainer.testing:
            mode, loop = "test", trainer.test_loop
        else:
            mode = "validation"
            loop = trainer.validate_loop if trainer.state.fn == TrainerFn.VALIDATING else trainer.fit_loop.epoch_loop.val_loop
        return self.evaluation[mode].set_of_step(loop.batch_progress.current.ready - 1)

    def _log(self, step: MegatronStep, name: str, value: int, *, prog_bar: bool = False) -> None:
        # float64: float32 counts to 16 million. Pinned, so that the copy to the device does not wait for it.
        number = torch.tensor(value, dtype=torch.float64, pin_memory=torch.cuda.is_available())
        number = number.to(step.pl_module.device, non_blocking=True)
        step.pl_module.log(name, number, prog_bar=prog_bar, batch_size=1)


def _leave_stops_to_the_run(worker: int) -> None:
    """Stop signals reach the whole process group; the step that is being made still needs its data."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class _Loader(DataLoader):
    """A loader whose workers end with the interpreter, though they do not hear the signal by which it asks them to.

    An error that leaves an iterator alive would else wait for them for good.
    """

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        _OWNERS.update(dict.fromkeys(getattr(iterator, "_workers", ()), os.getpid()))
        return iterator


_OWNERS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # worker -> the process that started it


@atexit.register  # behind multiprocessing's own, so that it runs before that
def _end_workers() -> None:
    left = [worker for worker, owner in _OWNERS.items() if owner == os.getpid() and worker.is_alive()]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the end of a worker for a fault
    for worker in left:
        worker.kill()


def live_sizes() -> dict[str, int]:
    """The parallel sizes of this run."""
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
    }


def command_with(sizes: dict[str, int]) -> str:
    """This run's own command with other parallel sizes, in the names of our recipes: `trainer.NAME=SIZE`.

    Under torchrun it is torchrun's, as it was typed. Where the run's processes cannot be split that way, it starts on this node
    as many as can.
    """
    together, world_size = math.prod((live_sizes() | sizes).values()), torch.distributed.get_world_size()
    settings = {f"trainer.{name}": size for name, size in sizes.items()}
    if world_size % together:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(together), *sys.argv]
        settings |= {"trainer.devices": together, "trainer.num_nodes": 1}
    elif torch.distributed.is_torchelastic_launched():
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
    else:
        command = [sys.executable, *sys.orig_argv[1:]]  # with -m, -u and the like
    kept = [argument for argument in command if argument.partition("=")[0].lstrip("+") not in settings]
    return shlex.join([*kept, *(f"{name}={size}" for name, size in settings.items())])
