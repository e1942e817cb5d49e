"""`nemo-longctx init`: a commented recipe of one's own from a checkpoint, a target length, data and a machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_longctx.commands.prepare import tokens
from nemo_longctx.config import ConfigError

QUESTIONS = {
    "checkpoint": "checkpoint to extend (NeMo or Hugging Face directory)",
    "target": "context to reach, tokens",
    "data": "text (files or folder), or the prefix of a prepared corpus",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags; what is not given is asked for on a terminal."""
    parser.add_argument("--checkpoint", type=Path, help="NeMo checkpoint or run, or Hugging Face directory")
    parser.add_argument("--target", type=tokens, help="context to reach, tokens")
    parser.add_argument("--data", help="text to train on (a file or a folder), or PREFIX of a prepared .bin/.idx")
    parser.add_argument("--gpus", type=int, help="how many GPUs; without it a CPU")
    parser.add_argument("--gpu", help="kind of GPU with --gpus: a100, h100 (default), h200, b200, gb200")
    parser.add_argument("--tokens", type=tokens, help="tokens to train on (default: 2 B on GPUs, 200 steps on a CPU)")
    parser.add_argument("--name", help="of the run (default: the checkpoint's name and the length)")
    parser.add_argument("--output", type=Path, help="recipe to write (default: NAME.yaml)")
    parser.add_argument("--force", action="store_true", help="overwrite the recipe")


def run(args: argparse.Namespace) -> int:
    """Write the recipe, and print what was decided and what to type next."""
    from nemo_longctx.files import write_text
    from nemo_longctx.planning.starter import CPU, PLAIN, next_commands, plan_starter, read_source, starter_yaml
    from nemo_longctx.recipe import check_run_name
    from nemo_longctx.rope.request import describe

    _ask(args)
    if args.gpu is not None and args.gpus is None:
        raise ConfigError("--gpu", args.gpu, "has no effect without --gpus")
    if args.gpu == CPU:
        raise ConfigError("--gpu", args.gpu, "is no GPU; leave --gpu and --gpus out for a CPU")
    if args.tokens is not None and args.tokens < 1:
        raise ConfigError("--tokens", args.tokens, "must be 1 or more; leave it out for the default")
    source = read_source(args.checkpoint)
    name = args.name or f"{args.checkpoint.resolve().name}_{args.target}"
    check_run_name(name, key="--name")
    output = args.output or Path(f"{name}.yaml")
    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError("--output", str(output), "a recipe's name must end in .yaml")
    if output.exists() and not args.force:
        raise ConfigError("--output", str(output), "is there already; name another, or give --force")
    inputs, prefix = _data(args.data)
    starter = plan_starter(
        source,
        target=args.target,
        data=prefix,
        name=name,
        gpu=CPU if args.gpus is None else args.gpu or "h100",
        gpus=1 if args.gpus is None else args.gpus,
        tokens=args.tokens,
    )
    write_text(output, starter_yaml(starter))
    curriculum = starter.curriculum
    print(f"wrote {output}")
    print(f"  model       {source.model.parameters / 1e6:,.1f} M parameters, trained at {source.model.seq_length:,} tokens")
    scaled = "" if source.rope.variant in PLAIN else f"{describe(source.rope)}, "
    print(f"  RoPE        {scaled}base {source.rope.base:g} -> {'abf, base ' if scaled else ''}{starter.base:g}"
          + (f"; to keep or stretch what it has, see the comments in {output}" if scaled else ""))  # fmt: skip
    print(f"  curriculum  {curriculum.total_steps:,} steps of {curriculum.tokens_per_step:,} tokens at {args.target:,}")
    if starter.layout is not None:
        print(f"  layout      {starter.layout.layout.short_name()}: {starter.layout.memory_gib:.0f} GiB a GPU, "
              f"{starter.layout.seconds:.1f} s a step")  # fmt: skip
    print("next:")
    for line in next_commands(starter, str(output), inputs=inputs):
        print(f"  {line}")
    return 0


def _ask(args: argparse.Namespace) -> None:
    """Fill in what was not given: from the terminal, or say which option lacks."""
    for key, question in QUESTIONS.items():
        if getattr(args, key) is not None:
            continue
        if not sys.stdin.isatty():
            raise ConfigError(f"--{key}", None, f"missing; the {question}")
        answer = input(f"{question}: ").strip()
        readers: dict[str, Callable[[str], Any]] = {"checkpoint": Path, "target": tokens}
        try:
            setattr(args, key, readers.get(key, str)(answer))
        except argparse.ArgumentTypeError:
            raise ConfigError(f"--{key}", answer, "must be a whole number of tokens, as 32768 or 32Ki") from None


def _data(data: str) -> tuple[str | None, str]:
    """(text to prepare or None, the corpus)."""
    from nemo_longctx.data.corpus import is_corpus, open_corpus

    if is_corpus(data):
        if Path(data).is_dir():
            open_corpus(data)  # says which of several prefixes is meant
        return None, data
    if data.endswith((".bin", ".idx")):
        raise ConfigError("--data", data, "give the prefix, without .bin or .idx")
    if not Path(data).exists():
        raise ConfigError("--data", data, "neither text nor a prepared corpus (PREFIX.idx) is there")
    return data, f"data/{Path(data).resolve().name.split('.')[0]}"
