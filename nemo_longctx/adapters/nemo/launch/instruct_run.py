"""A recipe of instruction tuning -> NeMo's own parts, and `llm.train` over them; LoRA is NeMo's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo_run as run
from lightning.pytorch.callbacks import Callback
from nemo.collections import llm

from nemo_longctx.adapters.nemo.data.instruct_data_module import LongInstructDataModule
from nemo_longctx.adapters.nemo.launch import run as pretraining
from nemo_longctx.adapters.nemo.launch.begin import FROM_CHECKPOINT, begin_model
from nemo_longctx.adapters.nemo.launch.parts import made, recipe_callbacks, trainer_config
from nemo_longctx.adapters.nemo.model.config import checkpoint_directory, checkpoint_model, live_of
from nemo_longctx.adapters.nemo.model.lora import LongContextLoRA
from nemo_longctx.adapters.nemo.model.rope import RopeTransform
from nemo_longctx.config import ConfigError, to_values
from nemo_longctx.data.vocabulary import check_corpora
from nemo_longctx.recipe import InstructRecipe
from nemo_longctx.recipe_parts import LoRAConfig
from nemo_longctx.resume import check_resumed, check_resumed_live
from nemo_longctx.rope.variants import to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructRun:
    """What NeMo trains, built and checked, with nothing trained or written yet."""

    parts: pretraining.Run

    def fit(self) -> Path:
        """Tune to the end, going on from this run's newest checkpoint, if there is one. Returns the run's directory."""
        return self.parts.fit()


class ChatTokenizerCallback(Callback):
    """Saves the tokenizer with the data's chat template, beside the run and in its last checkpoint, where exports find it.

    It comes before the callback that notes the run's end: a run that is finished has its tokenizer.

    Args:
        directory: the run's directory.
    """

    def __init__(self, *, directory: str):
        self.directory = Path(directory)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        tokenizer = data.hf_tokenizer
        tokenizer.chat_template = data.chat_template
        tokenizer.save_pretrained(self.directory / "tokenizer")
        carried = checkpoint_directory(self.directory) / "context" / "tokenizer"
        if carried.is_dir():
            tokenizer.save_pretrained(carried)


def build_instruct_run(recipe: InstructRecipe) -> InstructRun:
    """Build all parts of a run; every setting is checked before any work is done.

    Raises:
        ConfigError: a setting that this machine, checkpoint or data contradicts.
    """
    check_resumed(recipe, recipe.directory)
    pretraining.prepare_device(recipe)
    pl.seed_everything(recipe.seed, verbose=False)
    model = checkpoint_model(recipe.restore_from, recipe.model)  # type: ignore[arg-type]
    recompute = recipe.curriculum.stages[0].recompute  # the data sampler sets that of each stage
    changes = begin_model(model, rope=recipe.rope, seq_length=recipe.seq_length, source=FROM_CHECKPOINT, recompute=recompute)
    # Windows hold very different numbers of loss tokens: the mean is taken over those of the whole step, on all ranks.
    model.config.calculate_per_token_loss = True
    directory = pretraining.run_directory(recipe)
    check_resumed_live(live_of(model.config, changes), directory, asked=recipe.model)
    values = {"cache_dir": str(directory / "instances")} | to_values(recipe.data)
    data = LongInstructDataModule(dataclasses.asdict(recipe.curriculum), **values, seed=recipe.seed)
    _check_tokenizer(data, model.config)
    sources = data.mix.sources if data.mix else ()
    paths = {f"data.pretraining.sources[{i}].path": source.path for i, source in enumerate(sources)}
    paths |= {f"data.validation[{i}].path": each.path for i, each in enumerate(data.evaluation["validation"])}
    check_corpora(paths, vocab_size=model.config.vocab_size, tokenizer=data.tokenizer_name)
    callbacks = recipe_callbacks(recipe, results=directory / "results")
    callbacks.insert(-1, run.Config(ChatTokenizerCallback, directory=str(directory)))
    parts = pretraining.Run(
        recipe=recipe,
        model=model,
        data=data,
        trainer=made(trainer_config(recipe, callbacks=callbacks)),
        changes=changes,
        peft=None if recipe.lora is None else _lora(recipe.lora, model),
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
