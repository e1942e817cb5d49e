"""Rules as the one who answers: questions whose answers stand in the part, without a model.

For comparisons that must not depend on what a model makes up (`nemo-longctx ablate instruct`), and to try a pipeline before
money is spent on it. A record of the text (`The number for bade is 12345.`) is asked for by its name; where there is none, the
words that follow others are.
"""

from __future__ import annotations

import random
import re
from collections import Counter

from nemo_longctx.instruct.client import Call
from nemo_longctx.instruct.journal import Reply

PART = "Here is the part:\n\n"  # in every shipped prompt that shows a part
RECORD = re.compile(
    r"The (?:number for|code of) (?P<key>\w+) is (?P<value>\d+)\."
    r"|^(?P<listed>[a-z]+): (?P<value_listed>\d+);$|^(?P<set>[a-z]+) = (?P<value_set>\d+)$",
    re.MULTILINE,
)
ASKED_WORDS, ANSWER_WORDS = 5, 4


class Rules:
    """`Completer` that reads the shipped prompts; the same call gets the same reply."""

    concurrency = 1

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()

    async def close(self) -> None:
        """Nothing is held beyond this object."""

    async def complete(self, call: Call) -> Reply:
        """A pair about the part, or the verdict on one."""
        part = call.prompt.partition(PART)[2]
        if "<verdict>" in call.prompt:
            text = self._verdict(part)
        else:
            text = self._pair(part, random.Random(f"{call.seed} {call.attempt}"), short="a few words found" in call.prompt)
        return Reply(text=text, finish_reason="stop", prompt_tokens=0, completion_tokens=0)

    @staticmethod
    def _pair(part: str, rng: random.Random, *, short: bool) -> str:
        facts = records(part)
        if facts:
            key = rng.choice(sorted(facts))
            question, answer = f"What is the number for {key}?", facts[key]
            answer = answer if short else f"The number for {key} is {answer}."
        else:
            words = part.split()
            if len(words) < ASKED_WORDS + ANSWER_WORDS:
                return "<question></question>\n<answer></answer>"  # too little to ask about
            start = rng.randrange(len(words) - ASKED_WORDS - ANSWER_WORDS + 1)
            end = start + ASKED_WORDS
            question = f"Which words follow “{' '.join(words[start:end])}”?"
            answer = " ".join(words[end : end + ANSWER_WORDS])
        return f"<question>{question}</question>\n<answer>{answer}</answer>"

    @staticmethod
    def _verdict(part: str) -> str:
        part, _, pair = part.rpartition("\n\nQuestion: ")
        answer = pair.rpartition("\nAnswer: ")[2].strip()
        told = re.fullmatch(r"The number for \w+ is (\d+)\.", answer)
        stands = (told[1] if told else answer) in " ".join(part.split())
        word = "correct" if stands else "incorrect"
        return f"<reason>the answer {'stands' if stands else 'does not stand'} in the part</reason>\n<verdict>{word}</verdict>"


def records(text: str) -> dict[str, str]:
    """Key -> value of the records told in a text; those told with two values are left out."""
    told: dict[str, set[str]] = {}
    for match in RECORD.finditer(text):
        key = match["key"] or match["listed"] or match["set"]
        told.setdefault(key, set()).add(match["value"] or match["value_listed"] or match["value_set"])
    return {key: next(iter(values)) for key, values in told.items() if len(values) == 1}
