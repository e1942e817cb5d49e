"""`nemo-longctx curate`: documents worth training on, out of those at hand."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nemo_longctx.commands.prepare import Bar, given, names, size
from nemo_longctx.data.inputs import FORMATS

EPILOG = """\
examples:
  nemo-longctx curate books/ web.jsonl.zst --output data/clean.jsonl --near-duplicates 0.8 --gzip-band 0.2,0.8
  nemo-longctx curate repos/ --assemble repositories --output data/code.jsonl --tokenizer data/bpe --split-lengths 8Ki,64Ki
  nemo-longctx curate posts.jsonl --assemble threads --group thread_id --order created --parent reply_to --output t.jsonl
  nemo-longctx prepare data/clean.jsonl --output data/clean --tokenizer data/bpe

Each document is taken or listed: OUTPUT.rejected.tsv has place, characters, rule and reason of every one that is left out, and
OUTPUT.report.json the counts of each rule. Killed at any moment, the same command goes on. For text that teaches to look back,
give the result to `nemo-longctx synth`.
"""


def _numbers(kind: Any) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    shares = _numbers(float)
    lengths = _numbers(size)
    shares.__name__, lengths.__name__ = "shares", "lengths"
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="what prepare takes: files, directories, or URLs of either")
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="documents that stay, with where they came from")
    parser.add_argument("--keys", type=names, help="texts of a record, joined (default: text)")
    parser.add_argument("--glob", dest="globs", action="append", help="which files of directories; may be repeated")
    parser.add_argument("--format", choices=("auto", *FORMATS), help="of all input (default: by each file's name)")
    parser.add_argument(
        "--assemble",
        choices=("repositories", "chapters", "threads"),
        help="make long documents first: a repository's files in import order, a book's chapters, a thread's posts",
    )
    parser.add_argument("--group", metavar="KEY", help="of a record: what it belongs to (default: repo_name, book, thread)")
    parser.add_argument("--order", metavar="KEY", help="of a record: its place there (default: path, chapter, time)")
    parser.add_argument("--parent", metavar="KEY", help="of a post: the id of the one it answers (default: parent)")
    parser.add_argument("--tokenizer", metavar="NAME_OR_DIR", help="count lengths in its tokens (default: in characters)")
    parser.add_argument("--min-length", type=size, metavar="N", help="shorter documents are left out (default 1)")
    parser.add_argument("--max-length", type=size, metavar="N", help="longer documents are left out (default: none)")
    parser.add_argument(
        "--split-lengths",
        type=lengths,
        metavar="N,...",
        help="a file for each length bucket, say 8Ki,32Ki",
    )
    parser.add_argument(
        "--gzip-band", type=shares, metavar="LOW,HIGH", help="quantiles of compressibility that stay, say 0.2,0.8 (OLMo 3)"
    )
    parser.add_argument(
        "--near-duplicates", type=float, metavar="SHARE", help="Jaccard similarity of two that are one (default 0.8; 0: off)"
    )
    parser.add_argument(
        "--max-repeated-lines", type=float, metavar="SHARE", help="of characters in repeated lines (default 0.3)"
    )
    parser.add_argument("--max-repeated-words", type=float, metavar="SHARE", help="of repeated runs of 10 words (default 0.3)")
    parser.add_argument("--max-boilerplate", type=float, metavar="SHARE", help="of characters near web phrases (default 0.2)")
    parser.add_argument("--languages", type=names, metavar="en,de", help="keep these (needs py3langid)")
    parser.add_argument("--workers", type=int, help="processes, or Ray tasks at a time (default: one a core)")
    parser.add_argument("--engine", help="processes (default) or ray (RAY_ADDRESS names a cluster; shared file system)")
    parser.add_argument("--shard-bytes", type=size, metavar="SIZE", help="input per shard (default: 1/64 of it, 1 to 256 MiB)")
    parser.add_argument("--force", action="store_true", default=None, help="replace an output that other settings made")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Curate, and print the report."""
    from nemo_longctx.data.curation.config import CurateConfig
    from nemo_longctx.data.curation.run import curate

    config = CurateConfig(**given(args, CurateConfig))
    bars = Bar("judging", "characters")
    try:
        made = curate(config, say=bars.say, progress=bars.open)
    finally:
        bars.close()
    if args.json:
        print(json.dumps(made, indent=1))
    else:
        _print(made, config.output)
    return 0


def _print(made: dict[str, Any], output: str) -> None:
    kept = made["kept"]
    length = f", {kept['length']:,} tokens" if made["length_unit"] == "tokens" else ""
    print(f"{made['documents']:,} documents read, {kept['documents']:,} stay: {kept['characters']:,} characters{length}")
    for rule, counts in made["rejected"].items():
        print(f"  {rule:<18}{counts['documents']:>12,} documents{counts['characters']:>17,} characters left out")
    for row in made["lengths"]:
        unit = made["length_unit"]
        print(f"  below {row['below']:>12,} {unit}{row['documents']:>12,} documents{row['characters']:>17,} characters")
    ratios = ", ".join(f"{at}: {value:.3f}" for at, value in made["gzip_ratio_quantiles"].items())
    print(f"  compressed to (quantiles) {ratios}")
    for name in made["files"]:
        print(f"  {name}")
    if made["rejected"]:
        print(f"  each that is left out: {output.removesuffix('.jsonl')}.rejected.tsv")
