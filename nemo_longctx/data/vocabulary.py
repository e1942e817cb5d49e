"""Whether the tokens of corpora are those of the model: by what lies beside a corpus, and by the tokens themselves.

`prepare` writes the tokenizer's hash and size into the JSON beside a corpus. Other tools write none: of such a corpus a sample
is looked at before the first step, and every window once more when it is read, which costs a maximum over it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import Corpus, IndexedCorpus, ShardedCorpus, open_corpus
from nemo_longctx.files import read_mapping

SAMPLED = 1 << 25  # tokens of a corpus that are looked at before the first step: some 20 ms
RUN = 1 << 13  # tokens of one look


def check_corpora(
    paths: Mapping[str, str | Sequence[str]], *, vocab_size: int | None = None, tokenizer: str | None = None
) -> None:
    """Make sure that all corpora of a run have the tokens of one tokenizer, and no id beyond the model's vocabulary.

    Args:
        paths: key of the setting -> corpus (`open_corpus`).
        vocab_size: of the model; None: not compared.
        tokenizer: `data.tokenizer`, compared where it is a directory (another one costs a look at the hub).

    Raises:
        ConfigError: two tokenizers, or ids that the model has no row for.
    """
    made_by: dict[str, tuple[str, str, dict[str, Any]]] = {}  # hash -> the first that has it
    if tokenizer is not None and os.path.isfile(os.path.join(str(tokenizer), "tokenizer.json")):
        from nemo_longctx.data.tokenization import load_tokenizer

        info = load_tokenizer(str(tokenizer))
        made_by[info.sha256] = ("data.tokenizer", str(tokenizer), {"vocab_size": info.vocab_size})
    for key, path in paths.items():
        corpus = _opened(key, path)
        for shard, made in _made(corpus):
            size = made.get("vocab_size") or 0
            if vocab_size is not None and size > vocab_size:
                mend = f"the corpus {shard} was made with a tokenizer of {size} tokens; prepare it with the model's own"
                mend += f" (a model with new weights takes model.vocab_size={size})"
                raise ConfigError("model.vocab_size", vocab_size, mend)
            digest = made.get("sha256")
            if digest is None:
                continue
            made_by.setdefault(digest, (key, shard, made))
            if len(made_by) > 1:
                (first_key, first, _), (_, second, _) = list(made_by.values())[:2]
                mend = (
                    f"its tokens are of another tokenizer than {first_key}={first!r}: the hashes beside them differ, "
                    "so the same id means another text; prepare all with one tokenizer"
                )
                raise ConfigError(key, second, mend)
        if vocab_size is not None:
            check_sample(corpus, vocab_size)


def not_the_base_s(base: Path, paths: Iterable[str | Sequence[str]], tokenizer: str | None = None) -> str | None:
    """A sentence where tokens are of another tokenizer than a base model carries; None where they are its own, or nothing says.

    It is no refusal: one tokenizer in two forms has two hashes, and which ids they give is compared where both are at hand.

    Args:
        base: a NeMo checkpoint.
        paths: corpora.
        tokenizer: `data.tokenizer`.
    """
    from nemo_longctx.data.tokenization import load_tokenizer

    carried = [each.parent for each in (base / "context").glob("*/tokenizer.json")]
    if len(carried) != 1:
        return None
    found: dict[str, tuple[str, str]] = {}  # hash -> who has it, and where it lies
    if tokenizer is not None and os.path.isfile(os.path.join(tokenizer, "tokenizer.json")):
        found[load_tokenizer(tokenizer).sha256] = ("data.tokenizer", tokenizer)
    for path in paths:
        for shard, made in _made(open_corpus(path)):
            found.setdefault(str(made.get("sha256")), (f"the corpus {shard}", str(made.get("name"))))
    own = load_tokenizer(str(carried[0])).sha256
    for digest, (what, name) in found.items():
        if digest not in (own, "None") and not _same_ids(carried[0], Path(name)):
            return f"{what} is of the tokenizer {name}, and {base} carries another: an id may mean another text to the model"
    return None


def _same_ids(one: Path, other: Path) -> bool:
    """Whether two folders' tokenizers, both there, cut and number text alike; what is put around it does not count."""
    parts = ("model", "added_tokens", "normalizer", "pre_tokenizer")
    both = [read_mapping(folder / "tokenizer.json") for folder in (one, other)]
    return all(both) and all(both[0].get(part) == both[1].get(part) for part in parts)


def _opened(key: str, path: str | Sequence[str]) -> Corpus:
    """The corpus at a setting's path; that it is missing is said by the setting, with what a held-out set needs."""
    try:
        return open_corpus(path)
    except ConfigError as error:
        held_out = key.startswith(("data.validation", "data.test"))
        mend = f"; `prepare --holdout 0.02` writes PREFIX_holdout beside PREFIX, and {key.partition('[')[0]}=[] does without"
        raise ConfigError(key, path, error.mend + (mend if held_out else "")) from error


