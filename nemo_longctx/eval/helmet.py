"""Four of HELMET's categories that a base model can do (Yen et al. 2024; prompts of princeton-nlp/HELMET at 4526dfb): many-shot
learning in context, recall from JSON, a question among distractors, and ranking of documents.

HELMET's data is downloaded; here everything is drawn from a seed, so these are its tasks and not its samples. Labelled texts of
your own serve for learning in context: `icl.jsonl` of {"text", "label"} in `probes.data`.
"""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Iterator
from typing import Any

from nemo_longctx.eval.probe_tools import SYLLABLES, Made, Tools

PREFIX = "helmet_"
KINDS = tuple(PREFIX + name for name in ("icl", "json_kv", "rag", "rerank"))
# Intents as they are put to a bank or a house: which words make a class is to be learned from the examples.
INTENTS = {
    "card": ["my card is lost", "the card was swallowed by the machine", "someone has stolen my card", "where is my new card"],
    "heat": ["it is cold in here", "the radiator stays cold", "make the room warmer", "could the heating go up"],
    "rain": ["do I need an umbrella", "will it rain later", "is a shower coming", "how wet will it be"],
    "song": ["play something slow", "skip this song", "who sings this", "turn the music up"],
    "wake": ["wake me at six", "set an alarm", "move my alarm by an hour", "cancel the alarm"],
    "food": ["how long do eggs boil", "what can I cook with rice", "is this soup still good", "find a recipe for bread"],
    "road": ["is the bridge closed", "how do I get to the station", "avoid the motorway", "how long is the drive"],
    "debt": ["how much do I owe", "when is the loan due", "lower my monthly rate", "I want to pay off the loan"],
    "mail": ["has my parcel come", "send it to another address", "the letter never came", "track the package"],
    "lamp": ["switch the lamp off", "dim the light", "the bulb is broken", "make it brighter in here"],
    "team": ["who won last night", "when is the next match", "what was the score", "is our team in the final"],
    "word": ["what does this word mean", "how is it spelled", "say it in another language", "give me a synonym"],
}
OPENINGS = ("", "please, ", "hello, ", "quick question: ", "sorry to bother, ", "again: ", "today: ", "good morning, ")
TRADES = ("bakery", "brewery", "forge", "mill", "pottery", "tannery", "dairy", "foundry", "printworks", "boatyard")
TRAITS = ("a blue gate", "two chimneys", "a walled garden", "a stone well", "a copper roof", "a long pier", "a bell tower")


def make(kind: str, rng: random.Random, length: int, tools: Tools) -> Made:
    """One probe of exactly `length` tokens.

    Raises:
        ConfigError: the length is too short.
    """
    return {"icl": _icl, "json_kv": _json_kv, "rag": _rag, "rerank": _rerank}[kind.removeprefix(PREFIX)](rng, length, tools)


def name_of(rng: random.Random, syllables: int = 3) -> str:
    """A made-up name that begins with a capital."""
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables)).capitalize()


def _built(kind: str, length: int, tools: Tools, start: str, end: str, **packed: Any) -> list[int]:
    head, tail = tools.encode(start, after=""), tools.encode(end, after="\n")
    body = tools.packed(PREFIX + kind, length, tools.room(PREFIX + kind, length, head, tail), **packed)
    return [*tools.prefix, *head, *body, *tail]


def _icl(rng: random.Random, length: int, tools: Tools) -> Made:
    """Classes get numbers that only the examples tell; the text that is asked is none of the examples."""
    texts = _labelled(tools)
    numbers = dict(zip(texts, rng.sample(range(len(texts)), len(texts)), strict=True))
    asked = rng.choice([label for label, some in texts.items() if len(some) > 1])
    question = rng.choice(texts[asked])

    def shown(label: str) -> str:
        return f"{rng.choice([text for text in texts[label] if text != question])}\nlabel: {numbers[label]}"

    def extras() -> Iterator[str]:
        while True:  # the classes in turn, in any order, as in HELMET's balanced sets
            yield from map(shown, rng.sample(list(texts), len(texts)))

    start = 'Use the provided mapping from the text to label to assign a label to the text. Only output "label: {label}" and '
    prompt = _built(
        "icl",
        length,
        tools,
        start + "nothing else. \n\n",
        f"{question}\nlabel:",
        needed=[(rng.random(), shown(asked))],
        extras=extras(),
        show=lambda _, text: text,
        between="\n\n",
    )
    return Made(prompt=prompt, answers=[str(numbers[asked])])


