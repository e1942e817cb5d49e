"""`nemo-longctx rope show|plot|advise`: what a RoPE variant does, in under two seconds and without torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.commands.prepare import tokens
from nemo_longctx.config import ConfigError, is_finite
from nemo_longctx.model_fields import LARGEST_BASE
from nemo_longctx.rope.analysis import (
    LONGEST,
    PRACTICE,
    advise,
    candidates,
    describe,
    first_negative,
    fitted_base,
    practised_base,
    smallest_base,
)
from nemo_longctx.rope.base import RopeVariant
from nemo_longctx.rope.variants import VARIANTS, Rope, parse, to_dict

SEQ_LENGTH, PAIR, POSITIONS = 32_768, 4, 24  # where the command line does not say them
FIGURES = ("decay", "wavelengths", "helices")
PAPER_BASES = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0, 10_000_000.0)
# The four of Xiong et al. 2023, Figure 4, in its order.
PAPER_VARIANTS = ("rope", "pi:factor=4", "abf:base=500000", "xpos:base=500000")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the three subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|plot|advise")
    show = actions.add_parser("show", help="frequencies, attention factor, granularity, wavelengths and turns of one variant")
    show.add_argument("--variant", required=True, help=", ".join(sorted(VARIANTS)))
    for name, kind in _fields().items():
        flags = sorted({f"--{name.replace('_', '-')}", f"--{name}"})
        show.add_argument(*flags, dest=f"field_{name}", type=kind, metavar="VALUE", help=f"the variant's {name}")
    show.add_argument(
        "--spread", type=float, default=2.0, help="largest pair of x over its smallest, for Theorem 1's bounds (2)"
    )
    show.add_argument("--json", action="store_true", help="print JSON")
    plot = actions.add_parser("plot", help="score decay, wavelengths or helices of several variants, as PNG and CSV")
    plot.add_argument(
        "--variants", nargs="+", default=PAPER_VARIANTS, metavar="NAME[:field=value,...]", help="variants to draw"
    )
    plot.add_argument("--figures", nargs="+", choices=FIGURES, default=["decay"], help="which (decay)")
    plot.add_argument("--pair", type=int, help=f"pair of dimensions of the helices ({PAIR})")
    plot.add_argument("--positions", type=int, help=f"positions on the helices ({POSITIONS})")
    plot.add_argument("--out", type=Path, default=Path("rope-figures"), help="folder to write (rope-figures)")
    advice = actions.add_parser("advise", help="compare the variants, and the bases, for one trained and one target length")
    advice.add_argument("--from", dest="trained", type=tokens, required=True, metavar="TOKENS", help="trained length")
    advice.add_argument(
        "--to", dest="target", type=tokens, required=True, metavar="TOKENS", help="target length, as 32768 or 32Ki"
    )
    advice.add_argument("--base", type=float, default=10_000.0, help="base of the trained model (10000)")
    advice.add_argument("--new-base", type=float, help="base of abf and xpos (the practised one and that of the bound)")
    advice.add_argument("--bases", type=float, nargs="+", default=PAPER_BASES, help="bases to judge")
    advice.add_argument("--json", action="store_true", help="print JSON")
    advice.add_argument("--png", type=Path, metavar="FILE", help="also draw the comparison")
    for sub in (show, plot, advice):
        sub.add_argument("--head-dim", type=int, default=128, help="dimensions of a head (128)")
    for sub in (show, plot):
        sub.add_argument("--rotary-percent", type=float, default=1.0, help="share of them that is rotated (1.0)")
        sub.add_argument("--seq-length", type=tokens, metavar="N", help=f"context, tokens ({SEQ_LENGTH})")


def run(args: argparse.Namespace) -> int:
    """Dispatch to the subcommand."""
    actions: Mapping[str, Any] = {"show": _show, "plot": _plot, "advise": _advise}
    try:
        actions[args.action](args)
    except ConfigError as error:
        raise _by_option(error, args) from None
    return 0


def _by_option(error: ConfigError, args: argparse.Namespace) -> ConfigError:
    """An error of a variant by the option that was typed, where one was."""
    if error.key == "rotary_dim":
        option, value = ("head_dim", args.head_dim)
        if getattr(args, "rotary_percent", 1.0) != 1.0:
            option, value = "rotary_percent", args.rotary_percent
        return ConfigError(f"--{option.replace('_', '-')}", value, error.mend)
    name = error.key.removeprefix("rope.")
    if args.action == "show" and name != error.key and getattr(args, f"field_{name.partition('[')[0]}", None) is not None:
        return ConfigError(f"--{name.replace('_', '-')}", error.value, error.mend)
    return error


def _check_base(flag: str, base: float) -> None:
    try:
        Rope(base=base)
    except ConfigError as error:
        raise ConfigError(flag, base, error.mend if is_finite(base) else "must be a finite number") from None
    if base > LARGEST_BASE:
        raise ConfigError(flag, base, f"must be at most {LARGEST_BASE:g}: nothing turns beyond it")


def _fields() -> dict[str, Any]:
    """Every field of every variant -> what turns its text into a value."""
    return {field.name: _value for cls in VARIANTS.values() for field in dataclasses.fields(cls)}


def _value(text: str) -> Any:
    """A number, true or false, or numbers joined by commas; other text is left for the variant's own check to name."""
    if "," in text:
        return tuple(_value(part) for part in text.split(","))
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _named(text: str) -> RopeVariant:
    """`pi:factor=4,base=10000` -> a variant. A list of numbers is joined by `/`: `long_factor=1.0/1.5`."""
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {"variant": name}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError("--variants", text, "is NAME:field=value,field=value")
        values[key] = _value(value.replace("/", ","))
    try:
        return parse(values)
    except ConfigError as error:
        raise ConfigError("--variants", text, f"{error.key.removeprefix('rope.')}={error.value!r}: {error.mend}") from None


