import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.eval import guard
from nemo_longctx.eval.guard import GuardConfig, fewest_pairs, holm, judge, level, paired_change, power


def runs(count, *, looks, tasks, planted, seed, pairs=64, spread=0.1):
    """At which look of each simulated run the guard first speaks; 0 for never. Both evaluations are noisy."""
    rng, said = np.random.default_rng(seed), []
    for _ in range(count):
        true = {f"loss_{n}" if n < tasks // 2 else f"task/{n}": rng.normal(2, 1, pairs) for n in range(tasks)}
        start = {name: value + rng.normal(0, spread, pairs) for name, value in true.items()}
        first = 0
        for look in range(1, looks + 1):
            now = {name: value + rng.normal(0, spread, pairs) for name, value in true.items()}
            now["loss_0"] = now["loss_0"] + planted
            if quick(start, now, look):
                first = look
                break
        said.append(first)
    return np.array(said)


def quick(start, now, look):
    """`judge`, with fewer flips: thousands of runs are simulated. Fewer flips only make p values larger."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "paired_change", lambda a, b: paired_change(a, b, flips=100))
        return judge(start, now, GuardConfig(), look=look).alarms


def test_a_healthy_run_is_left_alone_and_a_planted_loss_found():
    assert (runs(12, looks=20, tasks=8, planted=0.0, seed=0) > 0).mean() <= 0.05
    found = runs(12, looks=3, tasks=8, planted=0.05, seed=1, pairs=256, spread=0.05)
    assert (found > 0).mean() >= 0.9


@pytest.mark.slow
def test_a_thousand_healthy_runs():
    assert (runs(1000, looks=20, tasks=8, planted=0.0, seed=2) > 0).mean() <= 0.05
    found = runs(1000, looks=3, tasks=8, planted=0.05, seed=3, pairs=256, spread=0.05)
    assert (found > 0).mean() >= 0.9


def test_what_is_spent_over_all_looks_is_the_runs_error():
    assert sum(level(0.05, look) for look in range(1, 2000)) <= 0.05
    assert level(0.05, 1) == 0.025


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.2}, 0.05) == {"a"}  # 0.0125 yes, 0.0167 no
    assert holm({"a": 0.01, "b": 0.016, "c": 0.02, "d": 0.2}, 0.05) == {"a", "b", "c"}
    assert holm({"a": 0.025, "b": 0.05}, 0.05) == {"a", "b"}  # a p-value at its level falls
    assert holm({"a": 0.0251, "b": 0.05}, 0.05) == set()
    assert holm({}, 0.05) == set()


def test_the_power_is_told_as_it_is_seen():
    """A change of what is allowed is found in the share of simulated looks that the power says."""
    rng, alpha, found, told = np.random.default_rng(4), 0.0125, [], []
    for _ in range(300):
        before = rng.normal(0, 1, 100)
        change = paired_change(before, before - 0.02 + rng.normal(0, 0.07, 100), flips=400)
        told.append(power(change, 0.02, alpha))
        found.append(change.fall <= alpha and -change.mean + guard.REACH * change.standard_error >= 0.02)
    assert np.mean(told) == pytest.approx(np.mean(found), abs=0.08)
    verdict = judge({"acc": [1.0, 0.0] * 50}, {"acc": [0.0, 1.0] * 50}, GuardConfig())
    assert 0 < verdict.power["acc"] < 0.1


def test_rare_p_values_are_told_beyond_the_number_of_flips():
    change = paired_change([0.0] * 200, [1.0] * 200)
    assert 0 < change.p_value < 1e-20
    assert change.rise < 1e-20
    assert change.fall == 1.0
    assert paired_change([0.0] * 5, [0.0] * 5).p_value == 1.0
    # With ten equal differences the exact p is 2 / 2^10, and no bound may lie below it.
    assert paired_change([0.0] * 10, [1.0] * 10).p_value >= 2 / 2**10


@pytest.mark.parametrize(
    "d", [[1, 1, 1, 1], [-1, -1, -1], [2, 1, -1, 1, 0], [3, -1, 2, 2, -4, 1, 1], [0, 0, 0], [-2, 1, -1, -1, 0, -3]], ids=str
)
def test_p_values_are_those_of_every_flip_of_signs(d):
    """The plain way: all 2^n sums, with their ties. Differences that are equal tie often, which rounding may not part."""
    signs = itertools.product((-1, 1), repeat=len(d))
    sums = np.array([sum(s * one for s, one in zip(row, d, strict=True)) for row in signs])
    found = paired_change([0.1 * n for n in range(len(d))], [0.1 * n + 0.1 * one for n, one in enumerate(d)], flips=20_000)
    assert found.rise == pytest.approx((sums >= sum(d)).mean(), abs=0.02)
    assert found.fall == pytest.approx((sums <= sum(d)).mean(), abs=0.02)
    assert found.p_value == pytest.approx((abs(sums) >= abs(sum(d))).mean(), abs=0.02)


def test_the_numbers_of_a_change_by_hand():
    d = np.random.default_rng(6).normal(0.3, 1, 19)
    found = paired_change(np.zeros(19), d)
    assert found == paired_change(np.zeros(19), d, flips=10_000, seed=0)
    assert (found.mean, found.pairs) == (pytest.approx(d.mean()), 19)
    assert found.standard_error == pytest.approx(math.sqrt(((d - d.mean()) ** 2).sum() / 18 / 19))
    assert math.isnan(paired_change([1.0], [2.0]).standard_error)
    assert paired_change([0.0] * 18, [1.0] * 18).rise == 1 / 10_001  # no flip of ten thousand goes as far
    bound = math.exp(-(60.0**2) / (2 * (40 * 4 + 20 * 1)))  # sum of differences 60, of their squares 180
    far = paired_change([0.0] * 60, [2.0] * 40 + [-1.0] * 20, flips=10)
    assert (far.rise, far.p_value) == (pytest.approx(bound), pytest.approx(2 * bound))
    back = paired_change([2.0] * 40 + [-1.0] * 20, [0.0] * 60, flips=10)
    assert (back.fall, back.rise, back.p_value) == (far.rise, far.fall, far.p_value)


def change_of(mean, error):
    return guard.Change(mean=mean, standard_error=error, p_value=0.5, pairs=9, rise=0.5, fall=0.5)


def test_power_by_hand():
    normal = NormalDist()
    assert power(change_of(0.0, 0.02), 0.05, 0.025) == pytest.approx(1 - normal.cdf(normal.inv_cdf(0.975) - 2.5))
    # An alarm asks too that the mean with two standard errors reaches the limit, which a true change of it does but so often.
    assert power(change_of(0.0, 1e-6), 0.05, 0.025) == pytest.approx(normal.cdf(2.0))
    assert (power(change_of(0.1, 0.0), 0.05, 0.025), power(change_of(0.1, 0.0), 0.0, 0.025)) == (1.0, 0.0)
    assert math.isnan(power(change_of(0.1, math.nan), 0.05, 0.025))


def spread_around(mean, error, pairs=100):
    """Values whose mean and standard error are these."""
    d = np.resize([1.0, -1.0], pairs)
    return mean + d * error * math.sqrt(pairs) / d.std(ddof=1)


def test_an_alarm_is_raised_within_two_standard_errors_of_the_limit():
    def alarms(mean, error, limit, name="loss"):
        start, sign = np.zeros(100), 1 if name == "loss" else -1
        return judge({name: start}, {name: sign * spread_around(mean, error)}, GuardConfig(loss=limit, score=limit)).alarms

    for name in ("loss", "acc"):
        assert alarms(0.04, 0.0051, 0.05, name)
        assert not alarms(0.04, 0.0049, 0.05, name)
    exact = {"loss": [1.0] * 20}, {"loss": [1.25] * 20}
    assert judge(*exact, GuardConfig(loss=0.25)).alarms  # a change of the limit reaches it
    assert not judge(*exact, GuardConfig(loss=0.2501)).alarms
    assert judge(*exact, GuardConfig(loss=0.25)).alarms == [
        "loss changed by +0.2500 ± 0.0000 since the start (p = 4.5e-05, 20 pairs, look 1); 0.25 is allowed"
    ]


def test_each_measurement_has_its_share_of_the_look():
    start = {"loss_a": np.zeros(100), "loss_b": np.zeros(100), "acc": np.zeros(100)}
    now = {name: spread_around(0.01, 0.02) for name in start}
    for look in (1, 3):
        found = judge(start, now, GuardConfig(loss=0.06, score=0.03, significance=0.1), look=look)
        for name, change in found.changes.items():
            limit = 0.03 if name == "acc" else 0.06
            assert found.power[name] == power(change, limit, level(0.1, look) / 3)


def test_pairs_show_what_means_hide():
    rng = np.random.default_rng(0)
    before = rng.normal(3, 1, 40)  # documents differ far more than the change
    after = before + 0.1 + rng.normal(0, 0.05, 40)
    change = paired_change(before, after)
    assert change.mean == pytest.approx(0.1, abs=0.03)
    assert change.p_value < 0.001
    shuffled = paired_change(before, rng.permutation(after))
    assert shuffled.p_value > 0.05


def test_no_change_is_rarely_significant():
    rng = np.random.default_rng(1)
    alarms = [paired_change(a := rng.normal(0, 1, 20), a + rng.normal(0, 1, 20), flips=500).p_value < 0.05 for _ in range(200)]
    assert 0.01 < np.mean(alarms) < 0.10


def test_pairs_that_were_not_scored_are_left_out():
    assert paired_change([1.0, np.nan, 3.0], [2.0, 5.0, 4.0]).pairs == 2
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_change([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no pair"):
        paired_change([np.nan], [1.0])


def test_judge_knows_which_way_is_worse():
    start = {"loss_position_64": [2.0] * 20, "arc/acc": [1.0] * 20}
    config = GuardConfig(loss=0.05, score=0.02)
    better = {"loss_position_64": [1.5] * 20, "arc/acc": [1.0] * 20, "new": [0.0] * 20}
    verdict = judge(start, better, config)
    assert set(verdict.changes) == set(start)
    assert verdict.alarms == []
    worse = {"loss_position_64": [2.2] * 20, "arc/acc": [0.0] * 10 + [1.0] * 10}
    alarms = judge(start, worse, config).alarms
    assert len(alarms) == 2
    assert alarms[0].startswith("loss_position_64 changed by +0.2000")
    assert judge(start, {"loss_position_64": [2.04] * 20}, config).alarms == []  # real, but within what is allowed
    assert judge({"loss_x": [2.0, 2.0]}, {"loss_x": [3.0, 3.0]}, config).alarms == []  # two documents prove nothing


def test_a_rise_is_a_loss_where_lower_is_better():
    start = {f"bold/negative/{guard.LOWER}": [0.0] * 20, f"lm/word_perplexity/{guard.LOWER}@4k": [9.0] * 20}
    more = {name: [value + 1 for value in values] for name, values in start.items()}
    assert judge(more, start, GuardConfig()).alarms == []
    assert len(judge(start, more, GuardConfig()).alarms) == 2


def test_what_cannot_be_compared_is_told_and_the_rest_judged():
    start = {"loss_a": [2.0] * 20, "loss_b": [2.0] * 3, "acc": [np.nan]}
    verdict = judge(start, {"loss_a": [3.0] * 20, "loss_b": [2.0] * 4, "acc": [1.0]}, GuardConfig())
    assert set(verdict.changes) == {"loss_a"}
    assert set(verdict.unpaired) == {"loss_b", "acc"}
    lost = judge({"loss_a": [2.0] * 3, "gone": [1.0]}, {"loss_a": [2.0] * 3, "new": [1.0]}, GuardConfig())
    assert lost.unpaired == {"new": "it was not measured at the start", "gone": "it was not measured now"}
    assert "3 measurements before and 4 after" in verdict.unpaired["loss_b"]
    assert len(verdict.alarms) == 1


def test_many_pairs_give_the_same_p_value_in_blocks(monkeypatch):
    rng = np.random.default_rng(2)
    before, after = rng.normal(0, 1, 300), rng.normal(0.1, 1, 300)
    whole = paired_change(before, after, flips=2000)
    monkeypatch.setattr(guard, "BLOCK", 1000)
    assert paired_change(before, after, flips=2000).p_value == pytest.approx(whole.p_value, abs=1e-12)


@pytest.mark.parametrize("bad", [{"loss": -1}, {"significance": 1.0}, {"action": "warm"}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        GuardConfig(**bad)


def test_a_run_s_last_words_say_what_the_guard_saw():
    start = {"loss_position_64": [2.0 + 0.001 * i for i in range(20)]}
    worse = judge(start, {"loss_position_64": [2.5 + 0.002 * i for i in range(20)]}, GuardConfig())
    assert len(worse.lines()) == 1
    assert worse.lines()[0].startswith("short-context guard: ALARM: loss_position_64 changed by +0.5")
    assert judge(start, start, GuardConfig()).lines() == ["short-context guard: no alarm: loss_position_64 +0.0000 ± 0.0000"]
    assert judge({}, {"loss_a": [2.0]}, GuardConfig()).lines() == [
        "short-context guard: nothing was compared, so it saw nothing",
        "short-context guard: loss_a was not compared: it was not measured at the start",
    ]
    assert judge({"loss_a": [2.0]}, {"loss_a": [2.0]}, GuardConfig()).lines() == [
        "short-context guard: no alarm: loss_a +0.0000 (one pair: no error)",
        "short-context guard: loss_a can raise no alarm: no change of so few pairs (1) can be told from chance at look 1, "
        "which needs 6; measure more, or less often",
    ]


def test_pairs_too_few_for_any_alarm_are_told():
    """Eight documents at eight looks: the loss rose by 2.9 nats, a run's last words were "no alarm"."""
    start, ruined = ({"loss_a": [level + i / 100 for i in range(8)]} for level in (2.0, 9.0))
    assert [len(judge(start, ruined, GuardConfig(), look=look).alarms) for look in (1, 2, 3, 8)] == [1, 1, 1, 0]
    verdict = judge(start, ruined, GuardConfig(), look=8)
    assert verdict.power == {"loss_a": 0.0}
    assert "no change of so few pairs (8) can be told from chance at look 8, which needs 11" in verdict.lines()[1]
    assert fewest_pairs(0.5**9) == 9
    for alpha in (0.05, 1e-3, 1e-4, 2e-5, 1e-9):
        fewest = fewest_pairs(alpha, 2)
        found = [paired_change([0.0] * pairs, [1.0] * pairs).rise for pairs in (fewest - 1, fewest)]
        assert found[0] > alpha / 2 >= found[1], alpha
