"""Small directories as transformers' users have them: files alone, no model is built."""

import json

import numpy as np
import pytest
from hf_files import config_of, write_safetensors


@pytest.fixture
def directory(tmp_path):
    """Write a directory: config.json, weights of an embedding and a head, and what else is given by name."""

    def write(model_type="llama", *, files=None, tensors=None, dtypes=None, **changes):
        folder = tmp_path / "hf"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config_of(model_type, **changes)))
        table = np.arange(6400, dtype=np.float32).reshape(100, 64)
        weights = {"model.embed_tokens.weight": table, "lm_head.weight": table} | (tensors or {})
        write_safetensors(folder / "model.safetensors", weights, dtypes)
        for name, content in (files or {}).items():
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return write
