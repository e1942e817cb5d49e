"""Names of loggers, what this machine lacks for them, and the id that a resumed run goes on under."""

import pytest

from nemo_longctx import loggers
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.loggers import check_loggers, keep_ids, kept_ids, logger_names
from nemo_longctx.recipe import load_recipe


@pytest.mark.parametrize(
    ("asked", "names"),
    [("none", ()), ("wandb", ("wandb",)), (["tensorboard", "csv"], ("tensorboard", "csv")), ("csv,wandb", ("csv", "wandb"))],
)
def test_names_by_one_word_or_several(asked, names):
    assert logger_names(asked) == names


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("wandbb", "did you mean 'wandb'"),
        (["none", "csv"], "stands alone"),
        (["csv", "csv"], "once"),
        ("tensorbord", "tensorboard"),
    ],
)
def test_what_is_no_logger_is_refused(asked, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_recipe(compose(["recipe=tiny_cpu_base"]) | {"logger": asked})
    assert error.value.key == "logger"


def test_a_recipe_names_several():
    assert load_recipe(compose(["recipe=tiny_cpu_base"])).logger == ()
    assert load_recipe(compose(["recipe=tiny_cpu_base", "logger=[tensorboard,wandb]"])).logger == ("tensorboard", "wandb")


def test_a_missing_package_is_one_sentence_with_the_line_to_type(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    check_loggers(("csv",))
    for name in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(ConfigError, match=f"pip install {name}"):
            check_loggers((name,))


def test_an_id_is_kept_for_a_run_that_goes_on_only(tmp_path, monkeypatch):
    assert kept_ids(tmp_path) == {}
    keep_ids(tmp_path, {"wandb": "abc"})
    assert kept_ids(tmp_path) == {}  # begun anew: without a checkpoint
    monkeypatch.setattr(loggers, "checkpoints", lambda directory: ["step=1-last"])
    assert kept_ids(tmp_path) == {"wandb": "abc"}
