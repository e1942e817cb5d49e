"""The data type of a model in transformers' words, which changed within the range that hosts are built with."""

from __future__ import annotations

import inspect
from typing import Any


def in_dtype(dtype: Any) -> dict[str, Any]:
    """Keyword of `from_pretrained` and `from_config` for a torch dtype, or "auto": `dtype`, before 4.56 `torch_dtype`."""
    from transformers import PretrainedConfig

    word = "dtype" if "dtype" in inspect.signature(PretrainedConfig.__init__).parameters else "torch_dtype"
    return {word: dtype}
