"""Retrieval text: documents whose ends can only be predicted by looking back, made from any corpus.

Ordinary documents seldom need what lies far behind, so a model learns slowly to look there. Here facts, first sentences and
passages are told in a text and told again later, at every distance (as in the training data of OLMo 3, Qwen2.5-1M, and ProLong,
Gao et al. 2024). Documents are exact in length, seeded one by one, and never use what the probes ask for: their names come from
other letters, and no number or code that `is_held_out` is told.

`codes`, `rounds` and `repeats` are for models that cannot look back at all yet. A code is eight different letters, which text
hardly has in a row. The other two are made of random pieces of the vocabulary, where nothing but what was told before helps to
guess the next (repeated random tokens: Olsson et al. 2022, "In-context Learning and Induction Heads"): `repeats` tells a string
two to four times at once, so near that look-ups begin with it; `rounds` tells several in turn, with text between.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_longctx.config import ConfigError, did_you_mean

USUAL = ("passkey", "records", "first_sentence", "copy", "reorder")
KINDS = (*USUAL, "codes", "rounds", "repeats")
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "zu", "ka", "mi", "na")
SECRETS = ("access number", "door code", "locker number", "room code", "ticket number", "vault number")
RECORDS = ("The number for {key} is {value}.", "{key}: {value};", "{key} = {value}", "The code of {key} is {value}.")
CODE, LETTERS = "The code is {value}.", 8
DEFAULTS: dict[str, Any] = {"facts": 3, "filler": 0.5}
EFFECT = {"facts": ("records", "codes"), "filler": ("records", "rounds")}  # setting -> the kinds that it changes
LONGEST_REPEAT, LONGEST_STRING = 24, 15  # pieces
SENTENCE = re.compile(r"(?:(?<=[.!?])\s+|\n\s*|\A\s*)([A-Z][^.!?\n]{10,300}[.!?])(?=\s)")
Encode = Callable[[str], list[int]]


def is_held_out(secret: str) -> bool:
    """Whether a number or a code of capitals is kept for probes: the sum of its signs (A is 10) is a multiple of 4, so that no
    single one tells."""
    return sum(int(sign, 36) for sign in secret) % 4 == 0


def draw_number(rng: random.Random, digits: int, *, held_out: bool) -> str:
    """A number of so many digits, for probes (`held_out`) or for training text."""
    while True:
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if is_held_out(number) == held_out:
            return number


def draw_code(rng: random.Random, *, held_out: bool) -> str:
    """A code of `LETTERS` different capitals, for probes (`held_out`) or for training text."""
    while True:
        code = "".join(rng.sample(string.ascii_uppercase, LETTERS))
        if is_held_out(code) == held_out:
            return code


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Which documents to make.

    Args:
        length: tokens of each document, its end-of-document token included.
        tokens: of all documents; rounded down to whole documents.
        shares: kind -> share of the documents; they add up to 1. Default: equal shares of `USUAL`.
        facts: most different facts of a document of records or codes (3). filler: share of a document of records that is
            ordinary text between them, and the most of a document of rounds (0.5). Refused where no kind asked for takes them.
        seed: of everything that is drawn.
    """

    length: int
    tokens: int
    shares: Mapping[str, float] = field(default_factory=dict)
    facts: int | None = None
    filler: float | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.length < 64:
            raise ConfigError("length", self.length, "give at least 64 tokens a document")
        if self.tokens < self.length:
            raise ConfigError("tokens", self.tokens, f"give at least the {self.length} tokens of one document")
        if self.facts is not None and self.facts < 1:
            raise ConfigError("facts", self.facts, "give at least 1")
        if self.filler is not None and not 0 <= self.filler < 1:
            raise ConfigError("filler", self.filler, "give a share from 0 to below 1")
        shares = dict(self.shares) or dict.fromkeys(USUAL, 1 / len(USUAL))
        for kind, share in shares.items():
            if kind not in KINDS:
                raise ConfigError("kinds", kind, f"unknown kind, {did_you_mean(str(kind), KINDS)}")
            if not share > 0:
                raise ConfigError(f"kinds.{kind}", share, "give a share above 0; leave a kind out to have none of it")
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise ConfigError("kinds", shares, f"shares add up to 1, these to {sum(shares.values()):g}")
        for name, used_by in EFFECT.items():
            if getattr(self, name) is not None and not set(used_by) & set(shares):
                mend = f"has no effect on {', '.join(shares)}, only on {' and '.join(used_by)}; leave it out"
                raise ConfigError(name, getattr(self, name), mend)
            object.__setattr__(self, name, DEFAULTS[name] if getattr(self, name) is None else getattr(self, name))
        object.__setattr__(self, "shares", shares)

    @property
    def documents(self) -> int:
        return self.tokens // self.length

    def kinds(self) -> Iterator[str]:
        """The kind of each document: at every point the one furthest behind its share."""
        made = dict.fromkeys(self.shares, 0)
        for number in range(1, self.documents + 1):
            kind = max(made, key=lambda k: (self.shares[k] * number - made[k], self.shares[k]))
            made[kind] += 1
            yield kind


