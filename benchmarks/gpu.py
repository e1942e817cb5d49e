"""What one GPU says of all this in one call of at most eight minutes, on a machine without a network: a table and its JSON.

    python benchmarks/gpu.py [--json gpu.json] [--seconds 480] [--only PART...]
    python benchmarks/gpu.py --device cpu --tiny        the same parts at toy sizes, to see that they go through

Parts, in this order, each a process of its own with a share of the time. What needs only torch and our cores comes first, and
each row is kept as soon as it is there, whatever becomes of the rest:

  product    the bf16 matrix-product rate, which the rates below are measured by
  exact      attention and loss with their gradients against float64, bf16 and float32
  attention  forward and backward, 4k to 128k tokens, causal and as 18 documents: ours, SDPA, FlashAttention where installed
  loss       the head's cross entropy in chunks, and through all logits: time and peak memory
  cp         context parallelism of two processes over gloo on this one GPU, against one process
  nemo       a bf16 run of NeMo, tiny and 1 B-shaped, 4k to 32k, with a resume, its memory and time beside the plan's

Not run on a GPU yet: no machine with one was at hand when it was written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the cores, installed or not

MARK = "row: "
# Part -> its share of the seconds, and the modules that it needs beside torch.
PARTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "product": (0.05, ()),
    "exact": (0.10, ()),
    "attention": (0.25, ()),
    "loss": (0.10, ()),
    "cp": (0.10, ()),
    "nemo": (0.40, ("nemo", "megatron", "lightning", "nemo_run")),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the parts work on."""

    device: str
    product: int
    lengths: tuple[int, ...]
    heads: int
    groups: int
    head: int
    loss_tokens: int
    hidden: int
    vocabulary: int
    exact: int
    steps: int


REAL = Sizes(device="cuda", product=8192, lengths=(4096, 16_384, 32_768, 65_536, 131_072), heads=32, groups=8, head=128,
             loss_tokens=16_384, hidden=4096, vocabulary=128_256, exact=1024, steps=5)  # fmt: skip
TINY = Sizes(device="cpu", product=128, lengths=(64, 128), heads=4, groups=2, head=16, loss_tokens=256, hidden=32,
             vocabulary=512, exact=96, steps=1)  # fmt: skip


def seconds_of(run: Callable[[], Any], sizes: Sizes) -> float:
    """Mean of some calls after one to warm up."""
    run()
    synchronize(sizes)
    began = time.perf_counter()
    for _ in range(sizes.steps):
        run()
    synchronize(sizes)
    return (time.perf_counter() - began) / sizes.steps


