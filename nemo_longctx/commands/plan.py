"""`nemo-longctx plan`: FLOPs, memory, time and layouts of a run, before it is paid for. Needs neither torch nor a GPU."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--model",
        help="a name (llama2_7b, ...), a Hugging Face config.json or its folder, a NeMo checkpoint, or num_layers=...,...",
    )
    what.add_argument(
        "--recipe",
        help="a recipe of conf/recipe/ or a file: its model, curriculum, machine and layout; other options override it",
    )
    what.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe, such as trainer.num_nodes=4")
    what.add_argument("--curriculum", help="lengths and the share of tokens at which each ends: 4096@0.2,32768")
    what.add_argument("--tokens-per-step", type=int, help="tokens of an optimizer step (default 4194304: Llama 2's)")
    what.add_argument("--steps", type=int, help="optimizer steps (default 100000)")
    what.add_argument("--documents", nargs="+", default=[], help="prefixes of .bin/.idx corpora: lengths for --flops document")
    what.add_argument(
        "--flops", default="causal", help="convention: full (the paper's), full_exact, causal (default) or document"
    )
    what.add_argument("--vocabulary", action=argparse.BooleanOptionalAction, help="count the LM head, or not")
    where = parser.add_argument_group("where, and at what speed")
    where.add_argument("--gpu", help="kind of GPU: a100, h100, h200, b200, gb200 (default h100), or cpu")
    where.add_argument("--gpus", type=int, help="how many")
    where.add_argument("--mfu", type=float, help="share of the bf16 peak that the run reaches, in the convention of --flops")
    where.add_argument("--mfu-from", help="JSON that a run (throughput.json) or benchmark wrote: its mfu, in its convention")
    where.add_argument("--price", type=float, help="price of a GPU-hour, in any currency")
    layout = parser.add_argument_group("layout: memory and time of this one, or a search for the best")
    layout.add_argument("--tp", type=int, help="tensor_model_parallel_size")
    layout.add_argument("--pp", type=int, help="pipeline_model_parallel_size")
    layout.add_argument("--cp", type=int, help="context_parallel_size")
    layout.add_argument("--vp", type=int, help="virtual_pipeline_model_parallel_size")
    layout.add_argument("--micro-batch-size", type=int)
    layout.add_argument("--recompute", help="none, selective (each MLP), full or block:N (the first N layers of a chunk)")
    layout.add_argument("--offload", help="activations that wait in host memory: none, full or block:N")
    layout.add_argument("--precision", help="bf16 (default), fp8, fp32 or fsdp_bf16")
    layout.add_argument("--sharding", help="none, optimizer (default) or full")
    layout.add_argument("--loss", help="chunked (default, what recipes train with), vocab_parallel or eager")
    layout.add_argument("--eval-length", type=int, help="context of an evaluation inside the run, for its KV cache")
    layout.add_argument(
        "--search", type=int, nargs="?", const=10, metavar="ROWS", help="rank all layouts; show so many of each kind"
    )
    layout.add_argument(
        "--apply", metavar="FILE", help="write the fastest layout as a recipe that begins with this one (implies --search)"
    )
    layout.add_argument("--longest", action="store_true", help="the longest sequence that fits these GPUs")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 unless an input is wrong."""
    from nemo_longctx.planning.report import make_plan
    from nemo_longctx.planning.text import as_text

    plan = make_plan(_settings(args))
    if args.apply:
        _write_override(Path(args.apply), plan["override"])
    if args.json:
        print(json.dumps(plan, indent=1))
    else:
        print(as_text(plan, rows=args.search or 10))
        if args.apply:
            print(f"\nwrote {args.apply}; train it with recipe={args.apply}")
    return 0


def _write_override(file: Path, text: str) -> None:
    """Write the recipe, and compose it as the training script will, so that a bad one is known here.

    Raises:
        ConfigError: the file would not be taken for a recipe, or the schema refuses it.
    """
    from nemo_longctx.compose import compose
    from nemo_longctx.recipe import load_recipe

    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError("apply", str(file), "a recipe's name must end in .yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    load_recipe(compose([f"recipe={file}"]))


def _settings(args: argparse.Namespace) -> Any:
    from nemo_longctx.planning.flops import parse_curriculum
    from nemo_longctx.planning.layout import Layout
    from nemo_longctx.planning.models import parse_model
    from nemo_longctx.planning.report import PlanSettings

    if args.model is None and args.recipe is None:
        raise ConfigError("model", None, "name one with --model, or a recipe with --recipe")
    if args.overrides and args.recipe is None:
        raise ConfigError("overrides", args.overrides, "override a recipe: name one with --recipe")
    recipe: Any = _recipe(args) if args.recipe else None
    name, shape = parse_model(args.model) if args.model else (recipe.model_name, recipe.model)
    tokens_per_step = args.tokens_per_step or (recipe.curriculum.tokens_per_step if recipe else 4_194_304)
    steps = args.steps or (recipe.curriculum.total_steps if recipe else 100_000)
    curriculum = recipe.curriculum if recipe else None
    if curriculum is None or args.curriculum or args.steps or args.tokens_per_step:
        text = args.curriculum or _curriculum_text(curriculum) or str(shape.seq_length)
        micro = args.micro_batch_size or 1
        curriculum = parse_curriculum(text, tokens_per_step=tokens_per_step, steps=steps, micro_batch_size=micro)
    for key in ("recompute", "offload"):  # an option holds for all stages, whatever the recipe says of them
        if getattr(args, key) is not None:
            stages = tuple(replace(stage, **{key: getattr(args, key)}) for stage in curriculum.stages)
            curriculum = replace(curriculum, stages=stages)
    return PlanSettings(
        recipe=args.recipe,
        model_name=name,
        model=shape,
        curriculum=curriculum,
        flops=args.flops,
        vocabulary=args.vocabulary,
        documents=args.documents,
        gpu=args.gpu or (recipe.gpu if recipe else None) or "h100",
        layout=_layout(args, recipe.layout if recipe else None, Layout),
        mfu=args.mfu,
        mfu_from=args.mfu_from,
        price=args.price,
        eval_length=args.eval_length if args.eval_length is not None else (recipe.eval_length if recipe else 0),
        search=bool(args.search or args.apply),
        apply=bool(args.apply),
        longest=args.longest,
    )


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe as the planner reads it; where --model says the sizes, they need not be known from the recipe."""
    from nemo_longctx.planning.recipe import recipe_plan

    return recipe_plan(args.recipe, args.overrides, model=args.model)


def _curriculum_text(curriculum: Any) -> str | None:
    return ",".join(f"{stage.seq_length}@{stage.until}" for stage in curriculum.stages) if curriculum else None


def _layout(args: argparse.Namespace, of_recipe: Any, layout_class: Any) -> Any:
    """The recipe's layout with the options laid over it; None where neither says anything."""
    given = {
        "gpus": args.gpus,
        "tensor_model_parallel_size": args.tp,
        "pipeline_model_parallel_size": args.pp,
        "context_parallel_size": args.cp,
        "virtual_pipeline_model_parallel_size": args.vp,
        "micro_batch_size": args.micro_batch_size,
        "recompute": args.recompute,
        "offload": args.offload,
        "precision": args.precision,
        "sharding": args.sharding,
        "loss": args.loss,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if of_recipe is not None:
        return replace(of_recipe, **given)
    return layout_class(**{"loss": "chunked", **given}) if given else None
