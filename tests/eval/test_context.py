"""Loss on fixed targets against context: what it finds on losses that are known, and what it refuses to say."""

import csv
import dataclasses
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
from nemo_longctx.eval.scaling import ContextLaw
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


@pytest.mark.parametrize("count", [2, 3, 4])
def test_intervals_of_a_handful_of_documents_are_no_narrower_than_they_say(count):
    """Of two documents a bootstrap knows only their mean: its interval had no width, and held the truth never."""
    rng = np.random.default_rng(count)
    found = [context.paired(rng.normal(0.0, 1.0, count), replicates=200, seed=trial) for trial in range(150)]
    assert sum(each.low <= 0 <= each.high for each in found) >= 0.9 * 150
    two, three = context.paired([0.3, 0.5]), context.paired([0.3, 0.3, 0.5])
    assert (two.low, two.high) == (pytest.approx(0.4 - 12.706 * 0.1, rel=1e-3), pytest.approx(0.4 + 12.706 * 0.1, rel=1e-3))
    assert three.high - three.mean == pytest.approx(4.303 * np.std([0.3, 0.3, 0.5], ddof=1) / 3**0.5, rel=1e-3)


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


@pytest.mark.parametrize("count", [4, 12])
def test_an_interval_is_that_of_a_plain_studentized_bootstrap(count):
    d = np.random.default_rng(count).exponential(1.0, count)
    mean, error = sum(d) / count, math.sqrt(sum((x - sum(d) / count) ** 2 for x in d) / (count - 1) / count)
    t = []
    for row in np.random.default_rng(0).integers(0, count, (4000, count)):
        drawn = [d[n] for n in row]
        middle = sum(drawn) / count
        own = math.sqrt(sum((x - middle) ** 2 for x in drawn) / (count - 1) / count)
        if len(set(row)) > 1:
            t.append((middle - mean) / own)
    low, high = np.percentile(t, [2.5, 97.5])
    found = context.paired([*d, math.nan])
    assert (found.mean, found.documents) == (pytest.approx(mean), count)
    assert (found.low, found.high) == (pytest.approx(mean - high * error), pytest.approx(mean - low * error))
    assert str(dataclasses.replace(found, mean=0.5, low=-0.25, high=1.0)) == "+0.500 (-0.250 to +1.000)"