def synchronize(sizes: Sizes) -> None:
    if sizes.device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_gib(run: Callable[[], Any], sizes: Sizes) -> float | None:
    """What `run` adds to the tensors on the GPU at its peak."""
    if sizes.device != "cuda":
        return None
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def product(sizes: Sizes) -> Iterator[dict]:
    import torch

    n = sizes.product
    a, b = (torch.randn(n, n, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = seconds_of(lambda: [torch.mm(a, b, out=out) for _ in range(20)], sizes) / 20
    yield {"what": f"{n}^3", "tflops": 2 * n**3 / seconds / 1e12}


def explicit(q: Any, k: Any, v: Any, lengths: list[int]) -> Any:
    """Attention of documents in float64, scores and all."""
    import torch

    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    seen = (document[:, None] == document[None]) & torch.ones(len(document), len(document), device=q.device).tril().bool()
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhst,bthd->bshd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def documents_of(tokens: int, count: int = 18) -> list[int]:
    """Lengths of so many documents, long and short."""
    weights = [1 + (7 * i) % count for i in range(count)]
    lengths = [max(1, tokens * w // sum(weights)) for w in weights]
    return [*lengths[:-1], tokens - sum(lengths[:-1])]


def ends(lengths: list[int]) -> tuple[int, ...]:
    total, out = 0, [0]
    for length in lengths:
        total += length
        out.append(total)
    return tuple(out)


def leaves(sizes: Sizes, tokens: int, dtype: Any) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = [(1, tokens, heads, sizes.head) for heads in (sizes.heads, sizes.groups, sizes.groups)]
    return [torch.randn(*shape, generator=generator).to(sizes.device, dtype).requires_grad_() for shape in shapes]


def error(mine: Any, other: Any) -> float:
    return ((mine.double() - other.double()).norm() / other.double().norm()).item()


def exact(sizes: Sizes) -> Iterator[dict]:
    import torch

    from nemo_longctx.attention.core import backend_name, causal_attention
    from nemo_longctx.attention.documents import document_segments
    from nemo_longctx.attention.loss import chunked_cross_entropy

    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float32, 1e-2)):
        for form, lengths in (("causal", [sizes.exact]), ("18 documents", documents_of(sizes.exact))):
            inputs = leaves(sizes, sizes.exact, dtype)
            segments = None if form == "causal" else document_segments(ends(lengths))
            out, wanted = causal_attention(*inputs, segments=segments), explicit(*inputs, lengths)
            gradient = torch.randn_like(wanted)
            ours = (out, *torch.autograd.grad(out, inputs, gradient.to(dtype)))
            theirs = (wanted, *torch.autograd.grad(wanted, inputs, gradient))
            worst = max(error(a, b) for a, b in zip(ours, theirs, strict=True))
            kernel = backend_name(inputs[0].device, dtype, segmented=segments is not None)
            yield {"what": f"attention {form} {dtype} on {kernel}", "error": worst, "good": worst < bound}
        hidden = torch.randn(sizes.exact, sizes.hidden, device=sizes.device).to(dtype).requires_grad_()
        weight = (torch.randn(sizes.vocabulary, sizes.hidden, device=sizes.device) * 0.1).to(dtype).requires_grad_()
        labels = torch.randint(0, sizes.vocabulary, (sizes.exact,), device=sizes.device)
        mine = chunked_cross_entropy(hidden, weight, labels).mean()
        other = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), labels)
        pairs = zip(torch.autograd.grad(mine, (hidden, weight)), torch.autograd.grad(other, (hidden, weight)), strict=True)
        worst = max(error(mine[None], other[None]), *(error(a, b) for a, b in pairs))
        yield {"what": f"loss {dtype}", "error": worst, "good": worst < bound}


