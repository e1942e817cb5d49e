"""Loss on long prompts against none (Xiong et al. 2023, Table 9): a tiny Llama, synthetic facts, reported as it comes out.

    python benchmarks/sft_prompt_loss.py [--output docs/prompt_loss]

A document is a list of facts, `field value`, each told several times in random order among noise, in a vocabulary that means
nothing outside it; the question names a field, the answer is its value. A Llama first reads short documents until it looks
values up, then is tuned on documents four times as long, three quarters of them noise, with loss on the answers alone and with
loss on the long prompt too: same base, same instances, same steps, three seeds. A prompt holds sixteen values that can be
looked up, an answer one. The sizes were chosen by the base alone: some ten others had not learnt to look up; the two ways were
then compared once. Either ends at all answers right, so only the steps until then can differ. Each finished part is kept beside
the output: the same command goes on where it was stopped. Two processes of one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SEEDS, WEIGHTS = (1, 2, 3), (0, 1)
ENOUGH = 0.9  # answers right: the steps until then are reported
FIELDS, VALUES, NOISE = 8, 8, 16
ASK, END, PAD = range(FIELDS + VALUES + NOISE, FIELDS + VALUES + NOISE + 3)
VOCABULARY = FIELDS + VALUES + NOISE + 3
SETTINGS = {
    # One head of 64 learns to look up in some hundred steps; four of 16 take several times as many.
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1, "rope_theta": 10_000.0,
    "initializer_range": 0.12, "short_slots": 24, "long_slots": 96, "short_noise": 6, "long_noise": 72,
    "base_batch": 64, "base_steps": 800, "base_lr": 2e-3, "tune_batch": 16, "tune_steps": 240, "tune_lr": 5e-4,
    "warmup_steps": 50, "evaluate_every": 20, "held_out": 1024,
}  # fmt: skip


def document(draw: np.random.Generator, *, facts: int, long: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, fields, values): `facts` facts, each told about as often, in random order among noise; two tokens a slot."""
    slots, noise = (SETTINGS[f"{'long' if long else 'short'}_{name}"] for name in ("slots", "noise"))
    fields, values = draw.permutation(FIELDS)[:facts], FIELDS + draw.integers(0, VALUES, facts)
    told = np.arange(slots - noise) % facts
    pairs = np.concatenate(
        [np.stack([fields[told], values[told]], axis=1), FIELDS + VALUES + draw.integers(0, NOISE, (noise, 2))]
    )
    return draw.permutation(pairs).reshape(-1), fields, values


def instance(draw: np.random.Generator, *, long: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, roles): document, question, answer, end."""
    from nemo_longctx.data.sft_instances import ANSWER, PROMPT

    tokens, fields, values = document(draw, facts=FIELDS if long else int(draw.integers(1, FIELDS + 1)), long=long)
    asked = draw.integers(len(fields))
    ids = np.concatenate([tokens, [ASK, fields[asked], values[asked], END]])
    return ids, np.where(np.arange(len(ids)) >= len(ids) - 2, ANSWER, PROMPT).astype(np.uint8)


def batches(seed: list[int], *, long: bool, prompt_loss_weight: float) -> Iterator[dict[str, Any]]:
    """Without end: windows of one instance each."""
    import torch

    from nemo_longctx.data.sft import loss_units, window

    draw = np.random.default_rng(seed)
    while True:
        members = [instance(draw, long=long) for _ in range(SETTINGS["tune_batch" if long else "base_batch"])]
        units = loss_units(prompt_loss_weight)
        made = [window([one], seq_length=len(one[0]) - 1, pad_id=PAD, units=units) for one in members]
        yield {key: torch.from_numpy(np.stack([sample[key] for sample in made])) for key in ("tokens", "labels", "loss_mask")}


def train(model: Any, source: Iterator[dict[str, Any]], *, steps: int, lr: float) -> Iterator[int]:
    """Updates on the weighted mean of the labels' losses; yields the number of steps done."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    warm = SETTINGS["warmup_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    for done in range(1, steps + 1):
        fields = next(source)
        logits = model(fields["tokens"]).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), fields["labels"].flatten(), reduction="none")
        weights = fields["loss_mask"].flatten()
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield done


def accuracy(model: Any, *, long: bool) -> float:
    """The share of held-out questions whose likeliest next token is the right value."""
    import torch

    draw = np.random.default_rng(10_000)
    ids = torch.from_numpy(np.stack([instance(draw, long=long)[0] for _ in range(SETTINGS["held_out"])]))
    with torch.inference_mode():
        right = [model(part[:, :-2]).logits[:, -1].argmax(-1) == part[:, -2] for part in ids.split(64)]
    return torch.cat(right).float().mean().item()


