"""The docs: generated pages are what the generator makes, commands in them exist and compose, and the site builds."""

import argparse
import ast
import csv
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import nemo_longctx
from nemo_longctx import loggers
from nemo_longctx.cli import COMMANDS, _arguments, main
from nemo_longctx.commands import eval as evaluate
from nemo_longctx.compose import compose, groups
from nemo_longctx.eval.probes import SUITES
from nemo_longctx.recipe import InstructRecipe, RecipeConfig, load_recipe
from nemo_longctx.reference import settings

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [page for page in PAGES if page.name not in ("settings.md", "commands.md")]
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *WRITTEN]


README, RESULTS = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))


def extras():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def blocks(language):
    for page in WRITTEN:
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            yield page, text


def commands():
    for page, block in blocks("bash"):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


def taken(words):
    """What the command's own parser and Hydra make of a line; an error where either refuses it."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"nemo_longctx.commands.{words[1].replace('-', '_')}").configure(parser)
    parsed = _arguments(parser, words[1:])
    given = getattr(parsed, "overrides", ())
    settings = [word for word in given if not word.endswith(".yaml")]  # a recipe of the reader's own says the rest
    if words[1] == "train" and settings == given:
        return load_recipe(compose(settings))
    if words[1] == "doctor" and parsed.model:
        return load_recipe(compose([f"recipe={parsed.model}", *settings]))
    return compose(settings, config_name="sft" if words[1] == "sft" else "config") if settings else None


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_docs_do_what_they_say(words, tmp_path, monkeypatch, capsys):
    """Those that need no files run; the others are read by the command's own parser, and their settings composed."""
    if words[0] == "make":
        target = words[1] if words[1:] and words[1] != "&&" else "install"  # which comes first
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[:2] == ["pip", "install"]:
        asked = set(re.fullmatch(r"\.\[([\w,]+)\]", words[2])[1].split(","))
        assert asked <= set(extras())
        return
    started = words
    if words[0] == "torchrun":
        words = words[words.index("nemo_longctx") :]
    if words[:2] == ["nemo", "longctx"]:
        return  # nemo_run's own command line, which a slow test types
    assert words[0] in ("nemo-longctx", "nemo_longctx")
    assert words[1] in COMMANDS
    monkeypatch.chdir(tmp_path)
    if words[1] in ("plan", "rope") and "--apply" not in words and not any(word.endswith(".yaml") for word in words):
        assert main(words[1:]) == 0
        return
    if "--help" in words:
        return
    made = taken(words)
    if started[0] == "torchrun" and words[1] in ("train", "sft"):
        option = {name: int(started[started.index(name) + 1]) for name in ("--nnodes", "--nproc-per-node") if name in started}
        assert option.get("--nnodes", 1) == made.trainer.num_nodes
        assert option["--nproc-per-node"] == made.trainer.devices
    if "--recipe" in words and not words[words.index("--recipe") + 1].endswith(".yaml"):
        assert words[words.index("--recipe") + 1] in groups()["recipe"]


def test_commands_within_the_text_and_the_help_are_whole():
    """A line in backquotes, and one that `--help` shows below its options, can be typed as it stands, its letters replaced."""
    texts = [re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL) for page in READ]
    lines = [line for text in texts for line in re.findall(r"`(nemo-longctx [^`]*)`", text.replace("\n", " "))]
    shown = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines += re.findall(r"^ {2}(nemo-longctx .*|torchrun .*)$", shown, re.MULTILINE)
    assert len(lines) > 30
    refused = []
    for line in dict.fromkeys(lines):
        words = shlex.split(line, comments=True)
        words = words[words.index("nemo_longctx") :] if words[0] == "torchrun" else words
        named = len(words) == 2 or words[1:] in (["rope", "advise"], ["rope", "show"], ["instruct", "generate"])
        if named or "--help" in words or words[1].startswith("-") or words[1] == "COMMAND":
            continue  # a command that is spoken of
        try:
            taken(words)
        except (Exception, SystemExit) as error:
            refused.append((line, str(error)))
    assert not refused


def test_yaml_of_the_docs_is_settings():
    """Each block is a part of a recipe: it composes over one."""
    for page, block in blocks("yaml"):
        for key, value in yaml.safe_load(block).items():
            assert key in compose(["recipe=tiny_cpu_base"]), (page, key)
            assert isinstance(value, dict)


