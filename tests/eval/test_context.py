"""Loss on fixed targets against context: what it finds on losses that are known, and what it refuses to say."""

import csv
import itertools
import math
import re

import numpy as np
import pytest
from tiny_models import tiny_llama

from nemo_longctx.config import ConfigError
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.eval import context
from nemo_longctx.eval.hf import HFCausalModel
from nemo_longctx.eval.results import blank_result
from nemo_longctx.eval.scoring import token_losses
from nemo_longctx.eval.suite import Suite, longest_input, parse_tasks
from nemo_longctx.report.evaluation import read_results, write_results

CONTEXTS = [192, 448, 960, 1984]


def planted(level, *, documents=24, contexts=CONTEXTS, seed=0, noise=0.02):
    """Scores whose mean loss at each context is `level(c)`; documents differ by much more than contexts do."""
    rng = np.random.default_rng(seed)
    blocks = [
        rng.normal(3, 0.5) + np.array([[level(c)] for c in contexts])[None] + rng.normal(0, noise, (1, len(contexts), 8))
        for _ in range(documents)
    ]
    return context.scores(blocks, documents=range(documents), contexts=contexts, short=contexts[0])


def test_the_same_tokens_are_scored_at_every_context(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 101, n) for n in (30, 100, 64, 90, 5)]
    with CorpusWriter(tmp_path / "held_out", np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    block = {"kind": "context", "corpus": str(tmp_path / "held_out"), "contexts": [8, 24, 56], "targets": 8, "short": 24}
    tasks = parse_tasks([block])
    assert longest_input(tasks) == 64
    model = HFCausalModel(tiny_llama(vocab=101, length=128))
    result = Suite(tasks).run(model, name="tiny", quiet=True)
    assert not result.errors
    found = result.context["context_56"]
    assert found.documents == [1, 2, 3]  # those of 64 tokens and more
    for row, document in zip(found.losses, (1, 2, 3), strict=True):
        tokens = documents[document].tolist()
        expected = [token_losses(model, tokens[-8 - c :])[-8:].mean() for c in (8, 24, 56)]
        np.testing.assert_allclose(row, expected, rtol=1e-5)
    assert result.scalars()["context_56/loss_at_56"] == pytest.approx(np.mean([row[-1] for row in found.losses]), rel=1e-6)
    write_results(tmp_path / "page", [result], provenance={})
    assert read_results(tmp_path / "page")[0].context == result.context


def test_blocks_of_a_document_lie_side_by_side_and_end_with_it():
    (first, ends), (second, one) = context.choose_blocks([400, 30, 100], needed=100, documents=9, blocks=3)
    assert (first, second, one) == (0, 2, [100])
    assert (ends[0], len(ends)) == (400, 3)
    assert min(ends) >= 100
    assert all(a - b >= 100 for a, b in itertools.pairwise(ends))
    with pytest.raises(ConfigError, match="the longest document has 400"):
        context.choose_blocks([400, 30], needed=500, documents=9, blocks=1)


def test_gains_are_paired_within_documents():
    """Documents differ by 0.5 nats, contexts by 0.03: only pairing sees it. And nothing is seen where there is nothing."""
    falls = context.gain(planted(lambda c: 0.03 if c == 192 else 0.0))
    assert 0 < falls.low < 0.03 < falls.high
    flat = context.gain(planted(lambda c: 0.0, seed=1))
    assert flat.low < 0 < flat.high


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        found = context.paired(rng.exponential(1.0, 12) - 1.0, replicates=500, seed=trial)
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / 300 <= 0.98
    assert math.isnan(context.paired([0.5]).low)
    with pytest.raises(ValueError, match="no pair"):
        context.paired([math.nan])


def test_key_tokens_are_those_that_long_context_makes_easy():
    before, after = planted(lambda c: 0.0), planted(lambda c: 0.0)
    for document in after.short_tokens, after.long_tokens:
        for row in document:
            row[:] = [4.0] * 8
    after.long_tokens[0][2] = after.long_tokens[3][5] = 0.5  # looked up in what came before
    after.long_tokens[1][1] = 2.5  # falls by less than 2
    keys = context.key_tokens(after)
    assert [(d, int(t)) for d, row in enumerate(keys) for t in np.flatnonzero(row)] == [(0, 2), (3, 5)]
    assert context.key_loss(after, keys) == (0.5, 2)
    assert context.key_loss(before, keys)[0] > 1
    assert math.isnan(context.key_loss(before, [np.zeros(8, bool)] * 24)[0])


def test_the_law_is_drawn_where_the_loss_follows_it():
    contexts = [64, 128, 256, 512, 1024, 2048]
    scores = planted(lambda c: (25.4 / c) ** 0.45, contexts=contexts, noise=0.01)
    test = context.judge_law(contexts, scores.losses)
    assert test.law is not None, test.why
    assert test.law.intervals["beta"][0] < 0.45 < test.law.intervals["beta"][1]
    assert 0 < test.p_value < 0.01


@pytest.mark.parametrize(
    ("level", "noise", "why"),
    [
        (lambda c: 0.0, 0.05, "no better than a constant"),
        (lambda c: 0.3 if c < 100 else 0.0 if c < 600 else 1.0, 0.02, "no better than a constant|rises again"),
        (lambda c: 0.5 - 0.2 * (c > 100) + 0.1 * (c > 1000), 0.01, "rises again beyond"),
        (lambda c: 1.0 if c < 100 else 0.0, 0.02, "limit"),
    ],
)
def test_the_law_is_not_drawn_where_it_says_nothing(level, noise, why):
    contexts = [64, 128, 256, 512, 1024, 2048]
    scores = planted(level, contexts=contexts, noise=noise, documents=12)
    test = context.judge_law(contexts, scores.losses)
    assert test.law is None
    assert re.search(why, test.why), test.why


def test_a_constant_loss_passes_for_a_law_as_rarely_as_the_test_says():
    drawn = 0
    for trial in range(40):
        scores = planted(lambda c: 0.0, documents=10, seed=trial, noise=0.2)
        drawn += context.judge_law(CONTEXTS, scores.losses, shuffles=100, replicates=50).p_value <= 0.05
    assert drawn <= 6  # 2 expected; above 6 by chance once in 300


def test_the_page_says_what_it_shows_and_holds_what_the_csv_does(tmp_path):
    before, after = blank_result("before"), blank_result("after")
    before.context["context_1984"] = planted(lambda c: 0.001 * (c > 192) * c)
    after.context["context_1984"] = planted(lambda c: (25.4 / c) ** 0.45)
    page = write_results(tmp_path, [before, after], provenance={}).read_text(encoding="utf-8")
    gain = str(context.gain(after.context["context_1984"]))
    assert gain in page
    assert "The same tokens are predicted at every context" in page
    assert "not drawn: " in page  # of the one whose loss climbs
    with (tmp_path / "gain_by_context_1984.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["gain (nats)"] == gain
    assert all(value in page for row in rows for value in row.values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"contexts": [64]}, r"eval\.contexts"),
        ({"contexts": [64, 32]}, "rising"),
        ({"contexts": [0, 32]}, "rising"),
        ({"short": 33}, r"eval\.short=33"),
        ({"short": 128}, r"eval\.short=128"),
        ({"targets": 0}, r"eval\.targets=0"),
        ({"blocks": 0}, r"eval\.blocks=0"),
        ({"key_threshold": 0}, r"eval\.key_threshold"),
        ({"target": 3}, "did you mean 'targets'"),
    ],
)
def test_settings_are_checked(more, message):
    with pytest.raises(ConfigError, match=message):
        parse_tasks([{"kind": "context", "corpus": "x", "contexts": [64, 128], **more}])


def test_contexts_of_the_command_fit_model_and_documents():
    assert context.halves(2048, 64) == [64, 192, 448, 960, 1984]
    assert context.length_of_many([5000, 4000, 3000, 10], 2048, documents=2) == 2048
    assert context.length_of_many([5000, 1500, 3000, 10], 2048, documents=3) == 1500
    assert context.length_of_many([], 2048) == 0
    assert context.halves(0, 64) == []
