"""Settings of `prepare`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.data.engines import ENGINES
from nemo_longctx.data.inputs import FORMATS
from nemo_longctx.data.opening import check_local
from nemo_longctx.data.tokenization import check_vocab_size


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of `prepare`.

    Attributes:
        inputs: files, or directories (see `inputs.find_files`), or URLs of either, read through fsspec.
        output: prefix of the corpus, without .bin or .idx; `OUTPUT_holdout` is the holdout's.
        tokenizer: directory or Hugging Face name; with `train_tokenizer`, the directory to save the new one in.
        train_tokenizer: vocabulary of a byte-level BPE to train on the input; None uses `tokenizer` as it is.
        train_tokenizer_bytes: how much text to train it on, spread evenly over the input; None is 16 MiB.
        keys: which texts of a record; several are joined by an empty line, one that ends in `?` may be missing.
        globs: which files of the directories.
        format: one of `inputs.FORMATS`, or `auto`: by the file's name.
        bos: begin each document with the tokenizer's `bos_token`.
        append_eod: end each document with `eod_token` (by default the tokenizer's `eos_token`).
        on_error: `fail` at the first bad record, or `skip` and list them.
        replace_invalid: put U+FFFD for bytes that are not UTF-8 and for half a surrogate pair, rather than call a record bad.
        holdout: share of the documents, by a hash of their text, for the holdout corpus.
        max_input_bytes: take whole files, in an order drawn from `seed`, until they hold so much; None takes all.
        max_file_bytes: pass over larger files, so that no single one is a large part of the corpus or of its holdout.
        seed: of the holdout and the choice of files.
        workers: processes; None is one a core.
        engine: `processes` or `ray`.
        keep_shards: leave the shards unmerged, as a directory OUTPUT that `corpus.open_corpus` reads as one.
        shard_bytes: input per shard; None is 1/64 of the whole, within 1 to 256 MiB.
        force: replace an output that other settings made.

    Raises:
        ConfigError: a value out of its range.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: str
    train_tokenizer: int | None = None
    train_tokenizer_bytes: int | None = None
    keys: tuple[str, ...] = ("text",)
    globs: tuple[str, ...] = ()
    format: str = "auto"
    bos: bool = False
    append_eod: bool = True
    eod_token: str | None = None
    on_error: str = "fail"
    replace_invalid: bool = False
    holdout: float = 0.0
    max_input_bytes: int | None = None
    max_file_bytes: int | None = None
    seed: int = 1234
    workers: int | None = None
    engine: str = "processes"
    keep_shards: bool = False
    shard_bytes: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for key, known in {"format": ("auto", *FORMATS), "on_error": ("fail", "skip"), "engine": tuple(ENGINES)}.items():
            if getattr(self, key) not in known:
                raise ConfigError(key, getattr(self, key), did_you_mean(str(getattr(self, key)), known))
        for key in ("train_tokenizer_bytes", "max_input_bytes", "max_file_bytes", "workers", "shard_bytes"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "use 1 or more")
        if not 0 <= self.holdout < 1:
            raise ConfigError("holdout", self.holdout, "a share of the documents, from 0 to below 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "use a number from 0 to 2**63 - 1")
        if not self.inputs or not self.keys:
            key = "input" if not self.inputs else "keys"
            raise ConfigError(key, (), "name at least one")
        if not all(key.strip("? ") for key in self.keys):
            raise ConfigError("keys", ",".join(self.keys), "a name between commas is empty; leave that comma out")
        if len(set(self.keys)) < len(self.keys):
            raise ConfigError("keys", ",".join(self.keys), "a key is named twice, so its text would come twice; name it once")
        if self.keep_shards:  # a directory, which may be named with a slash at its end
            object.__setattr__(self, "output", self.output.rstrip("/"))
        _check_output(self.output)
        if self.train_tokenizer is not None:
            check_vocab_size(self.train_tokenizer)
        elif self.train_tokenizer_bytes is not None:
            mend = "has no effect without train_tokenizer, the vocabulary of the tokenizer to train; set both or neither"
            raise ConfigError("train_tokenizer_bytes", self.train_tokenizer_bytes, mend)
        if not self.append_eod and self.eod_token is not None:
            raise ConfigError("eod_token", self.eod_token, "it is not appended with append_eod off; drop one of the two")


def _check_output(output: str) -> None:
    """Refuse an output whose files would not lie where its name says."""
    check_local("output", output)
    if output.endswith((".bin", ".idx")):
        raise ConfigError("output", output, f"is a prefix, to which .bin and .idx are added; name it {output[:-4]!r}")
    if os.path.basename(output) in ("", ".", ".."):
        mend = "has no name of its own to which .bin and .idx could be added; put one behind it, say 'data/corpus'"
        raise ConfigError("output", output, mend)
