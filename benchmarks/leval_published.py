"""Published L-Eval predictions scored by the paper repository's code and by ours: the scores have to be equal.

Give it the `Evaluation` folder of OpenLMLab/LEval (at cd34b05) and prediction files of the tasks that we have; it fetches none.

    python benchmarks/leval_published.py --official LEval/Evaluation LEval/Predictions/exam_eval/*/tpo.pred.jsonl ...

Of each file: the samples that the official code scores, its mean and ours in percent, and how many samples differ. The status
is 1 where any does.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import re
import string
import sys
import types
from collections.abc import Callable
from pathlib import Path

from nemo_longctx.eval.tasks import functions
from nemo_longctx.eval.tasks.loaders import LEVAL_SCORED

# Task in a file's name -> our scorer of a sample, and the name of its metric.
OURS = {
    "coursera": (functions.process_options, "accuracy"),
    "tpo": (functions.process_option, "accuracy"),
    "topic_retrieval_longchat": (functions.process_contains, "exact_match"),
    "financial_qa": (functions.process_f1, "f1"),
    "legal_contract_qa": (functions.process_f1, "f1"),
    "natural_question": (functions.process_f1, "f1"),
}
CHOICES = ("coursera", "tpo")


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_scorer(folder: Path, file: Path, task: str) -> Callable[[str, str], float]:
    """What auto_eval.py does with one prediction and one reference; only its functions are run, not its imports."""
    em, f1 = module_of(folder / "em.py"), module_of(folder / "f1.py")
    if task not in (*CHOICES, "topic_retrieval_longchat"):
        return f1.f1_score
    if task not in CHOICES:
        return em.exact_match_score
    tree = ast.parse((folder / "auto_eval.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    space = {"re": re, "string": string, "args": types.SimpleNamespace(pred_file=str(file))}
    exec(compile(tree, "auto_eval.py", "exec"), space)
    return lambda prediction, gt: em.exact_match_score(space["process_output_mc"](prediction), space["process_gt_mc"](gt))


def compare(folder: Path, file: Path) -> tuple[int, float, float, int]:
    """(samples, official mean, ours, samples that differ), means in percent."""
    task = next((name for name in OURS if file.name.startswith(name)), None)
    if task is None:
        raise SystemExit(f"{file}: none of {', '.join(OURS)}")
    official = official_scorer(folder, file, task)
    ours, metric = OURS[task]
    theirs, mine = [], []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line) if line.strip() else {"evaluation": ""}
        if row.get("evaluation") not in LEVAL_SCORED:
            continue
        prediction = next(value for key, value in row.items() if "_pred" in key)
        with contextlib.redirect_stdout(io.StringIO()):
            theirs.append(float(official(prediction, row["gt"])))
        mine.append(ours({"answers": [row["gt"]]}, [prediction])[metric])
    differ = sum(abs(a - b) > 1e-9 for a, b in zip(theirs, mine, strict=True))
    return len(mine), 100 * sum(theirs) / len(theirs), 100 * sum(mine) / len(mine), differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="Evaluation folder of OpenLMLab/LEval")
    parser.add_argument("files", type=Path, nargs="+", help="prediction files")
    args = parser.parse_args()
    wrong = 0
    for file in args.files:
        samples, theirs, mine, differ = compare(args.official, file)
        wrong += differ
        print(f"{file.parent.name + '/' + file.name:<56}{samples:>6}{theirs:>10.4f}{mine:>10.4f}{differ:>5}")
    print(f"{len(args.files)} files, {wrong} samples differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
