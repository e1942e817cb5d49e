"""A Llama-7B-shaped stack of layers on one GPU, ours beside Hugging Face transformers with SDPA: rate, memory, longest window.

NOT RUN YET: no machine with a GPU was at hand when this was written. It ships so that whoever has one can run it.

bf16, forward and backward of one window, hidden 4,096, 32 heads x 128, MLP 11,008, RMSNorm, no embedding loss, no optimizer;
`--layers` layers (4 by default: 32 with their optimizer do not fit one card). Ours: Megatron-Core's GPTModel with
`LongContextAttention`. Theirs: `LlamaModel(attn_implementation="sdpa")`. Every measurement is a fresh process, the two take
turns, medians of `--rounds`; each is warmed up with the same window first.

FLOPs by two conventions, both printed (forward + backward = 3 x forward; no recomputation counted):
  full    per layer and token 6 (4 h^2 + 3 h f) + 12 s h      (Narayanan et al. 2021; every score counts)
  causal  the same with 6 s h for attention                    (only the scores that are needed)
The matrix-product rate is that of an 8,192^3 bf16 product, measured in the same run. "Longest" doubles the window with full
recomputation until memory runs out.

    python benchmarks/attention_gpu.py --json attention_gpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

HIDDEN, HEADS, MLP, VOCABULARY = 4096, 32, 11008, 1024
KINDS = ("ours", "transformers sdpa")


def flops(tokens: int, layers: int, *, causal: bool) -> float:
    """Of one forward and backward of one window, in the convention of the module's docstring."""
    attention = (6 if causal else 12) * tokens * HIDDEN
    return float(layers) * tokens * (6 * (4 * HIDDEN**2 + 3 * HIDDEN * MLP) + attention)


def megatron_stack(tokens: int, layers: int, recompute: bool):
    import measure
    import torch
    import torch.distributed as dist
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_longctx.adapters.nemo.attention import with_long_context_attention

    measure.one_gloo_process()
    model_parallel_cuda_manual_seed(1)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=layers, hidden_size=HIDDEN, num_attention_heads=HEADS, ffn_hidden_size=MLP, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, attention_dropout=0.0,
        hidden_dropout=0.0, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, persist_layer_norm=False,
        gradient_accumulation_fusion=False, **(full if recompute else {}),
    )  # fmt: skip
    spec = with_long_context_attention(get_gpt_layer_local_spec(normalization="RMSNorm"))
    model = GPTModel(
        config, spec, vocab_size=VOCABULARY, max_sequence_length=tokens, post_process=False, position_embedding_type="rope"
    ).cuda()
    positions = torch.arange(tokens, device="cuda")[None]
    dist.barrier()
    return model, lambda ids: model(ids, positions, None)


def transformers_stack(layers: int, recompute: bool):
    import torch
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers, num_attention_heads=HEADS, vocab_size=VOCABULARY,
        max_position_embeddings=1 << 20, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaModel(config).to("cuda", torch.bfloat16).train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, lambda ids: model(input_ids=ids).last_hidden_state


def one(kind: str, tokens: int, layers: int, recompute: bool) -> dict:
    """Seconds and peak bytes of a step; `fits` is False where memory ran out."""
    import torch

    torch.manual_seed(0)
    build = (lambda: megatron_stack(tokens, layers, recompute)) if kind == "ours" else None
    model, run = build() if build else transformers_stack(layers, recompute)
    ids = torch.randint(0, VOCABULARY, (1, tokens), device="cuda")

    def step() -> None:
        run(ids).float().mean().backward()
        model.zero_grad(set_to_none=True)

    try:
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return {"fits": False}
    return {"fits": True, "seconds": (time.perf_counter() - start) / 3, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def matrix_product_rate() -> dict:
    """FLOP/s of a large bf16 product, the best of ten."""
    import torch

    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return {"rate": 2 * n**3 / best, "device": torch.cuda.get_device_name()}


def fresh(case: dict) -> dict:
    """One case in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
    if line is None:
        raise RuntimeError(f"{case}: status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(line)


def longest(kind: str, layers: int) -> int:
    tokens, fits = 4096, 0
    while fresh({"kind": kind, "tokens": tokens, "layers": layers, "recompute": True})["fits"]:
        fits, tokens = tokens, tokens * 2
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384, 32768, 65536, 131072])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the data to this file as well")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(matrix_product_rate() if args.one["kind"] == "product" else one(**args.one)))
        return
    product = fresh({"kind": "product"})
    print(
        f"{product['device']}: bf16 product {product['rate'] / 1e12:.0f} TFLOP/s; "
        f"{args.layers} layers; medians of {args.rounds}"
    )
    rows = []
    for tokens in args.tokens:
        runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for _ in range(args.rounds):
            for kind in KINDS:
                runs[kind].append(fresh({"kind": kind, "tokens": tokens, "layers": args.layers, "recompute": False}))
        for kind, results in runs.items():
            if not all(r["fits"] for r in results):
                rows.append({"kind": kind, "tokens": tokens, "fits": False})
                print(f"  {tokens:7d} {kind:18s} does not fit without recomputation")
                continue
            seconds = statistics.median(r["seconds"] for r in results)
            rates = {name: flops(tokens, args.layers, causal=name == "causal") / seconds for name in ("full", "causal")}
            peak = statistics.median(r["peak_gib"] for r in results)
            rows.append({"kind": kind, "tokens": tokens, "fits": True, "seconds": seconds, "peak_gib": peak, **rates})
            share = rates["causal"] / product["rate"]
            print(f"  {tokens:7d} {kind:18s} {seconds:8.3f} s  {rates['full'] / 1e12:6.0f} TFLOP/s full  "
                  f"{rates['causal'] / 1e12:6.0f} causal ({share:.0%} of the product)  {peak:6.1f} GiB")  # fmt: skip
    reach = {kind: longest(kind, args.layers) for kind in KINDS}
    print("longest window with full recomputation: " + ", ".join(f"{kind} {tokens:,}" for kind, tokens in reach.items()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"product": product, "layers": args.layers, "rows": rows, "longest": reach}, file, indent=1)


if __name__ == "__main__":
    main()
