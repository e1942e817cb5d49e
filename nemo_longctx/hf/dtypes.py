"""The data type of a model in transformers' words, which changed within the range that hosts are built with."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any


def in_dtype(dtype: Any) -> dict[str, Any]:
    """Keyword of `from_pretrained` and `from_config` for a torch dtype, or "auto": `dtype`, before 4.56 `torch_dtype`."""
    from transformers import PretrainedConfig

    word = "dtype" if "dtype" in inspect.signature(PretrainedConfig.__init__).parameters else "torch_dtype"
    return {word: dtype}


def by_both_names(config: Path) -> None:
    """Say the weights' type in a written `config.json` by its older name too, `torch_dtype`: servers on transformers before
    4.56 read that alone, take a model without it for fp32, and some then serve bf16 weights in fp16."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if "dtype" in values:
        config.write_text(json.dumps({**values, "torch_dtype": values["dtype"]}, indent=2) + "\n", encoding="utf-8")
