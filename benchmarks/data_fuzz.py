"""`prepare` on files that were mutilated: no traceback, and every record taken or counted.

A good file of each kind (JSON lines, arrays, CSV, Parquet, Arrow, plain or compressed; tokenizer.json) gets bytes flipped, cut
out, doubled or put in, and is prepared with bad records left out. What must hold: the run ends with a report or one sentence,
and what the report counts is what the reader gave; of plain JSON lines, the lines that are not blank.

    python benchmarks/data_fuzz.py --files 5000
"""

from __future__ import annotations

import argparse
import bz2
import collections
import gzip
import json
import lzma
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def good_files(folder: Path) -> dict[str, bytes]:
    """Name -> contents."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    rows = [{"text": f'Document {n}, «älter» als \N{SNOWMAN} and \\ "quoted"\n' * (1 + n % 4), "n": n} for n in range(24)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "good.parquet", row_group_size=7)
    with pa.ipc.new_stream(folder / "good.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    lines = "".join(json.dumps(row, ensure_ascii=bool(row["n"] % 2)) + "\n" for row in rows).encode()
    quoted = ['"' + row["text"].replace('"', '""') + f'",{row["n"]}' for row in rows]
    plain = {
        "jsonl": lines,
        "json": json.dumps(rows, indent=1).encode(),
        "csv": ("text,n\n" + "\n".join(quoted) + "\n").encode(),
        "txt": "".join(row["text"] for row in rows).encode(),
    }
    packings = PACKINGS | {".zst": zstandard.ZstdCompressor().compress}
    files = {f"a.{kind}{suffix}": pack(text) for kind, text in plain.items() for suffix, pack in packings.items()}
    return files | {f"a.{kind}": (folder / f"good.{kind}").read_bytes() for kind in ("parquet", "arrow")}


def mutilated(rng: random.Random, data: bytes) -> bytes:
    """One to four wounds."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        size = min(len(data) - at, int(rng.expovariate(1 / 20)) + 1)
        some = rng.choice([rng.randbytes(size), b"\0" * size, b'"', b"\n", b"\\ud800", b"\xff", b"{", b"]", b"\xef\xbb\xbf"])
        data = rng.choice(
            [
                data[:at],
                data[:at] + data[at + size :],
                data[:at] + some + data[at + size :],
                data[:at] + some + data[at:],
                data[:at] + data[at : at + size] * 2 + data[at + size :],
            ]
        )
    return data


def tokenizer(folder: Path) -> bytes:
    """A byte-level BPE of 300 tokens, saved there; its tokenizer.json."""
    from nemo_longctx.data.tokenization import train_bpe

    train_bpe(["the old dog runs over long hills and the old dog sleeps " * 40], 270, str(folder), {})
    return (folder / "tokenizer.json").read_bytes()


def in_this_process(jobs, progress, *, workers):
    return ((job, job.run(progress)) for job in jobs)


def check(files: int, seed: int, folder: Path) -> collections.Counter:
    """What became of so many files: outcome -> count.

    Raises:
        AssertionError: counts that do not add up. Any other exception is a traceback that a user would have seen.
    """
    from nemo_longctx.data.engines import ENGINES

    ENGINES["processes"] = in_this_process
    rng, outcomes = random.Random(seed), collections.Counter()
    definition = tokenizer(folder / "tok")
    good = good_files(folder)
    for number in range(files):
        kind = rng.choice([*good, "tokenizer.json"])
        work = folder / "run"
        work.mkdir()
        try:
            if kind == "tokenizer.json":
                shutil.copytree(folder / "tok", work / "tok")
                (work / "tok" / kind).write_bytes(mutilated(rng, definition))
                (work / "a.jsonl").write_bytes(good["a.jsonl"])
                outcome = prepared(work, work / "a.jsonl", work / "tok")
            else:
                (work / kind).write_bytes(mutilated(rng, good[kind]))
                outcome = prepared(work, work / kind, folder / "tok")
        except Exception as error:
            error.add_note(f"file {number} of seed {seed}: {kind}")
            raise
        outcomes[f"{kind.split('.', 1)[1]}: {outcome}"] += 1
        shutil.rmtree(work)
    return outcomes


def prepared(work: Path, path: Path, tokenizer: Path) -> str:
    from nemo_longctx.config import ConfigError
    from nemo_longctx.data.prepare import PrepareConfig, prepare
    from nemo_longctx.data.readers import read_part, split_files

    config = PrepareConfig(inputs=(str(path),), output=str(work / "c"), tokenizer=str(tokenizer), on_error="skip")
    try:
        made = prepare(config, say=lambda line: None, progress=lambda n_bytes: lambda *steps: None)
    except ConfigError as error:
        if "\n" in str(error).strip():
            raise ValueError(f"more than a sentence: {error}") from error
        return "refused"
    given = sum(1 for shard in split_files([str(path)], "auto", None) for part in shard for _ in read_part(part, ("text",)))
    counted = made["documents"]["train"] + made["bad_records"] + made["empty_records"]
    assert counted == given, f"{counted} of {given}"
    listed = work / "c.rejected.tsv"
    rejected = listed.read_text("utf-8").count("\n") if listed.exists() else 0
    assert rejected == made["bad_records"] + made["empty_records"], rejected
    if path.name == "a.jsonl":
        lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        assert counted == lines, f"{counted} of {lines} lines"
    return "whole" if not rejected else "some left out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = check(args.files, args.seed, Path(folder))
    for outcome, count in sorted(outcomes.items()):
        print(f"  {outcome:<32}{count:>7,}")
    print(f"{args.files:,} files, no traceback, all records counted, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
