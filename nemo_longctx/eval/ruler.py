"""RULER's tasks (Hsieh et al. 2024; settings and prompts of hsiehjackson/RULER at e40fae1) as probes of exact length.

Like there, a length is that of the prompt and of the tokens that may be generated, together, and every haystack of essays
begins where the essays do, so what samples share is read once. Essays are the user's own text, words are made of syllables, and
the two question answering tasks read SQuAD and HotpotQA from the user's disk: nothing is fetched.

Of the multi-key tasks four samples share a haystack and ask for another of its keys each, which leaves each sample what it is
in RULER and has the haystack read once.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import string
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.probe_tools import SYLLABLES, Made, Tools

PREFIX = "ruler_"
THRESHOLD = 0.856  # Llama 2 7B's score at 4K, from which RULER calls a length effective
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Depths of needles: 40 evenly spaced ones, drawn without repetition (niah.py).
DEPTHS = [n / 39 for n in range(40)]


@dataclass(frozen=True, kw_only=True)
class Needles:
    """One of RULER's needle tasks: what hides it, what keys and values are, and how many keys, values a key, keys asked."""

    haystack: str = "essay"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


NIAH = {
    "niah_single_1": Needles(haystack="repeat"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value="uuids"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(haystack="needle", keys=4),
    "niah_multikey_3": Needles(haystack="needle", key="uuids", value="uuids", keys=4),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, asked=4),
}
QA = {"qa_1": "squad", "qa_2": "hotpotqa"}
# Tokens that RULER lets a model generate.
NEW_TOKENS = dict.fromkeys(NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(QA, 32)
KINDS = tuple(PREFIX + name for name in NEW_TOKENS)
# Kinds of which one answer out of several will do (RULER's string_match_part).
ANY_ANSWER = tuple(PREFIX + name for name in QA)
TURNS = 4  # samples that share a haystack in the multi-key tasks


def shares_haystack(kind: str) -> bool:
    """Whether samples of this kind come in groups of `TURNS` that differ in what is asked only."""
    task = NIAH.get(kind.removeprefix(PREFIX))
    return task is not None and task.keys == TURNS and task.asked == 1


def make(kind: str, rng: random.Random, length: int, tools: Tools, *, turn: int = 0) -> Made:
    """One probe; prompt and generation together are `length` tokens.

    Args:
        turn: which of its keys a shared haystack is asked for.

    Raises:
        ConfigError: the length is too short, or there is no question answering data.
    """
    name = kind.removeprefix(PREFIX)
    new, encode = NEW_TOKENS[name], tools.encode

    def room(*fixed: list[int]) -> int:
        return tools.room(kind, length, *fixed, [0] * new)

    if name in NIAH:
        head, hidden, other, question, answers = _niah(NIAH[name], rng, length, turn)
        depths = rng.sample(DEPTHS, len(hidden))
        needles = [(depth, encode(" " + text)) for depth, text in zip(depths, hidden, strict=True)]
        start, end = encode(head, after=""), encode(question)
        left = room(start, end, *(tokens for _, tokens in needles))
        filler = tools.essay(0, left) if other is None else tools.fill(left, other)
        made = [*tools.prefix, *start, *tools.spread(filler, needles), *end]
        return Made(prompt=made, answers=answers, new_tokens=new)
    if name == "vt":
        example, _ = _variables(rng, 3)
        hidden, asked = _variables(rng, 5)
        intro = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        shown = intro + " ".join(f"{line}. {NOISE}" for line in example) + _asked(example, shown=True) + "\n\n"
        start, end = encode(shown + intro, after=""), encode(_asked(hidden, shown=False))
        needles = list(zip(sorted(rng.random() for _ in hidden), (encode(f" {line}.") for line in hidden), strict=True))
        filler = tools.fill(room(start, end, *(tokens for _, tokens in needles)), NOISE + "\n")
        return Made(prompt=[*tools.prefix, *start, *tools.spread(filler, needles), *end], answers=asked, new_tokens=new)
    if name in QA:
        return _question(kind, rng, length, tools, room)
    texts, question, answers = (_common if name == "cwe" else _frequent)(rng, length)
    end = encode(question)
    # RULER's frequencies for short lengths serve where a tokenizer of many tokens a word has no room for the others.
    fits = [text for text in texts[:-1] if len(encode(text(1), after="")) <= room(end)]
    body = _most([*fits, texts[-1]][0], room(end), encode, length)
    left = room(end) - len(body)
    pad = tools.blank(left) if name == "cwe" else encode(" ..." * left)[:left]  # the coded text's own noise
    return Made(prompt=[*tools.prefix, *body, *pad, *end], answers=answers, new_tokens=new)


def _question(kind: str, rng: random.Random, length: int, tools: Tools, room: Callable[..., int]) -> Made:
    """A question among documents: those that hold its answer, then others of its article, then any (qa.py)."""
    name = kind.removeprefix(PREFIX)
    data = tools.questions(QA[name])
    asked = rng.choice(data.questions)
    rule = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    start = tools.encode(f"{rule}\n\nThe following are given documents.\n\n", after="")
    end = tools.encode(f"{rule}\n\nQuestion: {asked.query} Answer:", after="\n\n")
    body = tools.packed(
        kind,
        length,
        room(start, end),
        needed=[(rng.random(), data.documents[number]) for number in asked.holds],
        extras=_others(rng, data.documents, asked.near, {*asked.holds, *asked.near}),
        show=lambda number, text: f"Document {number}:\n{text}",
        between="\n\n",
    )
    return Made(prompt=[*tools.prefix, *start, *body, *end], answers=asked.answers, new_tokens=NEW_TOKENS[name])


def _others(rng: random.Random, documents: list[str], near: Iterable[int], used: set[int]) -> Iterator[str]:
    """Documents of the same article, then the others, in any order; again from the start where they do not suffice."""
    for number in rng.sample(list(near), len(list(near))):
        yield documents[number]
    others = [number for number in range(len(documents)) if number not in used] or sorted(used)
    while True:
        for number in rng.sample(others, len(others)):
            yield documents[number]


def _most(text: Callable[[int], str], budget: int, encode: Callable[..., list[int]], length: int) -> list[int]:
    """Tokens of the largest text(n) within the budget, by halving."""
    low, high, best = 1, 2, encode(text(1), after="")
    if len(best) > budget:
        mend = f"too short for a list of words, which needs {len(best)} tokens and has {budget}"
        raise ConfigError("probes.lengths", length, mend)
    while high < 1 << 20 and len(encode(text(high), after="")) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(encode(text(middle), after="")) <= budget else (low, middle)
    return encode(text(low), after="")


def _word(rng: random.Random, syllables: int = 3) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables))


