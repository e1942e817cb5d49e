"""From the command to the first step: how long, and whose time it is.

The tiny recipe is started `--rounds` times on random text and ended behind its first step. Between, the host is imported alone
in a fresh process under `-X importtime`, and the time of each package's own modules is summed up.

    python benchmarks/start_up.py
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOST = "nemo_longctx.adapters.nemo.launch.run"
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")


def make_text(place: Path) -> None:
    """A corpus of random documents."""
    import numpy as np

    from nemo_longctx.data.writer import CorpusWriter

    rng = np.random.default_rng(0)
    with CorpusWriter(place / "text", np.uint16) as writer:
        for _ in range(200):
            writer.add_document(rng.integers(0, 512, rng.integers(20, 2000)))


def first_step(place: Path, number: int) -> dict[str, float]:
    """Seconds until the run's first row is there, and until the dry run of the same recipe has ended."""
    words = [sys.executable, "-m", "nemo_longctx", "train", "recipe=tiny_cpu_base", f"output_dir={place}", f"name=run{number}",
             "data.tokenizer=null", "model.vocab_size=512", f"data.mix.sources=[{{path: {place}/text}}]", "data.validation=[]",
             "trainer.log_every_n_steps=1"]  # fmt: skip
    log = place / f"run{number}" / "results" / "training.csv"
    began = time.monotonic()
    subprocess.run([*words, "--dry-run"], check=True, capture_output=True)
    checked = time.monotonic() - began
    began = time.monotonic()
    with open(place / "said", "w") as said:
        run = subprocess.Popen(words, stdout=said, stderr=said)
        while not (log.exists() and len(log.read_text().splitlines()) > 1):
            if run.poll() is not None:
                raise RuntimeError(f"ended with {run.returncode} before its first step: {(place / 'said').read_text()[-2000:]}")
            time.sleep(0.05)
        seconds = time.monotonic() - began
        run.send_signal(signal.SIGKILL)
        run.wait()
    return {"first step": seconds, "dry run": checked}


def imports() -> tuple[float, dict[str, float]]:
    """Seconds of importing the host, and of the modules of each package by themselves."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {HOST}"], check=True, capture_output=True)
    seconds = time.monotonic() - began
    command = [sys.executable, "-X", "importtime", "-W", "ignore", "-c", f"import {HOST}"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    packages: collections.Counter[str] = collections.Counter()
    for own, module in LINE.findall(said):
        packages[module.split(".")[0]] += int(own)
    whole = packages.total()
    return seconds, {name: own / whole for name, own in packages.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the data to this file as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_text(Path(folder))
        runs, times, shares = [], [], []
        for number in range(args.rounds):
            runs.append(first_step(Path(folder), number))
            seconds, share = imports()
            times.append(seconds)
            shares.append(share)
            print(f"round {number + 1}: {runs[-1]}, import alone {seconds:.2f} s", flush=True)
    for what in ("dry run", "first step"):
        print(f"  {what:<14}{statistics.median(run[what] for run in runs):7.2f} s")
    print(f"  {'host imported':<14}{statistics.median(times):7.2f} s, of it by package:")
    medians = {name: statistics.median(share.get(name, 0.0) for share in shares) for name in shares[0]}
    for name, share in sorted(medians.items(), key=lambda item: -item[1])[:12]:
        print(f"    {name:<18}{share:6.1%}")
    print(f"    {'nemo_longctx':<18}{medians.get('nemo_longctx', 0):6.1%}")
    if args.json:
        Path(args.json).write_text(json.dumps({"runs": runs, "imports": times, "packages": medians}, indent=1))


if __name__ == "__main__":
    main()
