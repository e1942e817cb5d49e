"""Peak memory of `prepare` on one document: a fresh process for each size; what it needs above a document of 100 kB.

python benchmarks/prepare_long_document.py --megabytes 5 50 200
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "it",
    "that",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "at",
    "be",
    "this",
    "have",
    "from",
    "or",
    "had",
    "by",
    "hot",
    "but",
    "some",
    "what",
]


def main() -> None:
    """Measure and print a line of JSON a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[5, 50, 200])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure_one(*args.one)
        return
    with tempfile.TemporaryDirectory() as directory:
        tokenizer(Path(directory))
        start = 0.0
        for size in [0.1, *args.megabytes]:
            path = Path(directory, "one.jsonl")
            write_document(path, int(size * 1e6))
            command = [sys.executable, __file__, "--one", directory, str(path)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            start = start or found["peak_mib"]
            print(json.dumps({"document_mb": size, **found, "above_start_mib": round(found["peak_mib"] - start)}), flush=True)


def tokenizer(directory: Path) -> None:
    """A byte-level BPE with GPT-2's split."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eod>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    made.save(str(directory / "tokenizer.json"))


def write_document(path: Path, size: int) -> None:
    """One line of JSONL of about `size` bytes."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"text": "')
        for _ in range(max(1, size // 100_000)):
            file.write(json.dumps(" ".join(rng.choices(WORDS, k=25_000))[:100_000])[1:-1])
        file.write('"}\n')


def measure_one(directory: str, path: str) -> None:
    """The shard's function as a worker runs it; peak memory and time of this process."""
    from nemo_longctx.data.readers import split_file
    from nemo_longctx.data.shards import ShardJob, tokenize_shard

    for name in ("train", "holdout", "reports"):
        Path(directory, name).mkdir(exist_ok=True)
    job = ShardJob(
        number=0,
        parts=tuple(split_file(path, "jsonl", 1 << 40)),
        directory=directory,
        keys=("text",),
        bos_id=None,
        eod_id=0,
        dtype="uint16",
        skip_bad=False,
        replace=False,
        holdout=0.0,
        seed=1,
    )
    begin = time.perf_counter()
    report = tokenize_shard(job, lambda *steps: None)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": round(peak), "seconds": round(seconds, 1), "tokens": report.tokens["train"]}))


if __name__ == "__main__":
    main()
