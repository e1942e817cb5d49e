"""The commands as functions, for scripts and notebooks: typed arguments, values back, a sentence raised.

What loads NeMo or starts workers runs in a process of its own, which prints here: so it needs no `if __name__ == "__main__":`,
starts in a notebook, leaves no GPU memory behind, and ends as the command does.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_longctx.config import ConfigError
from nemo_longctx.overrides import hydra_text
from nemo_longctx.runs import RunError

if TYPE_CHECKING:
    from nemo_longctx.eval.results import SuiteResult

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that reached its end.

    Attributes:
        directory: `output_dir/name`: checkpoints, logs, results.
    """

    directory: Path

    @property
    def checkpoint(self) -> Path:
        """The newest finished NeMo checkpoint."""
        from nemo_longctx.checkpoints import checkpoints

        return checkpoints(self.directory)[0].path

    @property
    def training(self) -> list[dict[str, float]]:
        """The training log, a row a step: `step`, `tokens` (read so far), `seq_length`, `loss` (nats a token), `lr`,
        `grad_norm`, `tokens_per_second`, ...; after a validation `validation_loss` and `validation_loss_NAME` of each set."""
        from nemo_longctx.report.training_log import read_training_log

        steps: dict[float, dict[str, float]] = {}
        for row in read_training_log(self.directory / "results" / "training.csv"):  # a validation has a row of its own there
            steps.setdefault(row["step"], {}).update(row)
        return list(steps.values())

    @property
    def evaluations(self) -> list[SuiteResult]:
        """What was measured while it trained, in order; imports torch."""
        from nemo_longctx.report.evaluation import read_results

        return read_results(self.directory / "results" / "eval")

    def __str__(self) -> str:
        from nemo_longctx.runs import ending

        return ending(self.directory)


def train(
    recipe: PathLike,
    *,
    restore_from: PathLike | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    nodes_line: Sequence[str] = (),
) -> Trained:
    """Continual pretraining at a longer context: `nemo-longctx train`, to its end; called again after a kill, it goes on.

    Args:
        recipe: a choice of conf/recipe/ (`tiny_cpu_long`), or a YAML file such as `nemo-longctx init` writes.
        restore_from: NeMo checkpoint or run to extend; None leaves it to the recipe.
        overrides: settings by dotted key, `{"trainer": "cpu", "optimizer.lr": 1e-4}`, or `["optimizer.lr=1e-4"]`.
        nodes_line: words before the command, such as `["torchrun", "--nproc-per-node", "8", "-m", "nemo_longctx"]`; without
            them the trainer starts the processes of one node itself.

    Raises:
        ConfigError: a setting that cannot be; before anything is started.
        RunError: the run ended before its end; the sentence says why.
    """
    words = [f"recipe={_place(recipe)}", *_overrides(overrides)]
    if restore_from is not None:
        words.append(_override("restore_from", _place(restore_from)))
    return _trained("train", words, nodes_line)


def tune(*, overrides: Mapping[str, Any] | Sequence[str], nodes_line: Sequence[str] = ()) -> Trained:
    """Instruction tuning of an extended checkpoint: `nemo-longctx sft`. Arguments and errors as of `train`."""
    return _trained("sft", _overrides(overrides), nodes_line)


def _trained(command: str, words: list[str], nodes_line: Sequence[str]) -> Trained:
    from nemo_longctx.compose import compose
    from nemo_longctx.recipe import load_instruct_recipe, load_recipe

    if isinstance(nodes_line, str):
        raise ConfigError("nodes_line", nodes_line, "give its words as a list: nodes_line.split()")
    made = load_recipe(compose(words)) if command == "train" else load_instruct_recipe(compose(words, config_name="sft"))
    _run([command, *words], start=nodes_line)
    return Trained(made.directory)


