"""Weight files without a model: names, types and shapes, and the tensors that a model of transformers would drop.

safetensors' header is read here: 8 bytes of length, then JSON (its format's specification), so that no tensor is loaded
before it is known that all are there. Pickled weights (`pytorch_model.bin`) are mapped by torch, which runs no code of theirs.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import HFConfig, read_json
from nemo_longctx.hf.files import KEY, check_files
from nemo_longctx.hf.other_formats import no_weights
from nemo_longctx.rope.variants import Rope

INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
PICKLED_INDEX, PICKLED = "pytorch_model.bin.index.json", "pytorch_model.bin"
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_KEPT = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # what holds its numbers in training
_TORCH = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "I64"}
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|input_scale"
    r"|absmax|quant_map|SCB|weight_format)$|\.weight\.(absmax|quant_map|nested_absmax|quant_state)"
)
_QUANTISED_FILES = ("quant_config.json", "quantize_config.json", "hf_quant_config.json")
ROUNDING = {"F64": 4e-6, "F32": 4e-6, "F16": 2e-3, "BF16": 1.6e-2}  # of stored frequencies, as a share of the unscaled ones
_CHUNK = 1 << 24  # bytes compared at once


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: where its bytes are, or torch's tensor over them."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0
    tensor: Any = None

    def raw(self) -> np.ndarray:
        """Its bytes, mapped."""
        if self.tensor is not None:
            import torch

            return self.tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.start, shape=(self.end - self.start,))

    def numbers(self) -> np.ndarray:
        """Its numbers, float32."""
        raw = np.asarray(self.raw())
        if self.dtype == "BF16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return raw.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[self.dtype]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the headers of a directory's weights say.

    Attributes:
        dtype: the type that holds all of their numbers, as transformers names it.
        notes: a sentence for each thing that is left out or read otherwise than it stands there.
    """

    dtype: str
    notes: tuple[str, ...]


def check_weights(directory: Path, config: HFConfig) -> Weights:
    """What can be said of a directory's weights from their headers: all there, trainable, and nothing dropped that says more.

    Raises:
        ConfigError: files missing, cut short or quantised; tied heads that differ; stored frequencies unlike the config's.
    """
    for name in _QUANTISED_FILES:
        if (directory / name).is_file():
            mend = f"its weights are quantised ({name}); import the original in bf16 or fp32, or dequantise it first"
            raise ConfigError(KEY, str(directory), mend)
    check_files(directory, (INDEX, ONE_FILE, PICKLED_INDEX, PICKLED))
    stored, notes = stored_tensors(directory)
    quantised = sorted(name for name, each in stored.items() if _QUANTISED.search(name) or each.dtype not in (*_DTYPES, "I64"))
    if quantised:
        mend = (
            f"{len(quantised)} weights are quantised ({quantised[0]}, {stored[quantised[0]].dtype}); import the original in "
            "bf16 or fp32, or dequantise it first (transformers: model.dequantize(), then save_pretrained)"
        )
        raise ConfigError(KEY, str(directory), mend)
    _check_tables(stored, config)
    _check_tied_head(stored, config)
    _check_frequencies(stored, config)
    dtype, more = _kept_dtype(stored, config)
    return Weights(dtype=dtype, notes=(*notes, *more))


def _kept_dtype(stored: dict[str, Stored], config: HFConfig) -> tuple[str, tuple[str, ...]]:
    """The type that the model is trained in: config.json's, unless that would round what the files hold."""
    kinds = {each.dtype for name, each in stored.items() if each.dtype in _DTYPES and not name.endswith("rotary_emb.inv_freq")}
    types = {_KEPT[kind] for kind in kinds}
    widest = types.pop() if len(types) == 1 else "float32"
    said = config.values.get("dtype")
    if said in (None, widest) or not kinds or said == "float32":
        return said or widest, ()
    found = ", ".join(sorted(kinds))
    return widest, (f"the weights are stored as {found} where config.json says {said}: kept as {widest}, which rounds none",)


