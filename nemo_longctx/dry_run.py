"""`nemo-longctx train --dry-run`: what a run would read, need and write, checked without loading the host or a model.

What of it would end a run, `refuse` says before each run: at once, not behind the half minute that the host takes to start.

What only a live model shows (its RoPE on every layer, its memory) `--dry-run=full` shows: it trains one step of every stage,
saves, validates and evaluates in a directory of its own, and removes that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_longctx.capability import has_module
from nemo_longctx.checkpoints import checkpoints
from nemo_longctx.config import ConfigError
from nemo_longctx.cross_checks import check_stage_begun
from nemo_longctx.data.config import DataConfig, InstructDataConfig
from nemo_longctx.data.mixture import MixConfig
from nemo_longctx.effects import without_effect
from nemo_longctx.eval.config import ContextTask, EvalConfig, HarnessTask, PositionTask
from nemo_longctx.files import first_process
from nemo_longctx.loggers import check_loggers
from nemo_longctx.model_fields import check_layout
from nemo_longctx.nemo_files import base_of_adapters, check_whole, io_config
from nemo_longctx.precision import PRECISIONS
from nemo_longctx.recipe import RunConfig
from nemo_longctx.resume import check_length, check_resumed
from nemo_longctx.rope.request import check_layers_differ
from nemo_longctx.runs import REHEARSAL, one_run, was_left
from nemo_longctx.start import check_start


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


def check(recipe: RunConfig) -> Checked:
    """Look at everything that a run of `recipe` needs and that can be seen without the host.

    Returns:
        lines to print, and the errors among them.
    """
    checked = Checked()
    checked.look("model", lambda: _model(recipe))
    checked.look("curriculum", lambda: _curriculum(recipe))
    for line in _data(recipe):
        checked.look("data", line)
    for each in recipe.data.validation:
        checked.look("validation", functools.partial(_validation, each))
    if not checked.errors:  # a corpus or a model that is not there was told
        checked.look("tokens", lambda: _tokens(recipe))
    checked.lines += [f"{'note':<12}{each}" for each in notes(recipe)]
    if recipe.eval is not None and recipe.eval.tasks:
        checked.look("evaluation", lambda: _evaluation(recipe))
    if recipe.logger:
        checked.look("logger", lambda: _logger(recipe))
    checked.look("layout", lambda: _layout(recipe))
    checked.look("machine", lambda: _machine(recipe))
    checked.look("directory", lambda: _directory(recipe))
    return checked


def refuse(recipe: RunConfig) -> None:
    """Raise what would end a run of `recipe` here once the host is imported and the model built: what is missing, by its key.

    Raises:
        ModuleNotFoundError: NeMo is not installed.
        ConfigError: no device, other processes than the layout's, a checkpoint, a corpus or a text that is not
            there, or a mix that the corpora cannot give.
    """
    if not has_module("nemo"):
        raise ModuleNotFoundError("No module named 'nemo'", name="nemo")
    check_start(recipe.trainer)
    check_stage_begun(recipe, next(iter(checkpoints(recipe.directory)), None))
    check_base(recipe)
    for path in _corpora(recipe):
        _open(path)
    for see in _data(recipe):  # files that are there, a mix that can be met
        see()
    for each in recipe.data.validation:
        _validation(each)
    _evaluation(recipe)
    if first_process():
        _tokens(recipe)
        for line in notes(recipe):
            print(f"note: {line}", file=sys.stderr)


def check_base(recipe: RunConfig) -> None:
    """Look at the checkpoint that a run begins with, and at its sizes against the layout, before the host is imported.

    Raises:
        ConfigError: none is there, or layers or heads that the parallel sizes do not divide.
    """
    from nemo_longctx.planning.models import nemo_context

    if not recipe.restore_from:
        return
    path = Path(recipe.restore_from)
    context = nemo_context(path)
    if context is not None:
        check_whole(context.parent.parent)
        if (newest := next(iter(checkpoints(recipe.directory)), None)) is not None:
            base_of_adapters(newest.path, context.parent.parent)
        check_layout({**io_config(context.parent.parent), **recipe.model}, recipe.trainer, recipe.curriculum)
        _check_rope_layers(recipe)
        return
    from nemo_longctx.hf.other_formats import no_nemo_checkpoint

    raise ConfigError("restore_from", recipe.restore_from, no_nemo_checkpoint(path))


def _check_rope_layers(recipe: RunConfig) -> None:
    from nemo_longctx.planning.recipe import model_of

    if recipe.rope_variant is None or not recipe.rope_variant.by_layer or "config" in recipe.model:
        return
    shape = model_of(recipe)[1]
    check_layers_differ([True] * shape.windowed_layers + [False] * (shape.num_layers - shape.windowed_layers))


def _corpora(recipe: RunConfig) -> list[str | Sequence[str]]:
    mix = recipe.data.pretraining if isinstance(recipe.data, InstructDataConfig) else recipe.data.mix
    return [source.path for source in mix.sources] if mix is not None else []


def _open(path: str | Sequence[str]) -> Any:
    from nemo_longctx.data.corpus import open_corpus

    return open_corpus(path)


def _model(recipe: RunConfig) -> str:
    from nemo_longctx.planning.recipe import model_of

    check_base(recipe)
    name, shape = model_of(recipe)
    asked = recipe.rope_variant
    rope = "its own" if asked is None or asked.variant is None else asked.variant
    if asked is not None and asked.by_layer:
        rope += f", plain in the {shape.windowed_layers} layers with a window"
    trained = f", trained at {shape.seq_length:,} tokens" if recipe.restore_from else ", from random weights"
    return f"{name}: {shape.parameters / 1e6:,.1f} M parameters{trained}; RoPE: {rope}"


def _curriculum(recipe: RunConfig) -> str:
    curriculum = recipe.curriculum
    stages = ", ".join(
        f"{stage.seq_length:,} tokens for steps {stage.first_step:,} to {stage.end_step:,}" for stage in curriculum.plan
    )
    return f"{curriculum.total_tokens:,} tokens, {curriculum.tokens_per_step:,} a step: {stages}"


def _data(recipe: RunConfig) -> list[Callable[[], str]]:
    """What says each part of the data; the mix of a run of pretraining, or the files of instruction tuning."""
    if isinstance(recipe.data, DataConfig):
        mix, curriculum = recipe.data.mix, recipe.curriculum
        step = max((found.step for found in checkpoints(recipe.directory)[:1]), default=0)
        if step < 1:
            return [lambda: _mix(mix, curriculum.total_tokens)]
        # What it has read counts for a cap; what that was, the checkpoint alone knows.
        mix, left = dataclasses.replace(mix, max_repeats=None, on_cap="error"), curriculum.total_steps - step
        return [lambda: f"{_mix(mix, max(left, 0) * curriculum.tokens_per_step)} from step {step:,} on"]
    data = recipe.data
    files = [(f"data.{key}", path) for key in ("short", "long") for path in getattr(data, key)]
    said: list[Callable[[], str]] = [functools.partial(_conversations, key, path) for key, path in files]
    if data.template not in ("tokenizer", "llama2"):
        mend = "no such file; set tokenizer, llama2, or the path of a Jinja file"
        said.append(functools.partial(_conversations, "data.template", data.template, mend))
    if data.pretraining is not None:
        mix, total = data.pretraining, round(recipe.curriculum.total_tokens * data.blend.get("pretraining", 0))
        said.append(functools.partial(_mix, mix, total))
    return said


def _conversations(key: str, path: str, mend: str = "no such file") -> str:
    if not Path(path).is_file():
        raise ConfigError(key, path, mend)
    return f"{key.removeprefix('data.')}: {path}, {Path(path).stat().st_size / 2**20:,.1f} MiB"


def _mix(mix: MixConfig, total: int) -> str:
    from nemo_longctx.data.mixture import Documents, plan_mix

    documents = Documents.open(mix)
    strata = plan_mix(mix, documents, total)
    said = [f"{stratum.name} {stratum.share:.1%} ({stratum.repeats(total):.2f} times)" for stratum in strata]
    return f"{len(documents):,} documents: {', '.join(said)}"


def _validation(each: Any) -> str:
    from nemo_longctx.data.evaluation import windows_of

    corpus = _open(each.path)
    windows = windows_of(each, corpus.n_tokens)
    used = windows if each.samples is None else min(each.samples, windows)
    said = f"{used:,} of {windows:,} windows of {each.seq_length:,} tokens"
    return f"{each.name}: {said}, {corpus.n_documents:,} documents of {each.path}"


def _tokens(recipe: RunConfig) -> str:
    """Whose tokens the corpora hold, and whether the model has a row for each of them."""
    from nemo_longctx.data.tokenization import check_hub_name
    from nemo_longctx.data.vocabulary import check_corpora
    from nemo_longctx.planning.models import nemo_context

    data = recipe.data
    if recipe.restore_from is None and data.tokenizer is not None:  # a base brings its own
        check_hub_name("data.tokenizer", str(data.tokenizer))
    if not isinstance(data, DataConfig):
        return f"of {data.tokenizer}"
    if data.after is not None:
        _check_after(data.after)
    context = None if recipe.restore_from is None else nemo_context(Path(recipe.restore_from))
    rows = {**({} if context is None else io_config(context.parent.parent)), **recipe.model}.get("vocab_size")
    paths = {f"data.mix.sources[{i}].path": source.path for i, source in enumerate(data.mix.sources)}
    for name in ("validation", "test"):
        paths |= {f"data.{name}[{i}].path": each.path for i, each in enumerate(getattr(data, name))}
    check_corpora(paths, vocab_size=rows, tokenizer=data.tokenizer)
    return "of one tokenizer" if rows is None else f"of one tokenizer, within the model's {rows:,}"


def _check_after(run: str) -> None:
    from nemo_longctx.planning.models import nemo_context

    if nemo_context(Path(run)) is None:
        mend = "no finished NeMo checkpoint is there; name the run's directory, or leave it out"
        raise ConfigError("data.after", run, mend)


def notes(recipe: RunConfig) -> list[str]:
    """What is no mistake by itself, and is seldom meant: settings of the recipe that have no effect, documents that are drawn
    twice, or measured and trained on, tokens of another tokenizer than the base's."""
    from nemo_longctx.data.vocabulary import not_the_base_s
    from nemo_longctx.planning.models import nemo_context

    said = without_effect(recipe)
    context = None if recipe.restore_from is None else nemo_context(Path(recipe.restore_from))
    with contextlib.suppress(ConfigError):  # what is not there, or broken, is told elsewhere
        if context and (other := not_the_base_s(context.parent.parent, _corpora(recipe), recipe.data.tokenizer)):
            said.append(other)
    if not isinstance(recipe.data, DataConfig):
        return said
    sources = recipe.data.mix.sources
    first: dict[tuple[object, ...], str] = {}
    for source in sources:
        rules = (_real(source.path), source.drop_shorter, source.drop_longer)
        if rules in first:
            said.append(
                f"the sources {first[rules]} and {source.name} are one corpus: its documents are drawn for each of them"
            )
        first.setdefault(rules, str(source.name))
    trained = {path for source in sources for path in _real(source.path)}
    for kind, sets in (("validation", recipe.data.validation), ("test", recipe.data.test)):
        for each in sets:
            if trained & set(_real(each.path)):
                said.append(f"the {kind} set {each.name} is trained on: its loss is none of unseen text (prepare --holdout)")
    return said