def test_a_gain_of_one_document_or_of_equal_ones_has_no_width():
    one, same = context.paired([0.25]), context.paired([0.25] * 3)
    assert (one.mean, one.documents) == (0.25, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert str(one) == "+0.250 (one document: no interval)"
    assert (same.mean, same.low, same.high, same.documents) == (0.25, 0.25, 0.25, 3)


def by_hand(short, long, **more):
    losses = [[np.mean(a), 3.0, np.mean(b)] for a, b in zip(short, long, strict=True)]
    return context.ContextScores(
        contexts=[4, 8, 16], targets=2, short=4, documents=list(range(len(short))), losses=losses, short_tokens=short,
        long_tokens=long, **more,
    )  # fmt: skip


def test_a_key_token_falls_by_more_than_two_nats_to_below_two():
    judge = by_hand([[4.0, 4.5, 6.0, 9.0], [2.0, 2.5, 4.5, 1.0]], [[2.0, 1.75, 2.0, 3.0], [0.0, 0.25, 1.99, 0.5]])
    keys = context.key_tokens(judge)
    assert [row.tolist() for row in keys] == [[False, True, False, False], [False, True, True, False]]
    assert context.key_loss(judge, keys) == (pytest.approx((1.75 + 0.25 + 1.99) / 3), 3)
    keys = context.key_tokens(dataclasses.replace(judge, key_threshold=2.5))
    assert [int(row.sum()) for row in keys] == [1, 1]
    one = np.zeros((1, 1, 2))
    assert context.scores([one], documents=[0], contexts=[4], short=4).key_threshold == 2.0


def test_losses_are_compared_token_by_token_only_where_the_tokens_are_the_same():
    found = by_hand([[1.0, 2.0]], [[0.5, 1.0]])
    same = dataclasses.replace(found, contexts=[2, 4, 16], losses=[[9.0, 9.0, 9.0]], short_tokens=[[7.0, 7.0]])
    assert found.same_targets(same)
    for other in ({"documents": [1]}, {"targets": 1}, {"short": 8}, {"contexts": [4, 8, 15]}, {"long_tokens": [[0.5]]}):
        assert not found.same_targets(dataclasses.replace(found, **other)), other


def test_rows_and_gains_of_a_table_by_hand(tmp_path):
    losses = [[3.0, 2.0, 1.0], [5.0, 5.0, 4.0], [4.0, 2.0, 1.0]]
    found = dataclasses.replace(by_hand([[1.0, 2.0]] * 3, [[0.5, 1.0]] * 3), losses=losses)
    lines = context.rows(found, "m")
    assert [(line.model, line.context, line.read, line.documents, line.tokens) for line in lines] == [
        ("m", 4, 6, 3, 6), ("m", 8, 10, 3, 6), ("m", 16, 18, 3, 6)
    ]  # fmt: skip
    assert [line.loss for line in lines] == [4.0, 3.0, 2.0]
    assert [line.standard_error for line in lines] == pytest.approx([math.sqrt(1 / 3), 1.0, 1.0])
    assert context.gain(found).mean == 2.0
    assert context.gain(found, 8).mean == 1.0
    alone = context.rows(dataclasses.replace(found, losses=found.losses[:1]), "m")
    assert all(math.isnan(line.standard_error) for line in alone)
    context.write_csv(tmp_path / "not" / "there" / "rows.csv", [lines[1], alone[1]])
    assert (tmp_path / "not" / "there" / "rows.csv").read_text().splitlines() == [
        "model,context,read,documents,tokens,loss,standard error", "m,8,10,3,6,3.000000,1", "m,8,10,1,6,2.000000,"
    ]  # fmt: skip


def test_scores_of_several_blocks_are_means_over_blocks_and_targets():
    block = np.arange(12.0).reshape(2, 2, 3) / 7  # two blocks, two contexts, three targets
    found = context.scores([block, block + 1], documents=[3, 8], contexts=[4, 8], short=4, key_threshold=1.5)
    assert found.losses[0] == pytest.approx([block[:, 0].mean(), block[:, 1].mean()])
    assert found.short_tokens[1] == [round(value, 5) for value in (block[:, 0] + 1).ravel().tolist()]
    assert found.long_tokens[0] == [round(value, 5) for value in block[:, 1].ravel().tolist()]
    assert (found.targets, found.documents, found.contexts, found.short, found.key_threshold) == (3, [3, 8], [4, 8], 4, 1.5)
    block[1, 0, 2] = math.inf
    with pytest.raises(ValueError, match="a loss of document 8 is not finite"):
        context.scores([np.zeros((1, 2, 3)), block], documents=[3, 8], contexts=[4, 8], short=4)


@pytest.mark.parametrize("length", [100, 199, 200, 250, 299, 300, 301, 1000])
def test_a_document_has_as_many_whole_blocks_as_it_holds(length):
    ((_, ends),) = context.choose_blocks([length], needed=100, documents=1, blocks=3)
    assert len(ends) == min(3, length // 100)
    assert ends[0] == length
    assert len(ends) == 1 or ends[-1] == 100
    assert all(a - b >= 100 for a, b in itertools.pairwise(ends))


def test_documents_are_drawn_evenly_from_the_long_ones():
    lengths = [100, 10, 100, 101, 99, 100, 100, 102]
    chosen = [document for document, _ in context.choose_blocks(lengths, needed=100, documents=3, blocks=1)]
    assert chosen == [0, 3, 7]
    assert len(context.choose_blocks(lengths, needed=100, documents=6, blocks=1)) == 6
    with pytest.raises(ConfigError, match="the longest document has 0;"):
        context.choose_blocks([], needed=1, documents=1, blocks=1)


LAW = ContextLaw(
    alpha=20.0, beta=0.5, gamma=1.0, intervals={"beta": (0.4, 0.6), "gamma": (0.5, 1.5)}, confidence=0.95,
    bootstrap="documents", replicates=400, samples=np.zeros((0, 3)),
)  # fmt: skip


def test_a_law_whose_intervals_end_at_a_limit_is_not_believed():
    def why(**more):
        return context.touches_limit(dataclasses.replace(LAW, **more), 400)

    def ends(beta=(0.4, 0.6), gamma=(0.5, 1.5)):
        return why(intervals={"beta": beta, "gamma": gamma})

    assert why() == why(intervals={}) == context.touches_limit(LAW, 0) == ""
    assert why(replicates=380) == ""
    assert why(replicates=379) == "21 of 400 resamples have no fit"
    assert ends(beta=(0.0102, 7.9)) == ends(gamma=(1.1e-9, 1.5)) == ""
    assert "beta, 0.0101 to 0.6, ends at a limit" in ends(beta=(0.0101, 0.6))
    assert "ends at a limit" in ends(beta=(0.4, 7.92))
    assert "the interval of gamma ends at 0" in ends(gamma=(1e-9, 1.5))


def test_how_little_a_law_is_tested_on_and_how_much_it_takes_off():
    contexts = np.array([64.0, 128, 256, 512])
    falls = np.stack([(20 / contexts) ** 0.5 + 1, (20 / contexts) ** 0.5 + 2])
    for some, losses in ((contexts, falls[:1]), (contexts[:3], falls[:, :3])):
        found = context.judge_law(some, losses)
        assert found.law is None
        assert found.why == f"not fitted: it needs 2 documents and 4 contexts, here are {len(losses)} and {len(some)}"
    rng = np.random.default_rng(0)
    noisy = falls[0] + rng.normal(0, 0.02, (12, 4))
    found = context.judge_law(contexts, noisy, shuffles=50, replicates=30)
    assert found.p_value == 1 / 51  # no deal takes off as much
    assert context.judge_law(contexts, noisy, shuffles=50, replicates=30, significance=1 / 52).why.startswith("no better than")
    full = context.judge_law(contexts, noisy)
    told = context.judge_law(contexts, noisy, replicates=400, shuffles=400, significance=0.05, seed=0)
    assert (full.p_value, full.why) == (told.p_value, told.why)
    taken = context._taken_off(contexts, np.stack([falls[0], falls[0][::-1], np.ones(4)]))
    assert taken == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


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
    assert context.halves(0, 64) == context.halves(64, 64) == []
    assert context.halves(65, 64) == [1]
    assert (context.halves(127, 32), context.halves(128, 32)) == ([95], [32, 96])
    assert context.length_of_many(range(100, 1000, 100), 9999) == 200  # of eight
