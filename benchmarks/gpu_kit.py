"""A folder for a machine with a GPU and no network: the pure-Python wheels that it lacks, this package, benchmarks/gpu.py.

    python benchmarks/gpu_kit.py [--output build/gpu-kit] [--limit-mib 60]

The machine has Python 3.12, torch >= 2.8 for CUDA, numpy 2 and transformers 5, with what these bring (`THERE`). Of all that
requirements.lock holds for a run, the kit has what is there as a wheel for any machine; what is not is named in `LEFT_OUT.txt`:
where it is missing, the part `nemo` of `gpu.py` says so, and the others need none of it. On the machine:

    pip install --no-index --no-deps gpu-kit/wheels/*.whl && python gpu-kit/benchmarks/gpu.py
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# torch, numpy and transformers 5, and what they bring.
THERE = """
torch numpy transformers tokenizers safetensors huggingface-hub hf-xet regex pyyaml requests urllib3 idna certifi
charset-normalizer filelock jinja2 markupsafe sympy mpmath networkx typing-extensions packaging fsspec tqdm triton setuptools
pip click typer shellingham httpx httpcore h11 anyio sniffio
"""
# What a run on a GPU does not use: tools for developers, notebooks, lm-eval, a server's client, Ray.
NOT_FOR_A_RUN = """
uv ruff mypy mypy-extensions pytest pytest-timeout pytest-xdist execnet hypothesis pre-commit virtualenv nodeenv identify cfgv
mkdocs mkdocs-material mkdocs-material-extensions mkdocs-get-deps x-transformers types-pyyaml types-tqdm lm-eval rouge-score
openai ray text-unidecode babel nltk sacrebleu evaluate debugpy ipykernel ipython jedi parso nbclient nbformat jupyter-client
jupyter-core
"""


def wanted() -> list[str]:
    """`name==version` of all that a run needs and the machine has not."""
    passed = {*THERE.split(), *NOT_FOR_A_RUN.split()}
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines if "python_full_version >= '3.13'" not in line]
    found = [(pin[1].lower().replace("_", "-"), pin[2]) for pin in pins if pin]
    return [f"{name}=={version}" for name, version in found if name not in passed and not name.startswith("nvidia-c")]


def fetch(requirements: list[str], wheels: Path) -> list[str]:
    """Download the pure wheels; returns the requirements that have none."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    machine = ["--python-version", "3.12", "--implementation", "py", "--abi", "none", "--platform", "any"]

    def got(requirement: str) -> bool:
        return subprocess.run([*pip, *machine, requirement], capture_output=True, check=False).returncode == 0

    with ThreadPoolExecutor(8) as pool:
        return [name for name, there in zip(requirements, pool.map(got, requirements), strict=True) if not there]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-kit")
    parser.add_argument("--limit-mib", type=float, default=60)
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    wheels = args.output / "wheels"
    wheels.mkdir(parents=True)
    left = fetch(wanted(), wheels)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True)
    shutil.copytree(ROOT / "benchmarks", args.output / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (args.output / "LEFT_OUT.txt").write_text("".join(f"{name}\n" for name in left), encoding="utf-8")
    sizes = {file: file.stat().st_size for file in args.output.rglob("*") if file.is_file()}
    total = sum(sizes.values()) / 2**20
    print(f"{args.output}: {len(list(wheels.glob('*.whl')))} wheels, {total:.1f} MiB; not pure, left out: {', '.join(left)}")
    if total > args.limit_mib:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        print(f"over {args.limit_mib:.0f} MiB: {', '.join(file.name for file in largest)} are the largest", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
