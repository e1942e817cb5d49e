"""A whole training step of the tiny recipe's model on this CPU: ours beside the stock local spec.

The model of conf/model/tiny_llama.yaml as Megatron-Core's GPTModel, fp32, one window; a step is forward, backward and an Adam
update. Stock: `get_gpt_layer_local_spec`, a dense causal mask, the loss on logits. Ours: the same layers with
`LongContextAttention` and the chunked loss; and once more with `recompute: selective` (each layer's MLP, the largest part once
scores and logits are gone). Time and memory as in `attention_cpu.py`. At the end torch's profile of our step at the first
size: where the time goes, and the share that is ours and the host's.

    python benchmarks/train_step_cpu.py           # 8,192 beside stock and 32,768 alone, three rounds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measure

LEAN = "ours, recompute selective"
OURS = {  # operators that this package calls, by the name that the profiler gives them
    "attention (ours)": ("_SegmentAttention", "flash_attention_for_cpu"),
    "head and loss (ours)": ("_ChunkedCrossEntropy",),
}


def build(kind: str, tokens: int):
    import torch
    import yaml
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_longctx.activations import megatron_fields
    from nemo_longctx.adapters.megatron import cpu
    from nemo_longctx.adapters.megatron.attention import with_long_context_attention
    from nemo_longctx.adapters.megatron.loss import use_chunked_loss

    measure.one_gloo_process()
    cpu.install()
    model_parallel_cuda_manual_seed(1)
    fields = yaml.safe_load((Path(__file__).parents[1] / "conf" / "model" / "tiny_llama.yaml").read_text())
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    config = measure.transformer_config(
        **{name: fields[name] for name in names},
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        activation_func=torch.nn.functional.silu,
        **megatron_fields("selective" if kind == LEAN else "none"),
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    ours = kind in ("ours", LEAN)
    model = GPTModel(
        config,
        with_long_context_attention(spec) if ours else spec,
        vocab_size=fields["vocab_size"],
        max_sequence_length=tokens,
        position_embedding_type="rope",
    )
    if ours:
        use_chunked_loss(model)
    return model, fields["vocab_size"]


def stepper(kind: str, tokens: int):
    import torch

    model, vocabulary = build(kind, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(length: int) -> None:
        drawn = torch.randint(0, vocabulary, (1, length + 1))
        positions = torch.arange(length)[None]
        mask = None if kind in ("ours", LEAN) else torch.ones(1, 1, length, length, dtype=torch.bool).triu_(1)
        model(drawn[:, :-1].contiguous(), positions, mask, labels=drawn[:, 1:].contiguous()).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def one(kind: str, tokens: int) -> dict:
    step = stepper(kind, tokens)
    step(128)
    result = measure.step(lambda: step(tokens))
    return {**result, "tokens_per_second": tokens / result["seconds"]}


def profile(tokens: int) -> dict:
    """Shares of our step's CPU time: each operator's own time, counted to the innermost of OURS that it runs under."""
    import torch
    from torch.profiler import ProfilerActivity

    torch.set_num_threads(measure.THREADS)
    step = stepper("ours", tokens)
    step(128)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(tokens)
    shares: dict[str, float] = {}
    for event in recorded.events():
        owner, name = event, None
        while owner is not None and name is None:
            name = next((label for label, marks in OURS.items() if any(mark in owner.name for mark in marks)), None)
            owner = owner.cpu_parent
        label = name or _host_part(event.name)
        shares[label] = shares.get(label, 0.0) + event.self_cpu_time_total
    total = sum(shares.values())
    shown = {label: value / total for label, value in sorted(shares.items(), key=lambda item: -item[1])}
    ours = sum(value for label, value in shown.items() if label in OURS)
    return {"seconds": total / 1e6, "share of this package": ours, "shares": shown}


def _host_part(operator: str) -> str:
    if operator in ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"):
        return "matrix products of the layers (host)"
    if operator in ("aten::cos", "aten::sin", "aten::cat", "aten::neg"):
        return "rotary positions (host)"
    if "norm" in operator:
        return "norms (host)"
    if "copy" in operator or "clone" in operator or "contiguous" in operator:
        return "copies (host)"
    if "Optimizer" in operator or "addcdiv" in operator or "addcmul" in operator or "lerp" in operator:
        return "optimizer (host)"
    return "elementwise and the rest (host)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--rounds", type=int, default=3)
    measure.add_arguments(parser)
    args = parser.parse_args()
    if args.one:
        case = args.one
        measure.report_one(profile(case["tokens"]) if case["kind"] == "profile" else one(case["kind"], case["tokens"]))
        return
    cases = [{"kind": kind, "tokens": tokens} for tokens in args.tokens for kind in ("ours", LEAN)]
    cases += [{"kind": "stock local spec", "tokens": tokens} for tokens in args.tokens if tokens <= 8192]
    results = measure.in_turn(__file__, cases, args.rounds)
    rows = {(r["kind"], r["tokens"]): r for r in results}
    ratios = {}
    for (kind, tokens), row in rows.items():
        stock = rows.get(("stock local spec", tokens))
        if stock and row is not stock:
            ratios[f"{tokens}, {kind}: tokens/s over stock"] = row["tokens_per_second"] / stock["tokens_per_second"]
            ratios[f"{tokens}, {kind}: stock's peak memory over it"] = stock["peak_mib"] / row["peak_mib"]
    (where,) = measure.in_turn(__file__, [{"kind": "profile", "tokens": args.tokens[0]}], 1)
    measure.report("train_step_cpu", "conf/model/tiny_llama.yaml, fp32, one window", results, ratios, args, profile=where)
    for label, share in where["shares"].items():
        print(f"  {share:6.1%}  {label}")
    print(f"  {where['share of this package']:6.1%}  this package's share of the step; the rest is the host's")


if __name__ == "__main__":
    main()
