"""One run in every layout, and one run through all of them: the same windows, and losses that differ by rounding.

    python benchmarks/layouts.py --out docs/layouts

A tiny Llama goes through a change of length on this machine's CPU, one process a rank over gloo. All begin with the weights of
one base, since random weights differ by layout. First each layout trains from the start to the end; then one run changes its
layout at every checkpoint. Every window that any rank reads is hashed. It writes
OUT.csv (losses of every step) and OUT.md (the largest difference from one process), and ends with 1 where a window differs or a
loss differs by more than `TOLERANCE`. The host is imported once; the ranks are forked from it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.compose import compose
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.recipe import load_recipe
from nemo_longctx.report.training_log import read_training_log

LAYOUTS = {
    "1 process": {},
    "DP 2": {"data": 2},
    "TP 2": {"tensor": 2},
    "TP 2 SP": {"tensor": 2, "sequence": 1},
    "CP 2": {"context": 2},
    "PP 2": {"pipeline": 2},
    "TP 2 x CP 2": {"tensor": 2, "context": 2},
    "CP 4": {"context": 4},
}
STEPS = 14
HEAD = """# Layouts

`python benchmarks/layouts.py`: a tiny Llama through a change of length, 14 steps, on CPU processes over gloo.

"""
TOLERANCE = 2e-4  # of the loss: float32, and sums in another order that the optimizer carries on


def overrides(folder: Path, name: str, layout: dict[str, Any], every: int) -> list[str]:
    """The tiny recipe, two lengths, in a layout; a checkpoint every so many steps."""
    ranks = int(np.prod(list(layout.values()) or [1]))
    sizes: dict[str, Any] = {f"{kind}_{'model_' if kind != 'context' else ''}parallel_size": n for kind, n in layout.items()
             if kind not in ("data", "sequence")}  # fmt: skip
    if "sequence" in layout:
        sizes["sequence_parallel"] = "true"
    return [
        "recipe=tiny_cpu_base", f"name={name}", f"output_dir={folder}", "data.tokenizer=null", "data.num_workers=0",
        f"data.mix.sources=[{{path: {folder}/corpus}}]", "data.validation=[]", f"data.cache_dir={folder}/order", "eval=none",
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_attention_heads=2",
        "model.num_query_groups=2", "model.kv_channels=16", "model.vocab_size=128", "data.document_masking=true",
        "curriculum.stages=[{until: 0.5, seq_length: 32}, {until: 1.0, seq_length: 64}]", "curriculum.tokens_per_step=256",
        f"curriculum.total_tokens={256 * STEPS}", f"checkpoint.every_tokens={256 * every}", "trainer.val_every_tokens=0",
        "optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "optimizer.warmup_tokens=0", f"trainer.devices={ranks}",
        *(f"trainer.{key}={n}" for key, n in sizes.items()), *([] if name == "base" else [f"restore_from={folder}/base"]),
    ]  # fmt: skip


def train(arguments: list[str], witness: Path, stop: int | None) -> None:
    """Train on this rank, and note the hash of every window that it reads."""
    from lightning.pytorch.callbacks import Callback

    from nemo_longctx.adapters.nemo.launch.run import build_run

    seen: dict[int, str] = {}

    class Watch(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            read = trainer.datamodule.windows.__class__.__getitem__

            def noted(windows: Any, number: int) -> Any:
                sample = read(windows, number)
                seen[number] = hashlib.sha256(sample["tokens"].tobytes()).hexdigest()
                return sample

            windows = trainer.datamodule.windows
            windows.__class__ = type("Noted", (windows.__class__,), {"__getitem__": noted})

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == stop:
                trainer.should_stop = True

    run = build_run(load_recipe(compose(arguments)))
    run.trainer.callbacks.append(Watch())
    run.fit()
    witness.write_text(json.dumps(seen))


def launch(folder: Path, name: str, layout: dict[str, int], *, every: int = STEPS, stop: int | None = None) -> dict[int, str]:
    """Fork the ranks of a layout; the windows that they read, by number."""
    ranks = int(np.prod(list(layout.values()) or [1]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        with open(folder / f"{name}.{rank}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        together = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if ranks > 1:
            together |= {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": name, "GROUP_RANK": 0}
            os.environ.update({key: str(value) for key, value in together.items()})
        status = 1
        try:
            train(overrides(folder, name.partition("@")[0], layout, every), folder / f"{name}.{rank}.json", stop)
            status = 0
        except BaseException:  # a child must never go on as the parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    failed = [rank for rank, child in enumerate(children) if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
    if failed:
        raise RuntimeError(f"{name}: {(folder / f'{name}.{failed[0]}.log').read_text()[-3000:]}")
    windows: dict[int, str] = {}
    for rank in range(ranks):
        for number, digest in json.loads((folder / f"{name}.{rank}.json").read_text()).items():
            if windows.setdefault(int(number), digest) != digest:
                raise RuntimeError(f"{name}: ranks read another window {number}")
    return windows


def losses(folder: Path, name: str) -> dict[int, float]:
    rows = read_training_log(folder / name / "results" / "training.csv")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("layouts"))
    parser.add_argument("--folder", type=Path, default=None, help="where runs and logs are kept; a temporary one without")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="layouts_"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng = np.random.default_rng(0)
    with CorpusWriter(folder / "corpus", np.uint16) as writer:
        for _ in range(300):
            writer.add_document(rng.integers(0, 128, rng.integers(3, 120)))
    import nemo_longctx.adapters.nemo.launch.run  # noqa: F401  once for all ranks

    launch(folder, "base", {}, every=2, stop=2)
    curves, streams = {}, {}
    for label, layout in LAYOUTS.items():
        name = label.replace(" ", "_")
        streams[label], curves[label] = launch(folder, name, layout), None
        curves[label] = losses(folder, name)
        print(f"{label}: {len(curves[label])} steps", flush=True)
    label, windows = "all, one after another", {}
    for number, (_, layout) in enumerate(LAYOUTS.items()):
        windows |= launch(folder, f"changing@{number}", layout, every=2, stop=2 * (number + 1))
    streams[label], curves[label] = windows, losses(folder, "changing")

    whole, reference = streams["1 process"], curves["1 process"]
    read = 256 // 32 * (STEPS // 2) + 256 // 64 * (STEPS // 2)
    lines, bad = (
        ["| layout | steps | windows as in one process | largest difference of a loss |", "| --- | --- | --- | --- |"],
        [],
    )
    for label, curve in curves.items():
        same = sum(streams[label].get(number) == whole[number] for number in range(read))
        worst = max(abs(curve[step] - reference[step]) for step in reference)
        lines.append(f"| {label} | {len(curve)} | {same} of {read} | {worst:.1e} |")
        if same < read or len(curve) < STEPS or not worst < TOLERANCE:
            bad.append(label)
    arguments.out.with_suffix(".md").write_text(HEAD + "\n".join(lines) + "\n")
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", *curves])
        table.writerows([step, *(curve.get(step, "") for curve in curves.values())] for step in reference)
    print("\n".join(lines))
    if bad:
        print(f"differ: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
