"""`nemo-longctx train --dry-run`: what a run would read, need and write, checked without loading the host or a model.

What only a live model shows (its RoPE on every layer, its memory) `--dry-run=full` shows: it trains one step of every stage,
saves, validates and evaluates in a directory of its own, and removes that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.recipe import RecipeConfig

BYTES_PER_PARAMETER = {"32": 12, "bf16-mixed": 14, "16-mixed": 14}  # weights and two Adam moments, as a checkpoint holds them


@dataclasses.dataclass
class Checked:
    """What was looked at, a line each, and what would end the run."""

    lines: list[str] = dataclasses.field(default_factory=list)
    errors: list[ConfigError] = dataclasses.field(default_factory=list)

    def look(self, what: str, see: Callable[[], str]) -> None:
        """Add what `see` says; a user's mistake is kept for the end, so that one look tells all of them."""
        try:
            self.lines.append(f"{what:<12}{see()}")
        except ConfigError as error:
            self.errors.append(error)
            self.lines.append(f"{what:<12}ERROR {error}")


def check(recipe: RecipeConfig) -> Checked:
    """Look at everything that a run of `recipe` needs and that can be seen without the host.

    Returns:
        lines to print, and the errors among them.
    """
    checked = Checked()
    checked.look("model", lambda: _model(recipe))
    checked.look("curriculum", lambda: _curriculum(recipe))
    checked.look("data", lambda: _data(recipe))
    for each in recipe.data.validation:
        checked.look("validation", functools.partial(_validation, each))
    checked.look("layout", lambda: _layout(recipe))
    checked.look("directory", lambda: _directory(recipe))
    return checked


def _model(recipe: RecipeConfig) -> str:
    from nemo_longctx.launch import check_base
    from nemo_longctx.planning.recipe import model_of

    check_base(recipe)
    name, shape = model_of(recipe)
    rope = "its own" if recipe.rope_variant is None else recipe.rope_variant.variant
    trained = f", trained at {shape.seq_length:,} tokens" if recipe.restore_from else ", from random weights"
    return f"{name}: {shape.parameters / 1e6:,.1f} M parameters{trained}; RoPE: {rope}"


def _curriculum(recipe: RecipeConfig) -> str:
    curriculum = recipe.curriculum
    stages = ", ".join(
        f"{stage.seq_length:,} tokens for steps {stage.first_step:,} to {stage.end_step:,}" for stage in curriculum.plan
    )
    return f"{curriculum.total_tokens:,} tokens, {curriculum.tokens_per_step:,} a step: {stages}"


def _data(recipe: RecipeConfig) -> str:
    from nemo_longctx.data.mixture import Documents, plan_mix

    documents = Documents.open(recipe.data.mix)
    total = recipe.curriculum.total_tokens
    strata = plan_mix(recipe.data.mix, documents, total)
    said = [f"{stratum.name} {stratum.share:.1%} ({stratum.repeats(total):.2f} times)" for stratum in strata]
    return f"{len(documents):,} documents: {', '.join(said)}"


def _validation(each: Any) -> str:
    from nemo_longctx.data.corpus import open_corpus

    corpus = open_corpus(each.path)
    return f"{each.name}: {len(corpus.lengths):,} documents of {each.path}, at {each.seq_length:,} tokens"


def _layout(recipe: RecipeConfig) -> str:
    trainer = recipe.trainer
    sizes = {
        "TP": trainer.tensor_model_parallel_size,
        "PP": trainer.pipeline_model_parallel_size,
        "CP": trainer.context_parallel_size,
        "DP": trainer.data_parallel_size,
    }
    split = " ".join(f"{name} {size}" for name, size in sizes.items())
    processes = f"{trainer.num_nodes} x {trainer.devices} {trainer.accelerator}"
    return f"{processes}: {split}, precision {trainer.precision}; memory and time: nemo-longctx plan --recipe"


def _directory(recipe: RecipeConfig) -> str:
    from nemo_longctx.planning.models import nemo_context
    from nemo_longctx.planning.recipe import model_of

    directory = recipe.directory
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    known = recipe.restore_from is None or nemo_context(Path(recipe.restore_from)) is not None
    said = f"{directory}, {free / 2**30:,.1f} GiB free"
    if known:
        needed = 2 * BYTES_PER_PARAMETER[recipe.trainer.precision] * model_of(recipe)[1].parameters
        said += f", two checkpoints take {needed / 2**30:,.2f} GiB"
        if needed > free:
            raise ConfigError("output_dir", recipe.output_dir, f"{said}; free some space, or choose another place")
    if (directory / "checkpoints").is_dir():
        said += "; a run is there: this command would go on with it"
    return said


@contextlib.contextmanager
def rehearsal(recipe: RecipeConfig) -> Iterator[RecipeConfig]:
    """`recipe` cut to one step of each stage, in a directory beside its own that is gone afterwards."""
    stages = recipe.curriculum.stages
    count = len(stages)
    cut = tuple(dataclasses.replace(stage, until=(number + 1) / count) for number, stage in enumerate(stages))
    curriculum = dataclasses.replace(recipe.curriculum, stages=cut, total_tokens=count * recipe.curriculum.tokens_per_step)
    directory = recipe.directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{recipe.name}-dry-run-", dir=directory.parent) as folder:
        yield dataclasses.replace(
            recipe,
            output_dir=folder,
            curriculum=curriculum,
            optimizer=dataclasses.replace(recipe.optimizer, warmup_tokens=0),
            trainer=dataclasses.replace(recipe.trainer, val_every_tokens=0),
            checkpoint=dataclasses.replace(recipe.checkpoint, every_tokens=0),
        )
