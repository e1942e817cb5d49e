"""The stream under the real NeMo trainer: ranks, workers, kills and a change of length change no step's data."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import host_server
import numpy as np
import pytest

from nemo_longctx.data.best_fit import open_windows
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.data.mixture import Documents, MixConfig, SourceConfig
from nemo_longctx.data.order import open_order
from nemo_longctx.data.writer import CorpusWriter

WORKER = Path(__file__).with_name("curriculum_worker.py")
STAGES = [{"until": 0.5, "seq_length": 32, "micro_batch_size": 2}, {"until": 1.0, "seq_length": 64, "micro_batch_size": 1}]
SIZES = {"tokens_per_step": 256, "total_tokens": 2048}  # 8 steps, the length changes after 4


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    for name in ("books", "web", "held_out"):
        with CorpusWriter(directory / name, np.uint16) as writer:
            for _ in range(200):
                writer.add_document(rng.integers(0, 100, rng.integers(3, 120)))
    return directory


def data_settings(corpora, **changes):
    return {
        "mix": {
            "sources": [{"path": str(corpora / "books"), "weight": 0.3}, {"path": str(corpora / "web"), "weight": 0.7}],
            "share_tolerance": 0.05,
        },
        "curriculum": {"stages": STAGES, **SIZES},
        "validation": [
            {"name": "short", "path": str(corpora / "held_out"), "seq_length": 16},
            {"name": "long", "path": str(corpora / "held_out"), "seq_length": 128, "micro_batch_size": 2},
        ],
        "num_workers": 0,
    } | changes


def train(directory, name, processes, data, *, expected=0, **settings):
    """Run the worker; its rows by rank, and what it printed."""
    witness, path = directory / f"{name}.rows", directory / f"{name}.json"
    path.write_text(json.dumps({"data": data, "witness": str(witness), **settings}))
    started = host_server.start(WORKER, path, processes=processes)
    status, printed = started.finish()
    started.kill()  # the checkpoint writers' process of a killed run: the host's own, for this worker has none of our callbacks
    assert status == expected, printed[-6000:]
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(directory.glob(f"{name}.*.jsonl"))]
    return rows, printed


def windows_by_step(rows_of_ranks):
    steps = defaultdict(list)
    for rows in rows_of_ranks:
        for row in rows:
            if row["mode"] == "train":
                steps[row["step"]] += row["windows"]
    return {step: sorted(windows) for step, windows in steps.items()}


def expected_windows(corpora, cache_dir):
    mix = MixConfig(
        sources=[SourceConfig(path=str(corpora / "books"), weight=0.3), SourceConfig(path=str(corpora / "web"), weight=0.7)],
        share_tolerance=0.05,
    )
    curriculum = Curriculum(stages=[StageConfig(**stage) for stage in STAGES], **SIZES)
    order = open_order(mix, Documents.open(mix), curriculum, seed=1234, cache_dir=str(cache_dir))
    windows = open_windows(order, curriculum, seed=1234, document_masking=False)
    hashes = [hashlib.sha256(windows[number]["tokens"].tobytes()).hexdigest() for number in range(len(windows))]
    steps = {}
    for step in range(curriculum.total_steps):
        first, end = (curriculum.samples_at_token(s * curriculum.tokens_per_step) for s in (step, step + 1))
        steps[step] = sorted(hashes[first:end])
    return steps


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_processes_a_kill_and_a_restart_see_the_stream(corpora, tmp_path):
    expected = expected_windows(corpora, tmp_path)
    validation = {"limit_val_batches": 3, "val_check_interval": 4}

    whole, log = train(tmp_path, "whole", 2, data_settings(corpora), **validation)
    assert windows_by_step(whole) == expected
    assert "stage 1 from step 4, 1024 tokens: sequences of 64, global batch 4" in log
    for rows in whole:
        shapes = {
            row["step"]: (row["seq_length"], row["micro_batch_size"], row["num_microbatches"])
            for row in rows
            if row["mode"] == "train"
        }
        assert shapes == dict.fromkeys(range(4), (32, 2, 2)) | dict.fromkeys(range(4, 8), (64, 1, 2))
        metrics = {row["consumed_tokens"]: row for row in rows if row["mode"] == "metrics"}
        assert sorted(metrics) == [256 * step for step in range(1, 9)]
        assert [metrics[tokens]["consumed_samples"] for tokens in (1024, 1280, 2048)] == [32, 36, 48]
        validated = [row for row in rows if row["mode"] == "validated"]
        assert [row["step"] for row in validated] == [4, 8]
        assert all({"val_loss_short", "val_loss_long", "val_loss"} <= set(row) for row in validated)
        for row in validated:  # 3 micro batches of each set, whatever the number of ranks: 48 and 768 tokens
            assert row["val_loss"] == pytest.approx((48 * row["val_loss_short"] + 768 * row["val_loss_long"]) / 816, rel=1e-6)
        lengths = [row["seq_length"] for row in rows if row["mode"] == "validation"]
        assert lengths == [16, 16, 128, 128] * 2

    checkpoint = str(tmp_path / "checkpoint")
    killed, _ = train(
        tmp_path, "killed", 1, data_settings(corpora), expected=9, save_after=3, die_after=5, checkpoint=checkpoint
    )
    assert windows_by_step(killed) == {step: expected[step] for step in range(5)}
    resumed, _ = train(tmp_path, "resumed", 2, data_settings(corpora, num_workers=1), resume=checkpoint)
    assert windows_by_step(resumed) == {step: expected[step] for step in range(3, 8)}

    _, log = train(tmp_path, "changed", 1, data_settings(corpora, seed=2), expected=1, resume=checkpoint)
    assert "data.seed, order changed since the checkpoint at 768 tokens" in log
    allowed, log = train(tmp_path, "allowed", 1, data_settings(corpora, seed=2, allow_change=True), resume=checkpoint)
    assert "going on at this address of the new stream" in log
    assert sorted(windows_by_step(allowed)) == list(range(3, 8))
    assert windows_by_step(allowed)[3] != expected[3]


@pytest.mark.slow
def test_each_stage_recomputes_what_it_says_from_its_first_step_and_changes_no_loss(corpora, tmp_path):
    stages = [STAGES[0] | {"recompute": "full"}, STAGES[1] | {"recompute": "none"}]
    (rows,), log = train(tmp_path, "recomputed", 1, data_settings(corpora, curriculum={"stages": stages, **SIZES}))
    (plain,), _ = train(tmp_path, "plain", 1, data_settings(corpora))
    steps = [row for row in rows if row["mode"] == "metrics"]
    plain_steps = [row for row in plain if row["mode"] == "metrics"]
    assert [row["layer_runs"] for row in plain_steps] == [4] * 8  # one layer, 4 micro batches a step
    assert [row["layer_runs"] for row in steps] == [8] * 4 + [4] * 4
    losses = [[row["reduced_train_loss"] for row in each] for each in (steps, plain_steps)]
    assert losses[0] == losses[1]
    assert "recompute none, offload none" in log


@pytest.mark.slow
@pytest.mark.parametrize("document_masking", [False, True])
def test_a_pipeline_exchanges_the_shapes_of_each_stage(corpora, tmp_path, document_masking):
    """Two pipeline stages through a change of length, and through validation sets of other lengths."""
    layout = {"num_layers": 2, "strategy": {"pipeline_model_parallel_size": 2}, "limit_val_batches": 3, "val_check_interval": 4}
    rows_of_ranks, _ = train(tmp_path, "pipeline", 2, data_settings(corpora, document_masking=document_masking), **layout)
    for rows in rows_of_ranks:
        trained = [row for row in rows if row["mode"] == "train"]
        assert all(row["packed"] is document_masking for row in trained)
        shapes = {row["step"]: (row["seq_length"], row["micro_batch_size"], row["num_microbatches"]) for row in trained}
        short = (64, 1, 4) if document_masking else (32, 2, 4)  # masked windows are laid end to end
        assert shapes == dict.fromkeys(range(4), short) | dict.fromkeys(range(4, 8), (64, 1, 4))
        assert len([row for row in rows if row["mode"] == "validated"]) == 2
    if not document_masking:
        assert windows_by_step(rows_of_ranks[:1]) == expected_windows(corpora, tmp_path)
