"""Log-likelihood and generation over any causal model with a key-value cache: each shared prefix is read once.

The cache is kept along one path of the requests' prefix tree (`requests.plan_reading`), so a document is read once for all its
questions, options and continuations. Logits exist only at positions that some request scores, a few hundred rows at a time.

Shapes: S tokens read at once, K positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.requests import Continuation, Generation, Request, Score, Step, plan_reading, union

# An answer made of them would be scored as a wrong one, and a mean over the others would look like a result.
NO_NUMBERS = "the model's log-probabilities after {:,} tokens are no numbers (NaN): its weights or its precision are at fault"


class CausalModel(Protocol):
    """What the scorer asks of a model. Every rank of a model-parallel group makes the same calls in the same order."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids that may be predicted (without padding rows of the head)."""

    @property
    def max_length(self) -> int:
        """Longest sequence the model may read, tokens."""

    @property
    def reads_whole(self) -> bool:
        """True where a token's state depends on tokens after it (say, frequencies that follow the total length), so that
        nothing may be shared or read in pieces."""

    def extend(self, tokens_S: Tensor) -> Tensor:
        """Read `tokens_S` (int64, on the CPU) after what the cache holds, and cache them. Returns states [S, H]."""

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def log_probs(self, states_KH: Tensor, targets_K: Tensor) -> tuple[Tensor, Tensor]:
        """Of each state: the float32 log-probability of its target, and whether the target is the most likely token."""

    def next_logits(self, state_H: Tensor) -> Tensor:
        """Float32 logits [V] after one state."""


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How much is held at once.

    Args:
        read: tokens of one forward pass.
        logits: bytes of float32 logits of one product with the head.
    """

    read: int = 1024
    logits: int = 64 * 2**20

    def __post_init__(self) -> None:
        if self.read < 1:
            raise ConfigError("chunks.read", self.read, "give at least 1 token")
        if self.logits < 1:
            raise ConfigError("chunks.logits", self.logits, "give a positive number of bytes")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second that a model reads, and that it makes one by one."""

    read: float
    made: float

    def seconds(self, read: int, made: int) -> float:
        return read / self.read + made / self.made

    def corrected(self, read: int, made: int, seconds: float) -> Speed:
        """The speed at which so many tokens would have taken what they took."""
        share = self.seconds(read, made) / max(1e-9, seconds)
        return Speed(read=self.read * share, made=self.made * share) if share else self