def _random(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    return f"{_word(rng)}-{_word(rng)}" if kind == "words" else str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _niah(task: Needles, rng: random.Random, length: int, turn: int) -> tuple[str, list[str], str | None, str, list[str]]:
    """Text before the haystack, needles, what the haystack repeats (None: essays), the question, the answers."""

    def needle(key: str, value: str) -> str:
        return f"One of the special magic {task.value} for {key} is: {value}."

    keys = [_random(task.key, rng) for _ in range(task.keys)]
    values = {key: [_random(task.value, rng) for _ in range(task.values)] for key in keys}
    hidden = [needle(key, value) for key in keys for value in values[key]]
    rng.shuffle(hidden)
    asked = keys[turn : turn + 1] if task.asked == 1 else rng.sample(keys, task.asked)
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    one = task.asked * task.values == 1
    some, many, are = ("A", task.value[:-1], "is") if one else ("Some", task.value, "are all")
    hides, verb = ("is", "is") if one else ("are", "are")
    head = f"{some} special magic {many} {hides} hidden within the following text. Make sure to memorize it. "
    head += f"I will quiz you about the {many} afterwards.\n"
    question = f"\nWhat {are} the special magic {many} for {query} mentioned in the provided text?"
    question += f" The special magic {many} for {query} mentioned in the provided text {verb}"
    other = None if task.haystack == "essay" else NOISE + "\n"
    if task.haystack == "needle":
        other = "\n".join(needle(_random(task.key, rng), _random(task.value, rng)) for _ in range(length // 8 + 8)) + "\n"
    return head, hidden, other, question, [value for key in asked for value in values[key]]


def _variables(rng: random.Random, letters: int, hops: int = 4) -> tuple[list[str], list[str]]:
    """A chain of assignments, and its variables."""
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    lines = [f"VAR {names[0]} = {rng.randrange(10_000, 99_999)}"]
    return lines + [f"VAR {after} = VAR {before}" for before, after in itertools.pairwise(names)], names


def _asked(lines: list[str], *, shown: bool) -> str:
    value, names = lines[0].rpartition(" ")[2], [line.split()[1] for line in lines]
    text = f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    text += (
        f"chain(s) of variable assignment in the text above, {len(names)} variables are assigned the value {value}, they are:"
    )
    return text + (" " + " ".join(names) if shown else "")


def _common(rng: random.Random, length: int) -> tuple[list[Callable[[int], str]], str, list[str]]:
    """A numbered list in which ten words stand more often than the others, behind a solved example: in the frequencies of
    lengths from 4,096 on, and in those of shorter ones."""
    intro = "Below is a numbered list of words. In these words, some appear more often than others. "
    intro += "Memorize the ones that appear most often.\n"
    question = "\nQuestion: What are the 10 most common words in the above list? "
    question += "Answer: The top 10 words that appear most often in the list are:"
    words = list(dict.fromkeys(_word(rng) for _ in range(length // 4 + 200)))
    seed = rng.random()

    def listed(common: list[str], others: Iterable[str], often: int, seldom: int) -> str:
        entries = [*common * often, *list(others) * seldom]
        random.Random(seed).shuffle(entries)
        return " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))

    common = words[40:50]

    def text(n: int, many: bool) -> str:
        example = intro + listed(words[:10], words[10 : 40 if many else 20], *((10, 3) if many else (3, 1))) + question
        example += " " + " ".join(f"{number}. {word}" for number, word in enumerate(words[:10], start=1)) + "\n"
        return example + intro + listed(common, words[50 : 50 + n], *((30, 3) if many else (6, 1)))

    texts: list[Callable[[int], str]] = [
        functools.partial(text, many=many) for many in (True, False) if not many or length >= 4096
    ]
    return texts, question, common


def _frequent(rng: random.Random, length: int) -> tuple[list[Callable[[int], str]], str, list[str]]:
    """Coded words whose numbers follow a zeta distribution (exponent 2); the commonest is noise, the next three are asked."""
    coded = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(max(8, length // 50))]
    vocabulary = ["...", *dict.fromkeys(coded)]
    seed, total = rng.random(), 1.6449340668482264  # zeta(2)

    def text(n: int) -> str:
        counts = [int(20 * n / (rank**2 * total)) for rank in range(1, len(vocabulary) + 1)]
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        random.Random(seed).shuffle(words)
        intro = "Read the following coded text and track the frequency of each coded word. "
        return intro + "Find the three most frequently appeared coded words. " + " ".join(words)

    question = "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    question += "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    return [text], question + "appeared words are:", vocabulary[1:4]


def averages(scores: Iterable[tuple[str, int, float]]) -> dict[int, float]:
    """RULER's average at each length over its tasks. A length at which a task has no score has no average: other tasks' scores
    do not stand for it. Tasks that have a score at no length (the questions, without their data) are not counted.

    Args:
        scores: (kind, length, score) of each cell; NaN: not scored.
    """
    cells = [(kind, length, score) for kind, length, score in scores if kind.startswith(PREFIX)]
    kinds = {kind for kind, _, score in cells if score == score}
    by_length: dict[int, dict[str, float]] = {}
    for kind, length, score in cells:
        if kind in kinds:
            by_length.setdefault(length, {})[kind] = score
    means = {n: sum(some.values()) / len(some) for n, some in sorted(by_length.items()) if len(some) == len(kinds)}
    return {length: mean for length, mean in means.items() if mean == mean}


def largest_error(cells: Iterable[tuple[float, int]]) -> float:
    """What the standard error of an average over tasks is at most: that of samples that score 0 or 1, which have the largest
    spread that their mean allows.

    Args:
        cells: (score, samples) of each task, the score a mean over samples between 0 and 1.
    """
    some = list(cells)
    return sum(score * (1 - score) / samples for score, samples in some) ** 0.5 / len(some) if some else math.nan


def tasks_scored(scores: Iterable[tuple[str, int, float]]) -> int:
    """Of RULER's 13 tasks those that `averages` is over."""
    return len({kind for kind, _, score in scores if kind.startswith(PREFIX) and score == score})


def lengths(scores: Iterable[tuple[str, int, float]]) -> list[int]:
    """The lengths of RULER's cells, scored or not."""
    return sorted({length for kind, length, _ in scores if kind.startswith(PREFIX)})


def effective_length(means: dict[int, float], asked: Iterable[int] = ()) -> int:
    """The longest length up to which every average reaches RULER's threshold; 0 for none.

    Args:
        asked: all lengths that were asked; one without an average ends it, as one below the threshold.
    """
    reached = itertools.takewhile(lambda length: means.get(length, 0.0) >= THRESHOLD, sorted({*means, *asked}))
    return max(reached, default=0)
