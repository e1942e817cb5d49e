"""NeMo's checkpoint callback and its resume, with what keeps a run whole: the last step always, a manifest, several newest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.utils import AppState

from nemo_longctx.adapters.megatron.attention import transformer_engine_installed
from nemo_longctx.checkpoints import MANIFEST, best_in, checkpoint_to_resume, finished_in, unmark_whole, write_manifest
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.evaluation import EvaluationConfig, windows_of
from nemo_longctx.files import first_process, write_text
from nemo_longctx.nemo_files import base_of_adapters, knows_no_engine_norms
from nemo_longctx.start import signals_not_inherited

LAST = "-last"


class LongContextCheckpoint(nl.ModelCheckpoint):
    """NeMo's checkpoints on a clock of steps; the step that ends the run is saved whatever the clock says.

    A checkpoint for going on is `step=N-last`, N being the steps behind it, saved before the validation of that step: a run
    that goes on from it makes up for the validation. The best are chosen after each validation, by its own loss.

    Args:
        every: steps between two checkpoints.
        tokens_per_step: of the curriculum, for the manifest.
        keep: how many of the best by validation loss are kept besides the newest.
        keep_last: how many of the newest are kept.
    """

    def __init__(self, *, every: int, tokens_per_step: int, keep: int = 0, keep_last: int = 1):
        super().__init__(
            monitor="val_loss" if keep else None,
            save_last=True,
            save_top_k=keep,
            every_n_train_steps=every,
            filename="{step}-{val_loss:.4f}" if keep else "{step}",
            save_optim_on_train_end=True,
            enable_version_counter=False,  # a step that is reached again after a fallback takes its own name again
        )
        self.every, self.tokens_per_step, self.keep_last = every, tokens_per_step, keep_last
        self._last_step = 0  # no need to save before a step was made
        self._found: list[tuple[str, float]] = []  # the best so far at a start, with their losses
        self._judged: dict[str, Any] = {"by": None, "from": -1}  # the validation that ranks, and the step after which it does

    @property
    def state_key(self) -> str:
        """One key whatever `every` is: a run that goes on with another still knows its best checkpoints."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"judged": json.dumps(self._judged)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._judged = json.loads(state_dict.get("judged", "null")) or self._judged  # checkpoints of before have none

    def nemo_topk_check_previous_run(self) -> None:
        """The best so far: as many as are kept now. NeMo's own fails on a loss that is no number, and where none are kept."""
        for name, _ in self._found[self.save_top_k :] if self.save_top_k else ():
            self._del_model_without_trainer(name)
        kept = {name: torch.tensor(loss) for name, loss in self._found[: self.save_top_k]}
        self.best_k_models = kept
        self.best_model_path, self.kth_best_model_path = next(iter(kept), ""), next(reversed(kept), "")
        self.best_model_score, self.kth_value = kept.get(self.best_model_path), kept.get(self.kth_best_model_path)

    def _look(self, trainer: Any) -> None:
        """Find the best so far by this validation; what another one ranked stays where it is, and is not compared."""
        sets = getattr(trainer.datamodule, "evaluation", {}).get("validation", ())
        folder, judged = Path(self.dirpath), self._judged
        if trainer.is_global_zero:
            by = _read_by(trainer.datamodule, sets)
            if judged["by"] not in (None, by, [each[:4] for each in by]):  # checkpoints of before have these four
                judged["from"] = trainer.global_step
                if self.save_top_k and (old := ", ".join(path.name for path, _ in best_in(folder))):
                    print(
                        f"validation is another from step {trainer.global_step} on: kept, and not compared: {old}", flush=True
                    )
            judged["by"] = by
        found = [(f"{path}{self.FILE_EXTENSION}", loss) for path, loss in best_in(folder, after=judged["from"])]
        self._judged, self._found = trainer.strategy.broadcast((judged, found))  # the first process removes some of them

    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        unmark_whole(Path(self.dirpath))
        super().setup(trainer, *args, **kwargs)
        self.CHECKPOINT_NAME_LAST = f"{{step}}{LAST}"  # the logger's has the loss of a validation before

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer)
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path:
            self._last_step = self._last_global_step_saved = trainer.global_step
            self.last_model_path = self.format_checkpoint_name(self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        ends = trainer.should_stop or (0 < trainer.max_steps <= step)
        if not trainer.fast_dev_run and (ends or step % self.every == 0):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fast_dev_run or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        candidates = self._monitor_candidates(trainer)
        here = self.format_checkpoint_name(candidates)
        if self.save_top_k and here not in self.best_k_models:  # else a resumed run repeats this step's validation
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step, if it is not there yet. NeMo's own asks whether a validation would have saved it."""
        if not trainer.fast_dev_run and trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _monitor_candidates(self, trainer: Any) -> dict[str, torch.Tensor]:
        candidates = super()._monitor_candidates(trainer)
        candidates["step"] = torch.tensor(trainer.global_step)  # NeMo logs it before the step is made
        return candidates

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: dict[str, torch.Tensor]) -> None:
        if self._last_step == trainer.global_step:
            return
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._last_step = trainer.global_step
        newest = ckpt_to_dir(self.last_model_path)
        old = [each.path for each in finished_in(newest.parent) if each.path.name.endswith(LAST) and each.path != newest]
        for path in trainer.strategy.broadcast([str(path) for path in old[self.keep_last - 1 :]]):
            self._remove_checkpoint(trainer, f"{path}{self.FILE_EXTENSION}")

    def _should_remove_checkpoint(self, trainer: Any, previous: str, current: str) -> bool:
        name = ckpt_to_dir(previous.removesuffix("/weights")).name
        return not name.endswith(LAST) and super()._should_remove_checkpoint(trainer, previous, current)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        self._take_manifest(trainer, filepath)
        with signals_not_inherited():
            super()._save_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: Any, filepath: str, override_async: bool = False) -> None:
        if override_async or not self.async_save:  # else it is put off until the newer one is there
            self._take_manifest(trainer, filepath)
        super()._remove_checkpoint(trainer, filepath, override_async=override_async)

    @staticmethod
    def _take_manifest(trainer: Any, filepath: str) -> None:
        """What is half written over, or half removed, is no checkpoint (`nemo_longctx.checkpoints.is_unfinished`)."""
        if trainer.is_global_zero:
            (ckpt_to_dir(filepath) / MANIFEST).unlink(missing_ok=True)

    def _get_finalize_save_checkpoint_callback(self, trainer: Any, filepath: str, global_step: int) -> Callable[[], None]:
        finish = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)

        def with_manifest() -> None:
            if trainer.is_global_zero:  # all ranks have written: NeMo's marker goes next
                write_manifest(ckpt_to_dir(filepath), step=global_step, tokens=global_step * self.tokens_per_step)
            finish()

        return with_manifest


