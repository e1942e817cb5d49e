"""`nemo-longctx instruct generate`: long question-answer data from unlabelled documents."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import inspect
import os
import re
import signal
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_longctx.config import ConfigError, build

if TYPE_CHECKING:
    from nemo_longctx.instruct.client import Completer
    from nemo_longctx.instruct.pipeline import GenerateConfig
    from nemo_longctx.instruct.prompts import PromptSet
    from nemo_longctx.instruct.replies import Prices


def configure(parser: argparse.ArgumentParser) -> None:
    """Add `generate` with one flag for each setting of the pipeline and the client."""
    from nemo_longctx.instruct.client import ClientConfig
    from nemo_longctx.instruct.pipeline import GenerateConfig

    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    line = "ask a short-context model about chunks of long documents and build long training instances"
    generate = jobs.add_parser("generate", help=line, description=line)
    generate.add_argument("documents", metavar="DOCS", type=Path, help="JSONL file, one object with a text a line")
    generate.add_argument(
        "--output", type=Path, required=True, help="folder for journal.jsonl, instances.jsonl, dropped.jsonl and report.json"
    )
    generate.add_argument(
        "--prompts", type=Path, help="folder of .txt files that replace the shipped prompts of the same names"
    )
    who = generate.add_mutually_exclusive_group(required=True)
    who.add_argument("--endpoint", metavar="URL", help="base URL of an OpenAI-compatible server (http://localhost:8000/v1)")
    who.add_argument("--checkpoint", type=Path, help="or a model in Hugging Face form, run in this process")
    who.add_argument(
        "--rules", action="store_true", help="or rules: questions whose answers stand in the text, without a model"
    )
    generate.add_argument("--model", help="the model's name, as the server knows it (with --checkpoint: the folder's)")
    generate.add_argument(
        "--template", default="tokenizer", help="with --checkpoint: tokenizer, llama2, or a Jinja file (tokenizer)"
    )
    generate.add_argument("--price-input", type=float, default=0.0, help="money for a million prompt tokens (0)")
    generate.add_argument("--price-output", type=float, default=0.0, help="money for a million completion tokens (0)")
    generate.add_argument("--force", action="store_true", help="replace what other settings made there; the journal is kept")
    _add_flags(generate, ClientConfig, skip=("endpoint",))
    _add_flags(generate, GenerateConfig, skip=("documents", "model"))


def run(args: argparse.Namespace) -> int:
    """Generate and print the yield. Status 1 when some calls got no answer and should be asked again."""
    from nemo_longctx.instruct.output import WRITTEN, check_folder
    from nemo_longctx.instruct.pipeline import GenerateConfig
    from nemo_longctx.instruct.prompts import PromptSet
    from nemo_longctx.instruct.replies import Prices

    settings = _settings(args, GenerateConfig)
    if args.checkpoint is not None and args.model is None:
        from nemo_longctx.instruct.local import fingerprint

        settings["model"] = fingerprint(args.checkpoint)
    if args.rules:
        if args.prompts is not None:
            raise ConfigError("prompts", str(args.prompts), "rules read the shipped prompts alone; leave it out")
        settings["model"] = "rules"
    config = build(GenerateConfig, settings)
    prices = Prices(input=args.price_input, output=args.price_output)
    words = PromptSet.load(args.prompts)
    if not args.force:
        check_folder(args.output, config, prompts=words.version)
    report = asyncio.run(_generate(args, config, words, prices))
    print(yield_table(report))
    print(f"wrote {', '.join(str(args.output / name) for name in WRITTEN)}")
    unanswered = sum(count for name, count in report["yield"].items() if name.endswith("_unanswered"))
    if unanswered:
        print(f"{unanswered} calls got no answer; the same command asks for them again", file=sys.stderr)
    return 1 if unanswered else 0


async def _generate(args: argparse.Namespace, config: GenerateConfig, prompts: PromptSet, prices: Prices) -> dict[str, Any]:
    from nemo_longctx.instruct.pipeline import Generation

    completer = _completer(args)
    generation = Generation(config, prompts=prompts, completer=completer, output=args.output, prices=prices)
    # The first interrupt lets calls under way come home, since they are paid for; the second ends the process at once.
    loop = asyncio.get_running_loop()

    def stop() -> None:
        print("stopping: waiting for the calls under way; interrupt again to leave them", file=sys.stderr)
        generation.stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await generation.run()
    finally:
        await completer.close()


def _completer(args: argparse.Namespace) -> Completer:
    from nemo_longctx.instruct.client import ChatClient, ClientConfig, read_key

    if args.rules:
        from nemo_longctx.instruct.rules import Rules

        return Rules()
    if args.checkpoint is not None:
        from nemo_longctx.instruct.local import LocalCheckpoint

        return LocalCheckpoint(args.checkpoint, template=args.template)
    config = build(ClientConfig, _settings(args, ClientConfig))
    return ChatClient(config, api_key=read_key(config.api_key_env, os.environ))


def yield_table(report: dict[str, Any]) -> str:
    """What was asked, what was lost at each step and why, and what is left, a line each."""
    counts, calls = report["yield"], report["calls"]
    explained = {
        "documents": "documents read",
        "documents_empty": "  without text",
        "documents_repeated": "  repeated word for word",
        "chunks": "chunks",
        "outside_cut_before_asking": "  beyond the target length, not asked",
        "chunks_not_drawn": "  not drawn",
        "asked": "questions asked for",
        "question_malformed": "  never in form",
        "question_refused": "  refused by the server",
        "question_unanswered": "  without an answer so far",
        "parsed": "parsed",
        "near_duplicate": "  near-duplicates of an earlier question",
        "critique_malformed": "  critique never in form",
        "critique_refused": "  critique refused by the server",
        "critique_unanswered": "  critique without an answer so far",
        "critiqued_away": "  found incorrect by the critique",
        "outside_cut": "  chunk outside the cut document",
        "kept": "kept",
        "kept_normal": "  with a normal answer",
        "kept_short": "  with a short answer",
    }
    lines = [f"{text:<42}{counts[name]:>9,}" for name, text in explained.items() if name in counts]
    tokens = f"{calls['prompt_tokens']:,} prompt + {calls['completion_tokens']:,} completion tokens"
    cost = f", cost {calls['cost']:.4f}" if calls["cost"] else ""  # without prices nothing is known of it
    if calls["made"] + calls["replayed"] and not calls["prompt_tokens"] + calls["completion_tokens"]:
        tokens, cost = "the server counts no tokens, so nothing is known of their cost", ""
    lines.append(f"{'replies that this rests on':<42}{calls['made'] + calls['replayed']:>9,}  ({tokens}{cost})")
    return "\n".join(lines)


def _add_flags(parser: argparse.ArgumentParser, config: type, *, skip: tuple[str, ...] = ()) -> None:
    """A flag for each field of the dataclass, explained by its docstring."""
    hints, about = typing.get_type_hints(config), _argument_lines(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        required = field.default is dataclasses.MISSING
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=hints[field.name],
            required=required,
            default=argparse.SUPPRESS,
            metavar="TEXT" if hints[field.name] is str else "N",
            help=about[field.name] + ("" if required else f" ({field.default})"),
        )


def _argument_lines(config: type) -> dict[str, str]:
    """name -> explanation, from the `Args:` of a docstring; a line may explain `a, b` together."""
    about: dict[str, str] = {}
    block = inspect.getdoc(config).partition("Args:\n")[2]  # type: ignore[union-attr]
    for names, text in re.findall(r"^    ([a-z_, ]+): ((?:.|\n(?=     ))+)", block, flags=re.MULTILINE):
        for name in names.split(", "):
            about[name] = " ".join(text.split()).rstrip(".").replace("%", "%%")
    return about


def _settings(args: argparse.Namespace, config: type) -> dict[str, Any]:
    return {field.name: value for field in dataclasses.fields(config) if (value := getattr(args, field.name, None)) is not None}
