"""Lightning callbacks of a long-context run: its settings in the open, its training curve as a file that survives a kill."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from nemo.lightning.pytorch.callbacks import PEFT

from nemo_longctx.adapters.megatron.attention import attention_summary
from nemo_longctx.adapters.megatron.rope_guard import verify_live_rope
from nemo_longctx.adapters.nemo.launch.optimizer_settings import apply_optimizer_settings, optimizer_settings, when_made
from nemo_longctx.adapters.nemo.loggers import log_pictures, note_ids
from nemo_longctx.adapters.nemo.model.config import (
    SettingChange,
    fields_of,
    live_of,
    mcore_modules,
    settings_table,
    shape_of,
)
from nemo_longctx.config import ConfigError
from nemo_longctx.report.training_log import TRAINING_COLUMNS, read_training_log, training_columns, write_json
from nemo_longctx.resume import applied, changes, check_live, live_settings, plain, read_record, refuse
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.versions import versions_of

# Main weights and two Adam moments in fp32; a save writes the new checkpoint before it removes the old one.
OPTIMIZER_BYTES_PER_PARAMETER = 12
KEPT = ("settings", "model", "config", "recipe", "history")  # of a record, in checkpoints
# Config, tokenizer and metadata beside them: the host only logs that it could not write those, and trains on.
CHECKPOINT_CONTEXT_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStart:
    """What a model was given before it was built; whoever prepares a model leaves it there as `long_context_start`.

    Attributes:
        changes: long-context settings of checkpoint and run.
        source: what the left column of their table is ("checkpoint", or the config class).
        variant: the position encoding that the live model must have.
        notes: where the numbers of its RoPE come from, a sentence each.
    """

    changes: list[SettingChange]
    source: str
    variant: RopeVariant
    notes: tuple[str, ...] = ()


class LongContextSettingsCallback(Callback):
    """Prints checkpoint value -> run value, checks the live model against the run's settings, and stores both.

    Before the first step, on every rank: the live RoPE frequencies of each layer must be those of the config, and the disk must
    hold a checkpoint. A difference ends the run with both values. What the model must be is its `long_context_start`.

    A run that goes on from a checkpoint of its own is compared with what that checkpoint was made by (`nemo_longctx.resume`):
    what must be equal is, and what may change takes effect and is noted in `history`.

    Args:
        directory: where `settings.json` is written, on rank 0.
        recipe: the recipe as a mapping, stored beside the settings.
    """

    def __init__(self, *, directory: str, recipe: dict[str, Any]):
        self.directory, self.recipe = Path(directory), recipe
        self._asked: dict[str, list[Any]] = {}
        self._adapters = False
        self._waits = False  # for optimizers, to set them to what is asked
        self._record: dict[str, Any] = {}  # of this start; checkpoints keep it
        self._restored: dict[str, Any] | None = None  # of the checkpoint that was loaded
        self._before: dict[str, Any] | None = None  # the same, as this start's record keeps it

    def state_dict(self) -> dict[str, Any]:
        """The record, as JSON: plain text in any checkpoint."""
        return {"record": json.dumps(self._record)} if self._record else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = json.loads(state_dict["record"])

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def note() -> None:
            self._asked = optimizer_settings(trainer)  # the checkpoint is loaded after this

        when_made(trainer, note)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._waits and trainer.optimizers:
            self._waits = False
            apply_optimizer_settings(trainer, self._asked)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        start: RunStart | None = getattr(pl_module, "long_context_start", None)
        if start is None:
            mend = (
                "was not made by a longctx recipe, so nothing says which RoPE it must have; leave the recipe's model in place"
            )
            raise ConfigError("model", type(pl_module).__name__, mend)
        # The host's own callbacks come later, at the start of the epoch; a PEFT one then does far more than to transform.
        peft = next((callback for callback in trainer.callbacks if isinstance(callback, PEFT)), None)
        place = pl_module.model_transform if peft is None else getattr(peft, "place_rope", None)
        if place is not None:
            place(trainer.strategy.megatron_parallel)
        modules = mcore_modules(trainer.strategy.megatron_parallel)
        seen = [verify_live_rope(module, start.variant) for module in modules]
        resumed, history = self._go_on(trainer, pl_module, start)
        self._record = {
            "settings": {c.setting: {"before": _plain(c.before), "run": _plain(c.run)} for c in start.changes},
            "model": shape_of(pl_module.config),
            "config": fields_of(pl_module.config),
            "recipe": plain(self.recipe),
            "history": history,
        }
        if not trainer.is_global_zero:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        parameters = sum(p.numel() for module in modules for p in module.parameters())
        self._adapters = peft is not None  # they are not there yet, and checkpoints hold them alone
        kept = [] if self._adapters else modules
        weights = sum(checkpoint_bytes(p.numel(), p.dtype) for module in kept for p in module.parameters())
        self.checkpoint_bytes = weights * model_parallel_size(trainer.strategy) + CHECKPOINT_CONTEXT_BYTES
        check_disk(self.directory, 2 * self.checkpoint_bytes)
        kernel = attention_summary(modules[0])
        table = settings_table(start.changes, source=start.source, resumed=resumed)
        print(table, *start.notes, *seen, kernel, sep="\n", flush=True)
        for change in history[-1:] if history and history[-1]["step"] == trainer.global_step else []:
            for key, values in change["changed"].items():
                print(f"{key}: {values['before']} -> {values['run']} from step {change['step']} on", flush=True)
        for each in trainer.loggers:
            each.log_hyperparams(plain(self.recipe))
        note_ids(trainer, self.directory.parent)
        more = {"source": start.source, "verified": seen, "attention": kernel, "parameters": parameters}
        more |= {"step": trainer.global_step, "from": self._before}
        write_json(self.directory / "settings.json", self._record | more | {"versions": versions()})

    def _go_on(self, trainer: Any, pl_module: Any, start: RunStart) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Compare with the checkpoint that was loaded, and let what may change take effect.

        Returns:
            the long-context settings that the checkpoint was made by, None for a fresh run; the run's history.
        """
        if not trainer.ckpt_path:
            return None, []
        if trainer.optimizers:
            apply_optimizer_settings(trainer, self._asked)
        else:  # those of adapters are made, and read from the checkpoint, at the start of the epoch
            self._waits = True
        before = self._restored or read_record(self.directory / "settings.json")  # checkpoints of 0.1 keep no record
        if before is None:
            return {}, []
        self._before = {key: value for key, value in before.items() if key in KEPT}
        where, step = f"the checkpoint at step {trainer.global_step}", trainer.global_step
        found = changes(plain(before["recipe"]), plain(self.recipe))
        refuse(found, where=where, allow_change=bool((plain(self.recipe).get("data") or {}).get("allow_change")))
        asked = plain(self.recipe).get("model")
        check_live(live_settings(before, asked), live_of(pl_module.config, start.changes), where=where)
        history = list(before.get("history", []))
        if changed := applied(found) | _other_documents(trainer, before["recipe"], self.recipe):
            history.append({"step": step, "changed": changed})
        return {key: value["run"] for key, value in before["settings"].items()}, history

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        needed = self.checkpoint_bytes
        if self._adapters:
            trained = sum(checkpoint_bytes(p.numel(), p.dtype) for p in pl_module.parameters() if p.requires_grad)
            needed += trained * model_parallel_size(trainer.strategy)
        check_disk(self.directory, needed)  # the host's writer dies of a full disk without naming it


