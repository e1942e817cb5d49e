"""The `.idx` of a Megatron corpus: its header, its sizes, and the maps of its two files.

The `.idx` layout (little-endian), as `megatron.core.datasets.indexed_dataset` 0.15 writes and reads it:

    9 bytes  b"MMIDIDX\\0\\0"      8 bytes  version = 1      1 byte  dtype code
    8 bytes  S = number of sequences                        8 bytes  D = number of documents + 1
    S x int32  tokens per sequence
    S x int64  byte offset of each sequence in the `.bin`
    D x int64  first sequence of each document, then S
    (S x int8  modes, multimodal corpora only; ignored here)
"""

from __future__ import annotations

import mmap
import os
import struct

import numpy as np

from nemo_longctx.config import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
DTYPE_OF_CODE = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODE_OF_DTYPE = {np.dtype(kind): code for code, kind in DTYPE_OF_CODE.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron picks for ids below `vocab_size`: uint16 under 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def without_suffix(prefix: str) -> str:
    """The prefix of a pair that is named by one of its files; a pair whose prefix itself ends so is taken as it is."""
    is_file_of_pair = prefix.endswith((".bin", ".idx")) and not os.path.isfile(f"{prefix}.idx")
    return prefix[:-4] if is_file_of_pair else prefix


def map_file(path: str, prefix: str, what: str) -> mmap.mmap:
    """Map a file read-only. The arrays made from the map keep it alive, as plain ndarrays: np.memmap costs 1 us a slice."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ConfigError("corpus", prefix, f"the {what} is empty; write it again with `nemo-longctx prepare`")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_header(index: mmap.mmap, prefix: str) -> tuple[np.dtype, int, int]:
    """dtype, number of sequences, number of documents + 1."""
    if len(index) < HEADER.size or index[: len(MAGIC)] != MAGIC:
        raise ConfigError(
            "corpus", prefix, "the .idx is not a Megatron index (wrong magic); name a prefix that `prepare` wrote"
        )
    _, version, code, n_sequences, n_ends = HEADER.unpack_from(index)
    if version != 1:
        raise ConfigError(
            "corpus", prefix, f"the .idx has version {version}, this reader knows 1; write it again with `prepare`"
        )
    dtype = np.dtype(DTYPE_OF_CODE.get(code, np.void))
    if not np.issubdtype(dtype, np.integer):
        raise ConfigError("corpus", prefix, f"the .idx says dtype code {code}, which is no integer type; tokens are integers")
    return dtype, n_sequences, n_ends


def check_index_size(size: int, n_sequences: int, n_ends: int, prefix: str) -> None:
    plain = HEADER.size + 12 * n_sequences + 8 * n_ends
    if n_sequences == 0 or n_ends < 2:
        raise ConfigError("corpus", prefix, "the .idx lists no documents; prepare it from input that has some")
    if size not in (plain, plain + n_sequences):  # the second: a mode of one byte a sequence
        says = f"{n_sequences} sequences and {n_ends - 1} documents need {plain} bytes, it has {size}"
        raise ConfigError("corpus", prefix, f"the .idx lies about its size: {says}; copy it again, or prepare it again")
