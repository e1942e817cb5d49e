"""`nemo-longctx prepare`: text -> Megatron's `.bin/.idx`."""

from __future__ import annotations

import argparse
import csv
import json
import re
from dataclasses import fields
from typing import Any

from nemo_longctx.config import size_of_text
from nemo_longctx.data.inputs import FORMATS

EPILOG = """\
examples:
  nemo-longctx prepare books.jsonl.zst papers/ --output data/long --tokenizer meta-llama/Llama-2-7b-hf
  nemo-longctx prepare src/ --glob '*.py' --glob '*.md' --output data/code --tokenizer data/bpe --train-tokenizer 8192 \\
      --holdout 0.02 --on-error skip

Killed at any moment, the same command goes on and ends with the same bytes. PREFIX.json says how the corpus was made;
PREFIX.rejected.tsv lists every record left out, with its file, line and reason. A special token spelled in a text is text.
Read are JSONL, .json arrays, CSV, Parquet, Arrow and text, plain or in .gz, .zst, .bz2, .xz; of a directory, the files of
records, or else its texts; what is passed over is told. s3://, gs://, hf://datasets/... and the like are read through fsspec.
"""


def size(text: str) -> int:
    """`16M` -> 16,000,000; K, M, G, T are powers of 1,000, Ki, Mi, Gi, Ti of 1,024."""
    value = size_of_text(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 1000000, 16M or 64MiB")
    return value


def tokens(text: str) -> int:
    """As `size`; a negative number is left to the command, which says what it must be."""
    return int(text) if re.fullmatch(r"-\d+", text) else size(text)


def names(text: str) -> tuple[str, ...]:
    """`title?,meta.text` -> its parts; one that holds a comma stands in double quotes."""
    return tuple(next(csv.reader([text]), ()))


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files of records or text, directories of them, or URLs of either"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokenizer", required=True, metavar="NAME_OR_DIR", help="Hugging Face name or directory")
    parser.add_argument(
        "--train-tokenizer", type=int, metavar="VOCAB", help="train a byte-level BPE on the input, save it there"
    )
    parser.add_argument("--train-tokenizer-bytes", type=size, metavar="SIZE", help="text to train it on (default 16MiB)")
    parser.add_argument(
        "--keys", type=names, help="texts of a record, joined (default: text); a.b is b within a, title? may be missing"
    )
    parser.add_argument(
        "--glob", dest="globs", action="append", help="which files of directories, e.g. '*.txt'; may be repeated"
    )
    parser.add_argument("--format", choices=("auto", *FORMATS), help="of all input (default: by each file's name)")
    parser.add_argument(
        "--bos", action="store_true", default=None, help="begin documents with the tokenizer's bos_token, as the Llama family's"
    )
    parser.add_argument("--append-eod", action=argparse.BooleanOptionalAction, help="end documents with a token (default: yes)")
    parser.add_argument("--eod-token", metavar="TOKEN", help="which one (default: the tokenizer's eos_token)")
    parser.add_argument("--on-error", choices=("fail", "skip"), help="at a bad record (default: fail)")
    parser.add_argument(
        "--replace-invalid",
        action="store_true",
        default=None,
        help="U+FFFD for what is no Unicode text, rather than a bad record",
    )
    parser.add_argument("--holdout", type=float, metavar="SHARE", help="share of documents for PREFIX_holdout (default 0)")
    parser.add_argument("--max-input-bytes", type=size, metavar="SIZE", help="a random choice of whole files, up to this size")
    parser.add_argument(
        "--max-file-bytes", type=size, metavar="SIZE", help="pass over larger files, so that none is a large part"
    )
    parser.add_argument("--seed", type=int, help="of the holdout and that choice (default 1234)")
    parser.add_argument("--workers", type=int, help="processes, or Ray tasks at a time (default: one a core)")
    parser.add_argument("--engine", help="processes (default) or ray (RAY_ADDRESS names a cluster; shared file system)")
    parser.add_argument(
        "--keep-shards", action="store_true", default=None, help="leave a directory PREFIX/ of shards, unmerged"
    )
    parser.add_argument("--shard-bytes", type=size, metavar="SIZE", help="input per shard (default: 1/64 of it, 1 to 256 MiB)")
    parser.add_argument("--force", action="store_true", default=None, help="replace a corpus that other settings made")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """What the command line says of the fields of a dataclass; lists as tuples."""
    values = {field.name: getattr(args, field.name) for field in fields(config)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if value is not None}


def run(args: argparse.Namespace) -> int:
    """Prepare, and print the report."""
    from nemo_longctx.data.prepare import PrepareConfig, prepare

    config = PrepareConfig(**given(args, PrepareConfig))
    bars = Bar()
    try:
        made = prepare(config, say=bars.say, progress=bars.open)
    finally:
        bars.close()
    if args.json:
        print(json.dumps(made, indent=1))
    else:
        _print_report(config.output, made)
    return 0


class Bar:
    """Progress over input bytes that also shows documents and tokens (or what `unit` says) per second."""

    def __init__(self, what: str = "tokenizing", unit: str = "tokens") -> None:
        self._what, self._unit = what, unit
        self._bar: Any = None
        self._documents = self._tokens = 0

    def open(self, n_bytes: int) -> Any:
        from nemo_longctx.bars import ProgressBar

        self.close()
        self._documents = self._tokens = 0
        self._bar = ProgressBar(total=n_bytes, unit="B", unit_scale=True, desc=self._what)
        return self._step

    def _step(self, n_bytes: int, documents: int, tokens: int) -> None:
        self._documents += documents
        self._tokens += tokens
        rate = self._tokens / max(self._bar.elapsed, 1e-9)
        self._bar.note(f"{self._documents:,} docs, {rate:,.0f} {self._unit}/s")
        self._bar.update(n_bytes)

    def say(self, line: str) -> None:
        """A line on stderr, above the bar."""
        from nemo_longctx.bars import say

        say(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _print_report(output: str, made: dict[str, Any]) -> None:
    for split, name in (("train", output), ("holdout", f"{output}_holdout")):
        if made["documents"][split]:
            print(f"{name}: {made['documents'][split]:,} documents, {made['tokens'][split]:,} tokens ({made['dtype']})")
    if "held_out_from_end" in made:
        share = f"the last {made['held_out_from_end']:,} tokens are held out"
        print(f"no document fell to the holdout by its share, there are too few: {share}")
    rejected = made["bad_records"] + made["empty_records"]
    if rejected:
        where = f"{output}.rejected.tsv"
        print(f"left out: {made['bad_records']:,} bad and {made['empty_records']:,} empty records, listed in {where}")
        with open(where, encoding="utf-8") as file:
            for line, _ in zip(file, range(5), strict=False):
                path, number, reason = line.rstrip("\n").split("\t", 2)
                print(f"  {path}:{number}: {reason}")
        if rejected > 5:
            print(f"  ... and {rejected - 5:,} more")
