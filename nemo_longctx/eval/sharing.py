"""Work shared among ranks that hold the same model: divided by cost, gathered everywhere, an error heard by all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from nemo_longctx.bars import ProgressBar, say
from nemo_longctx.eval.requests import Generation, Request, Score, share_work
from nemo_longctx.eval.scoring import Scorer, Speed


def everywhere(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, on every rank of `group` (None: all ranks, or this process alone where there is no group)."""
    if not dist.is_initialized():
        return [value]
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, value, group=group)
    return parts


class PeerError(RuntimeError):
    """Another rank could not go on, and every rank has heard of it: `errors` says what each said."""

    def __init__(self, errors: list[str]):
        super().__init__("; ".join(errors))
        self.errors = errors


def check_in(error: str = "", value: Any = None) -> tuple[list[str], list[Any]]:
    """Meet every rank of the job: (who failed and why, each rank's `value`), the same everywhere; no errors where all is well.

    A rank that failed comes here once, at whatever point of the work the others check in next. So nobody waits in a collective
    for a rank that has left, and a task that failed on one rank ends on all of them at the same check-in.
    """
    said = everywhere((error, value))
    texts = [text for text, _ in said]
    failed = {text: [rank for rank, other in enumerate(texts) if other == text] for text in dict.fromkeys(texts) if text}
    errors = [
        text if len(ranks) == len(said) else f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in failed.items()
    ]
    return errors, [value for _, value in said]


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives on the first rank, on every rank.

    Raises:
        PeerError: on every rank, where it failed or a rank did not come here but failed before.
    """
    error, value = "", None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            value = make()
        except Exception as failure:  # whatever it is, the other ranks wait to hear of it
            error = f"{type(failure).__name__}: {failure}"
    errors, values = check_in(error, value)
    if errors:
        raise PeerError(errors)
    return values[0]


def run_shared(
    scorer: Scorer, requests: Sequence[Request], *, group: Any = None, what: str = "evaluation", quiet: bool = False
) -> list[Any]:
    """Results (`Score` or tokens) of all requests on every rank of `group`, in their order; None for one process.

    Every rank of the job must call it, also those of other groups.

    Raises:
        PeerError: on every rank, where one did not come here but failed before.
        RuntimeError: on every rank of the group, where any failed in this work, with what each said.
    """
    errors, _ = check_in()
    if errors:
        raise PeerError(errors)
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    mine = share_work(requests, ranks)[rank]
    done: dict[int, Score | list[int]] = {}
    if ranks == 1:
        return [value for _, value in sorted(_work(scorer, requests, mine, what, quiet).items())]
    error = ""
    try:
        done = _work(scorer, requests, mine, what, quiet or rank != 0)
    except Exception as failure:  # whatever it is, the other ranks wait to hear of it
        error = f"rank {dist.get_rank()}: {type(failure).__name__}: {failure}"
    parts = everywhere((done, error), group)
    errors = [text for _, text in parts if text]
    if errors:
        raise RuntimeError("; ".join(errors))
    merged = {index: value for part, _ in parts for index, value in part.items()}
    return [merged[index] for index in range(len(requests))]


def _work(
    scorer: Scorer, requests: Sequence[Request], indices: list[int], what: str, quiet: bool
) -> dict[int, Score | list[int]]:
    jobs = [requests[i] for i in indices]
    done: dict[int, Score | list[int]] = {}
    if not jobs:
        return done
    scorer.check(jobs)
    speed = scorer.speed = scorer.speed or measured_speed(scorer, jobs[0])
    read = new_tokens(scorer, jobs)
    if not quiet:
        say(f"{what}: {cost_told(jobs, read, speed)}")
    began = time.monotonic()
    with ProgressBar(total=read, unit="tok", unit_scale=True, desc=what, show=not quiet) as bar:
        for place, result, new in scorer.run(jobs):
            done[indices[place]] = result
            bar.update(new)
    made = sum(len(result) for result in done.values() if isinstance(result, list))
    scorer.speed = speed.corrected(read, made, time.monotonic() - began)
    return done


CALIBRATION = 256  # tokens by which a model's speed is guessed before it has read anything


def measured_speed(scorer: Scorer, request: Request) -> Speed:
    """From reading a few tokens of a request and making one; the cache is left empty."""
    tokens = torch.tensor(request.read[:CALIBRATION])
    rates: list[float] = []
    with torch.inference_mode():
        for some in (tokens, tokens, tokens[:1]):  # the first time warms up
            scorer.model.truncate(0)
            began = time.perf_counter()
            float(scorer.model.extend(some)[-1, 0])  # waits for a GPU
            rates.append(len(some) / max(1e-9, time.perf_counter() - began))
    scorer.model.truncate(0)
    return Speed(read=rates[1], made=rates[2])


def cost_told(requests: Sequence[Request], read: int, speed: Speed) -> str:
    """What is read and made, and about how long it takes: too little for long prompts, whose tokens cost more the later they
    stand, until the model has been seen at work of the kind."""
    asked = sum(len(request.read) for request in requests)
    made = sum(request.max_new_tokens for request in requests if isinstance(request, Generation))
    told = f"{read:,} tokens to read" + (f" ({asked:,} without what prompts share)" if asked > read else "")
    return told + (f", at most {made:,} to make" if made else "") + f", about {duration(speed.seconds(read, made))}"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def new_tokens(scorer: Scorer, requests: Sequence[Request]) -> int:
    """Tokens that have to be read for these requests, shared prefixes once."""
    return sum(len(step.tokens) - step.shared for step in scorer.plan(requests))
