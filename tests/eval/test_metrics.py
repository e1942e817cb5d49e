import dataclasses
import json
import math
from pathlib import Path

import pytest

from nemo_longctx.eval import metrics
from nemo_longctx.eval.probe_scores import score_reply
from nemo_longctx.eval.probes import Probe

SCORES = Path(__file__).parents[1] / "fixtures" / "scorers" / "scores.json"
# Each metric of ours on (prediction, reference), under the name of its goldens.
OURS = {
    "leval_option": lambda p, r: metrics.leval_choice(p, r, several=False),
    "leval_options": lambda p, r: metrics.leval_choice(p, r, several=True),
    "leval_contains": metrics.leval_contains,
    "leval_f1": lambda p, r: metrics.f1(p, [r]),
    "rouge": lambda p, r: list(metrics.rouge(p, [r]).values()),
    "zeroscrolls_f1": lambda p, r: metrics.zeroscrolls_f1(p, [r]),
    "zeroscrolls_letter": lambda p, r: float(metrics.choice_letter(p) == r),
    "zeroscrolls_similarity": metrics.exponential_similarity,
    "zeroscrolls_order": metrics.concordance_index,
    "ruler_all": metrics.found,
    "ruler_part": metrics.found_any,
    "exact_match": lambda p, r: metrics.exact_match(p, [r]),
    "helmet_contained": lambda p, r: metrics.contained(p, [r]),
    "helmet_label": lambda p, r: metrics.exact_match(metrics.after_label(p, "label:"), [r]),
    "helmet_ranking": lambda p, r: [one for one in metrics.ranking(p) if one in r],
}

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


@pytest.mark.parametrize(
    ("reply", "letter"), [("(B) because", "B"), ("B", "B"), ("The answer is C.", "C"), ("Because", ""), ("D, not (A)", "D")]
)
def test_choice_letter(reply, letter):
    assert metrics.choice_letter(reply) == letter


def test_zeroscrolls_own_metrics():
    assert metrics.exponential_similarity("about 60%", "70%") == pytest.approx(0.5)
    assert metrics.exponential_similarity("none", "70%") == 0
    assert metrics.exponential_similarity("70 of them", "70%") == 0  # a percentage is asked for
    with pytest.raises(ValueError, match="no percentage"):
        metrics.exponential_similarity("70%", "seventy")
    assert metrics.concordance_index("3, 1, 2", "1, 2, 3") == pytest.approx(1 / 3)
    assert metrics.concordance_index("1, 2, 3", "1, 2, 3") == 1
    assert metrics.concordance_index("1, 2", "1, 2, 3") == 0


def test_an_order_is_read_as_zeroscrolls_reads_it():
    assert metrics.concordance_index("2-5-3", "2, 5, 3") == 0
    assert metrics.concordance_index("2->5", "2, 5") == 0
    assert metrics.concordance_index("02, 05", "2, 5") == 1


@pytest.mark.parametrize("name", json.loads(SCORES.read_text(encoding="utf-8")))
def test_scores_are_those_of_the_official_code(name):
    """On hundreds of odd predictions, see tests/fixtures/scorers/make.py."""
    pairs = json.loads(SCORES.read_text(encoding="utf-8"))[name]
    ours = OURS[name]
    assert len(pairs) >= 300
    wrong = [(p, r, ours(p, r), said) for p, r, said in pairs if ours(p, r) != pytest.approx(said, abs=6e-5)]
    assert not wrong


def test_gains_and_similarity_by_hand():
    # Ideal order 3, 2: 3 + 2 / log2(3); the other way 2 + 3 / log2(3).
    assert metrics.ndcg(["b", "a"], {"a": 3, "b": 2}) == pytest.approx((2 + 3 / math.log2(3)) / (3 + 2 / math.log2(3)))
    assert metrics.ndcg(["x", "a"], {"a": 1}) == pytest.approx(1 / math.log2(3))
    assert metrics.ndcg(["x"] * 10 + ["a"], {"a": 1}) == 0
    assert metrics.mrcr(" wordOnce", "wordOnce", "word") == 1
    assert metrics.mrcr("Once", "wordOnce", "word") == 0
    assert metrics.mrcr("wordOncX", "wordOnce", "word") == pytest.approx(0.75)


