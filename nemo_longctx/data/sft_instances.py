"""Conversations -> tokens and roles, kept beside each other on disk, so that every process maps the same bytes.

A row is `{"messages": [{"role": ..., "content": ...}, ...]}`; a first `system` message, then `user` and `assistant` in turn.
The roles (`PROMPT`, `ANSWER`) say which loss weight a token gets, not its size: another weight needs no new cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import IndexedCorpus
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.hf.chat import render

PROMPT, ANSWER = 0, 1
_CACHE_VERSION = 2

# The chat form of Llama 2 (Touvron et al. 2023; its reference code wraps a user's turn in [INST] and a system's in <<SYS>>).
LLAMA2_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def chat_template(name: str, tokenizer: Any) -> str:
    """The Jinja text that `name` means: `tokenizer` (its own), `llama2` (the paper's), or the path of a file.

    Raises:
        ConfigError: a tokenizer without a template, or no such file.
    """
    if name == "llama2":
        return LLAMA2_CHAT_TEMPLATE
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise ConfigError("data.template", name, "this tokenizer has none; set llama2 or the path of a Jinja file")
        return tokenizer.chat_template
    if not os.path.isfile(name):
        raise ConfigError("data.template", name, "no such file; set tokenizer, llama2, or the path of a Jinja file")
    return Path(name).read_text("utf-8")


def encode_conversation(tokenizer: Any, template: str, messages: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (int32 [n]) and roles (uint8 [n]) of a conversation.

    Prompt and answer are tokenized apart, as they are when a model is asked: no token spans both. What the template writes
    after an answer (an end mark) belongs to the answer; the model must learn to stop.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: Jinja text, see `chat_template`.
        messages: ends with an answer.

    Raises:
        ConfigError: the template renders an earlier turn otherwise when a later one follows.
    """
    ends: list[tuple[int, int]] = []  # (first character beyond, role) of each part of the text
    written = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for upto, role, generation in ((number, PROMPT, True), (number + 1, ANSWER, False)):
            text = render(tokenizer, messages[:upto], chat_template=template, tokenize=False, add_generation_prompt=generation)
            if not text.startswith(written):
                mend = "renders a turn otherwise once another follows, so its answers cannot be told from its prompts"
                raise ConfigError("data.template", template[:40], mend)
            ends.append((len(text), role))
            written = text
    # As one text: part by part, SentencePiece would put a space of its own in front of every answer.
    encoded = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)
    last = np.array([max(start, end - 1) for start, end in encoded["offset_mapping"]], dtype=np.int64)
    part = np.searchsorted(np.array([end for end, _ in ends]), last, side="right").clip(max=len(ends) - 1)
    roles = np.array([role for _, role in ends], dtype=np.uint8)[part]
    return np.array(encoded["input_ids"], dtype=np.int32), roles


def read_conversations(path: str | os.PathLike[str]) -> Iterator[list[dict[str, str]]]:
    """The messages of each row of a JSONL file, checked.

    Raises:
        ConfigError: a row that is no conversation ending in an answer, by file and line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _messages(line, f"{os.fspath(path)}:{number}")


def _messages(line: bytes, where: str) -> list[dict[str, str]]:
    try:
        messages = json.loads(line)["messages"]
        turns = [(message["role"], message["content"]) for message in messages]
    except (ValueError, KeyError, TypeError) as error:
        mend = f'is no row {{"messages": [{{"role": ..., "content": ...}}]}} ({type(error).__name__}: {error})'
        raise ConfigError("data", where, mend) from None
    spoken = turns[1:] if turns and turns[0][0] == "system" else turns
    roles = [role for role, _ in spoken]
    if len(roles) < 2 or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ConfigError("data", where, f"its turns are {roles}; user and assistant must take turns and an answer must end it")
    if not all(isinstance(content, str) for _, content in turns) or not all(content.strip() for _, content in spoken):
        raise ConfigError("data", where, "a turn is empty or no text; leave the row out")
    return messages


class Instances:
    """The instances of one file, tokenized: `tokens[i]`, `roles[i]`, `lengths[i]`. Opening maps, it does not read.

    Args:
        prefix: where `open_instances` wrote them.
    """

    def __init__(self, prefix: str):
        self._tokens, self._roles = IndexedCorpus(f"{prefix}.tokens"), IndexedCorpus(f"{prefix}.roles")
        self.lengths = self._tokens.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [n], roles uint8 [n]) of an instance, views of the mapped files."""
        return self._tokens.tokens(number), self._roles.tokens(number)


def open_instances(path: str, *, tokenizer: Any, template: str, cache_dir: str) -> Instances:
    """The instances of the JSONL file `path`, tokenized on first use; processes that come together share one build.

    Raises:
        ConfigError: a bad row, or a file that holds none.
    """
    prefix = Path(cache_dir) / _cache_name(path, tokenizer, template)
    done = prefix.with_suffix(".done")
    if not done.exists():
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with open(prefix.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                _build(path, prefix, tokenizer, template)
                done.touch()
    return Instances(str(prefix))


def _build(path: str, prefix: Path, tokenizer: Any, template: str) -> None:
    with CorpusWriter(f"{prefix}.tokens", np.int32) as tokens_file, CorpusWriter(f"{prefix}.roles", np.uint8) as roles_file:
        for messages in read_conversations(path):
            tokens, roles = encode_conversation(tokenizer, template, messages)
            tokens_file.add_document(tokens)
            roles_file.add_document(roles)


def _cache_name(path: str, tokenizer: Any, template: str) -> str:
    with open(path, "rb") as file:
        data = hashlib.file_digest(file, "sha256").hexdigest()
    parts = [_CACHE_VERSION, data, tokenizer.backend_tokenizer.to_str(), template, tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
