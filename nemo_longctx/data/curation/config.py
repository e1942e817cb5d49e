"""Settings of `curate`."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.data.curation.duplicates import bands_for
from nemo_longctx.data.curation.scores import PERMUTATIONS
from nemo_longctx.data.engines import ENGINES
from nemo_longctx.data.inputs import FORMATS
from nemo_longctx.data.opening import check_local

ASSEMBLE = ("repositories", "chapters", "threads")


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Settings of `curate`.

    Attributes:
        inputs: files, directories, and URLs of either, as `prepare` takes them.
        output: the file of documents that stay, a name that ends in .jsonl.
        keys: which texts of a record; see `prepare`.
        globs: which files of directories.
        format: one of `inputs.FORMATS`, or `auto`.
        assemble: one of `ASSEMBLE`: make long documents of what belongs together; None takes them as they are.
        group, order, parent: keys of a record that say what it belongs to, its place there, and (threads) what it answers.
            Of files: the folder (of repositories, the first below INPUT) and the name. None: what is usual for the kind.
        tokenizer: lengths are counted in its tokens; None counts characters.
        min_length, max_length: of a document that stays, both included.
        split_lengths: edges of length buckets, each written to a file of its own; empty writes one file.
        gzip_band: quantiles of compressibility, within each doubling of length, between which documents stay; None keeps all.
        near_duplicates: Jaccard similarity of shingles of 5 words from which on two documents are one; 0: exact ones only.
        max_repeated_lines, max_repeated_words, max_boilerplate: shares; see `scores.Scores`. 1 keeps all.
        languages: codes (ISO 639-1) that stay; empty keeps all, and does not look.
        workers, engine, shard_bytes, force: see `prepare`.

    Raises:
        ConfigError: a value out of its range, or a library that is not installed.
    """

    inputs: tuple[str, ...]
    output: str
    keys: tuple[str, ...] = ("text",)
    globs: tuple[str, ...] = ()
    format: str = "auto"
    assemble: str | None = None
    group: str | None = None
    order: str | None = None
    parent: str | None = None
    tokenizer: str | None = None
    min_length: int = 1
    max_length: int | None = None
    split_lengths: tuple[int, ...] = ()
    gzip_band: tuple[float, ...] | None = None
    near_duplicates: float = 0.8
    max_repeated_lines: float = 0.3
    max_repeated_words: float = 0.3
    max_boilerplate: float = 0.2
    languages: tuple[str, ...] = ()
    workers: int | None = None
    engine: str = "processes"
    shard_bytes: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for key, known in {"format": ("auto", *FORMATS), "engine": tuple(ENGINES), "assemble": (None, *ASSEMBLE)}.items():
            value = getattr(self, key)
            if value not in known:
                raise ConfigError(key, value, did_you_mean(str(value), [each for each in known if each is not None]))
        if not self.inputs or not self.keys:
            raise ConfigError("input" if not self.inputs else "keys", (), "name at least one")
        if not all(key.strip("? ") for key in self.keys):
            raise ConfigError("keys", ",".join(self.keys), "a name between commas is empty; leave that comma out")
        if len(set(self.keys)) < len(self.keys):
            raise ConfigError("keys", ",".join(self.keys), "a key is named twice, so its text would come twice; name it once")
        check_local("output", self.output)
        if not self.output.endswith(".jsonl") or self.output.rpartition("/")[2] == ".jsonl":
            raise ConfigError("output", self.output, "it is written as JSON lines; give a name that ends in .jsonl")
        for key in ("min_length", "max_length", "workers", "shard_bytes"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "use 1 or more")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ConfigError("max_length", self.max_length, f"below min_length={self.min_length}; nothing would stay")
        if any(edge < 1 for edge in self.split_lengths) or list(self.split_lengths) != sorted(set(self.split_lengths)):
            raise ConfigError("split_lengths", self.split_lengths, "edges of buckets in rising order, such as 8192,32768")
        for key in ("max_repeated_lines", "max_repeated_words", "max_boilerplate"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(key, getattr(self, key), "a share from 0 to 1")
        band = self.gzip_band
        if band is not None and (len(band) != 2 or not 0 <= band[0] < band[1] <= 1):
            raise ConfigError("gzip_band", band, "two quantiles in rising order, such as 0.2,0.8")
        self._check_assembly()
        self._check_near()
        if odd := [code for code in self.languages if not re.fullmatch("[a-z]{2}", code)]:
            raise ConfigError(
                "languages", odd[0], "no language has this code; write ISO 639-1's two small letters, such as en,de"
            )
        if self.languages and importlib.util.find_spec("py3langid") is None:
            raise ConfigError("languages", self.languages, "needs py3langid; pip install py3langid, or leave it out")

    def _check_assembly(self) -> None:
        for key in ("group", "order", "parent"):
            if getattr(self, key) is not None and self.assemble is None:
                raise ConfigError(key, getattr(self, key), "it has no effect without --assemble")
        if self.parent is not None and self.assemble != "threads":
            raise ConfigError("parent", self.parent, "only threads have answers; use it with --assemble threads")

    def _check_near(self) -> None:
        if not self.near_duplicates:
            return
        if not 0 < self.near_duplicates <= 1:
            raise ConfigError("near_duplicates", self.near_duplicates, "a similarity from 0.3 to 1, or 0 for exact only")
        bands_for(self.near_duplicates, PERMUTATIONS)
        if importlib.util.find_spec("rensa") is None:
            mend = "needs rensa; pip install 'nemo-longctx[curate]', or --near-duplicates 0 for exact duplicates only"
            raise ConfigError("near_duplicates", self.near_duplicates, mend)
