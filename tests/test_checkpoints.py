"""Checkpoints as files: the newest by its step, torn and half-copied ones told before anything is loaded."""

import json
import os
import pickle
import shutil
import zlib

import pytest
from saved_checkpoints import make, truncate

from nemo_longctx import checkpoints as checkpoint_files
from nemo_longctx.checkpoints import (
    best_in,
    checkpoint_to_resume,
    checkpoints,
    failed_checkpoint,
    fault_of,
    is_checkpoint,
    is_unfinished,
    set_aside,
    unmark_whole,
    write_manifest,
)
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


def test_a_base_that_was_moved_may_be_written_into_adapters(tmp_path):
    """A sentence told users to do so, and the next one said that the checkpoint was torn."""
    path = make(tmp_path, 8, manifest=False)
    note = path / "weights" / "adapter_metadata.json"
    note.write_text('{"model_ckpt_path": "/old"}')
    write_manifest(path, step=8, tokens=8)
    note.write_text('{"model_ckpt_path": "/somewhere/else"}')
    assert fault_of(path) is None
    note.unlink()
    assert fault_of(path) == "weights/adapter_metadata.json is missing"


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
    unfinished = make(tmp_path, 16, manifest=False)
    (unfinished.parent / f"{unfinished.name}-unfinished").touch()
    found = checkpoints(tmp_path)
    assert [(each.path, each.step) for each in found] == [(names[12], 12), (best, 12), (names[8], 8), (names[4], 4)]
    assert checkpoint_to_resume(tmp_path, fallback=False).path == names[12]
    assert checkpoints(tmp_path / "nothing") == []
    assert checkpoint_to_resume(tmp_path / "nothing", fallback=False) is None


def test_what_was_whole_when_its_run_was_killed_is_kept_behind_its_marker(tmp_path, capsys, monkeypatch):
    """A kill between the manifest and the end of NeMo's marker: the next start removed all of the newest checkpoint."""
    older, torn, bare, whole = (make(tmp_path, step, manifest=step != 12) for step in (4, 8, 12, 16))
    truncate(torn / "weights" / "__0_1.distcp")
    markers = [torn.parent / f"{each.name}-unfinished" for each in (torn, bare, whole)]
    for marker in (*markers, torn.parent / "gone-unfinished"):
        marker.touch()
    assert [is_unfinished(each) for each in (older, torn, bare, whole)] == [False, True, True, False]
    for rank in ("1", "0"):  # every process sees the same, before the first has done anything and after
        assert [each.path for each in checkpoints(tmp_path)] == [whole, older]
        monkeypatch.setenv("RANK", rank)
        unmark_whole(tmp_path / "checkpoints")
        assert [marker.exists() for marker in markers] == [True, True, rank == "1"]
        assert bool(capsys.readouterr().out) is (rank == "0")
    assert [each.path for each in checkpoints(tmp_path)] == [whole, older]
    markers[-1].touch()
    unmark_whole(tmp_path / "checkpoints")
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{bare} is removed: a run was killed while it wrote or removed it",
        f"{whole} is kept: a run was killed just when it had written it to its end",
        f"{torn} is removed: a run was killed while it wrote or removed it",
    ]


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


def test_each_damage_is_told_by_its_file_and_its_kind(tmp_path):
    """With a manifest by size and checksum; without one by what torch's metadata names, to the byte."""
    path = make(tmp_path, 8)
    (path / "context" / "io.json").write_text("{ }")
    assert fault_of(path) == "context/io.json has 3 bytes and had 2 when it was written"
    (path / "context" / "io.json").unlink()
    assert fault_of(path) == "context/io.json is missing"
    (path / "manifest.json").unlink()
    assert fault_of(path) is None
    data = path / "weights" / "__0_1.distcp"
    with data.open("ab") as file:
        file.write(b"more")
    assert fault_of(path) is None
    os.truncate(data, 99_999)
    assert fault_of(path) == "weights/__0_1.distcp has 99,999 bytes of at least 100,000"
    data.unlink()
    assert fault_of(path) == "weights/__0_1.distcp is missing"
    for name, kind in (("common.pt", "is cut short"), (".metadata", "is cut short (UnpicklingError)")):
        file = make(tmp_path, 9, name=f"torn{name}", manifest=False) / "weights" / name
        file.write_bytes(file.read_bytes()[:-1])
        assert fault_of(file.parents[1]) == f"weights/{name} {kind}"
        file.write_bytes(b"")
        assert fault_of(file.parents[1]) == f"weights/{name} is empty"
    shutil.rmtree(path / "context")
    assert fault_of(path) == "it has no context/"
    shutil.rmtree(path / "weights")
    (path / "weights").mkdir()
    assert fault_of(path) == "it has no weights/"


@pytest.mark.parametrize("size", [1, 2**16 - 1, 2**16, 2**16 + 1, 100_000, 2**17, 2**17 + 1, 200_000])
def test_a_checksum_covers_both_ends_of_a_file(tmp_path, size):
    """64 KiB of each: all bytes of a file of twice that, and no more than the ends of a longer one."""
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    noted = checkpoint_files._look(file)
    assert noted[0] == size
    for at in {0, min(2**16 - 1, size - 1), size - 1, max(0, size - 2**16)}:
        content = bytearray(size)
        content[at] = 1
        file.write_bytes(content)
        assert checkpoint_files._look(file)[1] != noted[1], at
    whole = bytes(range(256)) * 800
    file.write_bytes(whole[:size])
    ends = whole[:size] if size <= 2**17 else whole[: 2**16] + whole[:size][-(2**16) :]
    assert checkpoint_files._look(file) == [size, zlib.crc32(ends)]