def _rotary_dim(args: argparse.Namespace) -> int:
    if not 0 < args.rotary_percent <= 1:
        raise ConfigError("--rotary-percent", args.rotary_percent, "the share of a head that is rotated: above 0, up to 1")
    return int(args.head_dim * args.rotary_percent)


def _whole(flag: str, value: int | None, otherwise: int, least: int = 1) -> int:
    """What the command line says for `flag`, or `otherwise`."""
    if value is not None and value < least:
        raise ConfigError(flag, value, f"must be {least} or more")
    return otherwise if value is None else value


def _show(args: argparse.Namespace) -> None:
    seq_length = _whole("--seq-length", args.seq_length, SEQ_LENGTH)
    fields = {name: getattr(args, f"field_{name}") for name in _fields()}
    variant = parse({"variant": args.variant, **{name: value for name, value in fields.items() if value is not None}})
    facts = describe(
        variant,
        head_dim=args.head_dim,
        rotary_dim=_rotary_dim(args),
        spread=args.spread,
        seq_length=seq_length,
    )
    local = variant.local
    windowed = None if local is None else local.inv_freq(_rotary_dim(args))
    if args.json:
        if windowed is not None:
            facts["local_inv_freq"] = windowed.tolist()
        facts = {**to_dict(variant), "head_dim": args.head_dim, "seq_length": seq_length, **facts}
        print(json.dumps(facts, indent=1, allow_nan=False))
        return
    print("  ".join(f"{key}={value}" for key, value in to_dict(variant).items()))
    paper = facts["paper"]

    def beside(key: str) -> str:
        return f"   (Xiong et al. 2023: {paper[key]})" if key in paper else ""

    limit = "none" if facts["granularity_limit"] is None else f"{facts['granularity_limit']:.4f}{beside('granularity_limit')}"
    if local is not None:
        print(f"layers with a window: plain rope, base {local.base:g}, attention factor 1")
    print(f"attention factor   {facts['attention_factor']:.6g}")
    print(f"raw score at 0     {facts['raw_score_at_0']:.2f}{beside('raw_score_at_0')}")
    lower, upper = facts["granularity_bounds"]
    print(f"granularity C_d    {facts['granularity']:.4f}, for any x of spread {args.spread:g}: {lower:.4f} to {upper:.4f}")
    print(f"  as d grows       {limit}")
    print(f"{'pair':>5}{'inv_freq':>14}{'tokens a turn':>16}{'turns in ' + str(seq_length):>18}", end="")
    print(f"{'xPos scale':>14}" if "xpos_scale" in facts else "", end="")
    print("" if windowed is None else f"{'with a window':>16}")
    for j, (freq, wave, turns) in enumerate(zip(facts["inv_freq"], facts["wavelengths"], facts["turns"], strict=True)):
        print(f"{j:>5}{freq:>14.6g}{wave:>16.1f}{turns:>18.3f}", end="")
        print(f"{facts['xpos_scale'][j]:>14.6f}" if "xpos_scale" in facts else "", end="")
        print("" if windowed is None else f"{windowed[j]:>16.6g}")


