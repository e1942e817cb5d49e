"""Our recipes for nemo_run: `nemo llm pretrain --factory longctx_llama2`, `nemo longctx train recipe=llama2_7b`.

nemo_run finds this module by the entry point `longctx` of group `nemo_run.cli`. One factory a family, with the size and any
Hydra override as parameters; the numbers are those of conf/recipe/, the parts are NeMo's own, each a `run.Config` that the
command line can change (`trainer.num_nodes=4`), and nemo_run's executors bring them to Slurm, Kubernetes or this machine
(`run.executor=longctx_slurm`, see `executors.py`). Before the first step the run is checked as one of the example script is.

Annotations must not be postponed here (`from __future__ import annotations`): nemo_run parses arguments by their types.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import nemo_run as run
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from nemo.utils.exp_manager import TimingCallback

from nemo_longctx.adapters.nemo import executors  # noqa: F401  registers them with nemo_run
from nemo_longctx.adapters.nemo.callbacks import LongContextSettingsCallback, RunStart, TrainingLogCallback
from nemo_longctx.adapters.nemo.data_module import LongContextDataModule
from nemo_longctx.adapters.nemo.eval_callback import LongContextEvalCallback
from nemo_longctx.adapters.nemo.model import (
    SHAPE_FIELDS,
    checkpoint_model,
    fresh_model,
    load_tokenizer,
    model_class,
    prepare_model,
)
from nemo_longctx.adapters.nemo.rope import variant_of
from nemo_longctx.adapters.nemo.throughput import ThroughputCallback
from nemo_longctx.compose import CONF_DIR, compose
from nemo_longctx.config import ConfigError, build, did_you_mean
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.recipe import RecipeConfig, load_recipe
from nemo_longctx.rope import variants

_PLAIN = (bool, int, float, str, type(None))  # fields of a config that can be asked for; the others are functions it makes


@run.cli.factory(target=llm.pretrain, name="longctx_llama2")
def longctx_llama2(size: str = "7b", overrides: str = "", dir: str | None = None, name: str | None = None) -> run.Partial:
    """Llama 2 as the paper extends it: sizes 7b, 13b, 70b, 7b_ablation, 7b_curriculum.

    Args:
        size: which recipe of the family, `conf/recipe/llama2_SIZE.yaml`.
        overrides: Hydra overrides separated by spaces, such as `rope=pi trainer.num_nodes=4`.
        dir: where logs and checkpoints go; None: `output_dir` of the recipe.
        name: of the run; None: the recipe's.
    """
    return pretrain_partial("llama2", size, overrides, dir, name)


@run.cli.factory(target=llm.pretrain, name="longctx_codellama")
def longctx_codellama(size: str = "34b", overrides: str = "", dir: str | None = None, name: str | None = None) -> run.Partial:
    """The shape of the paper's 34B, as the paper extends it; arguments as `longctx_llama2`."""
    return pretrain_partial("codellama", size, overrides, dir, name)


@run.cli.factory(target=llm.pretrain, name="longctx_llama3")
def longctx_llama3(size: str = "8b", overrides: str = "", dir: str | None = None, name: str | None = None) -> run.Partial:
    """Llama 3 to 128k; arguments as `longctx_llama2`."""
    return pretrain_partial("llama3", size, overrides, dir, name)


@run.cli.factory(target=llm.pretrain, name="longctx_qwen25")
def longctx_qwen25(size: str = "7b", overrides: str = "", dir: str | None = None, name: str | None = None) -> run.Partial:
    """Qwen2.5 to 128k; arguments as `longctx_llama2`."""
    return pretrain_partial("qwen25", size, overrides, dir, name)


@run.cli.factory(target=llm.pretrain, name="longctx_mistral")
def longctx_mistral(size: str = "7b", overrides: str = "", dir: str | None = None, name: str | None = None) -> run.Partial:
    """Mistral to 128k; arguments as `longctx_llama2`."""
    return pretrain_partial("mistral", size, overrides, dir, name)


@run.cli.entrypoint(namespace="longctx")
def train(recipe: str, overrides: str = "") -> None:
    """Train a recipe of conf/recipe/ as examples/megatron_gpt_continual.py does, on any of nemo_run's executors.

    Args:
        recipe: its name, such as `llama2_7b`.
        overrides: Hydra overrides separated by spaces.
    """
    from nemo_longctx.adapters.nemo.run import build_run

    build_run(load_recipe(compose([f"recipe={recipe}", *overrides.split()]))).fit()


