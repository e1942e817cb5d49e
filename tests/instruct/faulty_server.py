"""A small real HTTP server that speaks the OpenAI chat protocol, with faults on request.

The answer is a function of the prompt alone, so a run with faults must come to the same output as one without. It tells
calls apart by the Idempotency-Key header but, like most servers, has no memory behind it: a repeated call is charged again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TRANSIENT = ("429", "500", "503", "reset", "short_body", "broken_json", "no_choices", "hung")


@dataclass(kw_only=True)
class Behaviour:
    """What the server does; `fault_rate` of the arrivals of a call fail, at most `most_faults` for one call."""

    fault_rate: float = 0.0
    faults: tuple[str, ...] = TRANSIENT
    most_faults: int = 3
    malformed_rate: float = 0.0  # first attempts answered out of form (paid for all the same)
    always: str | None = None  # every reply is this text
    status: int | None = None  # every reply is this error
    odd: dict | None = None  # fields that stand in every completion in place of the usual ones
    accept_key: str | None = None
    takes_not: tuple[str, ...] = ()  # fields of a request that are refused, in the words of servers of reasoning models
    delay_s: float = 0.0
    hang_s: float = 3.0  # a "hung" reply never comes; so much later the connection closes
    arrivals: Counter = field(default_factory=Counter)
    answered: Counter = field(default_factory=Counter)
    bodies: list[dict] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def draw(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` only."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


def answer(prompt: str) -> str:
    """In form, and the same for the same prompt: about one critique in five says no, one question in ten repeats another."""
    if "<verdict>" in prompt:
        correct = draw("verdict", prompt) >= 0.2
        verdict = "correct" if correct else "incorrect"
        return f"<reason>It is {'' if correct else 'not '}there.</reason>\n<verdict>{verdict}</verdict>"
    words = re.findall(r"\w+", prompt.rpartition("Here is the part:")[2])
    if draw("repeat", prompt) < 0.1:
        return "Sure!\n<question>Who wrote the letter to the captain?</question>\n<answer>Nobody.</answer>"
    tag = hashlib.sha256(prompt.encode()).hexdigest()
    asked = " ".join(tag[i : i + 5] for i in range(0, 30, 5))
    return f"<question>What do {words[0]} and {asked} have in common?</question>\n<answer>{words[-1]}, {{chunk}}</answer>"


class Handler(BaseHTTPRequestHandler):
    """One connection, kept open between requests."""

    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Idempotency-Key"]
        prompt = body["messages"][0]["content"]
        how = self.behaviour
        with how.lock:
            how.arrivals[key] += 1
            arrival = how.arrivals[key]
            how.bodies.append(body)
        if how.delay_s:
            time.sleep(how.delay_s)
        if how.accept_key and self.headers["Authorization"] != f"Bearer {how.accept_key}":
            said = f"Incorrect API key provided: {self.headers['Authorization']}"
            return self.send(401, {"error": {"message": said, "code": "invalid_api_key"}})
        refused = next((name for name in how.takes_not if name in body), None)
        if refused:
            said = f"Unsupported parameter: '{refused}' is not supported with this model."
            return self.send(400, {"error": {"message": said, "code": "unsupported_parameter"}})
        if how.status:
            return self.send(how.status, {"error": {"message": "this model's maximum context length is 8 tokens"}})
        if arrival <= how.most_faults and draw("fault", key, arrival) < how.fault_rate:
            return self.fail(how.faults[int(draw("kind", key, arrival) * len(how.faults))])
        text, finish = answer(prompt) if how.always is None else how.always, "stop"
        if draw("malformed", key) < how.malformed_rate:
            text, finish = MALFORMED[int(draw("malformation", key) * len(MALFORMED))]
        with how.lock:
            how.answered[key] += 1
        self.send(200, self.completion(text, finish) | (how.odd or {}))

    def completion(self, text: str, finish: str) -> dict:
        message = {"role": "assistant", "content": text}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "small",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }

    def fail(self, kind: str):
        if kind.isdigit():
            return self.send(int(kind), {"error": {"message": "try again"}}, retry_after="0.01")
        if kind == "hung":
            time.sleep(self.behaviour.hang_s)
        elif kind == "short_body":
            self.raw(200, b'{"id": "chatcmpl-1", "choices": [', length=4000)
        elif kind == "broken_json":
            return self.raw(200, b'{"id": "chatcmpl-1", "choices": [')
        elif kind == "no_choices":
            return self.send(
                200, {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "small", "choices": []}
            )
        self.close_connection = True

    def send(self, status: int, body: dict, retry_after: str | None = None):
        self.raw(status, json.dumps(body).encode(), retry_after=retry_after)

    def raw(self, status: int, payload: bytes, length: int | None = None, retry_after: str | None = None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(payload)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


MALFORMED = (
    ("I cannot help with that.", "stop"),
    ("<question>What is it?</question>", "stop"),
    ("<question>What is it?</question><answer></answer>", "stop"),
    ("<question>What is it?<answer>This.</answer></question>", "stop"),
    ("<question>One?</question><question>Two?</question><answer>This.</answer>", "stop"),
    ("<question>What is it?</question><answer>It is the long", "length"),
    ("<question>What is it?</question><answer>It is the long</answer>", "length"),
)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that was killed closes its connection: no news."""


@contextlib.contextmanager
def serve(behaviour: Behaviour) -> Iterator[str]:
    """The base URL of a server with this behaviour, for as long as the block runs."""
    handler = type("BehavingHandler", (Handler,), {"behaviour": behaviour})
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
