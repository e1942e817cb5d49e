"""What the CPU adapter costs on an operation and on a training step: with it and without, in turn, in one run.

    python benchmarks/cpu_shim.py [--rounds 5] [--json FILE]

The host cannot run without the adapter here, so the step is plain torch: the tiny recipe's layer sizes (hidden 128, 3 layers,
window 256, batch 8) with the factory calls, moves and type checks that a Megatron-Core step makes around it.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from nemo_longctx.adapters.megatron import cpu

STEP_REPEATS, CALL_REPEATS = 20, 20_000


def training_step(layers: torch.nn.Module, head: torch.nn.Module, x: torch.Tensor) -> None:
    device = "cpu"
    position = torch.arange(x.shape[1], device=device)
    mask = torch.ones(x.shape[:2], device=device)
    loss = (torch.logsumexp(head(layers(x + position[None, :, None] * 0)), -1) * mask).mean()
    loss.backward()
    total = torch.tensor(0.0, device=device)
    for parameter in (*layers.parameters(), *head.parameters()):
        if parameter.grad is not None and parameter.grad.type():
            total = total + parameter.grad.to(torch.float32).norm() ** 2
            parameter.grad = None


def measure() -> dict[str, float]:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(128, 2, 352, dropout=0.0, batch_first=True)
    layers, head = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.nn.Linear(128, 512)
    x = torch.randn(8, 256, 128)
    training_step(layers, head, x)
    began = time.perf_counter()
    for _ in range(STEP_REPEATS):
        training_step(layers, head, x)
    step = (time.perf_counter() - began) / STEP_REPEATS
    began = time.perf_counter()
    for _ in range(CALL_REPEATS):
        torch.zeros(4, device="cpu")
    return {"step_ms": step * 1e3, "zeros_us": (time.perf_counter() - began) / CALL_REPEATS * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cpu.install()  # imports the host once, so that neither side pays for it
    rows: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(args.rounds):
        cpu.uninstall()
        rows["without"].append(measure())
        cpu.install()
        rows["with"].append(measure())
    medians = {side: {name: statistics.median(row[name] for row in rows[side]) for name in rows[side][0]} for side in rows}
    ratios = {name: medians["with"][name] / medians["without"][name] for name in medians["with"]}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for name, ratio in ratios.items():
        print(f"{name:9} without {medians['without'][name]:9.3f}  with {medians['with'][name]:9.3f}  ratio {ratio:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"medians": medians, "ratios": ratios, "rounds": rows}, indent=1))


if __name__ == "__main__":
    main()
