"""Checkpoints in the layout of NeMo's, without NeMo: what tests of a run's directory share."""

import os
import pickle
import zipfile

from nemo_longctx.checkpoints import write_manifest


class _StorageInfo:
    """Has the fields of torch's class of this name."""

    def __init__(self, relative_path, offset, length):
        self.relative_path, self.offset, self.length = relative_path, offset, length


def make(directory, step, *, name=None, manifest=True):
    """A checkpoint in the layout of NeMo's, with two data files of 100,000 bytes."""
    path = directory / "checkpoints" / (name or f"step={step}-last")
    (path / "weights").mkdir(parents=True)
    (path / "context").mkdir()
    (path / "context" / "io.json").write_text("{}")
    for number in range(2):
        (path / "weights" / f"__0_{number}.distcp").write_bytes(bytes([number + step]) * 100_000)
    with zipfile.ZipFile(path / "weights" / "common.pt", "w") as archive:
        archive.writestr("data.pkl", b"some state")
    (path / "weights" / "metadata.json").write_text("{}")
    infos = [_StorageInfo(f"__0_{number}.distcp", offset, 50_000) for number in range(2) for offset in (0, 50_000)]
    (path / "weights" / ".metadata").write_bytes(pickle.dumps({"storage_data": infos}))
    if manifest:
        write_manifest(path, step=step, tokens=step * 1000)
    return path


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)
