"""`nemo-longctx fit-context CSV`: fit L(c) = (alpha/c)^beta + gamma to the losses of any table, with intervals and a figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nemo_longctx.config import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Columns: loss, and context (or context_length, c, length; or position, from 0; or start and end of a bin); "
        "optional model, 'standard error', tokens, document. With a document column the bootstrap draws documents; else it "
        "uses the standard errors; else the residuals."
    )
    parser.add_argument("csv", type=Path, help="table of losses, for instance the loss_by_position.csv of an evaluation")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png (default: beside the CSV, as NAME.fit)")
    parser.add_argument("--min-context", type=float, default=0, help="leave out points below this context, in tokens")
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates (default: %(default)s; 0: no intervals)")
    parser.add_argument("--confidence", type=float, default=0.95, help="coverage of the intervals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from nemo_longctx.eval.context import touches_limit
    from nemo_longctx.eval.scaling import fit_curve, read_curves
    from nemo_longctx.report.plots import plot_context_law

    if args.bootstrap < 0:
        raise ConfigError("--bootstrap", args.bootstrap, "give 0 or more replicates")
    if args.seed < 0:
        raise ConfigError("--seed", args.seed, "give a whole number of at least 0")
    out = args.out or args.csv.with_suffix(".fit")
    out = out.with_suffix("") if out.suffix in (".json", ".png") else out  # both are written beside each other
    json_path = out.with_name(out.name + ".json")
    if json_path.exists() and not _is_fit(json_path):
        raise ConfigError("--out", str(args.out or out), f"{json_path} is there, and holds no fit; name another")
    curves = read_curves(args.csv)
    for model, curve in curves.items():
        keep = curve["context"] >= args.min_context
        if not keep.any():
            longest = max(curve["context"], default=0)
            raise ConfigError("--min-context", args.min_context, f"leaves no point of {model}, whose longest has {longest:g}")
        curves[model] = {key: values[keep] for key, values in curve.items()}
    laws, without = {}, {}
    for model, curve in curves.items():
        try:
            laws[model] = fit_curve(curve, replicates=args.bootstrap, confidence=args.confidence, seed=args.seed)
        except ConfigError:
            raise
        except ValueError as error:  # of this model; the others have their fit
            without[model] = str(error)
            print(f"{model}: no fit: {error}")
            continue
        law = laws[model]
        print(f"{model}: L(c) = (alpha/c)^beta + gamma, {len(curve['loss'])} points, bootstrap over {law.bootstrap}")
        for name in ("alpha", "beta", "gamma"):
            told = "no interval"
            if name in law.intervals:
                low, high = law.intervals[name]
                told = f"{100 * args.confidence:g}% interval {low:.4g} to {high:.4g}"
            print(f"  {name:<6}{getattr(law, name):>10.4g}   {told}")
        if why := touches_limit(law, args.bootstrap):
            print(f"  not to be relied on: {why}")
    if not laws:
        raise ValueError(
            f"{args.csv.name}: no model has a fit; {'; '.join(f'model {name!r}: {why}' for name, why in without.items())}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        model: {
            "alpha": law.alpha,
            "beta": law.beta,
            "gamma": law.gamma,
            "intervals": law.intervals,
            "confidence": law.confidence,
            "bootstrap": law.bootstrap,
            "replicates": law.replicates,
            "seed": args.seed,
        }
        for model, law in laws.items()
    } | {model: {"no_fit": why} for model, why in without.items()}
    json_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    png_path = plot_context_law({model: curves[model] for model in laws}, laws, out.with_name(out.name + ".png"))
    print(f"wrote {json_path} and {png_path}")
    return 0


def _is_fit(path: Path) -> bool:
    """Whether a file is what this command wrote before."""
    from nemo_longctx.files import read_mapping

    held = read_mapping(path)
    return bool(held) and all(isinstance(one, dict) and ("alpha" in one or "no_fit" in one) for one in held.values())