def _real(path: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(os.path.realpath(each) for each in ([path] if isinstance(path, str) else path))


def _evaluation(recipe: RunConfig) -> str:
    tasks = () if recipe.eval is None else recipe.eval.tasks
    check_evaluation(recipe.eval)
    for task in tasks:
        if isinstance(task, (PositionTask, ContextTask)):
            _open(task.corpus)
    return ", ".join(task.name for task in tasks)


def check_evaluation(config: EvalConfig | None) -> None:
    """Refuse an `eval` block that could not be measured, on the first process: names of tasks, paths, the tokenizer.

    Raises:
        ConfigError: as `nemo_longctx.eval.checks.check_eval`.
    """
    from nemo_longctx.eval.checks import check_eval

    if first_process():
        check_eval(config, check_names=_task_names)


def _task_names(task: HarnessTask) -> None:
    if not has_module("lm_eval"):
        raise ConfigError("eval.tasks", ", ".join(task.tasks), "lm-eval tasks need lm-eval: pip install nemo-longctx[eval]")
    from nemo_longctx.eval.task_names import check_spelling

    check_spelling(task)
    from nemo_longctx.adapters.harness import check_names

    check_names(task)


def _logger(recipe: RunConfig) -> str:
    check_loggers(recipe.logger)
    return ", ".join(recipe.logger)


def _machine(recipe: RunConfig) -> str:
    """Not an error here: a recipe may be looked at on another machine than its own."""
    try:
        check_start(recipe.trainer)
    except ConfigError as error:
        return f"not this one: {error}"
    return "this one can start it"


def _layout(recipe: RunConfig) -> str:
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


def _directory(recipe: RunConfig) -> str:
    from nemo_longctx.planning.models import nemo_context
    from nemo_longctx.planning.recipe import model_of

    directory = recipe.directory
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if not there.is_dir():
        raise ConfigError("output_dir", recipe.output_dir, f"{there} is a file; name a directory")
    if not os.access(there, os.W_OK):
        raise ConfigError("output_dir", recipe.output_dir, f"nothing may be written in {there}; name another place")
    free = shutil.disk_usage(there).free
    known = recipe.restore_from is None or nemo_context(Path(recipe.restore_from)) is not None
    known = known and getattr(recipe, "lora", None) is None  # checkpoints of adapters hold them alone
    said = f"{directory}, {free / 2**30:,.1f} GiB free"
    if known:
        needed = 2 * PRECISIONS[recipe.trainer.precision].checkpoint_bytes * model_of(recipe)[1].parameters
        said += f", two checkpoints take {needed / 2**30:,.2f} GiB"
        if needed > free:
            raise ConfigError("output_dir", recipe.output_dir, f"{said}; free some space, or choose another place")
    check_resumed(recipe, directory)
    check_length(recipe.curriculum, next(iter(checkpoints(directory)), None))
    if (directory / "checkpoints").is_dir():
        said += "; a run is there: this command would go on with it"
    return said


@contextlib.contextmanager
def rehearsal(recipe: RunConfig) -> Iterator[Any]:
    """`recipe` cut to one step of each stage, in a directory beside its own that is gone afterwards."""
    stages = recipe.curriculum.stages
    count = len(stages)
    cut = tuple(dataclasses.replace(stage, until=(number + 1) / count) for number, stage in enumerate(stages))
    curriculum = dataclasses.replace(recipe.curriculum, stages=cut, total_tokens=count * recipe.curriculum.tokens_per_step)
    directory = recipe.directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{recipe.name}{REHEARSAL}"
    if first_process():
        _remove_left(directory.parent, prefix, recipe.name)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=directory.parent) as folder,
        one_run(Path(folder) / recipe.name, every_process=True),  # each process has a folder: all are found, if killed
    ):
        yield dataclasses.replace(
            recipe,
            output_dir=folder,
            logger=(),
            curriculum=curriculum,
            optimizer=dataclasses.replace(recipe.optimizer, warmup_tokens=0),
            trainer=dataclasses.replace(recipe.trainer, val_every_tokens=0),
            checkpoint=dataclasses.replace(recipe.checkpoint, every_tokens=0),
        )


def _remove_left(place: Path, prefix: str, name: str) -> None:
    """Remove what dry runs of this name wrote that were killed: two checkpoints of a large model fill a disk unseen."""
    for folder in place.iterdir():
        if folder.name.startswith(prefix) and was_left(folder / name):
            shutil.rmtree(folder, ignore_errors=True)
            print(f"removed {folder}: a dry run that was killed left it", flush=True)
