"""Our recipes for nemo_run: `nemo llm pretrain --factory longctx_llama2`, `nemo longctx train recipe=llama2_7b`.

nemo_run finds this module by the entry point `longctx` of group `nemo_run.cli`. One factory a family, with the size and any
Hydra override as parameters; the numbers are those of conf/recipe/, the parts are NeMo's own, each a `run.Config` that the
command line can change (`trainer.num_nodes=4`), and nemo_run's executors bring them to Slurm, Kubernetes or this machine
(`run.executor=longctx_slurm`, see `executors.py`). Before the first step the run is checked as one of the example script is.

Annotations must not be postponed here (`from __future__ import annotations`): nemo_run parses arguments by their types.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo.lightning as nl
import nemo_run as run
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel

from nemo_longctx.adapters.nemo.launch import (
    executors,  # noqa: F401  registers them with nemo_run
    parts,
)
from nemo_longctx.adapters.nemo.launch.begin import FROM_CHECKPOINT, begin_model
from nemo_longctx.adapters.nemo.launch.here import config_here, trainer_here
from nemo_longctx.adapters.nemo.launch.performance import fit_performance_settings, fit_warmup
from nemo_longctx.adapters.nemo.launch.throughput import ThroughputCallback
from nemo_longctx.adapters.nemo.model.config import (
    SHAPE_FIELDS,
    checkpoint_model,
    fresh_model,
    load_tokenizer,
    model_class,
)
from nemo_longctx.compose import CONF_DIR, compose
from nemo_longctx.config import ConfigError, build, did_you_mean
from nemo_longctx.data.evaluation import EvaluationConfig
from nemo_longctx.planning.models import MODELS
from nemo_longctx.recipe import RecipeConfig, load_recipe
from nemo_longctx.rope.request import parse_request

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
    from nemo_longctx.adapters.nemo.launch.run import build_run

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
    named = {key: value for key, value in published.items() if key != "seq_length"}  # the run's own length is no such field
    recipe = load_recipe({**asked, "restore_from": None, "model": {**named, **asked["model"]}})
    output, run_name = directory or recipe.output_dir, name or recipe.name
    # One node for model and resume: `resume.restore_config.path=...` on the command line reaches both.
    restore = parts.restore_config(asked["restore_from"])
    results = Path(output) / run_name / "results"
    callbacks = parts.recipe_callbacks(recipe, results=results)
    return run.Partial(
        llm.pretrain,
        model=model_config(recipe, published=published, restore=restore),
        data=parts.data_config(recipe.data, recipe.curriculum, seed=recipe.seed),
        trainer=parts.trainer_config(recipe, callbacks=callbacks),
        log=parts.logger_config(recipe, directory=output, name=run_name),
        resume=parts.resume_config(restore, fallback=recipe.resume.fallback),
        optim=parts.optimizer_config(recipe),
    )


def extend_recipe(
    stock: run.Partial,
    *,
    data: Mapping[str, Any],
    curriculum: Mapping[str, Any],
    rope: Mapping[str, Any] | None = None,
    restore_from: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> run.Partial:
    """A pretraining recipe of NeMo's own (`llm.llama2_7b.pretrain_recipe()`), made to train long context.

    Optimizer, layout, precision and logger stay as they are. The model is `extended_model`, the data `LongContextDataModule`,
    the run as long as the curriculum, and the callbacks gain guard, training log and throughput. NeMo's progress bar is left
    out, speed settings that long context does not keep are off (`launch/performance.py`), and a warm-up as long as the run is a
    tenth of it. Gradients are not averaged in the collective, which the loss as one mean over all tokens forbids. The parts are
    built with what the machine has that builds them (`launch/here.py`).

    Args:
        stock: the recipe; it is left as it was.
        data: arguments of `LongContextDataModule`, such as `mix` and `validation`.
        curriculum: `stages`, `tokens_per_step` and `total_tokens`.
        rope: `variant` and its fields; None keeps the checkpoint's or the recipe's.
        restore_from: NeMo checkpoint to begin with; None trains from scratch.
        evaluation: arguments of `LongContextEvalCallback`.

    Raises:
        ConfigError: a wrong curriculum or RoPE, or a recipe whose model has no config.
    """
    config = getattr(stock.model, "config", None)
    if config is None:
        raise ConfigError("recipe.model", str(stock.model), "must be a GPT model of nemo.collections.llm with its config")
    if rope is not None:
        parse_request(rope)
    stages = parts.curriculum_of(curriculum)
    restore = parts.restore_config(restore_from)
    recipe = copy.deepcopy(stock)
    config = recipe.model.config
    reads = parts.data_config(data, stages)
    validation = [build(EvaluationConfig, dict(each), where="data.validation") for each in getattr(reads, "validation", ())]
    masked = bool(data.get("document_masking"))
    fit_performance_settings(recipe, config, stages, document_masking=masked, validation=validation)
    fit_warmup(recipe, stages)
    recipe.model = run.Config(
        extended_model,
        config=_made_later(config),
        seq_length=max(stage.seq_length for stage in stages.stages),
        rope=parts.plain(rope),
        recompute=stages.stages[0].recompute,
        tokenizer=data.get("tokenizer"),
        restore=restore,
    )
    recipe.data = reads
    recipe.resume.restore_config = restore
    recipe.trainer = trainer = run.Config(trainer_here, **_arguments(recipe.trainer))
    trainer.max_steps, trainer.num_sanity_val_steps, trainer.use_distributed_sampler = stages.total_steps, 0, False
    if not data.get("validation"):  # on a multiple of a whole interval NeMo leaves the last checkpoint to the validation
        trainer.limit_val_batches, trainer.val_check_interval = 0, 1.0
    trainer.strategy.replace_progress_bar = False  # as in `parts.trainer_config`
    if isinstance(getattr(trainer.strategy, "ddp", None), run.Config):  # the loss is one mean over all ranks' tokens
        trainer.strategy.ddp.average_in_collective = False
    results = Path(recipe.log.log_dir or "nemo_experiments") / (recipe.log.name or "default") / "results"
    record = {"data": data, "curriculum": curriculum, "rope": rope, "restore_from": restore_from, "eval": evaluation}
    every = getattr(trainer, "log_every_n_steps", 10)
    ours = parts.callback_configs(stages, results=results, record=record, every=every, evaluation=evaluation, base=restore_from)
    if getattr(config, "num_moe_experts", None):  # whose operations are not counted
        ours = [each for each in ours if each.__fn_or_cls__ is not ThroughputCallback]
    trainer.callbacks = [*(getattr(trainer, "callbacks", None) or []), *ours]
    return recipe


def _made_later(config: Any) -> Any:
    """A config's description as a `run.Partial`: `extended_model` makes it, on the machine that runs it."""
    return fdl.cast(run.Partial, config) if isinstance(config, fdl.Config) else config


