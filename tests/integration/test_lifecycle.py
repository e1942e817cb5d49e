"""How runs stop, go on and end, through the real trainer: whatever happens in between, the run is the one never stopped."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.report.evaluation import read_results
from nemo_longctx.report.training_log import read_training_log

WORKER = Path(__file__).parent / "lifecycle_worker.py"
TINY = [
    "recipe=tiny_cpu_base", "data.tokenizer=null", "data.num_workers=0", "model.num_layers=1", "model.hidden_size=32",
    "model.ffn_hidden_size=64", "model.kv_channels=16", "model.vocab_size=100", "optimizer.warmup_tokens=0", "eval=none",
    "curriculum.stages=[{until: 0.5, seq_length: 32, micro_batch_size: 2}, {until: 1.0, seq_length: 128}]",
    "curriculum.tokens_per_step=256",
]  # fmt: skip
COLUMNS = (
    "step",
    "tokens",
    "seq_length",
    "loss",
    "lr",
    "grad_norm",
    "validation_loss",
    "validation_loss_a",
    "validation_loss_b",
)


def overrides(place, name, steps, *more, every=4, validate=8):
    sets = ", ".join(f"{{name: {n}, path: {place}/held_out, seq_length: {s}, samples: 8}}" for n, s in (("a", 16), ("b", 64)))
    return [
        *TINY, f"data.mix.sources=[{{path: {place}/text}}]", f"output_dir={place}/runs", f"name={name}",
        f"data.validation=[{sets if validate else ''}]", f"trainer.val_every_tokens={validate * 256}",
        f"checkpoint.every_tokens={every * 256}", f"curriculum.total_tokens={steps * 256}", *more,
    ]  # fmt: skip


def entries(place, name, steps, starts, *more, **clock):
    """One entry of the plan a start, all in the same directory."""
    asked = overrides(place, name, steps, *more, **clock)
    return [
        {"name": f"{name} {number}", **start, "overrides": [*asked, *start.get("more", ())]}
        for number, start in enumerate(starts)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of this file by name, made in one process."""
    place, rng = tmp_path_factory.mktemp("lifecycle"), np.random.default_rng(0)
    for corpus in ("text", "held_out"):
        with CorpusWriter(place / corpus, np.uint16) as writer:
            for _ in range(100):
                writer.add_document(rng.integers(0, 100, rng.integers(3, 200)))
    through = [  # 20 steps, a checkpoint every 4, a validation every 8
        {"act": ["validation", 8, "kill"]}, {"act": ["step", 9, "SIGTERM"]}, {"act": ["step", 13, "SIGINT"]},
        {"act": ["step", 14, "SIGUSR1"]}, {"act": ["validation", 20, "kill"]}, {"act": ["end", 20, "kill"]}, {}, {},
    ]  # fmt: skip
    sharded = "optimizer.distributed=true"
    fallback = {"tear": True, "more": ["resume.fallback=true"]}
    longer = f"curriculum.total_tokens={12 * 256}"
    task = f"{{kind: position, corpus: {place}/held_out, seq_length: 32, documents: 4, bins: 2}}"
    evaluation = f"eval={{tasks: [{task}], every: 3}}"
    wrong = "model.init_method_std=1e18"
    plan = [
        *entries(place, "whole", 20, [{}]),
        *entries(place, "stopped", 20, through),
        *entries(place, "bare", 10, [{"act": ["step", 9, "kill"]}, {}], validate=0),
        *entries(place, "evaluated", 12, [{}], evaluation, validate=0),
        *entries(
            place,
            "evaluated_stopped",
            12,
            [{"act": ["step", 5, "SIGTERM"]}, {"act": ["step", 10, "kill"]}, {"more": ["optimizer.lr=1e-3"]}],
            evaluation,
            validate=0,
        ),
        *entries(place, "longer", 10, [{}, {"more": [longer]}]),
        *entries(place, "longer_killed", 10, [{"act": ["step", 6, "kill"]}, {"more": [longer]}]),
        *entries(place, "sharded_whole", 8, [{}], sharded, validate=0),
        *entries(place, "sharded", 8, [{"act": ["step", 5, "SIGTERM"]}, {}], sharded, validate=0),
        *entries(place, "torn", 20, [{"act": ["step", 14, "kill"]}, {"tear": True}, fallback], "checkpoint.keep_last=2"),
        *entries(place, "best", 20, [{}], "checkpoint.keep=2", "checkpoint.keep_last=2"),
        *entries(place, "wrong", 4, [{}], wrong, validate=0),
        *entries(place, "wrong_skipped", 4, [{}], wrong, "bad_numbers.not_finite=skip", validate=0),
    ]
    (place / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(WORKER), str(place / "plan.json"), str(place / "results.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return place, json.loads((place / "results.json").read_text())


def curve(place, name):
    rows = read_training_log(place / "runs" / name / "results" / "training.csv")
    return [{key: row[key] for key in COLUMNS if key in row} for row in rows]


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_stopped_killed_and_resumed_is_the_run_never_stopped(runs):
    place, results = runs
    statuses = [results[f"stopped {number}"]["status"] for number in range(8)]
    assert statuses == ["killed", 143, 130, 138, "killed", "killed", 0, 0]
    assert curve(place, "stopped") == curve(place, "whole")
    assert [row["step"] for row in curve(place, "whole") if "validation_loss" in row] == [8, 16, 20]
    assert results["stopped 6"]["digest"] == results["whole 0"]["digest"] is not None


def test_each_start_leaves_the_lock_where_the_next_one_looks_for_it(runs):
    place, _ = runs
    assert (place / "runs" / "stopped" / ".lock").is_file()
    assert not list((place / "runs").glob("*/run_*/.lock"))


def test_a_signal_is_answered_with_a_checkpoint_and_the_next_command(runs):
    _, results = runs
    for number, name, step in ((1, "SIGTERM", 10), (2, "SIGINT", 14), (3, "SIGUSR1", 15)):
        entry = results[f"stopped {number}"]
        assert f"stopped by {name} after step {step} of 20, saved in " in entry["printed"]
        assert "lifecycle_worker.py" in entry["printed"].split("go on with")[1]
        assert entry["checkpoints"] == {f"step={step}-last": step}


def test_the_end_is_told_and_a_finished_run_says_so(runs):
    place, results = runs
    for number, said in ((6, "finished: "), (7, "is finished already")):
        printed = results[f"stopped {number}"]["printed"]
        assert said in printed
        assert "checkpoints/step=20-last" in printed
        assert f"nemo-longctx export {place}/runs/stopped" in printed
    assert results["stopped 7"]["digest"] is None  # nothing was built


def test_the_last_step_is_saved_without_validation(runs):
    _, results = runs
    assert results["bare 1"]["status"] == 0
    assert results["bare 1"]["checkpoints"] == {"step=10-last": 10}


def test_the_distributed_optimizer_without_transformer_engine_goes_on_to_the_bit(runs):
    place, results = runs
    assert [results[f"sharded {number}"]["status"] for number in (0, 1)] == [143, 0]
    assert curve(place, "sharded") == curve(place, "sharded_whole")
    assert results["sharded 1"]["digest"] == results["sharded_whole 0"]["digest"] is not None


def test_evaluations_are_of_the_run_that_went_on(runs):
    """One that a signal interrupts is made when the run goes on; those of steps that are trained again are made again."""
    place, results = runs
    names = ("evaluated 0", "evaluated_stopped 0", "evaluated_stopped 1", "evaluated_stopped 2")
    assert [results[name]["status"] for name in names] == [0, 143, "killed", 0]
    assert "after step 6 of 12" in results["evaluated_stopped 0"]["printed"]
    whole, stopped = (read_results(place / "runs" / name / "results" / "eval") for name in ("evaluated", "evaluated_stopped"))
    assert [each.model for each in whole] == [each.model for each in stopped] == [f"step {step}" for step in (0, 3, 6, 9, 12)]
    same = [a.position == b.position for a, b in zip(whole, stopped, strict=True)]
    assert same == [True, True, True, False, False]  # from step 8 on under another rate


@pytest.mark.parametrize(("name", "first"), [("longer", 0), ("longer_killed", "killed")])
def test_a_run_that_ended_or_was_killed_is_made_longer(runs, name, first):
    """20 % more tokens: what was trained stays, the rate goes to the new end, and the end is the new one."""
    place, results = runs
    assert [results[f"{name} {number}"]["status"] for number in (0, 1)] == [first, 0], results[f"{name} 1"]["printed"]
    trained = 4 if first == "killed" else 10  # its checkpoint
    rows, ten = (list(filter(lambda row: "loss" in row, curve(place, each))) for each in (name, "bare"))
    assert [row["step"] for row in rows] == list(range(1, 13))
    for key in ("loss", "lr", "seq_length"):
        assert [row[key] for row in rows[:trained]] == [row[key] for row in ten[:trained]]
    for row in rows[trained:]:
        cosine = 4e-4 + 0.5 * (4e-3 - 4e-4) * (1 + math.cos(math.pi * row["step"] / 12))  # of the step that comes next
        assert row["lr"] == pytest.approx(cosine, rel=1e-9)
    assert results[f"{name} 1"]["checkpoints"] == {"step=12-last": 12}
    assert json.loads((place / "runs" / name / "finished.json").read_text())["step"] == 12
    assert [row["step"] for row in curve(place, name) if "validation_loss" in row][-1] == 12


def test_a_torn_checkpoint_is_named_and_the_one_before_is_taken_if_asked(runs):
    place, results = runs
    assert results["torn 0"]["checkpoints"] == {"step=12-last": 12, "step=8-last": 8}
    refused = results["torn 1"]
    assert refused["status"] == 2
    assert "step=12-last, cannot be read: weights/__0_" in refused["printed"]
    assert "set resume.fallback=true, which goes on from the one before it, step=8-last" in refused["printed"]
    assert results["torn 2"]["status"] == 0, results["torn 2"]
    assert curve(place, "torn") == curve(place, "whole")
    assert results["torn 2"]["digest"] == results["whole 0"]["digest"]
    assert (place / "runs" / "torn" / "unreadable" / "step=12-last").is_dir()


def test_the_best_are_those_of_their_own_validations(runs):
    place, results = runs
    losses = {row["step"]: row["validation_loss"] for row in curve(place, "best") if "validation_loss" in row}
    best = sorted(losses, key=losses.__getitem__)[:2]
    kept = {f"step={step}-val_loss={losses[step]:.4f}" for step in best}
    assert set(results["best 0"]["checkpoints"]) == kept | {"step=20-last", "step=16-last"}
    assert curve(place, "best") == curve(place, "whole")


def test_a_gradient_that_is_no_number_is_named_with_its_documents(runs):
    place, results = runs
    stopped, skipped = results["wrong 0"], results["wrong_skipped 0"]
    assert stopped["status"] == 1
    said = stopped["printed"].split("error: ")[1]
    for part in ("not finite", "at step 1, stage 0 (sequences of 32), tokens 0 to 256", "documents text:", "optimizer.lr"):
        assert part in said
    assert skipped["status"] == 0
    records = [json.loads(line) for line in (place / "runs/wrong_skipped/results/bad_numbers.jsonl").read_text().splitlines()]
    assert [(record["step"], record["policy"]) for record in records] == [(step, "skip") for step in (1, 2, 3, 4)]
    assert all(record["documents"] for record in records)