def test_found_counts_answers():
    assert metrics.found("It is 12345 and ABC", ["12345", "abc", "9"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no answer"):
        metrics.found("x", [])


@pytest.mark.parametrize(
    ("reply", "reference", "several", "score"),
    [
        ("B", "B", False, 1.0),
        ("The correct one is (C).", "C", False, 1.0),  # the first A-D anywhere: of "The" there is none
        ("Answer: B", "B", False, 0.0),  # it begins with an A
        ("AC", "AC", True, 1.0),
        ("CA because", "AC", True, 1.0),
        ("A", "AC", True, 0.25),
        ("AB", "AC", True, 0.0),
        ("I choose B. and D.", "BD", True, 1.0),
        ("none of them", "A", True, 1.0),  # no letter counts as A
        ("", "A", False, 0.0),
        (" ", "AB", True, 0.0),
        ("The answer is C", "C", True, 1.0),
        ("**C**", "C", True, 1.0),
        ("answer is: C", "C", True, 1.0),
        ("B. Question 2: C.", "B", True, 1.0),
    ],
)
def test_leval_options(reply, reference, several, score):
    """Worked out by hand along L-Eval's Evaluation/auto_eval.py and em.py."""
    assert metrics.leval_choice(reply, reference, several=several) == score


def test_leval_short_answers():
    assert metrics.leval_contains("It was The Benefits of Yoga.\nNext", "the benefits of yoga") == 1
    assert metrics.leval_contains("\nx\nthe second topic", "Second Topic") == 1
    assert metrics.leval_contains("Sure!\nthe second topic", "second topic") == 1
    assert metrics.leval_contains("12.0", "12") == 1


def test_gap_between_groups():
    rows = [("a", 0.5), ("a", 0.7), ("b", 0.1), ("c", 0.2), ("c", math.nan)]
    assert metrics.group_gap(rows) == pytest.approx(0.5)
    assert math.isnan(metrics.group_gap(rows[:2]))


@pytest.mark.parametrize(
    ("kind", "answers", "reply", "score"),
    [
        ("first_sentence", ["the cat sat"], "The cat sat\nand more and more", 1.0),
        ("passkey", ["41", "52"], "it is 41", 0.5),
        ("passkey", ["41", "52"], "52 and 41", 1.0),
        ("ruler_vt", ["AB", "CD"], "ab", 0.5),
        ("ruler_qa_1", ["AB", "CD"], "so, cd.", 1.0),
        ("ruler_qa_1", ["AB", "CD"], "none", 0.0),
        ("nolima", ["Yuki", "Ann"], "It was Yuki.", 1.0),
        ("nolima", ["Yuki", "Ann"], "It was her.", 0.0),
        ("helmet_icl", ["7"], "label: 7\nlabel: 8", 1.0),
        ("helmet_icl", ["7"], "label: 77", 0.0),
        ("helmet_json_kv", ["a-b"], "The value is: a-b!", 1.0),
        ("helmet_rag", ["the Tapir", "x y"], "It is X  Y, they say.", 1.0),
        ("helmet_rag", ["the Tapir", "x y"], "t", 0.0),
        ("mrcr_2", ["ABCDEFGHIJsome words"], "ABCDEFGHIJsome words", 1.0),
        ("mrcr_2", ["ABCDEFGHIJsome words"], "some words", 0.0),
    ],
)
def test_each_kind_of_probe_has_the_rule_of_its_suite(kind, answers, reply, score):
    probe = Probe(kind=kind, length=1, depth=0.0, sample=0, prompt=[1], answers=answers, first=[1], max_new_tokens=1)
    assert score_reply(probe, reply) == pytest.approx(score)
    ranked = dataclasses.replace(probe, kind="helmet_rerank", answers=["3", "1", "2"], grades=[2, 1, 0])
    assert score_reply(ranked, "3 > 1 > 2") == pytest.approx(1.0)
    assert 0 < score_reply(ranked, "2 > 1 > 3") < 1


def test_what_has_no_answer_is_refused_and_what_was_not_scored_is_no_number():
    for metric in (metrics.f1, metrics.exact_match, metrics.rouge, metrics.contained):
        with pytest.raises(ValueError, match="no reference answer"):
            metric("x", [])
    with pytest.raises(ValueError, match="no answer to look for"):
        metrics.found_any("x", [])
    for reference in ("", " "):
        with pytest.raises(ValueError, match="no reference answer"):
            metrics.leval_choice("A", reference, several=False)
    assert math.isnan(metrics.mean_scored([]))
    assert math.isnan(metrics.geometric_mean([(math.nan, 0.5, 0.5)]))
    assert metrics.geometric_mean([(0.5, 0.25, 1.0), (0.5, 0.75, 0.0)]) == pytest.approx((0.5 * 0.5 * 0.5) ** (1 / 3))
    assert metrics.ndcg(["a"], {"a": 0}) == 0.0
    assert metrics.ndcg(["a", "b", "c"], {"a": 1, "b": 1, "c": 1}, count=2) == 1.0
    assert metrics.mrcr("", "wordOnce", "word") == 0.0
