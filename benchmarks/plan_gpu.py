"""Predicted against measured peak memory and time on GPUs: real runs of the example script, on one machine.

Each configuration is a short run of `examples/megatron_gpt_continual.py` by torchrun, on random tokens. Its `throughput.json`
holds what was measured (tokens/s, the peak of tensors on the first GPU) beside what the plan says of the same layout.

    python benchmarks/plan_gpu.py --gpus 1 [--json FILE] [--only NAME]

It has not run yet: no machine with a GPU was at hand. `--cpu` runs its smallest configuration without one, where speed is not
planned and no peak is measured, to show that the path is whole.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.data.writer import CorpusWriter

ROOT = Path(__file__).parents[1]
VOCABULARY = 32_000
STEPS = 6
# About 1.2 B parameters: 16 layers of Llama 2's form, so that weights, activations and loss all matter on 80 GB.
BASE = {
    "model.num_layers": 16,
    "model.hidden_size": 2048,
    "model.ffn_hidden_size": 5632,
    "model.num_attention_heads": 16,
    "model.num_query_groups": 16,
    "model.kv_channels": 128,
    "model.vocab_size": VOCABULARY,
}
GROUPED = {**BASE, "model.num_query_groups": 4}

# name -> GPUs, sequence length, overrides.
CONFIGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "4k": (1, 4096, BASE),
    "16k": (1, 16_384, BASE),
    "32k_grouped": (1, 32_768, GROUPED),
    "64k_block": (1, 65_536, {**GROUPED, "trainer.recompute": "block:8"}),
    "64k_selective": (1, 65_536, {**GROUPED, "trainer.recompute": "selective"}),
    "64k_full": (1, 65_536, {**GROUPED, "trainer.recompute": "full"}),
    "64k_offload": (1, 65_536, {**GROUPED, "trainer.offload": "full"}),
    "128k_full": (1, 131_072, {**GROUPED, "trainer.recompute": "full"}),
    "32k_tp2": (2, 32_768, {**GROUPED, "trainer.tensor_model_parallel_size": 2, "trainer.sequence_parallel": True}),
    "64k_cp2": (2, 65_536, {**GROUPED, "trainer.context_parallel_size": 2}),
    "32k_pp2": (2, 32_768, {**GROUPED, "trainer.pipeline_model_parallel_size": 2}),
}
SMALLEST = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 128,
    "model.kv_channels": 32,
    "model.vocab_size": VOCABULARY,
}


def write_corpus(prefix: Path, tokens: int) -> None:
    """One document of random tokens."""
    with CorpusWriter(str(prefix), np.uint16) as writer:
        writer.add_document(np.random.default_rng(1).integers(0, VOCABULARY, tokens).astype(np.uint16))


def measure(folder: Path, gpus: int, seq_length: int, overrides: dict[str, Any], *, device: str) -> dict[str, Any]:
    """Train a few steps; the run's throughput.json."""
    batch = gpus if not any("parallel_size" in key for key in overrides) else 1
    batch *= overrides.get("trainer.pipeline_model_parallel_size", 1)
    arguments = {
        "recipe": "tiny_cpu_base",
        "trainer": device,
        "output_dir": folder,
        "name": "run",
        "eval": "none",
        "data": "corpus",
        "data.mix.sources": f"[{{path: {folder.parent}/corpus}}]",
        "data.validation": "[]",
        "data.cache_dir": folder / "order",
        "curriculum.stages": f"[{{until: 1.0, seq_length: {seq_length}, micro_batch_size: 1}}]",
        "curriculum.tokens_per_step": batch * seq_length,
        "curriculum.total_tokens": STEPS * batch * seq_length,
        "optimizer.warmup_tokens": 0,
        "trainer.devices": gpus,
        "trainer.val_every_tokens": 0,
        "checkpoint.every_tokens": 0,
        **overrides,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command += [str(ROOT / "examples" / "megatron_gpt_continual.py"), *(f"{key}={value}" for key, value in arguments.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy())
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:])
    record = json.loads((folder / "run" / "results" / "throughput.json").read_text())
    shutil.rmtree(folder)  # its checkpoint is some 15 GB
    return record


def row_of(name: str, seq_length: int, record: dict[str, Any]) -> dict[str, Any]:
    """Predicted, measured and their ratio, for memory and speed; None where one of the two is not known."""
    stage = record["stages"][0]
    planned, peak = stage["planned"], record["peak_allocated_gib"]
    speed = planned.get("tokens_per_second")
    return {
        "name": name,
        "seq_length": seq_length,
        "planned_gib": planned.get("memory_gib"),
        "measured_gib": peak,
        "memory_ratio": planned["memory_gib"] / peak if peak else None,
        "planned_tokens_per_second": speed,
        "measured_tokens_per_second": stage["tokens_per_second"],
        "speed_ratio": speed / stage["tokens_per_second"] if speed else None,
        "mfu": stage.get("mfu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="leave out configurations of more")
    parser.add_argument("--only", choices=CONFIGS, help="one configuration")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--cpu", action="store_true", help="the smallest configuration on a CPU")
    args = parser.parse_args()
    chosen = {name: config for name, config in CONFIGS.items() if config[0] <= args.gpus and args.only in (None, name)}
    if args.cpu:
        chosen = {"smallest": (1, 1024, SMALLEST)}
    rows = []
    print(f"{'configuration':14} {'tokens':>8}  planned, measured GiB and ratio; planned, measured tokens/s and ratio; MFU")
    with tempfile.TemporaryDirectory() as temporary:
        longest = max(seq_length * gpus for gpus, seq_length, _ in chosen.values())
        write_corpus(Path(temporary) / "corpus", (STEPS + 2) * longest)
        for name, (gpus, seq_length, overrides) in chosen.items():
            folder = Path(temporary) / name
            record = measure(folder, gpus, seq_length, overrides, device="cpu" if args.cpu else "gpu")
            row = row_of(name, seq_length, record)
            rows.append(row)
            figures = [value if value is None else round(value, 3) for value in list(row.values())[2:]]
            print(f"{name:14} {seq_length:8}  {figures}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": platform.platform(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
