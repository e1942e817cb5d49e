"""A recipe -> NeMo's own parts, and `llm.train` over them. Hydra, nemo_run and Python all come through here."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from nemo.collections import llm
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule

from nemo_longctx.adapters.nemo import cpu
from nemo_longctx.adapters.nemo.callbacks import LongContextSettingsCallback, RunStart, TrainingLogCallback
from nemo_longctx.adapters.nemo.data_module import LongContextDataModule
from nemo_longctx.adapters.nemo.eval_callback import LongContextEvalCallback
from nemo_longctx.adapters.nemo.model import (
    SettingChange,
    checkpoint_directory,
    checkpoint_model,
    fresh_model,
    load_tokenizer,
    prepare_model,
)
from nemo_longctx.adapters.nemo.rope import variant_of
from nemo_longctx.adapters.nemo.throughput import ThroughputCallback
from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.recipe import RecipeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What `llm.train` takes, built and checked, with nothing trained or written yet."""

    recipe: RecipeConfig
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
        if self.trainer.global_rank == 0:  # NeMo refuses to resume where its only checkpoint was cut short
            nl.ModelCheckpoint._remove_unfinished_checkpoints(self.directory / "checkpoints")
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


def run_directory(recipe: RecipeConfig) -> Path:
    """`output_dir/name`."""
    return Path(recipe.output_dir).absolute() / recipe.name


def build_run(recipe: RecipeConfig) -> Run:
    """Build all parts of a run; every setting is checked before any work is done.

    Raises:
        ConfigError: a setting that this machine, checkpoint or corpus contradicts.
    """
    _prepare_device(recipe)
    pl.seed_everything(recipe.seed, verbose=False)
    if recipe.restore_from:
        model, source = checkpoint_model(recipe.restore_from, recipe.model), "checkpoint"
    else:
        tokenizer = load_tokenizer(recipe.data.get("tokenizer"))
        model, source = fresh_model(recipe.model, tokenizer=tokenizer), str(recipe.model["config"])
    recompute = recipe.curriculum.stages[0].recompute  # the data sampler sets that of each stage
    changes = prepare_model(model, seq_length=recipe.seq_length, variant=recipe.rope_variant, recompute=recompute)
    data = _data(recipe)
    _check_vocabulary(data, model.config)
    directory = run_directory(recipe)
    callbacks: list[pl.Callback] = [
        LongContextSettingsCallback(
            start=RunStart(changes=changes, source=source, variant=recipe.rope_variant or variant_of(model)),
            directory=str(directory / "results"),
            recipe=dataclasses.asdict(recipe),
        ),
        TrainingLogCallback(
            path=str(directory / "results" / "training.csv"),
            curriculum=recipe.curriculum,
            every=recipe.trainer.log_every_n_steps,
        ),
        ThroughputCallback(curriculum=recipe.curriculum, path=str(directory / "results" / "throughput.json")),
    ]
    if recipe.eval and recipe.eval.get("tasks"):
        callbacks.append(_evaluation(recipe.eval, directory / "results" / "eval"))
    return Run(
        recipe=recipe,
        model=model,
        data=data,
        trainer=_trainer(recipe, callbacks),
        log=_logger(recipe),
        resume=_resume(recipe),
        optim=_optimizer(recipe),
        changes=changes,
    )


def _prepare_device(recipe: RecipeConfig) -> None:
    if recipe.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        mend = (
            "this machine has no CUDA device; set trainer.accelerator=cpu trainer.precision=32 (nemo-longctx doctor tells more)"
        )
        raise ConfigError("trainer.accelerator", "gpu", mend)
    if recipe.trainer.accelerator == "cpu":
        if torch.cuda.is_available():
            mend = "NeMo moves models to a GPU where there is one; set gpu, or hide it with CUDA_VISIBLE_DEVICES="
            raise ConfigError("trainer.accelerator", "cpu", mend)
        cpu.install()


def _data(recipe: RecipeConfig) -> LongContextDataModule:
    values = {key: value for key, value in recipe.data.items() if key != "tokenizer"}
    known = set(inspect.signature(LongContextDataModule).parameters) - {"curriculum", "seed", "tokenizer"}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"data.{key}", value, f"unknown key, {did_you_mean(key, known | {'tokenizer'})}")
    if "mix" not in values:
        raise ConfigError("data.mix", None, "missing; name at least one corpus: data.mix.sources=[{path: PREFIX}]")
    return LongContextDataModule(**values, curriculum=dataclasses.asdict(recipe.curriculum), seed=recipe.seed)


