"""The tests that touch the host, on each NeMo of the range: environments beside .venv by uv, and a table of what passed.

    python tests/hosts.py [--part] [2.4] [2.6=PATH]...

PATH is an environment that is there; without names all of the range. `--part` runs the first two groups, and writes no table.

What is run is `TESTS`: models built, every RoPE variant under the guard, attention and loss against the host's own,
recomputation, NeMo's own recipes made long, and one run that is killed, goes on, evaluates, and is exported. The table goes to
docs/hosts.md and README.md, between its marks; what failed is printed with the end of its output.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- hosts: made by make test-hosts -->", "<!-- end of hosts -->"

# NeMo -> what it is installed with. Newest last: that one is .venv itself.
HOSTS = {
    "2.4": (
        "nemo_toolkit[lightning]==2.4.1",
        "megatron-core==0.13.1",
        "transformers==4.51.3",
        "ijson",
        "jieba",
        "opencc",
        "pangu==4.0.6.1",
    ),
    "2.5": ("nemo_toolkit[lightning]==2.5.3", "megatron-core==0.14.0", "transformers==4.53.3"),
    "2.6": ("nemo_toolkit[lightning]==2.6.1", "megatron-core==0.15.0", "transformers==4.53.3"),
    "2.7": (),
}
# Beside them: what this package needs, what NeMo imports and does not name, and the tests' own.
MORE = (
    "lightning==2.4.0", "numpy<2", "hydra-core>=1.3", "matplotlib>=3.8", "tokenizers>=0.21", "zstandard", "tqdm", "PyYAML",
    "pyarrow>=15,<26", "nemo_run>=0.11", "leptonai<0.40", "nvidia-modelopt>=0.27", "nvidia-resiliency-ext<1", "rich", "einops",
    "sentencepiece<0.2.3", "tiktoken", "tensorstore", "pandas", "datasets", "lm-eval", "pytest", "pytest-timeout",
    "pytest-xdist", "psutil", "hypothesis", "tensorboard", "wandb",
)  # fmt: skip
RUN = "tests/integration/test_continual_run.py::test_a_rope_choice_trains_resumes_and_exports_by_one_word[pi]"
TESTS = {
    "models, RoPE and guard": ["tests/integration/test_rope_host.py"],
    "attention, loss, recompute": [f"tests/parity/test_{name}_megatron.py" for name in ("attention", "loss", "activations")],
    "kill, resume, evaluation, export": [RUN],
    "import and export": ["tests/integration/test_rope_hf.py"],
    "NeMo's recipes made long": ["tests/integration/test_stock_recipes.py"],
}
PART = "--part"
SHOWN = ("nemo_toolkit", "megatron-core", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Outcome:
    """Tests of one group on one host."""

    passed: int
    failed: int
    skipped: int
    seconds: float

    def __str__(self) -> str:
        told = f"{self.passed} passed" + (f", {self.skipped} skipped" if self.skipped else "")
        return told if not self.failed else f"**{self.failed} failed**, {told}"


def environment(name: str) -> Path:
    """The environment of a host, made where it is not there yet. Returns its Python."""
    if not HOSTS[name]:
        return Path(sys.executable)
    place = ROOT / ".venv-hosts" / name
    python, done = place / "bin" / "python", place / "installed"
    if done.exists():
        return python
    uv = [str(Path(sys.executable).with_name("uv"))]
    torch = next(
        line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line.startswith("torch==")
    )
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", torch], check=True)  # pip takes this machine's build; uv leaves it
    lock = ROOT / "tests" / f"hosts-{name}.lock"  # of the host that CI runs: what was tested is what it gets
    pinned = ["--constraint", lock] if lock.exists() else []
    subprocess.run([*uv, "pip", "install", "-q", "--python", python, torch, *HOSTS[name], *MORE, *pinned], check=True)
    done.touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """Versions of what matters in an environment, and its Python's."""
    code = f"from importlib.metadata import version as v; print(*(v(n) for n in {SHOWN!r}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    said = subprocess.run(
        [python, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True, check=True
    )
    return dict(zip(SHOWN, found, strict=True)) | {"Python": said.stdout.strip()}


def outcome_of(report: Path, seconds: float) -> Outcome:
    """A group's outcome from pytest's JUnit report; without one all of it failed."""
    if not report.exists():
        return Outcome(0, 1, 0, seconds)
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for key in counts:
            counts[key] += int(suite.get(key, 0))
    failed = counts["failures"] + counts["errors"]
    return Outcome(counts["tests"] - failed - counts["skipped"], failed, counts["skipped"], seconds)


def tested(name: str, python: Path, groups: dict[str, list[str]]) -> dict[str, Outcome]:
    """Run these groups on a host."""
    reports = ROOT / "build" / "hosts"
    reports.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outcomes = {}
    for number, (group, tests) in enumerate(groups.items()):
        report = reports / f"{name}-{number}.xml"
        report.unlink(missing_ok=True)
        options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", f"--junit-xml={report}"]
        began = time.monotonic()
        done = subprocess.run(
            [python, "-W", "ignore", "-m", "pytest", *options, *tests], cwd=ROOT, env=env, capture_output=True, text=True
        )
        outcomes[group] = outcome_of(report, time.monotonic() - began)
        print(f"NeMo {name}: {group}: {outcomes[group]} in {outcomes[group].seconds:.0f} s", flush=True)
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", flush=True)
    return outcomes


def table(rows: dict[str, tuple[dict[str, str], dict[str, Outcome]]]) -> str:
    """Markdown: a row a host."""
    head = ["NeMo", *SHOWN[1:], "Python", *TESTS, "seconds"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for there, outcomes in rows.values():
        cells = [there[name] for name in (*SHOWN, "Python")] + [str(outcomes[group]) for group in TESTS]
        lines.append("| " + " | ".join([*cells, f"{sum(o.seconds for o in outcomes.values()):.0f}"]) + " |")
    return "\n".join(lines)


def put_between(text: str, made: str) -> str:
    """`text` with `made` between the marks."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{made}\n{END}", text, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    part = PART in arguments
    groups = dict(list(TESTS.items())[: 2 if part else None])
    arguments = [each for each in arguments if each != PART]
    asked = dict((each.split("=", 1) + [""])[:2] for each in arguments) if arguments else dict.fromkeys(HOSTS, "")
    if wrong := asked.keys() - HOSTS.keys():
        print(
            f"no such host: {', '.join(sorted(wrong))}; choose among {', '.join(HOSTS)}, or one as NAME=PATH", file=sys.stderr
        )
        return 2
    rows = {}
    for name, place in asked.items():
        python = Path(place) / "bin" / "python" if place else environment(name)
        rows[name] = versions(python), tested(name, python, groups)
    if not part:
        made = table(rows)
        print(made)
        for file in (ROOT / "README.md", ROOT / "docs" / "hosts.md"):
            file.write_text(put_between(file.read_text(encoding="utf-8"), made), encoding="utf-8")
    return int(any(outcome.failed for _, outcomes in rows.values() for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
