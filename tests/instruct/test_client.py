"""The client against a real server: every fault is retried, and what cannot be mended is said at once, without the key."""

import asyncio
import dataclasses
import time
import types

import pytest
from faulty_server import TRANSIENT, Behaviour, answer, serve

from nemo_longctx.config import ConfigError
from nemo_longctx.instruct import client as client_module
from nemo_longctx.instruct.client import Call, CallError, ChatClient, ClientConfig, EndpointError, read_key


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "_BACKOFF_FIRST_S", 0.001)


def call(prompt: str = "Here is the part: A b.", attempt: int = 0) -> Call:
    return Call(model="small", prompt=prompt, max_tokens=9, temperature=0.5, seed=7, attempt=attempt)


def complete(config: ClientConfig, *calls: Call, api_key: str | None = None):
    async def run():
        client = ChatClient(config, api_key=api_key)
        try:
            return [await client.complete(one) for one in calls], client.faults
        finally:
            await client.close()

    return asyncio.run(run())


def test_a_call_carries_its_settings_and_the_reply_its_usage():
    behaviour = Behaviour()
    with serve(behaviour) as url:
        (reply,), faults = complete(ClientConfig(endpoint=url), call())
    sent = behaviour.bodies[0]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["seed"]) == ("small", 9, 0.5, 7)
    assert reply.text == answer("Here is the part: A b.")
    assert (reply.prompt_tokens, reply.completion_tokens, reply.finish_reason) == (100, 10, "stop")
    assert not faults


@pytest.mark.parametrize("fault", TRANSIENT)
def test_each_fault_is_retried(fault, monkeypatch):
    monkeypatch.setattr(client_module, "_RETRIES_BEFORE_FIRST_ANSWER", 20)
    behaviour = Behaviour(fault_rate=1.0, faults=(fault,), most_faults=2, hang_s=0.6)
    with serve(behaviour) as url:
        hung = {"timeout_s": 0.3, "max_retries": 20}  # a busy machine may be late with a good reply, too
        config = ClientConfig(endpoint=url, **(hung if fault == "hung" else {"timeout_s": 60, "max_retries": 2}))
        (reply,), faults = complete(config, call())
    assert reply.text == answer("Here is the part: A b.")
    assert sum(faults.values()) == 2 or (fault == "hung" and sum(faults.values()) > 2)
    assert len(behaviour.bodies) == sum(faults.values()) + 1


def test_waits_double_to_a_minute_and_hold_to_the_rate(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    def most(low, high):
        assert low == 0
        return high

    async def run():
        client = ChatClient(ClientConfig(endpoint="http://127.0.0.1:9/v1", requests_per_minute=30), api_key=None)
        try:
            for tries in range(1, 10):
                await client._back_off(tries, 0.0)
            await client._back_off(1, 7.0)  # the server asks for it: every call waits, and the next one longer by the rate
            await client._wait_for_turn()
            await client._wait_for_turn()
            await client._back_off(1, 1000.0)
            await client._wait_for_turn()
        finally:
            await client.close()

    monkeypatch.setattr(client_module, "_BACKOFF_FIRST_S", 0.5)
    monkeypatch.setattr(client_module.asyncio, "sleep", sleep)
    monkeypatch.setattr(client_module.random, "uniform", most)
    monkeypatch.setattr(client_module, "time", types.SimpleNamespace(monotonic=lambda: 100.0))
    asyncio.run(run())
    assert slept == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 0.5, 7, 9, 0.5, 60]


def test_retries_end():
    behaviour = Behaviour(fault_rate=1.0, faults=("500",), most_faults=100)
    with serve(behaviour) as url, pytest.raises(CallError) as error:
        complete(ClientConfig(endpoint=url, max_retries=4), call())
    assert not error.value.refused
    assert len(behaviour.bodies) == 5


def test_a_server_that_stays_broken_ends_the_run():
    async def run(url):
        client = ChatClient(ClientConfig(endpoint=url, max_retries=0), api_key=None)
        for attempt in range(2):
            with pytest.raises(CallError):
                await client.complete(call(attempt=attempt))
        with pytest.raises(EndpointError, match="does not answer"):
            await client.complete(call(attempt=2))
        await client.close()

    with serve(Behaviour(status=500)) as url:
        asyncio.run(run(url))


