"""Results on disk, keyed by everything that made them: weights, step, tokenizer, and the tokens of the request."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_longctx.eval.requests import Continuation, Request, Score


def weights_digest(named: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """Digest of parameters, taken on their device: any changed bit, name, shape or order of values changes it.

    `settings` is what else makes the model what it is: the same weights under another RoPE base give other results.

    Each tensor's raw 16-bit words are summed under fixed pseudo-random odd multipliers modulo 2^64 (a multilinear hash);
    only that sum leaves the device.
    """
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, tensor in sorted(named, key=lambda item: item[0]):
        flat = tensor.detach().contiguous().view(-1)
        words = flat.view(torch.int16) if flat.element_size() % 2 == 0 else flat.view(torch.uint8)
        total = 0
        for start in range(0, len(words), 1 << 22):
            part = words[start : start + (1 << 22)].long()
            place = torch.arange(start, start + len(part), device=part.device)
            # Weyl steps through a splitmix round; int64 wraps, which is the modulus wanted.
            factor = (place + 1) * -7046029254386353131
            factor = (factor ^ (factor >> 31)) * -4658895280553007687
            total += int((part * ((factor ^ (factor >> 29)) | 1)).sum())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total % 2**64};".encode())
    return digest.hexdigest()


def request_key(identity: Mapping[str, Any], kind: str, tokens: Sequence[int], split: int, options: Mapping[str, Any]) -> str:
    """Key of one request: `split` is where its context ends, `options` whatever else changes its result."""
    digest = hashlib.blake2b(json.dumps([dict(identity), kind, split, dict(options)], sort_keys=True).encode(), digest_size=20)
    digest.update(torch.tensor(tokens, dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()


def packed(result: Score | list[int]) -> dict[str, Any]:
    """JSON form of a result. Log-probabilities keep their sum only: it is all that lm-eval asks."""
    return {"sum": result.log_likelihood, "greedy": result.is_greedy} if isinstance(result, Score) else {"tokens": result}


@dataclass(frozen=True)
class Scored:
    log_likelihood: float
    is_greedy: bool


def unpacked(value: Mapping[str, Any]) -> Any:
    return value["tokens"] if "tokens" in value else Scored(value["sum"], value["greedy"])


def key_of(identity: Mapping[str, Any], job: Request, more: Mapping[str, Any]) -> str:
    if isinstance(job, Continuation):
        return request_key(identity, "score", [*job.context, *job.continuation], len(job.context), more)
    options = {k: v for k, v in asdict(job).items() if k not in ("context", "stop")}
    return request_key(identity, "generate", job.context, len(job.context), options | dict(more))


class ResultsCache:
    """A SQLite file of JSON results. Safe to share: each write is one transaction.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=60)
        with self._db:
            self._db.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    def get(self, keys: Sequence[str]) -> dict[str, Any]:
        """What is known of `keys`."""
        found: dict[str, Any] = {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            for key, value in self._db.execute(f"SELECT key, value FROM results WHERE key IN ({marks})", some):
                found[key] = json.loads(value)
        return found

    def put(self, values: Mapping[str, Any]) -> None:
        with self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO results VALUES (?, ?)", [(key, json.dumps(value)) for key, value in values.items()]
            )
