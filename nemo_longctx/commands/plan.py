"""`nemo-longctx plan`: FLOPs, memory, time and layouts of a run, before it is paid for. Needs neither torch nor a GPU."""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import replace
from typing import Any

from nemo_longctx.commands.prepare import tokens
from nemo_longctx.config import ConfigError

# Options of the layout -> fields of planning.layout.Layout. A search keeps those that were given.
LAYOUT_OPTIONS = {
    "gpus": "gpus",
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "sp": "sequence_parallel",
    "micro_batch_size": "micro_batch_size",
    "recompute": "recompute",
    "offload": "offload",
    "precision": "precision",
    "sharding": "sharding",
    "loss": "loss",
}


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
    what.add_argument(
        "--tokens-per-step", type=tokens, metavar="N", help="tokens of an optimizer step, as 4Mi (default 4194304: Llama 2's)"
    )
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
    layout = parser.add_argument_group(
        "layout: memory and time of this one, or a search for the best, which keeps what is given here"
    )
    layout.add_argument("--tp", type=int, help="tensor_model_parallel_size")
    layout.add_argument("--pp", type=int, help="pipeline_model_parallel_size")
    layout.add_argument("--cp", type=int, help="context_parallel_size")
    layout.add_argument("--vp", type=int, help="virtual_pipeline_model_parallel_size")
    layout.add_argument(
        "--sp", action=argparse.BooleanOptionalAction, help="sequence_parallel (without a recipe: on where TP is over 1)"
    )
    layout.add_argument("--micro-batch-size", type=int, metavar="N", help="sequences at once (default: the recipe's, or 1)")
    layout.add_argument("--recompute", help="none, selective (each MLP), full or block:N (the first N layers of a chunk)")
    layout.add_argument("--offload", help="activations that wait in host memory: none, full or block:N")
    layout.add_argument("--precision", help="bf16 (default), fp8, fp32 or fsdp_bf16")
    layout.add_argument("--sharding", help="none, optimizer (default) or full")
    layout.add_argument("--loss", help="chunked (default, what recipes train with), vocab_parallel or eager")
    layout.add_argument(
        "--eval-length", type=tokens, metavar="N", help="context of an evaluation inside the run, for its KV cache"
    )
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
        from nemo_longctx.files import write_text

        write_text(args.apply, plan["override"])
    if args.json:
        print(json.dumps(plan, indent=1))
    else:
        print(as_text(plan, rows=args.search or 10))
        if args.apply:
            print(f"\nwrote {args.apply}; train it with recipe={args.apply}")
    return 0


