"""A real HTTP server over a small checkpoint in Hugging Face form, in the OpenAI chat protocol, as users serve a model.

python tests/instruct/model_server.py HF_DIR
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from faulty_server import Server
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_longctx.data.sft_instances import LLAMA2_CHAT_TEMPLATE


class Handler(BaseHTTPRequestHandler):
    """Greedy or seeded sampling by transformers' own `generate`; one answer at a time, as one small machine does it."""

    protocol_version = "HTTP/1.1"
    model: Any
    tokenizer: Any
    lock: threading.Lock
    asked: list[dict]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.asked.append(body)
            status, reply = self.answer(body)
        payload = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def answer(self, body: dict) -> tuple[int, dict]:
        template = self.tokenizer.chat_template or LLAMA2_CHAT_TEMPLATE
        ids = self.tokenizer.apply_chat_template(
            body["messages"], chat_template=template, add_generation_prompt=True, return_tensors="pt"
        )
        prompt, room = ids.shape[1], self.model.config.max_position_embeddings
        if prompt + body["max_tokens"] > room:
            return 400, {"error": {"message": f"this model's maximum context length is {room} tokens, you asked for {prompt}"}}
        torch.manual_seed(body["seed"])
        hot = body["temperature"] > 0
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=body["max_tokens"],
            do_sample=hot,
            temperature=body["temperature"] if hot else None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )[0, prompt:]
        stopped = made[-1].item() == self.tokenizer.eos_token_id
        message = {"role": "assistant", "content": self.tokenizer.decode(made, skip_special_tokens=True)}
        return 200, {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop" if stopped else "length"}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": len(made), "total_tokens": prompt + len(made)},
        }

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve_checkpoint(folder: Path) -> Iterator[tuple[str, list[dict]]]:
    """(base URL, the requests so far) of a server of the checkpoint in `folder`, for as long as the block runs."""
    parts = {
        "model": AutoModelForCausalLM.from_pretrained(folder).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "lock": threading.Lock(),
        "asked": [],
    }
    server = Server(("127.0.0.1", 0), type("ModelHandler", (Handler,), parts))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", parts["asked"]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    with serve_checkpoint(Path(sys.argv[1])) as (base_url, _):
        print(base_url, flush=True)
        threading.Event().wait()
