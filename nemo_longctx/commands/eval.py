"""`nemo-longctx eval CHECKPOINT`: loss by position, probes and lm-eval tasks of a NeMo or Hugging Face checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_longctx.config import ConfigError

if TYPE_CHECKING:
    from nemo_longctx.eval.suite import SuiteResult


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A suite file holds a list `tasks` of blocks {kind: position | probes | lm_eval, ...}; the options below add to it. "
        "Several checkpoints give one page that compares them."
    )
    parser.add_argument("checkpoints", nargs="+", help="NeMo 2 checkpoints or runs, or Hugging Face models (folder or name)")
    parser.add_argument("--suite", type=Path, help="YAML file of tasks")
    parser.add_argument("--corpus", help="prefix of a held-out .bin/.idx: loss by position, and the fit of L(c)")
    parser.add_argument("--probes", metavar="TEXT", help="JSONL or text file: first-sentence, passkey and needle probes in it")
    parser.add_argument("--tasks", default="", help="lm-eval tasks, by comma: longctx_research, zeroscrolls, leval, ...")
    parser.add_argument("--data", help="folder or file of the tasks' published data (default: the hub)")
    parser.add_argument("--limit", type=int, help="samples of each lm-eval task")
    parser.add_argument(
        "--lengths", default="", help="probe lengths in tokens, by comma (default: the paper's up to the model's)"
    )
    parser.add_argument("--max-length", type=int, help="tokens the model may read (default: what it was made for)")
    parser.add_argument("--tokenizer", help="Hugging Face tokenizer (default: the checkpoint's)")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of results (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.max_length is not None and args.max_length < 2:
        raise ConfigError("--max-length", args.max_length, "give at least 2 tokens")
    from importlib.metadata import version

    from nemo_longctx.adapters.lm_eval import LongContextLM
    from nemo_longctx.eval.scaling import fit_curve, read_curves
    from nemo_longctx.eval.suite import Suite, parse_tasks
    from nemo_longctx.report.evaluation import write_results
    from nemo_longctx.report.plots import plot_context_law

    results: list[SuiteResult] = []
    seen: dict[str, dict[str, Any]] = {}
    for checkpoint in args.checkpoints:
        lm = LongContextLM(
            checkpoint, tokenizer=args.tokenizer, max_length=args.max_length, results_cache=str(args.out / "cache.db")
        )
        blocks = task_blocks(args, lm.max_length)
        suite = Suite(parse_tasks(blocks), tokenizer=lm.tokenizer)

        def harness(task, lm=lm):
            from nemo_longctx.adapters.harness import run_harness

            return run_harness(task, lm)

        result = suite.run(lm.causal, name=Path(checkpoint).name, harness=harness)
        results.append(result)
        seen[result.model] = {"path": checkpoint, **lm.identity, "tasks": blocks}
        for key, value in result.scalars().items():
            print(f"{result.model}  {key:<40}{value:>12.4f}")
        for task, why in result.errors.items():
            print(f"{result.model}  {task} failed: {why}")
    versions = {name: version(name) for name in ("torch", "transformers", "lm-eval")}
    page = write_results(args.out, results, provenance={"checkpoints": seen, "versions": versions})
    if args.corpus:
        for table in sorted(args.out.glob("loss_by_position_*.csv")):
            curves = read_curves(table)
            try:
                laws = {model: fit_curve(curve) for model, curve in curves.items()}
            except ValueError as error:
                print(f"no fit of L(c) for {table.name}: {error}")
                continue
            plot_context_law(curves, laws, table.with_suffix(".fit.png"))
            for model, law in laws.items():
                print(f"{model}  L(c) = ({law.alpha:.4g}/c)^{law.beta:.3f} + {law.gamma:.3f}")
    print(f"wrote {page}")
    return 1 if any(result.errors for result in results) else 0


def task_blocks(args: argparse.Namespace, max_length: int) -> list[dict]:
    """The suite file's tasks and those of the options.

    Raises:
        ConfigError: nothing to measure, or a suite file without `tasks`.
    """
    blocks: list[dict] = []
    if args.suite:
        import yaml

        loaded = yaml.safe_load(args.suite.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict) or not isinstance(loaded.get("tasks"), list):
            raise ConfigError("--suite", str(args.suite), "needs a list `tasks` of blocks {kind: ...}")
        blocks += loaded["tasks"]
    if args.corpus:
        blocks.append({"kind": "position", "corpus": args.corpus, "seq_length": max_length - 1, "bins": 0})
    if args.probes:
        from nemo_longctx.eval.probes import PAPER_LENGTHS

        lengths = [int(n) for n in args.lengths.split(",") if n] or [n for n in PAPER_LENGTHS if n < max_length - 64]
        kinds = ["first_sentence", "passkey", "needle"]
        blocks.append({"kind": "probes", "text": args.probes, "probes": {"kinds": kinds, "lengths": lengths}})
    if args.tasks:
        metadata = {"data": args.data} if args.data else {}
        tasks = [name for name in args.tasks.split(",") if name]
        ours = all(name.startswith(("longctx_", "zeroscrolls", "leval")) for name in tasks)
        more = not ours or bool({"longctx_short", "longctx_safety"} & set(tasks))
        blocks.append({"kind": "lm_eval", "tasks": tasks, "limit": args.limit, "metadata": metadata, "include_defaults": more})
    if not blocks:
        raise ConfigError("--suite", None, "nothing to measure; give --suite, --corpus, --probes or --tasks")
    return blocks
