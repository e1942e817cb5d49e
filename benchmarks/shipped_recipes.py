"""Every shipped recipe as shipped, made small by `scale=tiny`: start, checkpoint, SIGKILL, resume, validate, end, export.

    python benchmarks/shipped_recipes.py [NAME ...] [--output shipped]

Names are those of conf/recipe/, `sft:ROW` for a row of conf/sft/, and `nemo:RECIPE` for a pretraining recipe of
`nemo.collections.llm` that `extend_recipe` makes long and nemo_run starts. Those that begin with a checkpoint get a base of
their own scaled shape, by the same command from random weights. The host is imported once; each start forks its ranks from it,
two for what a cluster runs. A line a name is printed; with `--output` PATH.md has them as a table.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SFT = "sft:"
NEMO = "nemo:"
NEMO_RECIPES = ("llama2_7b", "llama3_8b", "mistral_7b", "qwen25_7b", "gemma2_2b")
SCALE = ["scale=tiny", "trainer.accelerator=cpu", "trainer.precision=auto"]  # the layout stays the recipe's own
# The layout that each is cut to on two processes; the first of a recipe's own is tensor parallelism.
LAYOUTS = {
    "llama2_13b": ["trainer.tensor_model_parallel_size=1"],  # context 2
    "codellama_34b": ["trainer.tensor_model_parallel_size=1", "trainer.context_parallel_size=1"],  # pipeline 2
    "llama3_8b": ["trainer.tensor_model_parallel_size=1"],  # context 2, two lengths, documents masked
    "mistral_7b": ["trainer.tensor_model_parallel_size=1", "trainer.context_parallel_size=1"],  # data 2
}


def names() -> list[str]:
    """All that is tried."""
    from nemo_longctx.compose import groups

    known = groups()
    return [*known["recipe"], *(f"{SFT}{row}" for row in known["sft"]), *(f"{NEMO}{name}" for name in NEMO_RECIPES)]


class Ranks:
    """Processes of one start, forked from this one; `work` is called in each, and returns its status."""

    def __init__(self, count: int, work: Callable[[], int | None], log: Path):
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.log, self.pids = log, []
        for rank in range(count):
            pid = os.fork()
            if pid:
                self.pids.append(pid)
                continue
            status = 1
            try:
                os.setsid()
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(out, 1)
                os.dup2(out, 2)
                if count > 1:
                    own = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "shipped"}
                    os.environ |= {key: str(value) for key, value in (together | own).items()}
                status = work() or 0
            except SystemExit as left:
                status = int(left.code or 0)
            except BaseException:  # a child must never go on as the parent
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def kill(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> list[int] | None:
        """Statuses of all; None where `until` came true before. After so long, or once one failed, all are ended."""
        end, statuses = time.monotonic() + seconds, {}
        while len(statuses) < len(self.pids):
            for pid in self.pids:
                if pid not in statuses:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        statuses[pid] = os.waitstatus_to_exitcode(status)
            if until():
                return None
            if any(statuses.values()):
                end = min(end, time.monotonic() + 10)
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.05)
        return [statuses[pid] for pid in self.pids]


def must(count: int, work: Callable[[], int | None], log: Path, seconds: float = 600) -> None:
    """Run to the end, or raise with the end of the log."""
    statuses = Ranks(count, work, log).wait(seconds)
    if any(statuses or [1]):
        raise RuntimeError(f"ended with {statuses}: {log.read_text(errors='replace')[-3000:]}")


def kill_and_resume(count: int, work: Callable[[], int | None], directory: Path, log: Path) -> None:
    """Start, SIGKILL after the first checkpoint, and start again to the end."""
    from nemo_longctx.checkpoints import checkpoints

    first = Ranks(count, work, log)
    ended = first.wait(600, until=lambda: bool(checkpoints(directory)))
    if ended is not None:
        raise RuntimeError(f"ended with {ended} before a checkpoint: {log.read_text(errors='replace')[-3000:]}")
    first.kill()
    first.wait(30)
    if (directory / "finished.json").exists():
        raise RuntimeError("finished before it was killed")
    must(count, work, log)
    must(count, work, log)  # a finished run says so


def looked_at(directory: Path, log: Path, steps: int, named: int | None = None) -> dict[str, Any]:
    """What a finished run must have; `named` is the step in its last checkpoint's name, where that is not `steps`."""
    from nemo_longctx.checkpoints import checkpoints, fault_of

    with (directory / "results" / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = [int(row["step"]) for row in rows if row.get("loss")]
    validated = [int(row["step"]) for row in rows if row.get("validation_loss")]
    found, said = checkpoints(directory)[0], log.read_text(errors="replace")
    record = json.loads((directory / "results" / "settings.json").read_text())
    made = {
        "steps": len(trained),
        "validations": len(validated),
        "checkpoint": found.step + (0 if named is None else steps - named),
        "RoPE": ((record.get("recipe") or {}).get("rope") or {}).get("variant") or "the base's",
    }
    wrong = []
    if trained != list(range(1, steps + 1)):
        wrong.append(f"rows of steps {trained}")
    if found.step != (steps if named is None else named) or fault_of(found.path) is not None:
        wrong.append(f"newest checkpoint {found}")
    if "is finished already" not in said:
        wrong.append("a second start did not say that it is finished")
    if "RoPE verified live" not in said:
        wrong.append("RoPE was not verified")
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return made


def export(directory: Path, log: Path) -> None:
    from nemo_longctx.cli import main

    out = directory.with_name(f"{directory.name}-hf")
    must(1, lambda: main(["export", str(directory), str(out)]), log)
    if not (out / "config.json").is_file():
        raise RuntimeError("no export")


def base_of(name: str, place: Path, restore: str, lengths: int) -> Path:
    """A base of the recipe's scaled shape at its scaled length, made once by the recipe itself from random weights."""
    from nemo_longctx.launch import main
    from nemo_longctx.planning.models import MODELS

    model = Path(restore).name
    length = (MODELS[model].seq_length if model in MODELS else 256) // lengths
    directory = place / "bases" / f"{model}_{length}"
    if not directory.exists():
        shape = f"model={model}" if model in MODELS else "model=tiny_llama"
        stages = f"curriculum.stages=[{{until: 1.0, seq_length: {length}, micro_batch_size: 1}}]"
        asked = [f"recipe={name}", *SCALE, shape, "restore_from=null", "rope=null", "eval=null", stages, "scale.processes=1",
                 "scale.steps=2", "data.validation=[]", "trainer.val_every_tokens=0", f"output_dir={directory.parent}",
                 "optimizer.distributed=false", f"name={directory.name}", "data.tokenizer=tokenizer",
                 "data.mix.sources=[{path: data/corpus}]"]  # fmt: skip
        must(1, lambda: main(asked), place / f"{directory.name}.log")
    return directory


def recipe(name: str, place: Path) -> dict[str, Any]:
    """One of conf/recipe/."""
    from nemo_longctx.compose import compose
    from nemo_longctx.launch import main
    from nemo_longctx.recipe import load_recipe

    asked = [f"recipe={name}", *SCALE, *LAYOUTS.get(name, [])]
    asked += ["scale.lengths=8"] if name.startswith("tiny") else []
    own = compose([f"recipe={name}"])
    if own["restore_from"]:
        longest = max(stage["seq_length"] for stage in own["curriculum"]["stages"])
        lengths = 8 if name.startswith("tiny") else longest // 256
        asked.append(f"restore_from={base_of(name, place, own['restore_from'], lengths)}")
    made, log = load_recipe(compose(asked)), place / f"{name}.log"
    kill_and_resume(made.trainer.world_size, lambda: main(asked), made.directory, log)
    found = looked_at(made.directory, log, made.curriculum.total_steps)
    if made.data.validation and not found["validations"]:
        raise RuntimeError("it never validated")
    export(made.directory, log)
    t = made.trainer
    kinds = {"TP": t.tensor_model_parallel_size, "PP": t.pipeline_model_parallel_size, "CP": t.context_parallel_size,
             "DP": t.data_parallel_size}  # fmt: skip
    return found | {"layout": " ".join(f"{kind} {size}" for kind, size in kinds.items() if size > 1) or "1 process"}


def tuning(name: str, place: Path) -> dict[str, Any]:
    """A row of conf/sft/ over the finished llama2_7b, or over its base."""
    from nemo_longctx.launch_sft import main

    base = base_of("llama2_7b", place, "checkpoints/llama2_7b", 32)
    asked = [f"sft={name}", *SCALE, f"restore_from={base}", "data.tokenizer=tokenizer", "data.short=[short.jsonl]",
             "data.long=[long.jsonl]", "data.pretraining={sources: [{path: data/corpus}]}", f"name=sft_{name}",
             "checkpoint.every_tokens=8192"]  # fmt: skip
    directory, log = Path("runs").absolute() / f"sft_{name}", place / f"sft_{name}.log"
    kill_and_resume(1, lambda: main(asked), directory, log)
    found = looked_at(directory, log, 12)
    export(directory, log)
    return found | {"layout": "1 process"}


def stock(name: str, place: Path) -> dict[str, Any]:
    """A recipe of NeMo's own, made long by `extend_recipe`, started by nemo_run."""
    import fiddle as fdl
    import nemo.lightning as nl
    import nemo_run as run
    from nemo.collections import llm

    from nemo_longctx.adapters.megatron import cpu
    from nemo_longctx.adapters.nemo.recipes import extend_recipe

    directory, log = Path("runs").absolute() / f"nemo_{name}", place / f"nemo_{name}.log"

    def work() -> None:
        cpu.install()
        task = getattr(llm, name).pretrain_recipe(dir="runs", name=directory.name, num_nodes=1, num_gpus_per_node=1)
        sizes = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 8, "num_query_groups": 2,
                 "kv_channels": 16, "vocab_size": 512}  # fmt: skip
        for key, value in sizes.items():
            setattr(task.model.config, key, value)
        trainer = task.trainer
        trainer.accelerator, trainer.plugins = "cpu", run.Config(nl.MegatronMixedPrecision, precision="32")
        strategy = trainer.strategy
        strategy.tensor_model_parallel_size = strategy.pipeline_model_parallel_size = strategy.context_parallel_size = 1
        strategy.virtual_pipeline_model_parallel_size, strategy.sequence_parallel = None, False
        strategy.ckpt_async_save = strategy.ckpt_parallel_load = False
        task.optim.config.bf16, task.optim.lr_scheduler.warmup_steps = False, 1
        trainer.log_every_n_steps = 1
        trainer.callbacks = []  # speed settings of a GPU
        held = [{"name": "holdout", "path": "data/holdout", "seq_length": 64, "samples": 8}]
        trainer.val_check_interval, trainer.limit_val_batches = 4, 8
        stages = [{"until": 0.5, "seq_length": 64}, {"until": 1.0, "seq_length": 256}]
        task.log.ckpt.every_n_train_steps = 3
        task.log.ckpt.train_time_interval = None
        extended = extend_recipe(
            task,
            data={"mix": {"sources": [{"path": "data/corpus"}]}, "validation": held, "tokenizer": "tokenizer"},
            curriculum={"stages": stages, "tokens_per_step": 2048, "total_tokens": 12 * 2048},
            rope={"variant": "abf", "base": 500_000.0},
        )
        with cpu.stock_configs():
            built = fdl.build(extended)
        built()

    from nemo_longctx.checkpoints import checkpoints

    first = Ranks(1, work, log)
    ended = first.wait(600, until=lambda: bool(checkpoints(directory)))
    if ended is not None:
        raise RuntimeError(f"ended with {ended} before a checkpoint: {log.read_text(errors='replace')[-3000:]}")
    first.kill()
    first.wait(30)
    must(1, work, log)
    with log.open("a") as file:
        file.write("is finished already\n")  # nemo_run's road has no such word
    found = looked_at(directory, log, 12, named=11)  # NeMo's own callback counts from 0
    export(directory, log)
    return found | {"layout": "1 process"}


