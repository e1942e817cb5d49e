"""`nemo-longctx ablate STUDY --scale SCALE`: a comparison of the paper as one command, and the page of what came out."""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import signal
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError, did_you_mean

EPILOG = """\
Studies are files, conf/ablation/NAME.yaml: arms as overrides of recipes, measures, claims with the test that decides each.
Killed at any moment, the same command goes on; each run is one that you can type (--dry-run prints them all).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    from nemo_longctx.ablation.study import SCALES, studies

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("study", help=f"{', '.join(studies())}, or all")
    parser.add_argument("--scale", required=True, choices=SCALES, help="how large the runs are; smoke shows that all parts run")
    parser.add_argument("--out", type=Path, help="folder of data, runs and page (default: runs/ablate/SCALE)")
    parser.add_argument(
        "--text", action="append", default=[], help="your text, as prepare takes it (default: installed sources)"
    )
    parser.add_argument("--executor", default="", help="nemo_run's executor for each run (default: the scale's; none: here)")
    parser.add_argument("--dry-run", action="store_true", help="check and print every command, run none")


def run(args: argparse.Namespace) -> int:
    from nemo_longctx.ablation.runner import Runner
    from nemo_longctx.ablation.study import load_study, studies
    from nemo_longctx.eval.checks import check_there

    if args.study != "all" and args.study not in studies():
        raise ConfigError("study", args.study, did_you_mean(args.study, [*studies(), "all"]))
    wanted = studies() if args.study == "all" else [args.study]
    loaded = {name: load_study(name) for name in wanted}
    chosen = {n: s for n, s in loaded.items() if args.study != "all" or args.scale in s.scales}
    for place in args.text:
        if "://" not in place:
            check_there("--text", place)
    out = args.out or Path("runs/ablate") / args.scale
    text = shlex.join(args.text) if args.text else shlex.quote(sysconfig.get_path("purelib"))
    runners = [Runner(study, args.scale, out, text=text, executor=args.executor, run=here) for study in chosen.values()]
    # A mistake in the last study is told before the first one runs.
    recipes = {runner.study.name: check(runner) for runner in runners}
    if args.dry_run:
        for runner in runners:
            print(f"# {runner.study.title}")
            if runner.scale.hours:
                print(f"# takes about {runner.scale.hours}")
            if args.scale == "gpu":
                from nemo_longctx.ablation.estimate import planned_hours

                hours = len(runner.scale.seeds) * sum(planned_hours(recipes[runner.study.name]).values())
                print(f"# by the plan, training takes {60 * hours:.0f} min on one H100; starts and evaluations come on top")
            for name, command in runner.commands():
                print(f"{shlex.join(command)}  # {name}")
        return 0
    failed = False
    for runner in runners:
        page = runner()
        failed = failed or page is None
        if page is not None:
            print(f"{runner.study.name}: {page}")
    return 1 if failed else 0


def here(command: list[str], log: Path) -> int:
    """Run one of our commands in a fork of this process, its output in `log`; the exit status.

    The host takes half a minute to import, a tiny run a few seconds: it is imported once, here, and every run begins as a copy
    of this process. Commands of others (`nemo`, on a cluster) run as they are.
    """
    from nemo_longctx.ablation.runner import execute
    from nemo_longctx.cli import main

    if command[0] != "nemo-longctx" or sys.platform != "linux":
        return execute(command, log)
    if command[1] in ("train", "sft"):
        import nemo_longctx.adapters.nemo.launch.run  # noqa: F401  (for its children)
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        try:
            _, status = os.waitpid(child, 0)
        except KeyboardInterrupt:  # the child has it too, and ends as it does alone
            os.waitpid(child, 0)
            raise
        return os.waitstatus_to_exitcode(status)
    status = 1
    try:
        pr_set_pdeathsig = 1  # prctl(2): end with the study, so that no two processes write to one directory
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = main(command[1:])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # the parent's code must not run on in its copy
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def check(runner) -> dict[str, Any]:
    """Arm -> recipe of every run of a study, of its first seed: the others differ in nothing that can be wrong.

    Raises:
        ConfigError: a recipe that does not compose, by its run.
    """
    recipes = {}
    for each in (run for run in runner.runs if run.seed == runner.scale.seeds[0]):
        try:
            recipes[each.arm] = each.recipe()
        except ConfigError as error:
            raise ConfigError(error.key, error.value, f"{error.mend} (in {runner.study.name}: {each.name})") from error
    return recipes
