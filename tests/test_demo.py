"""The demo's steps are commands that this package takes, each reads what one before it wrote, and a second call goes on."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from nemo_longctx.cli import COMMANDS
from nemo_longctx.compose import compose
from nemo_longctx.recipe import load_recipe

EXAMPLE = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(words):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"nemo_longctx.commands.{words[1]}").configure(parser)
    return parser.parse_args(words[2:])


@pytest.mark.parametrize("own", [None, "texts"])
def test_each_step_is_a_command_that_reads_what_was_written(demo, tmp_path, own):
    written, seen, made = {own}, [], {}
    for name, words in demo.steps(tmp_path, own and Path(own)):
        seen.append(name)
        if words[0].endswith("nemo-longctx"):
            assert words[1] in COMMANDS
            args = parsed(words)
            if words[1] == "export":
                assert str(args.source) in written
                continue
            if own:
                assert {str(path) for path in args.inputs} <= written
            assert args.tokenizer
            assert words[1] == "synth" or bool(args.train_tokenizer) == (name == "prepare")  # one for all that is read
            written |= {str(args.output), str(args.tokenizer)}
            if words[1] == "synth":
                made[str(args.output).removesuffix(".jsonl")] = args
        else:
            recipe = load_recipe(compose(words[2:]))
            assert {source.path for source in recipe.data.mix.sources} <= written
            assert recipe.restore_from is None or recipe.restore_from in written
            assert sum(source.weight for source in recipe.data.mix.sources) == pytest.approx(1)
            written.add(f"{recipe.output_dir}/{recipe.name}")
            for source in recipe.data.mix.sources:
                if text := made.get(source.path):  # as long as the windows that read it, and read twice at most
                    assert text.length == recipe.curriculum.stages[0].seq_length
                    assert text.tokens >= source.weight * recipe.curriculum.total_tokens / 2
    texts = ["repeats", "lookups_256", "lookups_2048"]
    made_first = ["prepare", *(f"{step}_{text}" for text in texts for step in ("synth", "prepare"))]
    assert seen == [*made_first, "train_repeats", "train_base", "train_long", "export"]


def test_a_step_is_run_once_and_again_where_it_failed_or_changed(demo, tmp_path, capsys):
    def command(status, mark="x"):
        code = f"import sys; open({str(tmp_path / 'ran')!r}, 'a').write({mark!r}); print('the last words'); sys.exit({status})"
        return [sys.executable, "-c", code]

    def runs():
        return len((tmp_path / "ran").read_text())

    assert not demo.run_step(tmp_path, "prepare", command(3))
    said = capsys.readouterr().err
    assert "the last words" in said
    assert "prepare ended with status 3; the same command goes on from here" in said
    assert not (tmp_path / "steps.json").exists()
    for again in range(2):
        assert demo.run_step(tmp_path, "prepare", command(0))
        assert runs() == 2
        assert ("done before" in capsys.readouterr().out) == bool(again)
    assert demo.run_step(tmp_path, "prepare", command(0, "y"))  # another command is another step
    assert runs() == 3
    assert list(json.loads((tmp_path / "steps.json").read_text())) == ["prepare"]
    (tmp_path / "hf").mkdir()
    assert demo.run_step(tmp_path, "export", command(0))  # what a killed export left would be refused
    assert not (tmp_path / "hf").exists()
