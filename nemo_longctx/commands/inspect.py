"""`nemo-longctx inspect`: what the index says, and what a mix will deliver. No token is read, no torch imported."""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.commands.prepare import size
from nemo_longctx.config import ConfigError, build

EPILOG = """\
examples:
  nemo-longctx inspect data/books data/web --seq-length 32768
  nemo-longctx inspect data/all --mix '{long_length: 32768, long_share: 0.5}' --total-tokens 10G --seq-length 32768
  nemo-longctx inspect --mix conf/data/mine.yaml --curriculum conf/curriculum/mine.yaml --json

--mix and --curriculum take YAML or a file of it, and the part under `mix` (`data.mix`) or `curriculum`, where there is one.
Shares cut by windows are expectations over the shuffle; what the mix delivers is counted on the run's own order of documents.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="corpus, or directory of shards; each is one source")
    parser.add_argument("--seq-length", type=size, metavar="N", help="window: adds what is cut, and the plan's one stage")
    parser.add_argument("--mix", metavar="CONF", help="weights and length rules; PREFIX gives its sources, or their paths")
    parser.add_argument("--curriculum", metavar="CONF", help="stages, tokens_per_step, total_tokens of the run")
    parser.add_argument("--total-tokens", type=size, metavar="N", help="tokens of the run (default: one pass over the data)")
    parser.add_argument("--seed", type=int, default=1234, help="of the order in which documents come")
    parser.add_argument(
        "--figure", metavar="PNG", help="histogram, with its data beside it as CSV (default: PREFIX.lengths.png)"
    )
    parser.add_argument("--no-figure", action="store_true", help="write no files")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Inspect and print."""
    from nemo_longctx.data.mixture import Documents, MixConfig
    from nemo_longctx.data.statistics import LengthCounts, describe

    if args.seq_length is not None and args.seq_length < 1:
        raise ConfigError("seq_length", args.seq_length, "a window has at least one token")
    mix = build(MixConfig, _mix_values(args), where="data.mix")
    documents = Documents.open(mix)
    sources = []
    for number, corpus in enumerate(documents.corpora):
        corpus.check()
        counts = LengthCounts.of(lengths for _, lengths in documents.of_source(number))
        given = {"name": documents.names[number], "path": mix.sources[number].path, "dtype": str(corpus.dtype)}
        sources.append(given | describe(counts, args.seq_length))
    report: dict[str, Any] = {"sources": sources}
    error = None
    if args.mix or args.curriculum or args.total_tokens or args.seq_length:
        report["plan"], error = _plan(args, mix, documents)
    if not args.no_figure:
        report["figure"] = _draw(args, report)
    print(json.dumps(report, indent=1)) if args.json else _print(report)
    if error is not None:
        raise error
    return 0


def _mix_values(args: argparse.Namespace) -> dict[str, Any]:
    values = _yaml(args.mix, "mix", ("mix",), ("data", "mix")) if args.mix else {}
    if not args.prefixes and not values.get("sources"):
        raise ConfigError("PREFIX", None, "name a corpus, or a --mix that has sources")
    if args.prefixes and values.get("sources"):
        if len(args.prefixes) != len(values["sources"]):
            mend = f"the mix has {len(values['sources'])} sources; give the path of each, in their order, or none"
            raise ConfigError("PREFIX", args.prefixes, mend)
        pairs = zip(values["sources"], args.prefixes, strict=True)
        values["sources"] = [{**source, "path": prefix} for source, prefix in pairs]
    elif args.prefixes:
        # Prefixes of the same name in several directories are told apart by their paths.
        names = [os.path.basename(prefix.rstrip("/")) for prefix in args.prefixes]
        unique = len(set(names)) == len(names)
        pairs = zip(args.prefixes, names, strict=True)
        values["sources"] = [{"path": prefix, "name": name if unique else prefix} for prefix, name in pairs]
    return values


