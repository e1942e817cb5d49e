"""How a run ends: by a signal after a saved step, by bad numbers that are named, or finished and said so.

Signals come to one process or to all. Once a step all ranks agree, in one reduction of three numbers with the loss, so that
they stop after the same step; NeMo's own preemption plugin listens to rank 0 and one signal, and ends with status 0.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from nemo.utils import AppState
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

from nemo_longctx.adapters.megatron.host import start_results_queue
from nemo_longctx.adapters.megatron.optimizer import ask_before_updates, keep_torch_steps_apart
from nemo_longctx.adapters.nemo.launch.optimizer_settings import when_made
from nemo_longctx.checkpoints import checkpoints
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.files import OpenFiles, write_text
from nemo_longctx.loggers import IDS
from nemo_longctx.recipe_parts import BadNumbersConfig
from nemo_longctx.report.bad_numbers import BadStep, NumbersWatch
from nemo_longctx.report.evaluation import read_results
from nemo_longctx.runs import (
    FINISHED,
    LOCK,
    RunError,
    Stopped,
    StopRequest,
    ending,
    evaluation_lines,
    is_rehearsal,
    own_command,
    release_lock,
    take_lock,
    write_finished,
)

MENDS = {
    "not_finite": "look at these documents, lower optimizer.lr or lengthen optimizer.warmup_tokens, or set "
    "bad_numbers.not_finite=skip to leave such updates out; the same command goes on from the newest checkpoint",
    "spike": "look at these documents, lower optimizer.lr, or set bad_numbers.spike=skip or ignore; "
    "the same command goes on from the newest checkpoint",
}


class LifecycleCallback(Callback):
    """Stops after a saved step when a signal asks for it, watches the numbers, and says at the end where everything is.

    It comes after the callbacks that write a step's rows, and before the checkpoint's.

    Args:
        directory: the run's directory.
        curriculum: gives stage and tokens of a step.
        bad_numbers: what to do where loss or gradient go wrong; None: the defaults.
    """

    def __init__(self, *, directory: str, curriculum: Curriculum, bad_numbers: BadNumbersConfig | None = None):
        self.directory, self.curriculum = Path(directory), curriculum
        self.policies = bad_numbers or BadNumbersConfig()
        self.request = StopRequest()
        self.watch = NumbersWatch(self.policies.spike_factor, self.policies.spike_window)
        self._asked, self._loss, self._locked = 0, 0.0, False
        self._bad_samples: list[int] | None = None
        self._trainer: Any = None
        self._files = OpenFiles()

    # A run's frame

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._trainer = trainer
        if stage != "fit":
            return
        keep_own_files_in_place()
        if trainer.is_global_zero and not self._locked:
            take_lock(self.directory)
            self._locked = True
        self.request.listen()
        start_results_queue()
        loop = trainer.fit_loop
        if not isinstance(loop, _MakesUp):  # only what it does at its start changes
            loop.__class__ = type(type(loop).__name__, (_MakesUp, type(loop)), {"__module__": type(loop).__module__})

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def join() -> None:
            for optimizer in trainer.optimizers:
                if (inner := getattr(optimizer, "mcore_optimizer", None)) is not None:
                    keep_torch_steps_apart(inner)  # before a checkpoint is read
                    ask_before_updates(inner, self._permit)

        when_made(trainer, join)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.request.listen()  # the trainer's own handlers came between
        # A validation that was begun before is made again from its first window.
        trainer.fit_loop.epoch_loop.val_loop.restarting = False
        if trainer.is_global_zero:
            self._drop_later_records(trainer.global_step)
        self._agree(0.0)
        if self._asked:
            raise Stopped(self._asked)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        step, total = trainer.global_step, self.curriculum.total_steps
        if not trainer.is_global_zero:
            return
        if step >= total:
            lines = evaluation_lines([result.scalars() for result in read_results(self.directory / "results" / "eval")])
            verdicts = [callback.verdict for callback in trainer.callbacks if getattr(callback, "verdict", None) is not None]
            lines += [line for verdict in verdicts for line in verdict.lines()]
            watchers = [each for each in trainer.callbacks if getattr(each, "guard", None) is not None]
            if any(getattr(each, "verdict", watchers) is None for each in watchers):
                lines.append("short-context guard: nothing was compared, there was no second evaluation")
            write_finished(self.directory, step=step, tokens=step * self.curriculum.tokens_per_step, evaluated=lines)
            where = "" if is_rehearsal(self.directory) else f"finished: {self.directory}\n"
            print(f"\n{where}{ending(self.directory)}", flush=True)
        else:  # a stage of another layout, an alarm, a shorter trainer.max_steps: each has said so
            print(f"\nended at step {step:,} of {total:,}: {self.directory}", flush=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        self.request.forget()
        if self._locked:
            release_lock(self.directory)
            self._locked = False

    # Stops

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # a restart may have made it one less or more

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._asked and trainer.global_step < self.curriculum.total_steps:
            self._stop(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._files.bound()  # each validation leaves a cycle that holds the shared memory of its last batch, four files a set
        if trainer.sanity_checking or not trainer.fit_loop.epoch_loop.global_step:
            return
        self._agree(0.0)
        if self._asked and trainer.global_step < self.curriculum.total_steps:
            self._stop(trainer)

    def stop_is_asked(self) -> bool:
        """Whether a signal came to any rank; called by all at once, with the same answer on each. At the end there is no more
        to stop for."""
        self._agree(0.0)
        return bool(self._asked) and self._trainer.global_step < self.curriculum.total_steps

    def _stop(self, trainer: Any) -> None:
        """Save this step and leave, with the status that the signal asks for."""
        step, total = trainer.global_step, self.curriculum.total_steps
        checkpoint = trainer.checkpoint_callback
        if checkpoint is not None:
            checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
            if isinstance(trainer.strategy.checkpoint_io, AsyncFinalizableCheckpointIO):
                trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
        if trainer.is_global_zero and is_rehearsal(self.directory):
            print(f"\nstopped by {signal.Signals(self._asked).name}: what the dry run wrote is removed", flush=True)
        elif trainer.is_global_zero:
            found = checkpoints(self.directory)
            saved = f"saved in {found[0].path}" if found else "nothing was saved: the run has no checkpoint callback"
            name = signal.Signals(self._asked).name
            print(f"\nstopped by {name} after step {step:,} of {total:,}, {saved}; go on with\n  {own_command()}", flush=True)
        raise Stopped(self._asked, saved=True)

    # Numbers

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any = None, reduced: Any = None) -> None:
        if not step.trainer.training:
            return
        loss = reduced.get("loss") if isinstance(reduced, dict) else reduced
        value = 0.0 if loss is None else float(loss)
        self._bad_samples = None
        self._agree(value)
        if not math.isfinite(self._loss):
            self._bad_samples = self._samples_without_number(step, microbatch_outputs)

    def _agree(self, loss: float) -> None:
        """Let all ranks know the signal that came to any of them, and the loss that the last pipeline stage has."""
        finite = math.isfinite(loss)
        mine = [float(self.request.signum), 0.0 if finite else 1.0, loss if finite else 0.0]
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        all_of_us = torch.tensor(mine, dtype=torch.float64, device=device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(all_of_us, op=torch.distributed.ReduceOp.MAX)
        asked, bad, value = all_of_us.tolist()
        self._asked, self._loss = int(asked), math.nan if bad else value

    def _permit(self, grad_norm: float) -> bool:
        """Whether this step's update is made; raises where the run must stop. Every rank decides the same."""
        found = self.watch.judge(self._loss, grad_norm)
        if found is None:
            return True
        kind, what = found
        policy = getattr(self.policies, kind)
        bad = self._name(what, policy)
        if self._trainer.is_global_zero:
            self._write(bad)
            print(f"\n{bad.sentence()}: {_DONE[policy]}", flush=True)
        if policy == "stop":
            raise RunError(f"{bad.sentence()}; {MENDS[kind]}")
        return policy == "ignore"

    def _name(self, what: str, policy: str) -> BadStep:
        done, tokens = self._trainer.global_step, self.curriculum.tokens_per_step
        stage = self.curriculum.stage_at_step(done)
        first = self.curriculum.samples_at_token(done * tokens)
        samples = self._bad_samples or range(first, first + stage.global_batch_size)
        name = getattr(self._trainer.datamodule, "documents_of", None)
        return BadStep(
            step=done + 1,
            stage=stage.number,
            seq_length=stage.seq_length,
            first_token=done * tokens,
            last_token=(done + 1) * tokens,
            documents=() if name is None else tuple(name(samples)),
            what=what,
            policy=policy,
        )

    def _samples_without_number(self, step: Any, outputs: Any) -> list[int]:
        """The samples of the micro batches whose loss is no number, on any rank; [] where that cannot be told."""
        from megatron.core import parallel_state

        stage = self.curriculum.stage_at_step(step.step_i)
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        first = self.curriculum.samples_at_token(step.step_i * self.curriculum.tokens_per_step)
        mine: list[int] = []
        for number, output in enumerate(outputs or ()):
            if not all(bool(torch.isfinite(value).all()) for value in _tensors(output)):
                begin = first + (number * size + rank) * stage.micro_batch_size
                mine += range(begin, begin + stage.micro_batch_size)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        return sorted(set(itertools.chain.from_iterable(everyone)))

    @property
    def _records(self) -> Path:
        return self.directory / "results" / "bad_numbers.jsonl"

    def _write(self, bad: BadStep) -> None:
        self._records.parent.mkdir(parents=True, exist_ok=True)
        with self._records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(bad.record()) + "\n")

    def _drop_later_records(self, step: int) -> None:
        """A resumed run makes the steps after its checkpoint again, and names them again."""
        if not self._records.exists():
            return
        lines = [line for line in self._records.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_text(self._records, "".join(f"{line}\n" for line in kept))  # killed meanwhile, it is the old one

    def state_dict(self) -> dict[str, Any]:
        return {"past": self.watch.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watch.load(state_dict["past"])


def keep_own_files_in_place() -> None:
    """The host moves all files of a run's directory into a folder of the start before, those that the next start looks for too:
    the lock that a start holds, what the run goes by at its loggers, the note of its end.
    """
    state = AppState()
    state.files_to_move = [path for path in state.files_to_move or () if Path(path).name not in (LOCK, IDS, FINISHED)]


_DONE = {"stop": "the run stops here", "skip": "its update is left out", "ignore": "training goes on"}


def _tensors(output: Any) -> list[torch.Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else [output]
    return [value for value in values if isinstance(value, torch.Tensor)]


class _MakesUp:
    """Mixed into the class of Lightning's fit loop: what a killed run still owed at the step of its checkpoint is made up for.

    A checkpoint comes before the validation of its step, and NeMo's loop makes none at a restart. Lightning skips a fit
    whose steps are all made; then evaluation and figures of the end would be missing too.
    """

    @property
    def skip(self) -> bool:
        loop: Any = self
        if loop.restarting and loop.max_batches and 0 < loop.epoch_loop.max_steps <= loop.epoch_loop.global_step:
            return loop.trainer.limit_train_batches == 0
        return super().skip  # type: ignore[misc]

    def on_run_start(self) -> None:
        loop: Any = self
        restarting = loop.restarting
        super().on_run_start()  # type: ignore[misc]
        if restarting:  # where loggers put a validation: each checkpoint, saved within its step, has one less than was made
            loop.epoch_loop._batches_that_stepped = max(loop.epoch_loop.global_step - 1, 0)
        if restarting and loop.trainer.enable_validation and self._validation_is_owed():
            self._validate()

    def on_run_end(self) -> None:
        loop: Any = self
        if loop.trainer.enable_validation and self._last_is_owed():
            self._validate()
        super().on_run_end()  # type: ignore[misc]

    def _validate(self) -> None:
        loop: Any = self
        loop.trainer.validating = True
        loop.epoch_loop.val_loop.run()
        loop.trainer.training = True

    def _last_is_owed(self) -> bool:
        """Whether the run is at its end without a validation there.

        Lightning knows the last batch by counting, from 0 where a finished run was made longer, and then never comes to it.
        """
        loop: Any = self
        trainer, step = loop.trainer, loop.epoch_loop.global_step
        curriculum = getattr(trainer.datamodule, "curriculum", None)
        known = [callback.validated for callback in trainer.callbacks if hasattr(callback, "validated")]
        ends = bool(step and known) and curriculum is not None and step >= curriculum.total_steps
        return ends and not trainer.strategy.broadcast(any(step in steps for steps in known))  # the first rank has the rows

    def _validation_is_owed(self) -> bool:
        """Whether a run that was never stopped validates at this step, and this one has no row of it.

        Where the best checkpoints are kept, the row alone does not say that this one was compared.
        """
        loop: Any = self
        trainer, step, every = loop.trainer, loop.epoch_loop.global_step, loop.trainer.val_check_batch
        curriculum = getattr(trainer.datamodule, "curriculum", None)
        ends = curriculum is not None and step >= curriculum.total_steps
        if not step or not (ends or (every != float("inf") and step % every == 0)):
            return False
        written = any(step in getattr(callback, "validated", ()) for callback in trainer.callbacks)
        compares = trainer.checkpoint_callback is not None and trainer.checkpoint_callback.save_top_k != 0
        return compares or not trainer.strategy.broadcast(written)  # the first rank has the rows
