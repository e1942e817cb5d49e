"""Needles that share no word with their question (after NoLiMa, Modarressi et al. 2025): what links them has to be known.

The pairs are our own, in NoLiMa's form: a sentence about a character, and a question that only knowledge of the world ties to
it.
"""

from __future__ import annotations

import random

from nemo_longctx.eval.probe_tools import Made, Tools

KIND = "nolima"
CHARACTERS = (
    "Yuki", "Stuart", "Katie", "Veronica", "Gary", "Megan", "Calvin", "Mandy", "Diana", "Caleb", "Fatima", "Tobias",
    "Ingrid", "Rashid", "Noor", "Otto",
)  # fmt: skip
# (sentence about {name}, question). No word of weight stands in both.
PAIRS = (
    ("Actually, {name} lives next to the Semper Opera House.", "Which character has been to Dresden?"),
    ("{name} sells postcards in front of the Eiffel Tower.", "Which character works in Paris?"),
    ("From the kitchen window {name} sees Big Ben.", "Which character lives in London?"),
    ("{name} spent the whole winter beside the Kremlin.", "Which character was in Moscow?"),
    ("Every morning {name} jogs past the Colosseum.", "Which character is in Rome?"),
    ("{name} grew up in the shadow of the Acropolis.", "Which character comes from Athens?"),
    ("The Alhambra is where {name} was married.", "Which character has been to Granada?"),
    ("{name} guides visitors through the Hagia Sophia.", "Which character works in Istanbul?"),
    ("{name} was allergic to everything with milk in it.", "Which character cannot eat cheese?"),
    ("{name} has not eaten meat since childhood.", "Which character would refuse a steak?"),
    ("{name} never learned to swim.", "Which character would be in danger in deep water?"),
    ("At night {name} looks for comets through a telescope.", "Which character is fond of astronomy?"),
    ("{name} spends the days tending hives.", "Which character could give you honey?"),
    ("{name} teaches the violin to children.", "Which character is a musician?"),
    ("{name} pulls rotten teeth for a living.", "Which character is a dentist?"),
    ("{name} has painted the same lake forty times in oil.", "Which character is an artist?"),
)


def make(rng: random.Random, length: int, depth: float, tools: Tools, *, start: int, text: str) -> Made:
    """One probe of exactly `length` tokens.

    Args:
        start: character at which the haystack begins. text: the user's text; a name that stands in it is not used.

    Raises:
        ConfigError: the length is too short.
    """
    (told, question), name = rng.choice(PAIRS), rng.choice([one for one in CHARACTERS if one not in text] or CHARACTERS)
    head = tools.encode("You will answer a question based on the following book snippet:\n\n", after="")
    needle = tools.encode(" " + told.format(name=name))
    tail = tools.encode(
        "\n\nUse the information provided in the book snippet to answer the question. Your answer should be short and based on "
        f"either explicitly stated facts or strong, logical inferences.\n\nQuestion: {question}\n\nAnswer:"
    )
    room = tools.room(KIND, length, head, needle, tail)
    return Made(
        prompt=[*tools.prefix, *head, *tools.spread(tools.essay(start, room), [(depth, needle)]), *tail], answers=[name]
    )
