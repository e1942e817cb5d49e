"""`training.csv`, the curve of a run that survives a kill, and JSON that is whole or not there."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
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


def write_json(path: Path, record: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")