def test_a_server_is_down_only_after_calls_given_up_on_end():
    """Two of three are a bad day, and any answer begins the count anew."""
    behaviour, given_up = Behaviour(), []

    async def run(url):
        client = ChatClient(ClientConfig(endpoint=url, max_retries=0), api_key=None)
        for attempt, works in enumerate([True, False, False, True, False, False, True, False, False, False]):
            behaviour.status = None if works else 500
            try:
                await client.complete(call(attempt=attempt))
            except CallError:
                given_up.append(attempt)
            except EndpointError:
                given_up.append("down")
        await client.close()

    with serve(behaviour) as url:
        asyncio.run(run(url))
    assert given_up == [1, 2, 4, 5, 7, 8, "down"]


def test_endpoint_that_is_down():
    with serve(Behaviour()) as url:
        pass
    with pytest.raises(EndpointError, match=r"does not answer; after 3 tries"):
        complete(ClientConfig(endpoint=url), call())


def test_wrong_key_is_said_once_and_without_the_key():
    behaviour = Behaviour(accept_key="right")
    with serve(behaviour) as url, pytest.raises(EndpointError, match="refused the key in OPENAI_API_KEY") as error:
        complete(ClientConfig(endpoint=url), call(), api_key="sk-secret-123")
    assert "sk-secret" not in str(error.value)
    assert len(behaviour.bodies) == 1
    with serve(behaviour) as url, pytest.raises(EndpointError, match="OPENAI_API_KEY is unset"):
        complete(ClientConfig(endpoint=url), call())


@pytest.mark.parametrize("key", ["sk-SECRET123\n", "sk-SECRET\t123", "sk-SECRET123é", "sk-SECRET\\123\r\n", "sk-SECRET 123"])
def test_the_key_is_redacted_in_every_form_that_an_error_may_quote(key):
    with serve(Behaviour(accept_key="right")) as url, pytest.raises((EndpointError, UnicodeEncodeError)) as error:
        complete(ClientConfig(endpoint=url, max_retries=0), call(), api_key=key)
    assert "SECRET" not in str(error.value)


def test_a_key_is_read_without_the_white_space_around_it():
    assert read_key("KEY", {"KEY": " sk-1\n"}) == "sk-1"
    assert read_key("KEY", {}) is None


@pytest.mark.parametrize("value", ["", " \n", "sk-SECRET\nmore", "sk-SECRET\x00", "sk-SECRETé"])
def test_a_key_that_no_header_can_hold_is_refused_without_telling_it(value):
    with pytest.raises(ConfigError, match=r"MY_KEY.*the variable") as error:
        read_key("MY_KEY", {"MY_KEY": value})
    assert "SECRET" not in str(error.value)


def choice(content):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}


def test_counts_that_are_missing_are_zero():
    with serve(Behaviour(odd={"usage": {"prompt_tokens": None, "completion_tokens": "many"}})) as url:
        (reply,), faults = complete(ClientConfig(endpoint=url), call())
    assert (reply.prompt_tokens, reply.completion_tokens) == (0, 0)
    assert not faults


def test_text_in_parts_is_joined():
    parts = [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "<a>"}, {"type": "text", "text": "b"}]
    with serve(Behaviour(odd=choice(parts))) as url:
        (reply,), _ = complete(ClientConfig(endpoint=url), call())
    assert reply.text == "<a>b"


@pytest.mark.parametrize(
    "odd",
    [
        choice([{"type": "image"}]),
        choice({"text": "b"}),
        choice(None),
        {"choices": [{"index": 0, "finish_reason": "stop"}]},
        {"choices": ["b"]},
        {"choices": {"message": "b"}},
    ],
)
def test_an_answer_without_text_is_a_broken_reply(odd):
    behaviour = Behaviour(odd=odd)
    with serve(behaviour) as url, pytest.raises(EndpointError, match="holds no message with text"):
        complete(ClientConfig(endpoint=url, max_retries=1), call())
    assert len(behaviour.bodies) == 2


@pytest.mark.parametrize(("status", "error"), [(400, CallError), (413, CallError), (404, EndpointError), (403, EndpointError)])
def test_refusals_are_not_retried(status, error):
    behaviour = Behaviour(status=status)
    with serve(behaviour) as url, pytest.raises(error, match="maximum context length"):
        complete(ClientConfig(endpoint=url), call())
    assert len(behaviour.bodies) == 1


