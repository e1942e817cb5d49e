"""A recipe as NeMo's own parts, each a `run.Config`: one description for the example scripts, nemo_run's factories and Python.

nemo_run carries the configs to another machine or changes them from its command line; `made` builds one here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo.lightning as nl
import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule

from nemo_longctx.adapters.nemo.data.data_module import LongContextDataModule
from nemo_longctx.adapters.nemo.evaluation.callback import LongContextEvalCallback
from nemo_longctx.adapters.nemo.launch.callbacks import LongContextSettingsCallback, TrainingLogCallback
from nemo_longctx.adapters.nemo.launch.checkpointing import LongContextCheckpoint, LongContextResume
from nemo_longctx.adapters.nemo.launch.lifecycle import LifecycleCallback
from nemo_longctx.adapters.nemo.launch.throughput import ThroughputCallback
from nemo_longctx.adapters.nemo.loggers import logger_parts
from nemo_longctx.config import ConfigError, build, plain, to_values
from nemo_longctx.cross_checks import uneven_stages
from nemo_longctx.data.config import DataConfig
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.eval.config import EvalConfig
from nemo_longctx.precision import PRECISIONS, Precision
from nemo_longctx.recipe import RunConfig
from nemo_longctx.recipe_parts import BadNumbersConfig


def made(config: run.Config) -> Any:
    """The part that a config describes. A `ConfigError` comes out as one sentence, without fiddle's path to the part."""
    try:
        return fdl.build(config)
    except ConfigError as error:
        raise ConfigError(error.key, error.value, error.mend) from None


def data_config(data: DataConfig | Mapping[str, Any], curriculum: Curriculum, **more: Any) -> run.Config:
    """`LongContextDataModule` with what is set of `data`, the curriculum, and `more` of its arguments.

    `data.tokenizer` is the model's, which carries it.

    Raises:
        ConfigError: an unknown key of `data`, a bad value, or no mix.
    """
    if not isinstance(data, DataConfig):
        if "mix" not in data:
            raise ConfigError("data.mix", None, "missing; name at least one corpus: data.mix.sources=[{path: PREFIX}]")
        data = build(DataConfig, {key: value for key, value in data.items() if key != "tokenizer"}, where="data")
    given = to_values(dataclasses.replace(data, tokenizer=None))
    return run.Config(LongContextDataModule, **given, curriculum=curriculum_values(curriculum), **more)


def trainer_config(recipe: RunConfig, *, callbacks: list[run.Config]) -> run.Config:
    """NeMo's trainer and Megatron strategy, with `callbacks`: `recipe_callbacks`, and any other."""
    trainer, steps = recipe.trainer, recipe.curriculum.total_steps
    precision = PRECISIONS[trainer.precision]
    validates = bool(recipe.data.validation)  # NeMo would ask a loader that is not there for its data
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=trainer.tensor_model_parallel_size,
        pipeline_model_parallel_size=trainer.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=trainer.virtual_pipeline_model_parallel_size,
        context_parallel_size=trainer.context_parallel_size,
        sequence_parallel=trainer.sequence_parallel,
        **uneven_stages(recipe.model),  # it copies its own to the model, over what that says
        pipeline_dtype=getattr(torch, precision.dtype),
        gradient_as_bucket_view=True,
        ckpt_async_save=trainer.accelerator == "gpu",
        # Over gloo, ranks that load more shards than were saved by as many close each other's connections.
        ckpt_parallel_load=trainer.accelerator == "gpu",
        # NeMo's own replacement prints from rank 0 alone, and gathers timers from all ranks for it: with two processes the
        # others never answer, and the next save waits for good.
        replace_progress_bar=False,
        ddp=run.Config(
            DistributedDataParallelConfig,
            check_for_nan_in_grad=False,  # `LifecycleCallback` looks at loss and gradient, and names step and documents
            grad_reduce_in_fp32=precision.grad_reduce_in_fp32,
            overlap_grad_reduce=recipe.optimizer.distributed,
            overlap_param_gather=recipe.optimizer.distributed,
            use_distributed_optimizer=recipe.optimizer.distributed,
        ),
    )
    if trainer.fsdp == "megatron":
        shard_weights(strategy)
    if trainer.tp_comm_overlap:
        overlap = run.Config(MegatronCommOverlapCallback, tp_comm_overlap=True, defer_embedding_wgrad_compute=False)
        callbacks = [overlap, *callbacks]
    val_every = (recipe.steps("trainer.val_every_tokens", trainer.val_every_tokens) or steps) if validates else steps
    return run.Config(
        nl.Trainer,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=strategy,
        plugins=precision_plugin(precision),
        max_steps=steps,
        val_check_interval=val_every,
        limit_val_batches=trainer.limit_val_batches if validates else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=trainer.log_every_n_steps,
        use_distributed_sampler=False,
        logger=False,
        callbacks=callbacks,
    )


