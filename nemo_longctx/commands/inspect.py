"""`nemo-longctx inspect`: what the index says, and what a mix will deliver. No token is read, no torch imported."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.commands.prepare import size
from nemo_longctx.config import ConfigError, build, did_you_mean

EPILOG = """\
examples:
  nemo-longctx inspect data/books data/web --seq-length 32768
  nemo-longctx inspect data/all --mix '{long_length: 32768, long_share: 0.5}' --total-tokens 10G --seq-length 32768
  nemo-longctx inspect --mix conf/data/mine.yaml --curriculum conf/curriculum/mine.yaml --json
  nemo-longctx inspect chats.jsonl --show 2 --tokenizer /ckpt/llama2_7b_hf       # conversations of instruction tuning

--mix and --curriculum take YAML or a file of it, and the part under `mix` (`data.mix`) or `curriculum`, where there is one.
Shares cut by windows are expectations over the shuffle; what the mix delivers is counted on the run's own order of documents,
as the windows of --packing read it. Sizes: 4k is 4,000 tokens and 4Ki is 4,096; M, G and T likewise.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="corpus, or directory of shards; each is one source")
    parser.add_argument(
        "--seq-length", type=size, metavar="N", help="window (4Ki is 4096, 4k is 4000): adds what is cut, and the plan"
    )
    parser.add_argument("--mix", metavar="CONF", help="weights and length rules; PREFIX gives its sources, or their paths")
    parser.add_argument("--curriculum", metavar="CONF", help="stages, tokens_per_step, total_tokens of the run")
    parser.add_argument("--total-tokens", type=size, metavar="N", help="tokens of the run (default: one pass over the data)")
    parser.add_argument("--packing", choices=["concatenate", "best_fit"], help="of the plan's windows (default: concatenate)")
    parser.add_argument("--seed", type=int, help="of the plan's order of documents (default: 1234)")
    parser.add_argument(
        "--figure", metavar="PNG", help="histogram, with its data beside it as CSV (default: PREFIX.lengths.png)"
    )
    parser.add_argument("--no-figure", action="store_true", help="write no files")
    parser.add_argument("--show", type=int, metavar="N", help="print N windows as the model gets them: text, seams, ids, loss")
    parser.add_argument(
        "--at", type=size, metavar="TOKEN", help="with --show: from the window at this token on, or conversation"
    )
    parser.add_argument("--source", metavar="NAME", help="with --show: only windows that hold a document of this source")
    parser.add_argument("--tokenizer", metavar="NAME_OR_DIR", help="with --show: of the text (default: what prepare noted)")
    parser.add_argument(
        "--chat-template", metavar="NAME", help="with --show of conversations: tokenizer (default), llama2, or a Jinja file"
    )
    parser.add_argument(
        "--prompt-loss-weight",
        type=float,
        metavar="W",
        help="with --show of conversations: of prompts (default 0; long data: 1)",
    )
    parser.add_argument("--document-masking", action="store_true", help="with --show: documents kept apart, as in such a run")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Inspect and print."""
    from nemo_longctx.data.mixture import Documents, MixConfig
    from nemo_longctx.data.statistics import LengthCounts, describe

    if any(prefix.endswith(".jsonl") for prefix in args.prefixes):
        return _show_conversations(args)
    has_plan = any(value is not None for value in (args.mix, args.curriculum, args.total_tokens, args.seq_length, args.show))
    _check(args, has_plan)
    mix = build(MixConfig, _mix_values(args), where="data.mix")
    documents = Documents.open(mix)
    sources = []
    for number, corpus in enumerate(documents.corpora):
        corpus.check()
        counts = LengthCounts.of(lengths for _, lengths in documents.of_source(number))
        given = {"name": documents.names[number], "path": mix.sources[number].path, "dtype": str(corpus.dtype)}
        sources.append(given | describe(counts, args.seq_length))
    report: dict[str, Any] = {"sources": sources}
    _tell_other_tokenizers(mix)
    error = None
    if has_plan:
        report["plan"], error = _plan(args, mix, documents)
    unwritten: Exception | None = None
    if not args.no_figure:
        try:
            report["figure"] = _draw(args, report)
        except (ConfigError, OSError) as failed:  # a corpus that may only be read: the report does not depend on its picture
            unwritten = failed
    print(json.dumps(report, indent=1)) if args.json else _print(report)
    if unwritten is not None:
        if args.figure is not None:
            raise unwritten
        print(f"no figure ({unwritten}); name a path by --figure, or use --no-figure", file=sys.stderr)
    if error is not None:
        raise error
    return 0


def _tell_other_tokenizers(mix: Any) -> None:
    """Lengths of two tokenizers' corpora may be compared; a run of both is refused."""
    from nemo_longctx.data.vocabulary import check_corpora

    try:
        check_corpora({f"source {source.label}": source.path for source in mix.sources})
    except ConfigError as error:
        print(f"a run would refuse these sources: {error}", file=sys.stderr)


