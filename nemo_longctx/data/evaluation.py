"""Held-out text in windows of a fixed length: documents in their own order, once, nothing random.

Which windows are read depends on the set alone, never on how many ranks read them: a last step that is not full is filled up
with blank windows, which count for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.mixture import Documents
from nemo_longctx.data.windows import Sample, read_window

LONGEST_NAME = 100
MOST_TOGETHER = 2**16  # windows of a micro batch; a set is filled up to a whole one


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """A named set of windows.

    Attributes:
        name: what its loss is called: `val_loss_NAME` (of a test set `test_loss_NAME`).
        path: prefix of a `.bin/.idx` pair, a directory of shards, or a list of either.
        seq_length: tokens in a window, whatever the stage of training.
        micro_batch_size: windows in one forward pass on one data-parallel rank.
        samples: use so many windows, spread evenly over the corpus; None: all.
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
        if len(self.name) > LONGEST_NAME:
            raise ConfigError("data.validation.name", self.name, f"at most {LONGEST_NAME} letters: it heads a column")
        if not self.path or not all(self.path):
            raise ConfigError("data.validation.path", self.path, "name a prefix, a directory of shards, or a list of either")
        if self.micro_batch_size > MOST_TOGETHER:
            raise ConfigError("data.validation.micro_batch_size", self.micro_batch_size, f"at most {MOST_TOGETHER:,} windows")
        for name in ("seq_length", "micro_batch_size", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.validation.{name}", value, "at least 1")


def spread(count: int, of: int) -> Sequence[int]:
    """`count` numbers in [0, of), ascending, each from the middle of its share; all of them where there are no more."""
    if count >= of:
        return range(of)
    return [(2 * number + 1) * of // (2 * count) for number in range(count)]


def windows_of(config: EvaluationConfig, n_tokens: int) -> int:
    """Windows that a corpus of so many tokens holds.

    Raises:
        ConfigError: not one.
    """
    windows = (n_tokens - 1) // config.seq_length
    if not windows:
        mend = f"{config.name} has {n_tokens} tokens, a window and its last label need {config.seq_length + 1}"
        raise ConfigError("data.validation.seq_length", config.seq_length, f"{mend}; set it lower, or hold out more")
    return windows


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
        self.windows = windows_of(config, int(self.ends[-1]))
        if config.samples is not None:
            self.places = spread(config.samples, self.windows)
            self.windows = len(self.places)
        else:
            self.places = range(self.windows)

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, number: int) -> Sample:
        """Window `number` of the set."""
        if not 0 <= number < self.windows:
            raise IndexError(f"window {number} of {self.windows}")
        length = self.config.seq_length
        return read_window(self, int(self.places[number]) * length, length, document_masking=self.document_masking)

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Order.span`."""
        low, high = int(self.ends.searchsorted(start, "right")), int(self.ends.searchsorted(stop, "left")) + 1
        visits = np.arange(low, high)
        ends = self.ends[low:high]
        lengths = self.documents.lengths(visits)
        some = lengths > 0  # documents without tokens are read past
        return visits[some], lengths[some], ends[some]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A named set of windows in an evaluation loader: its samples follow those of the sets before it."""

    name: str
    seq_length: int
    micro_batch_size: int
    first_sample: int
    samples: int


class EvaluationBatchSampler:
    """The micro batches of one data-parallel rank over several evaluation sets, one set after the other.

    All ranks together read the same windows whatever their number. The last step of a set may have too few of them: the places
    that are left get `~number`, which stands for window `number` with nothing in it that counts (`blank`).

    Args:
        sets: what to go through.
        multiple: micro batches of a set on each rank are a multiple of this.
        limit: micro batches of each set over all ranks together, spread over the set; None: all.
        rank, world_size: data-parallel rank, and how many there are.
    """

    def __init__(self, sets: Sequence[EvaluationSet], *, multiple: int, limit: int | None, rank: int, world_size: int):
        self.sets, self.rank, self.world_size, self.multiple = tuple(sets), rank, world_size, multiple
        limits = [each.samples if limit is None else limit * each.micro_batch_size for each in sets]
        self.chosen = [spread(most, each.samples) for most, each in zip(limits, sets, strict=True)]
        in_step = [each.micro_batch_size * world_size * multiple for each in sets]
        self.steps = [-(-len(chosen) // size) for chosen, size in zip(self.chosen, in_step, strict=True)]

    def __len__(self) -> int:
        return sum(self.steps) * self.multiple

    def __iter__(self) -> Iterator[list[int]]:
        for each, chosen, steps in zip(self.sets, self.chosen, self.steps, strict=True):
            size = each.micro_batch_size
            for batch in range(steps * self.multiple):
                first = (batch * self.world_size + self.rank) * size
                numbers = [each.first_sample + int(place) for place in chosen[first : first + size]]
                yield numbers + [~(each.first_sample + int(chosen[-1]))] * (size - len(numbers))

    def set_of_step(self, step: int) -> EvaluationSet:
        """The set that step number `step` of an evaluation belongs to."""
        for each, steps in zip(self.sets, self.steps, strict=True):
            if step < steps:
                return each
            step -= steps
        return self.sets[-1]


def blank(sample: Sample) -> Sample:
    """`sample` with no label that counts."""
    return {**sample, "loss_mask": np.zeros_like(sample["loss_mask"])}