def stored_tensors(directory: Path) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Every tensor that transformers takes of a directory's weight files, by name, and a sentence for each that it does not.

    Raises:
        ConfigError: no weights, a file of the index that is missing or cut short, a tensor that its file does not hold, or
            several files that say different things.
    """
    one, index = directory / ONE_FILE, directory / INDEX
    if one.is_file() and index.is_file() and set(_weight_map(index).values()) - {ONE_FILE}:
        mend = f"holds both {ONE_FILE}, which transformers takes, and {INDEX} of other files; take one of the two out"
        raise ConfigError(KEY, str(directory), mend)
    if one.is_file():
        return _header(one), ()
    if index.is_file():
        return _sharded(directory, index, _header)
    if (directory / PICKLED).is_file():
        return _unpickled(directory / PICKLED), ()
    if (directory / PICKLED_INDEX).is_file():
        return _sharded(directory, directory / PICKLED_INDEX, _unpickled)
    raise no_weights(directory, (ONE_FILE, INDEX), (PICKLED, PICKLED_INDEX))


def _weight_map(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or any(not isinstance(name, str) for name in index.values()):
        raise ConfigError(KEY, str(path), "has no weight_map of tensors to files; copy or download it again")
    return index


def _sharded(directory: Path, path: Path, read: Any) -> tuple[dict[str, Stored], tuple[str, ...]]:
    index = _weight_map(path)
    check_files(directory, sorted({name for name in index.values() if Path(name).name == name}))
    found: dict[str, Stored] = {}
    headers: dict[str, dict[str, Stored]] = {}
    for tensor, name in index.items():
        if Path(name).name != name or not (directory / name).is_file():
            raise ConfigError(KEY, str(path), f"names {name} for {tensor}, which is not there; copy or download it again")
        if name not in headers:
            headers[name] = read(directory / name)
        if tensor not in headers[name]:
            mend = f"says that {name} holds {tensor}, which it does not; copy or download both again"
            raise ConfigError(KEY, str(path), mend)
        found[tensor] = headers[name][tensor]
    notes = []
    for name, header in headers.items():
        for tensor, entry in header.items():
            if tensor in found and found[tensor].file != entry.file and not _same_bytes(found[tensor], entry):
                mend = f"says that {index[tensor]} holds {tensor}, and {name} holds another; copy or download both again"
                raise ConfigError(KEY, str(path), mend)
        unnamed = sorted(set(header) - set(found))
        if unnamed:
            notes.append(f"{name} holds {len(unnamed)} tensors that {path.name} does not name ({unnamed[0]}); left out")
    return found, tuple(notes)


def _unpickled(path: Path) -> dict[str, Stored]:
    """The tensors of a pickled file, mapped where its format allows it."""
    import torch

    damaged = "transformers cannot load its weights; if they are damaged, copy or download them again"
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        mend = "holds other things than tensors, which only running its code would load; save its state_dict (safetensors)"
        raise ConfigError(KEY, str(path), mend) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(KEY, str(path), f"{damaged} ({line})") from error
    if not isinstance(state, dict) or not all(isinstance(each, torch.Tensor) for each in state.values()):
        mend = "is no state_dict, a mapping of names to tensors; save the model again with transformers (save_pretrained)"
        raise ConfigError(KEY, str(path), mend)
    kinds = {name: str(each.dtype).removeprefix("torch.") for name, each in state.items()}
    return {
        str(name): Stored(path, _TORCH.get(kinds[name], kinds[name]), tuple(each.shape), tensor=each)
        for name, each in state.items()
    }


def _header(path: Path) -> dict[str, Stored]:
    damaged = "transformers cannot load its weights; if they are damaged, copy or download them again"
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, 10**8):
                raise ValueError("the header is longer than the file")
            entries = json.loads(file.read(length))
        start = 8 + length
        found = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), start + begin, start + end)
                if start + end > size or begin > end:
                    raise ValueError(f"{name} ends at byte {start + end} of {size}")
                wide = _DTYPES.get(entry["dtype"])
                if wide and math.prod(entry["shape"]) * wide != end - begin:
                    raise ValueError(f"{name} of shape {entry['shape']} does not fill its {end - begin} bytes")
        held = sum(each.end - each.start for each in found.values())
        if held != size - start:
            raise ValueError(f"its tensors have {held} bytes of the {size - start} behind the header")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(KEY, str(path), f"{damaged} ({error})") from error
    if "__metadata__" in entries:
        _check_metadata(path, entries["__metadata__"])
    return found


def _check_metadata(path: Path, metadata: object) -> None:
    """A header that has metadata must say there that its tensors are laid out as torch's; one without is taken as such."""
    if metadata is None:
        return
    said = metadata.get("format") if isinstance(metadata, dict) else metadata
    if said not in ("pt", "mlx") or not all(isinstance(each, str) for each in metadata.values()):  # type: ignore[attr-defined]
        mend = (
            f"its metadata says format {said!r}, and transformers takes 'pt' alone; load it with safetensors and save it with "
            "metadata={'format': 'pt'}"
        )
        raise ConfigError(KEY, str(path), mend)


