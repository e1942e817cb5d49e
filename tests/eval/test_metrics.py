import math

import pytest

from nemo_longctx.eval import metrics

# Predictions, references and results that SCROLLS publishes in its own metric's description (tau/scrolls, metrics/scrolls.py).
PREDICTIONS = ["exact match example", "hello there", "general kenobi"]
REFERENCES = [["exact match example"], ["hello", "hi there"], ["commander kenobi"]]


def test_the_official_scorers_published_example():
    pairs = list(zip(PREDICTIONS, REFERENCES, strict=True))
    assert metrics.mean_scored(metrics.f1(p, r) for p, r in pairs) == pytest.approx(0.722222, abs=1e-6)
    assert metrics.mean_scored(metrics.exact_match(p, r) for p, r in pairs) == pytest.approx(1 / 3)
    rows = [list(metrics.rouge(p, r).values()) for p, r in pairs]
    assert [sum(c) / 3 for c in zip(*rows, strict=True)] == pytest.approx([0.722222, 0.333333, 0.722222], abs=1e-6)
    assert metrics.geometric_mean(rows) == pytest.approx(0.558136, abs=1e-6)


def test_rouge_by_hand():
    # "the cat sat" / "the cat lay down": 2 of 3 and 2 of 4 words, 1 of 2 and 1 of 3 pairs, common subsequence 2.
    scores = metrics.rouge("The cat sat.", ["the cat lay down"])
    assert scores["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert scores["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert scores["rougeL"] == pytest.approx(scores["rouge1"])
    assert metrics.rouge("running", ["run"])["rouge1"] == 0  # no stemmer


def test_answers_are_normalized():
    assert metrics.exact_match("The  Answer!", ["an answer"]) == 1
    assert metrics.f1("the red fox", ["a red dog", "blue"]) == pytest.approx(0.5)
    assert metrics.f1("", ["x"]) == 0


def test_samples_that_were_not_scored_are_left_out():
    assert metrics.mean_scored([1.0, math.nan, 0.0]) == 0.5
    assert math.isnan(metrics.mean_scored([math.nan]))
    assert metrics.geometric_mean([(1, 1, 1), (math.nan, 0, 0)]) == 1


@pytest.mark.parametrize(("reply", "letter"), [("(B) because", "B"), ("B", "B"), ("The answer is C.", "C"), ("Because", "")])
def test_choice_letter(reply, letter):
    assert metrics.choice_letter(reply) == letter


def test_zeroscrolls_own_metrics():
    assert metrics.exponential_similarity("about 60%", "70%") == pytest.approx(0.5)
    assert metrics.exponential_similarity("none", "70%") == 0
    assert metrics.concordance_index("3, 1, 2", "1, 2, 3") == pytest.approx(1 / 3)
    assert metrics.concordance_index("1, 2, 3", "1, 2, 3") == 1
    assert metrics.concordance_index("1, 2", "1, 2, 3") == 0


def test_found_counts_answers():
    assert metrics.found("It is 12345 and ABC", ["12345", "abc", "9"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no answer"):
        metrics.found("x", [])
