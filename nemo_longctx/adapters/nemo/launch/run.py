"""A recipe -> NeMo's own parts, and `llm.train` over them. Hydra, nemo_run and Python all come through here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from nemo.collections import llm
from nemo.lightning.pytorch.optim import MegatronOptimizerModule

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.nemo.data.data_module import LongContextDataModule
from nemo_longctx.adapters.nemo.launch import parts
from nemo_longctx.adapters.nemo.launch.begin import FROM_CHECKPOINT, begin_model
from nemo_longctx.adapters.nemo.launch.parts import made
from nemo_longctx.adapters.nemo.model.config import (
    SettingChange,
    checkpoint_directory,
    checkpoint_model,
    fresh_model,
    live_of,
    load_tokenizer,
)
from nemo_longctx.capability import has_module
from nemo_longctx.config import ConfigError
from nemo_longctx.data.vocabulary import check_corpora
from nemo_longctx.loggers import check_loggers
from nemo_longctx.precision import PRECISIONS
from nemo_longctx.recipe import RecipeConfig, RunConfig
from nemo_longctx.resume import check_resumed, check_resumed_live
from nemo_longctx.runs import RunError
from nemo_longctx.start import in_notebook


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What `llm.train` takes, built and checked, with nothing trained or written yet."""

    recipe: RunConfig
    model: llm.GPTModel
    data: LongContextDataModule
    trainer: nl.Trainer
    log: nl.NeMoLogger
    resume: nl.AutoResume
    optim: MegatronOptimizerModule
    changes: list[SettingChange]
    peft: llm.peft.LoRA | None = None

    @property
    def directory(self) -> Path:
        """Where checkpoints, logs and results of the run are."""
        return run_directory(self.recipe)

    def fit(self) -> Path:
        """Train to the end, going on from the newest finished checkpoint of this run, if there is one."""
        llm.train(
            model=self.model,
            data=self.data,
            trainer=self.trainer,
            log=self.log,
            resume=self.resume,
            optim=self.optim,
            model_transform=self.peft,
        )
        return self.directory


def run_directory(recipe: RunConfig) -> Path:
    """`output_dir/name`."""
    return recipe.directory


def build_run(recipe: RecipeConfig) -> Run:
    """Build all parts of a run; every setting is checked before any work is done.

    Raises:
        ConfigError: a setting that this machine, checkpoint or corpus contradicts.
    """
    check_resumed(recipe, run_directory(recipe))
    check_loggers(recipe.logger)
    prepare_device(recipe)
    pl.seed_everything(recipe.seed, verbose=False)
    if recipe.restore_from:
        model, source = checkpoint_model(recipe.restore_from, recipe.model), FROM_CHECKPOINT
    else:
        tokenizer = load_tokenizer(recipe.data.tokenizer)
        model, source = fresh_model(recipe.model, tokenizer=tokenizer), str(recipe.model["config"])
    recompute = recipe.curriculum.stages[0].recompute  # the data sampler sets that of each stage
    changes = begin_model(model, rope=recipe.rope, seq_length=recipe.seq_length, source=source, recompute=recompute)
    check_resumed_live(live_of(model.config, changes), run_directory(recipe), asked=recipe.model)
    data = made(parts.data_config(recipe.data, recipe.curriculum, seed=recipe.seed))
    data.run_directory = str(run_directory(recipe))
    _check_vocabulary(data, model.config, recipe.data.tokenizer)
    callbacks = parts.recipe_callbacks(recipe, results=run_directory(recipe) / "results")
    return Run(
        recipe=recipe,
        model=model,
        data=data,
        trainer=made(parts.trainer_config(recipe, callbacks=callbacks)),
        changes=changes,
        **run_parts(recipe),
    )


def run_parts(recipe: RunConfig) -> dict[str, Any]:
    """`log`, `resume` and `optim` of a run on this machine."""
    directory = run_directory(recipe)
    # PEFT notes the checkpoint's path down, to be found from anywhere.
    restore = str(checkpoint_directory(recipe.restore_from).absolute()) if recipe.restore_from else None
    return {
        "log": made(parts.logger_config(recipe, directory=str(directory.parent), name=recipe.name)),
        "resume": made(parts.resume_config(parts.restore_config(restore), fallback=recipe.resume.fallback)),
        "optim": made(parts.optimizer_config(recipe)),
    }


def prepare_device(recipe: RunConfig) -> None:
    """Make the host run on the accelerator that the recipe names, or say why it cannot.

    Raises:
        RunError: in a notebook, where Lightning would refuse the strategy without a mend.
        ConfigError: an accelerator that is not there, or that NeMo would not use.
    """
    if PRECISIONS[recipe.trainer.precision].fp8 and not has_module("transformer_engine"):
        mend = "needs Transformer Engine, which is not installed (nemo-longctx doctor says how to get it); set bf16-mixed"
        raise ConfigError("trainer.precision", recipe.trainer.precision, mend)
    if in_notebook():
        mend = (
            "NeMo's strategies do not start in a notebook; nemo_longctx.train(...) runs the same recipe in a process of its own"
        )
        raise RunError(mend)
    if recipe.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        mend = "this machine has no CUDA device; set trainer=cpu (nemo-longctx doctor tells more)"
        raise ConfigError("trainer.accelerator", "gpu", mend)
    if recipe.trainer.accelerator == "cpu":
        if torch.cuda.is_available():
            mend = "NeMo moves models to a GPU where there is one; set gpu, or hide it with CUDA_VISIBLE_DEVICES="
            raise ConfigError("trainer.accelerator", "cpu", mend)
        cpu.install()


def _check_vocabulary(data: LongContextDataModule, config: llm.GPTConfig, tokenizer: str | None) -> None:
    """Compare the corpora with each other and the model, before a token out of range ends the run far from its cause."""
    paths = {f"data.mix.sources[{i}].path": source.path for i, source in enumerate(data.mix.sources)}
    for name, sets in data.evaluation.items():
        paths |= {f"data.{name}[{i}].path": each.path for i, each in enumerate(sets)}
    check_corpora(paths, vocab_size=config.vocab_size, tokenizer=tokenizer)
