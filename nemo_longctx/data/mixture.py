"""Sources, weights in tokens and length rules -> how often each group of documents comes.

A *stratum* is the documents of one source on one side of the length that a mix up-weights. All of a stratum's documents come
equally often, so a mix is one number a stratum: its share of the run's tokens.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.documents import CHUNK as CHUNK
from nemo_longctx.data.documents import Documents
from nemo_longctx.data.seen import Remaining

Balance = Literal["source", "all"]
OnCap = Literal["error", "renormalize"]
ROUNDING = 1e-12  # shares are float64: what differs by less than this part of it is the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One corpus of the mix.

    Attributes:
        path: prefix of a `.bin/.idx` pair, a directory of shards, or a list of either, read as one corpus.
        name: what reports call it; None takes the last part of the path.
        weight: share of the run's tokens, as a part of all sources' sum ([7, 3] is [0.7, 0.3]); None in every source: natural
            shares (by tokens left after the length rules).
        drop_shorter: leave out documents of fewer tokens; None: as the mix.
        drop_longer: leave out documents of more tokens; None: as the mix.
    """

    path: str | Sequence[str]
    name: str | None = None
    weight: float | None = None
    drop_shorter: int | None = None
    drop_longer: int | None = None

    def __post_init__(self):
        if not self.path or not all(each.strip() for each in ([self.path] if isinstance(self.path, str) else self.path)):
            raise ConfigError("data.mix.sources.path", self.path, "name a prefix, a directory of shards, or a list of either")
        if not isinstance(self.path, str):
            object.__setattr__(self, "path", tuple(self.path))
        _check_lengths(self, "data.mix.sources", "drop_shorter", "drop_longer")
        if self.weight is not None and not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError("data.mix.sources.weight", self.weight, "a share above 0; leave a source out to give it none")

    @property
    def label(self) -> str:
        """The name in reports."""
        first = self.path if isinstance(self.path, str) else self.path[0]
        return self.name or os.path.basename(os.path.abspath(first))  # `.` is a folder with a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Which documents, how often.

    Attributes:
        sources: at least one.
        drop_shorter: leave out documents of fewer tokens than this.
        drop_longer: leave out documents of more tokens than this.
        long_length: documents of at least this many tokens are long; goes with `long_share`.
        long_share: the share of tokens that long documents get; None leaves them their natural share.
        balance: whether each source gives `long_share` of its own tokens to long documents, so that sources keep their shares
            (`source`, Fu et al. 2024), or long documents get it over all, wherever they come from (`all`).
        max_repeats: how often the documents of a stratum may come in the run on average, by tokens; None: as often as the
            shares ask. One document comes at most this many times, rounded up: at 2 none comes a third time, at 1.5 about half
            of a stratum's tokens come twice.
        on_cap: when a share asks for more: stop (`error`), or give what is over to the others (`renormalize`).
        share_tolerance: largest difference between a share asked and delivered over a stage; more is an error before training.
    """

    sources: tuple[SourceConfig, ...]
    drop_shorter: int | None = None
    drop_longer: int | None = None
    long_length: int | None = None
    long_share: float | None = None
    balance: Balance = "source"
    max_repeats: float | None = None
    on_cap: OnCap = "error"
    share_tolerance: float = 0.001

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise ConfigError("data.mix.sources", [], "name at least one source, such as [{path: my_corpus}]")
        weights = [source.weight for source in self.sources]
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            raise ConfigError("data.mix.sources.weight", weights, "weigh every source, or none for natural shares")
        whole = sum(given)
        if given and (math.isinf(whole) or min(given) / whole == 0):
            mend = "differ beyond what numbers can hold; write parts of one whole, such as [0.7, 0.3]"
            raise ConfigError("data.mix.sources.weight", weights, mend)
        if given and not math.isclose(whole, 1.0, abs_tol=1e-6):
            shares = [dataclasses.replace(s, weight=weight / whole) for s, weight in zip(self.sources, given, strict=True)]
            object.__setattr__(self, "sources", tuple(shares))
        labels = [source.label for source in self.sources]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError("data.mix.sources.name", twice[0], "two sources have this name; give each its own `name`")
        if (self.long_length is None) != (self.long_share is None):
            raise ConfigError("data.mix.long_share", self.long_share, "long_length and long_share go together; set both")
        _check_lengths(self, "data.mix", "drop_shorter", "drop_longer", "long_length")
        if self.long_share is not None and not 0 < self.long_share < 1:
            raise ConfigError(
                "data.mix.long_share", self.long_share, "a share in (0, 1); to keep only long text set drop_shorter"
            )
        for name, allowed in (("balance", get_args(Balance)), ("on_cap", get_args(OnCap))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"data.mix.{name}", getattr(self, name), f"one of {', '.join(allowed)}")
        if self.max_repeats is not None and not (self.max_repeats > 0 and math.isfinite(self.max_repeats)):
            raise ConfigError("data.mix.max_repeats", self.max_repeats, "a number above 0; null lifts the cap")
        if self.max_repeats is None and self.on_cap != "error":
            raise ConfigError("data.mix.on_cap", self.on_cap, "it has no effect without max_repeats; set that, or leave it out")
        if not 0 < self.share_tolerance < 1:
            raise ConfigError("data.mix.share_tolerance", self.share_tolerance, "a share in (0, 1), such as 0.001")

    def length_range(self, source: SourceConfig) -> tuple[int, float]:
        """Shortest and longest document (inclusive) that `source` gives."""
        shortest = source.drop_shorter if source.drop_shorter is not None else self.drop_shorter
        longest = source.drop_longer if source.drop_longer is not None else self.drop_longer
        return shortest or 1, math.inf if longest is None else longest


def _check_lengths(config: SourceConfig | MixConfig, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{where}.{name}", value, "a length in tokens, at least 1; null lifts the rule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stratum:
    """Documents of one source that come equally often.

    Attributes:
        source: number of the source.
        name: for reports: `books`, or `books >= 32768` and `books < 32768`.
        shortest, longest: tokens of its documents, inclusive.
        documents, tokens: how many there are.
        share: of the run's tokens.
    """

    source: int
    name: str
    shortest: int
    longest: float
    documents: int
    tokens: int
    share: float

    def repeats(self, total_tokens: int) -> float:
        """How often its documents come in a run of `total_tokens`, on average by tokens; see `most_repeats`."""
        return self.share * total_tokens / self.tokens

    def most_repeats(self, total_tokens: int) -> int:
        """How often one of its documents comes at most."""
        return math.ceil(self.repeats(total_tokens) * (1 - ROUNDING))

    def members(self, documents: Documents) -> np.ndarray:
        """The numbers (uint32, ascending) of its documents."""
        low, high = np.searchsorted(documents.source_of_shard, [self.source, self.source + 1])
        first, end = documents.shard_offsets[[low, high]].tolist()
        if self.documents == end - first:
            return np.arange(first, end, dtype=np.uint32)
        members, filled = np.empty(self.documents, np.uint32), 0
        for first, lengths in documents.of_source(self.source):
            chosen = np.flatnonzero((lengths >= self.shortest) & (lengths <= self.longest))
            members[filled : filled + len(chosen)] = chosen + first
            filled += len(chosen)
        return members


def plan_mix(mix: MixConfig, documents: Documents, total_tokens: int, past: Remaining | None = None) -> tuple[Stratum, ...]:
    """Shares of all strata that get tokens, in the order of the sources, short before long.

    Args:
        mix: what is asked.
        documents: its opened sources.
        total_tokens: tokens of the run, or of what is left of it.
        past: what was read before. Natural shares are then those of what is unread, and a cap counts it.

    Raises:
        ConfigError: an index that lies, a source or a side of it that is empty after the rules, a cap that cannot be met.
    """
    documents.check()
    strata = [stratum for number in range(len(mix.sources)) for stratum in _strata_of(mix, documents, number)]
    given = np.zeros(len(strata), np.int64)
    natural_tokens = np.array([float(stratum.tokens) for stratum in strata])
    if past is not None:
        given = np.array([_tokens_read(stratum, documents, past) for stratum in strata])
        natural_tokens = _unread_first(natural_tokens, given, total_tokens)
    of_source = np.array([stratum.source for stratum in strata])
    source_tokens = np.bincount(of_source, weights=natural_tokens)
    weights = np.array([source.weight if source.weight is not None else 0.0 for source in mix.sources])
    weights = weights / weights.sum() if weights.any() else source_tokens / source_tokens.sum()
    used_up = source_tokens[of_source] == 0  # where a weight asks for it nevertheless, it comes as it is
    natural_tokens[used_up] = np.array([stratum.tokens for stratum in strata])[used_up]
    natural = weights[of_source] * natural_tokens / np.bincount(of_source, weights=natural_tokens)[of_source]
    shares = natural if mix.long_share is None else _up_weigh(mix, strata, natural, weights)
    if mix.max_repeats is not None:
        shares = _cap(mix, mix.max_repeats, strata, shares, total_tokens, given)
    return tuple(dataclasses.replace(s, share=float(share)) for s, share in zip(strata, shares, strict=True) if share > 0)


def _tokens_read(stratum: Stratum, documents: Documents, past: Remaining) -> int:
    """Tokens of a stratum that were read, each time counted."""
    read = 0
    for first, lengths in documents.of_source(stratum.source):
        inside = (lengths >= stratum.shortest) & (lengths <= stratum.longest)
        read += past.tokens_read(np.where(inside, lengths, 0), first)
    return read


def _unread_first(tokens: np.ndarray, given: np.ndarray, total_tokens: int) -> np.ndarray:
    """What each stratum gives by its nature to a run that goes on: what is unread of it, and then alike of all."""
    level = (given // tokens).min()
    unread = np.maximum(tokens * (level + 1) - given, 0)
    more = max(0.0, total_tokens - unread.sum())
    return unread + tokens * (more / tokens.sum())


def _strata_of(mix: MixConfig, documents: Documents, number: int) -> list[Stratum]:
    """The non-empty sides of one source, counted; shares are still 0."""
    source = mix.sources[number]
    shortest, longest = mix.length_range(source)
    sides = [(source.label, shortest, longest)]
    if mix.long_length is not None:
        sides = [
            (f"{source.label} < {mix.long_length}", shortest, min(longest, mix.long_length - 1)),
            (f"{source.label} >= {mix.long_length}", max(shortest, mix.long_length), longest),
        ]
    counts = np.zeros((len(sides), 2), np.int64)
    for _, lengths in documents.of_source(number):
        for side, (_, low, high) in enumerate(sides):
            chosen = lengths[(lengths >= low) & (lengths <= high)]
            counts[side] += len(chosen), chosen.sum(dtype=np.int64)
    strata = [
        Stratum(source=number, name=name, shortest=low, longest=high, documents=int(n), tokens=int(tokens), share=0.0)
        for (name, low, high), (n, tokens) in zip(sides, counts, strict=True)
        if n
    ]
    if not strata:
        raise ConfigError(
            "data.mix.sources",
            source.label,
            f"no document of {shortest} to {longest} tokens is left after its length rules; loosen drop_shorter/drop_longer "
            "or leave the source out",
        )
    return strata


def _up_weigh(mix: MixConfig, strata: Sequence[Stratum], natural: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shares with `long_share` of the tokens in long documents, by source or over all."""
    long_length, long_share = mix.long_length or 0, mix.long_share or 0.0  # MixConfig: both are set
    is_long = np.array([stratum.shortest >= long_length for stratum in strata])
    if mix.balance == "all":
        if is_long.all() or not is_long.any():
            missing = "shorter than" if is_long.all() else "of at least"
            mean = math.ceil(sum(stratum.tokens for stratum in strata) / sum(stratum.documents for stratum in strata))
            mend = (
                f"no source has documents {missing} {long_length} tokens; set their mean, {mean}, or leave both out: "
                "data.mix.long_length=null data.mix.long_share=null"
            )
            raise ConfigError("data.mix.long_length", long_length, mend)
        for side in (is_long, ~is_long):
            if not natural[side].any():  # all of it was read, and its share is asked for nevertheless: it comes as it is
                natural = np.where(side, _as_they_are(mix, strata), natural)
        factor_long, factor_short = long_share / natural[is_long].sum(), (1 - long_share) / natural[~is_long].sum()
        return natural * np.where(is_long, factor_long, factor_short)
    for number, source in enumerate(mix.sources):
        sides = [long for long, stratum in zip(is_long, strata, strict=True) if stratum.source == number]
        if len(sides) < 2:
            missing = "shorter than" if sides[0] else "of at least"
            mend = f"source {source.label} has no documents {missing} {long_length} tokens; set balance=all, or leave it out"
            raise ConfigError("data.mix.balance", mix.balance, mend)
    by_source = weights[[stratum.source for stratum in strata]]
    return by_source * np.where(is_long, long_share, 1 - long_share)


