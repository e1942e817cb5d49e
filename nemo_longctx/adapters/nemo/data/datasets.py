"""Windows as torch datasets, and their micro batches as NeMo's models take them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from nemo_longctx.data.evaluation import EvaluationConfig, EvaluationSet, EvaluationWindows, blank
from nemo_longctx.data.windows import Sample, Windows


class WindowDataset(Dataset):
    """`Windows` for torch: item n is sample n of the run, whatever stage it falls in."""

    def __init__(self, windows: Windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> Sample:
        return self.windows[number]


class EvaluationDataset(Dataset):
    """Several `EvaluationWindows`, numbered through.

    Attributes:
        sets: where each one's samples lie.
    """

    def __init__(self, configs: Sequence[EvaluationConfig], *, document_masking: bool):
        self.windows = [EvaluationWindows(config, document_masking=document_masking) for config in configs]
        self.firsts = np.concatenate([[0], np.cumsum([len(windows) for windows in self.windows])]).tolist()
        self.sets = [
            EvaluationSet(
                name=config.name,
                seq_length=config.seq_length,
                micro_batch_size=config.micro_batch_size,
                first_sample=first,
                samples=len(windows),
            )
            for config, first, windows in zip(configs, self.firsts, self.windows, strict=False)
        ]

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`; a negative one is sample `~number` without a label that counts."""
        if number < 0:
            return blank(self[~number])
        which = bisect.bisect_right(self.firsts, number) - 1
        return self.windows[which][number - self.firsts[which]]


def collate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """A micro batch of windows of one length.

    Returns:
        `tokens`, `labels`, `position_ids` int64 and `loss_mask` float32, each [b, s]. With document masking also `cu_seqlens`
        int32 [1, n], the boundaries of all windows laid end to end, `cu_seqlens_argmin` int32 [1, 1], which is n, and
        `max_seqlen` int32 [1, 1], the longest document: the names and shapes of NeMo's packed sequences.
    """
    batch = {key: torch.from_numpy(_rows(samples, key)) for key in ("tokens", "labels", "loss_mask", "position_ids")}
    if "cu_seqlens" in samples[0]:
        length = len(samples[0]["tokens"])
        edges = [np.zeros(1, np.int32), *(sample["cu_seqlens"][1:] + i * length for i, sample in enumerate(samples))]
        boundaries = np.concatenate(edges, dtype=np.int32)
        batch["cu_seqlens"] = torch.from_numpy(boundaries[None])
        batch["cu_seqlens_argmin"] = torch.from_numpy(np.array([[len(boundaries)]], np.int32))
        batch["max_seqlen"] = torch.from_numpy(np.diff(boundaries).max().reshape(1, 1))
    return batch


def _rows(samples: Sequence[Sample], key: str) -> np.ndarray:
    """[b, s]; one sample's own array is handed on as it is, which at 32k saves most of a batch's time."""
    if len(samples) > 1:
        return np.stack([sample[key] for sample in samples])  # type: ignore[literal-required]
    array: np.ndarray = samples[0][key]  # type: ignore[literal-required]
    shared = key == "labels" or not array.flags.writeable  # labels lie in the memory of the tokens
    return (array.copy() if shared else array)[None]
