"""The demo's sentences follow its numbers, also where these say little, and its pictures hold what its tables do."""

import csv

import numpy as np
import pytest

from nemo_longctx.eval import context
from nemo_longctx.eval.probe_scores import ProbeRow
from nemo_longctx.eval.results import blank_result
from nemo_longctx.report import demo
from nemo_longctx.report.demo import BASE, LONG, LONG_LENGTH, findings, markdown, write_pictures

CONTEXTS = [32, 64, 128, 192, 448, 960, 1984]


def result(model, curve, found, old_length, seed=0):
    rng = np.random.default_rng(seed)
    made = blank_result(model)
    level = np.array([curve(c) for c in CONTEXTS])
    blocks = [rng.normal(3, 0.4) + level[None, :, None] + rng.normal(0, 0.02, (1, 7, 64)) for _ in range(20)]
    made.context["context_1984"] = context.scores(blocks, documents=range(20), contexts=CONTEXTS, short=192)
    noise = np.random.default_rng(sum(map(ord, model))).normal(0, 0.02, 20)
    made.watched["loss_position_255"] = (old_length + noise).tolist()
    for kind in ("code", "passkey"):
        for length in (256, 512, 1024, 2048):
            for depth in (0.0, 0.5):
                score = found(length)
                cell = {"depth": depth, "score": score, "answer_loss": 3 - 2 * score, "samples": 4, "skipped": 0}
                made.probes.append(ProbeRow(model=model, kind=kind, length=length, **cell))
    return made


def planted(lookup_base, lookup_long, harm=0.0):
    base = result(BASE, lambda c: -0.1 * np.log2(c / 32) if c <= 192 else 0.5, lookup_base, 3.0)
    return {BASE: base, LONG: result(LONG, lambda c: -0.1 * np.log2(c / 32), lookup_long, 3.0 + harm)}


def test_a_model_that_uses_its_context_is_said_to():
    found = findings(planted(lambda n: float(n <= 256), lambda n: 1.0))
    assert found["gain_from_256_to_2048"][LONG]["low"] > 0 > found["gain_from_256_to_2048"][BASE]["high"]
    assert found["lookups"][LONG]["code"][LONG_LENGTH] == 1.0
    said = " ".join(found["sentences"])
    assert "more than it can read does harm" in said
    assert "passkey at 2,048 tokens: the extended model finds 100%, the base 0%" in said
    assert "this is one" not in said


@pytest.mark.parametrize(("harm", "said"), [(0.2, ": this is one."), (0.05, "cannot be told apart"), (0.0, "loss of ability.")])
def test_harm_at_the_old_length_is_told(harm, said):
    assert said in findings(planted(lambda n: 1.0, lambda n: 1.0, harm))["sentences"][2]


def test_models_that_find_nothing_are_too_weak_to_tell():
    said = findings(planted(lambda n: 0.1, lambda n: 0.2))["sentences"][-1]
    assert "both are too weak to tell; at 256 tokens they find 10% and 20%" in said


def test_pictures_and_summary_hold_the_same_numbers(tmp_path):
    planted_results = planted(lambda n: float(n <= 256), lambda n: 1.0)
    write_pictures(tmp_path, planted_results)
    assert {p.name for p in tmp_path.iterdir()} == {"context.png", "context.csv", "lookups.png", "lookups.csv"}
    found = findings(planted_results)
    with (tmp_path / "context.csv").open(newline="") as file:
        losses = {(row["model"], row["read"]): row["loss"] for row in csv.DictReader(file)}
    export = {"rope_theta": 5e5, "max_position_embeddings": 2048, "max_abs_logit_difference": 0.0, "positions_compared": 2048}
    both = {"128-255": 3.0, "1024-2047": 3.0}
    summary = {"findings": found, "export": export, "losses": {BASE: both, LONG: both}, "checks": {}, "seconds": {}}
    read = {"tokens": 1000, "sources": {"d/corpus": 0.9, "d/retrieval": 0.1}}
    summary["read"] = {BASE: read | {"after": None}, LONG: read | {"after": "runs/base"}}
    text = markdown(summary | {"commands": {}})
    assert "extended to 2,048: 1,000 tokens (90% of corpus, 10% of retrieval), behind what the first had read" in text
    assert len(losses) == 14
    assert all(f"{float(loss):.3f}" in text for loss in losses.values())


def test_sentences_turn_where_an_interval_touches_its_bound(monkeypatch):
    """By hand: gains and harm with an end at the bound itself say nothing."""
    planted_results = planted(lambda n: 0.5, lambda n: 0.4999)

    def told(gain_low, base_high, harm):
        ends = iter([(0.3, base_high), (gain_low, 1.0)])
        monkeypatch.setattr(
            demo.context, "gain", lambda scores: context.Gain(mean=0.2, low=(end := next(ends))[0], high=end[1], documents=3)
        )
        monkeypatch.setattr(demo.context, "paired", lambda d: context.Gain(mean=0.05, low=harm[0], high=harm[1], documents=3))
        return findings(planted_results)["sentences"]

    uses, base, harm, code, _ = told(0.001, -0.001, (0.0501, 0.1))
    assert uses.endswith("off the loss of the extended model.")
    assert base.endswith("more than it can read does harm.")
    assert harm.endswith(": this is one.")
    assert code == "code at 2,048 tokens: the extended model finds 50%, the base 50%."  # at the floor one can do it
    uses, base, harm, *_ = told(0.0, 0.0, (0.05, 0.1))
    assert uses.endswith(": it cannot be told from none.")
    assert base.endswith("no harm seen.")
    assert harm.endswith(": it cannot be told apart.")
    assert told(0.0, 0.0, (0.0, 0.0499))[2].endswith("would be a loss of ability.")
    assert told(0.0, 0.0, (0.0, 0.05))[2].endswith(": it cannot be told apart.")
