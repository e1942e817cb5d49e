"""Which of Lightning's loggers a run gets, what each is told, and that each gets the pictures."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from saved_checkpoints import make

from nemo_longctx.adapters.nemo import loggers


@pytest.mark.parametrize(
    ("names", "given"),
    [
        ([], {}),
        (["tensorboard"], {"tensorboard": {"directory": "runs/a"}}),
        (["wandb"], {"wandb": {"directory": "runs/a", "name": "mine"}}),
        (["csv"], {"extra_loggers": [{"save_dir": "runs/a", "name": "csv"}]}),
        (
            ["csv", "mlflow"],
            {"extra_loggers": [{"directory": "runs/a", "name": "mine"}, {"save_dir": "runs/a", "name": "csv"}]},
        ),
    ],
    ids=str,
)
def test_a_run_gets_the_loggers_that_it_names(names, given, tmp_path):
    made = loggers.logger_parts(names, directory="runs/a", run_name="mine")
    assert made.pop("update_logger_directory") is False
    plain = {
        key: [dict(one.__arguments__) for one in part] if isinstance(part, list) else dict(part.__arguments__)
        for key, part in made.items()
    }
    assert plain == given


@pytest.mark.parametrize(("saved", "shown"), [([], [0, 1]), ([2], [0, 1, 2]), ([2, 3], [0, 1, 2, 3])], ids=str)
def test_tensorboard_shows_no_step_twice(tmp_path, saved, shown):
    """What a killed run had logged behind its newest checkpoint stood beside the same steps made again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in enumerate((range(5), range(saved[-1] if saved else 0, shown[-1] + 1))):
        logger = loggers.tensorboard_logger(directory=str(tmp_path))
        for step in steps:
            logger.log_metrics({"loss": float(step)}, step=step)
        logger.finalize("success")
        logger.experiment.close()
        for each in saved if start == 0 else ():
            make(tmp_path, each)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == shown


def recorder(kind, told):
    """A logger of a kind, whose tool writes down what it is told."""

    class Recorded(kind):
        def __init__(self):
            pass

        run_id = "7"
        experiment = SimpleNamespace(
            add_image=lambda name, image, **more: told.append((name, image.shape[-1], more)),
            log_artifact=lambda run, path, artifact_path: told.append((run, path, artifact_path)),
        )

        def log_image(self, name, images):
            told.append((name, images))

    return Recorded()


def test_every_logger_gets_the_pictures_that_are_there(tmp_path):
    Figure().savefig(tmp_path / "loss.png")
    pictures = loggers.figures_in(tmp_path) | {"figures/none": tmp_path / "none.png"}
    assert list(pictures) == ["figures/loss", "figures/none"]
    path = str(tmp_path / "loss.png")
    for kind, said in (
        (TensorBoardLogger, ("figures/loss", 4, {"global_step": 5, "dataformats": "HWC"})),
        (WandbLogger, ("figures/loss", [path])),
        (MLFlowLogger, ("7", path, "figures")),
    ):
        told = []
        loggers.log_pictures(SimpleNamespace(loggers=[recorder(kind, told)], global_step=5), pictures)
        assert told == [said]
