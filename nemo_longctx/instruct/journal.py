"""The durable record of every reply that was paid for.

One JSON object a line, appended by a single write and forced to disk before anything is done with the reply. Keys are hashes of
all that shapes a reply (model, messages, sampling, attempt), so a journal can only answer the very call that filled it.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_longctx.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model answered. Tokens are as the server counted them (0 where it did not say)."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    def __post_init__(self) -> None:
        for name, kind in (("text", str), ("finish_reason", str), ("prompt_tokens", int), ("completion_tokens", int)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} of a reply is {type(getattr(self, name)).__name__}, not {kind.__name__}")


class Journal:
    """Append-only file of replies by call key, held by one process at a time. Use as a context manager.

    A last line without its line end was cut off by a crash and is removed: its call counts as never answered.

    Raises:
        ConfigError: another process holds the journal, or a line in its middle is damaged.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (held until __exit__, with its lock)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError("output", str(self.path.parent), "another run is writing there; wait for it or stop it") from None
        self._replies: dict[str, Reply] = {}
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                key = row.pop("key")
                # Version 0.1 kept a server's null counts as they came; the reply is paid for all the same.
                row |= {name: 0 for name in ("prompt_tokens", "completion_tokens") if name in row and row[name] is None}
                self._replies[key] = Reply(**row)
            except (ValueError, KeyError, TypeError, AttributeError):
                mend = "damaged line; remove that line (its call will be made again)"
                raise ConfigError("journal", f"{self.path}:{number}", mend) from None
            whole += len(line)
        self._file.truncate(whole)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        """The reply to call `key`, if it was ever journaled."""
        return self._replies.get(key)

    def append(self, key: str, reply: Reply) -> None:
        """Write the reply; returns once it is on disk."""
        line = json.dumps({"key": key} | asdict(reply), ensure_ascii=True) + "\n"
        self._file.write(line.encode("ascii"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._replies[key] = reply
