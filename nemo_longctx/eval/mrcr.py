"""Questions about the order of a long talk (after OpenAI's MRCR, 2025): the same thing was asked for several times, and the
n-th answer is to be said again behind a random word.

The talk is in the tokenizer's chat template where it has one. Its answers are passages of the user's text, each with a line of
its own in front, so nothing is written by a model.
"""

from __future__ import annotations

import random
import string
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.probe_tools import Made, Tools
from nemo_longctx.hf.chat import render

NEEDLES = {"mrcr_2": 2, "mrcr_4": 4, "mrcr_8": 8}
KINDS = tuple(NEEDLES)
FORMS = ("poem", "riddle", "letter", "short story", "news article", "speech", "song", "blog post", "short scene", "diary entry")
TOPICS = (
    "tapirs", "bridges", "salt", "lighthouses", "clocks", "snow", "beekeeping", "mirrors", "ferries", "chess", "lemons", "owls",
    "trains", "pottery", "islands", "gloves",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
WORDS = 24  # of a passage, about
MARK = 10  # letters of the word that an answer begins with
HOLE = "PASSAGEHERE"  # where tokens go that make the length exact


def make(kind: str, rng: random.Random, length: int, tools: Tools, *, text: str) -> Made:
    """One talk of exactly `length` tokens.

    Raises:
        ConfigError: the length is too short for its needles.
    """
    count, words = NEEDLES[kind], text.split()
    form, topic = rng.choice(FORMS), rng.choice(TOPICS)

    def turns(form: str, topic: str, said: str) -> list[dict[str, str]]:
        asked = {"role": "user", "content": f"Write a {form} about {topic}"}
        return [asked, {"role": "assistant", "content": said}]

    def passage() -> str:
        place = rng.randrange(max(1, len(words) - WORDS))
        title = " ".join(rng.sample(TOPICS, 2)).title()
        return f"{title}\n{' '.join(words[place : place + WORDS])}"

    needles = [turns(form, topic, passage()) for _ in range(count)]
    asked = rng.randrange(count)
    word = "".join(rng.choices(string.ascii_letters + string.digits, k=MARK))
    last = f"Prepend {word} to the {ORDINALS[asked]} {form} about {topic}. Do not include any other text in your response."
    others = [(a, b) for a in FORMS for b in TOPICS if (a, b) != (form, topic)]

    places = sorted(rng.random() for _ in range(count))

    def built(distractors: list[list[dict[str, str]]]) -> tuple[list[int], list[int]]:
        """Tokens before and behind the hole; the needles stand at their places, in their order."""
        talk: list[list[dict[str, str]]] = []
        waiting = list(zip(places, needles, strict=True))
        for number in range(len(distractors) + 1):
            while waiting and round(waiting[0][0] * len(distractors)) <= number:
                talk.append(waiting.pop(0)[1])
            talk += distractors[number : number + 1]
        rows = [turn for pair in talk for turn in pair] + [{"role": "user", "content": last}]
        return _parted(rows, tools)

    hole = turns(*rng.choice(others), HOLE)
    front, back = built([hole])
    room = length - len(front) - len(back)
    if room < 0:
        raise ConfigError("probes.lengths", length, f"too short for a {kind} probe, which needs {length - room} tokens")
    distractors = [hole]
    each = len(tools.encode(f"Write a short story about lighthouses {passage()}")) + 12
    while room > 2 * each:
        more = [turns(*rng.choice(others), passage()) for _ in range(max(1, int(0.9 * room / each) - 1))]
        front, back = built([*distractors, *more])
        if len(front) + len(back) > length:
            break
        distractors += more
        room = length - len(front) - len(back)
    front, back = built(distractors)
    filler = tools.essay(rng.randrange(max(1, tools.size)), length - len(front) - len(back))
    answer = word + needles[asked][1]["content"]
    return Made(prompt=[*front, *filler, *back], answers=[answer])


def _parted(rows: list[dict[str, str]], tools: Tools) -> tuple[list[int], list[int]]:
    """Tokens of the talk before and behind the hole; without a chat template of its own behind the prefix."""
    template: Any = getattr(tools.tokenizer, "chat_template", None)
    if template:
        # Without thought before the answer, which there is no room for.
        text = render(tools.tokenizer, rows, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        prefix: list[int] = []
    else:
        text = "".join(f"{row['role'].capitalize()}: {row['content']}\n\n" for row in rows) + "Assistant:"
        prefix = list(tools.prefix)
    front, _, back = text.partition(HOLE)
    return [*prefix, *tools.encode(front, after="")], tools.encode(back)
