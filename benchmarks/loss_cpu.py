"""The loss of a language-model head on this CPU: ours beside Megatron-Core's head and loss on logits, and torch's own chunks.

One forward and backward from hidden states to the gradients of hidden states and weight, a mean over tokens. Time and memory
as in `attention_cpu.py`. torch's `linear_cross_entropy` returns the mean alone; ours and Megatron-Core's a loss per token.

    python benchmarks/loss_cpu.py                 # 32,768 tokens, three rounds: some 5 minutes on 2 cores
"""

from __future__ import annotations

import argparse

import measure

HIDDEN, VOCABULARY = 512, 32_000
KINDS = ("ours", "megatron", "torch linear_cross_entropy")


def loss_function(kind: str):
    import torch

    if kind == "ours":
        from nemo_longctx.attention.loss import chunked_cross_entropy

        return lambda hidden, weight, labels: chunked_cross_entropy(hidden, weight, labels).mean()
    if kind == "megatron":
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        from nemo_longctx.adapters.megatron import cpu

        measure.one_gloo_process()
        cpu.install()
        config = measure.transformer_config(num_attention_heads=8, hidden_size=HIDDEN)
        # As GPTModel makes its output layer where the weight is tied: the weight comes with each call.
        head = ColumnParallelLinear(
            HIDDEN, VOCABULARY, config=config, init_method=config.init_method, bias=False, skip_weight_param_allocation=True
        )

        def from_logits(hidden, weight, labels):
            logits, _ = head(hidden.unsqueeze(1), weight=weight)
            return vocab_parallel_cross_entropy(logits, labels.unsqueeze(1)).mean()

        return from_logits
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: torch.nn.functional.linear_cross_entropy(hidden, weight, labels, options=options)


def one(kind: str, tokens: int) -> dict:
    import torch

    loss = loss_function(kind)
    hidden = torch.randn(tokens, HIDDEN)
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.02).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,))

    def step(length: int) -> None:
        weight.grad = None
        loss(hidden[:length].requires_grad_(), weight, labels[:length]).backward()

    step(64)
    weight.grad = None
    return measure.step(lambda: step(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32768])
    parser.add_argument("--rounds", type=int, default=3)
    measure.add_arguments(parser)
    args = parser.parse_args()
    if args.one:
        measure.report_one(one(args.one["kind"], args.one["tokens"]))
        return
    cases = [{"kind": kind, "tokens": tokens} for tokens in args.tokens for kind in KINDS]
    results = measure.in_turn(__file__, cases, args.rounds)
    rows = {(r["kind"], r["tokens"]): r for r in results}
    ratios = {}
    for tokens in args.tokens:
        mine = rows[("ours", tokens)]
        for kind in KINDS[1:]:
            ratios[f"{tokens}: our time / {kind}"] = mine["seconds"] / rows[(kind, tokens)]["seconds"]
            ratios[f"{tokens}: memory of {kind} / ours"] = rows[(kind, tokens)]["peak_mib"] / mine["peak_mib"]
    sizes = f"hidden {HIDDEN}, vocabulary {VOCABULARY}, fp32, forward + backward"
    measure.report("loss_cpu", sizes, results, ratios, args)


if __name__ == "__main__":
    main()
