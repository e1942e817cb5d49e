"""A run's stream over its life: it begins, maybe behind another run, and goes on, maybe under other settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.base_run import consumed, left_at
from nemo_longctx.data.best_fit import BestFitWindows, Packing, check_delivery, open_windows, pack_windows
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.documents import Documents
from nemo_longctx.data.history import History, Segment, changes
from nemo_longctx.data.mixture import MixConfig
from nemo_longctx.data.order import Order, open_order
from nemo_longctx.data.windows import Windows

MOVES = {"curriculum", "data.mix", "data.seed"}  # what the order of documents follows


class Stream:
    """The samples of a run, and what a checkpoint has to know to go on with them.

    Args:
        mix, curriculum, packing, document_masking, seed: as in `LongContextDataModule`.
        cache_dir: where orders are kept.

    Attributes:
        documents: the opened sources.
        windows: the samples, once `begin` or `go_on` was called.
        after: the base run that it began behind, as the user named it.
        lost: of parts that it goes on behind, a sentence each, if it cannot be told any more what they read.
        kept_names: of sources that were moved: what their paths call them now -> what the checkpoint does.
    """

    def __init__(
        self,
        mix: MixConfig,
        curriculum: Curriculum,
        *,
        packing: Packing = "concatenate",
        document_masking: bool = False,
        seed: int = 1234,
        cache_dir: str,
    ):
        self.mix, self.curriculum, self.packing, self.document_masking = mix, curriculum, packing, document_masking
        self.seed, self.cache_dir = seed, cache_dir
        self.documents = Documents.open(mix)
        self.after: str | None = None
        self.windows: Windows | None = None
        self.kept_names: dict[str, str] = {}
        self.lost: list[str] = []
        self._left: list[Segment] = []  # behind it
        self._finished: list[Segment] = []  # all, where a checkpoint stands at the run's end

    def begin(self, after: str | None = None, checkpoint: Path | None = None) -> Windows:
        """Open it from token 0 on.

        Args:
            after: a base run; what it read comes behind what it did not.
            checkpoint: of that run.

        Raises:
            ConfigError: the base run read nothing of this mix, or its checkpoint does not say what.
        """
        self.after, base = after, []
        if after is not None and checkpoint is not None:
            base = consumed(after, checkpoint)
            known = {identity for segment in base for _, identity in segment.shards}
            if known.isdisjoint(self.documents.identities):
                mend = "it read none of this run's corpora, so there is nothing to begin behind; leave it out"
                raise ConfigError("data.after", after, mend)
        return self._open(base, origin=0)

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint, plain values."""
        segments = [dataclasses.asdict(segment) for segment in self.segments]
        return {"segments": segments, "document_masking": self.document_masking, "after": self.after}

    @property
    def segments(self) -> list[Segment]:
        """What the stream was made of part by part; the last is the one that it is in. None before it is open."""
        if self._finished or self.windows is None:
            return self._finished
        order = self.windows.order
        return [*self._left, dataclasses.replace(self._now(), first_token=order.origin, order=order.digest)]

    def go_on(
        self, state: Mapping[str, Any], token: int, *, after: str | None = None, allow_change: bool = False
    ) -> tuple[list[str], list[str]]:
        """Open it behind `token` of the run, where a checkpoint stands.

        Args:
            state: `state` of the stream that the checkpoint is of.
            token: consumed tokens.
            after: the base run that is named now.
            allow_change: go on under any change.

        Returns:
            What changed since, and what of it needs `allow_change`; where something does and has it not, nothing is opened.
            More tokens, other stages, lengths and weights and more sources need it not.

        Raises:
            ConfigError: what was read cannot be told any more; what the mix asks cannot be given.
        """
        saved = [Segment(**values) for values in state["segments"]]
        self._keep_names(saved[-1])
        changed, refused = changes(saved[-1], self._now())
        stays = not changed
        beside = ["data.document_masking"] if self.document_masking != state["document_masking"] else []
        beside += [] if _same_place(state["after"], after) else ["data.after"]
        changed, refused = sorted([*changed, *beside]), sorted([*refused, *beside])
        if MOVES.intersection(changed):
            changed.append("order")
        if refused and not allow_change:
            return changed, refused
        self.after = state["after"]  # it is said once, where a run begins
        if token == self.curriculum.total_tokens:  # nothing is left to read
            if self.windows is None:
                self._open([], origin=0, read=False)
            self._finished = saved
        elif stays:
            self._open(saved[:-1], origin=saved[-1].first_token)
            if self.segments[-1].order != saved[-1].order:
                return ["order"], ["order"]
        else:
            self._open(left_at(saved, token), origin=token, allow_change=allow_change)
        return changed, refused

    def _keep_names(self, before: Segment) -> None:
        """A corpus that lies elsewhere is the source that it was, whatever its path calls it now, unless the user names it."""
        had: dict[str, list[str]] = {}
        for name, identity in before.shards:
            had.setdefault(name, []).append(identity)
        names = list(self.documents.names)
        for number, source in enumerate(self.mix.sources):
            if source.name is not None or names[number] in had:
                continue
            mine = [self.documents.identities[shard] for shard in np.flatnonzero(self.documents.source_of_shard == number)]
            was = next((name for name, shards in had.items() if shards == mine and name not in names), None)
            if was is not None:
                self.kept_names[names[number]], names[number] = was, was
        if self.kept_names:
            sources = [dataclasses.replace(each, name=name) for each, name in zip(self.mix.sources, names, strict=True)]
            self.mix = dataclasses.replace(self.mix, sources=tuple(sources))
            self.documents = self.documents.renamed(names)

    def _open(self, left: Sequence[Segment], *, origin: int, read: bool = True, allow_change: bool = False) -> Windows:
        """`read`: whether any of it will be; else it holds nobody up by what it could not give.

        `allow_change`: also behind what cannot be told any more.
        """
        mix = self.mix if read else dataclasses.replace(self.mix, max_repeats=None, on_cap="error")
        settings: dict[str, Any] = {"origin": origin, "cache_dir": self.cache_dir, "sources": self.mix.sources}
        past = History(left, **settings, of_another=not origin) if left else None
        if past is not None and allow_change:
            left, self.lost = past.without_lost()
            past = History(left, **settings)
        order = open_order(mix, self.documents, self.curriculum, seed=self.seed, cache_dir=self.cache_dir, past=past)
        self._check_window(order)
        settings = {"seed": self.seed, "document_masking": self.document_masking}
        if read:
            self.windows = open_windows(order, self.curriculum, packing=self.packing, **settings)
        else:
            self.windows = pack_windows(order, self.curriculum, packing="concatenate", **settings)
        self._left = list(left)
        return self.windows

    def _check_window(self, order: Order) -> None:
        """A window that holds all that the mix has would only repeat it."""
        longest = max(stage.seq_length for stage in self.curriculum.plan)
        tokens = sum(stratum.tokens for stratum in order.strata)
        if tokens > longest:
            return
        there = sum(shard.n_tokens for shard in self.documents.shards)
        has = f"the corpus has only {tokens:,} tokens"
        if there > longest:
            has = f"the length rules (drop_shorter, drop_longer) and caps leave only {tokens:,} of {there:,} tokens"
        raise ConfigError("curriculum.stages.seq_length", longest, f"{has}; take a shorter window or more text")

    def _now(self) -> Segment:
        return Segment.of(self.mix, self.documents, self.curriculum, packing=self.packing, seed=self.seed)


