"""When a run of calls gives up: after so many useless replies on end, counted by a loop that anyone can read."""

import asyncio
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.instruct.client import Call
from nemo_longctx.instruct.journal import Journal, Reply
from nemo_longctx.instruct.prompts import FormError
from nemo_longctx.instruct.replies import Asker, NeverInFormError, Prices


class Script:
    """A model that answers one call at a time what a script says."""

    concurrency = 1

    def __init__(self):
        self.faults = Counter()

    async def complete(self, call: Call) -> Reply:
        return Reply(text=call.prompt.split()[0], finish_reason="stop", prompt_tokens=1, completion_tokens=1)

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class Item:
    id: str


def parse(text):
    if text == "bad":
        raise FormError("bad")
    return text


def stops_at(stages, limit):
    """(stage, replies made in all) of the reply that ends the run; replies made where none does."""
    made = 0
    for number, replies in enumerate(stages):
        useless = 0
        for good in replies:
            made += 1
            useless = 0 if good else useless + 1
            if useless == limit:
                return number, made
    return None, made


@settings(max_examples=60, deadline=None)
@given(stages=st.lists(st.lists(st.booleans(), max_size=8), min_size=1, max_size=3), limit=st.integers(1, 4))
def test_a_run_ends_at_so_many_useless_replies_on_end_of_one_stage(tmp_path_factory, stages, limit):
    async def run(journal):
        asker = Asker(Script(), journal, form_attempts=1, stop_after_malformed=limit, prices=Prices(), show_progress=False)
        for number, replies in enumerate(stages):
            items = [Item(f"{'good' if good else 'bad'} {number} {index}") for index, good in enumerate(replies)]

            def make_call(item, attempt):
                return Call(model="m", prompt=item.id, max_tokens=1, temperature=0.0, seed=0, attempt=attempt)

            try:
                outcomes = await asker.ask_all("stage", items, make_call, parse)
            except NeverInFormError:
                return number, asker.made
            assert [outcomes[item.id].value for item in items] == ["good" if good else None for good in replies]
        return None, asker.made

    with Journal(tmp_path_factory.mktemp("journal") / "journal.jsonl") as journal:
        assert asyncio.run(run(journal)) == stops_at(stages, limit)


def test_prices_are_for_a_million_tokens_each_of_its_kind():
    reply = Reply(text="x", finish_reason="stop", prompt_tokens=1_000_000, completion_tokens=500_000)
    assert Prices(input=3).of(reply) == 3
    assert Prices(output=50).of(reply) == 25
    assert Prices(input=3, output=50).of(reply) == 28
    assert Prices().of(reply) == 0
    for name in ("input", "output"):
        with pytest.raises(ValueError, match=f"price_{name}=-1"):
            Prices(**{name: -1})
