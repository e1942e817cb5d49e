"""Checkpoints as files: the newest by its step, torn and half-copied ones told before anything is loaded."""

import json
import os
import pickle
import shutil

import pytest
from saved_checkpoints import make, truncate

from nemo_longctx.checkpoints import checkpoint_to_resume, checkpoints, fault_of
from nemo_longctx.config import ConfigError

DAMAGES = {
    "truncated": lambda path: truncate(path / "weights" / "__0_1.distcp"),
    "emptied": lambda path: os.truncate(path / "weights" / "__0_0.distcp", 0),
    "a file missing": lambda path: (path / "weights" / "__0_0.distcp").unlink(),
    "metadata missing": lambda path: (path / "weights" / ".metadata").unlink(),
    "metadata torn": lambda path: truncate(path / "weights" / ".metadata"),
    "common state torn": lambda path: truncate(path / "weights" / "common.pt"),
    "no weights": lambda path: shutil.rmtree(path / "weights"),
    "no context": lambda path: shutil.rmtree(path / "context"),
}


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_with_and_without_a_manifest(tmp_path, damage, manifest):
    path = make(tmp_path, 8, manifest=manifest)
    assert fault_of(path) is None
    DAMAGES[damage](path)
    assert fault_of(path)


def test_zeros_at_a_files_end_and_a_torn_manifest_are_told(tmp_path):
    path = make(tmp_path, 8)
    data = path / "weights" / "__0_1.distcp"
    data.write_bytes(data.read_bytes()[:-4096] + bytes(4096))
    assert "__0_1.distcp is not what was written" in fault_of(path)
    path = make(tmp_path, 9)
    truncate(path / "manifest.json")
    assert "manifest.json" in fault_of(path)


def test_a_chat_template_that_comes_later_is_no_damage(tmp_path):
    path = make(tmp_path, 8)
    (path / "context" / "tokenizer").mkdir()
    (path / "context" / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    assert fault_of(path) is None


def test_nothing_that_metadata_names_is_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    path = make(tmp_path, 8, manifest=False)
    (path / "weights" / ".metadata").write_bytes(pickle.dumps([Runs()]))
    fault_of(path)
    assert not (tmp_path / "ran").exists()


def test_the_newest_is_the_one_with_the_most_steps_whatever_the_times_say(tmp_path):
    names = {step: make(tmp_path, step) for step in (12, 4, 8)}
    best = make(tmp_path, 12, name="step=12-val_loss=5.0000")
    for number, path in enumerate((names[12], best, names[8], names[4])):
        os.utime(path, (number, number))
    unfinished = make(tmp_path, 16)
    (unfinished.parent / f"{unfinished.name}-unfinished").touch()
    found = checkpoints(tmp_path)
    assert [(each.path, each.step) for each in found] == [(names[12], 12), (best, 12), (names[8], 8), (names[4], 4)]
    assert checkpoint_to_resume(tmp_path, fallback=False).path == names[12]
    assert checkpoints(tmp_path / "nothing") == []
    assert checkpoint_to_resume(tmp_path / "nothing", fallback=False) is None


def test_without_fallback_the_torn_one_is_named_with_the_one_before(tmp_path):
    older, newest = make(tmp_path, 4), make(tmp_path, 8)
    truncate(newest / "weights" / "__0_1.distcp")
    with pytest.raises(ConfigError) as caught:
        checkpoint_to_resume(tmp_path, fallback=False)
    assert caught.value.key == "resume.fallback"
    said = str(caught.value)
    assert f"{newest}, cannot be read: weights/__0_1.distcp has 50,000 bytes and had 100,000" in said
    assert f"set resume.fallback=true, which goes on from the one before it, {older.name}" in said
    assert newest.is_dir()


def test_with_fallback_the_torn_ones_are_put_aside_and_kept(tmp_path, capsys, monkeypatch):
    older = make(tmp_path, 4)
    for step in (8, 12):
        truncate(make(tmp_path, step) / "weights" / ".metadata")
    monkeypatch.setenv("RANK", "1")  # another process takes the same one, and leaves the files to the first
    assert checkpoint_to_resume(tmp_path, fallback=True).path == older
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    monkeypatch.setenv("RANK", "0")
    assert checkpoint_to_resume(tmp_path, fallback=True).path == older
    assert sorted(path.name for path in (tmp_path / "unreadable").iterdir()) == ["step=12-last", "step=8-last"]
    assert "step=12-last cannot be read" in capsys.readouterr().out
    assert checkpoint_to_resume(tmp_path, fallback=False).path == older


def test_with_fallback_and_none_before_a_run_does_not_begin_anew_by_itself(tmp_path):
    truncate(make(tmp_path, 8) / "weights" / ".metadata")
    with pytest.raises(ConfigError, match=r"no checkpoint can be read.*remove its directory"):
        checkpoint_to_resume(tmp_path, fallback=True)
    with pytest.raises(ConfigError, match="remove its directory"):
        checkpoint_to_resume(tmp_path, fallback=False)


def test_a_manifest_counts_every_file(tmp_path):
    path = make(tmp_path, 8)
    record = json.loads((path / "manifest.json").read_text())
    assert (record["step"], record["tokens"]) == (8, 8000)
    written = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {"manifest.json"}
    assert set(record["files"]) == written
