"""What the files of a NeMo 2 checkpoint say, read without NeMo: `context/io.json`, `context/model.yaml`, the weights' metadata.

NeMo loads a checkpoint from io.json, and people (and `nemo-longctx plan`) read model.yaml: the two must agree.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from nemo_longctx.checkpoints import step_of
from nemo_longctx.config import ConfigError

_PREFIX = "<root>.model.config."
# What a model is and how it sees; machine and run settings may differ.
COMPARED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size",
    "share_embeddings_and_output_weights", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "layernorm_epsilon",
    "normalization", "gated_linear_unit", "seq_length", "position_embedding_type", "rotary_base", "rotary_percent",
    "rotary_interleaved", "seq_len_interpolation_factor", "scale_factor", "low_freq_factor", "high_freq_factor",
    "old_context_len", "yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast",
    "yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim",
)  # fmt: skip


def io_config(checkpoint: Path) -> dict[str, Any]:
    """The plain values of the model's config in `context/io.json`, by field; empty where there is no such file.

    Raises:
        ConfigError: a file that is not JSON or not NeMo's.
    """
    path = checkpoint / "context" / "io.json"
    if not path.is_file():
        return {}
    try:
        objects = json.loads(path.read_text(encoding="utf-8"))["objects"]
        entries = [item[-1] for each in objects.values() for item in each.get("items") or ()]
        found = {}
        for leaf in entries:  # an item of fiddle's metadata may be plain text
            if not isinstance(leaf, dict) or leaf.get("type") != "leaf":
                continue
            for place in leaf.get("paths") or ():
                if place.startswith(_PREFIX) and "." not in place.removeprefix(_PREFIX):
                    found[place.removeprefix(_PREFIX)] = leaf.get("value")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("context/io.json", str(path), f"is not what NeMo writes ({error!r}); copy it again") from error
    return found


def check_context(checkpoint: Path) -> None:
    """Refuse a checkpoint whose two descriptions disagree: it would train by one and be read by the other.

    Raises:
        ConfigError: naming the field and both values.
    """
    import yaml

    path = checkpoint / "context" / "model.yaml"
    loaded = io_config(checkpoint)
    if not loaded or not path.is_file():
        return
    try:
        context = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("context/model.yaml", str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    shown = context.get("config") if isinstance(context, dict) else None
    if not isinstance(shown, dict):
        return
    for key in COMPARED:
        if key in loaded and key in shown and loaded[key] != shown[key]:
            mend = (
                f"in context/io.json, by which NeMo loads, but {shown[key]!r} in context/model.yaml of {checkpoint}; "
                "write the one that it was trained with in both"
            )
            raise ConfigError(key, loaded[key], mend)


ADAPTERS = "weights/adapter_metadata.json"  # NeMo's, beside LoRA adapters alone: where their base is


def check_whole(checkpoint: Path) -> None:
    """Refuse to begin a run from a checkpoint of LoRA adapters: no weights of the model are in it.

    Raises:
        ConfigError: how they are merged; where no export can say their RoPE, which does that, the base to begin from.
    """
    if not (checkpoint / ADAPTERS).is_file():
        return
    import yaml

    from nemo_longctx.rope.nemo import variant_of_context

    told = "holds LoRA adapters alone, and a run begins from whole weights"
    mend = f"merge them: nemo-longctx export {checkpoint} HF_DIR, then nemo-longctx import HF_DIR CKPT, and begin from CKPT"
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        rope = variant_of_context(yaml.safe_load((checkpoint / "context" / "model.yaml").read_text(encoding="utf-8")))
        if rope.variant == "xpos" or rope.local_base is not None:
            base = Path(json.loads((checkpoint / ADAPTERS).read_text(encoding="utf-8"))["model_ckpt_path"])
            what = "xPos" if rope.variant == "xpos" else "a RoPE by layer type"
            mend = f"an export merges them, and of {what} there is none; begin from their base: {base}"
    raise ConfigError("restore_from", str(checkpoint), f"{told}; {mend}")


def base_of_adapters(checkpoint: Path, named: Path | None) -> Path | None:
    """The weights that a checkpoint's LoRA adapters were trained on; None for a checkpoint that holds all weights itself.

    Args:
        checkpoint: a NeMo checkpoint.
        named: where they are now by `restore_from`: believed where they are not where they were, and their name or step is the
            same. A run's directory may have trained on since, and its newest checkpoint is then none that adapters belong to.

    Raises:
        ConfigError: they are not there, or what is named are others.
    """
    note = checkpoint / ADAPTERS
    if not note.is_file():
        return None
    noted = Path(json.loads(note.read_text(encoding="utf-8"))["model_ckpt_path"])
    if noted.exists():
        return noted
    was = noted.parent if noted.name == "weights" else noted
    if named is not None and named.is_dir() and (named.name == was.name or -1 < step_of(was) == step_of(named)):
        return named
    mend = f"the adapters in {checkpoint} were trained on {was}, which is not there; put it back"
    if named is not None:
        mend += f", or, where these are its weights under another name, write this path into {note}"
    raise ConfigError("restore_from", None if named is None else str(named), mend)


def padded_by_host(checkpoint: Path) -> bool:
    """Whether the vocabulary's size was left to the tokenizer (NeMo's default), so that the host padded the embedding."""
    found = io_config(checkpoint)
    return "vocab_size" in found and found["vocab_size"] is None


def embedding_rows(checkpoint: Path) -> int | None:
    """Rows of the embedding in `weights/`, the host's padding included; None where they cannot be told."""
    for name, entry in saved_in(checkpoint / "weights").items():
        if name.endswith("embedding.word_embeddings.weight") and hasattr(entry, "size"):
            return int(entry.size[0])
    return None


def stored_dtype(weights: Path) -> Any:
    """torch's dtype of the embedding in a folder of weights; None where that cannot be told."""
    for name, entry in saved_in(weights).items():
        own = name.endswith("embedding.word_embeddings.weight") and not name.startswith("optimizer")
        if own and hasattr(entry, "properties"):
            return entry.properties.dtype
    return None


def saved_in(weights: Path) -> dict[str, Any]:
    """What a folder of weights holds: its name -> torch's description; {} where that cannot be told."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (weights / ".metadata").is_file():
        return {}
    return FileSystemReader(weights).read_metadata().state_dict_metadata


def knows_no_engine_norms(checkpoint: Path) -> bool:
    """Whether the weights come from norms that are not Transformer Engine 2's, which save a state of their own beside them."""
    names = saved_in(checkpoint / "weights")
    return bool(names) and not any("layernorm._extra_state" in name for name in names)