def _check(args: argparse.Namespace, has_plan: bool) -> None:
    """Numbers that cannot be, and options of a plan where there is none."""
    for name, mend in (("seq_length", "a window has at least one token"), ("total_tokens", "a run has at least one window")):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(name, value, mend)
    if args.seed is not None and args.seed < 0:
        raise ConfigError("seed", args.seed, "a whole number of at least 0")
    if args.show is not None and args.show < 1:
        raise ConfigError("show", args.show, "how many windows to print, at least 1")
    if args.figure is not None and args.no_figure:
        raise ConfigError("figure", args.figure, "it has no effect with --no-figure; leave one out")
    if args.figure is not None and (args.figure.endswith("/") or os.path.isdir(args.figure)):
        raise ConfigError("figure", args.figure, f"is a folder; name a file in it: {os.path.join(args.figure, 'lengths.png')}")
    for name in ("at", "source", "tokenizer", "document_masking"):
        if args.show is None and getattr(args, name):
            raise ConfigError(name, getattr(args, name), "it has no effect without --show")
    for name in ("chat_template", "prompt_loss_weight"):
        if getattr(args, name) is not None:
            raise ConfigError(name, getattr(args, name), "only conversations have it; name a file of them, FILE.jsonl")
    for name in ("packing", "seed"):
        if not has_plan and getattr(args, name) is not None:
            mend = "it has no effect without a plan; give --seq-length, --total-tokens, --mix or --curriculum"
            raise ConfigError(name, getattr(args, name), mend)


def _mix_values(args: argparse.Namespace) -> dict[str, Any]:
    values = _yaml(args.mix, "mix", ("mix",), ("data", "mix")) if args.mix is not None else {}
    _check_sources(values.get("sources"))
    if not args.prefixes and not values.get("sources"):
        raise ConfigError("PREFIX", None, "name a corpus, or a --mix that has sources")
    if args.prefixes and values.get("sources"):
        if len(args.prefixes) != len(values["sources"]):
            mend = f"the mix has {len(values['sources'])} sources; give the path of each, in their order, or none"
            raise ConfigError("PREFIX", args.prefixes, mend)
        pairs = zip(values["sources"], args.prefixes, strict=True)
        values["sources"] = [{**source, "path": prefix} for source, prefix in pairs]
    elif args.prefixes:
        real = [os.path.realpath(prefix) for prefix in args.prefixes]  # also `a` and `./a`
        if twice := next((prefix for prefix, path in zip(args.prefixes, real, strict=True) if real.count(path) > 1), None):
            raise ConfigError("PREFIX", twice, "is named twice; leave one out")
        # Prefixes of the same name in several directories are told apart by their paths.
        names = [os.path.basename(prefix.rstrip("/")) for prefix in args.prefixes]
        unique = len(set(names)) == len(names)
        pairs = zip(args.prefixes, names, strict=True)
        values["sources"] = [{"path": prefix, "name": name if unique else prefix} for prefix, name in pairs]
    return values


