"""Seconds and peak memory of scoring long prompts: ours against lm-eval's Hugging Face backend, same weights, same CPU.

`prefixes`: multiple choice over long documents, 4 options x 5 questions a document. Each measurement is a fresh process; the
two backends take turns. Memory is the rise of the peak above the process with its model loaded and warmed on a short request.

`long`: one log-likelihood of 32k tokens with a vocabulary of 128k, scored at every position (ours only: lm-eval's backend
would hold 32k x 128k logits, 16.8 GB in float32, twice). Here memory is the peak of the whole process.

`ruler`: a RULER length from weights to scores, by lm-eval's own tasks that need no download on its Hugging Face backend, by the
same tasks and samples on our model (whose replies have to be equal), and by our own probes of these kinds. lm-eval makes 500
samples of a task and then takes as many as asked; ours makes those that are asked.

    python benchmarks/eval_scoring.py prefixes --runs 3 --json out.json
    python benchmarks/eval_scoring.py ruler --length 4096 --samples 8
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
RULER_BACKENDS = ("lm-eval hf", "lm-eval ours", "our probes")
# lm-eval's name -> ours, of RULER's tasks that make their data from nothing.
RULER_TASKS = {
    "niah_single_1": "niah_single_1", "niah_multikey_2": "niah_multikey_2", "niah_multikey_3": "niah_multikey_3",
    "ruler_vt": "vt", "ruler_cwe": "cwe", "ruler_fwe": "fwe",
}  # fmt: skip
OPTIONS = ("documents", "questions", "options", "length", "vocab", "hidden", "layers", "threads", "samples")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def text_tokenizer(vocab: int):
    """A byte-level BPE tokenizer of English words and numbers, as RULER's prompts have them."""
    import random

    from lm_eval.tasks.ruler.cwe_utils import WORDS
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    words = rng.choices(WORDS, k=16 * vocab)
    noise = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. One of the special magic "
    )
    texts = [noise + "numbers for is: VAR Question Answer " + " ".join(words[n : n + 50]) for n in range(0, len(words), 50)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def build(backend: str, options: dict, tokenizer=None):
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
    if tokenizer is None:
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


def measure_ruler(options: dict) -> dict:
    """A RULER length on one backend: seconds from the model in memory to the scores, of which `making` went to the samples."""
    import random
    import tempfile

    import lm_eval
    import numpy as np

    from nemo_longctx.adapters.harness import check_names, load_tasks
    from nemo_longctx.eval.config import HarnessTask, ProbeTask
    from nemo_longctx.eval.probes import ProbeConfig
    from nemo_longctx.eval.suite import Suite

    tokenizer = text_tokenizer(options["vocab"])
    backend = "lm-eval hf" if options["backend"] == "lm-eval hf" else "nemo-longctx"
    lm = build(backend, options, tokenizer)
    task = HarnessTask(
        tasks=tuple(RULER_TASKS),
        include_defaults=True,
        metadata={"max_seq_lengths": [options["length"]]},
        limit=options["samples"],
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        before = peak_mib()
        if options["backend"] == "our probes":
            asked = ProbeConfig(
                kinds=tuple(f"ruler_{name}" for name in RULER_TASKS.values()),
                lengths=(options["length"],),
                samples=options["samples"],
            )
            text = os.path.join(folder, "text.txt")
            with open(text, "w", encoding="utf-8") as file:
                file.write("No task of these hides anything in it. ")
            start = time.perf_counter()
            result = Suite([ProbeTask(text=text, probes=asked)], tokenizer=tokenizer).run(lm.causal, name="tiny", quiet=True)
            if result.errors or any(not row.samples for row in result.probes):
                raise SystemExit(f"not scored: {result.errors or result.probes}")
            return {"seconds": time.perf_counter() - start, "making": 0.0, "mib": peak_mib() - before, "scores": []}
        check_names(task)  # lm-eval's index of tasks is made before, of which neither side is asked
        random.seed(0)  # lm-eval draws some tasks' samples from here: both backends get the same
        np.random.seed(0)
        start = time.perf_counter()
        loaded = load_tasks(task, tokenizer=folder)
        making = time.perf_counter() - start
        out = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=options["samples"], bootstrap_iters=0, log_samples=True)
        replies = [sample["resps"][0][0] for name in RULER_TASKS for sample in out["samples"][name]]
    return {"seconds": time.perf_counter() - start, "making": making, "mib": peak_mib() - before, "scores": replies}


def measure(options: dict) -> dict:
    """One backend in this process."""
    if options["case"] == "ruler":
        return measure_ruler(options)
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
    parser.add_argument("case", choices=("prefixes", "long", "ruler"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--options", type=int, default=4)
    parser.add_argument("--length", type=int, help="tokens (default: 8192 for prefixes, 32768 for long, 4096 for ruler)")
    parser.add_argument("--vocab", type=int, help="(default: 32000 for prefixes, 131072 for long, 4096 for ruler)")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8, help="of each task of RULER (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the data here")
    parser.add_argument("--backend", choices=(*BACKENDS, *RULER_BACKENDS[1:]), help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    long = options["case"] == "long"
    ruler = options["case"] == "ruler"
    options["length"] = options["length"] or (32768 if long else 4096 if ruler else 8192)
    options["vocab"] = options["vocab"] or (131072 if long else 4096 if ruler else 32000)
    if options["backend"]:
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict]] = {name: [] for name in (RULER_BACKENDS if ruler else BACKENDS[long:])}
    for _ in range(options["runs"]):
        for name in results:
            line = [sys.executable, os.path.abspath(__file__), options["case"], "--backend", name]
            for key in OPTIONS:
                line += [f"--{key}", str(options[key])]
            env = os.environ | {"OMP_NUM_THREADS": str(options["threads"]), "PYTHONHASHSEED": "0"}
            out = subprocess.run(line, check=True, capture_output=True, text=True, env=env).stdout
            results[name].append(json.loads(out.splitlines()[-1]))
            print(f"{name:<14}{results[name][-1]['seconds']:>9.2f} s {results[name][-1]['mib']:>9.0f} MiB", flush=True)
    medians = {n: {k: statistics.median(r[k] for r in runs) for k in ("seconds", "mib")} for n, runs in results.items()}
    for name, median in medians.items():
        print(f"median {name:<14}{median['seconds']:>9.2f} s {median['mib']:>9.0f} MiB")
    if ruler:
        same = sum(a == b for a, b in zip(*(results[name][0]["scores"] for name in RULER_BACKENDS[:2]), strict=True))
        theirs = medians["lm-eval hf"]["seconds"]
        for name in RULER_BACKENDS[1:]:
            print(f"{name}: {theirs / medians[name]['seconds']:.1f} x fewer seconds")
        makings = [statistics.median(run["making"] for run in results[name]) for name in RULER_BACKENDS[:2]]
        scoring = (theirs - makings[0]) / (medians["lm-eval ours"]["seconds"] - makings[1])
        print(f"of theirs {makings[0]:.2f} s made the samples; scoring the same samples takes {scoring:.1f} x fewer seconds")
        print(f"equal replies: {same} of {len(results['lm-eval hf'][0]['scores'])}")
    elif not long:
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
