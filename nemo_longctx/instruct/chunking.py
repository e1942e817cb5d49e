"""Documents from JSONL, cut into chunks that fit a short model, at sentence boundaries.

Lengths are tokens of the tokenizer of the model to be tuned; spans are characters, so that a reader can check them by eye.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_longctx.config import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A sentence ends after its stop (with any closing quotes or brackets) where space follows, or at a blank line. Abbreviations
# cut too: a chunk may then end after "Mr.", which costs nothing, where a missed end would join sentences for good.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|[。！？]|\n[ \t]*\n")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One line of the input. `offset` is its first byte in the file, `sha256` the hash of its text."""

    id: str
    sha256: str
    text: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Characters [start, end) of a document, `tokens` long."""

    index: int
    start: int
    end: int
    tokens: int


def read_documents(path: Path, *, text_key: str, id_key: str) -> Iterator[Document]:
    """The documents of a JSONL file, in order; a missing id becomes the line number.

    Raises:
        ConfigError: a line that is no JSON object, or whose text is missing or no string.
    """
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _document(line, where=f"{path}:{number}", number=number, offset=offset, text_key=text_key, id_key=id_key)
            offset += len(line)


def read_document_at(path: Path, offset: int, *, text_key: str, id_key: str) -> Document:
    """The document whose line starts at byte `offset`."""
    with open(path, "rb") as file:
        file.seek(offset)
        return _document(file.readline(), where=str(path), number=0, offset=offset, text_key=text_key, id_key=id_key)


def _document(line: bytes, *, where: str, number: int, offset: int, text_key: str, id_key: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ConfigError("documents", where, f"is not one JSON object a line ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
        raise ConfigError("documents", where, f"has no string under {text_key!r}; name the right field with --text-key")
    # JSON can spell halves of surrogate pairs, which no UTF-8 file or request can hold.
    text = row[text_key].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Document(id=str(row.get(id_key, number)), sha256=digest, text=text, offset=offset)


def load_tokenizer(name: str) -> Tokenizer:
    """A fast tokenizer from a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub.

    Raises:
        ConfigError: nothing there that the `tokenizers` library can read.
    """
    from tokenizers import Tokenizer

    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the Rust library raises bare Exception for every failure
        raise ConfigError("tokenizer", name, f"cannot be read ({error}); give a folder that holds tokenizer.json") from None


def token_ends(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Characters [n_tokens] (int64), non-decreasing: where each token of `text` ends; no special tokens."""
    ends = np.array([end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets], dtype=np.int64)
    return np.maximum.accumulate(ends) if len(ends) else ends


def sentence_ends(text: str) -> list[int]:
    """Characters after which a sentence has ended and the space behind it is over; the last is len(text)."""
    ends: list[int] = []
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        while end < len(text) and text[end].isspace():
            end += 1
        if not ends or end > ends[-1]:
            ends.append(end)
    if not ends or ends[-1] != len(text):
        ends.append(len(text))
    return ends


def chunk_document(text: str, ends: np.ndarray, *, chunk_tokens: int) -> list[Chunk]:
    """Cut `text` into chunks of at most `chunk_tokens` tokens, filled as far as whole sentences go.

    Each character lies in exactly one chunk. A sentence longer than a chunk is cut at its last white space that fits, or
    between tokens where it has none. Chunks of white space alone are left out (their characters are in none).

    Args:
        text: the document.
        ends: its `token_ends`.
        chunk_tokens: the most tokens of a chunk.
    """
    stops = sentence_ends(text)
    chunks: list[Chunk] = []
    start, first = 0, 0  # the next chunk's first character and first token
    while start < len(text):
        # One past the last character that fits.
        limit = len(text)
        if first + chunk_tokens < len(ends):
            # Several byte-level tokens may end at one character: it goes with the next chunk when not all of them fit.
            fits = int(np.searchsorted(ends, ends[first + chunk_tokens], side="left"))
            limit = int(ends[min(fits, first + chunk_tokens) - 1])
        end = limit if limit >= len(text) else _cut(text, stops, start, limit)
        last = int(np.searchsorted(ends, end, side="right"))
        if text[start:end].strip():
            chunks.append(Chunk(index=len(chunks), start=start, end=end, tokens=last - first))
        start, first = end, last
    return chunks


def _cut(text: str, stops: list[int], start: int, limit: int) -> int:
    """The last sentence end in (start, limit], else just after the last white space there, else `limit`."""
    place = bisect_right(stops, limit) - 1
    if place >= 0 and stops[place] > start:
        return stops[place]
    space = next((at + 1 for at in range(limit - 1, start, -1) if text[at].isspace()), limit)
    return space if text[start:space].strip() else limit
