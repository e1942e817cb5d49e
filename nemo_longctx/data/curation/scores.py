"""What is measured of a document while its text goes by: size, compressibility, repetition, boilerplate, and its fingerprints.

The text is read once, in pieces, and only counters, hashes and a signature are held: a document may have any size.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

SHINGLE = 5  # words of a shingle of the near-duplicate signature (as in FineWeb, Penedo et al. 2024)
REPEATED = 10  # words of a stretch that counts as repeated where it came before (Rae et al. 2021, table A1, its longest)
PERMUTATIONS = 128
_SEED = 1
_WORDS = 1 << 16  # words hashed at once
_KNOWN = 1 << 20  # words whose hash is kept
_COUNTED = 1 << 22  # words of a document in which repetition is looked for
_LINE = 1 << 16  # characters after which a line is taken for several
_HIT = 300  # characters that one phrase of boilerplate makes suspect: a page in one line is not all boilerplate
# Scripts written without spaces: each character is a word.
_SPACELESS = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_SPACELESS}]|[^\\W{_SPACELESS}]+")
_BOILERPLATE = re.compile(
    r"lorem ipsum|all rights reserved|terms (?:of (?:use|service)|and conditions)|privacy policy|cookie(?:s| policy)"
    r"|enable javascript|javascript is (?:disabled|required)|sign up for our newsletter|subscribe to our|click here"
    r"|share (?:this )?on (?:facebook|twitter)|powered by wordpress|skip to (?:main )?content|project gutenberg"
)  # of text in lower case


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one document.

    Attributes:
        characters: of its text. words: of its text; a character is one in scripts without spaces.
        gzip_ratio: bytes after DEFLATE (level 6) over bytes before; low is repetitive, high is noise.
        repeated_lines: share of characters in lines that stood before in the document; lines without a word aside.
        repeated_words: share of stretches of 10 words that stood before in the document (its first 4 M words).
        boilerplate: share of characters that phrases of web pages and licences make suspect, 300 at most a phrase.
        digest: 16 bytes, the same for texts that differ in white space alone.
        signature: MinHash of its shingles of 5 words in lower case, uint32 [PERMUTATIONS]; None where none was asked for.
    """

    characters: int
    words: int
    gzip_ratio: float
    repeated_lines: float
    repeated_words: float
    boilerplate: float
    digest: bytes
    signature: np.ndarray | None


class WordHashes:
    """Stable 64-bit hashes of words, kept for the next time."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, words: list[str]) -> np.ndarray:
        """uint64 [len(words)]."""
        known = self._known
        if len(known) > _KNOWN:
            known.clear()
        for word in {word for word in words if word not in known}:
            known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter((known[word] for word in words), np.uint64, len(words))


def measure(pieces: Iterable[str], hashes: WordHashes, *, signature: bool) -> Scores:
    """Read a text once and score it.

    Args:
        pieces: the text, cut anywhere.
        hashes: shared by the documents of a process.
        signature: whether to make the MinHash signature, for which `rensa` must be installed.
    """
    packer, digest = zlib.compressobj(6, zlib.DEFLATED, -15), hashlib.blake2b(digest_size=16)
    words = _Words(hashes, signature)
    seen: set[int] = set()
    characters = n_bytes = packed = counted = repeated = suspect = 0

    def read() -> Iterator[str]:
        nonlocal characters, n_bytes, packed
        for piece in pieces:
            raw = piece.encode()
            characters, n_bytes, packed = characters + len(piece), n_bytes + len(raw), packed + len(packer.compress(raw))
            yield piece

    for line in _lines(read()):
        lower = line.lower()
        found = _WORD.findall(lower)
        digest.update(" ".join([*line.split(), ""]).encode())
        if found:
            line = line.strip()
            counted += len(line)
            key = hash(line)
            repeated += len(line) if key in seen else 0
            seen.add(key)
            suspect += min(len(line), _HIT) if _BOILERPLATE.search(lower) else 0
            words.add(found)
    packed += len(packer.flush())
    words.end()
    return Scores(
        characters=characters,
        words=words.count,
        gzip_ratio=packed / max(1, n_bytes),
        repeated_lines=repeated / max(1, counted),
        repeated_words=words.repeated(),
        boilerplate=suspect / max(1, counted),
        digest=digest.digest(),
        signature=words.signature,
    )


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines; one beyond 64 Ki characters in several, cut at white space where there is any."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield from _cut(line)
        if len(rest) > 2 * _LINE:
            *parts, rest = _cut(rest)
            yield from parts
    yield from _cut(rest)


def _cut(line: str) -> Iterator[str]:
    while len(line) > _LINE:
        space = line.rfind(" ", 0, _LINE)
        end = space + 1 if space > 0 else _LINE
        yield line[:end]
        line = line[end:]
    yield line


class _Words:
    """The words of a document as they come: stretches counted, shingles hashed into the signature."""

    def __init__(self, hashes: WordHashes, signature: bool):
        self._hashes, self._wanted = hashes, signature
        self.count = 0
        self.signature: np.ndarray | None = np.full(PERMUTATIONS, 2**32 - 1, np.uint32) if signature else None
        self._waiting: list[str] = []
        self._before = np.zeros(0, np.uint64)  # hashes of the last words of what was flushed
        self._stretches: list[np.ndarray] = []

    def add(self, words: list[str]) -> None:
        self._waiting += words
        if len(self._waiting) >= _WORDS:
            self._flush()

    def end(self) -> None:
        if self._waiting:
            self._flush()
        if 0 < self.count < SHINGLE:  # so short a text is one shingle
            self._sign(_runs(self._before, self.count))

    def _flush(self) -> None:
        hashes = np.concatenate([self._before, self._hashes(self._waiting)])
        fresh = len(self._before)
        if self.count < _COUNTED:
            self._stretches.append(_runs(hashes[max(0, fresh - REPEATED + 1) :], REPEATED))
        self._sign(_runs(hashes[max(0, fresh - SHINGLE + 1) :], SHINGLE))
        self.count += len(self._waiting)
        self._waiting, self._before = [], hashes[-REPEATED + 1 :]

    def _sign(self, shingles: np.ndarray) -> None:
        if self.signature is None or not len(shingles):
            return
        from rensa import RMinHash

        shingles = np.unique(shingles)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], PERMUTATIONS, _SEED)
        # The least of the parts is the least of the whole.
        self.signature = np.minimum(self.signature, np.asarray(matrix.to_rows()[0], np.uint32))

    def repeated(self) -> float:
        total = sum(map(len, self._stretches))
        return 1 - len(np.unique(np.concatenate(self._stretches))) / total if total else 0.0


def _runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash of each `n` neighbours, uint64 [len(hashes) - n + 1]."""
    size = len(hashes) - n + 1
    if size <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(size, np.uint64)
    for k in range(n):
        total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[k : k + size]
    total ^= total >> np.uint64(32)  # so that the low bits, which are used first, hear of all
    return total * np.uint64(0xD6E8FEB86659FD93)