class TrainingLogCallback(Callback):
    """Appends one row an optimizer step to `training.csv`; a resumed run drops the rows after its checkpoint and goes on.

    At the end the curve is drawn beside it, with the changes of length marked.

    Args:
        path: the CSV; columns `TRAINING_COLUMNS` and the loss of each validation set by its name, losses with all digits.
            `processor_seconds` is what the processor of this process spent on training since the row before, which other work
            on the machine lengthens far less than the clock. Validation and evaluation are in neither time.
        curriculum: gives tokens and sequence length of a step.
        every: steps between two rows.
    """

    def __init__(self, *, path: str, curriculum: Any, every: int = 1):
        self.path, self.curriculum, self.every = Path(path), curriculum, every
        self.validated: set[int] = set()  # steps whose validation is in the file; on rank 0
        self._last: tuple[int, float, float] | None = None  # step, clock and processor time
        self._columns = list(TRAINING_COLUMNS)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        rows = [row for row in read_training_log(self.path) if row["step"] <= trainer.global_step]
        sets = getattr(trainer.datamodule, "evaluation", {}).get("validation", ())
        self._columns = training_columns(rows, [each.name for each in sets])
        self._rewrite(rows)
        self.validated = {row["step"] for row in rows if "validation_loss" in row}
        self._note(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or (step % self.every and step != self.curriculum.total_steps):
            return
        now, used = time.perf_counter(), time.process_time()
        before, began, spent = self._last or (step - 1, now, used)
        tokens, seq_length = self.curriculum.tokens_per_step, self.curriculum.stage_at_step(step - 1).seq_length
        self._append(
            step=step,
            tokens=step * tokens,
            seq_length=seq_length,
            loss=_number(trainer.callback_metrics.get("reduced_train_loss")),
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            grad_norm=_number(trainer.callback_metrics.get("grad_norm")),
            tokens_per_second=round((step - before) * tokens / max(now - began, 1e-9), 1),
            processor_seconds=round(used - spent, 4),
        )
        self._last = (step, now, used)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or "val_loss" not in trainer.callback_metrics:
            return
        step = trainer.global_step
        seq_length = self.curriculum.stage_at_step(max(step - 1, 0)).seq_length
        tokens = step * self.curriculum.tokens_per_step
        metrics = trainer.callback_metrics
        losses = {  # `validation_loss`, and that of each set by its name
            column: _number(metrics[metric])
            for column in self._columns
            if column.startswith("validation_loss") and (metric := column.replace("validation_loss", "val_loss", 1)) in metrics
        }
        if step in self.validated:  # validated again at the step of the checkpoint
            self._rewrite([row for row in read_training_log(self.path) if row["step"] != step or "loss" in row])
        self.validated.add(step)
        self._append(step=step, tokens=tokens, seq_length=seq_length, **losses)
        self._note(step)  # validation is no training time

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        from nemo_longctx.report.plots import plot_training_curve

        stages = self.curriculum.plan
        switches = [
            (float(after.first_token), f"{before.seq_length:,} -> {after.seq_length:,} tokens")
            for before, after in itertools.pairwise(stages)
        ]
        picture = self.path.with_suffix(".png")
        plot_training_curve(read_training_log(self.path), picture, switches=switches)
        log_pictures(trainer, {"figures/training": picture})

    def leave_out(self, *, seconds: float, processor_seconds: float) -> None:
        """So much time since the last row was no training's."""
        if self._last is not None:
            step, began, spent = self._last
            self._last = (step, began + seconds, spent + processor_seconds)

    def _note(self, step: int) -> None:
        self._last = (step, time.perf_counter(), time.process_time())

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self.path)

    def _append(self, **row: Any) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)