def _check_sources(sources: Any) -> None:
    """That they are a list of mappings, before PREFIX is put into them."""
    if sources is None:
        return
    if not isinstance(sources, list):
        raise ConfigError("data.mix.sources", sources, "must be a list, such as [{path: my_corpus, weight: 1.0}]")
    for number, source in enumerate(sources):
        if not isinstance(source, Mapping):
            raise ConfigError(f"data.mix.sources[{number}]", source, "takes keys of its own, such as {path: my_corpus}")


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
    from nemo_longctx.data.best_fit import Packing, check_delivery, pack_windows
    from nemo_longctx.data.curriculum import Curriculum
    from nemo_longctx.data.mixture import plan_mix
    from nemo_longctx.data.order import Order, build_order

    seed = 1234 if args.seed is None else args.seed
    packing: Packing = args.packing or "concatenate"
    if args.curriculum is not None:
        values = _yaml(args.curriculum, "curriculum", ("curriculum",))
        if args.total_tokens is not None:
            values["total_tokens"] = args.total_tokens
        curriculum = build(Curriculum, values, where="curriculum")
    else:
        seq_length = args.seq_length or 4096
        one_pass = sum(stratum.tokens for stratum in plan_mix(mix, documents, 1))
        wanted = one_pass if args.total_tokens is None else args.total_tokens
        if wanted < seq_length:
            name, value = ("seq_length", seq_length) if args.total_tokens is None else ("total_tokens", wanted)
            mend = f"a run has at least one window: {wanted:,} tokens hold none of {seq_length:,}; set --seq-length to less"
            raise ConfigError(name, value, mend)
        steps = wanted // seq_length
        curriculum = Curriculum.constant(seq_length=seq_length, global_batch_size=1, total_steps=steps)
    strata = plan_mix(mix, documents, curriculum.total_tokens)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "order")
        with open(path, "wb") as file:
            build_order(documents, strata, curriculum, seed=seed, file=file)
        order = Order(path, documents, share_tolerance=mix.share_tolerance)
        windows = pack_windows(order, curriculum, packing=packing, seed=seed, document_masking=args.document_masking)
        if args.show is not None:
            _show(args, windows, documents)
        delivered = windows.delivered
        try:
            check_delivery(windows, packing)
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
            "delivered_share": int(delivered[:, number].sum()) / int(delivered.sum()),
            "repeats_per_document": stratum.repeats(curriculum.total_tokens),
            "most_repeats": stratum.most_repeats(curriculum.total_tokens),
        }
        for number, stratum in enumerate(strata)
    ]
    plan = {
        "total_tokens": curriculum.total_tokens,
        "packing": packing,
        "padding": curriculum.total_tokens - int(delivered.sum()),
    }
    if args.total_tokens is not None:
        plan["total_tokens_given"] = args.total_tokens
    return plan | {"strata": rows, "stages": stages}, error


def _show(args: argparse.Namespace, windows: Any, documents: Any) -> None:
    """Print windows of the run, on stderr where the report is JSON."""
    from nemo_longctx.data.show import show_windows
    from nemo_longctx.data.tokenization import load_tokenizer

    if args.source is not None and args.source not in documents.names:
        raise ConfigError("source", args.source, did_you_mean(args.source, documents.names))
    last = windows.curriculum.total_tokens
    if args.at is not None and not 0 <= args.at < last:
        raise ConfigError("at", args.at, f"the run has {last:,} tokens; name one of them")
    name = args.tokenizer or documents.corpora[0].provenance.get("tokenizer", {}).get("name")
    tokenizer = None
    if name is not None:
        try:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_str(load_tokenizer(name).definition)
        except ConfigError:
            if args.tokenizer is not None:
                raise
            print(f"the tokenizer {name} is not there; name it by --tokenizer to see text", file=sys.stderr)
    stage = windows.curriculum.stage_at_token(args.at or 0)
    first = stage.first_sample + ((args.at or 0) - stage.first_token) // stage.seq_length
    out = sys.stderr if args.json else sys.stdout
    colour = out.isatty() and "NO_COLOR" not in os.environ
    for line in show_windows(windows, tokenizer, first=first, count=args.show, source=args.source, colour=colour):
        print(line, file=out)


