"""Bad numbers are told from a run's own past, the same after a resume."""

import math

import pytest

from nemo_longctx.report.bad_numbers import BadStep, NumbersWatch


def filled(window=8):
    watch = NumbersWatch(10.0, window)
    for _ in range(window):
        assert watch.judge(4.0, 1.0) is None
    return watch


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (4.0, math.nan), (math.inf, 1.0), (4.0, math.inf)])
def test_what_is_no_number_is_told_from_the_first_step_on(loss, norm):
    kind, what = NumbersWatch(10.0, 8).judge(loss, norm)
    assert kind == "not_finite"
    assert ("loss not finite" in what) == (not math.isfinite(loss))


def test_a_spike_is_over_the_factor_and_not_at_it():
    watch = filled()
    assert watch.judge(4.0, 10.0) is None
    kind, what = watch.judge(4.0, 10.01)
    assert kind == "spike"
    assert "gradient norm jumps to 10.01, 10.0 times its median of 1" in what
    assert watch.judge(40.1, 1.0)[0] == "spike"


def test_bad_steps_do_not_become_the_usual():
    watch = filled()
    for _ in range(20):
        assert watch.judge(4.0, 50.0)[0] == "spike"
    assert len(watch.past) == 8


def test_nothing_is_a_spike_before_the_window_is_half_full():
    watch = NumbersWatch(10.0, 8)
    for _ in range(4):
        assert watch.judge(4.0, 1.0) is None
    assert watch.judge(4.0, 100.0)[0] == "spike"
    watch = NumbersWatch(10.0, 8)
    for _ in range(3):
        assert watch.judge(4.0, 1.0) is None
    assert watch.judge(4.0, 100.0) is None


def test_what_was_nothing_until_now_is_no_jump():
    """A median of 0 (a gradient that is cut off, a loss of nothing) ended the run in a division by zero."""
    watch = NumbersWatch(10.0, 4)
    assert [watch.judge(2.0, norm) for norm in (0.0, 0.0, 0.0, 5.0, 0.0)] == [None] * 5
    assert watch.judge(21.0, 0.0)[0] == "spike"


def test_a_resumed_watch_judges_the_same():
    whole, numbers = NumbersWatch(3.0, 4), [(4.0, 1.0 + 0.1 * (step % 7)) for step in range(30)] + [(4.0, 9.0), (4.0, 1.0)]
    kept = [whole.judge(*each) for each in numbers[:20]]
    resumed = NumbersWatch(3.0, 4)
    resumed.load(whole.state())
    assert [resumed.judge(*each) for each in numbers[20:]] == [whole.judge(*each) for each in numbers[20:]]
    assert resumed.state() == whole.state()
    assert not any(kept)


def test_a_step_is_named_with_stage_tokens_and_the_first_documents():
    documents = tuple(f"books:{number}" for number in range(15))
    bad = BadStep(
        step=7, stage=1, seq_length=128, first_token=1536, last_token=1792, documents=documents, what="x", policy="stop"
    )
    said = bad.sentence(most=2)
    assert said == "x at step 7, stage 1 (sequences of 128), tokens 1,536 to 1,792; documents books:0, books:1 and 13 more"
    assert bad.sentence().endswith("books:10, books:11 and 3 more")
    assert bad.sentence(most=14).endswith("books:13 and 1 more")
    assert bad.sentence(most=15).endswith("books:14")
    assert bad.record()["documents"] == documents
