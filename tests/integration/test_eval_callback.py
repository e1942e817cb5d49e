"""The callback under the real NeMo trainer: training goes on to the bit as without it, and what it found is on disk."""

import csv
import json
from pathlib import Path

import host_server
import numpy as np
import pytest
from tiny_models import byte_tokenizer

from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.report.evaluation import read_results

WORKER = Path(__file__).with_name("eval_worker.py")
TEXT = "The smith opened his door to the street before six. Nobody had ever seen such a machine at work! " * 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("eval"), np.random.default_rng(0)
    for name in ("train", "held_out"):
        with CorpusWriter(directory / name, np.uint16) as writer:
            for _ in range(60):
                writer.add_document(rng.integers(0, 250, rng.integers(100, 300)))
    byte_tokenizer([TEXT]).save_pretrained(directory / "tokenizer")
    (directory / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n", encoding="utf-8")
    return directory


def train(place, name, evaluation, **more):
    recipe = {
        "name": name,
        "output_dir": str(place / "runs"),
        "model": {
            "config": "LlamaConfig", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 2,
            "num_query_groups": 2, "kv_channels": 32, "vocab_size": 384, "share_embeddings_and_output_weights": False,
            "hidden_dropout": 0.1,  # so that a random number drawn too many would show
        },
        "rope": {"variant": "rope"},
        "data": {"mix": {"sources": [{"path": str(place / "train")}]}, "num_workers": 0},
        "curriculum": {"stages": [{"until": 1.0, "seq_length": 64, "micro_batch_size": 2}], "tokens_per_step": 256,
                       "total_tokens": 1536},
        "optimizer": {"lr": 5e-3},
        "trainer": {"accelerator": "cpu", "precision": "32", "recompute": "full"},  # which an evaluation must leave alone
    }  # fmt: skip
    recipe |= more
    settings = place / f"{name}.json"
    settings.write_text(json.dumps({"recipe": recipe, "eval": evaluation}))
    return host_server.start(WORKER, settings)


def outcome(place, name, process):
    """Losses as the training log has them, digest of the weights, and what was printed."""
    status, output = process.finish()
    assert status == 0, output[-5000:]
    with (place / "runs" / name / "results" / "training.csv").open(newline="") as file:
        losses = [row["loss"] for row in csv.DictReader(file)]
    digest = next(line.split()[1] for line in output.splitlines() if line.startswith("DIGEST"))
    return losses, digest, output


@pytest.mark.slow
def test_training_is_to_the_bit_as_without(place):
    out = place / "found"
    position = {"kind": "position", "corpus": str(place / "held_out"), "documents": 6}
    evaluation = {
        "tasks": [
            {**position, "seq_length": 64, "guard": True},
            {**position, "seq_length": 200},
            {"kind": "position", "corpus": str(place / "missing"), "seq_length": 50},
            {"kind": "probes", "text": str(place / "text.jsonl"),
             "probes": {"kinds": ["passkey", "first_sentence"], "lengths": [300, 400], "depths": [0.0, 1.0], "samples": 1}},
        ],
        "directory": str(out), "every": 3, "guard": {"loss": 0.05}, "tokenizer": str(place / "tokenizer"), "max_length": 512,
    }  # fmt: skip
    processes = {name: train(place, name, settings) for name, settings in (("plain", None), ("watched", evaluation))}
    plain, weights, _ = outcome(place, "plain", processes["plain"])
    watched, same, log = outcome(place, "watched", processes["watched"])
    assert len(plain) == 6
    assert watched == plain  # written with all digits
    assert same == weights
    results = read_results(out)
    assert [result.model for result in results] == ["step 0", "step 3", "step 6"]
    for result in results:
        assert set(result.position) == {"position_64", "position_200"}
        assert list(result.errors) == ["position_50"]
        assert "missing" in result.errors["position_50"]
        assert {(row.kind, row.length) for row in result.probes} >= {("passkey", 300), ("first_sentence", 400)}
    first, last = (np.mean(result.watched["loss_position_64"]) for result in (results[0], results[-1]))
    assert last < first  # it did look at the model that is being trained
    assert "training goes on" in log
    for name in ("index.html", "loss_by_position_64.csv", "loss_by_position_200.png", "probes.csv", "probes_score.png"):
        assert (out / name).stat().st_size > 100

    # What is guarded is compared with the checkpoint as it is, not with it under the new RoPE.
    longer = place / "longer"
    base = place / "runs" / "watched"
    evaluation = {
        "tasks": [{**position, "seq_length": 64, "guard": True}, {**position, "seq_length": 200}], "directory": str(longer),
        "guard": {"loss": 0.05}, "tokenizer": str(place / "tokenizer"), "base": str(base),
    }  # fmt: skip
    more = {"restore_from": str(base), "rope": {"variant": "abf", "base": 500000.0}}
    _, _, log = outcome(place, "longer", train(place, "longer", evaluation, **more))
    before, start, end = read_results(longer)
    assert [result.model for result in (before, start, end)] == ["base", "step 0", "step 6"]
    assert list(before.position) == ["position_64"]
    assert before.watched["loss_position_64"] == pytest.approx(results[-1].watched["loss_position_64"], rel=1e-6)  # fp32
    assert start.watched["loss_position_64"] != before.watched["loss_position_64"]
    assert "a change of 0.05 would be seen with" in log
