"""What another run read, from its checkpoint: for a run that begins behind it (`data.after`)."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.data.history import Segment

STATE = "LongContextDataModule"  # the name under which a checkpoint keeps its data's state


class _Nothing:
    """Stands in for every object of a checkpoint that is no plain value: nothing of it is imported, nothing is run."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Take whatever it was made of."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self

    def __setstate__(self, state: Any) -> None:
        """Forget it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget it."""

    def append(self, value: Any) -> None:
        """Forget it."""

    def extend(self, values: Any) -> None:
        """Forget it."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers and text; all else becomes nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return _Nothing

    def persistent_load(self, key: Any) -> Any:  # tensors
        return None


def data_state(checkpoint: Path) -> Mapping[str, Any] | None:
    """What the data module wrote into a distributed checkpoint; None where it is another data module's.

    Args:
        checkpoint: a NeMo checkpoint, with `weights/common.pt`.
    """
    with zipfile.ZipFile(checkpoint / "weights" / "common.pt") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        with archive.open(name) as file:
            state = _PlainUnpickler(file).load()
    found = state.get(STATE) if isinstance(state, dict) else None
    return found if isinstance(found, dict) else None


def consumed(run: str, checkpoint: Path) -> list[Segment]:
    """The segments of a base run, the last one as far as its checkpoint is.

    Args:
        run: as the user named it.
        checkpoint: its newest.

    Raises:
        ConfigError: the checkpoint does not say what it read.
    """
    try:
        state = data_state(checkpoint)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        mend = f"its checkpoint {checkpoint.name} cannot be read ({type(error).__name__}: {error}); name another one"
        raise ConfigError("data.after", run, mend) from error
    if not state or not state.get("segments"):
        mend = f"its checkpoint {checkpoint.name} does not say which documents it read (an earlier version, or other data)"
        raise ConfigError("data.after", run, f"{mend}; leave it out, and what it read may come again")
    segments = [Segment(**values) for values in state["segments"]]
    return left_at(segments, state["token_address"])


def left_at(segments: list[Segment], token: int) -> list[Segment]:
    """The same, the last one left at `token`; where it began there, nothing was read in it."""
    *before, last = segments
    return before if token == last.first_token else [*before, dataclasses.replace(last, until=token)]
