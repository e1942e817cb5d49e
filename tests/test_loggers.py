"""Names of loggers, what this machine lacks for them, and the id that a resumed run goes on under."""

import sys
import types

import pytest

from nemo_longctx import launch, launch_sft, loggers
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.loggers import check_loggers, keep_ids, kept_ids, logger_names
from nemo_longctx.recipe import load_recipe

SFT = ["sft=short", "restore_from=base", "data.tokenizer=t", "data.short=[a.jsonl]", "trainer=cpu", "name=mine"]


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


@pytest.mark.parametrize("module", [launch, launch_sft], ids=["train", "sft"])
def test_a_missing_package_is_told_before_the_host_is_imported(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "nemo_longctx.adapters.nemo.launch.run", None)  # an import of it would fail
    monkeypatch.setitem(sys.modules, "nemo_longctx.adapters.nemo.launch.instruct_run", None)
    words = ["recipe=tiny_cpu_base"] if module is launch else SFT
    assert module.main([*words, f"output_dir={tmp_path}", "logger=wandb"]) == 2
    assert "logger='wandb': needs the package wandb: pip install wandb" in capsys.readouterr().err


def test_sft_trains_what_its_recipe_builds(tmp_path, monkeypatch):
    trained = []
    made = types.ModuleType("instruct_run")
    made.build_instruct_run = lambda recipe: types.SimpleNamespace(fit=lambda: trained.append(recipe.directory))
    monkeypatch.setitem(sys.modules, "nemo_longctx.adapters.nemo.launch.instruct_run", made)
    monkeypatch.setattr(launch_sft, "fit_unless_finished", lambda recipe, fit: fit())  # tests/test_runs.py has its rules
    assert launch_sft.main([*SFT, f"output_dir={tmp_path}"]) == 0
    assert [directory.parent for directory in trained] == [tmp_path]
