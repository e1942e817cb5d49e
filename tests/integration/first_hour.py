"""A stranger's first hour, with nothing but the wheel: `init` and the commands that it prints, then eval and export.

    python tests/integration/first_hour.py FOLDER [--family llama|qwen2|mistral] [--wheel FILE] [--python VENV_PYTHON]

Builds the wheel from the tree, installs it into a virtual environment that sees the installed packages, and works away from
the checkout, in folders whose names have spaces: a small random model that transformers saved, a folder of text. Commands are
typed as they are printed or documented; one that ends with another status than 0 ends the script, with its output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINED, TARGET, TOKENS = 64, 256, 8 * 4 * 256  # two lengths; eight steps of four windows
FAMILIES = ("llama", "qwen2", "mistral")
TASK = """task: echo
dataset_path: json
dataset_kwargs: {data_files: {test: TEST}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list: [{metric: perplexity}]
"""


class Steps:
    """Runs commands in one folder with the installed package alone, and keeps their seconds."""

    def __init__(self, folder: Path, python: Path):
        self.folder, self.python = folder, python
        self.seconds: dict[str, float] = {}
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.env = kept | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

    def run(self, name: str, *words: str | Path, cwd: Path | None = None) -> str:
        """Type one command; its standard output."""
        began = time.monotonic()
        command = [str(word) for word in words]
        done = subprocess.run(command, cwd=cwd or self.folder, env=self.env, capture_output=True, text=True, check=False)
        self.seconds[name] = time.monotonic() - began
        print(f"{name:12} {self.seconds[name]:6.1f} s  {shlex.join(command)[:150]}", flush=True)
        if done.returncode:
            raise SystemExit(f"{name} ended with status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
        return done.stdout


def build(folder: Path, kind: str = "wheel") -> Path:
    """The wheel, or the `sdist`, of this tree, by the build backend of the environment."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    copy = folder / "tree"
    for name in files_of_the_tree():
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.unlink(missing_ok=True)
            target.symlink_to(os.readlink(source))
        else:
            target.write_bytes(source.read_bytes())
    said = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=copy, check=True, capture_output=True, text=True)
    return folder / said.stdout.splitlines()[-1]


def files_of_the_tree() -> list[str]:
    """Names of the files that are kept, as git lists them; of an unpacked source archive all."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [name for name in listed.split("\0") if name and (ROOT / name).exists()]
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def install(wheel: Path, venv: Path) -> Path:
    """A virtual environment with the wheel alone, beside what is installed here; its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    # Lines of such a file are folders, without the .pth files in them: an editable install there is not seen.
    (site / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(venv / "bin" / "python"),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, "--force-reinstall", str(wheel)], check=True)
    return venv / "bin" / "python"


def save_model(family: str, folder: Path, texts: list[str]) -> None:
    """A small random model and tokenizer as transformers saves them."""
    import torch
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import byte_tokenizer
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": TRAINED}  # fmt: skip
    config = {
        "llama": lambda: LlamaConfig(**sizes),
        "qwen2": lambda: Qwen2Config(**sizes, tie_word_embeddings=True, rope_theta=1e6),
        "mistral": lambda: MistralConfig(**sizes, sliding_window=None),
    }[family]()
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32 if family == "llama" else torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB" if family == "qwen2" else "5GB")
    byte_tokenizer(texts, vocab=400).save_pretrained(folder)


def stories(folder: Path) -> list[str]:
    """Text files in folders, of names with spaces; their texts."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghiklmnoprstuvw", k=draw.randint(2, 7))) for _ in range(200)]
    texts = []
    for number in range(40):
        text = "\n".join(" ".join(draw.choices(words, k=12)) + "." for _ in range(30))
        path = folder / f"shelf {number % 3}" / f"story {number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        texts.append(text)
    return texts


def first_hour(folder: Path, family: str, *, wheel: Path | None = None, python: Path | None = None) -> dict[str, float]:
    """All of it; seconds by step.

    Args:
        folder: where everything goes.
        family: of the model.
        wheel: to install; None builds it from this tree.
        python: of an environment that has the package already; None makes one from the wheel.
    """
    work = folder / "my work"
    work.mkdir(parents=True)
    texts = stories(work / "some texts")
    model = work / "models" / f"tiny {family}"
    save_model(family, model, texts)
    began = time.monotonic()
    if python is None:
        python = install(wheel or build(folder), folder / "an environment")
    steps = Steps(work, python.absolute())
    steps.seconds["install"] = time.monotonic() - began
    where = steps.run("where", python, "-c", "import nemo_longctx; print(nemo_longctx.__file__)").strip()
    if Path(where).is_relative_to(ROOT):
        raise SystemExit(f"the checkout is imported, not the wheel: {where}")

    said = steps.run("init", "nemo-longctx", "init", "--checkpoint", f"models/tiny {family}", "--target", str(TARGET),
                     "--data", "some texts", "--tokens", str(TOKENS), "--name", "mine").splitlines()  # fmt: skip
    for line in said[said.index("next:") + 1 :]:
        words = shlex.split(line)
        steps.run(words[1] if words[0] == "nemo-longctx" else "train", *words)
    steps.run("eval", "nemo-longctx", "eval", "runs/mine", "--corpus", "data/some texts_holdout", "--max-length", str(TARGET))
    steps.run("export", "nemo-longctx", "export", "runs/mine", "runs/mine-hf")
    generate = (
        "from transformers import pipeline; "
        "print(pipeline('text-generation', 'runs/mine-hf')('once upon', max_new_tokens=8)[0]['generated_text'])"
    )
    steps.run("generate", python, "-c", generate)
    (work / "tasks").mkdir()
    test = work / "tasks" / "test.jsonl"
    test.write_text("".join(json.dumps({"question": text[:90], "answer": text[91:99]}) + "\n" for text in texts[:4]))
    (work / "tasks" / "echo.yaml").write_text(TASK.replace("TEST", json.dumps(str(test))))
    harness = ["-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=runs/mine-hf", "--tasks", "tasks/echo.yaml"]
    said_by_harness = steps.run("lm_eval", python, *harness, "--device", "cpu", "--batch_size", "1")
    if "perplexity" not in said_by_harness:
        raise SystemExit(f"lm_eval gave no score:\n{said_by_harness}")
    return steps.seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty or new folder")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--wheel", type=Path, help="install this one rather than build one")
    parser.add_argument("--python", type=Path, help="of an environment that has the package")
    args = parser.parse_args()
    seconds = first_hour(args.folder.absolute(), args.family, wheel=args.wheel, python=args.python)
    print(f"{'total':12} {sum(seconds.values()):6.1f} s")
