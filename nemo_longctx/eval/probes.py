"""Probes of long-context ability: first-sentence retrieval, passkey, records, needle grids, variable tracking, and what the
field asks: RULER, HELMET's recall, NoLiMa-like needles, MRCR-like talks.

Made offline from any text, from a seed. A probe is a list of tokens of exactly the asked length, so no tokenizer detail can
make it longer or move its needle; what it hides and where is on record beside it. `probe_scores` asks and scores them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from nemo_longctx.config import ConfigError
from nemo_longctx.data.retrieval_text import CODE, RECORDS, draw_code, draw_number
from nemo_longctx.eval import helmet, mrcr, nolima, ruler
from nemo_longctx.eval.probe_config import KINDS, PAPER_LENGTHS, SUITES, WITHOUT_DEPTH, ProbeConfig
from nemo_longctx.eval.probe_tools import Made, Tools
from nemo_longctx.eval.question_data import Questions, read_labelled, read_questions
from nemo_longctx.files import write_text
from nemo_longctx.hf.chat import asked, day_of

__all__ = ["KINDS", "PAPER_LENGTHS", "SUITES", "WITHOUT_DEPTH", "Probe", "ProbeConfig", "Tokenizer", "make_probes"]

WORDS = (
    "amber", "basil", "cedar", "delta", "ember", "fjord", "glade", "haven", "iris", "jade",
    "knoll", "lotus", "maple", "nectar", "olive", "pearl", "quill", "raven", "sable", "tulip",
)  # fmt: skip
SHOWN = 3  # letters of a code that its question holds, or as many more as its tokens
# Mohtashami and Jaggi 2023, appendix: the text that a passkey is hidden in.
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that probes need."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One prompt.

    Args:
        kind, length, depth, sample: its cell; `length` is that of `prompt`.
        prompt: token ids, the question last.
        answers: what the reply must hold.
        first: tokens of the first answer (of several values of one key: of all) as they follow the prompt.
        max_new_tokens: longest reply.
        grades: how relevant each answer is, where answers are ranked.
    """

    kind: str
    length: int
    depth: float
    sample: int
    prompt: list[int]
    answers: list[str]
    first: list[int]
    max_new_tokens: int
    grades: list[int] = field(default_factory=list)

    @property
    def content_hash(self) -> str:
        return hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=16).hexdigest()


