"""What a run read before its stream changed, or before it began behind another run: segments, each under settings of its own.

A change (more tokens, another stage, other weights, another source) begins a new segment. What was read stays as it was; the
order of the new segment begins with what was read least. A segment is written into every checkpoint as plain values, from which
the documents and tokens that it read are found again: its order is a function of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.best_fit import Packing, pack_windows
from nemo_longctx.data.corpus import ShardedCorpus, open_corpus
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.documents import Documents
from nemo_longctx.data.mixture import MixConfig, SourceConfig, mix_dict
from nemo_longctx.data.order import open_order, remember_fingerprint
from nemo_longctx.data.seen import Seen

EXTENDED = ("curriculum",)  # what a stream goes on under, whatever its new value
SOURCE_RULES = ("drop_shorter", "drop_longer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a stream.

    Attributes:
        mix: fields of `MixConfig`, with absolute paths.
        curriculum: `Curriculum.as_dict`.
        packing, seed: as in the run.
        data: fingerprint of the documents.
        shards: the name of its source and the identity of each shard.
        first_token: the token of its run at which it begins.
        until: the token of its run at which it was left; None: the run is in it.
        order: digest of its visits; None: not built yet.
        lost: whether it cannot be told any more what it read, which then counts as unread.
    """

    mix: Mapping[str, Any]
    curriculum: Mapping[str, Any]
    packing: Packing
    seed: int
    data: str
    shards: Sequence[Sequence[str]]
    first_token: int = 0
    until: int | None = None
    order: str | None = None
    lost: bool = False

    @classmethod
    def of(cls, mix: MixConfig, documents: Documents, curriculum: Curriculum, *, packing: Packing, seed: int) -> Segment:
        """A segment under these settings from token 0 on."""
        values = dataclasses.asdict(mix)
        for source in values["sources"]:
            paths = [source["path"]] if isinstance(source["path"], str) else source["path"]
            source["path"] = [os.path.abspath(path) for path in paths]
        values["sources"] = list(values["sources"])
        names = [documents.names[source] for source in documents.source_of_shard.tolist()]
        return cls(
            mix=values,
            curriculum=curriculum.as_dict(),
            packing=packing,
            seed=seed,
            data=documents.fingerprint,
            shards=[list(pair) for pair in zip(names, documents.identities, strict=True)],
        )

    @property
    def made_of(self) -> dict[str, Any]:
        """All that the order of its documents depends on but what came before, by the names that a user knows; no paths."""
        return {
            "curriculum": self.curriculum,
            "data": self.data,
            "data.mix": mix_dict(build(MixConfig, self.mix, where="data.mix")),
            "data.packing": self.packing,
            "data.seed": self.seed,
        }


def changes(before: Segment, now: Segment) -> tuple[list[str], list[str]]:
    """What differs, and what of it a stream does not go on under unasked: all but lengths, stages, weights and sources."""
    old, new = before.made_of, now.made_of
    changed = [name for name in new if old[name] != new[name]]
    refused = [name for name in changed if name not in EXTENDED]
    if "data.mix" in refused and _rules(old["data.mix"], new["data.mix"]):
        refused.remove("data.mix")
    if "data" in refused and _only_more(before, now):
        refused.remove("data")
    return changed, refused