def _made(corpus: Corpus) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prefix and tokenizer, as the JSON beside each shard says, or that beside the directory of all of them."""
    shards = corpus.shards if isinstance(corpus, ShardedCorpus) else (corpus,)
    told = False
    for shard in shards:
        if made := shard.provenance.get("tokenizer"):
            told = True
            yield shard.prefix, made
    if not told and (made := corpus.provenance.get("tokenizer")):
        yield corpus.prefix, made


def check_ids(corpus: Corpus, tokenizer: Any) -> None:
    """Refuse a corpus whose ids are other texts to a model's tokenizer, where the one that made it is still at hand.

    Reserved tokens may have been named and others added since: a tenth of the ids may differ.

    Args:
        corpus: opened.
        tokenizer: transformers', of the model that is to read it.

    Raises:
        ConfigError: with an id that both know by another token.
    """
    for shard, made in _made(corpus):
        theirs = _tokens_of(str(made.get("name")), str(made.get("sha256")))
        if not theirs:
            continue
        ours = {number: token for token, number in tokenizer.get_vocab().items()}
        other = [number for number in theirs if ours.get(number) != theirs[number]]
        if len(other) > len(theirs) // 10:
            number = min(other)
            mend = (
                f"its tokens are of another tokenizer ({made['name']}): {len(other):,} of {len(theirs):,} ids are other tokens "
                f"to the model's, {number} is {theirs[number]!r} there and {ours.get(number)!r} here; prepare the text with "
                "the model's own tokenizer"
            )
            raise ConfigError("corpus", shard, mend)


@lru_cache(maxsize=4)
def _tokens_of(name: str, sha256: str) -> dict[int, str]:
    """Number -> token of the tokenizer that `prepare` noted beside a corpus; empty where it is there no more."""
    if not os.path.isdir(name):
        return {}
    from tokenizers import Tokenizer

    from nemo_longctx.data.tokenization import load_tokenizer

    try:
        info = load_tokenizer(name)
    except ConfigError:
        return {}
    same = info.sha256 == sha256
    return {number: token for token, number in Tokenizer.from_str(info.definition).get_vocab().items()} if same else {}


def check_sample(corpus: Corpus, vocab_size: int) -> None:
    """Look at up to `SAMPLED` tokens of a corpus, all of a small one, spread evenly over a large one.

    Raises:
        ConfigError: an id that the vocabulary has not.
    """
    for shard in corpus.shards if isinstance(corpus, ShardedCorpus) else (corpus,):
        if np.iinfo(shard.dtype).max < vocab_size and np.iinfo(shard.dtype).min == 0:
            continue
        for start, stop in _looks(shard, SAMPLED * shard.n_tokens // corpus.n_tokens):
            tokens = shard.read(start, stop)
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= vocab_size:
                raise _beyond(shard.prefix, low if low < 0 else high, vocab_size)


def _looks(shard: IndexedCorpus, tokens: int) -> Iterator[tuple[int, int]]:
    n = shard.n_tokens
    looks = max(1, min(tokens, n) // RUN) if tokens < n else -(-n // RUN)
    for number in range(looks):
        start = number * (n - RUN) // max(1, looks - 1)
        yield start, min(start + RUN, n)


def bad_token(
    shards: Sequence[IndexedCorpus],
    offsets: np.ndarray,
    visits: np.ndarray,
    edges: Sequence[int],
    tokens: np.ndarray,
    vocab_size: int,
) -> ConfigError:
    """The sentence for a window that holds an id beyond the vocabulary, by document and corpus.

    Args:
        shards, offsets: of `Documents`.
        visits: document numbers of the window, [n].
        edges: where each of them ends in `tokens`, [n].
        tokens: what was read.
        vocab_size: of the model.
    """
    place = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    document = int(visits[int(np.searchsorted(np.asarray(edges), place, side="right"))])
    shard = int(np.searchsorted(offsets, document, side="right")) - 1
    return _beyond(shards[shard].prefix, int(tokens[place]), vocab_size, document=document - int(offsets[shard]))


def _beyond(prefix: str, token: int, vocab_size: int, document: int | None = None) -> ConfigError:
    where = "it" if document is None else f"document {document}"
    beside = "" if Path(f"{prefix}.json").is_file() else ", and no JSON beside it says by which tokenizer it was made"
    mend = f"{where} holds the token id {token}, the model's vocabulary has {vocab_size} (model.vocab_size){beside}"
    return ConfigError("corpus", prefix, f"{mend}; prepare it with the model's own tokenizer")
