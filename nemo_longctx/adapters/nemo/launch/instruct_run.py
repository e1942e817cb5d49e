"""A recipe of instruction tuning -> NeMo's own parts, and `llm.train` over them; LoRA is NeMo's own."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.collections import llm

from nemo_longctx.adapters.nemo.data.instruct_data_module import LongInstructDataModule
from nemo_longctx.adapters.nemo.launch import run as pretraining
from nemo_longctx.adapters.nemo.launch.callbacks import RunStart
from nemo_longctx.adapters.nemo.launch.parts import made, recipe_callbacks, trainer_config
from nemo_longctx.adapters.nemo.model.config import checkpoint_directory, checkpoint_model, prepare_model, shape_of
from nemo_longctx.adapters.nemo.model.lora import LongContextLoRA
from nemo_longctx.adapters.nemo.model.rope import RopeTransform, variant_of
from nemo_longctx.config import ConfigError, build, did_you_mean
from nemo_longctx.data.vocabulary import check_corpora
from nemo_longctx.recipe import RecipeConfig
from nemo_longctx.resume import check_resumed, check_resumed_live
from nemo_longctx.rope.variants import to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters in place of full tuning (Hu et al. 2021), through `llm.peft.LoRA`.

    Attributes:
        dim: rank of the adapters.
        alpha: they are scaled by alpha / dim.
        dropout: on the adapters' input, while training.
        target_modules: Megatron-Core's names of the linear layers that get adapters.
    """

    dim: int = 32
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

    def __post_init__(self):
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.dim < 1 or self.alpha < 1:
            raise ConfigError("lora.dim", self.dim, "dim and alpha must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError("lora.dropout", self.dropout, "must be in [0, 1)")
        if not self.target_modules:
            raise ConfigError("lora.target_modules", [], "name at least one layer, such as linear_qkv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructRecipe:
    """A run of instruction tuning: a recipe whose `data` is that of `LongInstructDataModule`, and LoRA or none.

    Attributes:
        run: the recipe; `restore_from` is required.
        lora: adapters; None tunes all weights.
    """

    run: RecipeConfig
    lora: LoRAConfig | None = None

    def __post_init__(self):
        if not self.run.restore_from:
            raise ConfigError("restore_from", None, "name the extended checkpoint to tune")
        for key, value in self.run.data.items():
            if key not in _DATA_KEYS:
                raise ConfigError(f"data.{key}", value, f"unknown key, {did_you_mean(key, _DATA_KEYS)}")
        for key in ("tokenizer", "blend"):
            if not self.run.data.get(key):
                raise ConfigError(f"data.{key}", None, "missing; set it")


_DATA_KEYS = set(inspect.signature(LongInstructDataModule).parameters) - {"curriculum", "seed"}


def load_instruct_recipe(values: Mapping[str, Any]) -> InstructRecipe:
    """The recipe that a composed mapping describes: the keys of `RecipeConfig`, and `lora`.

    Raises:
        ConfigError: an unknown key or a bad value, by its dotted name.
    """
    values = dict(values)
    lora = values.pop("lora", None)
    recipe = build(RecipeConfig, values)
    return InstructRecipe(run=recipe, lora=None if lora is None else build(LoRAConfig, lora, where="lora"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructRun:
    """What NeMo trains, built and checked, with nothing trained or written yet."""

    parts: pretraining.Run

    def fit(self) -> Path:
        """Tune to the end, going on from this run's newest checkpoint, if there is one. Returns the run's directory."""
        parts = self.parts
        parts.fit()
        if parts.trainer.is_global_zero:
            self._save_chat_tokenizer()
        return parts.directory

    def _save_chat_tokenizer(self) -> None:
        """The tokenizer with the data's chat template, beside the run and in its last checkpoint, where exports find it."""
        data: Any = self.parts.data
        tokenizer = data.hf_tokenizer
        tokenizer.chat_template = data.chat_template
        tokenizer.save_pretrained(self.parts.directory / "tokenizer")
        carried = checkpoint_directory(self.parts.directory) / "context" / "tokenizer"
        if carried.is_dir():
            tokenizer.save_pretrained(carried)


def build_instruct_run(instruct: InstructRecipe) -> InstructRun:
    """Build all parts of a run; every setting is checked before any work is done.

    Raises:
        ConfigError: a setting that this machine, checkpoint or data contradicts.
    """
    recipe = instruct.run
    check_resumed(instruct, recipe.directory)
    pretraining.prepare_device(recipe)
    pl.seed_everything(recipe.seed, verbose=False)
    model = checkpoint_model(recipe.restore_from, recipe.model)  # type: ignore[arg-type]
    recompute = recipe.curriculum.stages[0].recompute  # the data sampler sets that of each stage
    changes = prepare_model(model, seq_length=recipe.seq_length, variant=recipe.rope_variant, recompute=recompute)
    # Windows hold very different numbers of loss tokens: the mean is taken over those of the whole step, on all ranks.
    model.config.calculate_per_token_loss = True
    model.long_context_start = RunStart(changes=changes, source="checkpoint", variant=recipe.rope_variant or variant_of(model))
    directory = pretraining.run_directory(recipe)
    check_resumed_live({change.setting: change.run for change in changes} | shape_of(model.config), directory)
    values = {"cache_dir": str(directory / "instances")} | dict(recipe.data)
    data = LongInstructDataModule(dataclasses.asdict(recipe.curriculum), **values, seed=recipe.seed)
    _check_tokenizer(data, model.config)
    sources = data.mix.sources if data.mix else ()
    paths = {f"data.pretraining.sources[{i}].path": source.path for i, source in enumerate(sources)}
    paths |= {f"data.validation[{i}].path": each.path for i, each in enumerate(data.evaluation["validation"])}
    check_corpora(paths, vocab_size=model.config.vocab_size, tokenizer=data.tokenizer_name)
    callbacks = recipe_callbacks(recipe, results=directory / "results", record=instruct)
    validates = bool(data.evaluation["validation"])  # NeMo would ask a loader that is not there for its data
    parts = pretraining.Run(
        recipe=recipe,
        model=model,
        data=data,
        trainer=made(trainer_config(recipe, callbacks=callbacks, validates=validates)),
        changes=changes,
        peft=None if instruct.lora is None else _lora(instruct.lora, model),
        **pretraining.run_parts(recipe),
    )
    return InstructRun(parts=parts)


def _lora(config: LoRAConfig, model: llm.GPTModel) -> LongContextLoRA:
    transform = model.model_transform
    if transform is not None and not isinstance(transform, RopeTransform):
        mend = f"NeMo has room for one transform, and the checkpoint has {type(transform).__name__} already; set null"
        raise ConfigError("lora", dataclasses.asdict(config), mend)
    rope = None if transform is None else to_dict(transform.variant)
    fields = dataclasses.asdict(config) | {"target_modules": list(config.target_modules)}
    return LongContextLoRA(**fields, rope=rope)


def _check_tokenizer(data: LongInstructDataModule, config: llm.GPTConfig) -> None:
    """A token beyond the embedding would end the run far from its cause."""
    largest = max(data.hf_tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        mend = f"has ids up to {largest}, the checkpoint's vocabulary is {config.vocab_size}; name the model's own tokenizer"
        raise ConfigError("data.tokenizer", data.tokenizer_name, mend)