def test_steps_are_the_manifest_s_or_else_the_name_s(tmp_path):
    named = make(tmp_path, 4, name="model-step=12-last")  # its manifest says 4
    bare = make(tmp_path, 3, name="step=30-val_loss=1.5", manifest=False)
    other = make(tmp_path, 2, name="imported", manifest=False)
    assert [(each.path, each.step) for each in checkpoints(tmp_path)] == [(bare, 30), (named, 4), (other, -1)]
    (named / "manifest.json").write_text('{"step": "4", "files": {}}')
    assert checkpoints(tmp_path)[1].step == 12
    (named / "manifest.json").write_text("[]")
    assert checkpoints(tmp_path)[1].step == 12
    (tmp_path / "checkpoints" / "a file").touch()
    assert len(checkpoints(tmp_path)) == 3


def test_of_one_step_the_one_for_going_on_comes_first_and_then_the_later(tmp_path):
    names = ("step=5-val_loss=1.0", "step=5-val_loss=2.0", "step=5-last")
    for number, name in enumerate(names):
        os.utime(make(tmp_path, 5, name=name), (9 - number, 9 - number))
    assert [each.path.name for each in checkpoints(tmp_path)] == [names[2], names[0], names[1]]


def test_the_best_are_by_the_loss_of_their_names_after_a_step(tmp_path):
    folder = tmp_path / "checkpoints"
    losses = {"a-step=4-val_loss=2.50": 2.5, "b-step=8-val_loss=-0.125.": -0.125, "c-step=0-val_loss=nan": float("inf")}
    for name in (*losses, "d-step=9-val_loss=0.5-last", "e-step=9"):
        make(tmp_path, 0, name=name, manifest=False)
    ranked = sorted(losses, key=losses.get)
    assert best_in(folder) == [(folder / name, losses[name]) for name in ranked]
    assert [path.name[0] for path, _ in best_in(folder, after=0)] == ["b", "a"]
    assert [path.name[0] for path, _ in best_in(folder, after=4)] == ["b"]
    assert best_in(tmp_path / "nowhere") == []


def test_parts_of_a_checkpoint_are_both_of_them(tmp_path):
    path = make(tmp_path, 1)
    assert is_checkpoint(path)
    for part in ("weights", "context"):
        path = make(tmp_path, 2, name=f"without {part}")
        shutil.rmtree(path / part)
        assert not is_checkpoint(path)


def test_what_ranks_say_of_a_failed_checkpoint_is_told_once():
    failing = type("CheckpointException", (BaseException,), {})
    error = failing("write")
    assert failed_checkpoint(error) == "a checkpoint failed (write) on rank : "
    error.failures = {0: (OSError("no\n  space"), None), 3: (OSError("no space"), None), 4: (OSError("x" * 600), None)}
    assert failed_checkpoint(error) == f"a checkpoint failed (write) on rank 0, 3, 4: {('no space; ' + 'x' * 600)[:500]}"
    assert failed_checkpoint(OSError("write")) is None


def test_a_checkpoint_put_aside_takes_the_place_of_an_older_one_there(tmp_path, capsys):
    (tmp_path / "unreadable" / "step=8-last" / "old").mkdir(parents=True)
    path = make(tmp_path, 8)
    set_aside(path, tmp_path, "it is torn")
    assert not path.exists()
    assert sorted(each.name for each in (tmp_path / "unreadable" / path.name).iterdir()) == [
        "context",
        "manifest.json",
        "weights",
    ]
    place = tmp_path / "unreadable"
    assert capsys.readouterr().out == f"the checkpoint {path} cannot be read (it is torn); it was put aside, into {place}\n"
    set_aside(path, tmp_path, "it is gone")
    assert not capsys.readouterr().out


def test_without_fallback_the_one_named_to_go_on_from_is_the_newest_that_is_whole(tmp_path):
    oldest, whole = make(tmp_path, 2), make(tmp_path, 4)
    for step in (8, 12):
        truncate(make(tmp_path, step) / "weights" / ".metadata")
    with pytest.raises(ConfigError, match=f"the one before it, {whole.name}$"):
        checkpoint_to_resume(tmp_path, fallback=False)
    for path in (oldest, whole):
        truncate(path / "weights" / ".metadata")
    with pytest.raises(ConfigError) as error:
        checkpoint_to_resume(tmp_path, fallback=True)
    assert "the newest (" in str(error.value)
    assert "step=12-last) not" in str(error.value)
    assert not (tmp_path / "unreadable").exists()


def test_a_file_that_the_disk_does_not_give_is_told_like_a_torn_one(tmp_path, monkeypatch):
    """It ended a start in the error of the disk, whatever `resume.fallback` said."""
    real = checkpoint_files._look

    def look(path):
        if path.parent.parent.name == "step=8-last" and path.name == "__0_1.distcp":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    make(tmp_path, 4)
    newest = make(tmp_path, 8)
    monkeypatch.setattr(checkpoint_files, "_look", look)
    assert fault_of(newest) == "__0_1.distcp cannot be read (Input/output error)"
    assert checkpoint_to_resume(tmp_path, fallback=True).step == 4


def test_one_that_the_first_process_puts_aside_meanwhile_is_none(tmp_path, monkeypatch):
    """Another process of the run that listed the checkpoints just then ended in a FileNotFoundError."""
    real = checkpoint_files.step_of

    def step_of(path):
        if path.name == "step=8-last":
            path.rename(tmp_path / "aside")
        return real(path)

    make(tmp_path, 4)
    make(tmp_path, 8)
    monkeypatch.setattr(checkpoint_files, "step_of", step_of)
    assert [each.step for each in checkpoints(tmp_path)] == [4]
