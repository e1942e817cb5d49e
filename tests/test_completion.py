"""`nemo-longctx completion`: what bash makes of the script, and that each shell's names every command."""

import re
import subprocess

import pytest

from nemo_longctx.cli import COMMANDS, main
from nemo_longctx.commands.completion import bash, fish, words_of

ASK = """
source "$0"
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_nemo_longctx
echo "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "completion.bash"
    file.write_text(bash())
    return file


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["pre"], "prepare"),
        (["train", "optimizer.lr"], "optimizer.lr="),
        (["train", "recipe", "=", "tiny_cpu_b"], "tiny_cpu_base"),  # bash cuts words at =
        (["sft", "sft", "=", "short_"], "short_and_pretraining"),
        (["rope", "adv"], "advise"),
        (["export", "--no-v"], "--no-verify"),
    ],
    ids=" ".join,
)
def test_bash_offers_what_can_follow(script, typed, offered):
    done = subprocess.run(["bash", "-c", ASK, script, "nemo-longctx", *typed], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [offered], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_s_script_names_every_command(shell, capsys):
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)


def test_fish_offers_what_bash_does():
    offered = {command: [] for command in COMMANDS}
    told = {}
    for line in fish().splitlines():
        if found := re.fullmatch(r"complete -c nemo-longctx -n __fish_use_subcommand -a (\S+) -d '(.+)'", line):
            told[found[1]] = found[2].replace("\\'", "'")
            continue
        command, kind, words = re.fullmatch(
            r"complete -c nemo-longctx -n '__fish_seen_subcommand_from (\S+)' -(l|a) '?([^']+)'?", line
        ).groups()
        offered[command] += [f"--{words}"] if kind == "l" else words.split()
    assert told == dict(COMMANDS)
    assert {command: sorted(words) for command, words in offered.items()} == {
        command: sorted(words_of(command)) for command in COMMANDS
    }
