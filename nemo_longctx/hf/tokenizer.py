"""Tokenizer files: their tokens against the model's vocabulary, and a copy that transformers 4 loads.

transformers 5 writes classes (`TokenizersBackend`) and lists (`extra_special_tokens`) that 4 ends in a traceback over.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import read_json
from nemo_longctx.hf.files import KEY

CONFIG, FAST, SENTENCEPIECE = "tokenizer_config.json", "tokenizer.json", "tokenizer.model"
SPECIAL = "special_tokens_map.json"
NO_LIMIT = int(1e30)  # transformers' own way to say: any length
# Files that a tokenizer may be made of; everything else of a directory is another thing's.
FILES = (
    CONFIG, FAST, SENTENCEPIECE, SPECIAL, "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "chat_template.jinja", "chat_template.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_CARRIERS = (FAST, SENTENCEPIECE, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_TEMPLATES = "additional_chat_templates"  # a folder of *.jinja, from transformers 4.51 on
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_CLASSES = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "LLaMATokenizer": "LlamaTokenizer",  # the second one is of the first Llamas
    "PreTrainedTokenizer": "PreTrainedTokenizerFast",
}
_V5_ONLY = ("backend", "is_local", "local_files_only", "fix_mistral_regex")


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has the files of a tokenizer at all."""
    return any((directory / name).is_file() for name in (*_CARRIERS, CONFIG))


def in_other_words(directory: Path) -> bool:
    """Whether `tokenizer_config.json` has a class or a list that transformers 4 does not load (5's, the first Llamas')."""
    settings = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    kind = settings.get("tokenizer_class")
    return str(kind).endswith("Backend") or str(kind) in _CLASSES or isinstance(settings.get("extra_special_tokens"), list)


def other_tokenizer(directory: Path) -> str | None:
    """The file of a tokenizer that is none of transformers' (Mistral's tekken.json, tiktoken's)."""
    names = ("tekken.json", "tokenizer.model.v3", "tiktoken.model", "qwen.tiktoken")
    return next((name for name in names if (directory / name).is_file()), None)


def tokens_of(directory: Path) -> dict[str, int]:
    """Token -> number of a directory's tokenizer, added tokens included.

    Raises:
        ConfigError: a file that cannot be read, or one that is not what its name says.
    """
    tokens: dict[str, int] = {}
    if (directory / FAST).is_file():
        whole = read_json(directory / FAST)
        tokens |= _vocabulary(directory / FAST, whole)
    elif (directory / SENTENCEPIECE).is_file():
        tokens |= _pieces(directory / SENTENCEPIECE)
    elif (directory / "vocab.json").is_file():
        tokens |= _numbered(directory / "vocab.json", read_json(directory / "vocab.json"))
    fast = (directory / FAST).is_file()
    if (directory / "added_tokens.json").is_file():
        path = directory / "added_tokens.json"
        tokens = _joined(path, tokens, _numbered(path, read_json(path)), fast=fast)
    settings = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    return _joined(directory / CONFIG, tokens, _added(directory / CONFIG, settings.get("added_tokens_decoder")), fast=fast)


def _joined(path: Path, tokens: Mapping[str, int], added: Mapping[str, int], *, fast: bool) -> dict[str, int]:
    """`tokens` with those that `path` adds, whose numbers must be those that transformers gives them.

    Args:
        fast: `tokens` are a tokenizer.json's, behind which transformers numbers what it lacks without a hole.
    """
    made = dict(tokens)
    for token, number in sorted(added.items(), key=lambda each: each[1]):
        new = {len(made), max(made.values(), default=-1) + 1} if fast else {number}  # two where the vocabulary has holes
        given = {made[token]} if token in made else new
        if number not in given:
            loaded = " or ".join(map(str, sorted(given)))
            mend = (
                f"gives token {token!r} the number {number}, where transformers loads it as {loaded}; save the tokenizer again"
            )
            raise ConfigError(KEY, str(path), mend)
        made[token] = number
    return made


def check_tokenizer(directory: Path, vocab_size: int) -> None:
    """Every token of the tokenizer has a row in the embedding.

    Raises:
        ConfigError: a file that cannot be read, or a token beyond `vocab_size`, by its name.
    """
    if (directory / CONFIG).is_file() and not any((directory / name).is_file() for name in _CARRIERS):
        raise ConfigError(KEY, str(directory), f"has {CONFIG}, but neither {FAST} nor {SENTENCEPIECE}; copy the tokenizer too")
    settings = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    as_transformers_4(settings)
    if settings.get("added_tokens_decoder") is None and (directory / SPECIAL).is_file():  # else it is not read
        _check_special(read_json(directory / SPECIAL), SPECIAL)
    tokens = tokens_of(directory)
    check_numbers(tokens | added_on_loading(directory, tokens), vocab_size)


