"""Truncation as a policy: what is cut from a prompt that is too long, and whether something that matters went with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_longctx.config import ConfigError, did_you_mean

POLICIES = ("left", "middle", "keep_question", "keep_start")
# Stands for a generation whose prompt lost what it asks about; tasks count it and leave it out of the mean.
UNSCORED = "\x00not scored: truncation cut the "


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """A prompt within its budget.

    Args:
        tokens: what is left. removed: how many tokens were cut.
        lost: names of the protected spans that were cut, even by one token. Such a sample must not be scored.
    """

    tokens: list[int]
    removed: int
    lost: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TruncationRecord:
    """One cut prompt: the task and row it belongs to, the policy, tokens before and removed, protected spans lost."""

    task: str
    doc_id: int | None
    policy: str
    tokens: int
    removed: int
    lost: tuple[str, ...]


def prompt_budget(max_length: int, max_new_tokens: int, max_prompt: int | None = None) -> int:
    """Tokens that a prompt may have: `max_prompt`, less where the model has no room for it and the generation.

    Raises:
        ConfigError: the generation leaves no room for a prompt.
    """
    room = max_length - max_new_tokens
    if room < 1:
        raise ConfigError("max_gen_toks", max_new_tokens, f"leaves no prompt within {max_length} tokens; generate fewer")
    return room if max_prompt is None else min(room, max_prompt)


def truncate(
    tokens: Sequence[int],
    budget: int,
    policy: str,
    protected: Mapping[str, tuple[int, int]] | None = None,
    *,
    frame: int = 0,
) -> Truncated:
    """Cut `tokens` to `budget` by a policy.

    Args:
        tokens: the prompt. budget: most tokens to keep, at least 1.
        policy: `left` drops the beginning (Xiong et al. 2023, section 2.2); `middle` keeps the first and last halves
            (LongBench); `keep_question` drops the oldest tokens that are not protected, so that a question or instruction
            in front of the document survives; `keep_start` drops what stands just before the question (ZeroSCROLLS).
        protected: name -> [first, end) token span that the answer depends on.
        frame: tokens in front that no policy cuts while there is anything else to cut: BOS, system prompt, chat header.

    Raises:
        ConfigError: an unknown policy, or a budget below 1.
    """
    if policy not in POLICIES:
        raise ConfigError("truncation", policy, f"unknown policy, {did_you_mean(str(policy), POLICIES)}")
    if budget < 1:
        raise ConfigError("max_prompt", budget, "leaves no prompt; give at least 1 token")
    spans, length = dict(protected or {}), len(tokens)
    keep = np.ones(length, bool)
    excess = length - budget
    if excess > 0:
        if policy == "middle":
            head = min(budget, max((budget + 1) // 2, frame))
            keep[head : head + excess] = False
        else:
            # In the order in which tokens go. Where free ones are too few, the oldest protected ones go too and are lost.
            rest = np.arange(min(frame, length), length)
            if policy == "keep_start":
                end = spans.get("question", (length, length))[0]
                order = np.concatenate([rest[rest < end][::-1], rest[rest >= end]])
            else:
                saved = np.zeros(length, bool)
                for start, end in spans.values() if policy == "keep_question" else ():
                    saved[start:end] = True
                order = np.concatenate([rest[~saved[rest]], rest[saved[rest]]])
            keep[np.concatenate([order, np.arange(min(frame, length))])[:excess]] = False
    lost = tuple(name for name, (start, end) in spans.items() if not keep[start:end].all())
    lost += ("chat header",) if not keep[:frame].all() else ()
    return Truncated(tokens=[t for t, k in zip(tokens, keep, strict=True) if k], removed=max(0, excess), lost=lost)


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Token span [first, end) that covers the characters start..end, from a fast tokenizer's offsets.

    Special tokens have the empty offset (0, 0) and belong to no text.
    """
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and a < b]
    if not inside:
        return 0, 0
    return inside[0], inside[-1] + 1
