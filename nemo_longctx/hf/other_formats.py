"""Directories that are no Hugging Face model, told by their files: caches, trainers' outputs, other tools' formats."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from nemo_longctx.checkpoints import FOLDER, UNFINISHED, checkpoints, finished_in, is_checkpoint
from nemo_longctx.config import ConfigError
from nemo_longctx.hf.files import KEY

_ADAPTER = "a LoRA adapter alone; merge it into its base (peft: merge_and_unload) and save that"
_MISTRAL = "Mistral's own format; take the Hugging Face files of the same model (model*.safetensors and their index)"
_META = "Meta's own format; take the Hugging Face one (transformers has convert_llama_weights_to_hf.py)"
_SHARDED = "a trainer's sharded state; make one model of it ({tool}) and give that directory"
# Files and folders by pattern, the surest first -> what a directory with them holds. {0} is the first name that was met.
_SIGNS = (
    ("adapter_config.json", _ADAPTER),
    ("consolidated.safetensors", _MISTRAL),
    ("consolidated*.pth", _META),
    ("params.json", _META),
    ("*.gguf", "a GGUF file ({0}), whose weights are quantised or another tool's; take the model's safetensors"),
    ("tf_model.h5", "TensorFlow's weights; load them with transformers (from_tf=True) and save again"),
    ("flax_model.msgpack", "Flax's weights; load them with transformers (from_flax=True) and save again"),
    ("zero_to_fp32.py", _SHARDED.format(tool="python zero_to_fp32.py . OUT --safe_serialization")),
    ("pytorch_model_fsdp*", _SHARDED.format(tool="accelerate merge-weights")),
    ("*.incomplete", "a download that did not end ({0}); start it again"),
    ("onnx", "ONNX's weights; take the model's safetensors"),
    ("*.onnx", "ONNX's weights ({0}); take the model's safetensors"),
)
_VARIANT = re.compile(r"(model|pytorch_model)\.(?!safetensors|bin)[\w-]+\.(safetensors|bin)")


def told_apart(directory: Path) -> str | None:
    """What a directory without `config.json` is, with the directory to give where one lies inside; None: nothing shows it."""
    if inside := _of_the_hub(directory):
        return f"is a cache's entry of the hub; give the model in it: {inside}"
    steps = sorted(directory.glob("checkpoint-*/config.json"), key=lambda each: (len(each.parent.name), each.parent.name))
    if steps:
        return f"is a trainer's output; give a checkpoint in it, such as {steps[-1].parent}"
    if held := _held(directory):
        return f"has no config.json and holds {held}"
    below = sorted(each.parent for each in directory.glob("*/config.json"))
    return f"no config.json there, but in {below[0]}; give that directory" if len(below) == 1 else None


def no_config(directory: Path) -> ConfigError:
    """Why a directory without `config.json` is no Hugging Face model's."""
    if is_checkpoint(directory):
        return ConfigError(KEY, str(directory), "is a NeMo checkpoint, which needs no import: restore_from takes it as it is")
    told = told_apart(directory)
    if told is None:
        alone = (directory / "tokenizer_config.json").is_file() and not any(directory.glob("*.safetensors"))
        told = f"no config.json there{', a tokenizer alone' if alone else ''}; give a Hugging Face model directory"
    return ConfigError(KEY, str(directory), told)


def no_weights(directory: Path, wanted: tuple[str, str], pickled: tuple[str, str]) -> ConfigError:
    """Why nothing in a directory with a `config.json` is taken as weights.

    Args:
        directory: the model's.
        wanted: names of the file and the index of safetensors.
        pickled: those of pickled weights.
    """
    names = sorted(each.name for each in directory.iterdir())
    for start, index in (("model-", wanted[1]), ("pytorch_model-", pickled[1])):
        if shard := next((name for name in names if name.startswith(start) and "-of-" in name), None):
            return ConfigError(KEY, str(directory), f"has shards ({shard}) without {index}; copy or download it too")
    if held := _held(directory):
        return ConfigError(KEY, str(directory), f"holds {held}")
    one, index = wanted
    if other := next((name for name in names if _VARIANT.fullmatch(name)), None):
        mend = f"its weights are named {other}, a variant that transformers takes only when it is told; rename it to {one}"
        return ConfigError(KEY, str(directory), mend)
    if other := next((name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))), None):
        mend = f"has no weights by a name that transformers takes ({one} or {index}); there is {other}"
        return ConfigError(KEY, str(directory), mend)
    return ConfigError(KEY, str(directory), f"has no weights: neither {one} nor {index}")


