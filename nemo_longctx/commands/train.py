"""`nemo-longctx train`: continual pretraining at a longer context, through NeMo's trainer."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from nemo_longctx.compose import compose, groups
from nemo_longctx.recipe import RecipeConfig
from nemo_longctx.reference import settings

DRY_RUNS = ("files", "full")

EPILOG = """on several processes, and on several nodes (the same line on each; FIRST_NODE is the name of one):
  torchrun --nproc-per-node 8 -m nemo_longctx train recipe=FILE.yaml trainer.devices=8
  torchrun --nnodes 8 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --nproc-per-node 8 -m nemo_longctx train \\
      recipe=llama2_7b restore_from=/ckpt/llama2_7b
started again after a kill, the same command goes on from its last checkpoint
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Overrides of the recipe, and ways to look before training."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{EPILOG}\n{keys(RecipeConfig)}"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe=tiny_cpu_base optimizer.lr=1e-4 ...")
    add_looks(parser)


def add_looks(parser: argparse.ArgumentParser) -> None:
    """The ways to look before a run of either kind."""
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const=DRY_RUNS[0],
        choices=DRY_RUNS,
        metavar="full",
        help="check all that can be seen without NeMo; =full also trains a step of each stage, saves and evaluates, in a "
        "directory that is removed",
    )
    parser.set_defaults(separate=_separate)
    parser.add_argument("--print-config", action="store_true", help="print every value and where it comes from, and exit")
    parser.add_argument("--cfg", choices=("job",), help="Hydra's word for --print-config")


def _separate(arguments: Sequence[str]) -> list[str]:
    """Keep an override behind `--dry-run` from being taken for its value: of two of one key the last counts."""
    behind = [*arguments, ""][1:]
    alone = [each == "--dry-run" and after not in DRY_RUNS for each, after in zip(arguments, behind, strict=True)]
    return [f"--dry-run={DRY_RUNS[0]}" if is_alone else each for each, is_alone in zip(arguments, alone, strict=True)]


def run(args: argparse.Namespace) -> int:
    """Train, or look; the exit status."""
    return run_or_look(args, config_name="config")


def run_or_look(args: argparse.Namespace, *, config_name: str) -> int:
    """What `train` (`config_name` config) and `sft` do."""
    overrides = list(args.overrides)
    if args.print_config or args.cfg:
        from nemo_longctx.explain import explained

        print(explained(overrides, config_name=config_name), end="")
        return 0
    if args.dry_run is not None:
        return dry_run(overrides, full=args.dry_run == "full", config_name=config_name)
    from nemo_longctx import launch, launch_sft

    return (launch_sft if config_name == "sft" else launch).main(overrides)


def dry_run(overrides: Sequence[str], *, full: bool, config_name: str = "config") -> int:
    """Print what a run would read, need and write. Status 2 where it would end with an error."""
    from nemo_longctx.dry_run import check
    from nemo_longctx.recipe import load_instruct_recipe, load_recipe

    load = load_instruct_recipe if config_name == "sft" else load_recipe
    recipe = load(compose(overrides, config_name=config_name))
    checked = check(recipe)
    print(*checked.lines, sep="\n", flush=True)
    if checked.errors:
        return 2
    if not full:
        print("all of this holds; nothing was loaded. --dry-run=full builds the model and trains a step of each stage")
        return 0
    from nemo_longctx.launch import exit_status, rehearse

    return exit_status(lambda: rehearse(recipe))


def keys(recipe: type) -> str:
    """Groups and their choices, and each key of `recipe` with type, default and meaning."""
    apart = "sft" if recipe is RecipeConfig else "recipe"  # each is a group of one of the two alone
    lines = ["groups (group=choice):"]
    lines += [f"  {group:12} {', '.join(choices)}" for group, choices in groups().items() if group != apart]
    lines += ["", "keys (key=value; [] is any place in a list):"]
    for each in settings(recipe):
        default = "has to be set" if each.default is None else f"default {each.default}"
        lines.append(f"  {each.key}  ({each.kind}; {default})")
        lines += textwrap.wrap(each.meaning, 96, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
