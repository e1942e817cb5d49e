"""`nemo-longctx sft`: instruction tuning, the same as `examples/megatron_gpt_sft.py`."""

from __future__ import annotations

import argparse

from nemo_longctx import launch_sft

EPILOG = """`sft=` chooses a row of Table 9 (Xiong et al. 2023): chat_baseline, short, short_and_pretraining,
self_instruct_no_prompt_loss, self_instruct_prompt_loss. `lora={dim: 16}` trains adapters alone."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Overrides of the recipe, as the example script takes them."""
    parser.epilog = EPILOG
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="restore_from=runs/x 'data.short=[chat.jsonl]' ...")


def run(args: argparse.Namespace) -> int:
    """Tune, and return the run's exit status."""
    return launch_sft.main(args.overrides, description=None)
