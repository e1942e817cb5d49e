"""Checkpoints and imports of 0.1 name modules where they were before `adapters/nemo` was sorted into folders."""

import importlib
import shutil
from pathlib import Path

import pytest
from saved_checkpoints import make, truncate

from nemo_longctx import adapters
from nemo_longctx.adapters import nemo
from nemo_longctx.adapters.nemo.model.config import checkpoint_directory, checkpoint_model
from nemo_longctx.adapters.nemo.model.rope import RopeTransform
from nemo_longctx.config import ConfigError
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


def test_a_checkpoint_that_is_not_whole_is_none_to_restore_from(tmp_path):
    path = make(tmp_path, 8)
    assert checkpoint_directory(path) == path
    truncate(path / "weights" / "__0_1.distcp")
    with pytest.raises(ConfigError, match=r"restore_from='.*': this checkpoint cannot be read: .*__0_1.distcp.*; give"):
        checkpoint_directory(path)


def test_stale_locks_are_removed_before_a_host_is_imported(monkeypatch):
    calls = []
    monkeypatch.setattr("nemo_longctx.start.remove_stale_locks", lambda: calls.append(1))
    importlib.reload(adapters)
    assert calls == [1]


def test_a_context_that_would_call_what_no_checkpoint_needs_is_refused(old_checkpoint):
    context = old_checkpoint / "context" / "io.json"
    text = context.read_text()
    context.write_text(
        text.replace(
            '"module": "nemo.collections.llm.gpt.model.llama", "name": "LlamaConfig"', '"module": "pty", "name": "spawn"'
        )
    )
    assert context.read_text() != text
    with pytest.raises(ConfigError, match=r"pty\.spawn"):
        checkpoint_model(old_checkpoint, {})


def test_a_checkpoint_whose_two_descriptions_disagree_is_refused(old_checkpoint):
    (old_checkpoint / "context" / "model.yaml").write_text("config: {num_layers: 99}")
    with pytest.raises(ConfigError, match=r"num_layers=3: in context/io\.json, by which NeMo loads, but 99"):
        checkpoint_model(old_checkpoint, {})


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