def _trainer(recipe: RecipeConfig, callbacks: list[pl.Callback]) -> nl.Trainer:
    trainer, steps = recipe.trainer, recipe.curriculum.total_steps
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=trainer.tensor_model_parallel_size,
        pipeline_model_parallel_size=trainer.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=trainer.virtual_pipeline_model_parallel_size,
        context_parallel_size=trainer.context_parallel_size,
        sequence_parallel=trainer.sequence_parallel,
        pipeline_dtype=torch.float32 if trainer.precision == "32" else torch.bfloat16,
        ckpt_async_save=trainer.accelerator == "gpu",
        # Over gloo, ranks that load more shards than were saved by as many close each other's connections.
        ckpt_parallel_load=trainer.accelerator == "gpu",
        # NeMo's own replacement prints from rank 0 alone, and gathers timers from all ranks for it: with two processes the
        # others never answer, and the next save waits for good.
        replace_progress_bar=False,
    )
    validates = bool(recipe.data.get("validation"))
    # Without validation NeMo would save no checkpoint at a stop on one of its steps.
    val_every = (recipe.steps("trainer.val_every_tokens", trainer.val_every_tokens) or steps) if validates else steps
    return nl.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision(precision=trainer.precision),
        max_steps=steps,
        val_check_interval=val_every,
        limit_val_batches=trainer.limit_val_batches if validates else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=trainer.log_every_n_steps,
        use_distributed_sampler=False,
        logger=False,
        callbacks=callbacks,
    )


def _optimizer(recipe: RecipeConfig) -> MegatronOptimizerModule:
    o, steps = recipe.optimizer, recipe.curriculum.total_steps
    warmup = recipe.steps("optimizer.warmup_tokens", o.warmup_tokens)
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.epsilon,
        clip_grad=o.clip_grad,
        bf16=recipe.trainer.precision == "bf16-mixed",
        fp16=recipe.trainer.precision == "16-mixed",
        use_distributed_optimizer=o.distributed,
    )
    # A constant rate is a cosine that never comes down: from the peak to the peak.
    floor = o.min_lr if o.schedule == "cosine" else o.lr
    schedule = CosineAnnealingScheduler(max_steps=steps, warmup_steps=warmup, constant_steps=0, min_lr=floor)
    return MegatronOptimizerModule(config=config, lr_scheduler=schedule)


def _logger(recipe: RecipeConfig) -> nl.NeMoLogger:
    every = recipe.steps("checkpoint.every_tokens", recipe.checkpoint.every_tokens) or recipe.curriculum.total_steps
    keep = recipe.checkpoint.keep
    checkpoint = nl.ModelCheckpoint(
        monitor="val_loss" if keep else None,
        save_last=True,
        save_top_k=keep,
        every_n_train_steps=every,
        filename="{step}-{val_loss:.4f}" if keep else "{step}",
        save_optim_on_train_end=True,
    )
    return nl.NeMoLogger(
        log_dir=str(run_directory(recipe).parent), name=recipe.name, use_datetime_version=False, ckpt=checkpoint
    )


def _resume(recipe: RecipeConfig) -> nl.AutoResume:
    restore = None
    if recipe.restore_from:
        path = checkpoint_directory(recipe.restore_from).absolute()  # adapters note it down, to be found from anywhere
        restore = nl.RestoreConfig(path=str(path), load_model_state=True, load_optim_state=False, load_artifacts=False)
    return nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True, restore_config=restore)


def _evaluation(values: Mapping[str, Any], directory: Path) -> LongContextEvalCallback:
    known = set(inspect.signature(LongContextEvalCallback).parameters) - {"directory"}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"eval.{key}", value, f"unknown key, {did_you_mean(key, known)}")
    return LongContextEvalCallback(**{**values, "directory": str(directory)})


def _check_vocabulary(data: LongContextDataModule, config: llm.GPTConfig) -> None:
    """Compare what each corpus says of itself with the model, before a token out of range ends the run far from its cause."""
    paths = [source.path for source in data.mix.sources] + [each.path for each in data.evaluation["validation"]]
    for path in paths:
        vocab_size = open_corpus(path).provenance.get("tokenizer", {}).get("vocab_size", 0)
        if vocab_size > config.vocab_size:
            mend = f"the corpus {path} was made with a tokenizer of {vocab_size} tokens; prepare it with the model's own"
            raise ConfigError("model.vocab_size", config.vocab_size, mend)
