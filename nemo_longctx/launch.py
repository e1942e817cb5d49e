"""What `nemo-longctx train` and `sft` share: overrides -> recipe -> run, every mistake said in one sentence before any work.

NeMo is imported only when a run is built, so that `--help` and a wrong key answer at once, and the processes that Megatron-Core
spawns to write checkpoints, which import the main script again, do not import the host with it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_longctx import runs
from nemo_longctx.capability import missing_extra
from nemo_longctx.checkpoints import checkpoint_to_resume, failed_checkpoint
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.files import first_process

if TYPE_CHECKING:
    from nemo_longctx.recipe import RunConfig


_NOTHING_YET = "before anything new was trained"
MOST_NAMED = 8  # settings, where each of a list would be a line
MEND_DISK = "the checkpoints before are whole: mend that, or free some space, and start the same command again"


def main(overrides: Sequence[str]) -> int:
    """Compose, build and fit. Returns the exit status: 0, or 2 after a user's mistake, told in one sentence."""

    def train() -> None:
        from nemo_longctx.loggers import check_loggers
        from nemo_longctx.recipe import load_recipe
        from nemo_longctx.resume import check_resumed

        recipe = load_recipe(compose(overrides))
        check_loggers(recipe.logger)
        check_resumed(recipe, recipe.directory)

        def fit() -> None:
            from nemo_longctx.adapters.nemo.launch.run import build_run

            runs.stop_if_asked()
            build_run(recipe).fit()

        fit_unless_finished(recipe, fit)

    return exit_status(train)


def fit_unless_finished(recipe: RunConfig, fit: Callable[[], object]) -> None:
    """Call `fit` as the one run of the recipe's directory, from a checkpoint that is whole, or say that the run is finished.

    All that is refused here is refused within a second.
    """
    from nemo_longctx.dry_run import refuse
    from nemo_longctx.resume import check_length, shorter_again, without_effect

    directory, total = recipe.directory, recipe.curriculum.total_tokens
    with runs.one_run(directory):
        if runs.is_finished(directory, total_tokens=total):
            if first_process():
                again = f"to train on, set curriculum.total_tokens above {total}; to train anew, give another name"
                print(f"{directory} is finished already; {again}\n{runs.ending(directory)}")
                if asked := without_effect(recipe, directory):
                    more = f"\n  and {len(asked) - MOST_NAMED} more" if len(asked) > MOST_NAMED else ""
                    print("no effect on a finished run", *asked[:MOST_NAMED], sep="\n  ", end=f"{more}\n")
            return
        runs.check_begins(directory)
        check_length(recipe.curriculum, checkpoint_to_resume(directory, fallback=recipe.resume.fallback))
        refuse(recipe)
        if first_process() and (said := shorter_again(recipe.curriculum, directory)) is not None:
            print(f"note: {said}", file=sys.stderr)
        fit()


def rehearse(recipe: RunConfig) -> None:
    """Build the model and train a step of each stage, save, validate and evaluate, in a directory that is removed."""
    from nemo_longctx.dry_run import refuse, rehearsal
    from nemo_longctx.recipe import InstructRecipe

    refuse(recipe)
    with rehearsal(recipe) as cut:
        if isinstance(cut, InstructRecipe):
            from nemo_longctx.adapters.nemo.launch.instruct_run import build_instruct_run

            runs.stop_if_asked()
            build_instruct_run(cut).fit()
        else:
            from nemo_longctx.adapters.nemo.launch.run import build_run

            runs.stop_if_asked()
            build_run(cut).fit()
    if first_process():
        print("a step of each stage was trained, saved, validated and evaluated; what it wrote is removed")


def exit_status(train: Callable[[], object]) -> int:
    """Call `train`. Returns 0, or after a sentence: 2 (a user's mistake), 1 (a run that cannot go on), 128 + N (signal N)."""
    try:
        with runs.stops_at_once():
            train()
    except runs.Stopped as stopped:
        if not stopped.saved and first_process():
            name = signal.Signals(stopped.signum).name
            when = "at once: steps behind the newest checkpoint are made again" if stopped.at_once else _NOTHING_YET
            print(f"\nstopped by {name} {when}; go on with\n  {runs.own_command()}", file=sys.stderr)
        return 128 + stopped.signum
    except BaseException as error:  # the last net: nothing ends in a traceback, unless it is asked for
        if not isinstance(error, Exception) and failed_checkpoint(error) is None:
            raise
        return tell(error)
    return 0


def tell(error: BaseException) -> int:
    """Say in one sentence what ended a run, and return its exit status: 2 for a user's mistake, 1 for what nobody foresaw.

    The traceback is raised where NEMO_LONGCTX_DEBUG is set.
    """
    if os.environ.get("NEMO_LONGCTX_DEBUG"):
        raise error
    sys.stdout.flush()
    print(f"\nerror: {_sentence(error)}", file=sys.stderr)  # a progress bar may have left its line open
    foreseen = isinstance(error, (ConfigError, OSError, ModuleNotFoundError)) or failed_checkpoint(error) is not None
    return 2 if foreseen else 1


def _sentence(error: BaseException) -> str:
    if isinstance(error, (ConfigError, runs.RunError)):
        return str(error)
    if (sentence := failed_checkpoint(error)) is not None:
        return f"{sentence}; {MEND_DISK}"
    if isinstance(error, ModuleNotFoundError) and (sentence := missing_extra(error)) is not None:
        return sentence
    if not isinstance(error, OSError):
        said = " ".join(str(error).split())
        place = next((f"{f.name} of {Path(f.filename).name}:{f.lineno}" for f in reversed(_frames(error))), "")
        return f"{type(error).__name__} in {place}: {said[:500]}; NEMO_LONGCTX_DEBUG=1 shows the traceback"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error}); {MEND_DISK}"
    return str(error)


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
