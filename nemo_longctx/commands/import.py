# ruff: noqa: N999 (a command's module has its name)
"""`nemo-longctx import HF_DIR CKPT`: a Hugging Face model as a NeMo checkpoint, its RoPE variant with it."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("source", metavar="HF_DIR", type=Path, help="directory with config.json, weights and tokenizer")
    parser.add_argument("target", metavar="CKPT", type=Path, help="NeMo checkpoint directory to make")
    parser.add_argument("--no-verify", action="store_true", help="do not load the result and compare it with HF_DIR")
    parser.add_argument("--verify-tokens", type=int, help="length of the input whose logits are compared (512)")


def run(args: argparse.Namespace) -> int:
    """Convert, verify, and say which RoPE variant came along."""
    from nemo_longctx.hf.directory import check_directory
    from nemo_longctx.hf.files import check_target
    from nemo_longctx.runs import leaves_nothing

    check_target(args.target, args.source)
    check_directory(args.source)  # what cannot be converted is said before the host is imported
    from nemo_longctx.adapters.nemo.checkpoint.convert import import_hf

    with leaves_nothing(args.target):
        variant = import_hf(args.source, args.target, verify=not args.no_verify, verify_tokens=args.verify_tokens)
    checked = "not verified" if args.no_verify else "verified by loading it again"
    print(f"{args.target}: NeMo checkpoint of {args.source}, RoPE {variant}, {checked}")
    return 0
