"""An hour and a half of training with validation, evaluation and checkpoints: memory, threads and open files must not grow.

    python benchmarks/soak.py --minutes 90 --output benchmarks/soak

The real command trains the tiny recipe on this repository's own text, with validation, a checkpoint and an
evaluation (loss by position, probes that generate) every few steps. Every few seconds the command and its children are looked
at in /proc: anonymous memory (a page that a forked worker shares with the trainer counts once), that of the largest process,
the trainer, by itself, threads and open files. Then it is ended by SIGTERM. Of each figure a line is fitted to the last
`KEPT` of the time: the slope must be 0 within the noise. It writes OUTPUT.csv and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from shipped_recipes import prepare

KEPT = 0.5  # caches and arenas fill for some 30 minutes
BLOCKS = 12  # means of so many parts of the time are fitted: samples beside each other are not independent
FIGURES = ("memory_mib", "trainer_mib", "threads", "files")


def overrides(place: Path, steps: int) -> list[str]:
    """Validation every 20 steps, a checkpoint every 30, an evaluation every 40."""
    tasks = (
        "{kind: position, corpus: data/holdout, seq_length: 64, documents: 8, bins: 4, guard: true}",
        "{kind: context, corpus: data/holdout, contexts: [16, 64], targets: 16, documents: 8}",
        "{kind: probes, text: data/holdout, probes: {kinds: [passkey], lengths: [128], depths: [0.5], samples: 2}}",
    )
    step = 2048
    return [
        "recipe=tiny_cpu_base", "scale=tiny", "name=soak", f"output_dir={place}/runs", "data.tokenizer=tokenizer",
        "data.mix.sources=[{path: data/corpus}]", "data.num_workers=1",
        "data.validation=[{name: held, path: data/holdout, seq_length: 64, samples: 8}]",
        f"eval={{tasks: [{', '.join(tasks)}], every: 40, guard: {{action: warn}}}}",
        "curriculum.stages=[{until: 1.0, seq_length: 128}]",
        f"curriculum.tokens_per_step={step}", f"curriculum.total_tokens={step * steps}",
        f"trainer.val_every_tokens={20 * step}", f"checkpoint.every_tokens={30 * step}", "checkpoint.keep_last=2",
    ]  # fmt: skip


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [each for child in task.read_text().split() for each in family(int(child))]
    return found


def look(pid: int) -> dict[str, float]:
    """Memory, threads and open files of a process and all below it, and how many they are."""
    found = dict.fromkeys(FIGURES, 0.0)
    members = family(pid)
    for each in members:
        try:
            rollup = kilobytes(Path(f"/proc/{each}/smaps_rollup"))
            found["files"] += len(os.listdir(f"/proc/{each}/fd"))
            found["threads"] += len(os.listdir(f"/proc/{each}/task"))
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        found["memory_mib"] += rollup["Pss_Anon"] / 1024
        found["trainer_mib"] = max(found["trainer_mib"], rollup["Anonymous"] / 1024)
    return {**found, "processes": len(members)}


def kilobytes(rollup: Path) -> dict[str, int]:
    """The figures of a process's memory by name."""
    lines = (line.split() for line in rollup.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def slope(minutes: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Growth an hour and its standard error, of medians of `BLOCKS` parts of the time."""
    blocks = np.array_split(np.arange(len(values)), BLOCKS)
    x = np.array([minutes[block].mean() / 60 for block in blocks])
    y = np.array([np.median(values[block]) for block in blocks])
    fit, residuals, *_ = np.polyfit(x, y, 1, full=True)
    spread = float(residuals[0]) if len(residuals) else 0.0
    return float(fit[0]), float(np.sqrt(spread / (BLOCKS - 2) / ((x - x.mean()) ** 2).sum()))


def watch(process: subprocess.Popen[bytes], log: Path, minutes: float, every: float) -> list[dict[str, float]]:
    """Samples while the run trains, then SIGTERM. Counted is from the first row of `log` on."""
    rows: list[dict[str, float]] = []
    began = None
    while process.poll() is None:
        time.sleep(every)
        steps = len(log.read_text().splitlines()) - 1 if log.exists() else 0
        if steps < 1:
            continue
        began = began or time.monotonic()
        past = (time.monotonic() - began) / 60
        try:
            rows.append({"minutes": round(past, 3), "rows": steps, **look(process.pid)})
        except (FileNotFoundError, ProcessLookupError):
            continue
        if past >= minutes:
            process.send_signal(signal.SIGTERM)
            process.wait(300)
    return rows


def report(rows: list[dict[str, float]], status: int) -> tuple[str, bool]:
    """The figures as Markdown, and whether none of them grows."""
    kept = [row for row in rows if row["minutes"] >= (1 - KEPT) * rows[-1]["minutes"]]
    minutes = np.array([row["minutes"] for row in kept])
    lines = [
        f"`python benchmarks/soak.py`: {rows[-1]['minutes']:.0f} minutes, {rows[-1]['rows']:.0f} rows of `training.csv`, "
        f"{len(rows)} samples; ended by SIGTERM with status {status}. Slopes are of the last {KEPT:.0%} of the time.",
        "",
        "| figure | at the first sample kept | at the last | slope an hour | standard error |",
        "| --- | --- | --- | --- | --- |",
    ]
    flat = status == 143
    for name in FIGURES:
        values = np.array([row[name] for row in kept])
        grows, error = slope(minutes, values)
        lines.append(f"| {name} | {values[0]:,.1f} | {values[-1]:,.1f} | {grows:+,.2f} | {error:,.2f} |")
        flat = flat and grows <= max(2.5 * error, 0.01 * float(np.median(values)))
    return "\n".join(lines) + "\n", flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of the run, which the time ends first")
    parser.add_argument("--output", type=Path, default=Path("soak"))
    args = parser.parse_args()
    output = args.output.absolute()
    environment: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="soak_", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        os.chdir(place)
        prepare(place)
        command = [sys.executable, "-m", "nemo_longctx", "train", *overrides(place, args.steps)]
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            rows = watch(process, place / "runs" / "soak" / "results" / "training.csv", args.minutes, args.every)
        if len(rows) < 2 * BLOCKS:
            print((place / "log").read_text(errors="replace")[-4000:], file=sys.stderr)
            return 1
        os.chdir("/")
    with output.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    text, flat = report(rows, process.returncode)
    output.with_suffix(".md").write_text(text)
    print(text)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