def test_python_of_the_docs_calls_what_is_there():
    """Names that are imported from the package, and arguments that its functions take."""
    for page, block in blocks("python"):
        tree = ast.parse(block)
        names = {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "nemo_longctx"
                 for name in node.names}  # fmt: skip
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names):
            given = inspect.signature(getattr(nemo_longctx, call.func.id)).bind_partial
            assert given(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords}), page


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


LIGHT = ("Table 10's FLOPs", "Figure 4 at distance 0; Theorem 1 for ABF and PI")  # rows whose command takes no time


@pytest.mark.parametrize("what", LIGHT)
def test_figures_that_a_command_prints_are_those_of_the_results(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = next(line for line in RESULTS.splitlines() if line.startswith(f"| {what} |"))
    figure, how = row.split(" | ")[1:]
    commands = re.findall(r"`nemo-longctx ([^`]+)`", how)
    changed = [re.sub(r"\d+@[\d.]+", other, commands[0]) for other in re.findall(r"`(\d+@[\d.]+)`", how)]
    for command in commands + changed:
        assert main(shlex.split(command)) == 0
    said = capsys.readouterr().out.replace("e+", "e")
    measured = re.findall(r"\d+\.\d+(?:e\d+)?", figure.partition("(paper")[0])
    assert len(measured) > 2
    assert [number for number in measured if number not in said] == []


def test_figures_of_files_are_those_of_the_results():
    def rows(name):
        return list(csv.DictReader((ROOT / "docs" / name).open(newline="", encoding="utf-8")))

    base, longer = ([f"{float(row['loss']):.3f}" for row in rows("context.csv") if row["read"] in ("256", "2048") and
                     ("extended" in row["model"]) == extended] for extended in (False, True))  # fmt: skip
    demo = f"base {' and '.join(base)}, extended {' and '.join(longer)}"
    layouts = [list(map(float, list(row.values())[1:])) for row in rows("layouts.csv")]
    furthest = max(abs(loss - row[0]) for row in layouts for loss in row)
    curve = [row for row in rows("curriculum.csv") if row["loss"]]
    switch = next(at for at, row in enumerate(curve) if row["seq_length"] == "2048")
    before, after = (float(curve[at]["loss"]) for at in (switch - 1, switch))
    back = next(int(row["tokens"]) for row in curve[switch:] if float(row["loss"]) < before) - int(curve[switch - 1]["tokens"])
    checked = [row["validation_loss_2048"] for row in rows("curriculum.csv") if row["validation_loss_2048"]]
    validated = f"{float(checked[0]):.2f} to {float(checked[-1]):.2f}"
    arms = {
        row["claim"]: re.findall(r"-\d\.\d+", row["difference (95 % interval)"])
        for row in rows("ablations/position/claims.csv")
    }
    plain, pi = ([f"{-float(number):.2f}" for number in arms[claim]] for claim in
                 ("Plain RoPE is worse than ABF at the new length", "PI trails ABF in loss"))  # fmt: skip
    study = f"{plain[0]} nats ({plain[2]} to {plain[1]}) under plain RoPE's and {pi[0]} ({pi[2]} to {pi[1]}) under PI's"
    for said in (
        demo, study, f"losses of {len(layouts)} steps within {furthest:.1e}".replace("e-0", "e-"), f"validation {validated}",
        f"jumps from {before:.2f} to {after:.2f} at the switch and is first back at {before:.2f} after {back / 1e6:.2f} m",
    ):  # fmt: skip
        assert said in RESULTS, said
    assert demo in README
    assert study in README
    made = (ROOT / "benchmarks" / "settings_fuzz.md").read_text(encoding="utf-8")
    for figure in re.search(r"([\d,]+) refused in a sentence, ([\d,]+) taken; (\d+) built", RESULTS).groups():
        assert f" {figure}" in made


def test_links_between_pages_and_files_are_there():
    for page in WRITTEN:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page, link)