def _show_conversations(args: argparse.Namespace) -> int:
    """Print conversations as instruction tuning gets them."""
    from nemo_longctx.data.sft import loss_units
    from nemo_longctx.data.sft_instances import chat_template
    from nemo_longctx.data.show import show_instances
    from nemo_longctx.data.tokenization import check_hub_name

    if len(args.prefixes) > 1 or args.show is None or args.tokenizer is None:
        mend = "a file of conversations; show some by --show N --tokenizer NAME_OR_DIR, or prepare text and name its prefix"
        raise ConfigError("PREFIX", args.prefixes[0], mend)
    of_corpora = ("seq_length", "mix", "curriculum", "total_tokens", "packing", "seed", "source", "document_masking")
    for name in (*of_corpora, "figure", "no_figure", "json"):
        if getattr(args, name):
            raise ConfigError(name, getattr(args, name), "it has no effect on conversations; leave it out")
    if args.show < 1:
        raise ConfigError("show", args.show, "how many conversations to print, at least 1")
    check_hub_name("tokenizer", args.tokenizer)
    from nemo_longctx.hf.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(args.tokenizer)
    template = chat_template(args.chat_template or "tokenizer", tokenizer)
    units = loss_units(args.prompt_loss_weight or 0.0)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    path = args.prefixes[0]
    for line in show_instances(path, tokenizer, template, first=args.at or 0, count=args.show, units=units, colour=colour):
        print(line)
    return 0


def _draw(args: argparse.Namespace, report: dict[str, Any]) -> str:
    """Write the PNG and, beside it, its data as CSV."""
    from nemo_longctx.report.lengths import plot_lengths

    first = report["sources"][0]["path"]
    default = f"{(first if isinstance(first, str) else first[0]).rstrip('/')}.lengths.png"
    rows_by_source = {source["name"]: source["histogram"] for source in report["sources"]}
    columns = ["source", "at_least", "below", "documents", "tokens"]
    beside = Path(args.figure or default).with_suffix(".csv")
    if beside.exists() and not _begins(beside, ",".join(columns)):
        mend = f"its data would be written to {beside}, which is something else; name another picture"
        raise ConfigError("figure", str(args.figure or default), mend)
    path = plot_lengths(rows_by_source, args.figure or default)
    with open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for name, rows in rows_by_source.items():
            writer.writerows({"source": name, **row} for row in rows)
    return str(path)


def _begins(path: Path, text: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(text)) == text.encode()


def percent(share: float) -> str:
    """`12.3%`; what is little is not nothing, and what is nearly all is not all."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def _print(report: dict[str, Any]) -> None:
    for source in report["sources"]:
        length = source["length"]
        empty = f", beside {source['empty_documents']:,} without any" if source.get("empty_documents") else ""
        print(f"{source['name']}: {source['documents']:,} documents, {source['tokens']:,} tokens ({source['dtype']}){empty}")
        kinds = ", ".join(f"{kind} {value:,.0f}" for kind, value in length.items())
        print(f"  length: {kinds}")
        shares = ", ".join(f">= {int(at):,}: {percent(share)}" for at, share in source["share_of_tokens_at_least"].items())
        print(f"  tokens in documents {shares}")
        if "cut" in source:
            print(f"  cut by windows of {source['cut']['seq_length']:,}:")
            for name, packing in (("concatenate_and_chunk", "concatenate and chunk"), ("best_fit", "best fit")):
                cut = source["cut"][name]
                print(f"    {packing}: {percent(cut['documents'])} of documents, with {percent(cut['tokens'])} of the tokens")
    if "plan" in report:
        plan = report["plan"]
        given = plan.get("total_tokens_given", plan["total_tokens"])
        whole = f" (whole windows of the {given:,} given)" if given != plan["total_tokens"] else ""
        padding = f", {plan['padding'] / plan['total_tokens']:.4%} padding" if plan["packing"] == "best_fit" else ""
        print(f"plan: {plan['total_tokens']:,} tokens{whole}, packing {plan['packing']}{padding}")
        width = max(len(row["name"]) for row in plan["strata"])
        print(f"  {'':{width}}  {'documents':>13} {'tokens':>17} {'asked':>9} {'delivered':>10} {'repeats':>9} {'at most':>8}")
        for row in plan["strata"]:
            counts = f"{row['documents']:>13,} {row['tokens']:>17,}"
            shares = f"{row['asked_share']:>9.3%} {row['delivered_share']:>10.3%}"
            print(f"  {row['name']:{width}}  {counts} {shares} {row['repeats_per_document']:>9.3f} {row['most_repeats']:>8}")
        for number, stage in enumerate(plan["stages"]):
            shares = ", ".join(f"{tokens / sum(stage['delivered']):.3%}" for tokens in stage["delivered"])
            print(f"  stage {number} ({stage['tokens']:,} tokens in windows of {stage['seq_length']:,}): {shares}")
    if "figure" in report:
        print(f"figure: {report['figure']}, its data beside it as .csv")
