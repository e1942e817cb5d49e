"""A Llama-7B-shaped stack of layers on one GPU, ours beside Hugging Face transformers with SDPA: rate, memory, longest window.

NOT RUN YET: no machine with a GPU was at hand when this was written; it was only run on a CPU at toy sizes, to see that it goes
through (`--device cpu`). It ships so that whoever has a GPU can run it.

bf16, forward and backward of one window: hidden 4,096, 32 heads x 128, MLP 11,008, RMSNorm; no head, no optimizer; `--layers`
layers (4 by default: 32 with their optimizer do not fit one card). Ours: Megatron-Core's GPTModel, local spec, with
`LongContextAttention` and the fusions that a run has without Transformer Engine. Theirs:
`LlamaModel(attn_implementation="sdpa")`. Every measurement is a fresh process and the two take turns; a process warms up
with the same window, then takes the mean of three steps; the table has the medians of `--rounds` processes.

FLOPs by two conventions, both printed (forward + backward = 3 x forward; recomputation is not credited):
  full    per layer and token 6 (4 h^2 + 3 h f) + 12 s h      (Narayanan et al. 2021; every score counts)
  causal  the same with 6 s h for attention                    (only the scores that are needed)
The matrix-product rate is that of an 8,192^3 bf16 product over a hundred of them in a row, measured in the same run. "Longest"
is the longest window of this stack, a multiple of 4,096, that trains with every layer recomputed: doubled, then bisected.
A case that fails for another reason than memory is a row that says so, and the rest goes on.

    python benchmarks/attention_gpu.py --json attention_gpu.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time

KINDS = ("ours", "transformers sdpa")
LONGEST_UNIT = 4096
# What torch, cuBLAS and cuDNN say when there is no memory left, beside torch.OutOfMemoryError.
OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "out of memory", "allocate memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the stack; the defaults are one Llama 2 7B layer's."""

    hidden: int = 4096
    heads: int = 32
    mlp: int = 11008
    vocabulary: int = 1024
    product: int = 8192


TOY = Shape(hidden=64, heads=2, mlp=96, vocabulary=128, product=256)


def flops(shape: Shape, tokens: int, layers: int, *, causal: bool) -> float:
    """Of one forward and backward of one window, in the convention of the module's docstring."""
    attention = (6 if causal else 12) * tokens * shape.hidden
    return float(layers) * tokens * (6 * (4 * shape.hidden**2 + 3 * shape.hidden * shape.mlp) + attention)


def megatron_stack(shape: Shape, tokens: int, layers: int, recompute: bool, device: str):
    import measure
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_longctx.activations import megatron_fields
    from nemo_longctx.adapters.megatron import cpu
    from nemo_longctx.adapters.megatron.attention import with_long_context_attention

    cpu.install()  # does nothing where there is a GPU
    measure.one_gloo_process()
    model_parallel_cuda_manual_seed(1)
    on_gpu = device == "cuda"
    config = TransformerConfig(
        num_layers=layers, hidden_size=shape.hidden, num_attention_heads=shape.heads, ffn_hidden_size=shape.mlp,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        attention_dropout=0.0, hidden_dropout=0.0, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=not on_gpu, bias_activation_fusion=on_gpu, bias_dropout_fusion=on_gpu,
        persist_layer_norm=False, gradient_accumulation_fusion=False, **megatron_fields("full" if recompute else "none"),
    )  # fmt: skip
    model = GPTModel(
        config,
        with_long_context_attention(get_gpt_layer_local_spec(normalization="RMSNorm")),
        vocab_size=shape.vocabulary,
        max_sequence_length=tokens,
        post_process=False,
        position_embedding_type="rope",
    )
    model.to(device).bfloat16()  # torch's norms are made in float32; a run casts them as here
    positions = torch.arange(tokens, device=device)[None]
    return model, lambda ids: model(ids, positions, None)


def transformers_stack(shape: Shape, layers: int, recompute: bool, device: str):
    import torch
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=layers, num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary, max_position_embeddings=1 << 20, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaModel(config).bfloat16().train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, lambda ids: model(input_ids=ids).last_hidden_state


