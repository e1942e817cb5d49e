"""What the options of `eval` make of a suite's file."""

import argparse

import pytest
import yaml

from nemo_longctx.cli import main
from nemo_longctx.commands.eval import OPEN, configure, task_blocks
from nemo_longctx.config import ConfigError


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


def test_a_corpus_that_is_not_there_is_told_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    """It was a failed task behind the model's loading, and a page without results took the place of the one before."""
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "model", "--corpus", "none"]) == 2
    assert "corpus='none': none.idx is missing" in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()
