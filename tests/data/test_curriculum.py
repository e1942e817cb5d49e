"""Stages tile the run, tokens are the clock, and what does not divide is said before the run."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.curriculum import PARALLEL_SIZES, Curriculum, StageConfig


@st.composite
def curricula(draw):
    untils = sorted(draw(st.sets(st.integers(1, 99), max_size=4)))
    stages = [StageConfig(until=until / 100, seq_length=draw(st.sampled_from([4, 8, 16, 32, 64]))) for until in [*untils, 100]]
    return Curriculum(stages=stages, tokens_per_step=64, total_tokens=64 * draw(st.integers(100, 400)))


@settings(max_examples=60, deadline=None)
@given(curriculum=curricula())
def test_stages_tile_steps_samples_and_tokens(curriculum):
    plan = curriculum.plan
    for before, after in pairwise(plan):
        assert (before.end_step, before.end_sample, before.end_token) == (
            after.first_step,
            after.first_sample,
            after.first_token,
        )
    assert (plan[0].first_step, plan[0].first_sample, plan[0].first_token) == (0, 0, 0)
    assert (plan[-1].end_step, plan[-1].end_token) == (curriculum.total_steps, curriculum.total_tokens)
    for stage in plan:
        assert stage.seq_length * stage.global_batch_size == curriculum.tokens_per_step
        assert (stage.end_sample - stage.first_sample) * stage.seq_length == stage.end_token - stage.first_token
        assert abs(stage.end_token - stage.config.until * curriculum.total_tokens) <= curriculum.tokens_per_step / 2


@settings(max_examples=60, deadline=None)
@given(curriculum=curricula(), data=st.data())
def test_steps_tokens_and_samples_tell_the_same_time(curriculum, data):
    step = data.draw(st.integers(0, curriculum.total_steps - 1))
    stage = curriculum.stage_at_step(step)
    assert stage.first_step <= step < stage.end_step
    token = step * curriculum.tokens_per_step
    assert curriculum.stage_at_token(token) is stage
    sample = curriculum.samples_at_token(token)
    assert curriculum.stage_of_sample(sample) is stage
    assert curriculum.tokens_at_sample(sample) == token
    assert curriculum.samples_at_token(token + curriculum.tokens_per_step) - sample == stage.global_batch_size
    end = curriculum.total_tokens
    assert curriculum.tokens_at_sample(curriculum.samples_at_token(end)) == end
    assert curriculum.samples_at_token(end) == curriculum.total_samples


GOOD = {
    "stages": [{"until": 0.2, "seq_length": 16}, {"until": 1.0, "seq_length": 64}],
    "tokens_per_step": 64,
    "total_tokens": 6400,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "at least one stage"),
        ({"stages": [{"until": 0.5, "seq_length": 16}]}, "the last stage must end at 1.0"),
        ({"stages": [{"until": 0.6, "seq_length": 16}, {"until": 0.6, "seq_length": 8}]}, "stages overlap"),
        ({"stages": [{"until": 1.0, "seq_length": 16}, {"until": 0.4, "seq_length": 8}]}, "stages overlap"),
        ({"stages": [{"until": 1.5, "seq_length": 16}]}, r"share of the run in \(0, 1\]"),
        ({"stages": [{"until": 1.0, "seq_length": 24}]}, "must divide tokens_per_step"),
        ({"stages": [{"until": 1.0, "seq_length": 0}]}, "at least 1"),
        ({"stages": [{"until": 0.001, "seq_length": 16}, {"until": 1.0, "seq_length": 8}]}, "gets none of the 100"),
        ({"stages": [{"until": 1.0, "seq_len": 16}]}, "did you mean 'seq_length'"),
        ({"stages": [{"until": 1.0, "seq_length": 16, "recompute": "block:0"}]}, "stages.recompute='block:0'"),
        ({"stages": [{"until": 1.0, "seq_length": 16, "offload": "selective"}]}, "stages.offload='selective'"),
        ({"total_tokens": 6401}, "the nearest is 6400"),
        ({"tokens_per_step": 0}, "at least one token"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    build(Curriculum, GOOD, where="curriculum")
    with pytest.raises(ConfigError, match=message):
        build(Curriculum, GOOD | changes, where="curriculum")


@pytest.mark.parametrize("name", ["seq_length", "micro_batch_size", *PARALLEL_SIZES])
def test_sizes_of_a_stage_are_whole_numbers_of_at_least_one(name):
    for wrong in (True, False, 0, -1, 1.0, "8"):  # from Python, where no YAML is read
        with pytest.raises(ConfigError, match=rf"curriculum\.stages\.{name}={wrong!r}: a whole number of at least 1"):
            StageConfig(**{"until": 1.0, "seq_length": 8, name: wrong})
    assert getattr(StageConfig(**{"until": 1.0, "seq_length": 8, name: 1}), name) == 1


def test_a_stage_that_names_no_activations_takes_the_runs():
    stages = [{"until": 0.2, "seq_length": 16}, {"until": 1.0, "seq_length": 64, "recompute": "full", "offload": "block:2"}]
    resolved = build(Curriculum, GOOD | {"stages": stages}).with_activations(recompute="selective", offload="none")
    assert [(s.recompute, s.offload) for s in resolved.stages] == [("selective", "none"), ("full", "block:2")]


def test_a_batch_that_does_not_divide_over_the_ranks():
    stage = Curriculum.constant(seq_length=16, global_batch_size=6, total_steps=3, micro_batch_size=2).plan[0]
    assert stage.num_microbatches(1) == 3
    assert stage.num_microbatches(3) == 1
    with pytest.raises(ConfigError, match=r"micro_batch_size x 2 data-parallel ranks .* curriculum.tokens_per_step is 128$"):
        stage.num_microbatches(2)


def test_an_address_between_two_windows_is_refused():
    curriculum = build(Curriculum, GOOD)
    for token in (8, 1280 + 16, -64, 6464):
        with pytest.raises(ConfigError, match="no window begins here"):
            curriculum.samples_at_token(token)
    assert curriculum.samples_at_token(1280 + 64) == 80 + 1


def test_the_stream_does_not_depend_on_how_it_is_computed():
    other = [
        stage | {"micro_batch_size": 2, "recompute": "block:3", "offload": "full", "context_parallel_size": 2}
        for stage in GOOD["stages"]
    ]
    assert build(Curriculum, GOOD).as_dict() == build(Curriculum, GOOD | {"stages": other}).as_dict()
    assert build(Curriculum, GOOD).as_dict() != build(Curriculum, GOOD | {"total_tokens": 12800}).as_dict()


@pytest.mark.parametrize(
    ("lengths", "tokens", "said"),
    [((16,), 100, "it divides is 96"), ((16, 24), 100, "all stages divide is 96"), ((64,), 10, "it divides is 64")],
)
def test_the_nearest_step_that_windows_fill_is_told(lengths, tokens, said):
    stages = [StageConfig(until=(n + 1) / len(lengths), seq_length=length) for n, length in enumerate(lengths)]
    with pytest.raises(ConfigError, match=rf"so that each step has the same tokens; the nearest that {said}$"):
        Curriculum(stages=stages, tokens_per_step=tokens, total_tokens=tokens * 10)
