"""Documents for the instruction-data tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

TALE = "the ship sailed north under a grey sky while captain Harrow wrote letters to his sister about ice whales and hunger"
WORDS = TALE.split()


def story(seed: int, sentences: int) -> str:
    """Sentences of random words, each beginning with a number of its own, with a blank line now and then."""
    draw = random.Random(seed)
    made = []
    for number in range(sentences):
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(5, 15)))
        made.append(f"Day {seed}.{number}: {words}{draw.choice(['.', '.', '!', '?'])}{draw.choice([' ', ' ', chr(10) * 2])}")
    return "".join(made)


def jsonl(path: Path, texts: list[str]) -> Path:
    """Write `texts` as documents doc0, doc1, ... and return `path`."""
    path.write_text("".join(json.dumps({"id": f"doc{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path
