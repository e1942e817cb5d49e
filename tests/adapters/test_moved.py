"""Checkpoints and imports of 0.1 name modules where they were before `adapters/nemo` was sorted into folders."""

import importlib
import shutil
from pathlib import Path

import pytest

from nemo_longctx.adapters import nemo
from nemo_longctx.adapters.nemo.model.config import checkpoint_model
from nemo_longctx.adapters.nemo.model.rope import RopeTransform
from nemo_longctx.rope import XposRope

# The context of a checkpoint that 3a13c4d wrote: `recipe=tiny_cpu_base rope=xpos_abf`, 20 steps.
OLD = Path(__file__).parents[1] / "fixtures" / "checkpoint_0_1"


@pytest.fixture
def old_checkpoint(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    (tmp_path / "old" / "weights").mkdir()
    return tmp_path / "old"


def test_an_old_checkpoint_has_its_rope(old_checkpoint):
    model = checkpoint_model(old_checkpoint, {})
    assert type(model.model_transform) is RopeTransform
    assert model.model_transform.variant == XposRope(base=500_000)


@pytest.mark.parametrize("old", sorted(nemo.MOVED))
def test_an_old_name_is_the_same_module(old):
    assert importlib.import_module(old) is importlib.import_module(nemo.MOVED[old])


@pytest.mark.parametrize(
    ("old", "name"), [("model", "fresh_model"), ("checkpoint", "export_hf"), ("evaluation", "MCoreCausalModel")]
)
def test_old_modules_that_are_folders_now_give_their_names(old, name):
    assert callable(getattr(importlib.import_module(f"nemo_longctx.adapters.nemo.{old}"), name))
    with pytest.raises(AttributeError):
        importlib.import_module(f"nemo_longctx.adapters.nemo.{old}").no_such_name  # noqa: B018


@pytest.mark.parametrize("folder", ["checkpoint", "evaluation", "model"])
def test_a_question_of_python_s_own_imports_nothing(folder, monkeypatch):
    """`inspect` and `doctest` ask every module for such names."""
    package = importlib.import_module(f"nemo_longctx.adapters.nemo.{folder}")
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert not hasattr(package, "__wrapped__")