def attention(sizes: Sizes) -> Iterator[dict]:
    import torch

    from nemo_longctx.attention.core import causal_attention
    from nemo_longctx.attention.documents import document_segments
    from nemo_longctx.capability import flash_attention

    def sdpa(q: Any, k: Any, v: Any, _lengths: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def flash(q: Any, k: Any, v: Any, lengths: list[int]) -> Any:
        module = importlib.import_module(str(flash_attention()))
        boundaries = torch.tensor(ends(lengths), dtype=torch.int32, device=q.device)
        top = max(lengths)
        return module.flash_attn_varlen_func(q[0], k[0], v[0], boundaries, boundaries, top, top, causal=True)

    def ours(q: Any, k: Any, v: Any, lengths: list[int]) -> Any:
        return causal_attention(q, k, v, segments=document_segments(ends(lengths)) if len(lengths) > 1 else None)

    kinds = {"ours": ours, "sdpa": sdpa} | ({"flash-attn": flash} if flash_attention() and sizes.device == "cuda" else {})
    for tokens in sizes.lengths:
        for form, lengths in (("causal", [tokens]), ("18 documents", documents_of(tokens))):
            inputs = leaves(sizes, tokens, torch.bfloat16)
            work = 3 * sum(2 * length**2 for length in lengths) * sizes.heads * sizes.head  # the causal half, and twice it back
            for kind, function in kinds.items():
                if kind == "sdpa" and len(lengths) > 1:  # knows no documents
                    continue

                def step(function: Any = function, inputs: Any = inputs, lengths: Any = lengths) -> None:
                    out = function(*inputs, lengths)
                    torch.autograd.grad(out if not isinstance(out, tuple) else out[0], inputs, torch.ones_like(out))

                row = {"what": f"{tokens:,} {form}, {kind}"}
                try:
                    seconds = seconds_of(step, sizes)
                    yield row | {"seconds": seconds, "tflops": work / seconds / 1e12, "gib": peak_gib(step, sizes)}
                except RuntimeError as failure:
                    yield row | {"why": " ".join(str(failure).split())[:200]}


def loss(sizes: Sizes) -> Iterator[dict]:
    import torch

    from nemo_longctx.attention.loss import chunked_cross_entropy

    hidden = torch.randn(sizes.loss_tokens, sizes.hidden, device=sizes.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(sizes.vocabulary, sizes.hidden, device=sizes.device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, sizes.vocabulary, (sizes.loss_tokens,), device=sizes.device)
    kinds = {
        "in chunks": lambda: chunked_cross_entropy(hidden, weight, labels).mean(),
        "all logits": lambda: torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels),
    }
    for kind, function in kinds.items():

        def step(function: Any = function) -> None:
            torch.autograd.grad(function(), (hidden, weight))

        row = {"what": f"{sizes.loss_tokens:,} tokens, {sizes.vocabulary:,} words, {kind}"}
        try:
            seconds = seconds_of(step, sizes)
            work = 6 * sizes.loss_tokens * sizes.vocabulary * sizes.hidden
            yield row | {"seconds": seconds, "tflops": work / seconds / 1e12, "gib": peak_gib(step, sizes)}
        except RuntimeError as failure:
            yield row | {"why": " ".join(str(failure).split())[:200]}


def cp_rank(rank: int, sizes: Sizes, store: str, place: str) -> None:
    """One of two ranks: its share of attention and gradients, against the whole that it computes beside it."""
    import torch
    import torch.distributed as dist

    from nemo_longctx.attention.context_parallel import context_parallel_attention, slice_zigzag
    from nemo_longctx.attention.core import causal_attention
    from nemo_longctx.attention.documents import context_parallel_segments, document_segments

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tokens = sizes.exact
    rows = []
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
        for form, lengths in (("causal", [tokens]), ("18 documents", documents_of(tokens))):
            whole = leaves(sizes, tokens, dtype)
            wanted = causal_attention(*whole, segments=document_segments(ends(lengths)))
            torch.manual_seed(1)
            gradient = torch.randn(wanted.shape).to(sizes.device, dtype)
            expected = (wanted, *torch.autograd.grad(wanted, whole, gradient))
            mine = [slice_zigzag(x.detach(), rank, 2).requires_grad_() for x in whole]
            segments = context_parallel_segments(ends(lengths), tokens, rank, 2)
            out = context_parallel_attention(*mine, segments=segments, group=dist.group.WORLD)
            ours = (out, *torch.autograd.grad(out, mine, slice_zigzag(gradient, rank, 2)))
            worst = max(error(a, slice_zigzag(b, rank, 2)) for a, b in zip(ours, expected, strict=True))
            rows.append({"what": f"two ranks, {form} {dtype}", "error": worst, "good": worst < bound})
    Path(f"{place}.{rank}").write_text(json.dumps(rows))
    dist.destroy_process_group()


def cp(sizes: Sizes) -> Iterator[dict]:
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(cp_rank, args=(sizes, f"{folder}/store", f"{folder}/rows"), nprocs=2)
        ranks = [json.loads(Path(f"{folder}/rows.{rank}").read_text()) for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        yield {**first, "error": max(first["error"], second["error"]), "good": first["good"] and second["good"]}


def nemo(sizes: Sizes) -> Iterator[dict]:
    """Runs of the command, each resumed once: what they measured beside what was planned."""
    import numpy as np

    from nemo_longctx.data.writer import CorpusWriter

    on_gpu = sizes.device == "cuda"
    shapes = {"tiny": (2, 64, 4, 256)} | ({"1 B": (16, 2048, 16, 5632)} if on_gpu else {})
    lengths = {"tiny": (256,), "1 B": (4096, 16_384, 32_768)}
    with tempfile.TemporaryDirectory() as folder:
        with CorpusWriter(f"{folder}/numbers", np.uint16) as writer:
            writer.add_document((np.arange(2_000_000 if on_gpu else 20_000) % 300).astype(np.uint16))
        for name, (layers, hidden, heads, mlp) in shapes.items():
            for length in lengths[name]:
                run = f"{name.replace(' ', '')}_{length}"
                common = [
                    "recipe=tiny_cpu_base", f"name={run}", f"output_dir={folder}", "eval=none", "data.validation=[]",
                    f"data.mix.sources=[{{path: {folder}/numbers}}]", "data.tokenizer=null", f"data.cache_dir={folder}/order",
                    f"trainer.accelerator={'gpu' if on_gpu else 'cpu'}", "trainer.precision=bf16-mixed",
                    "model.vocab_size=32000",
                    f"model.num_layers={layers}", f"model.hidden_size={hidden}", f"model.num_attention_heads={heads}",
                    f"model.num_query_groups={heads // 4 or 1}", f"model.ffn_hidden_size={mlp}",
                    f"model.kv_channels={hidden // heads}", "optimizer.warmup_tokens=0", "trainer.val_every_tokens=0",
                    f"curriculum.stages=[{{until: 1.0, seq_length: {length}, micro_batch_size: 1}}]",
                    f"curriculum.tokens_per_step={length}", f"checkpoint.every_tokens={4 * length}",
                ]  # fmt: skip
                for steps, told in ((8, "begun"), (12, "gone on with")):
                    clock = f"curriculum.total_tokens={steps * length}"
                    began = time.perf_counter()
                    command = [sys.executable, "-m", "nemo_longctx.cli", "train", *common, clock]
                    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
                    row = {"what": f"{name} {length:,} {told}", "seconds": time.perf_counter() - began}
                    if done.returncode:
                        yield row | {"why": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]}
                        break
                    measured = json.loads((Path(folder) / run / "results" / "throughput.json").read_text())
                    yield row | {
                        "tokens_per_second": measured["tokens_per_second"],
                        "gib": measured["peak_allocated_gib"],
                        "planned": measured["stages"][-1]["planned"],
                    }


def run_part(name: str, sizes: Sizes, limit: float) -> list[dict]:
    """The rows of a part, those that it made before its time was up or it failed included."""
    missing = [module for module in PARTS[name][1] if importlib.util.find_spec(module) is None]
    if missing:
        return [{"what": name, "why": f"left out: {', '.join(missing)} not installed"}]
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--one",
        name,
        *(["--device", "cpu", "--tiny"] if sizes is TINY else []),
    ]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            status: Any = subprocess.run(command, stdout=out, stderr=err, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = f"its {limit:.0f} s were up"
        out.seek(0)
        err.seek(0)
        rows = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK) and line.endswith("\n")]
        if status != 0:
            last = err.read().strip().splitlines()[-1:] or [f"status {status}"]
            rows.append({"what": name, "why": status if isinstance(status, str) else last[0][:300]})
    return rows


