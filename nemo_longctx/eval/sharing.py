"""Work shared among ranks that hold the same model: divided by cost, gathered everywhere, an error heard by all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from nemo_longctx.eval.scoring import Request, Score, Scorer, share_work


def everywhere(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, on every rank of `group` (None: all ranks, or this process alone where there is no group)."""
    if not dist.is_initialized():
        return [value]
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, value, group=group)
    return parts


def run_shared(
    scorer: Scorer, requests: Sequence[Request], *, group: Any = None, what: str = "evaluation", quiet: bool = False
) -> list[Any]:
    """Results (`Score` or tokens) of all requests on every rank of `group`, in their order; None for one process.

    Raises:
        RuntimeError: on every rank, where any rank failed, with what each said.
    """
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    mine = share_work(requests, ranks)[rank]
    done: dict[int, Score | list[int]] = {}
    if ranks == 1:
        return [value for _, value in sorted(_work(scorer, requests, mine, what, quiet).items())]
    error = ""
    try:
        done = _work(scorer, requests, mine, what, quiet or rank != 0)
    except Exception as failure:  # whatever it is, the other ranks wait to hear of it
        error = f"rank {rank}: {type(failure).__name__}: {failure}"
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
    with tqdm(total=new_tokens(scorer, jobs), unit="tok", unit_scale=True, desc=what, disable=quiet, file=sys.stderr) as bar:
        for place, result, read in scorer.run(jobs):
            done[indices[place]] = result
            bar.update(read)
    return done


def new_tokens(scorer: Scorer, requests: Sequence[Request]) -> int:
    """Tokens that have to be read for these requests, shared prefixes once."""
    return sum(len(step.tokens) - step.shared for step in scorer.plan(requests))