def pretrain_partial(family: str, size: str, overrides: str, directory: str | None, name: str | None) -> run.Partial:
    """`llm.pretrain` with a recipe's parts, none of them built yet.

    Raises:
        ConfigError: the family has no such size, or an override is wrong.
    """
    recipe_name = f"{family}_{size}"
    sizes = [path.stem.removeprefix(f"{family}_") for path in (CONF_DIR / "recipe").glob(f"{family}_*.yaml")]
    if size not in sizes:
        raise ConfigError("size", size, f"no recipe {recipe_name}, {did_you_mean(size, sizes)}")
    asked = compose([f"recipe={recipe_name}", *overrides.split()])
    published = _published_model(family, size)
    recipe = load_recipe({**asked, "restore_from": None, "model": {**published, **asked["model"]}})
    output, run_name = directory or recipe.output_dir, name or recipe.name
    # One node for model and resume: `resume.restore_config.path=...` on the command line reaches both.
    restore = _restore_config(asked["restore_from"])
    return run.Partial(
        llm.pretrain,
        model=model_config(recipe, published=published, restore=restore),
        data=run.Config(
            LongContextDataModule,
            **{key: value for key, value in recipe.data.items() if key != "tokenizer"},
            curriculum=_curriculum_values(recipe.curriculum),
            seed=recipe.seed,
        ),
        trainer=trainer_config(recipe, results=str(Path(output) / run_name / "results")),
        log=_log_config(recipe, output, run_name),
        resume=run.Config(nl.AutoResume, resume_if_exists=True, resume_ignore_no_checkpoint=True, restore_config=restore),
        optim=optimizer_config(recipe),
    )


def _published_model(family: str, size: str) -> dict[str, Any]:
    """The config class of a family's checkpoint: a `run.Config` is needed before any checkpoint is at hand."""
    return compose([f"model={family}_{size.partition('_')[0]}"])["model"]


def extended_model(
    config: GPTConfig,
    *,
    seq_length: int,
    rope: Mapping[str, Any] | None = None,
    recompute: str | None = None,
    tokenizer: str | None = None,
    restore: nl.RestoreConfig | None = None,
    published: Mapping[str, Any] | None = None,
) -> GPTModel:
    """NeMo's model with the run's length, RoPE variant, attention and step functions, and a note of what that changed.

    Args:
        config: of `nemo.collections.llm`. With `restore` it says what the checkpoint must be: its shape is compared, fields
            that differ from `published` are set, and all others are the checkpoint's own.
        seq_length: the longest sequence of the run, tokens.
        rope: `variant` and its fields; None keeps the checkpoint's or, without one, the config's own.
        recompute: of the first stage (`nemo_longctx.activations`); None keeps the config's own.
        tokenizer: Hugging Face name or directory, which checkpoints carry; a checkpoint brings its own.
        restore: the checkpoint that the run begins with, the same as `resume.restore_config`.
        published: `config` (a class name) and fields of the published model; None: the class's defaults.

    Raises:
        ConfigError: no checkpoint there, or one of another shape.
    """
    named = {"config": type(config).__name__, **(published or {})}
    if restore is None:
        model = model_class(type(config))(config, tokenizer=load_tokenizer(tokenizer))
        source = named["config"]
    else:
        reference = fresh_model(named).config
        names = [field.name for field in dataclasses.fields(config) if field.init]
        asked = {name: getattr(config, name) for name in names if isinstance(getattr(config, name), _PLAIN)}
        changed = {name: value for name, value in asked.items() if value != getattr(reference, name)}
        shape = {key: value for key, value in named.items() if key in ("config", *SHAPE_FIELDS)}
        # This runs while fiddle builds the model, and fiddle builds no second config (the checkpoint's) in the same thread.
        with ThreadPoolExecutor(1) as other:
            model = other.submit(checkpoint_model, restore.path, {**shape, **changed}).result()
        source = "checkpoint"
    variant = None if rope is None else variants.parse(rope)
    changes = prepare_model(model, seq_length=seq_length, variant=variant, recompute=recompute)
    model.long_context_start = RunStart(changes=changes, source=source, variant=variant or variant_of(model))
    return model


def model_config(recipe: RecipeConfig, *, published: Mapping[str, Any], restore: run.Config | None) -> run.Config:
    """`extended_model` with the recipe's config class and fields."""
    fields = {key: value for key, value in recipe.model.items() if key != "config"}
    return run.Config(
        extended_model,
        config=run.Config(getattr(llm, recipe.model["config"]), **fields),
        seq_length=recipe.seq_length,
        rope=None if recipe.rope is None else dict(recipe.rope),
        recompute=recipe.curriculum.stages[0].recompute,
        tokenizer=recipe.data.get("tokenizer"),
        restore=restore,
        published=dict(published),
    )


