"""Predicted against measured peak memory and time of tiny Megatron-Core models trained on a CPU.

Each configuration runs in fresh processes (two where it is parallel): a stock `GPTModel`, Adam, two steps. Measured is the rise
of the process's peak resident memory from before the model is built (VmHWM); predicted is `planning.memory` with its CPU
settings. Time is predicted by `planning.flops` from the rate that the first configuration of each attention kernel reached.

    python benchmarks/plan_memory.py [--json FILE] [--only NAME]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

from nemo_longctx.planning.flops import convention_by_name, token_flops
from nemo_longctx.planning.gpus import GIB
from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import ModelShape

CPU = {"precision": "fp32", "unfused": True, "sharding": "none"}
SMALL = ModelShape(num_layers=4, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, vocab_size=8192)
GROUPED = ModelShape(
    num_layers=6, hidden_size=512, ffn_hidden_size=1792, num_attention_heads=8, num_query_groups=2, vocab_size=8192
)
WIDE_VOCABULARY = ModelShape(num_layers=2, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, vocab_size=32000)

# name -> model, layout, sequence length.
CONFIGS = {
    "flash_4k": (SMALL, Layout(**CPU), 4096),
    "scores_1k": (SMALL, Layout(**CPU, attention_kernel="scores", micro_batch_size=2), 1024),
    "scores_2k": (SMALL, Layout(**CPU, attention_kernel="scores"), 2048),
    "grouped_2k": (GROUPED, Layout(**CPU), 2048),
    "vocabulary_4k": (WIDE_VOCABULARY, Layout(**CPU), 4096),
    "recompute_full_4k": (GROUPED, Layout(**CPU, recompute="full"), 4096),
    "recompute_block_4k": (GROUPED, Layout(**CPU, recompute="block:3"), 4096),
    # Without Transformer Engine Megatron-Core's norms refuse sequence parallelism.
    "tp2_4k": (SMALL, Layout(gpus=2, tensor_model_parallel_size=2, sequence_parallel=False, **CPU), 4096),
    "cp2_8k": (SMALL, Layout(gpus=2, context_parallel_size=2, **CPU), 8192),
}
STEPS = 2  # the first brings gradients and optimizer state into being, the second peaks over them


def measure(name: str) -> dict[str, float]:
    """Run one configuration in fresh processes; the fullest rank's rise of the peak (bytes) and its step time (s)."""
    layout = CONFIGS[name][1]
    env = {
        **os.environ,
        "WORLD_SIZE": str(layout.gpus),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // layout.gpus)),
        # Freed tensors go back to the system at once, so that resident memory follows what is alive.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", name], env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(layout.gpus)
    ]
    results = []
    for rank in ranks:
        out, _ = rank.communicate(timeout=600)
        if rank.returncode:
            raise RuntimeError(f"{name}: a rank ended with status {rank.returncode}")
        results.append(json.loads(out.strip().splitlines()[-1]))
    return max(results, key=lambda result: result["bytes"])


def worker(name: str) -> None:
    """One rank: train, and print the rise of the peak and the time of a step."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from nemo_longctx.adapters.megatron import cpu

    cpu.install()
    shape, layout, seq_length = CONFIGS[name]
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size, context_parallel_size=layout.context_parallel_size
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    tiny = replace(shape, num_layers=1, hidden_size=64, ffn_hidden_size=64, vocab_size=128)
    train(tiny, replace(layout, recompute="none"), 64)  # code and libraries that first use brings into memory
    gc.collect()
    baseline = resident("VmRSS")
    seconds = train(shape, layout, seq_length)
    print(json.dumps({"bytes": resident("VmHWM") - baseline, "seconds": seconds}))


def train(shape: ModelShape, layout: Layout, seq_length: int) -> float:
    """Build the model and train `STEPS` steps on random tokens; seconds of the fastest forward and backward."""
    import torch

    model = build_model(shape, layout, seq_length)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    local = seq_length // layout.context_parallel_size
    tokens_BS = torch.randint(0, shape.vocab_size, (layout.micro_batch_size, local))
    positions_BS = torch.arange(local).expand(layout.micro_batch_size, -1)
    mask = None
    if layout.attention_kernel == "scores":
        mask = torch.ones(1, 1, local, local, dtype=torch.bool).triu(1)
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        model(tokens_BS, positions_BS, mask, labels=tokens_BS).mean().backward()
        times.append(time.perf_counter() - started)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return min(times)


def build_model(shape: ModelShape, layout: Layout, seq_length: int):
    """A stock Megatron-Core `GPTModel` of this shape and layout."""
    import torch
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    from nemo_longctx.adapters.megatron import cpu
    from nemo_longctx.adapters.megatron.attention import with_long_context_attention

    recompute = {}
    if layout.recompute != "none":
        layers = shape.num_layers if layout.recompute == "full" else int(layout.recompute.partition(":")[2])
        recompute = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}
    parallel = layout.tensor_model_parallel_size > 1 and layout.sequence_parallel
    with cpu.stock_configs():
        config = TransformerConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.query_groups,
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            context_parallel_size=layout.context_parallel_size,
            sequence_parallel=parallel,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            **recompute,
        )
    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    if layout.attention_kernel == "flash":
        spec = with_long_context_attention(spec)
    return GPTModel(
        config,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--only", choices=CONFIGS, help="one configuration")
    parser.add_argument("--worker", choices=CONFIGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    rows = []
    convention = convention_by_name("causal")
    rates: dict[str, float] = {}  # the first configuration of each attention kernel gives its rate
    print(
        f"{'configuration':22} {'tokens':>7} {'predicted':>10} {'measured':>10} {'ratio':>6} "
        f"{'seconds':>8} {'predicted':>9} {'ratio':>6}"
    )
    for name in [args.only] if args.only else CONFIGS:
        shape, layout, seq_length = CONFIGS[name]
        plan = memory_plan(shape, layout, seq_length=seq_length, global_batch_size=layout.micro_batch_size, framework_bytes=0)
        got = measure(name)
        work = executed_flops(shape, layout, seq_length, convention)
        rate = rates.setdefault(layout.attention_kernel, work / got["seconds"])
        row = {
            "name": name,
            "layout": asdict(layout),
            "seq_length": seq_length,
            "predicted_gib": plan.total / GIB,
            "measured_gib": got["bytes"] / GIB,
            "memory_ratio": plan.total / got["bytes"],
            "measured_seconds": got["seconds"],
            "predicted_seconds": work / rate,
            "parts_gib": plan.as_gib(),
        }
        rows.append(row)
        print(
            f"{name:22} {seq_length:7} {row['predicted_gib']:9.3f}G {row['measured_gib']:9.3f}G {row['memory_ratio']:6.2f} "
            f"{got['seconds']:8.2f} {row['predicted_seconds']:9.2f} {row['predicted_seconds'] / got['seconds']:6.2f}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


def executed_flops(shape: ModelShape, layout: Layout, seq_length: int, convention) -> float:
    """Operations that one process runs in a step, recomputation included; `scores` works on all s x s pairs."""
    recompute = "full" if layout.recompute != "none" else "none"
    attention = "full_exact" if layout.attention_kernel == "scores" else convention.name
    named = convention_by_name(attention, recompute=recompute)
    tokens = layout.micro_batch_size * seq_length
    return token_flops(shape, seq_length, named).total * tokens  # processes of one machine share its cores


if __name__ == "__main__":
    main()