def _settings(args: argparse.Namespace) -> Any:
    from nemo_longctx.planning.gpus import DEFAULT_GPU, gpu_by_name
    from nemo_longctx.planning.models import parse_model
    from nemo_longctx.planning.report import PlanSettings

    _check(args)
    recipe: Any = _recipe(args) if args.recipe else None
    name, shape = parse_model(args.model) if args.model else (recipe.model_name, recipe.model)
    gpu = args.gpu or (recipe.gpu if recipe else None) or DEFAULT_GPU
    layout, notes = _layout(args, recipe, gpu)
    if layout is None:
        if gpu != "cpu":
            gpu_by_name(gpu)
        for key in ("gpu", "eval_length"):
            if getattr(args, key) is not None:
                mend = "has no effect on FLOPs alone; say how many GPUs with --gpus"
                raise ConfigError(key.replace("_", "-"), getattr(args, key), mend)
    curriculum, more = _curriculum(args, recipe.curriculum if recipe else None, shape.seq_length)
    return PlanSettings(
        recipe=args.recipe,
        overrides=args.overrides,
        model_name=name,
        model=shape,
        curriculum=curriculum,
        flops=args.flops,
        vocabulary=args.vocabulary,
        documents=args.documents,
        gpu=gpu,
        layout=layout,
        mfu=args.mfu,
        mfu_from=args.mfu_from,
        price=args.price,
        eval_length=args.eval_length if args.eval_length is not None else (recipe.eval_length if recipe else 0),
        search=bool(args.search or args.apply),
        apply=args.apply,
        longest=args.longest,
        pinned=_pinned(args),
        notes=[*notes, *more],
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse what no part of the plan would refuse: options that do not go together, and counts under one.

    Raises:
        ConfigError: by the option's name.
    """
    if args.recipe is None:
        for word in args.overrides:  # as other commands take them
            key, _, value = word.rpartition("=")
            if key in ("", "model", "recipe"):
                options = [f"--{key} {value}"] if key else [f"--recipe {word}", f"--model {word}"]
                raise ConfigError("plan", word, f"a model or recipe is named by an option, {' or '.join(options)}")
    if args.model is None and args.recipe is None:
        raise ConfigError("model", None, "name one with --model, or a recipe with --recipe")
    if args.overrides and args.recipe is None:
        raise ConfigError("overrides", args.overrides, "override a recipe: name one with --recipe")
    for key, what in (("tokens_per_step", "tokens"), ("steps", "optimizer steps"), ("search", "rows to show")):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ConfigError(key.replace("_", "-"), getattr(args, key), f"must be a number of {what}, 1 or more")
    if args.apply is not None and not args.apply.endswith((".yaml", ".yml")):
        raise ConfigError("apply", args.apply, "a recipe's name must end in .yaml")
    if args.apply is not None and os.path.exists(args.apply) and not _applied(args.apply):
        mend = "is there already, and no plan wrote it; name another file, or remove it"
        raise ConfigError("apply", args.apply, mend)


def _applied(path: str) -> bool:
    """Whether a file is one that `--apply` wrote, which the next may replace."""
    from nemo_longctx.planning.override import WRITTEN_BY

    with open(path, "rb") as file:
        return WRITTEN_BY.encode() in file.read(1000)


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe as the planner reads it; where --model says the sizes, they need not be known from the recipe."""
    from nemo_longctx.planning.recipe import recipe_plan

    return recipe_plan(args.recipe, args.overrides, model=args.model)


def _curriculum(args: argparse.Namespace, of_recipe: Any, seq_length: int) -> tuple[Any, list[str]]:
    """The curriculum with the options laid over it, stage by stage, and what the user has to know of it."""
    from nemo_longctx.planning.flops import parse_curriculum

    notes = []
    tokens_per_step = args.tokens_per_step or (of_recipe.tokens_per_step if of_recipe else 4_194_304)
    steps = args.steps or (of_recipe.total_steps if of_recipe else 100_000)
    if of_recipe is None or args.curriculum is not None:
        text = args.curriculum if args.curriculum is not None else str(seq_length)
        curriculum = parse_curriculum(text, tokens_per_step=tokens_per_step, steps=steps)
        if of_recipe is not None:
            now = args.micro_batch_size or 1
            notes.append(
                f"--curriculum replaces the recipe's stages with all of their settings; micro batch {now} in each stage"
            )
    else:
        curriculum = replace(of_recipe, tokens_per_step=tokens_per_step, total_tokens=steps * tokens_per_step)
    given: dict[str, Any] = {
        key: getattr(args, key) for key in ("micro_batch_size", "recompute", "offload") if getattr(args, key) is not None
    }
    # The layout has the options' sizes; None lets a stage have the layout's.
    given |= {LAYOUT_OPTIONS[key]: None for key in ("tp", "pp", "cp") if getattr(args, key) is not None}
    return replace(curriculum, stages=tuple(replace(stage, **given) for stage in curriculum.stages)), notes


def _layout(args: argparse.Namespace, recipe: Any, gpu: str) -> tuple[Any, list[str]]:
    """The recipe's layout with the options laid over it, and what the user has to know of it; None where neither says anything.

    Raises:
        ConfigError: sizes that do not go together, or sequence parallelism without tensor parallelism.
    """
    from nemo_longctx.planning.layout import Layout

    given = {field: getattr(args, key) for key, field in LAYOUT_OPTIONS.items() if getattr(args, key) is not None}
    notes = []
    if recipe is not None:
        base = recipe.layout
        if args.tp is not None and args.sp is None:
            given["sequence_parallel"] = args.tp > 1 and (base.sequence_parallel or base.tensor_model_parallel_size == 1)
        sizes = [LAYOUT_OPTIONS[key] for key in ("tp", "pp", "cp")]
        if _searches(args) and given.get("gpus", base.gpus) % math.prod(given.get(name, getattr(base, name)) for name in sizes):
            free = {name: 1 for name in sizes if name not in given}
            gpus = given.get("gpus", base.gpus)
            notes.append(f"{gpus} GPUs do not divide by the recipe's {base.short_name()}, which the search is free to change")
            given |= free
        given["unfused"] = gpu == "cpu"  # Transformer Engine is where GPUs are
    try:
        if recipe is not None:
            layout = replace(recipe.layout, **given)
        else:
            layout = Layout(**{"loss": "chunked", **given}) if given else None
    except ConfigError as error:
        raise _by_option(error, args) from None
    if args.sp and not _searches(args) and layout.tensor_model_parallel_size == 1:
        raise ConfigError("sp", True, "has no effect without tensor parallelism; give --tp over 1")
    return layout, notes


def _by_option(error: ConfigError, args: argparse.Namespace) -> ConfigError:
    """A layout's error by the option that was typed: of GPUs that nobody named, by the size that does not divide them."""
    options = {f"layout.{field}": key for key, field in LAYOUT_OPTIONS.items()}
    option, value, mend = options[error.key], error.value, error.mend
    if getattr(args, option) is None:
        option = next(key for key in ("tp", "pp", "cp") if getattr(args, key) is not None)
        value = getattr(args, option)
        mend = f"{mend.partition(';')[0].replace('must be', f'the {error.value} GPUs must be')}; change one of them, or --gpus"
    return ConfigError(option.replace("_", "-"), value, mend)


def _searches(args: argparse.Namespace) -> bool:
    return bool(args.search or args.apply or args.longest)


def _pinned(args: argparse.Namespace) -> frozenset[str]:
    """Fields of the layout that the user named, by an option or an override of the trainer."""
    named = {field for key, field in LAYOUT_OPTIONS.items() if getattr(args, key) is not None}
    overridden = {item.partition("=")[0].lstrip("+") for item in args.overrides}
    return frozenset(named | {field for field in LAYOUT_OPTIONS.values() if f"trainer.{field}" in overridden}) - {"gpus"}
