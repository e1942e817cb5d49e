"""When a run of calls gives up: after so many useless replies on end, counted by a loop that anyone can read."""

import asyncio
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.instruct.client import Call, CallError
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


class Told(Script):
    """Answers each prompt's replies one after the other: (text, how it ended), or an error to raise."""

    def __init__(self, replies):
        super().__init__()
        self.replies = {name: list(some) for name, some in replies.items()}

    async def complete(self, call: Call) -> Reply:
        reply = self.replies[call.prompt].pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Reply(text=reply[0], finish_reason=reply[1], prompt_tokens=1000, completion_tokens=10)


def ask(tmp_path, replies, *, prices=None, faults=(), **limits):
    limits = {"form_attempts": 2, "stop_after_malformed": 99} | limits
    completer = Told(replies)
    completer.faults.update(faults)

    async def run():
        with Journal(tmp_path / "journal.jsonl") as journal:
            asker = Asker(completer, journal, prices=prices or Prices(), show_progress=False, **limits)
            outcomes = await asker.ask_all("s", [Item(name) for name in replies], a_call, parse)
            return outcomes, asker

    return asyncio.run(run())


def a_call(item, attempt):
    return Call(model="m", prompt=item.id, max_tokens=1, temperature=0.0, seed=0, attempt=attempt)


REPLIES = {
    "first": [("good", "stop")],
    "second": [("bad", "stop"), ("good", "stop")],
    "never": [("bad", "stop"), ("good", "length")],
    "filtered": [("half", "content_filter")],
    "refusing": [("x" * 400, "refusal")],
    "refused": [CallError("HTTP 400: too long", refused=True)],
    "lost": [CallError("no answer", refused=False)],
}


def test_each_item_has_its_outcome_and_all_is_counted(tmp_path):
    outcomes, asker = ask(tmp_path, REPLIES, prices=Prices(input=2, output=100), faults={"hung": 2, "http_500": 1})
    assert {name: (one.value, one.reason, one.said) for name, one in outcomes.items()} == {
        "first": ("good", None, None), "second": ("good", None, None), "never": (None, "malformed", "cut_off"),
        "filtered": (None, "refused", "content_filter: half"), "refusing": (None, "refused", "refusal: " + "x" * 291),
        "refused": (None, "refused", "HTTP 400: too long"), "lost": (None, "unanswered", "no answer"),
    }  # fmt: skip
    assert asker.summary() == {
        "made": 7, "replayed": 0, "prompt_tokens": 7000, "completion_tokens": 70, "cost": pytest.approx(7 * 0.003),
        "faults_retried": {"http_500": 1, "hung": 2},
        "out_of_form": {"bad": 2, "content_filter": 1, "cut_off": 1, "refusal": 1, "refused": 1},
        "failures": {"HTTP 400: too long": 1, "no answer": 1},
    }  # fmt: skip
    assert asker._purse() == "cost 0.0210, 7,000 + 70 tokens, 3 retries"
    again = {name: [one for one in some if isinstance(one, Exception)] for name, some in REPLIES.items()}
    outcomes, asker = ask(tmp_path, again)
    assert (asker.made, asker.replayed, asker._purse()) == (0, 7, "7,000 + 70 tokens")
    assert outcomes["second"].value == "good"


def test_what_ends_a_run_is_told_with_its_counts(tmp_path):
    replies = {str(n): [("bad", "stop")] for n in range(3)}
    replies |= {"3": [CallError("HTTP 400: too long", refused=True)], "4": [("x", "refusal")], "5": [("good", "stop")]}
    with pytest.raises(NeverInFormError) as error:
        ask(tmp_path, replies, form_attempts=1, stop_after_malformed=5)
    assert str(error.value).startswith(
        "the last 5 calls gave nothing in form (3 bad, 1 refused, 1 refusal); the server said: HTTP 400: too long; "
        "stopped after 4 new replies (4,000 + 40 tokens). Try other prompts"
    )
    for bad in (-0.01, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="price_output="):
            Prices(output=bad)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_run_that_is_stopped_begins_no_call_more(tmp_path, concurrency):
    completer = Told({str(n): [("good", "stop")] for n in range(9)})
    completer.concurrency = concurrency

    async def run():
        with Journal(tmp_path / "journal.jsonl") as journal:
            asker = Asker(completer, journal, form_attempts=1, stop_after_malformed=9, prices=Prices(), show_progress=False)
            complete = completer.complete

            async def stopping(call):
                asker.stop()
                return await complete(call)

            completer.complete = stopping
            with pytest.raises(KeyboardInterrupt):
                await asker.ask_all("s", [Item(str(n)) for n in range(9)], a_call, parse)
            return asker.made, len(journal)

    made, kept = asyncio.run(run())
    assert made == kept <= concurrency
    assert made >= 1