def _plot(args: argparse.Namespace) -> None:
    from nemo_longctx.rope.figures import plot_decay, plot_helices, plot_wavelengths

    for flag, used in (("pair", {"helices"}), ("positions", {"helices"}), ("seq_length", {"decay", "wavelengths"})):
        if getattr(args, flag) is not None and not used & set(args.figures):
            mend = f"has no effect on --figures {' '.join(args.figures)}; leave it out, or add {' or '.join(sorted(used))}"
            raise ConfigError(f"--{flag.replace('_', '-')}", getattr(args, flag), mend)
    for flag, values in (("--variants", args.variants), ("--figures", args.figures)):
        if twice := [value for value in values if list(values).count(value) > 1]:
            raise ConfigError(flag, twice[0], "named twice; leave one out")
    seq_length = _whole("--seq-length", args.seq_length, SEQ_LENGTH)
    if seq_length > LONGEST:
        raise ConfigError("--seq-length", seq_length, f"is longer than any context: {LONGEST:,} tokens at most")
    positions = _whole("--positions", args.positions, POSITIONS, least=2)
    pair = _whole("--pair", args.pair, PAIR, least=0)
    variants, rotary_dim = {text: _named(text) for text in args.variants}, _rotary_dim(args)
    for variant in variants.values():
        variant.inv_freq(rotary_dim, seq_length)  # refuses what none of the figures could show
    written: list[Path] = []
    if "decay" in args.figures:
        written += plot_decay(variants, args.out, head_dim=args.head_dim, rotary_dim=rotary_dim, distances=seq_length)
    if "wavelengths" in args.figures:
        written += plot_wavelengths(variants, args.out, rotary_dim=rotary_dim, context=seq_length)
    if "helices" in args.figures:
        written += plot_helices(variants, args.out, rotary_dim=rotary_dim, pair=pair, positions=positions)
    for path in written:
        print(path)


