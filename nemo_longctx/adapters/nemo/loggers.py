"""Lightning's loggers for NeMo's, and the pictures that Lightning itself has no word for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nemo_run as run
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from nemo_longctx.checkpoints import checkpoints
from nemo_longctx.loggers import keep_ids, kept_ids


def logger_parts(names: Sequence[str], *, directory: Path, run_name: str) -> dict[str, Any]:
    """Arguments of `NeMoLogger`: `tensorboard`, `wandb` and `extra_loggers`, each a `run.Config`.

    Projects and servers are those that the tools read themselves: WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI. What
    is written here lies in the run's directory.
    """
    given: dict[str, Any] = {"update_logger_directory": False}  # NeMo would put a path from here behind the run's
    if "tensorboard" in names:
        given["tensorboard"] = run.Config(tensorboard_logger, directory=str(directory))
    if "wandb" in names:
        given["wandb"] = run.Config(wandb_logger, directory=str(directory), name=run_name)
    extra = []
    if "mlflow" in names:
        extra.append(run.Config(mlflow_logger, directory=str(directory), name=run_name))
    if "csv" in names:  # a folder a start: Lightning's begins its file anew
        extra.append(run.Config(CSVLogger, save_dir=str(directory), name="csv"))
    return given | ({"extra_loggers": extra} if extra else {})


def tensorboard_logger(*, directory: str) -> TensorBoardLogger:
    """TensorBoard's, in the run's directory. What a killed run logged behind its newest checkpoint is not shown: those steps
    are made again."""
    found = checkpoints(Path(directory))
    step = max(found[0].step, 0) if found else 0
    return TensorBoardLogger(save_dir=directory, name="tensorboard", version="", purge_step=step)


def wandb_logger(*, directory: str, name: str) -> WandbLogger:
    """W&B's, in the run that this directory's checkpoint was logged to."""
    project = os.environ.get("WANDB_PROJECT", "nemo-longctx")
    return WandbLogger(name=name, project=project, save_dir=directory, id=kept_ids(Path(directory)).get("wandb"))


def mlflow_logger(*, directory: str, name: str) -> MLFlowLogger:
    """MLflow's, on MLFLOW_TRACKING_URI or in the run's directory, in the run that its checkpoint was logged to."""
    place = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{Path(directory).absolute() / 'mlruns'}"
    run_id = kept_ids(Path(directory)).get("mlflow")
    return MLFlowLogger(experiment_name="nemo-longctx", run_name=name, tracking_uri=place, run_id=run_id)


def note_ids(trainer: Any, directory: Path) -> None:
    """Keep what the run goes by at each tool. On the first process."""
    ids = {}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            ids["wandb"] = str(logger.experiment.id)
        elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
            ids["mlflow"] = logger.run_id
    keep_ids(directory, ids)


def log_pictures(trainer: Any, pictures: Mapping[str, Path]) -> None:
    """Give every logger that takes pictures those of `pictures` (name -> PNG file) that are there. On the first process."""
    found = {name: path for name, path in pictures.items() if path.is_file()}
    for logger in trainer.loggers:
        for name, path in found.items():
            if isinstance(logger, TensorBoardLogger):
                from matplotlib.image import imread

                logger.experiment.add_image(name, imread(path), global_step=trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [str(path)])
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(path), artifact_path=str(Path(name).parent))


def figures_in(directory: Path) -> dict[str, Path]:
    """`figures/STEM` -> file, for the PNGs of a folder."""
    return {f"figures/{path.stem}": path for path in sorted(directory.glob("*.png"))}
