"""What the options of `eval` make of a suite's file."""

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_models import byte_tokenizer

from nemo_longctx.cli import main
from nemo_longctx.commands import eval as command
from nemo_longctx.commands.eval import OPEN, configure, task_blocks
from nemo_longctx.config import ConfigError
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.eval.probes import PAPER_LENGTHS, SUITES, ProbeConfig, make_probes
from nemo_longctx.eval.results import blank_result
from nemo_longctx.report.evaluation import write_results


def blocks(tmp_path, *options):
    position = {"kind": "position", "corpus": "held_out", "seq_length": 64}
    tasks = [position, {"kind": "probes", "text": OPEN, "probes": {"kinds": ["needle"]}}, {"kind": "probes", "text": "own.txt"}]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    parser = argparse.ArgumentParser()
    configure(parser)
    return task_blocks(parser.parse_args(["model", "--suite", str(tmp_path / "suite.yaml"), *options]), 100)


def test_a_suite_s_open_probes_get_the_text_and_lengths_of_the_options(tmp_path):
    position, filled, own = blocks(tmp_path, "--probes", "text.txt", "--lengths", "256,512", "--data", "questions")
    assert position == {"kind": "position", "corpus": "held_out", "seq_length": 64}
    asked = {"kinds": ["needle"], "lengths": [256, 512], "data": "questions"}
    assert filled == {"kind": "probes", "text": "text.txt", "probes": asked}
    assert own == {"kind": "probes", "text": "own.txt"}
    with pytest.raises(ConfigError, match="hides things in text of yours; give --probes TEXT"):
        blocks(tmp_path)


@pytest.mark.parametrize("name", SUITES)
def test_each_suite_of_probes_is_a_preset(name):
    """`--suite helmet` was a file that could not be read, beside a page that listed it with `ruler`."""
    parser = argparse.ArgumentParser()
    configure(parser)
    (block,) = task_blocks(parser.parse_args(["model", "--suite", name, "--probes", "essays.txt"]), 100)
    assert block == {"kind": "probes", "text": "essays.txt",
                     "probes": {"suite": name, "lengths": [2**n for n in range(12, 18)], "samples": 20}}  # fmt: skip
    assert {name, *command.HIDDEN} <= set(command.PRESETS)


def test_a_preset_with_a_slip_is_told_what_there_is():
    with pytest.raises(ConfigError, match=r"cannot be read .*; give a YAML file of tasks, or longbench2, .*, mrcr"):
        command.read_suite(Path("rulr"))


def test_a_corpus_that_is_not_there_is_told_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    """It was a failed task behind the model's loading, and a page without results took the place of the one before."""
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "model", "--corpus", "none"]) == 2
    assert "corpus='none': none.idx is missing" in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()


def blocks_of(*options, max_length=1000):
    parser = argparse.ArgumentParser()
    configure(parser)
    return task_blocks(parser.parse_args(["model", *options]), max_length)


def test_a_corpus_is_read_to_the_model_s_length_and_in_halves(tmp_path):
    with CorpusWriter(tmp_path / "held_out", np.uint16) as writer:
        for length in (700, 600, *[520] * 6, 90):
            writer.add_document(np.zeros(length))
    corpus = str(tmp_path / "held_out")
    position, context = blocks_of("--corpus", corpus)
    assert position == {"kind": "position", "corpus": corpus, "seq_length": 999, "bins": 0}
    # Eight documents have 520 tokens, which are halved down to twice the 64 targets.
    assert context == {"kind": "context", "corpus": corpus, "contexts": [130 - 64, 260 - 64, 520 - 64], "targets": 64}
    assert blocks_of("--corpus", corpus, max_length=300)[1]["contexts"] == [150 - 64, 300 - 64]
    assert len(blocks_of("--corpus", corpus, max_length=255)) == 1  # one length is no comparison
    assert blocks_of("--corpus", corpus, "--contexts", "10, 20")[1]["contexts"] == [10, 20]
    assert len(blocks_of("--corpus", str(tmp_path / "none"))) == 1


def test_probes_are_asked_at_the_paper_s_lengths_that_fit():
    (probes,) = blocks_of("--probes", "t", max_length=4096 + 64)
    kinds = ["first_sentence", "passkey", "needle"]
    assert probes == {"kind": "probes", "text": "t", "probes": {"kinds": kinds, "lengths": [256, 1024, 2048]}}
    assert blocks_of("--probes", "t", max_length=4096 + 65)[0]["probes"]["lengths"] == [256, 1024, 2048, 4096]
    assert blocks_of("--probes", "t", max_length=1 << 20)[0]["probes"]["lengths"] == list(PAPER_LENGTHS)
    assert blocks_of("--probes", "t", "--lengths", "7,8")[0]["probes"]["lengths"] == [7, 8]