def _same_place(before: str | None, now: str | None) -> bool:
    """Whether two paths mean one base run: the same place, or nothing lies any more at the old one, so that it was moved."""
    if before is None or now is None:
        return before is now
    return os.path.realpath(before) == os.path.realpath(now) or not os.path.exists(before)


def report(windows: Windows) -> list[str]:
    """What a run gets, by stage and source, one sentence a line."""
    order, strata, lines = windows.order, windows.order.strata, []
    if order.facts["empty"]:
        lines.append(f"{order.facts['empty']} documents have no tokens; they are read past")
    if order.origin:
        lines.append(f"the stream goes on at token {order.origin} with what was read least before it")
    for stage, tokens in zip(windows.plan, windows.delivered, strict=True):
        shares = ", ".join(
            f"{stratum.name} {count / tokens.sum():.2%} (asked {stratum.share:.2%})"
            for stratum, count in zip(strata, tokens, strict=True)
        )
        lines.append(f"stage {stage.number}, {stage.end_token - stage.first_token} tokens: {shares}")
    packing: Packing = "best_fit" if isinstance(windows.stages[0], BestFitWindows) else "concatenate"
    lines += check_delivery(windows, packing)
    for packed in windows.stages:
        if isinstance(packed, BestFitWindows):
            share = packed.facts["padding"] / (packed.stage.end_token - packed.stage.first_token)
            cut = f"{packed.facts['cut']} documents cut, all longer than a window"
            lines.append(f"stage {packed.stage.number}: {share:.4%} padding, {cut}")
    for stratum, most, again in zip(strata, order.facts["most_repeats"], order.facts["read_again"], strict=True):
        repeats = stratum.repeats(windows.curriculum.total_tokens - order.origin)
        read = f"{again} tokens come again" if again else "none comes again"
        from_here = f" from token {order.origin} on" if order.origin else ""
        lines.append(
            f"{stratum.name}: {stratum.documents} documents come {repeats:.2f} times on average{from_here}, {most} at most "
            f"in all; {read}"
        )
    return lines
