"""`nemo-longctx doctor`: versions, what this machine can use, and, for a recipe, a self-test of the path its run would take."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from nemo_longctx import capability
from nemo_longctx.config import ConfigError, did_you_mean


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--model",
        metavar="RECIPE",
        help="test the path of this recipe (or your own .yaml): document leaks, float64 parity, memory",
    )
    parser.add_argument("--checkpoint", help="with --model: use these weights (a NeMo checkpoint or a run's directory)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="with --model: overrides of the recipe")


def run(args: argparse.Namespace) -> int:
    if args.model:
        return _self_test(args)
    for name, value in (("--checkpoint", args.checkpoint), ("KEY=VALUE", args.overrides)):
        if value:
            raise ConfigError(name, value, "has no effect without --model RECIPE")
    versions, found = capability.package_versions(), capability.capabilities()
    if args.json:
        said = {"versions": versions, "capabilities": [dataclasses.asdict(c) for c in found], "host": capability.host_fault()}
        print(json.dumps(said, indent=1))
        return 0
    width = max(len(name) for name in (*versions, *(c.name for c in found)))
    for name, version in versions.items():
        print(f"{name:{width}}  {version or 'not installed'}")
    if (fault := capability.host_fault()) is not None:
        print(f"{'host':{width}}  no  {fault}")
    for part in found:
        print(f"{part.name:{width}}  {'yes' if part.available else 'no ':3} {part.detail}")
        if not part.available:
            print(f"{'':{width}}      costs: {part.cost}\n{'':{width}}      get it: {part.remedy}")
    return 0


def _self_test(args: argparse.Namespace) -> int:
    """Exit status 0 where every question about the model's path is answered well, 1 otherwise."""
    from nemo_longctx.compose import compose, groups, recipe_file
    from nemo_longctx.dry_run import check_base
    from nemo_longctx.recipe import load_recipe

    if recipe_file(args.model) is None and args.model not in groups()["recipe"]:
        raise ConfigError("--model", args.model, f"no such recipe, {did_you_mean(args.model, groups()['recipe'])}")
    overrides = [f"recipe={args.model}", *([f"restore_from={args.checkpoint}"] if args.checkpoint else []), *args.overrides]
    recipe = load_recipe(compose(overrides))
    if args.checkpoint:
        check_base(recipe)
    print("importing NeMo ...", file=sys.stderr)
    from nemo_longctx.adapters.megatron.self_test import findings_text, self_test
    from nemo_longctx.adapters.nemo.checkpoint.load import build_for_test

    model, config = build_for_test(recipe, load_weights=args.checkpoint is not None)
    masked = recipe.data.document_masking
    findings = self_test(model, config, seq_length=recipe.seq_length, document_masking=masked)
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print(findings_text(findings))
    return 0 if all(finding.passed for finding in findings) else 1
