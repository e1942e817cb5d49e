"""`nemo-longctx compare`: a page for blind side-by-side voting, and the table from its votes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from nemo_longctx.config import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Two files, and either a page to write or votes to count."""
    parser.add_argument("a", metavar="A.jsonl", type=Path, help='one model\'s answers: {"id", "prompt", "response"} a line')
    parser.add_argument("b", metavar="B.jsonl", type=Path, help="the other model's answers to the same examples")
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--output", type=Path, metavar="PAGE.html", help="write the page to vote on")
    job.add_argument("--votes", type=Path, nargs="+", metavar="VOTES.jsonl", help="count the votes that raters saved")
    parser.add_argument(
        "--table", type=Path, metavar="TABLE.json", help="with --votes: write the table here, and its picture as .png beside it"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the order and the sides; the same for page and votes (1234)")


def run(args: argparse.Namespace) -> int:
    """Write the page, or print the table."""
    from nemo_longctx.instruct import compare

    if args.table is not None and args.votes is None:
        raise ConfigError("--table", str(args.table), "has no effect without --votes; a page has no table yet")
    if args.table is not None and args.table.suffix == ".png":
        raise ConfigError("--table", str(args.table), "would be overwritten by its own picture; name it TABLE.json")
    for option, written in (("--output", args.output), ("--table", args.table)):
        if written is None:
            continue
        if written.is_dir():
            raise ConfigError(option, str(written), "is a folder; name a file in it")
        if written.exists() and any(each.exists() and written.samefile(each) for each in (args.a, args.b, *(args.votes or ()))):
            raise ConfigError(option, str(written), "is read, and would be replaced; name another file")
    a, b = compare.labels(args.a, args.b)
    comparison = compare.compare_files(args.a, args.b, seed=args.seed)
    for name, path in ((a, args.a), (b, args.b)):
        if cut := compare.cut_short(path):
            print(f"{name}: {cut:,} of {len(comparison.pairs):,} answers were cut at their longest length", file=sys.stderr)
    if args.output is not None:
        args.output.write_text(compare.page_html(comparison), encoding="utf-8")
        print(f"wrote {args.output}: {len(comparison.pairs)} examples. Open it in a browser; each rater saves a file of votes.")
        return 0
    table = compare.tabulate(compare.read_votes(comparison, args.votes), pairs=len(comparison.pairs))
    print(compare.table_text(table, a=a, b=b))
    if args.table is not None:
        from nemo_longctx.report.plots import plot_votes

        args.table.write_text(json.dumps(dataclasses.asdict(table), indent=2) + "\n", encoding="utf-8")
        names = compare.outcome_names(a=a, b=b)
        rows = {names[outcome]: (share.share, share.low, share.high) for outcome, share in table.shares.items()}
        title = f"{a} against {b}: {table.votes:,} votes on {compare.voted_on(table)}"
        plot_votes(rows, args.table.with_suffix(".png"), title=title)
    return 0