def added_on_loading(directory: Path, tokens: Mapping[str, int]) -> dict[str, int]:
    """Special tokens that a directory names and its vocabulary has not: transformers numbers them behind all others.

    Args:
        directory: of the tokenizer.
        tokens: `tokens_of` it.
    """
    settings = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    places = [settings]
    if settings.get("added_tokens_decoder") is None and (directory / SPECIAL).is_file():  # else it is not read
        places.append(read_json(directory / SPECIAL))
    named: list[Any] = []
    for place in places:
        named += [place.get(key) for key in _NAMED]
        for some in (place.get("extra_special_tokens"), place.get("additional_special_tokens")):
            named += some.values() if isinstance(some, Mapping) else some if isinstance(some, list) else ()
    contents = [each for each in map(_content, named) if isinstance(each, str) and each]
    new = [each for each in dict.fromkeys(contents) if each not in tokens]
    return {token: max(tokens.values(), default=-1) + 1 + number for number, token in enumerate(new)}


def check_numbers(tokens: Mapping[str, int], vocab_size: int) -> None:
    """Refuse tokens beyond the embedding.

    Raises:
        ConfigError: naming the first, and how many there are.
    """
    beyond = sorted((number, token) for token, number in tokens.items() if number >= vocab_size)
    if beyond:
        number, token = beyond[0]
        more = f", one of {len(beyond)} tokens" if len(beyond) > 1 else ""
        mend = (
            f"is number {number}{more} beyond the embedding's {vocab_size} rows; take it out of the tokenizer, take "
            "the tokenizer of this model, or resize the embedding (transformers: "
            "model.resize_token_embeddings) and save the model again"
        )
        raise ConfigError("tokenizer", token, mend)


def _vocabulary(path: Path, whole: Mapping[str, Any]) -> dict[str, int]:
    model = whole.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), (Mapping, list)):
        raise ConfigError(KEY, str(path), "has no model.vocab, which a tokenizer.json has; save the tokenizer again")
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram's pairs of piece and score
        if any(not isinstance(each, list) or not each or not isinstance(each[0], str) for each in vocabulary):
            raise ConfigError(
                KEY, str(path), "its model.vocab holds other things than pieces and scores; save the tokenizer again"
            )
        tokens = {each[0]: number for number, each in enumerate(vocabulary)}
    else:
        tokens = _numbered(path, vocabulary)
    added = whole.get("added_tokens")
    if added is None:
        return tokens
    if not isinstance(added, list) or any(not isinstance(each, Mapping) for each in added):
        raise ConfigError(KEY, str(path), "its added_tokens must be a list of tokens; save the tokenizer again")
    return tokens | _numbered(path, {each.get("content"): each.get("id") for each in added})


def _numbered(path: Path, values: Mapping[Any, Any]) -> dict[str, int]:
    for token, number in values.items():
        if not isinstance(token, str) or isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ConfigError(KEY, str(path), f"gives token {token!r} the number {number!r}; save the tokenizer again")
    return dict(values)


def _added(path: Path, decoder: object) -> dict[str, int]:
    """`added_tokens_decoder` of transformers 4: number, as text, -> token and how it is matched."""
    if decoder is None:
        return {}
    wrong = ConfigError(KEY, str(path), "its added_tokens_decoder must map numbers to tokens; save the tokenizer again")
    if not isinstance(decoder, Mapping):
        raise wrong
    tokens = {}
    for number, token in decoder.items():
        content = token.get("content") if isinstance(token, Mapping) else None
        flags = (
            [token.get(key, False) for key in ("lstrip", "rstrip", "normalized", "single_word", "special")] if content else []
        )
        if not (isinstance(number, str) and number.isdecimal() and number.isascii() and isinstance(content, str)):
            raise wrong
        if any(not isinstance(flag, bool) for flag in flags):
            raise wrong
        tokens[content] = int(number)
    return tokens


def _pieces(path: Path) -> dict[str, int]:
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, TypeError) as error:
        raise ConfigError(KEY, str(path), "is no SentencePiece model; copy or download it again") from error
    return {pieces.IdToPiece(number): number for number in range(pieces.GetPieceSize())}