def text_of(row: dict) -> str:
    """One line of the table."""
    cells = [f"  {row['what']:52s}"]
    for key, form in (("seconds", "{:9.4f} s"), ("tflops", "{:8.2f} TFLOP/s"), ("share", "{:5.0%}"), ("gib", "{:7.2f} GiB"),
                      ("error", "error {:.1e}"), ("tokens_per_second", "{:,.0f} tokens/s")):  # fmt: skip
        if row.get(key) is not None:
            cells.append(form.format(row[key]))
    planned = row.get("planned") or {}
    cells += [f"planned {planned['memory_gib']:.2f} GiB"] if "memory_gib" in planned else []
    cells += [row["why"]] if "why" in row else []
    cells += ["WRONG"] if row.get("good") is False else []
    return " ".join(cells)


def origin(sizes: Sizes) -> dict:
    import torch

    name = torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU, toy sizes"
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; what --device cpu runs")
    parser.add_argument("--seconds", type=float, default=480, help="of all parts together")
    parser.add_argument("--only", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--json", default="gpu.json", help="written after every part")
    parser.add_argument("--one", choices=tuple(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = TINY if args.device == "cpu" else REAL
    if args.one:
        for row in globals()[args.one](sizes):
            print(MARK + json.dumps(row), flush=True)
        return 0
    record: dict = {"origin": origin(sizes), "parts": {}}
    print(", ".join(f"{key} {value}" for key, value in record["origin"].items()))
    began = time.perf_counter()
    shares = sum(PARTS[name][0] for name in args.only)
    for name in args.only:
        left = args.seconds - (time.perf_counter() - began)
        limit = left * PARTS[name][0] / shares if shares > 0 else left  # what a part leaves goes to those after it
        shares -= PARTS[name][0]
        rows = record["parts"][name] = run_part(name, sizes, max(limit, 1))
        peak = next((row["tflops"] for row in record["parts"].get("product", []) if "tflops" in row), None)
        for row in rows:
            if peak and name in ("attention", "loss") and "tflops" in row:
                row["share"] = row["tflops"] / peak
        print(f"{name}\n" + "\n".join(text_of(row) for row in rows), flush=True)
        Path(args.json).write_text(json.dumps(record, indent=1))
    return int(any(row.get("good") is False for rows in record["parts"].values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