def precision_plugin(precision: Precision) -> run.Config:
    """NeMo's plugin for one of `nemo_longctx.precision`.

    The types of weights and between stages are named, as NeMo's own recipes do: else it takes float32 for the first, and for
    the second in float16, so that a pipeline would wait for twice the bytes, and evaluations and exports come in float32.
    """
    dtype = getattr(torch, precision.dtype)
    more = {} if precision.grad_reduce_in_fp32 else {"grad_reduce_in_fp32": False}
    return run.Config(
        nl.MegatronMixedPrecision,
        precision=precision.host,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        **precision.plugin,
        **more,
    )


def shard_weights(strategy: run.Config) -> None:
    """Megatron's FSDP, by the words of the host at hand.

    Raises:
        ConfigError: a host without it, or one that keeps the weights of such runs in a form of their own (from Megatron-Core
            0.14 on): not in `weights/`, and it then reads the checkpoint that a run begins with in that form too.
    """
    fields = {field.name for field in dataclasses.fields(DistributedDataParallelConfig)}
    takes = inspect.signature(nl.MegatronStrategy).parameters
    if "fsdp" not in takes or "data_parallel_sharding_strategy" not in fields:
        raise ConfigError("trainer.fsdp", "megatron", "this NeMo and Megatron-Core have none; set none")
    if "use_megatron_fsdp" in fields:
        why = "this NeMo keeps such a run's weights in a form that it can neither begin from nor, here, go on from or export"
        raise ConfigError("trainer.fsdp", "megatron", f"{why}; set none, and optimizer.distributed=true")
    strategy.fsdp = "megatron"
    strategy.ddp.data_parallel_sharding_strategy = "optim_grads_params"


def callback_configs(
    curriculum: Curriculum,
    *,
    results: Path,
    record: Mapping[str, Any],
    every: int = 10,
    evaluation: EvalConfig | Mapping[str, Any] | None = None,
    base: str | None = None,
    bad_numbers: BadNumbersConfig | None = None,
) -> list[run.Config]:
    """The guard of settings and RoPE, training log, throughput, evaluation where there are tasks, and how the run ends.

    Args:
        results: where they write.
        record: what `settings.json` keeps of the run's settings.
        every: steps between rows of the training log.
        evaluation: fields of `EvalConfig`.
        base: checkpoint that the run starts from, with which the short-context guard compares.
        bad_numbers: what to do where loss or gradient go wrong.

    Raises:
        ConfigError: an unknown key of `evaluation`, or a bad value.
    """
    stages = run.Config(curriculum_of, values=curriculum_values(curriculum))
    callbacks = [
        run.Config(LongContextSettingsCallback, directory=str(results), recipe=plain(record)),
        run.Config(TrainingLogCallback, path=str(results / "training.csv"), curriculum=stages, every=every),
        run.Config(ThroughputCallback, curriculum=stages, path=str(results / "throughput.json"), every=max(10, every)),
    ]
    if evaluation is not None and not isinstance(evaluation, EvalConfig):
        evaluation = build(EvalConfig, evaluation, where="eval")
    if evaluation is not None and evaluation.tasks:
        values = to_values(evaluation) | {"base": base}
        callbacks.append(run.Config(LongContextEvalCallback, **values, directory=str(results / "eval")))
    policies = run.Config(BadNumbersConfig, **dataclasses.asdict(bad_numbers or BadNumbersConfig()))
    end = run.Config(LifecycleCallback, directory=str(results.parent), curriculum=stages, bad_numbers=policies)
    return [*callbacks, end]


