"""Where a run's figures go besides its own files: `logger=tensorboard`, or several, by the names that all of them keep.

What each arrives as (NeMo's own names, and beside them those of our callbacks):

| name | what | when |
| --- | --- | --- |
| `reduced_train_loss`, `lr`, `grad_norm` | of a step | every `trainer.log_every_n_steps` |
| `consumed_tokens`, `seq_length` | tokens read so far, and the stage's length | with them |
| `tokens_per_second`, `tflops_per_gpu`, `mfu` | speed; MFU where the GPU's peak is known | every 10 steps |
| `val_loss`, `val_loss_NAME` | of all validation sets, and of each | at a validation |
| `eval/...` | each figure of an evaluation: losses by position, probes, tasks | at an evaluation |
| `guard/...` | changes of what the short-context guard watches | at an evaluation |
| pictures `figures/...` | the figures of `results/eval`, and the training curve | at an evaluation, at the end |
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from nemo_longctx.checkpoints import checkpoints
from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.files import write_text

# Logger -> the package that it needs; None for one that Lightning has.
PACKAGES: dict[str, str | None] = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "csv": None}
IDS = "logger_ids.json"  # in a run's directory: what a resumed run goes on under


def logger_names(asked: str | Sequence[str]) -> tuple[str, ...]:
    """`asked` as names: `none`, one, several, or several in one text with commas between.

    Raises:
        ConfigError: no such logger, one named twice, or `none` beside others.
    """
    named = [part.strip() for part in asked.split(",")] if isinstance(asked, str) else list(asked)
    if named in ([], ["none"], [""]):
        return ()
    for name in named:
        if name == "none":
            raise ConfigError("logger", plain_list(named), "none stands alone; leave it out beside others")
        if name not in PACKAGES:
            raise ConfigError("logger", name, f"no such logger, {did_you_mean(name, [*PACKAGES, 'none'])}")
    if len(set(named)) < len(named):
        raise ConfigError("logger", plain_list(named), "name each once")
    return tuple(named)


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError for the first logger whose package this machine lacks."""
    for name in names:
        package = PACKAGES[name]
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError("logger", name, f"needs the package {package}: pip install {package}, or leave it out")


def kept_ids(directory: Path) -> dict[str, str]:
    """Logger -> the id that a run went by, so that it goes on in the same place; none for a run without a checkpoint."""
    file = directory / IDS
    if not file.exists() or not checkpoints(directory):
        return {}
    return {str(name): str(value) for name, value in json.loads(file.read_text(encoding="utf-8")).items()}


def keep_ids(directory: Path, ids: dict[str, str]) -> None:
    """Note the ids of a run's loggers for its next start."""
    if ids:
        write_text(directory / IDS, json.dumps(ids))


def plain_list(names: Sequence[str]) -> list[str]:
    """For messages."""
    return [str(name) for name in names]
