"""The tokenizer of a run of `prepare`: loaded, or trained on its own input, by one run at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.data.long_text import pieces_of
from nemo_longctx.data.prepare_config import PrepareConfig
from nemo_longctx.data.readers import Part, read_part
from nemo_longctx.data.shards import bad_record, is_held_out
from nemo_longctx.data.tokenization import TokenizerInfo, load_tokenizer, train_bpe, trained_with

_TRAINED_ON = 16 << 20  # bytes of text, where the settings say nothing


def tokenizer_of(
    config: PrepareConfig, sources: list[list[Part]], input_hash: str, say: Callable[[str], None]
) -> TokenizerInfo:
    """Load the tokenizer that the settings name; train it first where they ask for that and it is not there.

    Args:
        config: settings.
        sources: the input, by shards.
        input_hash: says which input that is, for the notes of a trained tokenizer.
        say: gets a line for the user.

    Raises:
        ConfigError: no such tokenizer, or one that was trained otherwise.
    """
    if config.train_tokenizer is None:
        return load_tokenizer(config.tokenizer, config.eod_token)
    wanted = {
        "vocab_size": config.train_tokenizer,
        "bytes": _training_bytes(config),
        "input": input_hash,
        "tokenizers": version("tokenizers"),
    }
    with _one_at_a_time(config.tokenizer, say):
        _train(config, sources, wanted, say)
    return load_tokenizer(config.tokenizer, config.eod_token)


def _train(config: PrepareConfig, sources: list[list[Part]], wanted: dict[str, Any], say: Callable[[str], None]) -> None:
    """Train the tokenizer, unless the same one is there."""
    vocab_size = wanted["vocab_size"]
    notes = trained_with(config.tokenizer)
    if notes is None:
        total = sum(part.n_bytes for shard in sources for part in shard)
        amount = min(total, _training_bytes(config))
        say(f"training a byte-level BPE of {vocab_size} tokens on {amount / 1e6:.1f} MB of the input")
        train_bpe(sample_texts(config, sources, total), vocab_size, config.tokenizer, wanted)
    elif notes != wanted:
        changed = ", ".join(sorted(key for key in wanted if notes.get(key) != wanted[key]))
        mend = (
            f"a tokenizer trained otherwise is there ({changed} differ); name another directory, or leave --train-tokenizer out"
        )
        raise ConfigError("tokenizer", config.tokenizer, mend)


@contextmanager
def _one_at_a_time(directory: str, say: Callable[[str], None]) -> Iterator[None]:
    """Two runs that train the same tokenizer: the second waits, and finds it. The lock beside it goes with the last."""
    path = f"{os.path.abspath(directory)}.lock"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another run trains {directory}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not os.path.exists(path) or os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                continue  # the run before took its lock away
            try:
                yield
                return
            finally:
                os.unlink(path)


def _training_bytes(config: PrepareConfig) -> int:
    return _TRAINED_ON if config.train_tokenizer_bytes is None else config.train_tokenizer_bytes


def sample_texts(config: PrepareConfig, sources: list[list[Part]], total: int) -> Iterator[str]:
    """Documents for the tokenizer, up to its bytes, spread evenly over the input; none of the holdout, none that is bad."""
    share = min(1.0, _training_bytes(config) / total)
    allowed = taken = 0.0
    for part in (part for shard in sources for part in shard):
        allowed += share * part.n_bytes
        if taken >= allowed:
            continue
        for record in read_part(part, config.keys, replace=config.replace_invalid):
            if record.error and config.on_error == "fail":
                raise bad_record(part, record)
            if record.error or is_held_out(record.text, config.holdout, config.seed):
                continue
            for piece in pieces_of(record.text):
                yield piece
                taken += len(piece.encode())
                if taken >= allowed:
                    break
            if taken >= allowed:
                break
