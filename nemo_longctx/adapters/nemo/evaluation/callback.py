"""Evaluation inside a training run, which goes on as if it had not been there."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from nemo.lightning.pytorch.callbacks import PEFT

from nemo_longctx.adapters.megatron.inference import MCoreCausalModel, data_group, evaluating, model_digest
from nemo_longctx.adapters.megatron.rope_module import temporary_rope
from nemo_longctx.adapters.nemo.loggers import figures_in, log_pictures
from nemo_longctx.adapters.nemo.model.config import mcore_modules
from nemo_longctx.config import ConfigError, build
from nemo_longctx.eval.checks import plainly_asked
from nemo_longctx.eval.config import EvalConfig, HarnessTask, PositionTask, longest_input
from nemo_longctx.eval.guard import Verdict, judge, plus_minus, seen_percent
from nemo_longctx.eval.results import SuiteResult, blank_result
from nemo_longctx.eval.sharing import everywhere
from nemo_longctx.eval.suite import InterruptedEvaluationError, Suite
from nemo_longctx.report.evaluation import read_results, write_results
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.runs import GUARD_STOP, write_guard_stop
from nemo_longctx.versions import versions_of

logger = logging.getLogger(__name__)
STEP = "step "  # and the number of steps behind what is measured
BASE = "base"  # name of what is measured of the checkpoint before it is changed


class LongContextEvalCallback(Callback):
    """Measures the live model at the start, every so many steps, and at the end.

    The run is left untouched: losses after an evaluation are to the bit those without it. Results go to the logger, and as
    JSON, CSV, figures and one page to `directory`, where a resumed run finds what was measured before.

    Args:
        tasks: blocks {kind: position | context | probes | answers | lm_eval, ...} (`nemo_longctx.eval.suite`).
        directory: where results go.
        every: optimizer steps between evaluations; 0 for none in the middle.
        at_start, at_end: before the first and after the last step.
        time_budget: seconds of one evaluation; tasks not expected to end within it are skipped and reported.
        guard: `GuardConfig`'s fields, or None. Tasks with `guard: true` are compared with what they were before: the checkpoint
            `base` as it is, under its own RoPE, and without one the first evaluation.
        base: NeMo checkpoint that the run starts from.
        tokenizer: Hugging Face tokenizer, its path, or None for the model's own.
        max_length: tokens the model may be asked to read; default, the longest of the tasks and the model's own length.
        results_cache: file of lm-eval results to reuse, keyed by weights, step and requests.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[Mapping[str, Any]],
        directory: str,
        every: int = 0,
        at_start: bool = True,
        at_end: bool = True,
        time_budget: float | None = None,
        guard: Mapping[str, Any] | None = None,
        base: str | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        results_cache: str | None = None,
    ):
        values: dict[str, Any] = {"tasks": tasks, "every": every, "at_start": at_start, "at_end": at_end, "guard": guard}
        values |= {"time_budget": time_budget, "max_length": max_length, "results_cache": results_cache}
        config = build(EvalConfig, values, where="eval")
        self.tasks, self.directory, self.every = list(config.tasks), Path(directory), config.every
        self.at_start, self.at_end, self.time_budget = config.at_start, config.at_end, config.time_budget
        self.guard, self.max_length, self.results_cache = config.guard, config.max_length, config.results_cache
        self.base, self.tokenizer = base, tokenizer
        self.results: list[SuiteResult] = []  # what every process has to know of each; the files have the rest
        self._unwritten: list[SuiteResult] = []  # whole, where the disk was full
        self.verdict: Verdict | None = None  # the guard's last
        self._blind: set[str] = set()  # of what it was told that too few pairs can raise no alarm any more
        self._suite: Suite | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and not step:
            self._stop_note.unlink(missing_ok=True)  # of a run that was here before
        # What is trained again is measured again, and so is all of a run that begins anew: it may have another base.
        there = read_results(self.directory) if trainer.is_global_zero and step else []
        self.results = everywhere(_known([result for result in there if _step_of(result) <= step]))[0]
        if step and self.guard and not self.results and trainer.is_global_zero:
            logger.warning("guard: nothing was measured before step %d, so changes are those since the next evaluation", step)
        self._suite = self._build(pl_module)  # a tokenizer that is missing is better missed now than at step 5,000
        if self.every and step and step % self.every == 0:
            self.evaluate(trainer, pl_module)  # of a run that was stopped meanwhile; else it is there
        if self.guard and self.base and trainer.global_step == 0:
            self._measure_base(trainer, pl_module)
        if self.at_start and trainer.global_step == 0:
            self.evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.every and trainer.global_step % self.every == 0:
            self.evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.at_end:
            self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Any, pl_module: Any) -> None:
        """Measure the model now, unless this step was measured before."""
        with _outside_training(trainer):
            self._measure(trainer, pl_module, f"{STEP}{trainer.global_step}")

    def _measure_base(self, trainer: Any, pl_module: Any) -> None:
        """The watched tasks on the checkpoint as it was: the weights that the run has now, under the checkpoint's own RoPE."""
        from nemo_longctx.adapters.nemo.model.config import checkpoint_model
        from nemo_longctx.adapters.nemo.model.rope import variant_of

        own = variant_of(checkpoint_model(str(self.base), {}))
        if own != variant_of(pl_module):  # else step 0 is the base
            with _outside_training(trainer):
                self._measure(trainer, pl_module, BASE, rope=own)

    def _measure(self, trainer: Any, pl_module: Any, name: str, rope: RopeVariant | None = None) -> None:
        if any(result.model == name for result in self.results):
            return
        if trainer.global_step:
            _have_adapters(trainer, pl_module)
        modules = mcore_modules(trainer.strategy.megatron_parallel)
        if len(modules) != 1:
            raise ConfigError("virtual_pipeline_model_parallel_size", len(modules), "evaluation inside a run needs it unset")
        _have_all_weights(trainer.strategy)
        suite = self._suite = self._suite or self._build(pl_module)  # asked for outside a training run
        if rope is not None:
            suite = Suite([task for task in self.tasks if getattr(task, "guard", False)], tokenizer=suite.tokenizer)
        length = self.max_length or max(longest_input(self.tasks), pl_module.config.seq_length)
        with contextlib.nullcontext() if rope is None else temporary_rope(modules[0], rope), evaluating(modules[0]):
            config = pl_module.config
            said = getattr(config, "generation_config", None)
            model = MCoreCausalModel(modules[0], vocab_size=config.vocab_size, max_length=length, generation_config=said)
            asked = self.results_cache and any(isinstance(task, HarnessTask) for task in self.tasks)
            identity = {"weights": model_digest(modules[0]), "step": trainer.global_step} if asked else {}
            try:
                result = suite.run(
                    model,
                    name=name,
                    harness=lambda task: self._harness(task, model, suite.tokenizer, identity),
                    group=data_group(),
                    quiet=not trainer.is_global_zero,
                    time_budget=self.time_budget,
                    interrupted=next((one.stop_is_asked for one in trainer.callbacks if hasattr(one, "stop_is_asked")), None),
                )
            except InterruptedEvaluationError:  # the run is stopped, and measures this step when it goes on
                return
            finally:
                model.release()
        self.results.append(result)
        self._report(trainer, result)
        self._watch(trainer, result)
        self.results = _known(self.results)
        _give_back_memory()

    def _build(self, pl_module: Any) -> Suite:
        tokenizer = self.tokenizer or getattr(pl_module, "tokenizer", None)
        if tokenizer is not None:
            from nemo_longctx.adapters.pretrained import hf_tokenizer

            tokenizer = hf_tokenizer(tokenizer)
        return Suite(self.tasks, tokenizer=tokenizer)

    def _harness(self, task: HarnessTask, model: MCoreCausalModel, tokenizer: Any, identity: Mapping[str, Any]) -> Any:
        from nemo_longctx.adapters.harness import run_harness
        from nemo_longctx.adapters.lm_eval import LongContextLM

        lm = LongContextLM(
            model,
            tokenizer=tokenizer,
            results_cache=self.results_cache,
            identity=identity,
            data_group=data_group(),
            enable_thinking=False,
        )
        return run_harness(task, lm)

    def _report(self, trainer: Any, result: SuiteResult) -> None:
        if not trainer.is_global_zero:
            return
        for task, why in result.errors.items():
            logger.warning("evaluation of %s failed at %s, training goes on: %s", task, result.model, why)
        for task in result.skipped:
            logger.warning("evaluation of %s skipped at %s: it would not end within %s s", task, result.model, self.time_budget)
        for each in trainer.loggers:
            each.log_metrics({f"eval/{key}": value for key, value in result.scalars().items()}, step=trainer.global_step)
        packages = versions_of("torch", "megatron-core", "nemo_toolkit")
        old = [(t.seq_length, "the old length") for t in self.tasks if isinstance(t, PositionTask) and t.guard]
        provenance = {"tasks": [repr(task) for task in self.tasks], "versions": packages}
        self._unwritten.append(result)
        try:
            known = {one.model for one in self.results}
            whole = {one.model: one for one in [*read_results(self.directory), *self._unwritten] if one.model in known}
            notes = [f"{said[0].upper()}{said[1:]}." for said in self._notes()]
            page = write_results(
                self.directory, [*whole.values()], provenance=provenance, marks=old, guard=self.guard, notes=notes
            )
            self._unwritten = []
            print(f"evaluation at {result.model}: {page}", flush=True)
            log_pictures(trainer, figures_in(self.directory))
        except Exception:  # a full disk or a figure that cannot be drawn must not end the run that is being watched
            logger.warning("results of the evaluation at %s could not be written", result.model, exc_info=True)

    def _notes(self) -> list[str]:
        """What has to be known to read the page."""
        return plainly_asked(self.tasks, getattr(self._suite, "tokenizer", None))

    def _watch(self, trainer: Any, result: SuiteResult) -> None:
        """Compare with the first evaluation; every rank holds the same results, so every rank decides the same."""
        if self.guard is None or len(self.results) < 2:
            return
        verdict = judge(self.results[0].watched, result.watched, self.guard, look=len(self.results) - 1)
        self.verdict = verdict
        if trainer.is_global_zero:
            for name, why in verdict.unpaired.items():
                logger.warning("guard: %s could not be compared at %s: %s", name, result.model, why)
            for name, why in verdict.blind.items():
                if name not in self._blind:  # it does not get better
                    logger.warning("guard: %s can raise no alarm from %s on: %s", name, result.model, why)
            self._blind |= verdict.blind.keys()
            for name, change in verdict.changes.items():
                limit, seen = self.guard.limit(name), verdict.power[name]
                what = f"{name} {change.mean:+.4f} {plus_minus(change.standard_error)}, p = {change.p_value:.3f}"
                print(f"guard: {what}; a change of {limit:g} would be seen with {seen_percent(seen)}", flush=True)
            for each in trainer.loggers:
                each.log_metrics({f"guard/{n}": c.mean for n, c in verdict.changes.items()}, step=trainer.global_step)
            for alarm in verdict.alarms:
                logger.warning("short-context guard at %s: %s", result.model, alarm)
        # What a new RoPE does to weights that have not been trained under it yet is told, but no reason to stop the cure.
        if verdict.alarms and self.guard.action == "stop" and trainer.global_step > 0:
            trainer.should_stop = True
            self._note_stop(trainer, verdict)
        elif trainer.is_global_zero and trainer.global_step > 0:
            self._stop_note.unlink(missing_ok=True)  # what it may have said is behind the run

    @property
    def _stop_note(self) -> Path:
        return self.directory / GUARD_STOP

    def _note_stop(self, trainer: Any, verdict: Verdict) -> None:
        """The next start must not train on as if nothing had been (`nemo_longctx.runs.check_guard`); at the end none would."""
        step = trainer.global_step
        if not trainer.is_global_zero or self.guard is None or 0 < trainer.max_steps <= step:
            return
        print(f"the short-context guard stops the run after step {step}; eval.guard.action=warn lets it go on", flush=True)
        try:
            write_guard_stop(self.directory, step=step, alarms=verdict.alarms, guard=asdict(self.guard))
        except OSError:
            logger.warning("that the guard stopped the run could not be noted: the same command goes on", exc_info=True)