def _read_by(data: Any, sets: Sequence[EvaluationConfig]) -> list[list[Any]]:
    """What a validation's loss is of: sets, their windows, how many of them are read, and whether documents are kept apart."""
    limit = getattr(getattr(data, "data_sampler", None), "evaluation_limits", {}).get("validation")
    found = []
    for each in sets:
        corpus = open_corpus(each.path)
        windows = min(windows_of(each, corpus.n_tokens), each.samples or corpus.n_tokens)
        read = windows if limit is None else min(windows, limit * each.micro_batch_size)
        masked = bool(getattr(data, "document_masking", False))
        found.append([each.name, corpus.identity(), each.seq_length, each.samples, read, masked])
    return sorted(found)


def begin_without_engine_state(strategy: Any, model: Any, checkpoint: Path) -> None:
    """Let a run with Transformer Engine begin from weights that were saved without it.

    Its norms want a state of theirs beside the weights, and the host ends where a checkpoint has none. What else is missing
    would be passed over too: names of dense layers are the same on both sides, those of experts are not.
    """
    if transformer_engine_installed() and not model.config.num_moe_experts and knows_no_engine_norms(checkpoint):
        rank_zero_info(f"{checkpoint} was saved without Transformer Engine: its weights are taken, and no state of its layers")
        strategy.ckpt_load_strictness = False


@dataclasses.dataclass(kw_only=True)
class LongContextResume(nl.AutoResume):
    """NeMo's resume from the run's newest checkpoint, by its step and not by its directory's time, and only if it is whole.

    Attributes:
        fallback: where the newest cannot be read, take the newest before it that can (`resume.fallback`).
    """

    fallback: bool = False

    def setup(self, trainer: Any, model: Any = None) -> None:
        super().setup(trainer, model)
        if not trainer.ckpt_path and self.restore_config is not None:
            begin_without_engine_state(trainer.strategy, model, Path(self.restore_config.path))

    def _get_base_model_path_for_adapter(self, adapter_meta_path: Any, model: Any) -> Path:
        """The weights under a run's adapters: where they were, or where `restore_from` says that they were moved to."""
        note, named = Path(adapter_meta_path), None if self.restore_config is None else Path(self.restore_config.path)
        noted: Path = super()._get_base_model_path_for_adapter(adapter_meta_path, model)
        base = base_of_adapters(note.parent.parent, named)
        if base is None or noted.exists():
            return noted
        if first_process():  # exports and the next checkpoint find them by the note
            print(f"the adapters' base was {noted}; it is {base} now, and {note} says so", flush=True)
            write_text(note, json.dumps({"model_ckpt_path": str(base)}))
        return base

    def _find_trainer_ckpt_path(self) -> Path | None:
        log_dir = AppState().log_dir
        if log_dir is None or self.resume_from_directory:
            return super()._find_trainer_ckpt_path()
        if first_process():  # NeMo would do it later, and refuse to resume where its only checkpoint was cut short
            unmark_whole(Path(log_dir) / "checkpoints")
            nl.ModelCheckpoint._remove_unfinished_checkpoints(Path(log_dir) / "checkpoints")
        found = checkpoint_to_resume(Path(log_dir), fallback=self.fallback)
        return None if found is None else found.path
