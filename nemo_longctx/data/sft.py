"""Instruction data as windows: short instances packed, long ones one a window, blended with pretraining text by tokens.

Xiong et al. 2023, section 4.3 and appendix D: short data is packed to 16,384 tokens; a long instance has a window of its own,
padded on the right and never cut; the loss counts answers, long prompts (`prompt_loss_weight`) and all of pretraining text.

`loss_mask` holds whole numbers: a weight w of prompts is written as p beside q for answers, w = p/q. Their weighted mean is the
same, and hosts that count loss tokens as integers (Megatron-Core does) stay exact, where 0.1 would round to nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.data.packing import assign_bins, plan_bins
from nemo_longctx.data.sft_instances import ANSWER, Instances
from nemo_longctx.data.windows import Sample

SOURCES = ("short", "long", "pretraining")
# Largest q: a step of 4 Mi tokens then counts at most 4.2e8, within the host's int32.
_LARGEST_UNIT = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """What a run of instruction tuning reads.

    Attributes:
        seq_length: tokens of a window.
        blend: share of the run's tokens (padding aside) of each of `short`, `long` and `pretraining`; the others get none.
        prompt_loss_weight: of a long instance's prompt tokens, where an answer's token counts 1 (Xiong et al. 2023 use 1).
        on_too_long: what to do with an instance that does not fit a window: `error`, or `drop`, counted.
        seed: of the order.
    """

    seq_length: int = 16_384
    blend: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"short": 1.0})
    prompt_loss_weight: float = 1.0
    on_too_long: str = "error"
    seed: int = 1234

    def __post_init__(self):
        if self.seq_length < 2:
            raise ConfigError("data.seq_length", self.seq_length, "must be at least 2 tokens")
        object.__setattr__(self, "blend", {name: float(share) for name, share in self.blend.items()})
        for name, share in self.blend.items():
            if name not in SOURCES:
                raise ConfigError(f"data.blend.{name}", share, f"no such source, {did_you_mean(name, SOURCES)}")
            if not share > 0:
                raise ConfigError(f"data.blend.{name}", share, "a share above 0; leave the source out to give it none")
        if abs(sum(self.blend.values()) - 1) > 1e-6:
            raise ConfigError(
                "data.blend", dict(self.blend), f"shares of tokens add up to 1, these to {sum(self.blend.values()):g}"
            )
        if self.on_too_long not in ("error", "drop"):
            raise ConfigError("data.on_too_long", self.on_too_long, did_you_mean(str(self.on_too_long), ("error", "drop")))
        loss_units(self.prompt_loss_weight)


def loss_units(prompt_loss_weight: float) -> tuple[int, int]:
    """(p, q), whole numbers with p / q = prompt_loss_weight: what a long prompt's token and an answer's token count.

    Raises:
        ConfigError: outside [0, 1], or no fraction with a denominator of at most 100.
    """
    if not 0 <= prompt_loss_weight <= 1:
        raise ConfigError("data.prompt_loss_weight", prompt_loss_weight, "must be in [0, 1]; 1 is the paper's")
    near = Fraction(prompt_loss_weight).limit_denominator(_LARGEST_UNIT)
    if abs(float(near) - prompt_loss_weight) > 1e-9:
        mend = f"must be a fraction of at most {_LARGEST_UNIT} parts, for exact counts; the nearest is {float(near)!r} ({near})"
        raise ConfigError("data.prompt_loss_weight", prompt_loss_weight, mend)
    return near.numerator, near.denominator


def pack_best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Which items share a window: best-fit decreasing, none cut. Items of a window come in rising order.

    Args:
        lengths: of the items, int [n], each at most `capacity`.
        capacity: of a window.
    """
    bins = assign_bins(plan_bins(np.bincount(lengths, minlength=capacity + 1), capacity), lengths)
    by_bin = np.argsort(bins, kind="stable")
    return [part.tolist() for part in np.split(by_bin, np.flatnonzero(np.diff(bins[by_bin])) + 1)]


def plan_blend(
    streams: Mapping[str, Iterator[tuple[int, int]]], shares: Mapping[str, float], n_samples: int
) -> list[tuple[str, int]]:
    """(source, its sample) of each of the run's samples: always the source that is furthest behind its share of tokens.

    No source is ever off its share by more than one window's tokens.

    Args:
        streams: of each source, its samples in the order in which they come, and the tokens of each; without end.
        shares: of the run's tokens, by source.
        n_samples: windows of the run.
    """
    given = dict.fromkeys(shares, 0)
    plan = []
    for _ in range(n_samples):
        name = min(shares, key=lambda source: given[source] / shares[source])
        sample, tokens = next(streams[name])
        plan.append((name, sample))
        given[name] += tokens
    return plan


