"""`nemo-longctx eval CHECKPOINT`: loss by position, probes and lm-eval tasks of a NeMo or Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_longctx.config import ConfigError
from nemo_longctx.versions import versions_of

if TYPE_CHECKING:
    from nemo_longctx.eval.results import SuiteResult

OURS = ("longctx_", "zeroscrolls", "leval")  # how the names of our tasks begin
TARGETS = 64  # tokens predicted at each context
HIDDEN = ("ruler", "helmet", "nolima", "mrcr")  # presets of probes in the user's own text
PRESETS = ("longbench2", "infinitebench", "babilong", *HIDDEN)
OPEN = "???"  # what a preset leaves to the user
ANY_LENGTH = 1 << 20  # stands for the model's, to look for mistakes before it is loaded


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A suite file holds a list `tasks` of blocks {kind: position | context | probes | answers | lm_eval, ...}; the options "
        "add to it. Several checkpoints give one page that compares them. A NeMo checkpoint that needs several GPUs, "
        "whatever it was trained on: torchrun --nproc-per-node 8 -m nemo_longctx eval CHECKPOINT --tensor-parallel 8 ..."
    )
    parser.add_argument("checkpoints", nargs="+", help="NeMo 2 checkpoints or runs, or Hugging Face models (folder or name)")
    parser.add_argument("--suite", type=Path, help=f"YAML file of tasks, or a preset: {', '.join(PRESETS)}")
    parser.add_argument(
        "--corpus", help="prefix of a held-out .bin/.idx: loss by position, loss on fixed targets against context, and L(c)"
    )
    parser.add_argument(
        "--contexts",
        default="",
        help="tokens before the fixed targets, by comma; gains are counted from the first, so begin with the old length "
        "(default: halves of what the model and the documents allow)",
    )
    parser.add_argument(
        "--probes",
        metavar="TEXT",
        help="JSONL or text file: first-sentence, passkey and needle probes in it, or those of --suite ruler and the like",
    )
    parser.add_argument("--tasks", default="", help="lm-eval tasks, by comma: longctx_research, zeroscrolls, leval, ...")
    parser.add_argument(
        "--data", help="folder or file of the tasks' published data (default: the hub); of question data for --suite ruler"
    )
    parser.add_argument(
        "--max-prompt", default="", help="prompt lengths of our tasks in tokens, by comma: 4096,8192,32768 (default: 16,384)"
    )
    parser.add_argument(
        "--metadata",
        type=_json,
        default={},
        metavar="JSON",
        help="for the tasks, say '{\"max_seq_lengths\": [4096]}' (RULER)",
    )
    parser.add_argument(
        "--keep-samples",
        action="store_true",
        help="keep each sample's reply, score and cuts: OUT/samples/MODEL/samples_TASK.jsonl",
    )
    parser.add_argument("--limit", type=int, help="samples of each lm-eval task")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="ask lm-eval tasks and probes in the tokenizer's chat template, without thought before the answer",
    )
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="let HumanEval and MBPP run what the model wrote; in a sandbox only"
    )
    parser.add_argument(
        "--lengths", default="", help="probe lengths in tokens, by comma (default: the paper's up to the model's)"
    )
    parser.add_argument("--max-length", type=int, help="tokens the model may read (default: what it was made for)")
    parser.add_argument("--tokenizer", help="Hugging Face tokenizer (default: the checkpoint's)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes that share each layer (default: %(default)s)")
    parser.add_argument(
        "--pipeline-parallel", type=int, default=1, help="processes that share the layers (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of results (default: %(default)s)")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        form = "write '{\"max_seq_lengths\": [4096]}', in quotes of the shell"
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); {form}") from None


def run(args: argparse.Namespace) -> int:
    if args.max_length is not None and args.max_length < 2:
        raise ConfigError("--max-length", args.max_length, "give at least 2 tokens")
    for option in ("tensor_parallel", "pipeline_parallel"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')}", getattr(args, option), "give 1 or more processes")
    import os
    from functools import partial

    from nemo_longctx.data.corpus import open_corpus
    from nemo_longctx.eval.checks import check_eval, plainly_asked, told_together, without_bos
    from nemo_longctx.eval.config import ContextTask, EvalConfig, PositionTask
    from nemo_longctx.eval.suite import HarnessTask, Suite, parse_tasks
    from nemo_longctx.eval.task_names import check_spelling

    # Mistakes are told now, not after models are loaded.
    asked = Suite(parse_tasks(task_blocks(args, args.max_length or ANY_LENGTH)), tokenizer="the checkpoint's").tasks
    from nemo_longctx.adapters.pretrained import check_source

    corpora = [task.corpus for task in asked if isinstance(task, (PositionTask, ContextTask))]
    others = [task for task in asked if not isinstance(task, (PositionTask, ContextTask))]
    harnessed = [task for task in asked if isinstance(task, HarnessTask)]
    told_together(
        *(partial(check_source, checkpoint, args.tokenizer) for checkpoint in args.checkpoints),
        *(partial(open_corpus, corpus) for corpus in corpora),
        partial(check_eval, EvalConfig(tasks=tuple(others))),
        *(partial(check_spelling, task) for task in harnessed),  # before the many seconds of lm-eval's own index
    )
    for task in harnessed:
        from nemo_longctx.adapters.harness import check_names

        check_names(task)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        _tell_replaced(args.out)
    from nemo_longctx.adapters.lm_eval import LongContextLM
    from nemo_longctx.eval.hf import HFCausalModel

    results: list[SuiteResult] = []
    seen: dict[str, dict[str, Any]] = {}
    for checkpoint, name in zip(args.checkpoints, labels(args.checkpoints), strict=True):
        lm = LongContextLM(
            checkpoint,
            tokenizer=args.tokenizer,
            max_length=args.max_length,
            tensor_parallel_size=args.tensor_parallel,
            pipeline_parallel_size=args.pipeline_parallel,
            results_cache=str(args.out / "cache.db"),
            enable_thinking=False,  # tasks leave room for an answer, and none for thought before it
        )
        blocks = task_blocks(args, lm.max_length)
        suite = Suite(parse_tasks(blocks), tokenizer=lm.tokenizer)

        keep = args.out / "samples" / name.replace("/", "_") if args.keep_samples else None

        def harness(task, lm=lm, keep=keep):
            from nemo_longctx.adapters.harness import run_harness

            return run_harness(task, lm, keep=keep)

        result = suite.run(lm.causal, name=name, harness=harness, group=lm.data_group, quiet=not first)
        results.append(result)
        foreign = isinstance(lm.causal, HFCausalModel)
        notes: list[str] = without_bos(suite.tasks, lm.tokenizer) if foreign else []
        notes += plainly_asked(suite.tasks, lm.tokenizer)
        seen[result.model] = {"path": checkpoint, **lm.identity, "tasks": blocks} | ({"notes": notes} if notes else {})
        if first:
            _print(result)
            for note in notes:
                print(f"{result.model}  {note}")
    if first:
        _write(args, results, seen)
    return 1 if any(result.errors for result in results) else 0


def labels(checkpoints: list[str]) -> list[str]:
    """Names of models in tables and figures: the last parts of their paths, as many as tell them apart."""
    parts = [Path(checkpoint).parts for checkpoint in checkpoints]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("checkpoints", checkpoints, "one of them is given twice")


def _tell_replaced(out: Path) -> None:
    """Say which evaluation the one that begins will take the place of."""
    from nemo_longctx.files import read_mapping
    from nemo_longctx.report.evaluation import RECORD

    before = read_mapping(out / RECORD).get("results")
    models = (
        [str(one["model"]) for one in before if isinstance(one, dict) and "model" in one] if isinstance(before, list) else []
    )
    if models:
        kept = "replies to tasks that were asked already are kept in its cache.db"
        what = f"{out} holds an evaluation of {', '.join(dict.fromkeys(models))}, whose place this one takes"
        print(f"{what} ({kept}); to keep both, stop now and name another folder by --out", file=sys.stderr)


def _print(result: SuiteResult) -> None:
    for key, value in result.scalars().items():
        whole = math.isfinite(value) and value == int(value) and abs(value) >= 10  # a length, a count
        print(f"{result.model}  {key:<40}{value:>12,.0f}" if whole else f"{result.model}  {key:<40}{value:>12.4f}")
    for task, why in result.errors.items():
        print(f"{result.model}  {task} failed: {why}")


def _write(args: argparse.Namespace, results: list[SuiteResult], seen: dict[str, dict[str, Any]]) -> None:
    """JSON, CSV, figures and the page; and the fit of L(c) where a corpus was read."""
    from nemo_longctx.report.evaluation import write_results

    versions = versions_of("torch", "transformers", "lm-eval")
    notes = [f"{model}: {note}." for model, said in seen.items() for note in said.get("notes", ())]
    if len({said["tokenizer"] for said in seen.values()}) > 1:
        notes.append(
            "These models have different tokenizers: a loss per token and a length in tokens are of other text in each, and "
            "are not compared."
        )
    page = write_results(args.out, results, provenance={"checkpoints": seen, "versions": versions}, notes=notes)
    print(f"wrote {page}")


def task_blocks(args: argparse.Namespace, max_length: int) -> list[dict]:
    """The suite file's tasks and those of the options.

    Raises:
        ConfigError: nothing to measure, a suite file without `tasks`, or an option that would have no effect.
    """
    _check_partners(args)
    blocks: list[dict] = []
    if args.suite:
        blocks += [_filled(block, args) for block in read_suite(args.suite)]
    if args.corpus:
        blocks.append({"kind": "position", "corpus": args.corpus, "seq_length": max_length - 1, "bins": 0})
        if contexts := _numbers("--contexts", args.contexts) or _default_contexts(args.corpus, max_length):
            blocks.append({"kind": "context", "corpus": args.corpus, "contexts": contexts, "targets": TARGETS})
    if args.probes and not any(block.get("kind") == "probes" for block in blocks if isinstance(block, dict)):
        from nemo_longctx.eval.probes import PAPER_LENGTHS

        lengths = _numbers("--lengths", args.lengths) or [n for n in PAPER_LENGTHS if n < max_length - 64]
        kinds = ["first_sentence", "passkey", "needle"]
        asked = {"kinds": kinds, "lengths": lengths, **({"chat": True} if args.chat else {})}
        blocks.append({"kind": "probes", "text": args.probes, "probes": asked})
    if args.tasks:
        blocks += _harness_blocks(args)
    if not blocks:
        raise ConfigError("--suite", None, "nothing to measure; give --suite, --corpus, --probes or --tasks")
    return blocks


def _filled(block: Any, args: argparse.Namespace) -> Any:
    """A preset's block of probes with the text, lengths and question data that the options give.

    Raises:
        ConfigError: the text is left open.
    """
    if not isinstance(block, dict) or block.get("kind") != "probes" or block.get("text") != OPEN:
        return block
    if not args.probes:
        raise ConfigError("--probes", None, f"{args.suite} hides things in text of yours; give --probes TEXT")
    asked = dict(block.get("probes") or {})
    if lengths := _numbers("--lengths", args.lengths):
        asked["lengths"] = lengths
    if args.data:
        asked["data"] = args.data
    if args.chat:
        asked["chat"] = True
    return {**block, "text": args.probes, "probes": asked}


def _default_contexts(corpus: str, max_length: int) -> list[int]:
    """Halves of the longest read that the model and at least some documents allow; none where no document is long enough."""
    from nemo_longctx.data.corpus import open_corpus
    from nemo_longctx.eval.context import halves, length_of_many

    try:
        lengths = open_corpus(corpus).lengths
    except (OSError, ValueError):  # loss by position, which is measured first, says what is wrong with it
        return []
    contexts = halves(length_of_many(lengths, max_length), TARGETS)
    return contexts if len(contexts) > 1 else []


def _check_partners(args: argparse.Namespace) -> None:
    """Refuse options of a kind of task that is not asked for."""
    for partner, names in (
        ("tasks", ("data", "max_prompt", "metadata", "keep_samples", "limit", "chat", "allow_code_execution")),
        ("probes", ("lengths",)),
        ("corpus", ("contexts",)),
    ):
        for name in names:
            value = getattr(args, name)
            if args.probes and (name == "chat" or (name == "data" and args.suite)):  # question answering data of a preset's
                continue
            if value not in (None, False, "", {}) and not getattr(args, partner):
                mend = f"has no effect without --{partner}; give it too (in a suite file each block has keys of its own)"
                raise ConfigError(f"--{name.replace('_', '-')}", value, mend)


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers of tokens, by comma."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isascii() or not part.isdigit() or int(part) < 1:
            raise ConfigError(option, text, f"{part!r} is no whole number of tokens; write them out, by comma: 4096,8192")
    return [int(part) for part in parts]


def read_suite(path: Path) -> list[dict]:
    """The blocks of a suite file.

    Raises:
        ConfigError: it cannot be read, is no YAML, or has no list `tasks`.
    """
    import yaml

    name = str(path)
    preset = Path(__file__).parents[1] / "conf" / "eval" / f"{'ruler' if name in HIDDEN else name}.yaml"
    if not path.exists() and path.name == name and preset.is_file():
        path = preset
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        mend = f"cannot be read ({error.strerror}); give a YAML file of tasks, or {', '.join(PRESETS)}"
        raise ConfigError("--suite", str(path), mend) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("--suite", str(path), f"is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("tasks"), list) or not loaded["tasks"]:
        raise ConfigError("--suite", str(path), "needs a list `tasks` of blocks {kind: ...}")
    if path == preset and name in HIDDEN:  # as RULER: lengths and samples
        return [{**block, "probes": {**block["probes"], "suite": name}} for block in loaded["tasks"]]
    return loaded["tasks"]


def _harness_blocks(args: argparse.Namespace) -> list[dict]:
    """Blocks of lm-eval tasks: ours once for each prompt length; lm-eval's own, which read their data where they always do."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    ours = [name for name in names if name.startswith(OURS) and name != "longctx_short"]
    others = [name for name in names if name not in ours]
    prompts = _numbers("--max-prompt", args.max_prompt)
    if prompts and others:
        raise ConfigError(
            "--max-prompt", args.max_prompt, f"has no effect on {', '.join(others)}; ask for them in another call"
        )
    if args.data and not ours:
        raise ConfigError("--data", args.data, f"has no effect on {', '.join(others)}; it is for our tasks")
    shared = {"kind": "lm_eval", "limit": args.limit, "apply_chat_template": args.chat}
    shared["allow_code_execution"] = args.allow_code_execution
    if not isinstance(args.metadata, dict):
        raise ConfigError("--metadata", args.metadata, "give a JSON object of keys and values")
    metadata = dict(args.metadata) | ({"data": args.data} if args.data else {})
    block = shared | {"tasks": ours, "metadata": metadata, "include_defaults": "longctx_safety" in ours}
    blocks = [block | {"metadata": metadata | {"max_prompt": tokens}, "label": str(tokens)} for tokens in prompts]
    blocks = (blocks or [block]) if ours else []
    return blocks + ([shared | {"tasks": others, "metadata": args.metadata, "include_defaults": True}] if others else [])