def _advise(args: argparse.Namespace) -> None:
    if args.trained < 2:
        raise ConfigError("--from", args.trained, "the trained length in tokens, 2 or more")
    if args.png is not None and (args.png.suffix.lower() != ".png" or args.png.is_dir()):
        raise ConfigError("--png", str(args.png), "must name a file that ends in .png")
    if args.target > LONGEST:
        raise ConfigError("--to", args.target, f"is longer than any context: {LONGEST:,} tokens at most")
    if args.target <= args.trained:
        raise ConfigError("--to", args.target, f"must be above the trained length, {args.trained}")
    for flag, values in (("--base", [args.base]), ("--new-base", [args.new_base]), ("--bases", args.bases)):
        for base in values:
            if base is not None:
                _check_base(flag, base)
    least = smallest_base(args.target, args.head_dim)
    # Being above the smallest base that reaches the target does not make the trained one reach it.
    reaching = least if least >= args.base else smallest_base(args.target, args.head_dim, at_least=args.base)
    practised = practised_base(args.target, args.base)
    new_bases = [args.new_base] if args.new_base is not None else sorted({*filter(None, [practised]), reaching})
    variants = candidates(args.trained, args.target, args.base, *new_bases)
    rows = advise(variants, trained=args.trained, target=args.target, base=args.base, head_dim=args.head_dim)
    bases = [_judge(base, args) for base in sorted({*args.bases, args.base, *new_bases})]
    if args.json:
        facts = {"from": args.trained, "to": args.target, "head_dim": args.head_dim, "smallest_base": least}
        facts |= {
            "smallest_base_from_trained": reaching,
            "fitted_base": fitted_base(args.target),
            "practised_base": practised,
            "bases": bases,
            "variants": [dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(facts, indent=1, allow_nan=False))
    else:
        _print_advice(args, rows, bases, least, reaching, practised)
    if args.png is not None:
        from nemo_longctx.rope.figures import plot_advice

        plot_advice(rows, args.png, target=args.target)


def _judge(base: float, args: argparse.Namespace) -> dict[str, Any]:
    """Each base by its own sums: being above the smallest that reaches the target does not make one reach it too."""
    reaches = first_negative(Rope(base=base).theta(args.head_dim), args.target + 1)
    trained = [f"{name} at {longest:,}" for practised, longest, name in PRACTICE if practised == base]
    return {"base": base, "within_bound": reaches is None, "reaches": reaches, "trained_by": trained}


def _print_advice(
    args: argparse.Namespace,
    rows: list[Any],
    bases: list[dict[str, Any]],
    least: float,
    reaching: float,
    practised: float | None,
) -> None:
    print(f"From {args.trained} to {args.target} tokens, head size {args.head_dim}, trained base {args.base:g}\n")
    header = ("variant", "base", "granularity", "att. factor", "reaches", "unseen pairs", "score at target")
    print("{:<14}{:>12}{:>13}{:>13}{:>11}{:>14}{:>17}".format(*header))
    for row in rows:
        reaches = f">{args.target}" if row.reaches is None else str(row.reaches)
        print(
            f"{row.variant['variant']:<14}{row.variant['base']:>12.6g}{row.granularity:>13.4f}{row.attention_factor:>13.4f}"
            f"{reaches:>11}{row.unseen_pairs:>14}{row.score_at_target:>17.2f}"
        )
    print("\nreaches: first distance where a key like the query scores below a random one (Men et al. 2024)")
    print("unseen pairs: pairs that meet angles at the target which training never showed them")
    print(f"\nPractice: what was trained and seen to work at {args.target} tokens or more, from base {args.base:g}")
    if practised is None:
        print("  no published base above it in this tool's list; see the bound")
    else:
        names = [name for base, longest, name in PRACTICE if base == practised and longest >= args.target]
        print(f"  {practised:g}: {', '.join(names)}")
    print(
        "\nBound: of the untrained score of a key like the query, summed over all pairs (Men et al. 2024). A trained model need"
    )
    print("not keep it: Llama 2 Long at 500,000 finds first sentences to 30k, where this sum turns negative at 18,438")
    print(f"  smallest base for {args.target} tokens: {least:.3g} (their fit 0.0424 L^1.628: {fitted_base(args.target):.3g})")
    if reaching != least:
        print(f"  smallest from the trained base {args.base:g} up: {reaching:.3g} (a larger base may reach less far)")
    for entry in bases:
        verdict = "within the bound" if entry["within_bound"] else f"outside the bound from {entry['reaches']} on"
        print(f"  {entry['base']:>12g}  {verdict:<34}{'; '.join(entry['trained_by'])}".rstrip())
