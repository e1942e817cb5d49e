"""What the example of instruction tuning calls: overrides -> recipe -> run, every mistake in one sentence before any work."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError


def main(overrides: Sequence[str], *, description: str | None) -> int:
    """Compose conf/sft.yaml with `overrides`, build and fit. Returns the exit status: 0, or 2 after a user's mistake."""
    if {"-h", "--help"} & set(overrides):
        print((description or "").strip())
        return 0
    try:
        from nemo_longctx.recipe import load_instruct_recipe

        recipe = load_instruct_recipe(compose(overrides, config_name="sft"))
        # The host takes long to import: not before every setting is checked.
        from nemo_longctx.adapters.nemo.launch.instruct_run import build_instruct_run

        build_instruct_run(recipe).fit()
    except (ConfigError, OSError) as error:
        if os.environ.get("NEMO_LONGCTX_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
