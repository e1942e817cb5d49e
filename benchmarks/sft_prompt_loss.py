"""Loss on long prompts against none (Xiong et al. 2023, Table 9): a tiny model, synthetic facts, reported as it comes out.

    python benchmarks/sft_prompt_loss.py [--json FILE]

A document is a list of facts, `key value .`, some told twice, in a vocabulary of keys and values that mean nothing outside it;
the question names a key, the answer is its value. A Llama is pretrained on short documents, then tuned on documents four times
as long with loss on answers alone, and with loss on the prompt too: same base, same instances, same steps, three seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_longctx.data.sft import loss_units, window
from nemo_longctx.data.sft_instances import ANSWER, PROMPT

KEYS, VALUES = 64, 64
STOP, ASK, END, PAD = range(KEYS + VALUES, KEYS + VALUES + 4)
VOCABULARY = KEYS + VALUES + 4
SHORT_FACTS, LONG_FACTS = 8, 32
BATCH, PRETRAIN_STEPS, TUNE_STEPS, HELD_OUT = 32, 900, 300, 512
LR = 2e-3


def document(draw: np.random.Generator, facts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, keys, values): `facts` tellings of 3 / 4 as many facts, in random order."""
    known = facts * 3 // 4
    keys, values = draw.permutation(KEYS)[:known], KEYS + draw.integers(0, VALUES, known)
    told = draw.permutation(np.concatenate([np.arange(known), draw.choice(known, facts - known, replace=False)]))
    return np.stack([keys[told], values[told], np.full(facts, STOP)], axis=1).reshape(-1), keys, values


def instance(draw: np.random.Generator, facts: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, roles): document, question, answer, end."""
    tokens, keys, values = document(draw, facts)
    asked = draw.integers(len(keys))
    ids = np.concatenate([tokens, [ASK, keys[asked], values[asked], END]])
    return ids, np.where(np.arange(len(ids)) >= len(ids) - 2, ANSWER, PROMPT).astype(np.uint8)


def batch(instances: list[tuple[np.ndarray, np.ndarray]], seq_length: int, units: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Windows of one instance each."""
    made = [window([one], seq_length=seq_length, pad_id=PAD, units=units) for one in instances]
    return {key: torch.from_numpy(np.stack([sample[key] for sample in made])) for key in ("tokens", "labels", "loss_mask")}


def step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, fields: dict[str, torch.Tensor]) -> None:
    """One update on the weighted mean of the losses of the labels."""
    logits = model(fields["tokens"]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), fields["labels"].flatten(), reduction="none")
    weights = fields["loss_mask"].flatten()
    optimizer.zero_grad()
    ((losses * weights).sum() / weights.sum()).backward()
    optimizer.step()


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, facts: int) -> float:
    """The share of held-out questions whose likeliest next token is the right value."""
    draw = np.random.default_rng(10_000)
    ids = torch.from_numpy(np.stack([instance(draw, facts)[0] for _ in range(HELD_OUT)]))
    right = [model(part[:, :-2]).logits[:, -1].argmax(-1) == part[:, -2] for part in ids.split(64)]
    return torch.cat(right).float().mean().item()


def pretrained(seed: int) -> LlamaForCausalLM:
    """A Llama that has read short documents, with loss on every token."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, rope_theta=500_000.0, **sizes))
    draw, optimizer = np.random.default_rng([seed, 0]), torch.optim.AdamW(model.parameters(), lr=LR)
    for _ in range(PRETRAIN_STEPS):
        documents = [document(draw, SHORT_FACTS)[0] for _ in range(BATCH)]
        told = [(ids, np.full(len(ids), ANSWER, np.uint8)) for ids in documents]
        step(model, optimizer, batch(told, 3 * SHORT_FACTS, (0, 1)))
    return model


def tuned(base: LlamaForCausalLM, seed: int, prompt_loss_weight: float) -> LlamaForCausalLM:
    """`base` after tuning on long instances; the instances depend on the seed only."""
    model = copy.deepcopy(base)
    draw, optimizer = np.random.default_rng([seed, 1]), torch.optim.AdamW(model.parameters(), lr=LR / 4)
    for _ in range(TUNE_STEPS):
        instances = [instance(draw, LONG_FACTS) for _ in range(BATCH)]
        step(model, optimizer, batch(instances, 3 * LONG_FACTS + 4, loss_units(prompt_loss_weight)))
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    began, rows = time.perf_counter(), []
    for seed in (1, 2, 3):
        base = pretrained(seed)
        row = {"seed": seed, "base": accuracy(base, LONG_FACTS)}
        row |= {f"prompt_loss_{weight}": accuracy(tuned(base, seed, weight), LONG_FACTS) for weight in (0, 1)}
        rows.append(row)
        print(row, flush=True)
    names = ("base", "prompt_loss_0", "prompt_loss_1")
    mean = {name: float(np.mean([row[name] for row in rows])) for name in names}
    spread = {name: float(np.std([row[name] for row in rows], ddof=1)) for name in names}
    print(
        f"answers right of {HELD_OUT} held-out questions, documents of {LONG_FACTS} facts, mean of 3 seeds (standard deviation)"
    )
    for name in names:
        print(f"  {name:14} {mean[name]:6.1%} ({spread[name]:.1%})")
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    print(f"{about}, {time.perf_counter() - began:.0f} s")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"rows": rows, "mean": mean, "standard_deviation": spread, "versions": about}, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
