"""Tokenizers for `prepare`: load one, train a byte-level BPE. `tokenizers` and `transformers` are imported when used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.tokenizer import open_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
_ALPHABET = 256  # byte-level BPE begins with every byte
_LARGEST_VOCABULARY = 1 << 22  # the trainer takes room for all of it at once, and ends the process where there is none


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """A tokenizer as `prepare` uses it.

    Attributes:
        name: what the user called it: a directory or a Hugging Face name.
        definition: the text of its `tokenizer.json`.
        vocab_size: highest token id + 1, added tokens included.
        eod_token, eod_id: what ends a document; None where it has none.
        bos_token, bos_id: what may begin one; likewise.
        plain_added: added tokens that are not special, by id: spelled in a text they become this one id, as everywhere else.
    """

    name: str
    definition: str
    vocab_size: int
    eod_token: str | None
    eod_id: int | None
    bos_token: str | None = None
    bos_id: int | None = None
    plain_added: Mapping[int, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of the definition: two tokenizers with the same hash give the same ids."""
        return hashlib.sha256(self.definition.encode()).hexdigest()


def load_tokenizer(name: str, eod_token: str | None = None) -> TokenizerInfo:
    """Load a tokenizer from a directory with a `tokenizer.json`, else through transformers' AutoTokenizer.

    Args:
        name: directory, or name on the Hugging Face hub.
        eod_token: the token that ends a document, if not the tokenizer's `eos_token`.

    Raises:
        ConfigError: no such tokenizer, none with a fast (Rust) form, a broken one, or an end token outside the vocabulary.
    """
    if os.path.isfile(os.path.join(name, "tokenizer.json")):
        tokenizer, named = _from_directory(name)
    elif os.path.isfile(os.path.join(name, "tokenizer.model")) and not _has_settings(name):
        tokenizer, named = _from_sentencepiece(name)
    else:
        tokenizer, named = _from_transformers(name)
    tokenizer.no_truncation()  # a length limit saved with a tokenizer would cut long documents in silence
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise ConfigError("tokenizer", name, "its vocabulary is empty; save the tokenizer again")
    eod, bos = eod_token or named.get("eos_token"), named.get("bos_token")
    if eod is not None and eod not in vocabulary:
        raise ConfigError("eod_token", eod, f"not in the vocabulary of {name}; name a token that is")
    definition, plain_added = _with_control_tokens(tokenizer.to_str(), {eod, *named.values()})
    return TokenizerInfo(
        name=name,
        definition=definition,
        vocab_size=max(vocabulary.values()) + 1,
        eod_token=eod,
        eod_id=None if eod is None else vocabulary[eod],
        bos_token=bos,
        bos_id=None if bos is None else vocabulary.get(bos),
        plain_added=plain_added,
    )


def _with_control_tokens(definition: str, names: set[str | None]) -> tuple[str, dict[int, str]]:
    """The definition with the tokens of these names special, so that their spelling in a text is text; and the tokens that
    are added without being special, white space aside."""
    values = json.loads(definition)
    added = values.get("added_tokens") or []
    wrong = [token for token in added if token["content"] in names and not token["special"]]
    for token in wrong:
        token["special"] = True
    plain = {token["id"]: token["content"] for token in added if not token["special"] and not token["content"].isspace()}
    return (json.dumps(values, ensure_ascii=False) if wrong else definition), plain


def check_hub_name(key: str, name: str) -> None:
    """Refuse at once what is neither a path nor cached while the hub is out of reach: transformers would retry for minutes.

    Raises:
        ConfigError: it cannot be a hub's name, or the hub's host cannot be found.
    """
    if os.path.exists(name):
        return
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "tokenizer_config.json"), str):
            return
    except HFValidationError:
        raise ConfigError(key, name, "no such directory, and no name of the Hugging Face hub; mend the path") from None
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # then nobody retries, or the proxy finds the host
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        raise ConfigError(key, name, f"no such directory, and {host} cannot be reached; name a directory") from None


def _from_directory(directory: str) -> tuple[Tokenizer, dict[str, str]]:
    from tokenizers import Tokenizer

    broken = "its {} is broken ({}); save the tokenizer again"
    try:
        tokenizer = Tokenizer.from_str(Path(directory, "tokenizer.json").read_text("utf-8"))
    except Exception as error:  # the Rust side raises no narrower type
        raise ConfigError("tokenizer", directory, broken.format("tokenizer.json", error)) from error
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name == "special_tokens_map.json" and "added_tokens_decoder" in settings:
            break  # transformers reads the map of older directories only
        path = Path(directory, name)
        try:
            more = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            if not isinstance(more, dict):
                raise ValueError("no JSON object")
        except (ValueError, RecursionError) as error:
            raise ConfigError("tokenizer", directory, broken.format(name, error)) from error
        settings |= more
    named = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
    if "eos_token" not in named and (settings.get("tokenizer_class") or Path(directory, "config.json").is_file()):
        named = _class_tokens(directory, set(tokenizer.get_vocab())) | named
    return tokenizer, {key: value for key, value in named.items() if isinstance(value, str)}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _class_tokens(directory: str, vocabulary: set[str]) -> dict[str, Any]:
    """The special tokens that the tokenizer's class has by default, as far as the vocabulary has them."""
    try:
        tokenizer = open_tokenizer(directory)
    except Exception:  # a class of its own code may raise anything; then the directory alone counts
        return {}
    return {key: token for key, token in tokenizer.special_tokens_map.items() if token in vocabulary} if tokenizer else {}


def _has_settings(directory: str) -> bool:
    return any(os.path.isfile(os.path.join(directory, name)) for name in ("tokenizer_config.json", "config.json"))