def _known(results: Sequence[SuiteResult]) -> list[SuiteResult]:
    """That there was each evaluation, and what the first one watched, with which the guard compares. The losses of a thousand
    documents, kept of every evaluation by every process, would be gigabytes by the end of a run."""
    return [replace(blank_result(one.model), watched={} if number else one.watched) for number, one in enumerate(results)]


@contextlib.contextmanager
def _outside_training(trainer: Any) -> Iterator[None]:
    """Let the callbacks that time the training (they have `leave_out`) leave out what is done inside: an evaluation of minutes
    was counted to the steps after it, as if they were slow."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what the step before still owes is its own
    clock, used = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        took = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - used}
        for each in getattr(trainer, "callbacks", ()):
            if hasattr(each, "leave_out"):
                each.leave_out(**took)


def _give_back_memory() -> None:
    """What an evaluation freed goes back to the system: glibc keeps it in pieces that the next one may not fit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _have_adapters(trainer: Any, pl_module: Any) -> None:
    """Let the model have the adapters that it was trained with. NeMo adds and reads them once an epoch has begun.

    What a resumed run still owes is measured before, and where all steps were made no epoch begins. Without, the base was
    measured in its place. At step 0 they change nothing.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, PEFT):
            callback.on_validation_epoch_start(trainer, pl_module)  # a second call does nothing


def _have_all_weights(strategy: Any) -> None:
    """Let every rank have the whole of the last update, as the host does before it saves.

    Under `overlap_param_gather` the parts of the other ranks come with the next forward, layer by layer, and all ranks must
    come for them. In an evaluation some may have nothing to read.
    """
    ddp = getattr(strategy, "ddp_config", None)
    if getattr(ddp, "use_distributed_optimizer", False) and getattr(ddp, "overlap_param_gather", False):
        strategy.megatron_parallel.force_param_sync()


def _step_of(result: SuiteResult) -> int:
    """Steps behind an evaluation; 0 of the base."""
    return int(result.model.removeprefix(STEP)) if result.model.startswith(STEP) else 0