def test_tasks_of_ours_and_of_others_carry_the_options():
    (ours,) = blocks_of("--tasks", " longctx_qasper ,leval", "--limit", "3", "--chat", "--metadata", '{"a": 1}', "--data", "d")
    assert ours == {
        "kind": "lm_eval", "limit": 3, "apply_chat_template": True, "allow_code_execution": False,
        "tasks": ["longctx_qasper", "leval"], "metadata": {"a": 1, "data": "d"}, "include_defaults": False,
    }  # fmt: skip
    safety, short = blocks_of("--tasks", "longctx_safety,longctx_short", "--allow-code-execution", "--metadata", '{"a": 1}')
    assert (safety["tasks"], safety["include_defaults"], safety["allow_code_execution"]) == (["longctx_safety"], True, True)
    assert (short["tasks"], short["include_defaults"], short["metadata"], short["limit"]) == (
        ["longctx_short"],
        True,
        {"a": 1},
        None,
    )
    four, eight = blocks_of("--tasks", "leval", "--max-prompt", "4,8")
    assert [(one["label"], one["metadata"]) for one in (four, eight)] == [("4", {"max_prompt": 4}), ("8", {"max_prompt": 8})]
    with pytest.raises(ConfigError, match=r"--metadata=\[1\]: give a JSON object"):
        blocks_of("--tasks", "leval", "--metadata", "[1]")
    for text in ("0", "4,x", "-1", "٤", "4.5"):
        with pytest.raises(ConfigError, match="is no whole number of tokens"):
            blocks_of("--tasks", "leval", "--max-prompt", text)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--max-length", "1"], "--max-length=1: give at least 2 tokens"),
     (["--tensor-parallel", "0"], "--tensor-parallel=0: give 1 or more processes"),
     (["--pipeline-parallel", "0"], "--pipeline-parallel=0: give 1 or more processes"),
     (["--contexts", "5"], "--contexts='5': has no effect without --corpus"),
     (["--keep-samples"], "--keep-samples=True: has no effect without --tasks"),
     (["--metadata", '{"a": 1}'], "has no effect without --tasks")],
)  # fmt: skip
def test_options_are_refused_before_anything_is_read(options, said, capsys):
    assert main(["eval", "no model", "--probes", "t", *options]) == 2
    assert said in capsys.readouterr().err


def test_labels_are_the_shortest_that_tell_models_apart():
    assert command.labels(["x/a/c", "y/a/c", "y/b/c"]) == ["x/a/c", "y/a/c", "y/b/c"]
    assert command.labels(["c", "a/c"]) == ["c", "a/c"]
    assert command.labels(["only/one"]) == ["one"]


def test_scalars_and_failures_are_printed(capsys):
    result = blank_result("m")
    result.tasks["leval"] = {"f1": 0.25, "alias": "x", "on": True}
    result.errors["other"] = "ValueError: no"
    result.tasks["leval"] |= {"samples": 14042, "loss": 3.0, "lost": math.nan}
    command._print(result)
    counted = f"m  {'leval/samples':<40}{'14,042':>12}\nm  {'leval/loss':<40}{'3.0000':>12}\nm  {'leval/lost':<40}{'nan':>12}\n"
    assert capsys.readouterr().out == f"m  {'leval/f1':<40}{0.25:>12.4f}\n{counted}m  other failed: ValueError: no\n"


def test_what_has_to_be_known_to_read_the_numbers_stands_on_the_page(tmp_path):
    results = [blank_result(name) for name in ("a", "b")]
    seen = {name: {"path": name, "tokenizer": "one"} for name in ("a", "b")}
    args, said = argparse.Namespace(out=tmp_path), "These models have different tokenizers"
    command._write(args, results, seen)
    assert said not in (tmp_path / "index.html").read_text(encoding="utf-8")
    seen["b"] |= {"tokenizer": "two", "notes": ["some corpus lacks its beginnings"]}
    command._write(args, results, seen)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert said in page.partition("What made this")[0]
    assert "b: some corpus lacks its beginnings." in page.partition("What made this")[0]


def test_mrcr_leaves_no_room_for_thought():
    """Qwen3's template would open one, and the reply is as long as the answer."""
    asked = []
    tokenizer = byte_tokenizer(["a text"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' if enable_thinking is not false }}"
    )
    make = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda rows, **more: asked.append(make(rows, **more)) or asked[-1]
    make_probes(ProbeConfig(kinds=("mrcr_2",), lengths=(2000,), samples=1), ["Some words of a text. " * 30], tokenizer)
    assert asked
    assert not any("<think>" in text for text in asked)


def test_metadata_that_is_no_json_is_told_how_to_be(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "model", "--tasks", "leval", "--metadata", "{max_prompt: 4}"])
    said = capsys.readouterr().err
    assert "'{max_prompt: 4}' is not JSON (" in said
    assert "write '{\"max_seq_lengths\": [4096]}', in quotes of the shell" in said


def test_an_evaluation_whose_place_another_takes_is_told(tmp_path, capsys):
    """The second checkpoint's results took the place of the first one's in the folder that both have by default."""
    command._tell_replaced(tmp_path)
    write_results(tmp_path / "page", [blank_result("first"), blank_result("second")], provenance={})
    (tmp_path / "results.json").write_text("[]")
    command._tell_replaced(tmp_path)
    assert not capsys.readouterr().err
    command._tell_replaced(tmp_path / "page")
    assert f"{tmp_path / 'page'} holds an evaluation of first, second, whose place this one takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [("empty", "is no checkpoint; give a NeMo checkpoint or run"), ("a.nemo", "is an archive"), ("b", "is a file")],
)
def test_what_is_no_checkpoint_is_told_before_anything_is_imported(tmp_path, name, said):
    """An empty folder was looked at by NeMo, half a minute later."""
    from nemo_longctx.adapters.pretrained import check_source

    (tmp_path / "empty").mkdir()
    for file in ("a.nemo", "b"):
        (tmp_path / file).write_text("x")
    with pytest.raises(ConfigError, match=said):
        check_source(str(tmp_path / name))