def _labelled(tools: Tools) -> dict[str, list[str]]:
    """label -> texts: the user's, or ours."""
    if texts := tools.labelled():
        return texts
    return {label: [opening + text for opening in OPENINGS for text in some] for label, some in INTENTS.items()}


def _json_kv(rng: random.Random, length: int, tools: Tools) -> Made:
    def pair() -> tuple[str, str]:
        return tuple(str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))  # type: ignore[return-value]

    key, value = pair()
    ask = "}\n\nExtract the value corresponding to the specified key in the JSON object below.\n\n"
    prompt = _built(
        "json_kv",
        length,
        tools,
        "JSON data:\n{",
        f"{ask}Key: {key}\nCorresponding value:",
        needed=[(rng.random(), f'"{key}": "{value}"')],
        extras=(f'"{a}": "{b}"' for a, b in iter(pair, None)),
        show=lambda _, text: text,
        between=",\n",
    )
    return Made(prompt=prompt, answers=[value])


def _rag(rng: random.Random, length: int, tools: Tools) -> Made:
    """A fact about a person; distractors tell the same of others, some of them of the same name or house."""
    first, last, town, trade = name_of(rng, 2), name_of(rng), name_of(rng), rng.choice(TRADES)

    def told(first: str, last: str, trade: str, town: str) -> str:
        year = rng.randrange(1700, 1990)
        text = f"{first} {last} opened a {trade} in {town} in {year}, and {rng.choice(TRAITS)} was added some years later."
        return f"Document (Title: {first} {last}): {text} It was kept by the family for {rng.randrange(2, 90)} years."

    def extras() -> Iterator[str]:
        for near in range(10**9):
            who = [(first, name_of(rng)), (name_of(rng, 2), last), (name_of(rng, 2), name_of(rng))][near % 3]
            yield told(*who, rng.choice(TRADES), name_of(rng))

    rule = "Use the given documents to write a concise and short answer to the question. "
    prompt = _built(
        "rag",
        length,
        tools,
        rule + "Write your answer in the following format:\nAnswer: [answer]\n\n",
        f"Question: In which town did {first} {last} open a {trade}?\nAnswer:",
        needed=[(rng.random(), told(first, last, trade, town))],
        extras=extras(),
        show=lambda _, text: text,
        between="\n\n",
    )
    return Made(prompt=prompt, answers=[town])


def _rerank(rng: random.Random, length: int, tools: Tools) -> Made:
    """Relevance is how much of what is asked for a document tells: trade, town and trait, 3 to 0 of them."""
    town, trade, trait = name_of(rng), rng.choice(TRADES), rng.choice(TRAITS)
    ids = iter(rng.sample(range(10**6, 10**7), 1 << 16))
    grades: dict[str, int] = {}

    def told(matching: tuple[bool, ...]) -> str:
        where = town if matching[0] else name_of(rng)
        what = trade if matching[1] else rng.choice([one for one in TRADES if one != trade])
        which = trait if matching[2] else rng.choice([one for one in TRAITS if one != trait])
        name = str(next(ids))
        grades[name] = sum(matching)
        return f"[ID: {name}] Document: The {what} of {name_of(rng)} stands in {where}. It has {which}."

    degrees = sorted(itertools.product((True, False), repeat=3), key=sum, reverse=True)
    needed = [(rng.random(), told(matching)) for matching in degrees[:4]]  # one of grade 3, three of grade 2
    rule = (
        "You are provided with a list of documents, each indicated by their ID. Rank each document based on their relevance to "
    )
    rule += (
        "the question in descending order from most relelvant to least relevant texts. Include all documents in the rankings. "
    )
    rule += "Write your answer using the unique IDs, with the following format:\nRanking: ID3 > ID1 > ID2\n\n"
    prompt = _built(
        "rerank",
        length,
        tools,
        rule,
        f"Query: {trade} in {town} with {trait}\nRanking:",
        needed=needed,
        extras=(told(rng.choice(degrees[4:])) for _ in itertools.count()),
        show=lambda _, text: text,
        between="\n\n",
    )
    best = sorted(grades, key=lambda one: -grades[one])[: len(needed)]  # the others count as irrelevant
    new = len(tools.encode(" > ".join(best * 3)))  # ten are counted
    return Made(prompt=prompt, answers=best, new_tokens=new, grades=tuple(grades[one] for one in best))
