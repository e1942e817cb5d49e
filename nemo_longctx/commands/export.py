"""`nemo-longctx export CKPT HF_DIR`: a NeMo checkpoint as a Hugging Face model, loaded again and compared before it is done."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_longctx.config import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "source", metavar="CKPT", type=Path, help="NeMo checkpoint, or a run's directory (its newest checkpoint)"
    )
    parser.add_argument("target", metavar="HF_DIR", type=Path, help="directory to make")
    parser.add_argument("--no-verify", action="store_true", help="do not load the result and compare it with the checkpoint")
    parser.add_argument("--verify-tokens", type=int, help="length of the input whose logits are compared (512)")
    parser.add_argument("--max-position-embeddings", type=int, help="longest input, tokens (the checkpoint's seq_length)")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face tokenizer directory, where the checkpoint carries none")


def run(args: argparse.Namespace) -> int:
    """Convert, verify, and say which RoPE variant was written and what others read from it."""
    from nemo_longctx.checkpoints import is_checkpoint
    from nemo_longctx.hf.files import check_target
    from nemo_longctx.hf.other_formats import no_nemo_checkpoint
    from nemo_longctx.planning.models import nemo_context
    from nemo_longctx.runs import leaves_nothing

    if nemo_context(args.source) is None and not is_checkpoint(args.source):  # before the host is imported
        raise ConfigError("CKPT", str(args.source), no_nemo_checkpoint(args.source))
    check_target(args.target, args.source / "weights")  # a run's directory may hold its exports
    from nemo_longctx.adapters.nemo.checkpoint.convert import export_hf

    with leaves_nothing(args.target):
        exported = export_hf(
            args.source,
            args.target,
            verify=not args.no_verify,
            verify_tokens=args.verify_tokens,
            max_position_embeddings=args.max_position_embeddings,
            tokenizer=args.tokenizer,
        )
    checked = "not verified" if args.no_verify else "verified by loading it again"
    print(f"{args.target}: transformers model of {args.source}, RoPE {exported.variant}, {checked}")
    for note in exported.notes:
        print(f"  {note}")
    return 0
