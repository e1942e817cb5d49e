"""`nemo-longctx chat CHECKPOINT`: talk to a checkpoint on the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from nemo_longctx.commands.generate import add_options, open_model, sampling_of
from nemo_longctx.config import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, and how answers are made."""
    parser.epilog = (
        "One line is one turn; an empty line begins anew; end with Ctrl-D. A base model goes on from what was written."
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Read a turn, answer it, until the input ends."""
    from nemo_longctx.eval import generation

    sampling = sampling_of(args)
    scorer, tokenizer, template, _ = open_model(args)
    sampling = dataclasses.replace(sampling, ends=tuple(generation.end_tokens(scorer.model, tokenizer)))
    turns: list[dict[str, str]] = []
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return 0
        if not line.strip():
            turns = []
            continue
        turns.append({"role": "user", "content": line})
        row = {"id": "this turn", "prompt": "".join(turn["content"] for turn in turns)}
        row |= {"messages": turns} if template is not None else {}  # type: ignore[dict-item]
        tokens = generation.prompt_tokens(row, tokenizer, template=template, system=args.system, today=True)
        try:
            (asked,) = generation.requests([tokens], tokenizer, sampling, ["this turn"], scorer.model.max_length)
        except ConfigError as error:  # the talk has grown too long: it may begin anew
            turns.pop()
            print(error, file=sys.stderr)
            continue
        (made,) = scorer.generate([asked])
        said = generation.answer(row, tokens, made, tokenizer, sampling)["response"]
        turns.append({"role": "assistant", "content": said})
        print(said, flush=True)