def _from_sentencepiece(directory: str) -> tuple[Tokenizer, dict[str, str]]:
    """A bare `tokenizer.model`: SentencePiece's own settings say what it does."""
    from transformers import LlamaTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

    path = os.path.join(directory, "tokenizer.model")
    with open(path, "rb") as file:
        if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n?", file.readline(1 << 12)):
            mend = "its tokenizer.model is tiktoken's (Llama 3's own form); name the model's Hugging Face directory instead"
            raise ConfigError("tokenizer", directory, mend)
    with _conversion_explained(directory):
        model = import_protobuf().ModelProto()
        model.ParseFromString(Path(path).read_bytes())
        if model.trainer_spec.model_type == 2 and model.trainer_spec.byte_fallback:
            tokenizer = LlamaTokenizerFast.from_pretrained(directory, legacy=True).backend_tokenizer
        else:
            tokenizer = SpmConverter(SimpleNamespace(vocab_file=path)).converted()
    spec = model.trainer_spec
    pieces = {"eos_token": (spec.eos_id, spec.eos_piece), "bos_token": (spec.bos_id, spec.bos_piece)}
    return tokenizer, {key: piece for key, (number, piece) in pieces.items() if number >= 0}


def _from_transformers(name: str) -> tuple[Tokenizer, dict[str, str]]:
    if os.path.exists(name) and not os.path.isdir(name):
        raise ConfigError("tokenizer", name, "this is a file; name the directory that holds tokenizer.json")
    if os.path.isdir(name) and not os.listdir(name):
        raise ConfigError(
            "tokenizer", name, "an empty directory; name one with a tokenizer, or train one with --train-tokenizer"
        )
    if os.path.isfile(os.path.join(name, "tekken.json")) and not _has_settings(name):
        raise ConfigError("tokenizer", name, "it holds Mistral's tekken.json; name a directory that has its tokenizer.json")
    check_hub_name("tokenizer", name)
    with _conversion_explained(name):
        tokenizer = open_tokenizer(name)
    if not tokenizer.is_fast:
        raise ConfigError(
            "tokenizer", name, "it has no fast form; save one with a tokenizer.json (save_pretrained of the fast class)"
        )
    named = {key: getattr(tokenizer, key) for key in ("eos_token", "bos_token", "pad_token", "unk_token")}
    return tokenizer.backend_tokenizer, {key: value for key, value in named.items() if value is not None}


@contextmanager
def _conversion_explained(name: str) -> Iterator[None]:
    """Any error while transformers reads or converts a tokenizer, as one sentence.

    Raises:
        ConfigError: instead of it.
    """
    try:
        yield
    except Exception as error:  # protobuf, sentencepiece and the Rust side raise types of their own
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(", or contain one of")[0]
        mend = f"no tokenizer there ({why}); name a directory or a hub name, or train one with --train-tokenizer VOCAB"
        if type(error).__name__ == "VersionError" or isinstance(error, ImportError):
            mend = f"it cannot be converted ({why}); install sentencepiece and its protobuf, or save a tokenizer.json"
        raise ConfigError("tokenizer", name, mend) from error


def read_back(definition: str, ids: np.ndarray, *, limit: int = 160) -> str:
    """Tokens as text, special ones spelled out; the middle of more than `limit` is left out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    if len(ids) <= limit:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    head, tail = ids[: 3 * limit // 4].tolist(), ids[-(limit // 4) :].tolist()
    left_out = f" [... {len(ids) - len(head) - len(tail):,} tokens ...] "
    return left_out.join(tokenizer.decode(some, skip_special_tokens=False) for some in (head, tail))


@lru_cache(maxsize=2)
def encoder(path: str) -> Tokenizer:
    """The tokenizer saved at `path` (a tokenizer.json), once a process. Special tokens spelled in a text stay text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, directory: str, notes: dict[str, Any]) -> None:
    """Train a byte-level BPE and save it as a directory that transformers loads, all at once or not at all.

    Args:
        texts: what to train on; the same texts in the same order give the same tokenizer.
        vocab_size: ids wanted, the two special tokens (end of text = begin, padding) included.
        directory: where to save; must not exist.
        notes: what goes into its `training.json`, so that a later run knows how it was made.

    Raises:
        ConfigError: a vocabulary too small for the bytes, or a text too short to fill it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        mend = f"the text yields only {tokenizer.get_vocab_size()} tokens; ask for no more, or give more text"
        raise ConfigError("train_tokenizer", vocab_size, mend)
    partial = f"{os.path.abspath(directory)}.part"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    tokenizer.save(os.path.join(partial, "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # transformers' own way to say: no limit
    }
    for name, values in {"tokenizer_config.json": settings, "training.json": notes}.items():
        Path(partial, name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    os.rename(partial, directory)


def check_vocab_size(vocab_size: int) -> None:
    """A byte-level BPE needs an id for each byte and special token.

    Raises:
        ConfigError: fewer, or more than the trainer can hold in memory.
    """
    if vocab_size > _LARGEST_VOCABULARY:
        raise ConfigError("train_tokenizer", vocab_size, f"ask for {_LARGEST_VOCABULARY} or fewer")
    if vocab_size < _ALPHABET + 2:
        raise ConfigError(
            "train_tokenizer", vocab_size, f"too few for {_ALPHABET} bytes and 2 special tokens; ask for 258 or more"
        )


def trained_with(directory: str) -> dict[str, Any] | None:
    """The notes that `train_bpe` left in a directory; None where nothing is.

    Raises:
        ConfigError: the path is taken by something that `train_bpe` did not write.
    """
    if not os.path.exists(directory) or (os.path.isdir(directory) and not os.listdir(directory)):
        return None
    try:
        return json.loads(Path(directory, "training.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        mend = "something is there that was not trained here; name another directory, or leave --train-tokenizer out to use it"
        raise ConfigError("tokenizer", directory, mend) from error