def _as_they_are(mix: MixConfig, strata: Sequence[Stratum]) -> np.ndarray:
    """Shares of the strata before anything was read, up to a factor."""
    tokens = np.array([float(stratum.tokens) for stratum in strata])
    source = np.array([stratum.source for stratum in strata])
    if mix.sources[0].weight is None:
        return tokens
    weights = np.array([mix.sources[number].weight for number in source.tolist()])
    return weights * tokens / np.bincount(source, weights=tokens)[source]


def _cap(
    mix: MixConfig,
    max_repeats: float,
    strata: Sequence[Stratum],
    shares: np.ndarray,
    total_tokens: int,
    given: np.ndarray,
) -> np.ndarray:
    """Shares within `max_repeats`: what is over goes to the strata below their cap, in proportion to their shares.

    Tokens that were `given` before count.
    """
    allowed = max_repeats * np.array([stratum.tokens for stratum in strata])
    caps = np.maximum(allowed - given, 0) / total_tokens
    over = shares > caps * (1 + ROUNDING)
    if not over.any():
        return shares
    if mix.on_cap == "error":
        times = (given + shares * total_tokens) / allowed * max_repeats
        worst = int(np.argmax(np.where(over, times, 0)))
        mend = (
            f"{strata[worst].name} would have to come {times[worst]:.2f} times for "
            f"{shares[worst]:.2%} of the tokens; raise the cap, lower its weight, shorten the run, or set on_cap=renormalize"
        )
        raise ConfigError("data.mix.max_repeats", max_repeats, mend)
    if caps.sum() < 1:
        mend = f"all documents together give {caps.sum():.1%} of the run's tokens under this cap; raise it or shorten the run"
        raise ConfigError("data.mix.max_repeats", max_repeats, mend)
    capped = np.zeros(len(shares), bool)
    given = shares.copy()
    while (new := ~capped & (given > caps)).any():
        capped |= new
        given[capped] = caps[capped]
        if not capped.all():
            given[~capped] = shares[~capped] * (1 - caps[capped].sum()) / shares[~capped].sum()
    return given


def mix_dict(mix: MixConfig) -> dict[str, Any]:
    """What the stream depends on, for its hash: paths are left out (contents are hashed), so that data may move."""
    values = dataclasses.asdict(mix)
    for source, config in zip(values["sources"], mix.sources, strict=True):
        del source["path"]
        source["name"] = config.label
    del values["share_tolerance"]
    return values
