"""`nemo-longctx sft`: instruction tuning of an extended model on short conversations and generated long ones."""

from __future__ import annotations

import argparse

from nemo_longctx.commands.train import add_looks, keys, run_or_look
from nemo_longctx.recipe import InstructRecipe

EPILOG = """`sft=` chooses a row of Table 9 (Xiong et al. 2023), `lora={dim: 16}` trains adapters alone.
started again after a kill, the same command goes on from its last checkpoint
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Overrides of conf/sft.yaml."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{EPILOG}\n{keys(InstructRecipe)}"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="restore_from=runs/x 'data.short=[chat.jsonl]' ...")
    add_looks(parser)


def run(args: argparse.Namespace) -> int:
    """Tune, or look; the exit status."""
    return run_or_look(args, config_name="sft")
