"""Prompts from a file, answers to a file that `compare` reads: what a checkpoint says, kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.requests import Generation
from nemo_longctx.hf.chat import render

LONGEST = 512  # tokens of an answer where nobody says


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are made.

    Args:
        max_new_tokens: longest answer; None: `LONGEST`, or what the model's length leaves.
        temperature: 0 for greedy. top_p, top_k: limits of sampling; 1 and 0 for none.
        seed: of the sampling; the draw of a prompt does not depend on the others.
        stop: texts that end an answer, left out of it.
        ends: tokens that end one beside the tokenizer's own end (`end_tokens` of the model).
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError("--max-new-tokens", self.max_new_tokens, "give at least 1 token for the answer")


def ends_of(generation_config: Any) -> frozenset[int]:
    """Tokens that end an answer by a generation config: none, one or several (Gemma's and Phi-3's turns end in another token
    than their texts)."""
    said = getattr(generation_config, "eos_token_id", None)
    return frozenset() if said is None else frozenset(said if isinstance(said, (list, tuple)) else [said])


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer of a model (`CausalModel`): the tokenizer's end, and those of its generation config."""
    return frozenset({tokenizer.eos_token_id, *getattr(model, "ends", ())} - {None})


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Rows {"id", "prompt"} or {"id", "messages"} of a JSONL file; of any other file its lines, one prompt each.

    Rows without an id are numbered from 1.

    Raises:
        ConfigError: the file cannot be read, a row is no prompt, or two have one id; by file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompts", str(path), f"cannot be read ({error})") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line, f"{path}:{number}") if path.suffix in (".jsonl", ".json") else {"prompt": line.rstrip("\r")}
        rows.append({"id": str(len(rows) + 1), **row})
    ids = [row["id"] for row in rows]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if not rows or twice is not None:
        raise ConfigError("--prompts", str(path), "holds no prompt" if twice is None else f"two prompts have the id {twice!r}")
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError("--prompts", where, f"is not JSON ({error})") from None
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        turns = row["messages"]
        if turns and all(
            isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
        ):
            return {**({"id": str(row["id"])} if "id" in row else {}), "messages": turns}
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"]:
        return {**({"id": str(row["id"])} if "id" in row else {}), "prompt": row["prompt"]}
    raise ConfigError("--prompts", where, 'is no row {"prompt": "..."} or {"messages": [{"role": ..., "content": ...}]}')


def prompt_tokens(
    row: dict[str, Any], tokenizer: Any, *, template: str | None, system: str = "", today: bool = False
) -> list[int]:
    """Token ids of a prompt: as it stands, or as a user's turn in the chat template; `messages` always in the template.

    Args:
        today: a template that writes the day writes this one; else that of all results (`nemo_longctx.hf.chat`).

    Raises:
        ConfigError: a template is needed and there is none.
    """
    if "messages" not in row and template is None:
        return tokenizer.encode(row["prompt"])
    if template is None:
        raise ConfigError(
            "--prompts", row["id"], "holds messages, for which the tokenizer has no chat template; give --template"
        )
    turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    turns = ([{"role": "system", "content": system}] if system and turns[0]["role"] != "system" else []) + turns
    text = render(tokenizer, turns, today=today, chat_template=template, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def requests(
    prompts: Sequence[list[int]], tokenizer: Any, sampling: Sampling, names: Sequence[str], max_length: int
) -> list[Generation]:
    """What to ask of the scorer.

    Raises:
        ConfigError: a prompt that leaves no room for its answer; before anything is generated.
    """
    made = []
    for name, tokens in zip(names, prompts, strict=True):
        room = max_length - len(tokens)
        longest = min(LONGEST, room) if sampling.max_new_tokens is None else sampling.max_new_tokens
        if longest < 1:
            raise ConfigError("--prompts", name, f"has {len(tokens)} tokens, and the model reads {max_length}; shorten it")
        if longest > room:
            mend = f"has {len(tokens)} tokens and is given {longest} more, but the model reads {max_length}"
            raise ConfigError("--prompts", name, f"{mend}; shorten it, or lower --max-new-tokens")
        made.append(
            Generation(
                context=tokens,
                max_new_tokens=longest,
                stop=ending(tokenizer, sampling.stop, sampling.ends),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
            )
        )
    return made


def ending(tokenizer: Any, stops: Sequence[str], ends: Sequence[int] = ()) -> Callable[[list[int]], bool]:
    """True once the end-of-text token, another of `ends` or one of the texts was made."""
    last = {tokenizer.eos_token_id, *ends}
    longest = max((len(tokenizer.encode(text, add_special_tokens=False)) for text in stops), default=0) + 2

    def stop(made: list[int]) -> bool:
        if made[-1] in last:
            return True
        tail = tokenizer.decode(made[-longest:]) if stops else ""
        return any(text in tail for text in stops)

    return stop


def answer(
    row: dict[str, Any], prompt: Sequence[int], made: Sequence[int], tokenizer: Any, sampling: Sampling
) -> dict[str, Any]:
    """A row of the output: id, prompt, response, how it ended, and tokens of both."""
    at_end = bool(made) and made[-1] in {tokenizer.eos_token_id, *sampling.ends}
    text = tokenizer.decode(made[: len(made) - at_end], skip_special_tokens=True)
    cut = min((text.index(stop) for stop in sampling.stop if stop in text), default=None)
    ended = cut is not None or at_end
    return {
        "id": row["id"],
        "prompt": row["prompt"] if "prompt" in row else json.dumps(row["messages"], ensure_ascii=False),
        "response": (text if cut is None else text[:cut]).strip(),
        "finish_reason": "stop" if ended else "length",
        "prompt_tokens": len(prompt),
        "completion_tokens": len(made),
    }