def epochs(tokens: np.ndarray, seed: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(sample, its tokens) again and again, each epoch in an order of its own."""
    for epoch in itertools.count():
        for sample in np.random.default_rng([*seed, epoch]).permutation(len(tokens)).tolist():
            yield sample, int(tokens[sample])


class InstructionWindows:
    """The run's windows, numbered through: a pure function of (config, data), the same on every rank.

    Args:
        config: shares, lengths and weights.
        short, long: tokenized instances of the blend's sources of these names.
        n_samples: windows of the run.
        pad_id: token written where nothing is; it has the weight 0.
        pretraining: makes the given number of windows of `seq_length` tokens (`data.windows.Windows`), where the blend has any.

    Raises:
        ConfigError: a source of the blend without data, or an instance that does not fit a window.
    """

    def __init__(
        self,
        config: InstructionConfig,
        *,
        n_samples: int,
        pad_id: int,
        short: Sequence[Instances] = (),
        long: Sequence[Instances] = (),
        pretraining: Any = None,
    ):
        self.config, self.pad_id = config, pad_id
        self.too_long = 0
        given = {"short": short, "long": long, "pretraining": pretraining}
        for name in config.blend:
            if not given[name]:
                raise ConfigError(f"data.{name}", None, f"the blend asks for {config.blend[name]:.0%} of it; name its files")
        self._labels = {
            files: name if len(sources) == 1 else f"{name}[{number}]"
            for name, sources in (("short", short), ("long", long))
            for number, files in enumerate(sources)
        }
        self._bins: dict[str, list[list[tuple[Instances, int]]]] = {}
        if "short" in config.blend:
            items = self._fitting("short", short)
            packed = pack_best_fit(np.array([files.lengths[i] - 1 for files, i in items]), config.seq_length)
            self._bins["short"] = [[items[item] for item in members] for members in packed]
        if "long" in config.blend:
            self._bins["long"] = [[item] for item in self._fitting("long", long)]
        streams: dict[str, Iterator[tuple[int, int]]] = {}
        for name, bins in self._bins.items():
            tokens = np.array([sum(int(files.lengths[i]) - 1 for files, i in members) for members in bins])
            streams[name] = epochs(tokens, (config.seed, SOURCES.index(name)))
        if "pretraining" in config.blend:
            streams["pretraining"] = ((number, config.seq_length) for number in itertools.count())
        self._plan = plan_blend(streams, config.blend, n_samples)
        wanted = sum(name == "pretraining" for name, _ in self._plan)
        self._pretraining = pretraining(wanted) if wanted else None

    def _fitting(self, name: str, sources: Sequence[Instances]) -> list[tuple[Instances, int]]:
        items = []
        for files in sources:
            for number, length in enumerate(files.lengths.tolist()):
                if length - 1 <= self.config.seq_length:
                    items.append((files, number))
                elif self.config.on_too_long == "error":
                    mend = f"{name} instance {number} needs windows of {length - 1}; raise it, or set on_too_long: drop"
                    raise ConfigError("data.seq_length", self.config.seq_length, mend)
                else:
                    self.too_long += 1
        if not items:
            raise ConfigError(f"data.{name}", None, f"none of its instances fits a window of {self.config.seq_length} tokens")
        return items

    def __len__(self) -> int:
        return len(self._plan)

    def source(self, number: int) -> str:
        """Where window `number` comes from."""
        return self._plan[number][0]

    def documents_of(self, numbers: Iterable[int]) -> list[str]:
        """What some windows hold, each once: `SOURCE:NUMBER`, an instance by its number in its file; `SOURCE[FILE]:NUMBER` of a
        source of several, numbered as in the settings.
        """
        found: dict[str, None] = {}
        for number in numbers:
            name, place = self._plan[number]
            if self._pretraining is not None and name == "pretraining":
                found |= dict.fromkeys(f"{name}/{label}" for label in self._pretraining.documents_of([place]))
            else:
                found |= dict.fromkeys(f"{self._labels[files]}:{instance}" for files, instance in self._bins[name][place])
        return list(found)

    def __getitem__(self, number: int) -> Sample:
        """Window `number`; its `cu_seqlens` keep instances apart, and padding is a document of its own."""
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        name, which = self._plan[number]
        prompt, answer = loss_units(self.config.prompt_loss_weight)
        if name == "pretraining":
            sample = dict(self._pretraining[which])  # type: ignore[index]
            sample["loss_mask"] = sample["loss_mask"] * np.float32(answer)
            return sample  # type: ignore[return-value]
        members = [files[i] for files, i in self._bins[name][which]]
        return window(
            members, seq_length=self.config.seq_length, pad_id=self.pad_id, units=(prompt if name == "long" else 0, answer)
        )


def window(members: Sequence[tuple[np.ndarray, np.ndarray]], *, seq_length: int, pad_id: int, units: tuple[int, int]) -> Sample:
    """Instances one after the other, then padding.

    An instance of n tokens fills n - 1 places: each holds a token and, as its label, the next one; a place's weight is that of
    its label. So no label ever leads from one instance to another.

    Args:
        members: (tokens, roles) of each instance.
        seq_length: places of the window.
        pad_id: token and label of places that nothing fills.
        units: what a prompt's and an answer's token count.
    """
    tokens, labels = np.full(seq_length, pad_id, np.int64), np.full(seq_length, pad_id, np.int64)
    loss_mask, position_ids = np.zeros(seq_length, np.float32), np.zeros(seq_length, np.int64)
    ends, begin = [0], 0
    for ids, roles in members:
        end = begin + len(ids) - 1
        tokens[begin:end], labels[begin:end] = ids[:-1], ids[1:]
        loss_mask[begin:end] = np.where(roles[1:] == ANSWER, units[1], units[0])
        position_ids[begin:end] = np.arange(end - begin)
        ends.append(end)
        begin = end
    if begin < seq_length:
        position_ids[begin:] = np.arange(seq_length - begin)
        ends.append(seq_length)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": loss_mask,
        "position_ids": position_ids,
        "cu_seqlens": np.array(ends, dtype=np.int32),
    }