def evaluate(
    checkpoints: PathLike | Sequence[PathLike],
    *,
    corpus: PathLike | None = None,
    contexts: Sequence[int] = (),
    probes: PathLike | None = None,
    lengths: Sequence[int] = (),
    tasks: Sequence[str] = (),
    data: PathLike | None = None,
    suite: PathLike | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    tokenizer: str | None = None,
    out: PathLike = "evaluation",
) -> list[SuiteResult]:
    """Measure NeMo or Hugging Face checkpoints: `nemo-longctx eval`. Tables, figures and index.html are written to `out`.

    Args:
        checkpoints: one or several, which are then compared.
        corpus: prefix of a held-out `.bin/.idx`: loss by position, and on fixed targets against `contexts` (tokens).
        probes: text to hide first-sentence, passkey and needle probes in, at `lengths` (tokens).
        tasks: of lm-eval; `data` is the folder of ours' published data, `limit` samples of each.
        suite: YAML file of tasks.
        max_length: tokens the model may read; None: what it was made for.
        tokenizer: Hugging Face name or directory; None: the checkpoint's.
        out: folder of the results.

    Returns:
        what was found, a value a checkpoint; imports torch.

    Raises:
        RunError: the sentence that the command ended with.
    """
    options = {"corpus": corpus, "contexts": contexts, "probes": probes, "lengths": lengths, "tasks": tasks, "data": data,
               "suite": suite, "limit": limit, "max-length": max_length, "tokenizer": tokenizer, "out": out}  # fmt: skip
    _run(["eval", *map(_place, _several(checkpoints)), *_options(options)])
    from nemo_longctx.report.evaluation import read_results

    return read_results(Path(_place(out)))


def export(checkpoint: PathLike, target: PathLike, *, verify: bool = True, tokenizer: PathLike | None = None) -> Path:
    """A NeMo checkpoint or run as a Hugging Face directory: `nemo-longctx export`.

    Args:
        checkpoint: a NeMo checkpoint, or a run's directory (its newest one).
        target: the directory to make; it must not be there.
        verify: load what was written, and compare its logits with the checkpoint's.
        tokenizer: Hugging Face directory; None: what the checkpoint carries.

    Returns:
        `target`.

    Raises:
        RunError: the sentence that the command ended with.
    """
    flags = [] if verify else ["--no-verify"]
    _run(["export", _place(checkpoint), _place(target), *flags, *_options({"tokenizer": tokenizer})])
    return Path(_place(target))


def import_hf(source: PathLike, target: PathLike, *, verify: bool = True) -> Path:
    """A Hugging Face directory as a NeMo checkpoint at `target`: `nemo-longctx import`. `verify` and errors as of `export`."""
    _run(["import", _place(source), _place(target), *([] if verify else ["--no-verify"])])
    return Path(_place(target))