def no_directory(path: str | Path) -> ConfigError:
    """Where a path leads to no directory; a name of the hub is told how to be one."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not Path(path).parent.exists():
        mend = f"no such directory; if it is a model of the hub: hf download {path} --local-dir DIR, and give DIR"
        return ConfigError(KEY, str(path), mend)
    if Path(path).is_file():
        return ConfigError(KEY, str(path), "is a file; give the Hugging Face model directory that it lies in")
    return ConfigError(KEY, str(path), "no such directory; give a Hugging Face model directory")


NO_NEMO = "no finished NeMo checkpoint is there; make one with `nemo-longctx import HF_DIR CKPT`, or name another"


def no_nemo_checkpoint(path: str | Path, mend: str = NO_NEMO) -> str:
    """Why no NeMo checkpoint is at `path`, and what to do: import the Hugging Face model that is there, or name another.

    Args:
        path: a file, a directory, or nothing.
        mend: what is said where nothing shows what it is.
    """
    path = Path(path)
    if not path.is_dir():
        if path.suffix == ".nemo":
            return "is an archive of NeMo 1; give a checkpoint of NeMo 2 (a directory with weights/ and context/)"
        if path.exists():
            return "is a file; give the directory of a NeMo checkpoint (with weights/ and context/), or a run's"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists() and path.parent.name != FOLDER:
            mend += f"; if it is a model of the hub: hf download {path} --local-dir HF_DIR"
        return mend
    if (path / "config.json").is_file():
        return f"is a Hugging Face directory; make a NeMo checkpoint of it: {_imported(path)}"
    if inside := _of_the_hub(path):
        return f"is a cache's entry of the hub; make a NeMo checkpoint of the model in it: {_imported(inside)}"
    if is_checkpoint(path.parent):
        return f"is a part of a checkpoint; give {path.parent}"
    if Path(f"{path}{UNFINISHED}").exists():
        return "this checkpoint was not written to its end; give another one"
    for run in (path.parent if path.name == FOLDER else path, *sorted(each.parent for each in path.glob(f"*/{FOLDER}"))):
        found = [each.path for each in checkpoints(run) if is_checkpoint(each.path)]
        if last := [each for each in found if each.name.endswith("-last")]:
            return f"holds {'its checkpoints' if path.name == FOLDER else 'runs'}; give the run, {run}, or {last[0]}"
        if found:
            return f"holds checkpoints, none of them a run's last; give one, such as {found[0]}"
    if below := [each.path for each in finished_in(path) if is_checkpoint(each.path)]:
        return f"holds checkpoints; give one, such as {below[0]}"
    if (path / FOLDER).is_dir():
        return f"is a run without a finished checkpoint; {mend}"
    told = told_apart(path)
    return mend if told is None else f"{told}; a NeMo checkpoint is made of one by `nemo-longctx import HF_DIR CKPT`"


def _imported(directory: Path) -> str:
    return f"nemo-longctx import {shlex.quote(str(directory))} CKPT"


def _of_the_hub(directory: Path) -> Path | None:
    """The newest whole model in a cache's entry of the hub, or in its snapshots/."""
    inside = [*directory.glob("snapshots/*/config.json")]
    inside += directory.glob("*/config.json") if directory.name == "snapshots" else ()
    return max(inside, key=lambda each: each.stat().st_mtime).parent if inside else None


def _held(directory: Path) -> str | None:
    for pattern, told in _SIGNS:
        found = sorted(each.name for each in directory.glob(pattern))
        if found:
            return told.format(found[0])
    return None
