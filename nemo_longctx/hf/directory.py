"""A whole Hugging Face directory, looked at before anything is converted, and the copy of it that transformers 4 loads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_longctx.hf.config import HFConfig, read_config, read_json
from nemo_longctx.hf.files import check_files
from nemo_longctx.hf.generation import FILE as GENERATION
from nemo_longctx.hf.generation import read_generation_config
from nemo_longctx.hf.other_formats import no_config, no_directory
from nemo_longctx.hf.tokenizer import FILES, check_tokenizer, copy_tokenizer, has_tokenizer, other_tokenizer
from nemo_longctx.hf.weights import check_weights

_WEIGHTS, _INDEX = (".safetensors", ".bin"), (".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True, kw_only=True)
class HFDirectory:
    """A directory that converts.

    Attributes:
        path: where it is.
        config: what its `config.json` says.
        generation: the fields of its `generation_config.json`, or of the model's config where there is none.
        has_tokenizer: whether it holds one.
        notes: what is left out or read otherwise than it stands there, a sentence each.
    """

    path: Path
    config: HFConfig
    generation: dict[str, Any]
    has_tokenizer: bool
    notes: tuple[str, ...]


def check_directory(path: str | Path) -> HFDirectory:
    """Look at every file of a Hugging Face model directory.

    Raises:
        ConfigError: what it holds cannot be converted without loss; nothing is loaded or written.
    """
    path = Path(path)
    if not path.is_dir():
        raise no_directory(path)
    check_files(path, ("config.json", GENERATION, *FILES))
    if not (path / "config.json").is_file():
        raise no_config(path)
    config = read_config(read_json(path / "config.json"))
    vocab_size = config.values["vocab_size"]
    generation: dict[str, Any] = {}
    notes = list(config.notes)
    if (path / GENERATION).is_file():
        generation, more = read_generation_config(read_json(path / GENERATION), vocab_size)
        notes += more
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.values.get(key) is not None:
            generation.setdefault(key, config.values[key])
    tokenizer = has_tokenizer(path)
    if tokenizer:
        check_tokenizer(path, vocab_size)
    elif other := other_tokenizer(path):
        notes.append(
            f"{other} is a tokenizer that transformers does not load; the checkpoint carries none (export --tokenizer)"
        )
    if (path / "adapter_config.json").is_file():
        notes.append(
            "the adapter beside the weights (adapter_config.json) is left out; to have it, merge it in (peft: merge_and_unload)"
        )
    weights = check_weights(path, config)
    notes += weights.notes
    config = replace(config, values={**config.values, "dtype": weights.dtype})
    return HFDirectory(path=path, config=config, generation=generation, has_tokenizer=tokenizer, notes=tuple(notes))


def write_copy(directory: HFDirectory, target: Path) -> Path:
    """The directory as transformers 4 loads it: checked config, generation config, index; tokenizer, links to weights."""
    target.mkdir(parents=True, exist_ok=True)
    for name in sorted(os.listdir(directory.path)):
        if name.endswith(_WEIGHTS):
            (target / name).symlink_to((directory.path / name).resolve())
        elif name.endswith(_INDEX):  # transformers ends in a KeyError where it has no metadata
            index = read_json(directory.path / name)
            said = index.get("metadata")
            index["metadata"] = said if isinstance(said, dict) else {}
            (target / name).write_text(json.dumps(index), encoding="utf-8")
    if directory.has_tokenizer:
        copy_tokenizer(directory.path, target)
    (target / "config.json").write_text(json.dumps(dict(directory.config.values)), encoding="utf-8")
    if directory.generation:
        (target / GENERATION).write_text(json.dumps(directory.generation), encoding="utf-8")
    return target
