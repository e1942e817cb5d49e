"""Files that are there whole or not at all."""

import fcntl
import gc
import os

import pytest

from nemo_longctx import files


def test_a_writer_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "made" / "record.json"
    files.write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"


def test_a_builder_that_fails_leaves_nothing(tmp_path):
    def build():
        with files.written_atomically(tmp_path / "order") as file:
            file.write(b"half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        build()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_builder_left_is_removed_by_the_next(tmp_path):
    """A killed `synth` left hundreds of megabytes under a hidden name that nobody removed."""
    kept = [tmp_path / name for name in (".order.json", ".order.12345678.json", ".other.12345678", "order.12345678")]
    for path in [*kept, tmp_path / ".order.0123cdef"]:
        path.write_bytes(b"half")
    with files.written_atomically(tmp_path / "order") as file:
        file.write(b"whole")
        (mine,) = [path for path in tmp_path.glob(".order.*") if path not in kept]
        with files.written_atomically(tmp_path / "order") as other:  # one that lives still is left in peace
            other.write(b"other")
        assert mine.exists()
    assert (tmp_path / "order").read_bytes() == b"whole"
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "order"])


def test_a_builder_whose_file_another_removed_begins_a_new_one(tmp_path, monkeypatch):
    """Between the making of a file and its lock it looks like one that a dead process left."""
    flock, made = fcntl.flock, []

    def late(descriptor, kind):
        if kind == fcntl.LOCK_EX and not made:
            made.extend(tmp_path.iterdir())
            made[0].unlink()
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with files.written_atomically(tmp_path / "order") as file:
        file.write(b"whole")
    assert made
    assert [path.name for path in tmp_path.iterdir()] == ["order"]


def test_who_may_read_a_file_is_what_the_user_s_mask_says(tmp_path):
    """A text of `synth` was its maker's alone, on a file system that a team shares."""
    before = os.umask(0o027)
    try:
        with files.written_atomically(tmp_path / "text") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o640


def test_one_builder_at_a_time_is_let_in(tmp_path):
    with files.locked(tmp_path / "lock"), open(tmp_path / "lock") as other:
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, kind | fcntl.LOCK_NB)
    with files.locked(tmp_path / "lock"):  # it is free again
        pass


def test_files_that_cycles_hold_open_do_not_add_up(tmp_path):
    """Each validation left four, and hundreds were open before Python's own collector came."""

    class Held:
        def __init__(self):
            self.file, self.me = os.open(tmp_path, os.O_RDONLY), self

        def __del__(self):
            os.close(self.file)

    bounded, most = files.OpenFiles(most=8), 0
    gc.collect()
    gc.disable()
    try:
        bounded.bound()
        start = len(os.listdir("/dev/fd"))
        for _ in range(100):
            Held()
            bounded.bound()
            most = max(most, len(os.listdir("/dev/fd")) - start)
    finally:
        gc.enable()
    assert most <= 8
