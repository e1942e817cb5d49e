"""Core attention on this CPU: ours beside Megatron-Core's local `DotProductAttention`, forward and backward.

Every measurement is a fresh process; ours and theirs take turns. Time is that of one forward and backward after a small
warm-up call. Memory is the rise of the process's peak resident set (`ru_maxrss`) over what it held before the call, with
inputs, warm-up and imports counted as held before. Both get queries, keys and values in Megatron-Core's layout [s, b, h, d].

    python benchmarks/attention_cpu.py            # all sizes, three rounds: some 10 minutes on 2 cores
    python benchmarks/attention_cpu.py --tokens 4096 --rounds 1
"""

from __future__ import annotations

import argparse

import measure

HEADS, HEAD_SIZE = 8, 64
DOCUMENTS = 18


def document_boundaries(tokens: int) -> tuple[int, ...]:
    """18 lognormal lengths (sigma 1.5, as text corpora have) that fill `tokens`, the same at every call."""
    import numpy as np

    lengths = np.random.default_rng(0).lognormal(0.0, 1.5, DOCUMENTS)
    ends = np.floor(np.cumsum(lengths) / lengths.sum() * tokens).astype(int)
    ends[-1] = tokens
    return (0, *ends.tolist())


def ours(tokens: int, packed: bool):
    from nemo_longctx.attention.core import causal_attention
    from nemo_longctx.attention.documents import document_segments

    segments = document_segments(document_boundaries(tokens)) if packed else None

    def attend(q, k, v):
        return causal_attention(*(x.transpose(0, 1) for x in (q, k, v)), segments=segments)

    return attend


def megatron(tokens: int):
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_longctx.adapters.megatron import cpu

    measure.one_gloo_process()
    cpu.install()
    config = measure.transformer_config(num_attention_heads=HEADS, hidden_size=HEADS * HEAD_SIZE)
    layer = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).triu_(1)
    return lambda q, k, v: layer(q, k, v, mask[..., : q.shape[0], : q.shape[0]])


def one(kind: str, tokens: int) -> dict:
    import torch

    attend = megatron(tokens) if kind == "megatron" else ours(tokens, packed=kind == "ours, 18 documents")
    whole_only = kind == "ours, 18 documents"

    def step(length: int) -> None:
        q, k, v = (x[:length].requires_grad_() for x in inputs)
        attend(q, k, v).sum().backward()

    inputs = [torch.randn(tokens, 1, HEADS, HEAD_SIZE) for _ in range(3)]
    if not whole_only:
        step(128)
    return measure.step(lambda: step(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=3)
    measure.add_arguments(parser)
    args = parser.parse_args()
    if args.one:
        measure.report_one(one(args.one["kind"], args.one["tokens"]))
        return
    cases = []
    for tokens in args.tokens:
        kinds = ["ours"]
        if tokens <= 8192:  # 16k would take 32 GiB
            kinds.append("megatron")
        if tokens == 32768:
            kinds.append("ours, 18 documents")
        cases += [{"kind": kind, "tokens": tokens} for kind in kinds]
    results = measure.in_turn(__file__, cases, args.rounds)
    rows = {(r["kind"], r["tokens"]): r for r in results}
    ratios = {}
    for tokens in args.tokens:
        mine, theirs = rows[("ours", tokens)], rows.get(("megatron", tokens))
        if theirs:
            ratios[f"{tokens}: times faster than Megatron-Core local"] = theirs["seconds"] / mine["seconds"]
            ratios[f"{tokens}: its memory / ours"] = theirs["peak_mib"] / mine["peak_mib"]
    if ("ours", 16384) in rows and ("ours", 8192) in rows:
        ratios["memory at 16k / 8k"] = rows[("ours", 16384)]["peak_mib"] / rows[("ours", 8192)]["peak_mib"]
    packed = rows.get(("ours, 18 documents", 32768))
    if packed:
        ratios["32768: 18 documents, times faster than unmasked"] = rows[("ours", 32768)]["seconds"] / packed["seconds"]
    sizes = f"b=1, {HEADS} heads x {HEAD_SIZE}, fp32, forward + backward"
    measure.report("attention_cpu", sizes, results, ratios, args)


if __name__ == "__main__":
    main()
