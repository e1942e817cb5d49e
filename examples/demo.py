"""The whole job on a laptop: a tiny Llama is trained at 256 tokens on real text, then taken to 2,048 by the paper's recipe.

    python examples/demo.py [--data PATH] [--output runs/demo]

Text: the Python sources and documents of the packages installed in this environment, or PATH (JSONL, Parquet, text files).
So small a model learns to look back from text that needs it (`nemo-longctx synth`): first from random strings alone, then, as
the short and the long model, from text of which more than half is made for that. These two read different documents.
Killed at any moment, the same command goes on where it was. At the end, under OUTPUT: summary.json and summary.md,
context.png, lookups.png, loss_by_position.png and training.png, each with its .csv, and hf/, the extended model as Hugging Face
transformers loads it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, TEXT, ONE_FILE = 512, "16MiB", "12KiB"
SHORT, LONG = 256, 2048
# Tokens of made text, in documents as long as the windows, and its share of what is read there. Strings are read twice.
STRINGS, LOOKUPS = "1056Ki", {SHORT: ("768Ki", 0.6), LONG: ("896Ki", 0.65)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="your text: JSONL, Parquet or text files, or a directory of them")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    for name, command in steps(args.output, args.data):
        if not run_step(args.output, name, command):
            return 1
    from nemo_longctx.adapters.nemo.evaluation.demo_report import write_report

    return write_report(args.output, json.loads((args.output / "steps.json").read_text()))


def steps(output: Path, data_of_user: Path | None) -> list[tuple[str, list[str]]]:
    """The commands of the demo, each one that a user can type."""
    tool = [str(Path(sys.executable).parent / "nemo-longctx")]
    own = ["--glob", "*.py", "--glob", "*.md", "--glob", "*.rst", "--glob", "*.txt", "--on-error", "skip",
           "--max-file-bytes", ONE_FILE]  # fmt: skip
    text = [str(data_of_user)] if data_of_user else [sysconfig.get_path("purelib"), *own]
    data = f"{output}/data"
    tokenizer, corpus = f"{data}/tokenizer", f"{data}/corpus"
    prepare = [*tool, "prepare", *text, "--output", corpus, "--tokenizer", tokenizer, "--train-tokenizer", str(VOCABULARY),
               "--train-tokenizer-bytes", "4MiB", "--max-input-bytes", TEXT, "--holdout", "0.06"]  # fmt: skip
    prose = [str(data_of_user)] if data_of_user else [sysconfig.get_path("purelib"), "--glob", "*.md", "--glob", "*.rst"]

    def made(name: str, length: int, tokens: str, *how: str) -> list[tuple[str, list[str]]]:
        """Text of one kind, and its corpus."""
        text, told = f"{data}/{name}.jsonl", ["--tokenizer", tokenizer]
        synth = [*tool, "synth", *prose, "--output", text, *told, "--length", str(length), "--tokens", tokens, *how]
        return [(f"synth_{name}", synth), (f"prepare_{name}", [*tool, "prepare", text, "--output", f"{data}/{name}", *told])]

    def train(recipe: str, sources: dict[str, float], *more: str) -> list[str]:
        named = ", ".join(f"{{path: {path}, weight: {weight:g}}}" for path, weight in sources.items())
        # So few tokens are few documents: their shares come out as they can, and are printed.
        return [sys.executable, str(ROOT / "examples" / "megatron_gpt_continual.py"), f"output_dir={output}",
                f"data.mix.sources=[{named}]", "data.mix.share_tolerance=0.5", f"recipe={recipe}", *more]  # fmt: skip

    steps = [("prepare", prepare), *made("repeats", 128, STRINGS, "--kinds", "repeats")]
    mixes = {}
    for length, (tokens, share) in LOOKUPS.items():
        steps += made(f"lookups_{length}", length, tokens, "--kinds", "codes=0.5,rounds=0.5", "--filler", "0.8")
        mixes[length] = {corpus: 1 - share, f"{data}/lookups_{length}": share}
    repeats, base, long = (f"{output}/{name}" for name in ("demo_repeats", "demo_base", "demo_long"))
    return [
        *steps,
        ("train_repeats", train("demo_repeats", {f"{data}/repeats": 1.0})),
        ("train_base", train("demo_base", mixes[SHORT], f"restore_from={repeats}")),
        # Behind what the base read, so that the extended model owes nothing to text that it knows.
        ("train_long", train("demo_long", mixes[LONG], f"restore_from={base}", f"data.after={base}")),
        ("export", [*tool, "export", long, f"{output}/hf"]),
    ]


def run_step(output: Path, name: str, command: list[str]) -> bool:
    """Run one command, its output in a log file and its progress here; a step that is done is not run again."""
    record = output / "steps.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    if done.get(name, {}).get("command") == shlex.join(command):
        print(f"{name}: done before, in {done[name]['seconds']} s", flush=True)
        return True
    log = output / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {shlex.join(command)}\n  log: {log}", flush=True)
    if name == "export":  # of a demo that was killed between the export and its record
        shutil.rmtree(output / "hf", ignore_errors=True)
    began = time.monotonic()
    with log.open("ab") as file:
        # Those of the data draw their own bars on the terminal; NeMo's lines go to the log, and its curve is followed here.
        errors = None if name.startswith(("prepare", "synth")) else file
        process = subprocess.Popen(command, stdout=file, stderr=errors, preexec_fn=die_with_parent)
        status = follow(process, output, name)
    if status:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        print(*tail, f"{name} ended with status {status}; the same command goes on from here", sep="\n", file=sys.stderr)
        return False
    seconds = round(done.get(name, {}).get("seconds", 0) + time.monotonic() - began, 1)
    done[name] = {"command": shlex.join(command), "seconds": seconds}
    beside = record.with_suffix(".tmp")
    beside.write_text(json.dumps(done, indent=1))
    beside.replace(record)
    return True


def die_with_parent() -> None:
    """In the child: end when the demo is killed, so that no two trainings write to one directory (Linux prctl(2))."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def follow(process: subprocess.Popen, output: Path, name: str) -> int:
    """Wait for a step; while it trains, show tokens, speed and time left from the curve that it writes."""
    from tqdm import tqdm

    if not name.startswith("train_"):
        return process.wait()
    recipe = name.replace("train", "demo")
    from nemo_longctx.compose import compose
    from nemo_longctx.report.training_log import read_training_log

    total = compose([f"recipe={recipe}"])["curriculum"]["total_tokens"]
    with tqdm(total=total, desc=f"{name} (NeMo takes about 20 s to start)", unit="token", unit_scale=True) as bar:
        while process.poll() is None:
            time.sleep(1)
            rows = [row for row in read_training_log(output / recipe / "results" / "training.csv") if "loss" in row]
            if rows:
                bar.set_postfix(loss=f"{rows[-1]['loss']:.3f}", refresh=False)
                bar.update(rows[-1]["tokens"] - bar.n)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
