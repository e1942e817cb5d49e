"""Factories train: the run is checked and told as the example script's is, and a RoPE that was replaced ends it."""

import json
from pathlib import Path

import host_server
import numpy as np
import pytest

from nemo_longctx.data.writer import CorpusWriter

SHORT = "restore_from=null rope=rope curriculum.stages=[{until:1.0,seq_length:64}]"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("corpus") / "numbers"
    with CorpusWriter(str(prefix), np.uint16) as writer:
        for length in (900, 2000, 1500):
            writer.add_document((np.arange(length) % 300).astype(np.uint16))
    return prefix


def start(corpus, output, name, overrides, *more):
    """(status, what was printed)."""
    worker = Path(__file__).with_name("factory_worker.py")
    return host_server.start(worker, corpus, output, name, overrides, *more).finish()


@pytest.mark.slow
def test_a_factorys_run_is_verified_goes_on_from_a_checkpoint_and_says_what_it_changed(corpus, tmp_path):
    status, said = start(corpus, tmp_path, "base", SHORT)
    assert status == 0, said[-4000:]
    assert "RoPE verified live: rope" in said
    found = next(path for path in tmp_path.rglob("*-last") if path.is_dir())
    longer = f"restore_from={found} rope=abf curriculum.stages=[{{until:1.0,seq_length:256}}]"
    status, said = start(corpus, tmp_path, "long", longer)
    assert status == 0, said[-4000:]
    assert "RoPE verified live: abf (base=500000" in said
    settings = json.loads((tmp_path / "long" / "results" / "settings.json").read_text())
    assert settings["source"] == "checkpoint"
    assert settings["settings"]["rotary_base"] == {"before": 10000, "run": 500000}
    assert settings["settings"]["seq_length"] == {"before": 64, "run": 256}
    throughput = json.loads((tmp_path / "long" / "results" / "throughput.json").read_text())
    assert throughput["stages"][0]["planned"]["memory_gib"] > 0
    assert "planned GiB" in said


@pytest.mark.slow
def test_a_rope_that_was_replaced_ends_a_factorys_run(corpus, tmp_path):
    status, said = start(corpus, tmp_path, "broken", SHORT, "break")
    assert status != 0
    assert "LiveRopeError" in said
    assert "RoPE verified live" not in said


@pytest.mark.slow
def test_nemos_own_recipe_made_long_trains_two_lengths_in_one_run(corpus, tmp_path):
    stages = [{"until": 0.5, "seq_length": 64}, {"until": 1.0, "seq_length": 256}]
    curriculum = {"stages": stages, "tokens_per_step": 512, "total_tokens": 2048}
    asked = {"curriculum": curriculum, "rope": {"variant": "abf", "base": 500000.0}}
    status, said = start(corpus, tmp_path, "stock", json.dumps(asked), "stock")
    assert status == 0, said[-4000:]
    assert "RoPE verified live: abf (base=500000" in said
    results = tmp_path / "stock" / "results"
    assert json.loads((results / "settings.json").read_text())["settings"]["rotary_base"] == {"before": 10000, "run": 500000}
    rows = (results / "training.csv").read_text().splitlines()
    assert len(rows) == 1 + 4
    assert [path for path in tmp_path.rglob("*-last") if path.is_dir()]
