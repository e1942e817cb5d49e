"""What the README says can be typed: its Python runs, its commands exist, its files are there."""

import re
import shlex
from pathlib import Path

import pytest

from nemo_longctx.cli import COMMANDS
from nemo_longctx.compose import compose, groups
from nemo_longctx.recipe import load_recipe

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_python_blocks_run(capsys):
    assert blocks("python")
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert "extended_model" in capsys.readouterr().out


def commands():
    """Each shell line of the README, continuation lines joined."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words
    for code in re.findall(r"`(nemo-longctx [^`]+)`", TEXT):
        yield shlex.split(code)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_exist(words):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "nemo-longctx":
        assert words[1] in COMMANDS
        option = {"doctor": "--model", "plan": "--recipe"}.get(words[1])
        if option in words:
            assert words[words.index(option) + 1] in groups()["recipe"]
    elif words[0] == "torchrun" and "nemo_longctx" in words:
        assert words[words.index("nemo_longctx") + 1] in COMMANDS
        made = load_recipe(compose([word for word in words if "=" in word and not word.startswith("-")]))
        nodes = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
        assert (nodes, words[words.index("--nproc-per-node") + 1]) == (made.trainer.num_nodes, str(made.trainer.devices))
    else:
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file()
        compose([word for word in words if "=" in word and not word.startswith("-")])


def test_files_and_folders_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:examples|adapters|benchmarks|conf|docs)/[\w/.-]+)`", TEXT):
        assert (ROOT / path).exists() or (ROOT / "nemo_longctx" / path).exists(), path