class Scorer:
    """Runs requests over a model.

    Args:
        model: behind the `CausalModel` protocol; its cache is used from empty and left empty.
        chunks: sizes of what is held at once.
        share: False reads every request from its start: the plain path that the shared one is tested against.
    """

    def __init__(self, model: CausalModel, *, chunks: Chunks | None = None, share: bool = True):
        self.model, self.chunks, self.share = model, chunks or Chunks(), share
        self.speed: Speed | None = None  # as far as it has been seen

    def plan(self, requests: Sequence[Request]) -> list[Step]:
        """The order in which `run` reads these requests, and what it reads."""
        return plan_reading(requests, share=self.share and not self.model.reads_whole)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Score | list[int], int]]:
        """Yield (index of the request, result, tokens newly read for it) in reading order.

        Results are `Score` for a `Continuation` and the new tokens for a `Generation`.

        Raises:
            ValueError: a request longer than the model reads, a token id outside the vocabulary, or a model that gives NaN.
        """
        self.check(requests)
        whole = self.model.reads_whole
        self.model.truncate(0)
        kept: list[tuple[int, Tensor]] = []  # (first position, states [K, H]) that later requests still want
        for step in self.plan(requests):
            request = requests[step.index]
            self.model.truncate(step.shared)
            kept = list(_cut(kept, [(0, step.shared)]))
            blocks = self._read(step, whole)
            result: Score | list[int]
            if isinstance(request, Continuation):
                result, kept = self._score(request, kept, blocks, step)
            else:
                last = (len(step.tokens) - 1, len(step.tokens))
                for block in blocks:
                    kept += _copies(block, union([*step.later, last]))
                (_, last_1H), *_ = _cut(kept, [last])
                result = self._generate(request, last_1H[0], len(step.tokens))
                kept = list(_cut(kept, step.later))
            yield step.index, result, len(step.tokens) - step.shared
        self.model.truncate(0)

    def score(self, requests: Sequence[Continuation], *, progress: Callable[[int], object] | None = None) -> list[Score]:
        """Scores in the order of the requests; `progress` is told the tokens newly read for each. Errors as `run`."""
        return cast(list[Score], self._all(requests, progress))

    def generate(self, requests: Sequence[Generation], *, progress: Callable[[int], object] | None = None) -> list[list[int]]:
        """New tokens in the order of the requests; `progress` and errors as `score`."""
        return cast(list[list[int]], self._all(requests, progress))

    def _all(self, requests: Sequence[Request], progress: Callable[[int], object] | None) -> list[Score | list[int]]:
        results: dict[int, Score | list[int]] = {}
        for index, result, read in self.run(requests):
            results[index] = result
            if progress is not None:
                progress(read)
        return [results[i] for i in range(len(requests))]

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse requests as `run` does, before anything is read."""
        for number, request in enumerate(requests):
            self._check(number, request)

    def _check(self, number: int, request: Request) -> None:
        length = len(request.context) + (
            request.max_new_tokens if isinstance(request, Generation) else len(request.continuation) - 1
        )
        if length > self.model.max_length:
            raise ValueError(f"request {number} needs {length} tokens of context, the model reads {self.model.max_length}")
        tokens = np.asarray(request.context if isinstance(request, Generation) else [*request.context, *request.continuation])
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.model.vocab_size):
            raise ValueError(
                f"request {number} has token ids outside 0..{self.model.vocab_size - 1}: is this the model's tokenizer?"
            )

    def _read(self, step: Step, whole: bool) -> Iterator[tuple[int, Tensor]]:
        """Read what is new, a chunk at a time -> (position of the first, states [S, H])."""
        size = len(step.tokens) if whole else self.chunks.read
        for start in range(step.shared, len(step.tokens), size):
            tokens_S = torch.from_numpy(step.tokens[start : start + size])
            yield start, self.model.extend(tokens_S)

    def _score(
        self, request: Continuation, kept: list[tuple[int, Tensor]], blocks: Iterator[tuple[int, Tensor]], step: Step
    ) -> tuple[Score, list[tuple[int, Tensor]]]:
        """Score a continuation from kept and new states; returns also what later requests want of them."""
        targets = np.asarray(request.continuation, np.int64)
        first, end = request.needed
        rows = max(1, self.chunks.logits // (4 * self.model.vocab_size))
        log_probs, greedy, still = [], True, list(_cut(kept, step.later))
        for block in _chain(kept, blocks):
            for start, states_KH in _cut([block], [(first, end)]):
                for i in range(0, len(states_KH), rows):
                    some_KH = states_KH[i : i + rows]
                    targets_K = torch.from_numpy(targets[start + i - first : start + i - first + len(some_KH)])
                    logp_K, greedy_K = self.model.log_probs(some_KH, targets_K)
                    log_probs.append(logp_K)
                    greedy = greedy and bool(greedy_K.all())
            if block[0] >= step.shared:
                still += _copies(block, step.later)
        found = torch.cat(log_probs).float().cpu().numpy()
        if np.isnan(found).any():
            raise ValueError(NO_NUMBERS.format(first + int(np.isnan(found).argmax()) + 1))
        return Score(token_log_probs=found, is_greedy=greedy), still

    def _generate(self, request: Generation, state_H: Tensor, length: int) -> list[int]:
        """Decode after `length` cached tokens, then forget what was made."""
        random = None
        if request.temperature > 0:
            words = np.asarray([request.seed, *request.context], np.int64).tobytes()
            random = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(words, digest_size=8).digest()) >> 1)
        made: list[int] = []
        while len(made) < request.max_new_tokens:
            logits_V = self.model.next_logits(state_H)
            if bool(logits_V.max().isnan()):  # NaN is above all to `max`, and an answer of any token to `argmax`
                raise ValueError(NO_NUMBERS.format(length + len(made)))
            made.append(choose(logits_V, request, random))
            if request.stop(made) or len(made) == request.max_new_tokens:
                break
            if self.model.reads_whole:
                self.model.truncate(0)
                state_H = self.model.extend(torch.tensor([*request.context, *made]))[-1]
            else:
                state_H = self.model.extend(torch.tensor(made[-1:]))[-1]
        self.model.truncate(length)
        return made


def choose(logits_V: Tensor, request: Generation, random: torch.Generator | None) -> int:
    """The next token: the most likely one, or a draw at the request's temperature within its top-k and top-p."""
    if random is None:
        return int(logits_V.argmax())
    # Drawn on the CPU in float64, so that the draw does not depend on the device.
    probs, ids = torch.softmax(logits_V.double().cpu() / request.temperature, -1).sort(descending=True, stable=True)
    keep = (probs.cumsum(-1) - probs) < request.top_p
    if request.top_k:
        keep[request.top_k :] = False
    return int(ids[torch.multinomial(probs * keep, 1, generator=random)])


def logits_to_log_probs(logits_KV: Tensor, targets_K: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 log-probability of each target and whether it is the argmax, from whole rows of logits."""
    logits_KV = logits_KV.float()
    targets_K = targets_K.to(logits_KV.device)
    picked_K = logits_KV.gather(-1, targets_K[:, None])[:, 0]
    return picked_K - torch.logsumexp(logits_KV, -1), logits_KV.argmax(-1) == targets_K


def _cut(blocks: Sequence[tuple[int, Tensor]], ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
    """The parts of blocks of states that lie in `ranges` (disjoint, rising), as views."""
    for start, states in blocks:
        for a, b in ranges:
            low, high = max(a, start), min(b, start + len(states))
            if low < high:
                yield low, states[low - start : high - start]


def _copies(block: tuple[int, Tensor], ranges: Sequence[tuple[int, int]]) -> list[tuple[int, Tensor]]:
    """As `_cut`, but copied: a view would keep the whole chunk of states alive."""
    return [(start, states.clone()) for start, states in _cut([block], ranges)]


def _chain(kept: list[tuple[int, Tensor]], blocks: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    yield from sorted(kept, key=lambda block: block[0])
    yield from blocks


def token_losses(model: CausalModel, tokens: Sequence[int], *, chunks: Chunks | None = None) -> NDArray[np.float32]:
    """Loss of every prediction within one document: entry p is that of token p + 1 after tokens 0..p. Nats, [len - 1]."""
    (score,) = Scorer(model, chunks=chunks).score([Continuation(context=tokens[:1], continuation=tokens[1:])])
    return -score.token_log_probs
