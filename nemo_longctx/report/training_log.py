"""`training.csv`, the curve of a run that survives a kill, and JSON that is whole or not there."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_longctx.files import write_text

TRAINING_COLUMNS = (
    "step", "tokens", "seq_length", "loss", "lr", "grad_norm", "validation_loss", "tokens_per_second", "processor_seconds",
)  # fmt: skip

WHOLE_COLUMNS = frozenset(TRAINING_COLUMNS[:3])
SET_LOSS = "validation_loss_"  # and the name of a validation set: columns after the others


def training_columns(rows: Iterable[Mapping[str, Any]], sets: Iterable[str] = ()) -> list[str]:
    """The columns of a `training.csv` that holds `rows` and the losses of these validation sets."""
    more = [*(key for row in rows for key in row), *(SET_LOSS + name for name in sets)]
    return list(dict.fromkeys([*TRAINING_COLUMNS, *more]))


def read_training_log(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a `training.csv`, numbers as numbers, empty fields left out; [] where there is no file.

    A row cut by a kill in the middle of a write is left out: its step is trained and written again.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        if row.get("step"):
            rows.append({key: _number(key, value) for key, value in row.items() if key and value})
    return rows


def _number(column: str, text: str) -> int | float:
    """What counts stays a whole number, so that a resumed run writes `4096` again and not `4096.0`."""
    return int(float(text)) if column in WHOLE_COLUMNS else float(text)


def points_of(rows: Sequence[Mapping[str, Any]], clock: str, name: str) -> list[tuple[float, float]]:
    """Points of a line; a number that is not finite is a gap in it."""
    kept = [(row.get(clock), row.get(name)) for row in rows]
    found = [(float(x), float(y)) for x, y in kept if x not in (None, "") and y not in (None, "")]
    return [(x, y if math.isfinite(y) else math.nan) for x, y in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean of about 1/20 of the curve around each point, so that it lies among its points and not behind them. At the start,
    where a curve is steep, of fewer on both sides; at the end of fewer ahead alone, or the last step would stand there as it
    is, like a jump. NaN stays NaN, and is in no other's mean."""
    half = max(1, len(values) // 40)
    there = [not math.isnan(value) for value in values]
    total = [0.0, *itertools.accumulate(value if ok else 0.0 for value, ok in zip(values, there, strict=True))]
    count = [0, *itertools.accumulate(there)]
    reach = [(n - min(half, n), n + min(half, n, len(values) - 1 - n) + 1) for n in range(len(values))]
    return [
        (total[last] - total[first]) / (count[last] - count[first]) if there[n] else math.nan
        for n, (first, last) in enumerate(reach)
    ]


def write_json(path: Path, record: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")
