"""Seconds and peak memory of scoring long prompts: ours against lm-eval's Hugging Face backend, same weights, same CPU.

`prefixes`: multiple choice over long documents, 4 options x 5 questions a document. Each measurement is a fresh process; the
two backends take turns. Memory is the rise of the peak above the process with its model loaded and warmed on a short request.

`long`: one log-likelihood of 32k tokens with a vocabulary of 128k, scored at every position (ours only: lm-eval's backend
would hold 32k x 128k logits, 16.8 GB in float32, twice). Here memory is the peak of the whole process.

    python benchmarks/eval_scoring.py prefixes --runs 3 --json out.json
    python benchmarks/eval_scoring.py long
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

BACKENDS = ("lm-eval hf", "nemo-longctx")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(backend: str, options: dict):
    """The backend over a seeded random Llama, with a tokenizer it never needs for tokens that are given as ids."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options["vocab"],
        hidden_size=options["hidden"],
        intermediate_size=options["hidden"] * 3,
        num_hidden_layers=options["layers"],
        num_attention_heads=options["hidden"] // 64,
        num_key_value_heads=options["hidden"] // 64,
        max_position_embeddings=65536,
    )
    model = LlamaForCausalLM(config).eval()
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if backend == "lm-eval hf":
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    from nemo_longctx.adapters.lm_eval import LongContextLM
    from nemo_longctx.eval.hf import HFCausalModel

    return LongContextLM(HFCausalModel(model), tokenizer=tokenizer)


def score(lm, requests):
    """Log-likelihoods of token lists by lm-eval's own entry to both backends."""
    from lm_eval.api.instance import Instance

    texts = [((str(i), ""), context, continuation) for i, (context, continuation) in enumerate(requests)]
    lm._instances = [Instance(request_type="loglikelihood", doc={}, arguments=t[0], idx=i) for i, t in enumerate(texts)]
    return lm._loglikelihood_tokens(texts, disable_tqdm=True)


def measure(options: dict) -> dict:
    """One backend in this process."""
    import numpy as np

    rng = np.random.default_rng(0)
    lm = build(options["backend"], options)

    def ids(n: int) -> list[int]:
        return rng.integers(2, options["vocab"], n).tolist()

    if options["case"] == "long":
        start = time.perf_counter()
        scores = score(lm, [(ids(1), ids(options["length"]))])
        return {"seconds": time.perf_counter() - start, "mib": peak_mib(), "scores": [s for s, _ in scores]}
    requests = []
    for _ in range(options["documents"]):
        document = ids(options["length"])
        for _ in range(options["questions"]):
            context = document + ids(30)
            requests += [(context, ids(6)) for _ in range(options["options"])]
    score(lm, [(ids(64), ids(4))])
    before, start = peak_mib(), time.perf_counter()
    scores = score(lm, requests)
    return {"seconds": time.perf_counter() - start, "mib": peak_mib() - before, "scores": [s for s, _ in scores]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("prefixes", "long"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--options", type=int, default=4)
    parser.add_argument("--length", type=int, help="tokens (default: 8192 for prefixes, 32768 for long)")
    parser.add_argument("--vocab", type=int, help="(default: 32000 for prefixes, 131072 for long)")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the data here")
    parser.add_argument("--backend", choices=BACKENDS, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    long = options["case"] == "long"
    options["length"] = options["length"] or (32768 if long else 8192)
    options["vocab"] = options["vocab"] or (131072 if long else 32000)
    if options["backend"]:
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict]] = {name: [] for name in BACKENDS[long:]}
    for _ in range(options["runs"]):
        for name in results:
            line = [sys.executable, os.path.abspath(__file__), options["case"], "--backend", name]
            for key in ("documents", "questions", "options", "length", "vocab", "hidden", "layers", "threads"):
                line += [f"--{key}", str(options[key])]
            env = os.environ | {"OMP_NUM_THREADS": str(options["threads"])}
            out = subprocess.run(line, check=True, capture_output=True, text=True, env=env).stdout
            results[name].append(json.loads(out.splitlines()[-1]))
            print(f"{name:<14}{results[name][-1]['seconds']:>9.2f} s {results[name][-1]['mib']:>9.0f} MiB", flush=True)
    medians = {n: {k: statistics.median(r[k] for r in runs) for k in ("seconds", "mib")} for n, runs in results.items()}
    for name, median in medians.items():
        print(f"median {name:<14}{median['seconds']:>9.2f} s {median['mib']:>9.0f} MiB")
    if not long:
        theirs, ours = (medians[name] for name in BACKENDS)
        gap = max(abs(a - b) for a, b in zip(*(results[name][0]["scores"] for name in BACKENDS), strict=True))
        print(f"{theirs['seconds'] / ours['seconds']:.1f} x fewer seconds, memory 1/{theirs['mib'] / ours['mib']:.1f}")
        print(f"largest difference of a log-likelihood: {gap:.1e}")
    if options["json"]:
        versions = {name: version(name) for name in ("torch", "transformers", "lm-eval")}
        record = {
            "options": options,
            "results": results,
            "medians": medians,
            "versions": versions,
            "machine": platform.platform(),
        }
        with open(options["json"], "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
