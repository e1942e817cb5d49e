"""The docs: generated pages are what the generator makes, commands in them exist and compose, and the site builds."""

import argparse
import ast
import csv
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_longctx.cli import COMMANDS, main
from nemo_longctx.compose import compose, groups
from nemo_longctx.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [page for page in PAGES if page.name not in ("settings.md", "commands.md")]


def blocks(language):
    for page in WRITTEN:
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            yield page, text


def commands():
    for page, block in blocks("bash"):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_docs_do_what_they_say(words, tmp_path, monkeypatch, capsys):
    """Those that need no files run; the others are read by the command's own parser, and their settings composed."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    started = words
    if words[0] == "torchrun":
        words = words[words.index("nemo_longctx") :]
    if words[:2] == ["nemo", "longctx"]:
        return  # nemo_run's own command line, which a slow test types
    assert words[0] in ("nemo-longctx", "nemo_longctx")
    assert words[1] in COMMANDS
    monkeypatch.chdir(tmp_path)
    if words[1] in ("plan", "rope") and "--apply" not in words:
        assert main(words[1:]) == 0
        return
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"nemo_longctx.commands.{words[1].replace('-', '_')}").configure(parser)
    if "--help" not in words:
        parsed = parser.parse_args(words[2:])
    if words[1] in ("train", "sft"):
        given = [word for word in parsed.overrides if not word.endswith(".yaml")]
        made = load_recipe(compose(given)) if words[1] == "train" else compose(given, config_name="sft")
        if started[0] == "torchrun":
            option = {
                name: int(started[started.index(name) + 1]) for name in ("--nnodes", "--nproc-per-node") if name in started
            }
            assert option.get("--nnodes", 1) == made.trainer.num_nodes
            assert option["--nproc-per-node"] == made.trainer.devices
    if "--recipe" in words:
        assert words[words.index("--recipe") + 1] in groups()["recipe"]


def test_yaml_of_the_docs_is_settings():
    """Each block is a part of a recipe: it composes over one."""
    for page, block in blocks("yaml"):
        for key, value in yaml.safe_load(block).items():
            assert key in compose(["recipe=tiny_cpu_base"]), (page, key)
            assert isinstance(value, dict)


@pytest.mark.parametrize("study", sorted(path.parent.name for path in (ROOT / "docs/ablations").glob("*/claims.csv")))
def test_numbers_of_a_study_are_those_of_its_tables(study):
    """Each row of each CSV stands in the study's page, and each claim with its verdict in the list of all."""
    folder = ROOT / "docs" / "ablations" / study
    page, all_studies = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "../index.md"))
    shown = [file for file in folder.glob("*.csv") if not file.stem.startswith("training_curve")]  # which is drawn alone
    for file in shown:
        for row in csv.reader(file.open(newline="", encoding="utf-8")):
            assert f"| {' | '.join(row)} |" in page, file
    for row in csv.DictReader((folder / "claims.csv").open(newline="", encoding="utf-8")):
        assert f"| {row['claim']} | {row['verdict']} | {row['difference (95 % interval)']} |" in all_studies


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse lays its help out by the version of Python")
@pytest.mark.parametrize("name", ["settings", "commands"])
def test_generated_pages_are_what_the_generator_makes(name):
    """Run `python docs/make_reference.py` after a change of the schema or of a command."""
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == getattr(made, f"{name}_page")()


def texts_of_the_code():
    """Every text of the package's code as it would be said; what is filled in is `...`."""
    for file in (ROOT / "nemo_longctx").rglob("*.py"):
        inside = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                inside |= set(map(id, node.values))
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                yield node.value


def test_errors_of_the_faq_are_said_by_the_code():
    texts = " ".join(text.replace("`", "") for text in texts_of_the_code())
    sentences = re.findall(r"^\*\*`([^`]+)`", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(sentences) > 15
    missing = [said for said in sentences if not all(part.strip(" ,") in texts for part in said.split("..."))]
    assert not missing


def test_links_between_pages_and_files_are_there():
    for page in WRITTEN:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page, link)


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "site" / "index.html").is_file()
