"""What a sliding window saves on this CPU: forward and backward of our attention with it, against all of the tokens.

Both take turns in one process on one thread; the figures are medians of processor time, which other programs of the machine do
not lengthen as they do the clock's.

    python benchmarks/attention_windows.py                        # 32,768 tokens, a window of 1,024: some minutes
    python benchmarks/attention_windows.py --tokens 8192 --window 256 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

HEADS, GROUPS, HEAD_SIZE = 2, 2, 64


def seconds(tensors: list, grad, window: int | None) -> float:
    """Processor seconds of one forward and backward."""
    import torch

    from nemo_longctx.attention.core import causal_attention

    begin = time.process_time()
    out = causal_attention(*tensors, window=window)
    torch.autograd.grad(out, tensors, grad)
    return time.process_time() - begin


def measured(tokens: int, window: int, rounds: int) -> dict:
    """Medians of both, and their ratio beside that of the scores that are computed."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, tokens, heads, HEAD_SIZE) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    q, k, v, grad = (torch.randn(*shape, generator=generator) for shape in shapes)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    seconds(tensors, grad, window)  # the first call of a kernel costs more
    found: dict[str, list[float]] = {"window": [], "full": []}
    for _ in range(rounds):
        found["window"].append(seconds(tensors, grad, window))
        found["full"].append(seconds(tensors, grad, None))
    medians = {name: statistics.median(times) for name, times in found.items()}
    scores = (window * tokens - window * (window - 1) / 2) / (tokens * (tokens + 1) / 2)
    return {
        "tokens": tokens, "window": window, "rounds": rounds, "heads": HEADS, "head_size": HEAD_SIZE,
        **{f"{name}_seconds": value for name, value in medians.items()},
        "full_over_window": medians["full"] / medians["window"], "full_over_window_of_scores": 1 / scores,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measured(args.tokens, args.window, args.rounds), indent=2))


if __name__ == "__main__":
    main()
