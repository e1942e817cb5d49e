"""docs/quickstart.md, or the README, as it is printed, with what a reader brings made small: two checkpoints, some text.

    python tests/integration/quickstart.py FOLDER [--page README.md]

Every shell line runs in FOLDER as it stands, `make` and `pip` aside, which are runs of their own. What only a cluster has is
made small on the command line: `scale=tiny` and two processes behind the line of torchrun, a dry run in place of Slurm. A
command that ends with another status than 0 ends the script.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from first_hour import ROOT, Steps, save_model, stories


def shell_lines(page: str) -> list[str]:
    """Commands of a page, in its order."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "make ", "pip "))]


def bring(folder: Path) -> None:
    """`my_model_hf`, `my_texts`, `/ckpt/llama2_7b_hf` as `ckpt/llama2_7b_hf`, `books.jsonl.zst` and `papers/`."""
    import json

    import zstandard

    texts = []
    for part in range(30):
        texts.append("\n".join(stories(folder / "stories" / str(part))))
    for name, some in (("my_texts", texts[:20]), ("papers", texts[20:25])):
        (folder / name).mkdir()
        for number, text in enumerate(some):
            (folder / name / f"{number}.txt").write_text(text, encoding="utf-8")
    for number in range(400):  # shorter than the recipe's lengths made small
        (folder / "papers" / f"a note {number}.txt").write_text(f"note {number}", encoding="utf-8")
    books = "".join(json.dumps({"text": text}) + "\n" for text in texts[25:])
    (folder / "books.jsonl.zst").write_bytes(zstandard.compress(books.encode()))
    for name in ("my_model_hf", "ckpt/llama2_7b_hf"):
        save_model("llama", folder / name, texts[:3])


def small(line: str, folder: Path) -> list[str]:
    """The words of a line, with what only a cluster has made small."""
    words = [word.replace("/ckpt/", f"{folder}/ckpt/") for word in shlex.split(line, comments=True)]
    if "--nnodes" in words:  # one node of two processes
        at = words.index("--nnodes")
        del words[at : at + 6]
        words[words.index("--nproc-per-node") + 1] = "2"
        words = [word for word in words if not word.startswith("trainer.num_nodes=")]
        # The checkpoint that was brought is no Llama 2 7B.
        words += [
            "scale=tiny",
            "trainer.accelerator=cpu",
            "trainer.precision=auto",
            "data.validation=[]",
            "model=from_checkpoint",
        ]
    elif words[0] == "nemo":
        words += ["--dryrun", "-y"]
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty or new folder")
    parser.add_argument("--page", default="docs/quickstart.md")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    bring(folder)
    steps = Steps(folder, Path(sys.executable))
    for number, line in enumerate(shell_lines(args.page)):
        steps.run(f"line {number + 1}", *small(line, folder))
    print(f"{'total':12} {sum(steps.seconds.values()):6.1f} s")


if __name__ == "__main__":
    main()
