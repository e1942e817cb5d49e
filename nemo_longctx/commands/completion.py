"""`nemo-longctx completion bash|zsh|fish`: a script that lets the shell complete commands, options, groups and settings.

The words are written out, so that pressing Tab starts no Python.
"""

from __future__ import annotations

import argparse
import importlib

INSTALL = """\
bash: nemo-longctx completion bash >> ~/.bashrc
zsh:  nemo-longctx completion zsh >> ~/.zshrc
fish: nemo-longctx completion fish > ~/.config/fish/completions/nemo-longctx.fish
"""

# zsh reads bash's script by its own bashcompinit.
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"

BASH = """_nemo_longctx() {
    local word="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}" words=""
    # The shell takes `=` for the end of a word: put what stands before it back.
    if [[ "$word" == "=" ]]; then word="${COMP_WORDS[COMP_CWORD-1]}="; fi
    if [[ "${COMP_WORDS[COMP_CWORD-1]}" == "=" ]]; then word="${COMP_WORDS[COMP_CWORD-2]}=$word"; fi
    if (( COMP_CWORD == 1 )); then command=""; fi
    case "$command" in
        "") words="COMMANDS" ;;
CASES
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ "$word" == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}"); fi
    if [[ "${COMPREPLY[0]}" == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _nemo_longctx nemo-longctx
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the argument."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = INSTALL
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose script to print")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print({"bash": bash, "zsh": lambda: ZSH + bash(), "fish": fish}[args.shell](), end="")
    return 0


def words_of(command: str) -> list[str]:
    """What may follow a command: its options, the jobs of `rope` and `instruct`, and a run's groups and settings."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"nemo_longctx.commands.{command.replace('-', '_')}").configure(parser)
    words: list[str] = []
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        if not action.option_strings and action.choices:
            words += map(str, action.choices)
    return words + _settings(command)


def _settings(command: str) -> list[str]:
    if command not in ("train", "sft"):
        return []
    from nemo_longctx.compose import groups
    from nemo_longctx.recipe import InstructRecipe, RecipeConfig
    from nemo_longctx.reference import settings

    apart = "sft" if command == "train" else "recipe"
    choices = [f"{group}={choice}" for group, known in groups().items() if group != apart for choice in known]
    keys = [each.key for each in settings(RecipeConfig if command == "train" else InstructRecipe)]
    return choices + [f"{key}=" for key in keys if "[]" not in key]


def bash() -> str:
    """The script for bash."""
    from nemo_longctx.cli import COMMANDS

    cases = "\n".join(f'        {command}) words="{" ".join(words_of(command))}" ;;' for command in COMMANDS)
    return BASH.replace("COMMANDS", " ".join(COMMANDS)).replace("CASES", cases)


def fish() -> str:
    """The script for fish."""
    from nemo_longctx.cli import COMMANDS

    lines = []
    for command, line in COMMANDS.items():
        said = line.replace("'", "\\'")
        lines.append(f"complete -c nemo-longctx -n __fish_use_subcommand -a {command} -d '{said}'")
        words = words_of(command)
        behind = f"complete -c nemo-longctx -n '__fish_seen_subcommand_from {command}'"
        lines += [f"{behind} -l {word.removeprefix('--')}" for word in words if word.startswith("--")]
        if plain := [word for word in words if not word.startswith("--")]:
            lines.append(f"{behind} -a '{' '.join(plain)}'")
    return "\n".join(lines) + "\n"
