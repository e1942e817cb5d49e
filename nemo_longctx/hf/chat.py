"""A tokenizer's chat template, as this package asks in it: the same text on every day.

Some templates write today's date into every prompt (Llama 3.2, Granite). What was measured, or tuned on, would then depend on
the day, and a run that is resumed tomorrow would read other tokens. So the day is one and the same here.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_longctx.bars import say
from nemo_longctx.config import ConfigError

DAY = datetime.datetime(2024, 7, 26)  # what Llama 3.2's template writes where there is no clock
CLOCK = "strftime_now"  # the function by which a template asks for the day
HOLE = "\ue000"  # of the private use area: no template changes it
_told: set[str] = set()


def render(tokenizer: Any, turns: Sequence[Mapping[str, str]], *, today: bool = False, **options: Any) -> Any:
    """`tokenizer.apply_chat_template`, on `DAY`.

    Args:
        turns: {"role", "content"} of each.
        today: let the template write the day that it is, for a talk whose answers nobody compares.
        options: of `apply_chat_template`.
    """
    if not today and (day := day_of(tokenizer, options.get("chat_template"))):
        if day not in _told and os.environ.get("RANK", "0") == "0":
            _told.add(day)
            say(f"the chat template writes the day: it is {day} in all that is read here, so that no result depends on the day")
        options[CLOCK] = DAY.strftime
    return tokenizer.apply_chat_template(turns, **options)


def day_of(tokenizer: Any, template: Any = None) -> str:
    """The day that a template writes here; empty where it writes none."""
    text = template or getattr(tokenizer, "chat_template", None)
    return f"{DAY:%d %b %Y}" if CLOCK in str(text) else ""


def asked(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes in front of and behind a user's only turn, ready for the answer, without thought before it.

    Raises:
        ConfigError: there is no template, or one that changes what is asked.
    """
    if not getattr(tokenizer, "chat_template", None):
        mend = "this tokenizer has no chat template; leave it out, and probes are asked in plain text"
        raise ConfigError("probes.chat", True, mend)
    turns = [{"role": "user", "content": HOLE}]
    text = render(tokenizer, turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    head, hole, tail = text.partition(HOLE)
    if not hole or HOLE in tail:
        mend = "this chat template does not write what is asked once and as it stands; leave it out"
        raise ConfigError("probes.chat", True, mend)
    return head, tail
