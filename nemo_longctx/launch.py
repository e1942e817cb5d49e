"""What the example scripts share: overrides -> recipe -> run, with every mistake said in one sentence before any work.

NeMo is imported only when a run is built, so that `--help` and a wrong key answer at once, and the processes that Megatron-Core
spawns to write checkpoints, which import the main script again, do not import the host with it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from nemo_longctx.compose import compose, groups
from nemo_longctx.config import ConfigError


def main(overrides: Sequence[str], *, description: str | None) -> int:
    """Compose, build and fit. Returns the exit status: 0, or 2 after a user's mistake, told in one sentence."""
    if {"-h", "--help"} & set(overrides):
        print(_help(description))
        return 0
    try:
        from nemo_longctx.recipe import load_recipe
        from nemo_longctx.resume import check_resumed

        recipe = load_recipe(compose(overrides))
        check_resumed(recipe, recipe.directory)
        from nemo_longctx.adapters.nemo.launch.run import build_run

        build_run(recipe).fit()
    except (ConfigError, OSError) as error:
        if os.environ.get("NEMO_LONGCTX_DEBUG"):
            raise
        sys.stdout.flush()
        print(f"\nerror: {_sentence(error)}", file=sys.stderr)  # a progress bar may have left its line open
        return 2
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error}); the checkpoints before are whole: free some space and start the same command again"
    return str(error)


def _help(description: str | None) -> str:
    lines = [(description or "").strip(), "", "Groups (group=choice):"]
    lines += [f"  {group:12} {', '.join(choices)}" for group, choices in groups().items()]
    lines += ["", "Keys (key=value), with their defaults:"]
    return "\n".join(lines + [f"  {line}" for line in _keys()])


def _keys() -> list[str]:
    import dataclasses
    import typing

    from nemo_longctx.recipe import RecipeConfig

    lines = []
    hints = typing.get_type_hints(RecipeConfig)
    for field in dataclasses.fields(RecipeConfig):
        if dataclasses.is_dataclass(hints[field.name]):
            inner = dataclasses.fields(hints[field.name])
            lines += [f"{field.name}.{f.name}{_default(f)}" for f in inner]
        else:
            lines.append(f"{field.name}{_default(field)}")
    return lines


def _default(field: object) -> str:
    import dataclasses

    default = field.default  # type: ignore[attr-defined]
    return "" if default is dataclasses.MISSING else f"={default}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], description=__doc__))