def trainer_config(recipe: RecipeConfig, *, results: str) -> run.Config:
    """NeMo's trainer and Megatron strategy, with the guard of settings and RoPE, log, throughput and evaluation."""
    trainer, steps = recipe.trainer, recipe.curriculum.total_steps
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=trainer.tensor_model_parallel_size,
        pipeline_model_parallel_size=trainer.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=trainer.virtual_pipeline_model_parallel_size,
        context_parallel_size=trainer.context_parallel_size,
        sequence_parallel=trainer.sequence_parallel,
        gradient_as_bucket_view=True,
        replace_progress_bar=False,  # as in run.py: with NeMo's own the next save may wait for good
        ckpt_async_save=trainer.accelerator == "gpu",
        ddp=run.Config(
            DistributedDataParallelConfig,
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=recipe.optimizer.distributed,
            overlap_param_gather=recipe.optimizer.distributed,
            use_distributed_optimizer=recipe.optimizer.distributed,
        ),
    )
    curriculum = run.Config(curriculum_of, values=_curriculum_values(recipe.curriculum))
    callbacks = [
        run.Config(TimingCallback),
        run.Config(
            ThroughputCallback,
            curriculum=curriculum,
            path=str(Path(results) / "throughput.json"),
            every=max(10, trainer.log_every_n_steps),
        ),
        run.Config(LongContextSettingsCallback, directory=results, recipe=_plain(dataclasses.asdict(recipe))),
        run.Config(
            TrainingLogCallback,
            path=str(Path(results) / "training.csv"),
            curriculum=curriculum,
            every=trainer.log_every_n_steps,
        ),
    ]
    if recipe.eval and recipe.eval.get("tasks"):
        callbacks.append(run.Config(LongContextEvalCallback, **recipe.eval, directory=str(Path(results) / "eval")))
    return run.Config(
        nl.Trainer,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=strategy,
        plugins=run.Config(nl.MegatronMixedPrecision, precision=trainer.precision),
        max_steps=steps,
        val_check_interval=recipe.steps("trainer.val_every_tokens", trainer.val_every_tokens) or steps,
        limit_val_batches=trainer.limit_val_batches if recipe.data.get("validation") else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=trainer.log_every_n_steps,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )


def optimizer_config(recipe: RecipeConfig) -> run.Config:
    """AdamW with warm-up and cosine (or constant) schedule, counted in steps of constant tokens."""
    optimizer = recipe.optimizer
    config = run.Config(
        OptimizerConfig,
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad,
        bf16=recipe.trainer.precision == "bf16-mixed",
        fp16=recipe.trainer.precision == "16-mixed",
        use_distributed_optimizer=optimizer.distributed,
    )
    schedule = run.Config(
        CosineAnnealingScheduler,
        max_steps=recipe.curriculum.total_steps,
        warmup_steps=recipe.steps("optimizer.warmup_tokens", optimizer.warmup_tokens),
        constant_steps=0,
        min_lr=optimizer.min_lr if optimizer.schedule == "cosine" else optimizer.lr,
    )
    return run.Config(MegatronOptimizerModule, config=config, lr_scheduler=schedule)


def curriculum_of(values: Mapping[str, Any]) -> Curriculum:
    """A `Curriculum` from plain values, which nemo_run can carry to another machine."""
    return build(Curriculum, values, where="curriculum")


def _curriculum_values(curriculum: Curriculum) -> dict[str, Any]:
    stages: Sequence[dict[str, Any]] = [
        {key: value for key, value in vars(stage).items() if value is not None} for stage in curriculum.stages
    ]
    return {"stages": list(stages), "tokens_per_step": curriculum.tokens_per_step, "total_tokens": curriculum.total_tokens}


def _log_config(recipe: RecipeConfig, directory: str, name: str) -> run.Config:
    every = recipe.steps("checkpoint.every_tokens", recipe.checkpoint.every_tokens) or recipe.curriculum.total_steps
    checkpoint = run.Config(
        nl.ModelCheckpoint,
        monitor="val_loss" if recipe.checkpoint.keep else None,
        save_last=True,
        save_top_k=recipe.checkpoint.keep,
        every_n_train_steps=every,
        filename="{step}-{val_loss:.4f}" if recipe.checkpoint.keep else "{step}",
    )
    return run.Config(nl.NeMoLogger, ckpt=checkpoint, name=name, log_dir=directory)


def _restore_config(restore_from: str | None) -> run.Config | None:
    if not restore_from:
        return None
    return run.Config(nl.RestoreConfig, path=restore_from, load_optim_state=False, load_artifacts=False)


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dictionaries, all the way down: what nemo_run can carry to another machine."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