def prepare(place: Path) -> None:
    """The corpora that the recipes name, from this repository's own text."""
    from nemo_longctx.cli import main

    files = sorted((HERE.parent / "docs").glob("*.md")) + [HERE.parent / "CHANGELOG.md", HERE.parent / "README.md"]
    files += sorted((HERE.parent / "nemo_longctx").glob("*.py"))
    common = ["--tokenizer", "tokenizer", "--append-eod"]
    # Documents of many lengths: pieces of the files, and their paragraphs.
    # None is longer than a mix of 24,576 tokens can place: 6,000 characters are some 2,000 tokens.
    texts = [file.read_text(encoding="utf-8") for file in files]
    texts = [text[start : start + 6000] for text in texts for start in range(0, len(text), 6000)]
    parts = [part for text in texts for part in text.split("\n\n") if part.strip()]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *parts]))
    args = ["prepare", "texts.jsonl", "--output", "data/corpus", *common, "--train-tokenizer", "500", "--holdout", "0.1"]
    if main(args):
        raise RuntimeError("prepare failed")
    os.rename("data/corpus_holdout.bin", "data/holdout.bin")
    os.rename("data/corpus_holdout.idx", "data/holdout.idx")
    os.rename("data/corpus_holdout.json", "data/holdout.json")
    Path("runs/data").mkdir(parents=True)
    for suffix in ("bin", "idx", "json"):
        for to in ("data/llama2_sources", "data/new_long_text", "runs/data/corpus"):
            os.link(f"data/corpus.{suffix}", f"{to}.{suffix}")
        os.link(f"data/holdout.{suffix}", f"runs/data/corpus_holdout.{suffix}")
    os.symlink(Path("tokenizer").absolute(), "runs/data/tokenizer")
    for name, words in (("short", 3), ("long", 20)):
        rows = [[("user", "captain " * words + f"{i}?"), ("assistant", f"It is {i}.")] for i in range(60)]
        lines = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def one(name: str, place: Path) -> dict[str, Any]:
    kinds: dict[str, Callable[[str, Path], dict[str, Any]]] = {SFT: tuning, NEMO: stock}
    began = time.monotonic()
    kind = next((kind for kind in kinds if name.startswith(kind)), None)
    try:
        found = kinds[kind](name.removeprefix(kind), place) if kind else recipe(name, place)
    except Exception as error:  # each is tried, whatever the others do
        found = {"failed": str(error)}
    return {"name": name, **found, "seconds": round(time.monotonic() - began)}


def table(records: Sequence[dict[str, Any]]) -> str:
    keys = ("name", "layout", "RoPE", "steps", "validations", "checkpoint", "seconds")
    lines = [f"| {' | '.join(keys)} |", f"|{' --- |' * len(keys)}"]
    for record in records:
        cells = [str(record.get(key, "")) for key in keys] if "failed" not in record else [record["name"], "FAILED", *[""] * 5]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--output", type=Path, help="PATH.md is written")
    parser.add_argument("--folder", type=Path, help="where runs and logs are kept; a temporary one without")
    args = parser.parse_args()
    output = args.output.absolute() if args.output else None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shipped_")))
        place = folder.absolute()
        place.mkdir(parents=True, exist_ok=True)
        os.chdir(place)
        if not Path("short.jsonl").exists():
            prepare(place)
        # What the forks need not import again.
        import nemo_longctx.adapters.nemo.launch.instruct_run
        import nemo_longctx.adapters.nemo.recipes
        import nemo_longctx.commands.export  # noqa: F401

        records = []
        for name in args.names or names():
            records.append(one(name, place))
            print(json.dumps(records[-1]), flush=True)
        if output:
            output.with_suffix(".md").write_text(table(records))
        os.chdir("/")
    return 1 if any("failed" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
