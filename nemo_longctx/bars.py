"""Progress on stderr: a bar on a terminal; in a log, which keeps every stroke of one, a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines, and before the first
_LINE = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """What is used of a tqdm bar, printed as lines. Work that ends before the first was due prints none."""

    def __init__(self, **options: Any) -> None:
        self._options, self._postfix = options, ""
        self._n, self._told = 0, -1
        self._began = self._last = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def set_postfix_str(self, text: str) -> None:
        self._postfix = text

    def update(self, n: int = 1) -> None:
        self._n += n
        if time.monotonic() - self._last >= EVERY:
            self._tell()

    def _tell(self) -> None:
        self._last, self._told = time.monotonic(), self._n
        line = tqdm.format_meter(self._n, elapsed=self.elapsed, postfix=self._postfix, bar_format=_LINE, **self._options)
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._told not in (-1, self._n):
            self._tell()


class ProgressBar:
    """Progress of work of a known size.

    Args:
        total: its size in `unit`.
        desc: what it is.
        unit: of `total`; `unit_scale`: written as k, M, G.
        show: False prints nothing.
    """

    def __init__(self, *, total: int, desc: str, unit: str, unit_scale: bool = False, show: bool = True) -> None:
        options: dict[str, Any] = {"total": total, "unit": unit, "unit_scale": unit_scale}
        self._bar: Any = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(desc=desc, dynamic_ncols=True, mininterval=0.5, file=sys.stderr, **options)
        elif show:
            self._bar = _Lines(prefix=desc, ncols=None, **options)

    @property
    def elapsed(self) -> float:
        """Seconds since it was made; 0 where nothing is shown."""
        if self._bar is None:
            return 0.0
        return self._bar.elapsed if isinstance(self._bar, _Lines) else self._bar.format_dict["elapsed"]

    def note(self, text: str) -> None:
        """What stands behind the numbers from the next step on."""
        if isinstance(self._bar, _Lines):
            self._bar.set_postfix_str(text)
        elif self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        if self._bar is not None:
            self._bar.update(n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def say(line: str) -> None:
    """A line on stderr, above any bar."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