def make_probes(
    config: ProbeConfig,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    prefix: Sequence[int] = (),
    cache: str | Path | None = None,
    unmade: dict[tuple[str, int], str] | None = None,
) -> list[Probe]:
    """Make every probe of `config`.

    Args:
        texts: documents to hide things in; joined and repeated where they are too short for the longest length.
        prefix: tokens in front of each prompt (the tokenizer's BOS), part of its length.
        cache: folder to keep probes in; they are found again by a hash of all that made them.
        unmade: takes (kind, length) -> why, of probes that a length is too short for; None raises the first of them.

    Raises:
        ConfigError: a length too short for what it must hold, or all of them.
        ValueError: no text, or none with a sentence of 5 to 40 words.
    """
    settings = asdict(config)
    if not config.chat:  # as before there was the choice: what was kept is found
        del settings["chat"]
    made_from = {"config": settings, "texts": [_digest(t) for t in texts], "prefix": list(prefix), "code": 4}
    every_letter = "".join(chr(c) for c in range(32, 127)) + GRASS + " ".join(WORDS) + "".join(t[:2000] for t in texts[:8])
    made_from["tokenizer"] = tokenizer.encode(every_letter, add_special_tokens=False)
    made_from["template"] = str(getattr(tokenizer, "chat_template", None)) + day_of(tokenizer)
    if config.data:
        files = sorted(file for file in Path(config.data).glob("*.json*") if file.is_file())
        made_from["data"] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    path = Path(cache) / f"probes-{_digest(json.dumps(made_from))}.json" if cache else None
    if path is not None and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if unmade is None and kept["unmade"]:
            raise ConfigError(*kept["unmade"][0][2])
        (unmade if unmade is not None else {}).update({(kind, length): why[2] for kind, length, why in kept["unmade"]})
        return [Probe(**values) for values in kept["probes"]]
    maker = _Maker(config, texts, tokenizer, list(prefix))
    probes: list[Probe] = []
    failed: list[tuple[str, int, ConfigError]] = []
    for kind in config.kinds:
        for length in config.lengths:
            depths = (0.0,) if kind in WITHOUT_DEPTH else config.depths
            try:
                probes += [maker.make(kind, length, depth, sample) for depth in depths for sample in range(config.samples)]
            except ConfigError as error:  # of this kind at this length; the others can be asked
                if unmade is None:
                    raise
                failed.append((kind, length, error))
    if failed and not probes:
        raise failed[0][2]
    if unmade is not None:
        unmade.update({(kind, length): error.mend for kind, length, error in failed})
    if path is not None:
        reasons = [(kind, length, (error.key, error.value, error.mend)) for kind, length, error in failed]
        write_text(path, json.dumps({"probes": [asdict(probe) for probe in probes], "unmade": reasons}))
    return probes


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class _Maker:
    """Builds prompts of exact length around hidden texts."""

    def __init__(self, config: ProbeConfig, texts: Sequence[str], tokenizer: Tokenizer, prefix: list[int]):
        self.config, self.tokenizer, self.prefix = config, tokenizer, prefix
        self.text = "\n".join(texts)
        self.tail_text = ""
        self.tail: list[int] = []  # of the chat template, behind what is asked
        if not self.text.strip():
            raise ValueError("probes are hidden in text, and none was given")
        sentences = re.finditer(r"(?:(?<=[.!?])\s+|\n\s*|\A\s*)([A-Z][^.!?\n]{10,300}[.!?])(?=\s)", self.text)
        self.sentences = [(m.start(1), m.group(1)) for m in sentences if 5 <= len(m.group(1).split()) <= 40]
        self._ends: dict[int, bool] = {}
        self._before: dict[str, list[int]] = {}
        self._questions: dict[str, Questions] = {}
        self._labelled: dict[str, list[str]] | None = None
        self.start = 0
        if config.chat:
            head, self.tail_text = asked(tokenizer)
            self.prefix, self.tail = self.encode(head, after=""), self.encode(self.tail_text, after="")
        self.tools = Tools(
            tokenizer=tokenizer,
            encode=self.encode,
            prefix=self.prefix,
            essay=self._filler,
            size=len(self.text),
            fill=lambda tokens, text: self._filler(0, tokens, text * max(1, 4096 // len(text))),
            spread=self._spread,
            questions=self.questions,
            labelled=self.labelled,
        )

    def encode(self, text: str, after: str = ".") -> list[int]:
        """Tokens of `text` as they are after other text: SentencePiece puts a space in front of what stands alone."""
        if after not in self._before:
            self._before[after] = self.tokenizer.encode(after, add_special_tokens=False)
        whole, before = self.tokenizer.encode(after + text, add_special_tokens=False), self._before[after]
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def make(self, kind: str, length: int, depth: float, sample: int) -> Probe:
        turn = sample % ruler.TURNS if ruler.shares_haystack(kind) else 0
        group = sample // ruler.TURNS if ruler.shares_haystack(kind) else sample
        rng = random.Random(f"{self.config.seed} {kind} {length} {depth} {group}")
        # Lengths and depths of a sample share their text, so that it is read once for all of them.
        self.start = random.Random(f"{self.config.seed} {sample}").randrange(max(1, len(self.text)))
        whole, length = length, length if kind in mrcr.KINDS else length - len(self.tail)  # a talk has the template already
        if kind in ruler.KINDS:
            made = ruler.make(kind, rng, length, self.tools, turn=turn)
        elif kind in helmet.KINDS:
            made = helmet.make(kind, rng, length, self.tools)
        elif kind in mrcr.KINDS:
            made = mrcr.make(kind, rng, length, self.tools, text=self.text)
        elif kind == nolima.KIND:
            made = nolima.make(rng, length, depth, self.tools, start=self.start, text=self.text)
        elif kind == "first_sentence":
            made = self._first_sentence(random.Random(f"{self.config.seed} {kind} {sample}"), length)
        elif kind == "variable_tracking":
            made = self._variables(rng, length)
        elif kind == "passkey":
            made = self._passkey(rng, length, depth)
        elif kind == "record":
            made = self._record(rng, length, depth)
        elif kind == "code":
            made = self._code(rng, length, depth)
        else:
            made = self._needles(rng, kind, length, depth)
        if whole > length:
            made = replace(made, prompt=[*made.prompt, *self.tail])
        return self._probe(made, kind, whole, depth, sample)

    def _probe(self, made: Made, kind: str, length: int, depth: float, sample: int) -> Probe:
        # Of several values all are asked, so the loss is that of all, and the reply needs room for them.
        told = ", ".join(made.answers) if kind == "needle_multi_value" else made.answers[0]
        begin = self.tail_text or ("" if self.config.chat else None)
        plain = self.encode(" " + told, after=":") if begin is None else self.encode(told, after=begin)
        first = list(made.first) or plain
        new = len(first) + 16 if kind == "first_sentence" else self.config.max_new_tokens
        return Probe(
            kind=kind,
            length=length,
            depth=depth,
            sample=sample,
            prompt=made.prompt,
            answers=made.answers,
            first=first,
            max_new_tokens=made.new_tokens or max(new, len(self.encode(" " + ", and ".join(made.answers), after=":")) + 4),
            grades=list(made.grades),
        )

    def questions(self, name: str) -> Questions:
        """The user's question answering data, read once."""
        if not self.config.data:
            mend = "needs question answering data: give probes.data, a folder with squad.json and hotpotqa.json"
            raise ConfigError("probes.data", self.config.data, mend)
        if name not in self._questions:
            self._questions[name] = read_questions(self.config.data, name)
        return self._questions[name]

    def labelled(self) -> dict[str, list[str]]:
        """The user's labelled texts, read once; empty without them."""
        if self._labelled is None:
            self._labelled = read_labelled(self.config.data) if self.config.data else {}
        return self._labelled

    def _room(self, kind: str, length: int, *fixed: list[int]) -> int:
        room = length - len(self.prefix) - sum(len(part) for part in fixed)
        if room < 0:
            raise ConfigError("probes.lengths", length, f"too short for a {kind} probe, which needs {length - room} tokens")
        return room

    def _filler(self, start: int, tokens: int, text: str | None = None) -> list[int]:
        """Exactly `tokens` tokens of text from character `start` on, going round to the beginning at the end."""
        text = self.text if text is None else text
        piece = text[start:]
        made: list[int] = []
        while len(made) < tokens:
            # Only as much text as is needed: 8 characters a token is more than tokenizers reach on prose.
            made += self.encode(piece[: 8 * (tokens - len(made)) + 64])
            piece = text
        return made[:tokens]

    def _spread(self, filler: list[int], hidden: Sequence[tuple[float, list[int]]]) -> list[int]:
        """Put each hidden text at its depth, moved back to the sentence end before it."""
        places = sorted(((self._sentence_end(filler, round(depth * len(filler))), n) for n, (depth, _) in enumerate(hidden)))
        out, last = [], 0
        for place, n in places:
            out += filler[last:place] + hidden[n][1]
            last = place
        return out + filler[last:]

    def _sentence_end(self, filler: list[int], place: int) -> int:
        """The nearest place at or before `place` that follows a full stop; `place` itself if none is near."""
        if place in (0, len(filler)):
            return place
        for back in range(place, max(0, place - 100), -1):
            token = filler[back - 1]
            if token not in self._ends:
                self._ends[token] = self.tokenizer.decode([token]).rstrip(" ").endswith((".", "!", "?", "\n"))
            if self._ends[token]:
                return back
        return place

    def _first_sentence(self, rng: random.Random, length: int) -> Made:
        if not self.sentences:
            raise ValueError("no sentence of 5 to 40 words was found in the text: first-sentence retrieval needs prose")
        start, sentence = rng.choice(self.sentences)
        question = self.encode("\n\nWhat is the first sentence of the text above? The first sentence is:")
        room = self._room("first_sentence", length, question)
        body = self.encode(sentence)
        if len(body) > room:
            mend = f"too short for the first sentence of {len(body)} tokens and its question"
            raise ConfigError("probes.lengths", length, mend)
        body += self._filler(start + len(sentence), room - len(body))
        return Made(prompt=self.prefix + body + question, answers=[sentence])

    def _passkey(self, rng: random.Random, length: int, depth: float) -> Made:
        key = draw_number(rng, 5, held_out=True)
        head = self.encode(
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
            "the important information there.\n"
        )
        needle = self.encode(f"The pass key is {key}. Remember it. {key} is the pass key. ")
        question = self.encode("\nWhat is the pass key? The pass key is")
        room = self._room("passkey", length, head, needle, question)
        filler = self._filler(0, room, GRASS * 40)
        return Made(prompt=self.prefix + head + self._spread(filler, [(depth, needle)]) + question, answers=[key])

    def _record(self, rng: random.Random, length: int, depth: float) -> Made:
        """A record as `nemo-longctx synth` writes them, of a key and a number that it never tells."""
        key, number = rng.choice(WORDS), draw_number(rng, 5, held_out=True)
        told, _, _ = RECORDS[0].partition("{value}")
        record, question = (self.encode("\n" + text.format(key=key, value=number)) for text in (RECORDS[0], told.rstrip()))
        room = self._room("record", length, record, question)
        filler = self._filler(self.start, room)
        return Made(prompt=self.prefix + self._spread(filler, [(depth, record)]) + question, answers=[number])

    def _code(self, rng: random.Random, length: int, depth: float) -> Made:
        """A code as `nemo-longctx synth` writes them, one that it never tells, asked for by its first tokens."""
        code = draw_code(rng, held_out=True)
        told = CODE.format(value=code)
        whole = self.encode("\n" + told.rstrip("."))
        shown = next((n for n in range(len(whole)) if code[:SHOWN] in self.tokenizer.decode(whole[:n])), None)
        if shown is None:
            raise ConfigError("probes.kinds", "code", "this tokenizer does not give capital letters back; leave this kind out")
        known = self.tokenizer.decode(whole[:shown]).rpartition(" ")[2]
        hidden, question, answer = self.encode(f"\n{told}\n"), whole[:shown], whole[shown:]
        room = self._room("code", length, hidden, question)
        prompt = self.prefix + self._spread(self._filler(self.start, room), [(depth, hidden)]) + question
        return Made(prompt=prompt, answers=[code.removeprefix(known)], first=tuple(answer))

    def _needles(self, rng: random.Random, kind: str, length: int, depth: float) -> Made:
        """One key among others (multi-key), or one key with several values (multi-value); RULER's sentences."""
        key, *others = rng.sample(WORDS, 4)
        values = 4 if kind == "needle_multi_value" else 1
        numbers = [draw_number(rng, 7, held_out=True) for _ in range(values)]
        # Several values of one key stand close together around the depth, in the order of the answer.
        depths = [min(1.0, max(0.0, depth + 0.02 * (n - (values - 1) / 2))) for n in range(values)]
        hidden = [(place, self._needle(key, number)) for place, number in zip(depths, numbers, strict=True)]
        if kind == "needle_multi_key":
            hidden += [(rng.random(), self._needle(other, draw_number(rng, 7, held_out=True))) for other in others]
        plural = "What are all the special magic numbers" if values > 1 else "What is the special magic number"
        verb = "The special magic numbers" if values > 1 else "The special magic number"
        question = self.encode(f"\n\n{plural} for {key} mentioned in the text? {verb} for {key}: ".rstrip())
        room = self._room(kind, length, question, *(text for _, text in hidden))
        filler = self._filler(self.start, room)
        return Made(prompt=self.prefix + self._spread(filler, hidden) + question, answers=numbers)

    def _needle(self, key: str, number: str) -> list[int]:
        return self.encode(f" One of the special magic numbers for {key} is: {number}.")

    def _variables(self, rng: random.Random, length: int) -> Made:
        """A chain of five assignments and a second chain that is not asked for (RULER, Hsieh et al. 2024)."""
        hidden = []
        chains = []
        for _ in range(2):
            names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(5)]
            value = draw_number(rng, 5, held_out=True)
            lines = [f" VAR {names[0]} = {value}."] + [
                f" VAR {after} = VAR {before}." for before, after in itertools.pairwise(names)
            ]
            hidden += [(d, self.encode(line)) for d, line in zip(sorted(rng.random() for _ in lines), lines, strict=True)]
            chains.append((value, names))
        value, names = chains[0]
        question = self.encode(
            f"\n\nFind all variables that are assigned the value {value} in the text above. "
            f"The five variables that are assigned the value {value} are:"
        )
        room = self._room("variable_tracking", length, question, *(text for _, text in hidden))
        filler = self._filler(self.start, room)
        return Made(prompt=self.prefix + self._spread(filler, hidden) + question, answers=names)
