"""One call to an OpenAI-compatible server: paced, retried with backoff, and never telling the key.

What fails for good ends the run (`EndpointError`) or, where the server refuses one request, only that request
(`CallError`); all else is retried. Retries never change what is asked, so they cannot change a run's output.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

from nemo_longctx.config import ConfigError
from nemo_longctx.instruct.journal import Reply

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletion

_BACKOFF_FIRST_S, _BACKOFF_MOST_S = 0.5, 60.0
# Until the server has answered once, a refused connection most likely means a wrong address: do not wait for minutes.
_RETRIES_BEFORE_FIRST_ANSWER = 2
# This many calls given up with no answer between them mean that the server, not a call, is at fault.
_GIVEN_UP_MEANS_DOWN = 3


# What a request may do without where a server does not take it; for `max_tokens` stands `max_completion_tokens`.
OMITTABLE = ("max_tokens", "temperature", "seed")
_NOT_TAKEN = re.compile(
    r"unsupported|not supported|n[o']t support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|extra inputs", re.I
)


class EndpointError(ValueError):
    """The endpoint cannot serve this run: it is down, refuses the key, or does not know the model."""


class CallError(ValueError):
    """This one call got no answer; others may. `refused` tells a refusal for good from retries used up."""

    def __init__(self, message: str, *, refused: bool):
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How calls travel. Nothing here changes what comes out.

    Args:
        endpoint: base URL of an OpenAI-compatible server (`http://localhost:8000/v1`).
        concurrency: calls in flight at once.
        requests_per_minute: most calls begun in a minute, retries included; 0 means no limit.
        timeout_s: seconds after which one call counts as hung.
        max_retries: tries of one call beyond the first before it is given up for this run.
        api_key_env: environment variable that holds the key; unset sends none (local servers need none).
    """

    endpoint: str
    concurrency: int = 8
    requests_per_minute: float = 0
    timeout_s: float = 120.0
    max_retries: int = 8
    api_key_env: str = "OPENAI_API_KEY"

    def __post_init__(self):
        url = urlsplit(self.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(
                "endpoint", self.endpoint, "is no http(s) address; give the base URL, as http://localhost:8000/v1"
            )
        if url.username or url.password or url.query:
            raise ConfigError("endpoint", f"{url.scheme}://{url.hostname}", "holds a key; keys only come from the environment")
        if self.concurrency < 1:
            raise ConfigError("concurrency", self.concurrency, "must be at least 1")
        if not 0 <= self.requests_per_minute < math.inf:
            mend = "must be a number that is not negative; 0 means no limit"
            raise ConfigError("requests_per_minute", self.requests_per_minute, mend)
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError("timeout_s", self.timeout_s, "must be a number of seconds, more than 0")
        if self.max_retries < 0:
            raise ConfigError("max_retries", self.max_retries, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request. `attempt` counts replies out of form to the same words: a new attempt is a new, separately paid call.

    `extra` is JSON that goes into the request beside the rest, `omit` names what does not go into it.
    """

    model: str
    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    attempt: int
    extra: str = ""
    omit: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """SHA-256 over all that shapes the reply."""
        parts: list[object] = [self.model, self.prompt, self.max_tokens, self.temperature, self.seed, self.attempt]
        parts += [self.extra, sorted(self.omit)] if self.extra or self.omit else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_key(variable: str, environment: Mapping[str, str]) -> str | None:
    """The key in an environment variable, without the white space around it; None where the variable is unset.

    Raises:
        ConfigError: no key can look like that. The message names the variable and never the value.
    """
    if variable not in environment:
        return None
    key = environment[variable].strip()
    if not key:
        raise ConfigError("api_key_env", variable, "the variable is empty; put the key in it, or unset it to send none")
    if not (key.isascii() and key.isprintable()):
        mend = "the variable holds line ends, control characters or letters beyond ASCII, which no HTTP header can; set it anew"
        raise ConfigError("api_key_env", variable, mend)
    return key


class Completer(Protocol):
    """Anything that answers calls: a server, or a checkpoint in this process."""

    concurrency: int
    faults: Counter[str]

    async def complete(self, call: Call) -> Reply:
        """Answer one call. Raises EndpointError or CallError."""
        ...

    async def close(self) -> None:
        """Give back what is held."""
        ...


class ChatClient:
    """`Completer` over the `openai` client. `faults` counts what went wrong and was retried, by name.

    Args:
        config: how to travel.
        api_key: the key, or None to send a placeholder (the client insists on one).
    """

    def __init__(self, config: ClientConfig, *, api_key: str | None):
        from openai import AsyncOpenAI

        self.config = config
        self.concurrency = config.concurrency
        self.faults: Counter[str] = Counter()
        self._key = api_key
        self._answered = False
        self._given_up = 0  # calls given up since the last answer
        self._refused: set[str] = set()  # fields of OMITTABLE that the server said it does not take
        self._next_start = 0.0  # monotonic seconds before which no call may begin
        self._openai = AsyncOpenAI(base_url=config.endpoint, api_key=api_key or "none", max_retries=0, timeout=config.timeout_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    async def complete(self, call: Call) -> Reply:
        """Answer one call, through as many retries as it takes within the limit.

        Raises:
            EndpointError: the endpoint is down, refuses the key, or does not know the model.
            CallError: the server refuses this request for what it holds, or the retries are used up.
        """
        import openai

        tries = 0
        while True:
            await self._wait_for_turn()
            try:
                async with asyncio.timeout(self.config.timeout_s):  # httpx's own limit restarts with every byte
                    completion = await self._request(call)
                reply = _reply(completion)
                self._answered, self._given_up = True, 0
                return reply
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                where = (
                    f"the key in {self.config.api_key_env}"
                    if self._key
                    else f"a call without a key ({self.config.api_key_env} is unset)"
                )
                raise EndpointError(f"{self.config.endpoint} refused {where}: {self._said(error)}") from None
            except openai.NotFoundError as error:
                raise EndpointError(f"{self.config.endpoint} has no model {call.model!r} there: {self._said(error)}") from None
            except (openai.RateLimitError, openai.InternalServerError, openai.ConflictError) as error:
                fault, wait_s = f"http_{error.status_code}", _retry_after(error)
                self._answered = True
                last = self._said(error)
            except openai.APIStatusError as error:
                field = self._unsupported(error)
                if field is not None:  # of no call more, so that this is no endless round
                    self._refused.add(field)
                    continue
                if error.status_code == 408:
                    fault, wait_s, last = "http_408", 0.0, self._said(error)
                else:
                    raise CallError(f"HTTP {error.status_code}: {self._said(error)}", refused=True) from None
            except (TimeoutError, openai.APITimeoutError):
                fault, wait_s, last = "hung", 0.0, f"no answer within {self.config.timeout_s:g} s"
            except openai.APIConnectionError as error:
                fault, wait_s, last = "connection", 0.0, self._said(error.__cause__ or error)
            except (openai.APIResponseValidationError, json.JSONDecodeError, BrokenReplyError) as error:
                fault, wait_s, last = "broken_reply", 0.0, self._said(error)
            self.faults[fault] += 1
            tries += 1
            allowed = self.config.max_retries if self._answered else min(self.config.max_retries, _RETRIES_BEFORE_FIRST_ANSWER)
            if tries > allowed:
                self._given_up += 1
                if not self._answered or self._given_up >= _GIVEN_UP_MEANS_DOWN:
                    raise EndpointError(f"{self.config.endpoint} does not answer; after {tries} tries: {last}")
                raise CallError(f"no answer after {tries} tries: {last}", refused=False)
            await self._back_off(tries, wait_s)

    async def _request(self, call: Call) -> ChatCompletion:
        left_out = self._refused | set(call.omit)
        body: dict[str, Any] = {"temperature": call.temperature, "seed": call.seed, "max_tokens": call.max_tokens}
        body = {name: value for name, value in body.items() if name not in left_out}
        if "max_tokens" in left_out:
            body["max_completion_tokens"] = call.max_tokens
        return await self._openai.chat.completions.create(
            model=call.model,
            messages=[{"role": "user", "content": call.prompt}],
            extra_body=json.loads(call.extra) if call.extra else None,
            # A server that knows the header answers a repeated request from its memory, so that even the calls that a kill
            # left in flight are not charged again.
            extra_headers={"Idempotency-Key": call.key},
            **body,
        )

    def _unsupported(self, error: openai.APIStatusError) -> str | None:
        """The field that the server's refusal says it does not take (reasoning models: `max_tokens`, `temperature`)."""
        said = str(error)
        if error.status_code not in (400, 422) or not _NOT_TAKEN.search(said):
            return None
        named = [name for name in OMITTABLE if name not in self._refused and re.search(rf"\b{name}\b", said)]
        return min(named, key=said.index, default=None)

    async def _wait_for_turn(self) -> None:
        now = time.monotonic()
        start = max(now, self._next_start)
        if self.config.requests_per_minute:
            self._next_start = start + 60.0 / self.config.requests_per_minute
        await asyncio.sleep(start - now)

    async def _back_off(self, tries: int, wait_s: float) -> None:
        """Exponential with full jitter (Brooker 2015); a wait that the server asks for holds back every call."""
        if wait_s:
            self._next_start = max(self._next_start, time.monotonic() + min(wait_s, _BACKOFF_MOST_S))
        await asyncio.sleep(random.uniform(0, min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2 ** (tries - 1))))

    def _said(self, error: BaseException) -> str:
        """The error's own words on one line, without the key (servers like to quote it)."""
        words = _redact(str(error), self._key) if self._key else str(error)
        return (" ".join(words.split()) or type(error).__name__)[:300]


def _redact(words: str, key: str) -> str:
    """`words` without the key in any form that a message may quote it: as it is, stripped, escaped, percent-encoded."""
    forms = {form for whole in (key, key.strip()) for form in (whole, repr(whole)[1:-1], json.dumps(whole)[1:-1], quote(whole))}
    forms |= {" ".join(key.split()), repr(key.encode())[2:-1]}
    for form in sorted(filter(None, forms), key=len, reverse=True):
        words = words.replace(form, "[key]")
    return words


# Why a reply ended, as servers say it: out of tokens, taken by a filter; and our word for a refusal in the model's own words.
LENGTH, FILTERED, REFUSAL = "length", "content_filter", "refusal"


class BrokenReplyError(ValueError):
    """An answer with status 200 that holds no message."""


def _reply(completion: ChatCompletion) -> Reply:
    """The reply in a server's answer, whose parts may have any type: the `openai` client checks none of them.

    Raises:
        BrokenReplyError: there is no text in it.
    """
    choices = getattr(completion, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    message, usage = getattr(first, "message", None), getattr(completion, "usage", None)
    finish_reason = getattr(first, "finish_reason", None)
    finish_reason = finish_reason if isinstance(finish_reason, str) and finish_reason else "stop"
    content, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    if isinstance(refusal, str) and refusal and not content:
        content, finish_reason = refusal, REFUSAL
    elif content is None and message is not None and finish_reason in (LENGTH, FILTERED):
        content = ""  # all tokens went into thoughts, or a filter took the answer: paid for, and asking again is no cure
    return Reply(
        text=_text(content),
        finish_reason=finish_reason,
        prompt_tokens=_count(getattr(usage, "prompt_tokens", None)),
        completion_tokens=_count(getattr(usage, "completion_tokens", None)),
    )


def _text(content: object) -> str:
    """A message's text; some servers give it as a list of parts, of which those of type `text` count."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(part for part in parts if isinstance(part, str)) if parts else None
    if not isinstance(content, str):
        raise BrokenReplyError("the answer holds no message with text")
    return content


def _count(value: object) -> int:
    """Tokens as the server counted them; 0 where it gave no number."""
    return int(value) if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else 0


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds the server asks to wait (the header's other form, a date, counts as none)."""
    value = error.response.headers.get("retry-after", "")
    return float(value) if value.replace(".", "", 1).isdigit() else 0.0