def _other_documents(trainer: Any, before: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sources that hold other documents since the checkpoint of this start: a path alone says nothing of that.

    Returns:
        as `nemo_longctx.resume.applied`; {} where they are the same, or fewer or more sources say it already.
    """
    data = trainer.datamodule
    last = (getattr(data, "history", None) or [{}])[-1]
    if "data" not in last.get("changed", ()) or last["token_address"] != trainer.global_step * data.curriculum.tokens_per_step:
        return {}
    paths = [[source["path"] for source in plain(each)["data"]["mix"]["sources"]] for each in (before, run)]
    if len(paths[0]) != len(paths[1]):
        return {}
    if paths[0] == paths[1]:
        paths = [["as they were"], ["other documents at the same places"]]
    return {"data.mix.sources": {"before": paths[0], "run": paths[1]}}


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("nemo-longctx", "nemo_toolkit", "megatron-core", "lightning", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **versions_of(*names)}


def model_parallel_size(strategy: Any) -> int:
    """Ranks that hold one copy of the weights together."""
    return strategy.tensor_model_parallel_size * strategy.pipeline_model_parallel_size


def checkpoint_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Bytes of so many parameters in a checkpoint: 12 each in fp32, where the weights are the main ones, and 14 in half
    precision, whose own weights are kept beside the main ones."""
    return parameters * (OPTIMIZER_BYTES_PER_PARAMETER + (0 if dtype == torch.float32 else dtype.itemsize))


def check_disk(directory: Path, needed: float) -> None:
    """Raise ConfigError where the disk that holds `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        what = f"the disk has {free / 2**20:,.0f} MiB free, and saving takes {needed / 2**20:,.0f} MiB"
        mend = "free some space, or choose another directory, and start the same command again: earlier checkpoints are whole"
        raise ConfigError("output_dir", str(directory), f"{what}; {mend}")


def _number(value: Any) -> float | None:
    if value is None:
        return None
    return value.item() if isinstance(value, torch.Tensor) else float(value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