def _yaml(given: str, key: str, *roots: tuple[str, ...]) -> dict[str, Any]:
    """A mapping from a file or from the text itself; below the first of `roots` that it has."""
    import yaml

    text = Path(given).read_text("utf-8") if os.path.isfile(given) else given
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(key, given, f"not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, Mapping):
        raise ConfigError(key, given, "neither a file nor a YAML mapping, such as '{drop_longer: 4096}'")
    for root in roots:
        inside: Any = values
        for name in root:
            inside = inside.get(name) if isinstance(inside, Mapping) else None
        if isinstance(inside, Mapping):
            return dict(inside)
    return dict(values)


def _plan(args: argparse.Namespace, mix: Any, documents: Any) -> tuple[dict[str, Any], ValueError | None]:
    """What the mix asks and what a run will get, and the error that would stop the run for it."""
    from nemo_longctx.data.curriculum import Curriculum
    from nemo_longctx.data.mixture import plan_mix
    from nemo_longctx.data.order import Order, build_order, check_delivery

    if args.curriculum:
        values = _yaml(args.curriculum, "curriculum", ("curriculum",))
        if args.total_tokens is not None:
            values["total_tokens"] = args.total_tokens
        curriculum = build(Curriculum, values, where="curriculum")
    else:
        seq_length = args.seq_length or 4096
        one_pass = sum(stratum.tokens for stratum in plan_mix(mix, documents, 1))
        steps = max(1, (args.total_tokens or one_pass) // seq_length)
        curriculum = Curriculum.constant(seq_length=seq_length, global_batch_size=1, total_steps=steps)
    strata = plan_mix(mix, documents, curriculum.total_tokens)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "order")
        with open(path, "wb") as file:
            build_order(documents, strata, curriculum, seed=args.seed, file=file)
        order = Order(path, documents)
        delivered = order.delivered(curriculum)
        try:
            check_delivery(mix, order, curriculum)
            error = None
        except ConfigError as found:
            error = found
    stages = [
        {"seq_length": stage.seq_length, "tokens": stage.end_token - stage.first_token, "delivered": tokens.tolist()}
        for stage, tokens in zip(curriculum.plan, delivered, strict=True)
    ]
    rows = [
        {
            "name": stratum.name,
            "documents": stratum.documents,
            "tokens": stratum.tokens,
            "asked_share": stratum.share,
            "delivered_share": int(delivered[:, number].sum()) / curriculum.total_tokens,
            "repeats_per_document": stratum.repeats(curriculum.total_tokens),
        }
        for number, stratum in enumerate(strata)
    ]
    return {"total_tokens": curriculum.total_tokens, "strata": rows, "stages": stages}, error


def _draw(args: argparse.Namespace, report: dict[str, Any]) -> str:
    """Write the PNG and, beside it, its data as CSV."""
    from nemo_longctx.report.lengths import plot_lengths

    first = report["sources"][0]["path"]
    default = f"{(first if isinstance(first, str) else first[0]).rstrip('/')}.lengths.png"
    rows_by_source = {source["name"]: source["histogram"] for source in report["sources"]}
    path = plot_lengths(rows_by_source, args.figure or default)
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["source", "at_least", "below", "documents", "tokens"])
        writer.writeheader()
        for name, rows in rows_by_source.items():
            writer.writerows({"source": name, **row} for row in rows)
    return str(path)


def _print(report: dict[str, Any]) -> None:
    for source in report["sources"]:
        length = source["length"]
        print(f"{source['name']}: {source['documents']:,} documents, {source['tokens']:,} tokens ({source['dtype']})")
        kinds = ", ".join(f"{kind} {value:,.0f}" for kind, value in length.items())
        print(f"  length: {kinds}")
        shares = ", ".join(f">= {int(at):,}: {share:.1%}" for at, share in source["share_of_tokens_at_least"].items())
        print(f"  tokens in documents {shares}")
        if "cut" in source:
            print(f"  cut by windows of {source['cut']['seq_length']:,}:")
            for name, packing in (("concatenate_and_chunk", "concatenate and chunk"), ("best_fit", "best fit")):
                cut = source["cut"][name]
                print(f"    {packing}: {cut['documents']:.1%} of documents, with {cut['tokens']:.1%} of the tokens")
    if "plan" in report:
        plan = report["plan"]
        print(f"plan: {plan['total_tokens']:,} tokens")
        width = max(len(row["name"]) for row in plan["strata"])
        print(f"  {'':{width}}  {'documents':>13} {'tokens':>17} {'asked':>9} {'delivered':>10} {'repeats':>9}")
        for row in plan["strata"]:
            counts = f"{row['documents']:>13,} {row['tokens']:>17,}"
            shares = f"{row['asked_share']:>9.3%} {row['delivered_share']:>10.3%}"
            print(f"  {row['name']:{width}}  {counts} {shares} {row['repeats_per_document']:>9.3f}")
        for number, stage in enumerate(plan["stages"]):
            shares = ", ".join(f"{tokens / stage['tokens']:.3%}" for tokens in stage["delivered"])
            print(f"  stage {number} ({stage['tokens']:,} tokens in windows of {stage['seq_length']:,}): {shares}")
    if "figure" in report:
        print(f"figure: {report['figure']}, its data beside it as .csv")