def fresh(seed: int) -> Any:
    """A tiny Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rope_theta", "initializer_range")
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, **{name: SETTINGS[name] for name in names})
    return LlamaForCausalLM(config)


def read_base(job: tuple[int, Path]) -> None:
    """A model that has read short documents, with loss on every token, into the file named."""
    import torch

    seed, path = job
    model = fresh(seed)
    source = batches([seed, 0], long=False, prompt_loss_weight=1)  # loss on every token, as a base is trained
    for done in train(model, source, steps=SETTINGS["base_steps"], lr=SETTINGS["base_lr"]):
        if done % 100 == 0:
            say(f"seed {seed}, base: step {done} of {SETTINGS['base_steps']}, {accuracy(model, long=False):.1%} right")
    torch.save(model.state_dict(), path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def tune(job: tuple[int, float, Path, Path]) -> None:
    """[(step, answers right)] of tuning from a base; the instances depend on the seed only."""
    import torch

    seed, weight, base, path = job
    model = fresh(seed)
    model.load_state_dict(torch.load(base))
    curve = [(0, accuracy(model, long=True))]
    source = batches([seed, 1], long=True, prompt_loss_weight=weight)
    for done in train(model, source, steps=SETTINGS["tune_steps"], lr=SETTINGS["tune_lr"]):
        if done % SETTINGS["evaluate_every"] == 0:
            curve.append((done, accuracy(model, long=True)))
            say(f"seed {seed}, prompt loss {weight}: step {done} of {SETTINGS['tune_steps']}, {curve[-1][1]:.1%} right")
    path.with_suffix(".tmp").write_text(json.dumps({"seed": seed, "prompt_loss_weight": weight, "curve": curve}))
    os.replace(path.with_suffix(".tmp"), path)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def run(parts: Path) -> list[dict[str, Any]]:
    """All parts that are not there yet, in two processes; returns the tuned ones."""
    parts.mkdir(parents=True, exist_ok=True)
    bases = {seed: parts / f"base-{seed}.pt" for seed in SEEDS}
    tuned = {(seed, weight): parts / f"tuned-{seed}-{weight}.json" for seed in SEEDS for weight in WEIGHTS}
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        for _ in pool.imap_unordered(read_base, [(seed, path) for seed, path in bases.items() if not path.exists()]):
            pass
        jobs = [(seed, weight, bases[seed], path) for (seed, weight), path in tuned.items() if not path.exists()]
        for _ in pool.imap_unordered(tune, jobs):
            pass
    return [json.loads(path.read_text()) for path in tuned.values()]


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds: answers right of the base and of both ways at the end, steps to `ENOUGH`."""

    def over_seeds(values: list[float]) -> dict[str, float]:
        return {"mean": float(np.mean(values)), "standard_deviation": float(np.std(values, ddof=1))}

    table = {"base": over_seeds([r["curve"][0][1] for r in results if r["prompt_loss_weight"] == WEIGHTS[0]])}
    for weight in WEIGHTS:
        curves = [r["curve"] for r in results if r["prompt_loss_weight"] == weight]
        table[f"prompt_loss_{weight}"] = over_seeds([curve[-1][1] for curve in curves])
        steps = [next((step for step, right in curve if right >= ENOUGH), float("inf")) for curve in curves]
        table[f"prompt_loss_{weight}_steps"] = over_seeds(steps)
    return table


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Answers right over the steps of tuning: each seed thin, the mean thick."""
    from nemo_longctx.report import plots

    figure, axes = plots.new_figure()
    for weight, colour in zip(WEIGHTS, plots.COLOURS, strict=False):
        curves = np.array([r["curve"] for r in results if r["prompt_loss_weight"] == weight])
        for curve in curves:
            axes.plot(curve[:, 0], 100 * curve[:, 1], color=colour, linewidth=0.7, alpha=0.5)
        name = "loss on answers alone" if weight == 0 else "loss on the prompt too"
        axes.plot(curves[0, :, 0], 100 * curves[:, :, 1].mean(axis=0), color=colour, linewidth=2, label=name)
    axes.set_title("Questions on documents four times as long as the base's", fontsize=11, loc="left")
    axes.set_xlabel("steps of tuning")
    axes.set_ylabel("held-out answers right, %")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=9)
    plots.save(figure, path)


def versions() -> Mapping[str, str]:
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/prompt_loss"), help="PREFIX of .json and .png")
    parser.add_argument("--parts", type=Path, default=Path("runs/sft_prompt_loss"), help="folder of finished parts")
    args = parser.parse_args()
    began = time.perf_counter()
    digest = hashlib.sha256((json.dumps(SETTINGS, sort_keys=True) + Path(__file__).read_text()).encode()).hexdigest()[:8]
    results = run(args.parts / digest)
    table = summary(results)
    print(f"answers right of {SETTINGS['held_out']} held-out questions on the long documents,")
    print("mean of 3 seeds (standard deviation):")
    for name, values in table.items():
        if not name.endswith("steps"):
            print(f"  {name:14} {values['mean']:6.1%} ({values['standard_deviation']:.1%})")
    for weight in WEIGHTS:
        steps = table[f"prompt_loss_{weight}_steps"]
        print(f"  steps to {ENOUGH:.0%} with prompt loss {weight}: {steps['mean']:.0f} ({steps['standard_deviation']:.0f})")
    print(f"{dict(versions())}, {time.perf_counter() - began:.0f} s")
    record = {"summary": table, "results": results, "settings": SETTINGS, "versions": dict(versions())}
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(results, args.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
