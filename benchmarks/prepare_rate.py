"""How fast `prepare` tokenizes beside `tokenizers` itself: a worker's whole shard, and the bare call on the same texts.

Fresh processes in turn, one core each. `ours` reads JSON lines, encodes, and writes `.bin/.idx` with its sync to the disk;
`encode_batch_fast` gets the texts as strings in memory, all at once or in batches as large as ours, and its tokens are thrown
away. datatrove, where it is installed, reads and writes as ours does. CPU seconds decide, so that a busy machine spoils less.

    python benchmarks/prepare_rate.py books.jsonl speeches.jsonl      # or, without files, a synthetic corpus of 16 MB
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import tempfile
import time
from pathlib import Path

import measure

VOCABULARY = 8192
BATCH = 1 << 19  # characters


def synthetic(path: Path, size: int) -> str:
    """Words of a Zipf-like vocabulary in documents of 100 to 50,000 characters."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            text = " ".join(rng.choices(words, weights, k=int(10 ** rng.uniform(1.3, 4))))
            file.write(json.dumps({"text": text + "."}) + "\n")
    return str(path)


def train(paths: list[str], folder: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts_of(paths), trainer)
    made.save(f"{folder}/tokenizer.json")


def texts_of(paths: list[str]) -> list[str]:
    return [json.loads(line)["text"] for path in paths for line in Path(path).read_text("utf-8").splitlines()]


def one(kind: str, paths: list[str], folder: str) -> dict:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    makers = {"prepare": ours, "datatrove": datatrove}
    run = makers[kind](paths, folder) if kind in makers else theirs(paths, folder, kind == "encode_batch_fast in batches")
    begin, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - begin
    return {"seconds": seconds, "cpu_seconds": cpu, "tokens": float(tokens), "tokens_per_cpu_second": tokens / cpu}


def ours(paths: list[str], folder: str):
    from nemo_longctx.data.readers import split_file
    from nemo_longctx.data.shards import ShardJob, tokenize_shard
    from nemo_longctx.data.tokenization import encoder

    work = tempfile.mkdtemp(dir=folder)
    for name in ("train", "holdout", "reports"):
        Path(work, name).mkdir()
    os.symlink(f"{folder}/tokenizer.json", f"{work}/tokenizer.json")
    fixed = {"keys": ("text",), "bos_id": None, "eod_id": None, "skip_bad": False, "replace": False, "holdout": 0.0, "seed": 1}
    parts = tuple(part for path in paths for part in split_file(path, "jsonl", 1 << 40))
    job = ShardJob(number=0, parts=parts, directory=work, dtype="uint16", **fixed)
    encoder(f"{work}/tokenizer.json")  # loaded before, as theirs is
    return lambda: tokenize_shard(job, lambda *steps: None).tokens["train"]


def theirs(paths: list[str], folder: str, in_batches: bool):
    from tokenizers import Tokenizer

    tokenizer, texts = Tokenizer.from_file(f"{folder}/tokenizer.json"), texts_of(paths)
    batches: list[list[str]] = [[]]
    for text in texts:
        if in_batches and sum(map(len, batches[-1])) + len(text) > BATCH:
            batches.append([])
        batches[-1].append(text)

    def run() -> int:
        return sum(len(each) for batch in batches for each in tokenizer.encode_batch_fast(batch, add_special_tokens=False))

    return run


def datatrove(paths: list[str], folder: str):
    """Its own reader and writer of tokens, without its shuffle."""
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    work = tempfile.mkdtemp(dir=folder)
    writer = DocumentTokenizer(work, f"{folder}/tokenizer.json", shuffle_documents=False, save_filename="out")

    def run() -> int:
        for path in paths:
            reader = JsonlReader(os.path.dirname(path), glob_pattern=os.path.basename(path))
            writer.run(reader.run())
        return writer.stats.stats["tokens"].total

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("inputs", nargs="*", help="JSON lines with the key `text`")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.one:
        measure.report_one(one(**args.one))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.abspath(path) for path in args.inputs] or [synthetic(Path(folder, "a.jsonl"), 16_000_000)]
        train(paths, folder)
        kinds = ["prepare", "encode_batch_fast", "encode_batch_fast in batches"]
        if importlib.util.find_spec("datatrove") is not None:
            kinds.append("datatrove")
        cases = [{"kind": kind, "paths": paths, "folder": folder} for kind in kinds]
        results = measure.in_turn(__file__, cases, args.rounds, environment={})  # memory as users' allocators keep it
    rates = {result["kind"]: result["tokens_per_cpu_second"] for result in results}
    for kind, rate in rates.items():
        print(f"  {kind:<30}{rate:14,.0f} tokens a CPU second")
    ratios = {kind: rates["prepare"] / rates[kind] for kind in kinds[1:]}
    print("  " + ", ".join(f"{ratio:.3f} x {kind}" for kind, ratio in ratios.items()))
    if args.json:
        Path(args.json).write_text(json.dumps({"results": results, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