def recipe_callbacks(recipe: RunConfig, *, results: Path) -> list[run.Config]:
    """`callback_configs` of a recipe."""
    return callback_configs(
        recipe.curriculum,
        results=results,
        record=dataclasses.asdict(recipe),
        every=recipe.trainer.log_every_n_steps,
        evaluation=recipe.eval,
        base=recipe.restore_from,
        bad_numbers=recipe.bad_numbers,
    )


def optimizer_config(recipe: RunConfig) -> run.Config:
    """AdamW with warm-up and cosine (or constant) schedule, counted in steps of constant tokens."""
    o = recipe.optimizer
    config = run.Config(
        OptimizerConfig,
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.epsilon,
        clip_grad=o.clip_grad,
        bf16=PRECISIONS[recipe.trainer.precision].dtype == "bfloat16",
        fp16=PRECISIONS[recipe.trainer.precision].dtype == "float16",
        use_distributed_optimizer=o.distributed,
    )
    schedule = run.Config(
        CosineAnnealingScheduler,
        max_steps=recipe.curriculum.total_steps,
        warmup_steps=recipe.steps("optimizer.warmup_tokens", o.warmup_tokens),
        constant_steps=0,
        # A constant rate is a cosine that never comes down: from the peak to the peak.
        min_lr=o.min_lr if o.schedule == "cosine" else o.lr,
    )
    return run.Config(MegatronOptimizerModule, config=config, lr_scheduler=schedule)


def logger_config(recipe: RunConfig, *, directory: str, name: str) -> run.Config:
    """NeMo's logger with those that the recipe names, and its checkpoints:
    the newest `checkpoint.keep_last`, and the best `checkpoint.keep` by their losses."""
    every = recipe.steps("checkpoint.every_tokens", recipe.checkpoint.every_tokens) or recipe.curriculum.total_steps
    checkpoint = run.Config(
        LongContextCheckpoint,
        every=every,
        tokens_per_step=recipe.curriculum.tokens_per_step,
        keep=recipe.checkpoint.keep,
        keep_last=recipe.checkpoint.keep_last,
    )
    loggers = logger_parts(recipe.logger, directory=Path(directory) / name, run_name=name)
    return run.Config(nl.NeMoLogger, log_dir=directory, name=name, use_datetime_version=False, ckpt=checkpoint, **loggers)


def restore_config(path: str | None) -> run.Config | None:
    """The weights of the checkpoint that a run begins with; None for none."""
    if not path:
        return None
    return run.Config(nl.RestoreConfig, path=path, load_model_state=True, load_optim_state=False, load_artifacts=False)


def resume_config(restore: run.Config | None, *, fallback: bool = False) -> run.Config:
    """Go on from the run's newest checkpoint, or with `fallback` its newest readable one, or else begin with `restore`."""
    more = {"resume_if_exists": True, "resume_ignore_no_checkpoint": True, "fallback": fallback}
    return run.Config(LongContextResume, restore_config=restore, **more)


def curriculum_of(values: Mapping[str, Any]) -> Curriculum:
    """A `Curriculum` from plain values, which nemo_run can carry to another machine."""
    return build(Curriculum, values, where="curriculum")


def curriculum_values(curriculum: Curriculum) -> dict[str, Any]:
    """The plain values of `curriculum_of`, without what is not set."""
    stages = [{key: value for key, value in vars(stage).items() if value is not None} for stage in curriculum.stages]
    return {"stages": stages, "tokens_per_step": curriculum.tokens_per_step, "total_tokens": curriculum.total_tokens}