def anchor(heading):
    """As mkdocs and GitHub make it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def test_anchors_are_headings_of_their_page():
    for page in READ:
        for link, named in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            text = (page.parent / link if link else page).read_text(encoding="utf-8")
            assert named in map(anchor, re.findall(r"^#+ (.*)$", text, re.MULTILINE)), (page, link, named)


def test_every_page_is_in_the_site_s_list():
    """Those of single studies are reached from the page of all."""
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.parent.parent.name != "ablations"]
    assert [page for page in pages if f": {page}\n" not in listed] == []


def test_each_choice_of_rope_stands_in_its_guide():
    text = (ROOT / "docs" / "guides" / "rope.md").read_text(encoding="utf-8")
    rows = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == set(groups()["rope"])


def test_each_suite_of_probes_is_a_preset_that_the_guide_names():
    text = (ROOT / "docs" / "guides" / "evaluation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(SUITES) == set(evaluate.HIDDEN)


def test_names_in_the_docs_are_the_code_s():
    """Settings, choices, options, environment variables and extras that a page names are there."""
    known = {each.key.replace("[]", "") for cls in (RecipeConfig, InstructRecipe) for each in settings(cls)}
    known |= {key[: at.start()] for key in known for at in re.finditer(r"\.", key)}
    sections = {key.partition(".")[0] for key in known} - {"model", "rope"}  # whose keys are the host's, and each variant's
    code = "".join(file.read_text(encoding="utf-8") for folder in ("nemo_longctx", "examples", "benchmarks", "tests", "docs")
                   for file in (ROOT / folder).rglob("*.py"))  # fmt: skip
    unknown = []
    for page in READ:
        text = page.read_text(encoding="utf-8")
        for said in re.findall(r"`([^`\s]+)`", text):
            key, equals, value = said.strip("'").partition("=")
            if re.fullmatch(rf"({'|'.join(sections)})(\.\w+(\[\w*\])?)+", key):
                unknown += [said] if re.sub(r"\[\w*\]", "", key) not in known else []
            elif equals and key in groups():
                unknown += [said] if value and value not in (*groups()[key], "null", "NAME") and "{" not in value else []
        unknown += [name for name in set(re.findall(r"NEMO_LONGCTX_\w+", text)) if name not in code]
        options = set(re.findall(r"`(?:nemo-longctx )?(?:\w+ )?(--[a-z][\w-]+)", text)) - {
            "--long",
            "--signal",
        }  # zstd's, Slurm's
        unknown += [option for option in options if f'"{option}"' not in code and f'"--{option[5:]}"' not in code]
        unknown += [
            name for names in re.findall(r"nemo-longctx\[([\w,]+)\]", text) for name in names.split(",") if name not in extras()
        ]
    assert not unknown


def test_what_a_run_leaves_and_sends_is_what_the_code_writes():
    """Files by their names in the code; the loggers' table is that of the module."""
    text = (ROOT / "docs" / "run_directory.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`(?:results/)?(\w+\.(?:json|jsonl|csv|png|html))`", text))
    assert len(files) > 8
    written = list(texts_of_the_code())
    assert {name for name in files if not any(name in said for said in written)} == set()
    table = re.findall(r"^\| (.+?) \| .+ \| (.+?) \|$", loggers.__doc__, re.MULTILINE)
    assert len(table) == 9
    assert [row for row in table if row not in re.findall(r"^\| (.+?) \| .+ \| (.+?) \|$", text, re.MULTILINE)] == []


def test_every_extra_is_told_where_to_install_is():
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert [extra for extra in extras() if f"`{extra}`" not in text and extra != "dev"] == []


def test_pages_tell_facts_and_not_the_day():
    words = r"\b(ran|run) again (since|on|alone)\b|\bnot run again\b|\btoday\b(?!'s)|\ban hour of\b|\bhad not before\b"
    told = {page.name: re.findall(words, " ".join(page.read_text(encoding="utf-8").split()), re.IGNORECASE) for page in READ}
    assert not {name: found for name, found in told.items() if found}


def test_the_changelog_says_each_change_once():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n## [Unreleased]\n")[2].partition("\n## ")[0]
    parts = re.split(r"^### (.+)\n", text, flags=re.MULTILINE)
    assert parts[1::2] == ["Added", "Changed", "Fixed"]  # of Keep a Changelog's six
    for group in parts[2::2]:
        assert "\n\n" not in group.strip()  # one list
        entries = [" ".join(entry.split()) for entry in re.split(r"^- ", group, flags=re.MULTILINE) if entry.strip()]
        begun = [" ".join(entry.split()[:8]) for entry in entries]
        assert [begin for begin in begun if begun.count(begin) > 1] == []


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "site" / "index.html").is_file()