def test_rate_limit_spaces_the_calls():
    with serve(Behaviour()) as url:
        began = time.monotonic()
        complete(ClientConfig(endpoint=url, requests_per_minute=600), *(call(attempt=i) for i in range(4)))
        assert time.monotonic() - began >= 0.3  # a limit is a promise about time: three gaps of 0.1 s


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"endpoint": "localhost:8000"}, "http"),
        ({"endpoint": "http://user:secret@host/v1"}, "environment"),
        ({"endpoint": "http://h", "concurrency": 0}, "at least 1"),
        ({"endpoint": "http://h", "timeout_s": 0}, "seconds"),
        ({"endpoint": "http://h", "timeout_s": float("nan")}, "seconds"),
        ({"endpoint": "http://h", "max_retries": -1}, "negative"),
        ({"endpoint": "http://h", "requests_per_minute": float("nan")}, "negative"),
        ({"endpoint": "http://h", "requests_per_minute": -1}, "negative"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        ClientConfig(**settings)
    assert "secret" not in str(error.value)


def odd(content, finish, **message):
    message = {"role": "assistant", "content": content, **message}
    return Behaviour(odd={"choices": [{"index": 0, "message": message, "finish_reason": finish}]})


@pytest.mark.parametrize(
    ("behaviour", "text", "finish"),
    [
        (odd(None, "length"), "", "length"),
        (odd(None, "content_filter"), "", "content_filter"),
        (odd(None, "stop", refusal="I cannot help."), "I cannot help.", "refusal"),
        (odd("cut", "length"), "cut", "length"),
    ],
)
def test_a_paid_answer_without_text_is_an_answer(behaviour, text, finish):
    with serve(behaviour) as url:
        (reply,), faults = complete(ClientConfig(endpoint=url), call())
    assert (reply.text, reply.finish_reason, reply.completion_tokens) == (text, finish, 10)
    assert len(behaviour.bodies) == 1
    assert not faults


def test_a_server_without_some_fields_is_asked_without_them():
    behaviour = Behaviour(takes_not=("max_tokens", "temperature"))
    with serve(behaviour) as url:
        replies, faults = complete(ClientConfig(endpoint=url), call(), call("Here is the part: C d."))
    assert [reply.finish_reason for reply in replies] == ["stop", "stop"]
    assert len(behaviour.bodies) == 4  # each field is told once, and never sent again
    last = behaviour.bodies[-1]
    assert last["max_completion_tokens"] == 9
    assert not {"max_tokens", "temperature"} & set(last)
    assert not faults


def test_what_is_added_and_left_out_by_option():
    behaviour, asked = Behaviour(), dataclasses.replace(call(), extra='{"think": false}', omit=("temperature", "max_tokens"))
    with serve(behaviour) as url:
        complete(ClientConfig(endpoint=url), asked)
    (sent,) = behaviour.bodies
    assert (sent["think"], sent["max_completion_tokens"]) == (False, 9)
    assert not {"max_tokens", "temperature"} & set(sent)
    assert len({call().key, asked.key, dataclasses.replace(asked, extra="").key, dataclasses.replace(asked, omit=()).key}) == 4


def test_the_journal_of_an_earlier_release_answers_the_same_calls():
    """A key that changed would have every reply paid for again."""
    assert call().key == "120ca2e42d0591c23fd9c43a8a654887a601bf2e4a953cf743bb811d1aa3b4f4"
    asked = dataclasses.replace(call(), extra='{"think": false}', omit=("temperature", "max_tokens"))
    assert (
        asked.key
        == dataclasses.replace(asked, omit=("max_tokens", "temperature")).key
        == "eea4eca793be95608613277b1202453948a99db08fca88555877ceeab91fe2aa"
    )
    changes = [
        {"model": "large"}, {"prompt": "x"}, {"max_tokens": 10}, {"temperature": 0.6}, {"seed": 8}, {"attempt": 1},
        {"extra": "{}"}, {"omit": ("seed",)},
    ]  # fmt: skip
    assert len({call().key, *(dataclasses.replace(call(), **change).key for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("given", "counted"), [(7, 7), (7.9, 7), (0, 0), (-1, 0), (None, 0), ("7", 0), (float("inf"), 0), (float("nan"), 0)]
)
def test_counts_are_whole_numbers_or_none(given, counted):
    assert client_module._count(given) == counted


@pytest.mark.parametrize(
    ("header", "seconds"), [("3", 3.0), ("0.5", 0.5), ("", 0.0), ("1.2.3", 0.0), ("-1", 0.0), ("soon", 0.0)]
)
def test_the_wait_that_a_server_asks_for(header, seconds):
    error = types.SimpleNamespace(response=types.SimpleNamespace(headers={"retry-after": header}))
    assert client_module._retry_after(error) == seconds


def test_an_error_s_words_are_one_line_of_bounded_length():
    client = types.SimpleNamespace(_key="sk-1")
    assert ChatClient._said(client, ValueError(" a\n b  sk-1 ")) == "a b [key]"
    assert ChatClient._said(client, ValueError()) == "ValueError"
    assert ChatClient._said(types.SimpleNamespace(_key=None), ValueError("x" * 400)) == "x" * 300
