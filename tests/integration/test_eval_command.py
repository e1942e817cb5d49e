"""`nemo-longctx eval` on Hugging Face checkpoints: from folder to page."""

import argparse
import csv
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("lm_eval")
from tiny_models import byte_tokenizer, tiny_llama

from nemo_longctx.cli import main
from nemo_longctx.commands.eval import configure, labels, task_blocks
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


def test_presets_are_filled_by_the_options(place):
    parser = argparse.ArgumentParser()
    configure(parser)
    asked = ["m", "--suite", "ruler", "--probes", "essays.txt", "--lengths", "4096,8192", "--data", "qa"]
    (block,) = task_blocks(parser.parse_args(asked), 100)
    assert block["text"] == "essays.txt"
    assert (block["probes"]["suite"], block["probes"]["lengths"], block["probes"]["data"]) == ("ruler", [4096, 8192], "qa")
    with pytest.raises(ConfigError, match="give --probes TEXT"):
        task_blocks(parser.parse_args(["m", "--suite", "ruler"]), 100)
    (block,) = task_blocks(parser.parse_args(["m", "--suite", "longbench2"]), 100)
    assert (block["tasks"], block["policy"]) == (["longbench2"], "middle")


NOT_LOADED = "no such model"  # mistakes are told before a model is looked for


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--corpus", "c", "--chat"], "--chat=True: has no effect without --tasks"),
        (["--probes", "t", "--allow-code-execution"], "--allow-code-execution=True: has no effect without --tasks"),
        (["--probes", "t", "--data", "d"], "--data='d': has no effect without --tasks"),
        (["--probes", "t", "--limit", "2"], "--limit=2: has no effect without --tasks"),
        (["--probes", "t", "--max-prompt", "4096"], "--max-prompt='4096': has no effect without --tasks"),
        (["--corpus", "c", "--lengths", "256"], "--lengths='256': has no effect without --probes"),
        (["--tasks", "hellaswag", "--max-prompt", "4096,8192"], "--max-prompt='4096,8192': has no effect on hellaswag"),
        (["--tasks", "hellaswag", "--data", "d"], "--data='d': has no effect on hellaswag"),
        (["--tasks", "longctx_qasper", "--max-prompt", "4k"], "'4k' is no whole number of tokens"),
        (["--probes", "t", "--lengths", "256,abc"], "'abc' is no whole number of tokens"),
        (["--tasks", "longctx_qasper", "--limit", "-1"], "eval.limit=-1: give 1 or more samples"),
    ],
)
def test_options_without_effect_and_bad_numbers_are_refused(options, said, capsys):
    assert main(["eval", NOT_LOADED, *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: [position]", "eval.tasks[0]='position': give a block"),
        ("tasks: [null]", "eval.tasks[0]=None: give a block"),
        ("tasks:\n  - {kind: probes, text: t, probes: 5}", "eval.tasks[0].probes=5: takes keys of its own"),
        (" tasks: [", "is no YAML"),
        ("tasks: []", "needs a list `tasks`"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_suite_is_one_sentence(text, said, tmp_path, capsys):
    if text is not None:
        (tmp_path / "suite.yaml").write_text(text)
    assert main(["eval", NOT_LOADED, "--suite", str(tmp_path / "suite.yaml")]) == 2
    assert said in capsys.readouterr().err


def test_our_tasks_and_lm_evals_own_are_blocks_apart():
    parser = argparse.ArgumentParser()
    configure(parser)
    args = parser.parse_args(["m", "--tasks", "longctx_qasper,hellaswag,leval", "--data", "d", "--limit", "2"])
    ours, others = task_blocks(args, 100)
    assert (ours["tasks"], ours["metadata"], ours["include_defaults"]) == (["longctx_qasper", "leval"], {"data": "d"}, False)
    assert (others["tasks"], others["metadata"], others["include_defaults"]) == (["hellaswag"], {}, True)
    args = parser.parse_args(["m", "--tasks", "longctx_qasper", "--max-prompt", "4096, 8192"])
    assert [(block["label"], block["metadata"]) for block in task_blocks(args, 100)] == [
        ("4096", {"max_prompt": 4096}),
        ("8192", {"max_prompt": 8192}),
    ]


def test_a_directory_of_transformers_5_is_read_as_it_says(place, tmp_path):
    """Its RoPE, which transformers 4 would take for the plain one, and its tokenizer."""
    import torch

    from nemo_longctx.adapters.pretrained import hf_tokenizer, load_checkpoint

    source = shutil.copytree(place / "before", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 150, "rope_theta": config["rope_theta"]}
    kept = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    (source / "config.json").write_text(json.dumps(kept | {"rope_parameters": yarn}))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<s>"]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    model, *_ = load_checkpoint(str(source))
    old, *_ = load_checkpoint(str(place / "before"))
    ids = torch.arange(2, 200)[None]
    with torch.no_grad():
        assert not torch.equal(model.model(ids).logits, old.model(ids).logits)
    assert model.model.model.rotary_emb.attention_scaling > 1.1
    assert hf_tokenizer(str(source))("door")["input_ids"] == hf_tokenizer(str(place / "before"))("door")["input_ids"]
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "yarn"}}))
    with pytest.raises(ConfigError, match=r"rope_scaling.factor=None: missing"):
        load_checkpoint(str(source))