def as_transformers_4(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A `tokenizer_config.json` in the words of transformers 4: classes and special tokens.

    Raises:
        ConfigError: a special token, a limit or a list of another kind than the tokenizer's.
    """
    made = {key: value for key, value in settings.items() if key not in _V5_ONLY}
    kind = made.get("tokenizer_class")
    if kind is not None and (not isinstance(kind, str) or not kind.isidentifier()):
        raise ConfigError("tokenizer_class", kind, f"must name a class of transformers, in {CONFIG}")
    if kind in _CLASSES or (kind or "").endswith("Backend"):
        made["tokenizer_class"] = _CLASSES.get(str(kind), "PreTrainedTokenizerFast")
    _check_special(made, CONFIG)
    for key in _NAMED:
        if isinstance(made.get(key), Mapping):
            made[key] = {"__type": "AddedToken", **made[key]}  # without it transformers takes no mapping
    extra = made.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 5's name of additional_special_tokens; 4 takes a mapping there
        del made["extra_special_tokens"]
        named = [_content(made.get(key)) for key in _NAMED]
        kept = [token for token in extra if _content(token) not in named]
        more = made.get("additional_special_tokens")
        made["additional_special_tokens"] = [*(more if isinstance(more, list) else []), *kept]
    elif extra is not None and not (isinstance(extra, Mapping) and all(_is_token(token) for token in extra.values())):
        raise ConfigError("extra_special_tokens", extra, f"must be a list of tokens or names of tokens, in {CONFIG}")
    limit = made.get("model_max_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1):
        raise ConfigError("model_max_length", limit, f"must be a number of tokens, in {CONFIG}")
    if isinstance(limit, float):
        made["model_max_length"] = int(min(limit, NO_LIMIT))
    for key, wanted in (("auto_map", None), ("chat_template", (str, list)), ("sp_model_kwargs", Mapping)):
        value = made.get(key)
        if wanted is None:
            made.pop(key, None)
        elif value is not None and not isinstance(value, wanted):
            raise ConfigError(key, value, f"is of another kind than this setting, in {CONFIG}")
    templates = made.get("chat_template")
    for each in templates if isinstance(templates, list) else ():
        if not (isinstance(each, Mapping) and all(isinstance(each.get(key), str) for key in ("name", "template"))):
            mend = f"must be a template, or a list of mappings of name and template, in {CONFIG}"
            raise ConfigError("chat_template", templates, mend)
    return made


def _check_special(values: Mapping[str, Any], file: str) -> None:
    """Special tokens by their names, as both files say them.

    Raises:
        ConfigError: no token, or no list of them.
    """
    for key in _NAMED:
        if values.get(key) is not None and not _is_token(values[key]):
            raise ConfigError(key, values[key], f"must be a token, in {file}")
    more = values.get("additional_special_tokens")
    if more is not None and not (isinstance(more, list) and all(_is_token(token) for token in more)):
        raise ConfigError("additional_special_tokens", more, f"must be a list of tokens, in {file}")


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, Mapping) else token


def _is_token(token: object) -> bool:
    return isinstance(_content(token), str)


def copy_tokenizer(source: Path, target: Path, *, model_type: str | None = None) -> None:
    """The tokenizer's files of `source` in `target`, in a form that transformers 4 loads."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)
    if (source / CONFIG).is_file():
        settings = as_transformers_4(read_json(source / CONFIG))
        (target / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    if model_type is not None:  # a tokenizer.model alone is loaded by the model's class of tokenizer
        (target / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")


def load_hf_tokenizer(directory: Path, *, named: Path | None = None) -> Any:
    """transformers' tokenizer of a directory that `check_tokenizer` let pass.

    Raises:
        ConfigError: transformers cannot make one of these files, with its reason.
    """
    named = directory if named is None else named
    try:
        return _of_transformers(directory)
    except Exception as error:  # the Rust side raises no narrower type, and its Python side whatever the files lead it to
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConfigError("tokenizer", str(named), f"transformers cannot load it ({why}); save the tokenizer again") from error


def open_tokenizer(name: str | Path) -> Any:
    """transformers' tokenizer of a directory, whichever of transformers 4 and 5 wrote it, or of a name on the hub.

    Raises:
        ConfigError: a directory in other words than transformers 4's, which cannot be put into those.
        OSError, ValueError: as transformers raises them for all others.
    """
    directory = Path(name)
    if not (directory.is_dir() and in_other_words(directory)):
        return _of_transformers(name)
    with tempfile.TemporaryDirectory(prefix="nemo_longctx_tokenizer_") as folder:
        config = directory / "config.json"
        kind = read_json(config).get("model_type") if config.is_file() else None
        copy_tokenizer(directory, Path(folder), model_type=kind)
        loaded = load_hf_tokenizer(Path(folder), named=directory)
    loaded.name_or_path = str(name)
    return loaded


def _of_transformers(name: str | Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(name)
    if loaded is False:  # what transformers gives where a class ends in an error, which it takes for one of SentencePiece's
        raise ValueError("its class cannot be made of these files, and transformers does not tell the error")
    return loaded


def other_things(directory: Path) -> list[str]:
    """Names in a tokenizer's directory that are none of its files: weights, folders. [] where there is no directory."""
    inside = directory.iterdir() if directory.is_dir() else ()
    return sorted(each.name for each in inside if each.is_dir() or each.name not in FILES)


def with_limit(limit: int | None, longest: int) -> int:
    """`model_max_length` for a model whose longest input is `longest` tokens; a tokenizer without a limit stays without."""
    return NO_LIMIT if limit is None or limit > 10**9 else longest
