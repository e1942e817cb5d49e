"""What the data benchmarks share: synthetic corpora, and Megatron-Core's datasets over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

EOD = 0  # the last token of each document


def lengths_of(documents: int, seed: int = 0) -> np.ndarray:
    """Heavy-tailed lengths (median 500 tokens, sigma 1.5, at most 0.9 M), int32."""
    lengths = np.random.default_rng(seed).lognormal(np.log(500), 1.5, size=documents)
    return np.clip(lengths, 2, 900_000).astype(np.int32)


def make_index(prefix: str, documents: int, seed: int = 0) -> str:
    """An index over a token file that is a hole of the right size: for what reads no token."""
    from nemo_longctx.data.writer import write_index

    if not Path(f"{prefix}.idx").exists():
        lengths = lengths_of(documents, seed)
        with open(f"{prefix}.bin", "wb") as file:
            file.truncate(2 * int(lengths.sum(dtype=np.int64)))
        write_index(f"{prefix}.idx", lengths, np.dtype(np.uint16))
    return prefix


def make_corpus(prefix: str, documents: int) -> str:
    """Random uint16 tokens, each document ending in `EOD`."""
    from nemo_longctx.data.writer import write_index

    if not Path(f"{prefix}.idx").exists():
        lengths, rng = lengths_of(documents), np.random.default_rng(1)
        with open(f"{prefix}.bin", "wb") as file:
            for start in range(0, documents, 1 << 16):
                piece = lengths[start : start + (1 << 16)]
                tokens = rng.integers(1, 60_000, int(piece.sum()), dtype=np.uint16)
                tokens[np.cumsum(piece) - 1] = EOD
                file.write(tokens.tobytes())
        write_index(f"{prefix}.idx", lengths, np.dtype(np.uint16))
    return prefix


class EndToken:
    """All that GPTDataset asks of a tokenizer."""

    eod = EOD
    pad = 60_001
    unique_identifiers = {"class": "EndToken"}  # noqa: RUF012 (read by GPTDatasetConfig as an attribute)


def import_all(kind: str) -> None:
    """What is measured imports nothing more: ours, or Megatron-Core's with the process group that its blending asks for."""
    if kind == "ours":
        import nemo_longctx.data.best_fit  # noqa: F401
    else:
        import measure
        import megatron.core.datasets.blended_dataset
        import megatron.core.datasets.gpt_dataset
        import megatron.core.datasets.helpers_cpp  # noqa: F401

        measure.one_gloo_process()


def gpt_dataset(prefix: str, seq_length: int, samples: int | None, cache: str | None, **fields: Any) -> Any:
    """Megatron-Core's GPTDataset over one corpus, built."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = gpt_config(seq_length, cache, **fields)
    indexed = IndexedDataset(prefix)
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    return GPTDataset(indexed, prefix, documents, samples, Split.train, config)


def gpt_config(seq_length: int, cache: str | None, *, positions: bool = False, dense_mask: bool = False) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        tokenizer=EndToken(),
        path_to_cache=cache,
        blend=([""], None),
        split="1,0,0",
        reset_position_ids=positions,
        reset_attention_mask=False,
        eod_mask_loss=positions,
        create_attention_mask=dense_mask,
    )


def our_windows(
    prefixes: list[str], stages: list[dict], total_tokens: int, tokens_per_step: int, cache: str, **options: Any
) -> Any:
    """Our samples over the same corpora, natural shares."""
    from nemo_longctx.config import build
    from nemo_longctx.data.best_fit import open_windows
    from nemo_longctx.data.curriculum import Curriculum
    from nemo_longctx.data.mixture import Documents, MixConfig
    from nemo_longctx.data.order import open_order

    total_tokens -= total_tokens % tokens_per_step
    values = {"stages": stages, "tokens_per_step": tokens_per_step, "total_tokens": total_tokens}
    curriculum = build(Curriculum, values)
    weights = options.pop("weights", [None] * len(prefixes))
    sources = [{"path": path, "weight": weight} for path, weight in zip(prefixes, weights, strict=True)]
    mix = build(MixConfig, {"sources": sources})
    order = open_order(mix, Documents.open(mix), curriculum, seed=1, cache_dir=cache)
    return open_windows(order, curriculum, seed=1, document_masking=options.pop("document_masking", False), **options)
