"""What `nemo-longctx sft` calls: overrides -> recipe -> run, every mistake in one sentence before any work."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_longctx import runs
from nemo_longctx.compose import compose
from nemo_longctx.launch import exit_status, fit_unless_finished


def main(overrides: Sequence[str]) -> int:
    """Compose conf/sft.yaml with `overrides`, build and fit. Returns the exit status: 0, or 2 after a user's mistake."""

    def tune() -> None:
        from nemo_longctx.loggers import check_loggers
        from nemo_longctx.recipe import load_instruct_recipe
        from nemo_longctx.resume import check_resumed

        recipe = load_instruct_recipe(compose(overrides, config_name="sft"))
        check_loggers(recipe.logger)
        check_resumed(recipe, recipe.directory)

        def fit() -> None:
            # The host takes long to import: not before every setting is checked.
            from nemo_longctx.adapters.nemo.launch.instruct_run import build_instruct_run

            runs.stop_if_asked()
            build_instruct_run(recipe).fit()

        fit_unless_finished(recipe, fit)

    return exit_status(tune)
