"""`nemo-longctx generate CHECKPOINT --prompts FILE`: a checkpoint's answers, in the form that `compare` reads."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, prompts, and how answers are made."""
    parser.epilog = (
        'Prompts: JSONL of {"id", "prompt"} or {"id", "messages"}, or a text file with a prompt a line. Answers: JSONL of '
        '{"id", "prompt", "response", ...}; nemo-longctx compare A.jsonl B.jsonl reads them as they are. What prompts share '
        "at their beginning is read once."
    )
    parser.add_argument("--prompts", type=Path, required=True, help="file of prompts")
    parser.add_argument("--out", type=Path, help="file of answers (default: beside the prompts, as NAME.answers.jsonl)")
    parser.add_argument("--force", action="store_true", help="replace a file of answers")
    add_options(parser)
    parser.add_argument("--stop", action="append", default=[], help="text that ends an answer; may be given again")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `generate` and `chat` share."""
    parser.add_argument("checkpoint", help="NeMo 2 checkpoint or run, or Hugging Face model (folder or name)")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: 512, or what the model's length leaves)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the likeliest token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampling (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="likeliest tokens that are drawn from; 0: all (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument(
        "--template", default="auto", help="auto (the tokenizer's chat template, if any), none, llama2, or a Jinja file"
    )
    parser.add_argument("--system", default="", help="system prompt of a chat template")
    parser.add_argument("--max-length", type=int, help="tokens the model may read (default: what it was made for)")
    parser.add_argument("--tokenizer", help="Hugging Face tokenizer (default: the checkpoint's)")


def run(args: argparse.Namespace) -> int:
    """Answer all prompts; nothing is loaded before they are read and checked."""
    from nemo_longctx.eval import generation

    rows = generation.read_prompts(args.prompts)
    out = args.out or args.prompts.with_suffix(".answers.jsonl")
    _check_free(out, args)
    sampling = sampling_of(args, stop=tuple(args.stop))
    scorer, tokenizer, template, group = open_model(args)
    sampling = dataclasses.replace(sampling, ends=tuple(generation.end_tokens(scorer.model, tokenizer)))
    prompts = [generation.prompt_tokens(row, tokenizer, template=template, system=args.system) for row in rows]
    names = [row["id"] for row in rows]
    asked = generation.requests(prompts, tokenizer, sampling, names, scorer.model.max_length)
    from nemo_longctx.eval.sharing import run_shared
    from nemo_longctx.files import write_text

    first = os.environ.get("RANK", "0") == "0"
    made = run_shared(scorer, asked, group=group, what="generation", quiet=not first)
    if first:
        answers = [
            generation.answer(row, prompt, tokens, tokenizer, sampling)
            for row, prompt, tokens in zip(rows, prompts, made, strict=True)
        ]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in answers))
        cut = [one["completion_tokens"] for one in answers if one["finish_reason"] == "length"]
        print(f"wrote {out}: {len(answers)} answers" + (f", {len(cut)} of them cut, the longest at {max(cut)}" if cut else ""))
    return 0


def _check_free(out: Path, args: argparse.Namespace) -> None:
    """Refuse to write over the prompts, or over answers of another time, before a model is loaded.

    Raises:
        ConfigError: what is there.
    """
    if out.is_dir():
        raise ConfigError("--out", str(out), f"is a folder; name a file in it, say {out / 'answers.jsonl'}")
    if out.exists() and out.samefile(args.prompts):
        raise ConfigError("--out", str(out), "is the file of prompts, and would be replaced; name another file")
    if out.exists() and not args.force:
        raise ConfigError("--out", str(out), "is there already; name another file by --out, or replace it with --force")


def sampling_of(args: argparse.Namespace, **more: Any) -> Any:
    """The options as `Sampling`, checked before a model is loaded."""
    from nemo_longctx.eval.generation import Sampling
    from nemo_longctx.eval.requests import Generation

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    sampling = Sampling(**{name: getattr(args, name) for name in names}, **more)
    values = {name: getattr(sampling, name) for name in names[1:]}
    Generation(context=[0], max_new_tokens=1, stop=bool, **values)  # refuses what no generation takes
    for option, value, default in (("--top-p", args.top_p, 1.0), ("--top-k", args.top_k, 0)):
        if args.temperature == 0 and value != default:
            mend = "has no effect at --temperature 0, which takes the likeliest token; give a temperature too, say 0.7"
            raise ConfigError(option, value, mend)
    return sampling


def open_model(args: argparse.Namespace) -> tuple[Any, Any, str | None, Any]:
    """Scorer, tokenizer, chat template (None: prompts as they stand), and the ranks that share the work."""
    from nemo_longctx.adapters.pretrained import check_source, hf_tokenizer, load_checkpoint
    from nemo_longctx.data.sft_instances import chat_template
    from nemo_longctx.eval.scoring import Scorer

    check_source(args.checkpoint, args.tokenizer)
    model, _, own, group = load_checkpoint(args.checkpoint, max_length=args.max_length)
    tokenizer = hf_tokenizer(args.tokenizer or own)
    if args.template == "auto":
        template = tokenizer.chat_template
    else:
        template = None if args.template == "none" else chat_template(args.template, tokenizer)
    if args.system and template is None:
        raise ConfigError("--system", args.system, "needs a chat template, which the tokenizer has not; give --template")
    return Scorer(model), tokenizer, template, group