def one(kind: str, tokens: int, layers: int, recompute: bool, device: str, steps: int = 3) -> dict:
    """Mean seconds of a step after one for warm-up, and peak bytes; `fits` is False where memory ran out.

    With `steps=0` the warm-up alone is tried.
    """
    import torch

    torch.manual_seed(0)
    shape = Shape() if device == "cuda" else TOY
    try:
        if kind == "ours":
            model, run = megatron_stack(shape, tokens, layers, recompute, device)
        else:
            model, run = transformers_stack(shape, layers, recompute, device)
        ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
        gradient = torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16)

        def step() -> None:
            hidden = run(ids)  # [s, 1, h] or [1, s, h]
            hidden.backward(gradient.view(hidden.shape))
            model.zero_grad(set_to_none=True)

        step()
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _synchronize(device)
    except torch.OutOfMemoryError:
        return {"fits": False}
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return {"fits": False}
    seconds = (time.perf_counter() - start) / max(steps, 1)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"fits": True, "seconds": seconds, "peak_gib": peak / 2**30}


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def matrix_product_rate(device: str) -> dict:
    """FLOP/s of large bf16 products one after another, and what they ran on."""
    import torch

    n = (Shape() if device == "cuda" else TOY).product
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(10):
        torch.mm(a, b, out=out)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(100):
        torch.mm(a, b, out=out)
    _synchronize(device)
    rate = 100 * 2 * n**3 / (time.perf_counter() - start)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, toy sizes"
    return {"rate": rate, "device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


def fresh(case: dict) -> dict:
    """One case in a process of its own; `error` with its last words where it failed for another reason than memory."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
    if line is None:
        words = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        return {"fits": False, "error": words[0][:300]}
    return json.loads(line)


def longest(kind: str, layers: int, device: str, limit: int) -> int:
    """Tokens, a multiple of LONGEST_UNIT (of 256 on a CPU), up to `limit`."""
    unit = LONGEST_UNIT if device == "cuda" else 256

    def fits(units: int) -> bool:
        case = {"kind": kind, "tokens": units * unit, "layers": layers, "recompute": True, "device": device, "steps": 0}
        return fresh(case)["fits"]

    good, bad = 0, 1
    while bad * unit <= limit and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        if middle * unit <= limit and fits(middle):
            good = middle
        else:
            bad = middle
    return good * unit


def row_of(kind: str, tokens: int, layers: int, shape: Shape, results: list[dict]) -> dict:
    """Medians of a case's processes, and its rates by both conventions; `why` where it did not run."""
    failed = [result for result in results if not result["fits"]]
    if failed:
        return {"kind": kind, "tokens": tokens, "fits": False, "why": failed[0].get("error", "out of memory"), "runs": results}
    seconds = statistics.median(result["seconds"] for result in results)
    rates = {name: flops(shape, tokens, layers, causal=name == "causal") / seconds for name in ("full", "causal")}
    peak = statistics.median(result["peak_gib"] for result in results)
    return {"kind": kind, "tokens": tokens, "fits": True, "seconds": seconds, "peak_gib": peak, **rates, "runs": results}


def row_text(row: dict, product: float) -> str:
    head = f"  {row['tokens']:8,d} {row['kind']:18s}"
    if not row["fits"]:
        return f"{head} no figure, without recomputation: {row['why']}"
    rates = ", ".join(f"{row[name] / 1e12:6.1f} TFLOP/s {name} ({row[name] / product:.0%})" for name in ("full", "causal"))
    return f"{head} {row['seconds']:9.3f} s  {rates}  {row['peak_gib']:6.1f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384, 32768, 65536, 131072])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest-limit", type=int, default=1 << 20, help="do not look for longer windows than this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy sizes, to try the script itself")
    parser.add_argument("--json", help="write the data to this file as well, after every length")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case = args.one
        print(json.dumps(matrix_product_rate(case["device"]) if case["kind"] == "product" else one(**case)))
        return
    product = fresh({"kind": "product", "device": args.device})
    if "rate" not in product:
        sys.exit(f"no product rate, so no benchmark: {product['error']}")
    shape = Shape() if args.device == "cuda" else TOY
    versions = f"torch {product['torch']}, CUDA {product['cuda']}"
    print(f"{product['device']}, {versions}: bf16 product of {shape.product:,}^3 at {product['rate'] / 1e12:.2f} TFLOP/s")
    print(f"{args.layers} layers of {shape}; medians of {args.rounds}; in brackets the share of the product's rate")
    record: dict = {"product": product, "layers": args.layers, "shape": dataclasses.asdict(shape), "rows": [], "longest": {}}
    for tokens in args.tokens:
        runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for _ in range(args.rounds):
            for kind in KINDS:
                case = {"kind": kind, "tokens": tokens, "layers": args.layers, "recompute": False, "device": args.device}
                runs[kind].append(fresh(case))
        for kind, results in runs.items():
            record["rows"].append(row_of(kind, tokens, args.layers, shape, results))
            print(row_text(record["rows"][-1], product["rate"]), flush=True)
        write(args.json, record)
    for kind in KINDS:
        record["longest"][kind] = longest(kind, args.layers, args.device, args.longest_limit)
        print(f"longest window with every layer recomputed, {kind}: {record['longest'][kind]:,} tokens", flush=True)
    write(args.json, record)


def write(path: str | None, record: dict) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