@dataclass(frozen=True, kw_only=True)
class Made:
    """One document: `text` encodes to the asked number of tokens, less the end-of-document token where one is added."""

    kind: str
    text: str
    facts: dict[str, str]


class Maker:
    """Makes documents of a config; each depends on the seed and its own number only.

    Args:
        texts: ordinary documents to hide things in. encode: text -> token ids. ends: tokens that the reader adds to each.
        pieces: texts of one token each, for `rounds` and `repeats`.
    """

    def __init__(
        self, config: RetrievalConfig, texts: Sequence[str], encode: Encode, *, ends: int = 1, pieces: Sequence[str] = ()
    ):
        self.config, self.encode, self.target = config, encode, config.length - ends
        self.facts, self.filler = int(config.facts or 0), float(config.filler or 0.0)
        self.pieces = pieces
        if len(pieces) < LONGEST_STRING and (random_kinds := {"rounds", "repeats"} & set(config.shares)):
            mend = f"the tokenizer has {len(pieces)} printable tokens; leave this kind out"
            raise ConfigError("kinds", min(random_kinds), mend)
        self.texts = [text for text in texts if len(text.split()) >= 20]
        if not self.texts:
            raise ConfigError("inputs", len(texts), "no text of 20 words among them to hide things in")
        sample = "".join(text[:4000] for text in self.texts[:32])
        self.characters = max(1.0, len(sample) / max(1, len(encode(sample))))  # a token

    def make(self, number: int, kind: str) -> Made:
        """Document `number` of the run.

        Raises:
            ConfigError: it cannot be made so short.
        """
        rng = random.Random(f"{self.config.seed} {number} {kind}")
        for _ in range(20):  # another draw where no cut of the filler gives the exact length
            made = getattr(self, f"_{kind}")(rng)
            if made is not None:
                return made
        raise ConfigError("length", self.config.length, f"no {kind} document came out at exactly this length; make it longer")

    def _text(self, rng: random.Random, tokens: float) -> str:
        """About so many tokens of ordinary text, from the start of a line or word."""
        size = max(1, int(tokens * self.characters))
        piece = ""
        while len(piece) < size:
            text = rng.choice(self.texts)
            start = rng.randrange(max(1, len(text) - size))
            start = text.rfind("\n", 0, start) + 1 if rng.random() < 0.5 else text.find(" ", start) + 1
            piece += text[start : start + size - len(piece)]
        return piece

    def _exact(self, head: str, filler: str, tail: str) -> str | None:
        """`head`, as much of `filler` as makes the whole exact, and `tail`; None where no cut does.

        Tokens are sought in the filler alone, since the whole has a nearly constant number more; then the whole is counted.
        """
        around = len(self.encode(head + filler + tail)) - len(self.encode(filler))
        for _ in range(6):
            cut = self._cut(filler, self.target - around)
            if cut is None:
                return None
            text = head + filler[:cut] + tail
            over = len(self.encode(text)) - self.target
            if over == 0:
                return text
            around += over
        return None

    def _cut(self, filler: str, wanted: int) -> int | None:
        """Characters of `filler` that make `wanted` tokens; None where it is too short, or nothing is wanted of it."""
        if wanted < 0:
            return None
        low, high = 0, min(len(filler), int(wanted * self.characters * 2) + 64)
        while low < high:  # tokens hardly ever fall when a text grows
            middle = (low + high) // 2
            if len(self.encode(filler[:middle])) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if len(self.encode(filler[:low])) == wanted else None

    def _name(self, rng: random.Random) -> str:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3))))

    def _told(self, rng: random.Random, told: Callable[[], str]) -> tuple[str, str]:
        """Facts and ordinary text in turn, a little short of the whole; and filler to cut."""
        parts: list[str] = []
        used = 0
        while used < 0.85 * self.target:
            if rng.random() < self.filler or not parts:
                # Short and long gaps alike, so that facts are asked for at every distance.
                parts.append(self._text(rng, 8 * (self.target / 16) ** rng.random()) + "\n")
                used += len(self.encode(parts[-1]))
            parts.append(told() + "\n")
            used += len(self.encode(parts[-1]))
        if used > 0.95 * self.target:  # the last gap was a long one
            used -= len(self.encode(parts.pop(-2)))
        return "".join(parts), self._text(rng, 1.2 * (self.target - used) + 32)

    def _facts(self, rng: random.Random, form: str, facts: dict[str, str], kind: str) -> Made | None:
        text = self._exact(*self._told(rng, lambda: self._fact(rng, form, facts)), "\n" + self._fact(rng, form, facts))
        return None if text is None else Made(kind=kind, text=text, facts=facts)

    @staticmethod
    def _fact(rng: random.Random, form: str, facts: Mapping[str, str]) -> str:
        key = rng.choice(list(facts))
        return form.format(key=key, value=facts[key])

    def _records(self, rng: random.Random) -> Made | None:
        names = [self._name(rng) for _ in range(rng.randint(1, self.facts))]
        facts = {key: draw_number(rng, 5, held_out=False) for key in dict.fromkeys(names)}
        return self._facts(rng, rng.choice(RECORDS), facts, "records")

    def _codes(self, rng: random.Random) -> Made | None:
        """Codes with text before each telling, log-uniform in length up to the whole, so that the next place counts too."""
        codes = [draw_code(rng, held_out=False) for _ in range(rng.randint(1, self.facts))]
        parts: list[str] = []
        used = 0
        while used < 0.85 * self.target:
            parts += [self._text(rng, (0.9 * self.target) ** rng.random()), f"\n{CODE.format(value=rng.choice(codes))}\n"]
            used += len(self.encode(parts[-2])) + len(self.encode(parts[-1]))
        if used > 0.95 * self.target:  # the last text was a long one
            used -= len(self.encode(parts.pop(-2)))
        filler = self._text(rng, 1.2 * max(0, self.target - used) + 32)
        text = self._exact("".join(parts), filler, f"\n{CODE.format(value=rng.choice(codes))}")
        return None if text is None else Made(kind="codes", text=text, facts={code: code for code in codes})

    def _repeats(self, rng: random.Random) -> Made | None:
        strings: list[str] = []
        head, used = "", 0
        while True:
            strings.append("".join(rng.choices(self.pieces, k=rng.randint(4, LONGEST_REPEAT))))
            told = strings[-1] * rng.randint(2, 4)
            size = len(self.encode(told))
            if used + size > self.target - 8 or used > 0.9 * self.target:
                break
            head, used = head + told, used + size
        text = self._exact(head, strings[-1] * (2 + (self.target - used) // 2), "")  # the last is told until the end
        return None if text is None else Made(kind="repeats", text=text, facts={str(n): each for n, each in enumerate(strings)})

    def _rounds(self, rng: random.Random) -> Made | None:
        """Some strings in two to six rounds, each in another order, with ordinary text between them or none."""
        period = self.target // rng.choice((2, 3, 4, 6))
        told = period * (1 - self.filler * rng.random())
        pool = rng.sample(self.pieces, min(len(self.pieces), period + LONGEST_STRING))  # no piece is in two places
        strings: list[str] = []
        have: list[int] = []
        while not strings or (sum(have) < told - 4 and len(pool) >= LONGEST_STRING):
            size = min(rng.randint(4, LONGEST_STRING), max(4, period - sum(have)))
            strings.append("".join(pool.pop() for _ in range(size)))
            have.append(len(self.encode(strings[-1])))
        gap = max(0, period - sum(have)) / len(strings)
        parts: list[str] = []
        used = 0
        order: list[int] = []
        while used < 0.9 * self.target - max(have):
            order = order or rng.sample(range(len(strings)), len(strings))
            between = self._text(rng, gap * 2 * rng.random()) if gap >= 1 else ""
            parts += [between, strings[order[-1]]]
            used += len(self.encode(between)) + have[order.pop()]
        text = self._exact("".join(parts), self._text(rng, 1.2 * (self.target - used) + 32), rng.choice(strings))
        return None if text is None else Made(kind="rounds", text=text, facts={str(n): each for n, each in enumerate(strings)})

    def _passkey(self, rng: random.Random) -> Made | None:
        secret, value = rng.choice(SECRETS), draw_number(rng, 5, held_out=False)
        fact = f"The {secret} is {value}. Keep it. {value} is the {secret}.\n"
        tail = f"\nWhat is the {secret}? The {secret} is {value}."
        before = self._text(rng, rng.random() * 0.8 * self.target)
        text = self._exact(before + "\n" + fact, self._text(rng, 1.2 * self.target), tail)
        return None if text is None else Made(kind="passkey", text=text, facts={secret: value})

    def _first_sentence(self, rng: random.Random) -> Made | None:
        for _ in range(20):
            match = next(SENTENCE.finditer(rng.choice(self.texts)), None)
            if match is not None and len(self.encode(match.group(1))) <= self.target // 4:
                break
        else:
            return self._copy(rng)  # no prose: its first line does as well
        sentence = match.group(1)
        tail = f"\n\nThe text began with these words: {sentence}"
        text = self._exact(sentence + " ", self._text(rng, 1.2 * self.target), tail)
        return None if text is None else Made(kind="first_sentence", text=text, facts={"": sentence})

    def _copy(self, rng: random.Random) -> Made | None:
        passage = self._text(rng, min(self.target * (0.1 + 0.3 * rng.random()), 256))
        mark = self._name(rng)
        text = self._exact(f"{mark}\n{passage}\n", self._text(rng, 1.2 * self.target), f"\n{mark}\n{passage}")
        return None if text is None else Made(kind="copy", text=text, facts={mark: passage})

    def _reorder(self, rng: random.Random) -> Made | None:
        marks = list(dict.fromkeys(self._name(rng) for _ in range(4)))
        size = min(self.target / (3 * len(marks)), 64)
        passages = {mark: self._text(rng, size).strip() for mark in marks}
        again = rng.sample(marks, len(marks))
        head = "".join(f"{mark}\n{passages[mark]}\n" for mark in marks)
        tail = "".join(f"\n{mark}\n{passages[mark]}" for mark in again)
        text = self._exact(head, self._text(rng, 1.2 * self.target), tail)
        return None if text is None else Made(kind="reorder", text=text, facts=passages)


def report(config: RetrievalConfig, made: Mapping[str, int]) -> dict[str, Any]:
    """What was made: documents and tokens of each kind, and their share of all."""
    documents = sum(made.values())
    kinds = {
        kind: {"documents": count, "tokens": count * config.length, "share": count / documents} for kind, count in made.items()
    }
    return {"documents": documents, "tokens": documents * config.length, "length": config.length, "kinds": kinds}