def _check_tables(stored: dict[str, Stored], config: HFConfig) -> None:
    """The embedding has the vocabulary's rows, and a head of its own is there where config.json says so."""
    table = stored.get("model.embed_tokens.weight")
    if table is None:
        return
    if len(table.shape) == 2 and table.shape[0] != config.values["vocab_size"]:
        mend = f"the embedding in the files has {table.shape[0]} rows; take config.json and weights from the same model"
        raise ConfigError("vocab_size", config.values["vocab_size"], mend)
    if not config.values["tie_word_embeddings"] and "lm_head.weight" not in stored:
        mend = "the files have no lm_head.weight; write true where the head is the embedding, or copy the file that holds it"
        raise ConfigError("tie_word_embeddings", False, mend)


def _check_tied_head(stored: dict[str, Stored], config: HFConfig) -> None:
    head, table = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if not config.values["tie_word_embeddings"] or head is None:
        return
    if table is not None and _same_bytes(head, table):
        return
    mend = (
        "lm_head.weight in the files is not the embedding: transformers 4 drops it and 5 uses it; write false to keep it, "
        "or take it out of the files"
    )
    raise ConfigError("tie_word_embeddings", True, mend)


def _same_bytes(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    a, b = one.raw(), other.raw()
    return all(np.array_equal(a[i : i + _CHUNK], b[i : i + _CHUNK]) for i in range(0, len(a), _CHUNK))


def _check_frequencies(stored: dict[str, Stored], config: HFConfig) -> None:
    """Old releases stored each layer's frequencies; transformers drops them, so they must say what the config says."""
    names = sorted(name for name in stored if name.endswith("rotary_emb.inv_freq"))
    length = config.values["max_position_embeddings"]
    wanted: list[Any] = [config.variant.inv_freq(config.rotary_dim, n).astype(np.float64) for n in (2, length)]
    plain = Rope(base=config.variant.base).theta(config.rotary_dim)
    wanted.append(plain)  # linear scaling was once of the positions
    for name in names:
        entry = stored[name]
        if entry.dtype not in ROUNDING:
            raise ConfigError(name, entry.dtype, "stored frequencies of a type that says nothing; take them out of the files")
        found = entry.numbers().reshape(-1)
        same = found.shape == plain.shape and any(
            (np.abs(found - each) <= ROUNDING[entry.dtype] * plain).all() for each in wanted
        )
        if not same:
            first = float(found[1]) if len(found) > 1 else found.tolist()
            mend = (
                f"is unlike config.json's RoPE ({config.variant}: {float(wanted[0][1]) if len(plain) > 1 else plain.tolist()} "
                "at pair 1); transformers drops it, so correct rope_theta or take it out of the files"
            )
            raise ConfigError(name, first, mend)