def _rules(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two mixes differ in weights and in which sources they have, alone."""
    if any(old[name] != new[name] for name in new if name != "sources"):
        return False
    known = {source["name"]: source for source in old["sources"]}
    both = [(known[source["name"]], source) for source in new["sources"] if source["name"] in known]
    return all(a[name] == b[name] for a, b in both for name in SOURCE_RULES)


def _only_more(before: Segment, now: Segment) -> bool:
    """Whether every source that is still there has all shards that it had."""
    here = {identity for _, identity in now.shards}
    names = {name for name, _ in now.shards}
    return all(identity in here for name, identity in before.shards if name in names)


class History:
    """Segments that were left, in order; what an order begins behind.

    Args:
        segments: each with `until`; those of another run (`data.after`) first.
        origin: the token of the run at which the next segment begins.
        cache_dir: where their orders are kept, or built again.
        sources: the sources of the run now, where data of theirs may lie that lies no more where it was.
        of_another: whether all of them are another run's, for what an error says.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        origin: int,
        cache_dir: str,
        sources: Sequence[SourceConfig] = (),
        of_another: bool = False,
    ):
        self.segments, self.cache_dir, self.sources = tuple(segments), cache_dir, tuple(sources)
        self.origin, self.of_another = origin, of_another

    @property
    def key(self) -> str:
        """A hash of what the segments are made of."""
        parts = [[each.made_of, each.first_token, each.until, *(["lost"] if each.lost else [])] for each in self.segments]
        return hashlib.sha256(json.dumps([parts, self.origin], sort_keys=True).encode()).hexdigest()

    def seen(self) -> Seen:
        """How often the segments read every document.

        Raises:
            ConfigError: their data are gone or changed, or their order cannot be built as it was.
        """
        seen = Seen()
        for number in range(len(self.segments)):
            seen = self._seen_in(number, seen)
        return seen

    def without_lost(self) -> tuple[list[Segment], list[str]]:
        """The segments, those marked of which it cannot be told what they read; and of each of these a sentence."""
        kept, said, seen = list(self.segments), [], Seen()
        for number in range(len(kept)):
            told = History(kept, origin=self.origin, cache_dir=self.cache_dir, sources=self.sources)
            try:
                seen = told._seen_in(number, seen)
            except ConfigError as error:
                kept[number] = dataclasses.replace(kept[number], lost=True)
                said.append(str(error).partition(";")[0])
        return kept, said

    def _seen_in(self, number: int, seen: Seen) -> Seen:
        """`seen`, and what segment `number` read on top of it."""
        segment = self.segments[number]
        if segment.lost:
            return seen
        before = _Known(History(self.segments[:number], origin=segment.first_token, cache_dir=self.cache_dir), seen)
        mix, documents = self._found(segment)
        curriculum, past = _curriculum(segment.curriculum), before if number or segment.first_token else None
        order = open_order(mix, documents, curriculum, seed=segment.seed, cache_dir=self.cache_dir, past=past)
        if documents.fingerprint != segment.data or segment.order not in (None, order.digest):
            what = "its data changed since" if documents.fingerprint != segment.data else "this version orders it otherwise"
            mend = f"what was read up to token {segment.until} cannot be told any more, as {what}; {self._mend('restore them')}"
            raise ConfigError("data.mix.sources", [source.label for source in mix.sources], mend)
        windows = pack_windows(order, curriculum, packing=segment.packing, seed=segment.seed, document_masking=False)
        return seen.after(order.documents, windows.read(int(segment.until or 0)))

    def _mend(self, restore: str) -> str:
        otherwise = "leave data.after out" if self.of_another else "set data.allow_change=true"
        return f"{restore}, or {otherwise}, and its documents may come again"

    def _found(self, segment: Segment) -> tuple[MixConfig, Documents]:
        """A segment's mix and documents: at their old places, at those of the sources of their names now, or, where other data
        lie there, shard by shard wherever sources of now have them.
        """
        asked = build(MixConfig, segment.mix, where="data.mix")
        now = {source.label: source.path for source in self.sources}
        there = {source.label: _opens(source.path) for source in asked.sources}
        paths = {label: path for label, path in now.items() if not there.get(label, True)}
        mix = _at(asked, paths)
        if all(there[source.label] or source.label in now for source in asked.sources):
            documents = Documents.open(mix)
            remember_fingerprint(documents, self.cache_dir)
            if documents.fingerprint == segment.data:
                return mix, documents
        places: dict[str, str] = {}  # identity of a shard -> its prefix
        for path in (*(source.path for source in mix.sources), *now.values()):
            if _opens(path):
                corpus = open_corpus(path)
                shards = corpus.shards if isinstance(corpus, ShardedCorpus) else (corpus,)
                places |= {shard.identity(): shard.prefix for shard in shards}
        for source in asked.sources:
            wanted = [identity for name, identity in segment.shards if name == source.label]
            if wanted and all(identity in places for identity in wanted):
                paths[source.label] = tuple(places[identity] for identity in wanted)
            elif not there[source.label] and source.label not in now:
                where = f"up to token {segment.until} the run read it at {source.path}, where it is no more"
                mend = f"{where}; {self._mend('put it back')}"
                raise ConfigError("data.mix.sources", source.label, mend)
        mix = _at(asked, paths)
        return mix, Documents.open(mix)


class _Known:
    """A history whose outcome is known already."""

    def __init__(self, history: History, seen: Seen):
        self.origin, self.key, self._seen = history.origin, history.key, seen

    def seen(self) -> Seen:
        return self._seen


def _opens(path: str | Sequence[str]) -> bool:
    try:
        open_corpus(path)
    except ConfigError:
        return False
    return True


def _at(mix: MixConfig, paths: Mapping[str, str | Sequence[str]]) -> MixConfig:
    """`mix` with some sources, by their names, at other paths."""
    sources = [
        dataclasses.replace(source, path=paths[source.label], name=source.label) if source.label in paths else source
        for source in mix.sources
    ]
    return dataclasses.replace(mix, sources=tuple(sources))


def _curriculum(values: Mapping[str, Any]) -> Curriculum:
    """The curriculum that `Curriculum.as_dict` is of, as far as the stream knows it."""
    total = values["total_tokens"]
    stages = [{"until": stage["end_token"] / total, "seq_length": stage["seq_length"]} for stage in values["stages"]]
    return build(Curriculum, {**values, "stages": stages}, where="curriculum")
