"""A stock NeMo GPT model with long-context settings: its config and checkpoint, its RoPE, its adapters."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """What 0.1 had in a module of this folder's name, for the imports of that time."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("nemo_longctx.adapters.nemo.model.config"), name)
