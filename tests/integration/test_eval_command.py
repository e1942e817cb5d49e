"""`nemo-longctx eval` on Hugging Face checkpoints: from folder to page."""

import csv
import json

import numpy as np
import pytest

pytest.importorskip("lm_eval")
from tiny_models import byte_tokenizer, tiny_llama

from nemo_longctx.cli import main
from nemo_longctx.commands.eval import labels
from nemo_longctx.config import ConfigError
from nemo_longctx.data.writer import CorpusWriter

TEXT = "The smith opened his door to the street before six. Nobody had ever seen such a machine at work! " * 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("command"), np.random.default_rng(0)
    tokenizer = byte_tokenizer([TEXT])
    for seed, name in enumerate(("before", "after")):
        tiny_llama(vocab=len(tokenizer), seed=seed, length=600).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    with CorpusWriter(directory / "held_out", np.uint16) as writer:
        for _ in range(12):
            writer.add_document(rng.integers(2, 250, 500))
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    story = {"id": "1", "pid": "1", "input": f"Who opened the door?\n\n{TEXT[:300]}", "output": "the smith"}
    (directory / "narrative_qa.jsonl").write_text(json.dumps(story) + "\n", encoding="utf-8")
    (directory / "suite.yaml").write_text(
        f"tasks:\n  - {{kind: position, corpus: {directory}/held_out, seq_length: 100, documents: 4, bins: 5}}\n",
        encoding="utf-8",
    )
    return directory


def test_two_checkpoints_on_one_page(place, capsys):
    out = place / "out"
    arguments = ["eval", str(place / "before"), str(place / "after"), "--suite", str(place / "suite.yaml")]
    arguments += [
        "--corpus",
        str(place / "held_out"),
        "--max-length",
        "401",
        "--probes",
        str(place / "text.txt"),
        "--lengths",
        "300",
    ]
    arguments += [
        "--tasks",
        "longctx_narrativeqa",
        "--data",
        str(place / "narrative_qa.jsonl"),
        "--limit",
        "1",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4
    assert "before" in page
    assert "<script" not in page
    with (out / "loss_by_position_100.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["before"] * 5 + ["after"] * 5
    assert sum(int(row["tokens"]) for row in rows) == 2 * 4 * 100
    record = json.loads((out / "results.json").read_text())
    assert set(record["provenance"]["checkpoints"]) == {"before", "after"}
    assert record["provenance"]["checkpoints"]["before"]["weights"] != record["provenance"]["checkpoints"]["after"]["weights"]
    assert "longctx_narrativeqa" in record["results"][1]["tasks"]
    assert "wrote" in capsys.readouterr().out


def test_models_of_one_name_are_told_apart():
    assert labels(["runs/a/step=9-last", "runs/b/step=9-last"]) == ["a/step=9-last", "b/step=9-last"]
    assert labels(["a/x", "b/y"]) == ["x", "y"]
    with pytest.raises(ConfigError, match="given twice"):
        labels(["a/x", "a/x"])


def test_users_mistakes_are_one_sentence(place, tmp_path, capsys):
    assert main(["eval", str(place / "before"), "--out", str(tmp_path)]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("tasks:\n  - {kind: positon}\n")
    assert main(["eval", str(place / "before"), "--suite", str(tmp_path / "bad.yaml"), "--out", str(tmp_path)]) == 2
    assert "did you mean 'position'" in capsys.readouterr().err
