"""Encode a text of any size in pieces, cut where the tokenizer does not notice.

Memory of the Rust tokenizers is some 130 bytes a character of the text they get. Most split a text before they encode it, and
what stands on one side of a split does not change the other. Where that is depends on the tokenizer, so a place is tried before
it is used: a stretch around it must give the same tokens whole and cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE = 1 << 18  # characters encoded at once
_AROUND = 600  # characters on each side of a cut that are encoded whole and cut, to compare
_SEARCHED = 1 << 13  # characters of a piece's end in which a place is looked for, at first
_TRIED = 3  # places of each kind that are tried
# (a place, how many characters of it end the left piece, how many begin the right one; what lies between is left out).
# A normalizer that puts a space before each text (Llama 2's) gives back the one that is left out.
_KINDS = (
    (re.compile(r"[^\W\d_] [^\W\d_]"), 1, 2),
    (re.compile(r"[^\W\d_] [^\W\d_]"), 1, 1),
    (re.compile(r"[^\W_]\n"), 1, 1),
    (re.compile(r"\n[^\W_]"), 1, 1),
    (re.compile(r"[^\W_][^\w\s]"), 1, 1),
    (re.compile(r"[^\w\s][^\W_]"), 1, 1),
)


class PieceEncoder:
    """Encodes texts in pieces. The kind of place that the last cut took is tried first at the next.

    Args:
        tokenizer: as `tokenization.encoder` gives it.
        piece: characters encoded at once, where there is a place to cut.
        around: characters on each side of a cut that must not notice it.
    """

    def __init__(self, tokenizer: Tokenizer, *, piece: int = PIECE, around: int = _AROUND):
        self._tokenizer, self._piece, self._around = tokenizer, piece, around
        self._kinds = list(_KINDS)

    def encode(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Token ids of the text that `pieces` make together, int64 arrays [n], one after the other.

        Where there is no place to cut, the piece grows until there is one, at worst to the end of the text.
        """
        buffer, searched = "", 0
        wanted = self._piece + self._around
        for piece in pieces:
            buffer += piece
            while len(buffer) >= wanted:
                place = self._place(buffer, searched)
                if place is None:
                    searched = len(buffer) - self._around - 2
                    wanted = len(buffer) + self._piece
                    continue
                end, begin = place
                yield self._ids(buffer[:end])
                buffer, searched = buffer[begin:], 0
                wanted = self._piece + self._around
        if buffer:
            yield self._ids(buffer)

    def _ids(self, text: str) -> np.ndarray:
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.int64)

    def _place(self, text: str, searched: int) -> tuple[int, int] | None:
        """(where the left piece ends, where the right one begins), near the end of the text; None where no cut is safe."""
        high = len(text) - self._around
        for low in dict.fromkeys((max(searched, high - _SEARCHED), max(searched, high - (self._piece >> 1)))):
            for kind in self._kinds:
                pattern, left, right = kind
                places = [match.start() for match in pattern.finditer(text, max(low, 1), high)][-_TRIED:]
                for at in reversed(places):
                    if self._unnoticed(text, at + left, at + right):
                        self._kinds.remove(kind)
                        self._kinds.insert(0, kind)
                        return at + left, at + right
        return None

    def _unnoticed(self, text: str, end: int, begin: int) -> bool:
        first, last = max(0, end - self._around), begin + self._around
        texts = [text[first:last], text[first:end], text[begin:last]]
        whole, before, after = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return whole.ids == before.ids + after.ids