def prepare(
    inputs: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    tokenizer: PathLike,
    train_tokenizer: int | None = None,
    holdout: float | None = None,
    globs: Sequence[str] = (),
    keys: Sequence[str] = (),
    workers: int | None = None,
    on_error: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Text to Megatron's `.bin/.idx`: `nemo-longctx prepare`; called again after a kill, it goes on.

    Args:
        inputs: files of records or text, directories of them, or URLs of either.
        output: prefix: OUTPUT.bin, OUTPUT.idx and OUTPUT.json are written.
        tokenizer: Hugging Face name or directory; with `train_tokenizer`, where the one that is made is kept.
        train_tokenizer: entries of the vocabulary of a byte-level BPE to train on the input; None trains none.
        holdout: share of the documents, 0 to 1, that goes to OUTPUT_holdout; None: none.
        globs: which files of directories, such as `*.txt`.
        keys: which texts of a record are joined; none: `text`.
        workers: processes; None: one a core.
        on_error: `fail` at a bad record, or `skip` it; None: fail.
        force: replace a corpus that other settings made.

    Returns:
        the report: documents and tokens by split, what was left out, how the corpus was made.

    Raises:
        RunError: the sentence that the command ended with.
    """
    words = ["prepare", *map(_place, _several(inputs)), "--output", _place(output), "--tokenizer", _place(tokenizer), "--json"]
    words += [word for glob in _several(globs) for word in ("--glob", os.fspath(glob))]
    options = {"train-tokenizer": train_tokenizer, "holdout": holdout, "keys": keys, "workers": workers, "on-error": on_error}
    said = _run([*words, *_options(options), *(["--force"] if force else [])], captured=True)
    return json.loads(said)


def plan(
    model: PathLike | None = None,
    *,
    recipe: PathLike | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    curriculum: str | None = None,
    tokens_per_step: int | None = None,
    steps: int | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """FLOPs, memory, time and layouts of a run before it is paid for: what `nemo-longctx plan --json` prints.

    Args:
        model: a name (`llama2_7b`), a Hugging Face or NeMo directory; or `recipe` and `overrides`, as of `train`.
        curriculum: lengths and the share of tokens at which each ends: `4096@0.2,32768`.
        tokens_per_step, steps: of the run.
        gpu, gpus: kind and number.
        options: any other of the command's, by its name with `_` for `-`: `search=5`, `tp=4`, `longest=True`.

    Raises:
        ConfigError: an option that is none, or a setting that cannot be.
    """
    from nemo_longctx.commands import plan as command
    from nemo_longctx.planning.report import make_plan

    parser = argparse.ArgumentParser(exit_on_error=False)
    command.configure(parser)
    given: dict[str, Any] = {"model": model, "recipe": recipe, "curriculum": curriculum, "tokens_per_step": tokens_per_step,
                             "steps": steps, "gpu": gpu, "gpus": gpus} | options  # fmt: skip
    defaults = parser.parse_args([])
    for name in given:
        if not hasattr(defaults, name):
            raise ConfigError(name, given[name], "no option of nemo-longctx plan")
    named = {name: _place(value) if isinstance(value, (str, os.PathLike)) else value for name, value in given.items()}
    values = vars(defaults) | {name: value for name, value in named.items() if value is not None}
    return make_plan(command._settings(argparse.Namespace(**values | {"overrides": _overrides(overrides)})))


def _overrides(given: Mapping[str, Any] | Sequence[str]) -> list[str]:
    if isinstance(given, str):
        raise ConfigError("overrides", given, "give a mapping of settings, or a list of key=value")
    if isinstance(given, Mapping):
        return [_override(key, value) for key, value in given.items()]
    for each in given:
        if not isinstance(each, str):
            raise ConfigError("overrides", each, "give a mapping of settings, or a list of key=value")
    return list(given)


def _override(key: str, value: Any) -> str:
    try:
        return f"{key}={hydra_text(value)}"
    except TypeError as error:
        raise ConfigError(key, value, "give None, truth, a number, text, a path, or lists and mappings of them") from error


def _several(given: PathLike | Sequence[PathLike]) -> list[PathLike]:
    """One is a list of one: the letters of a text are meant by nobody."""
    return [given] if isinstance(given, (str, os.PathLike)) else list(given)


def _place(path: PathLike) -> str:
    """As the command line takes it, where `~/` is the user's home: what is given back must lead there too."""
    return os.path.expanduser(os.fspath(path))


def _options(given: Mapping[str, Any]) -> list[str]:
    """`--name value` of all that are given; several values by comma."""
    words = []
    for name, value in given.items():
        if value is None or (isinstance(value, (list, tuple)) and not value):
            continue
        words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    return words


def _run(words: Sequence[str], *, start: Sequence[str] = (), captured: bool = False) -> str:
    """Run a command in a process of its own, print what it says, and give back its standard output where that is `captured`.

    Raises:
        RunError: its status is not 0; its error's sentence.
    """
    command = [*(start or [sys.executable, "-m", "nemo_longctx"]), *words]
    with tempfile.TemporaryFile() as file:
        ours = (
            {"stdout": file, "stderr": subprocess.PIPE}
            if captured
            else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        )
        process = subprocess.Popen(command, start_new_session=True, **ours)  # type: ignore[call-overload]
        last = ""
        try:
            pipe: Any = process.stderr if captured else process.stdout
            decode = codecs.getincrementaldecoder("utf-8")("replace")
            while chunk := os.read(pipe.fileno(), 1 << 16):
                text = decode.decode(chunk)
                sys.stdout.write(text)
                sys.stdout.flush()
                last = (last + text)[-8192:]
            status = process.wait()
        except BaseException:  # an interrupt is handed on: the run saves its step
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        if status:
            said = [line.partition("error: ")[2] for line in last.splitlines() if "error: " in line]
            raise RunError(said[-1] if said else f"nemo-longctx {words[0]} ended with status {status}; see what it printed")
        if not captured:
            return ""
        file.seek(0)
        return file.read().decode()
