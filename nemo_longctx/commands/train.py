"""`nemo-longctx train`: continual pretraining, the same as `examples/megatron_gpt_continual.py`."""

from __future__ import annotations

import argparse

from nemo_longctx import launch

EPILOG = """Groups and keys are those of conf/: `nemo-longctx train --keys` lists them. On several processes:
torchrun --nproc-per-node 8 -m nemo_longctx train recipe=llama2_7b restore_from=/ckpt/llama2_7b.
Started again after a kill, the same command goes on from its last checkpoint."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Overrides of the recipe, as the example script takes them."""
    parser.epilog = EPILOG
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe=tiny_cpu_base optimizer.lr=1e-4 ...")
    parser.add_argument("--keys", action="store_true", help="list groups, choices and keys with their defaults, and exit")


def run(args: argparse.Namespace) -> int:
    """Train, and return the run's exit status."""
    overrides = ["--help"] if args.keys else args.overrides
    return launch.main(overrides, description="Groups and keys of a recipe.")