def _arguments(config: run.Config) -> dict[str, Any]:
    return {str(name): value for name, value in config.__arguments__.items()}


def _published_model(family: str, size: str) -> dict[str, Any]:
    """The config class of a family's checkpoint, and the length that it was trained at, which the host's class does not always
    say: a `run.Config` is needed before any checkpoint is at hand."""
    name = f"{family}_{size.partition('_')[0]}"
    return {**compose([f"model={name}"])["model"], "seq_length": MODELS[name].seq_length}


def extended_model(
    config: GPTConfig | Callable[[], GPTConfig],
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
        config: of `nemo.collections.llm`, or what makes one, which is then made without the fusions that this machine lacks.
            With `restore` it says what the checkpoint must be: its shape is compared, fields that differ from `published` are
            set, and all others are the checkpoint's own.
        seq_length: the longest sequence of the run, tokens.
        rope: `variant` and its fields; None keeps the checkpoint's or, without one, the config's own.
        recompute: of the first stage (`nemo_longctx.activations`); None keeps the config's own.
        tokenizer: Hugging Face name or directory, which checkpoints carry; a checkpoint brings its own.
        restore: the checkpoint that the run begins with, the same as `resume.restore_config`.
        published: `config` (a class name) and fields of the published model; None: the class's defaults.

    Raises:
        ConfigError: no checkpoint there, or one of another shape.
    """
    config = config_here(config)
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
        source = FROM_CHECKPOINT
    begin_model(model, rope=rope, seq_length=seq_length, source=source, recompute=recompute)
    return model


def model_config(recipe: RecipeConfig, *, published: Mapping[str, Any], restore: run.Config | None) -> run.Config:
    """`extended_model` with the recipe's config class and fields."""
    fields = {key: value for key, value in {**published, **recipe.model}.items() if key != "config"}
    return run.Config(
        extended_model,
        config=run.Partial(getattr(llm, recipe.model["config"]), **fields),
        seq_length=recipe.seq_length,
        rope=None if recipe.rope is None else dict(recipe.rope),
        recompute=recipe.curriculum.stages[0].recompute,
        tokenizer=recipe.data.tokenizer,
        restore=restore,
        published=dict(published),
    )
