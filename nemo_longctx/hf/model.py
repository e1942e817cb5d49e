"""Models of Hugging Face directories as transformers 4 opens them, whichever of 4 and 5 wrote them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import read_json
from nemo_longctx.hf.directory import check_directory, write_copy
from nemo_longctx.hf.dtypes import in_dtype


def load_hf_model(path: str | Path, dtype: Any = "auto") -> Any:
    """transformers' causal language model of a folder, or of a name on the hub. A folder of transformers 5 is read through a
    copy in the words of 4, which would pass over its RoPE without a word.

    Raises:
        ConfigError: it cannot be loaded, with what is wrong in its files where that can be told.
    """
    from transformers import AutoModelForCausalLM

    config = Path(path) / "config.json"
    with tempfile.TemporaryDirectory(prefix="nemo_longctx_hf_") as folder:
        source = str(path)
        if config.is_file() and read_json(config).get("rope_parameters"):
            source = str(write_copy(check_directory(path), Path(folder) / "model"))
        try:
            return AutoModelForCausalLM.from_pretrained(source, **in_dtype(dtype))
        except Exception as error:  # whatever a class trips over, it is what these files hold
            if config.is_file():
                check_directory(path)  # says it better, for the families that it knows
            line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ConfigError(
                "checkpoint", str(path), f"transformers cannot load it ({type(error).__name__}: {line})"
            ) from error
