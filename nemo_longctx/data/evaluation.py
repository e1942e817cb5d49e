"""Held-out text in windows of a fixed length: documents in their own order, once, nothing random."""

from __future__ import annotations

import dataclasses

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.mixture import Documents
from nemo_longctx.data.windows import Sample, read_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """A named set of windows.

    Attributes:
        name: what its loss is called: `val_loss_NAME`.
        path: prefix of a `.bin/.idx` pair, a directory of shards, or a list of either.
        seq_length: tokens in a window, whatever the stage of training.
        micro_batch_size: windows in one forward pass on one data-parallel rank.
        samples: use the first so many windows; None: all.
    """

    name: str
    path: str | tuple[str, ...]
    seq_length: int
    micro_batch_size: int = 1
    samples: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "name", str(self.name))  # YAML reads `name: 256` as a number
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(
                "data.validation.name", self.name, "letters, digits, - and _ only: it becomes part of a metric's name"
            )
        for name in ("seq_length", "micro_batch_size", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.validation.{name}", value, "at least 1")


class EvaluationWindows:
    """The windows of one set: a stream in the order of the files.

    Args:
        config: the set.
        document_masking: as in training.

    Raises:
        ConfigError: an index that lies (`IndexedCorpus.check`), or too little text for one window.
    """

    def __init__(self, config: EvaluationConfig, *, document_masking: bool):
        self.config, self.document_masking = config, document_masking
        self.documents = Documents([config.name], [open_corpus(config.path)])
        self.documents.check()
        self.ends = np.cumsum(np.concatenate([shard.lengths for shard in self.documents.shards]), dtype=np.int64)
        self.windows = (int(self.ends[-1]) - 1) // config.seq_length
        if not self.windows:
            mend = f"{config.name} has {self.ends[-1]} tokens, a window and its last label need {config.seq_length + 1}"
            raise ConfigError("data.validation.seq_length", config.seq_length, mend)
        if config.samples is not None:
            self.windows = min(self.windows, config.samples)

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, number: int) -> Sample:
        """Window `number` of the set."""
        if not 0 <= number < self.windows:
            raise IndexError(f"window {number} of {self.windows}")
        return read_window(
            self, number * self.config.seq_length, self.config.seq_length, document_masking=self.document_masking
        )

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Order.span`."""
        low, high = int(self.ends.searchsorted(start, "right")), int(self.ends.searchsorted(stop, "left")) + 1
        visits = np.arange(low, high)
        ends = self.ends[low:high]
        return visits, self.documents.lengths(visits), ends
