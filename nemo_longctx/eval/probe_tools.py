"""What the makers of probes share: text to tokens, fillers of exact length, hidden texts, and lists that fill a prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.question_data import Questions

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u")]


@dataclass(frozen=True, kw_only=True)
class Made:
    """One probe's prompt, answers and tokens to generate (0: as many as the answers need); `grades` of ranked answers; `first`:
    tokens of the answer, where it goes on in the middle of a word."""

    prompt: list[int]
    answers: list[str]
    new_tokens: int = 0
    grades: tuple[int, ...] = ()
    first: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tools:
    """How a maker of probes reaches the tokenizer and the user's text.

    Args:
        tokenizer: for its chat template.
        encode: text -> tokens as after other text (`after`: which). prefix: tokens in front of a prompt (BOS).
        essay: (character to begin at, tokens) -> so many tokens of the user's text. size: its characters.
        fill: (tokens, text) -> so many tokens of a given text, repeated.
        spread: puts texts into a filler at depths.
        questions: reads the user's question answering data of a name; ConfigError where there is none.
        labelled: label -> texts of the user's; empty where there are none.
    """

    tokenizer: Any
    encode: Callable[..., list[int]]
    prefix: list[int]
    essay: Callable[[int, int], list[int]]
    size: int
    fill: Callable[[int, str], list[int]]
    spread: Callable[[list[int], list[tuple[float, list[int]]]], list[int]]
    questions: Callable[[str], Questions]
    labelled: Callable[[], dict[str, list[str]]]

    def room(self, kind: str, length: int, *fixed: Sequence[int]) -> int:
        """Tokens left of `length` beside the prefix and what is fixed.

        Raises:
            ConfigError: none are.
        """
        left = length - len(self.prefix) - sum(map(len, fixed))
        if left < 0:
            raise ConfigError("probes.lengths", length, f"too short for a {kind} probe, which needs {length - left} tokens")
        return left

    def blank(self, tokens: int) -> list[int]:
        """So many tokens of newlines, or of full stops where the tokenizer drops newlines."""
        newline = self.encode("\n", after="x")[-1:]
        return (newline or self.encode(".", after="x")[-1:]) * tokens

    def packed(
        self,
        kind: str,
        length: int,
        room: int,
        *,
        needed: Sequence[tuple[float, str]],
        extras: Iterable[str],
        show: Callable[[int, str], str],
        between: str,
    ) -> list[int]:
        """Exactly `room` tokens of a list: what is needed, each at its depth (0 first, 1 last) among as many extras as fit.

        Args:
            needed: (depth, entry). extras: entries without end. show: (number from 1, entry) -> text. between: parts entries.

        The last extra is cut where it does not fit whole, so nothing else is.

        Raises:
            ConfigError: there is no room for what is needed.
        """
        taken: list[str] = []
        have = sum(len(self.encode(show(10, entry) + between)) for _, entry in needed)
        endless = iter(extras)
        while have <= room:
            taken.append(next(endless))
            have += len(self.encode(show(10, taken[-1]) + between))
        while True:
            order, place = list(taken), -1
            for depth, entry in sorted(needed):
                place = max(place + 1, round(depth * len(order)))  # never before one of less depth
                order.insert(place, entry)
            parts = [self.encode(show(number, entry) + between) for number, entry in enumerate(order, start=1)]
            if sum(map(len, parts)) <= room:
                break
            if not taken:
                short = sum(map(len, parts)) - room
                raise ConfigError(
                    "probes.lengths", length, f"too short for a {kind} probe, which needs {length + short} tokens"
                )
            taken.pop()
        left, end = room - sum(map(len, parts)), self.encode(between)
        if left <= len(end):
            return [*itertools.chain(*parts), *self.blank(left)]
        rest = self.encode(show(len(order) + 1, next(endless)))[: left - len(end)]
        return [*itertools.chain(*parts), *rest, *self.blank(left - len(rest) - len(end)), *end]
