"""Search: the winner wins, the losers say why; the longest length is the longest."""

from dataclasses import replace

import pytest
import yaml

from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.planning.flops import parse_curriculum
from nemo_longctx.planning.gpus import GIB, GPUS
from nemo_longctx.planning.layout import Layout, layout_faults
from nemo_longctx.planning.memory import memory_plan
from nemo_longctx.planning.models import MODELS
from nemo_longctx.planning.override import Planned, override_values, recipe_override
from nemo_longctx.planning.planner import FILL, Job, activation_choices, judge, judge_run, longest_length, search
from nemo_longctx.recipe import TrainerConfig

CHUNKED = Layout(gpus=64, loss="chunked")
JOB = Job(model=MODELS["llama2_7b"], gpu=GPUS["h100"], seq_length=32_768, tokens_per_step=4_194_304)


@pytest.fixture(scope="module")
def ranked():
    return search([JOB], CHUNKED)


def test_fastest_that_fits_is_first_and_every_loser_says_why(ranked):
    best = ranked[0]
    assert best.verdict == "fastest"
    assert best.memory_gib <= GPUS["h100"].memory_gib * FILL
    fitting = [c for c in ranked if c.verdict in ("fastest", "slower")]
    assert best.seconds <= min(c.seconds for c in fitting) * 1.01
    assert all(c.reason for c in ranked[1:])
    assert {c.verdict for c in ranked} == {"fastest", "slower", "does not fit", "cannot run"}


def test_verdicts_are_true(ranked):
    for candidate in ranked:
        faults = layout_faults(JOB.model, candidate.layout, JOB.seq_length, JOB.global_batch_size)
        assert bool(faults) == (candidate.verdict == "cannot run")
        if not faults:
            total = memory_plan(JOB.model, candidate.layout, seq_length=32_768, global_batch_size=128).total / GIB
            assert (total > GPUS["h100"].memory_gib * FILL) == (candidate.verdict == "does not fit")


def test_every_candidate_uses_all_gpus_once(ranked):
    layouts = [c.layout for c in ranked]
    assert len(set(layouts)) == len(layouts)
    assert all(layout.model_parallel_size * layout.data_parallel_size == 64 for layout in layouts)


def test_each_recomputation_and_offload_says_what_it_saves_and_costs():
    layout = Layout(gpus=64, tensor_model_parallel_size=4, context_parallel_size=2)
    rows = {(row["recompute"], row["offload"]): row for row in activation_choices(JOB, layout)}
    kept = rows["none", "none"]
    assert kept["saves_gib"] == kept["costs"] == kept["host_gib"] == 0
    for choice, row in rows.items():
        named = replace(layout, recompute=choice[0], offload=choice[1])
        total = memory_plan(JOB.model, named, seq_length=32_768, global_batch_size=128).total / GIB
        assert row["memory_gib"] == pytest.approx(total)
        assert row["saves_gib"] == pytest.approx(kept["memory_gib"] - total)
        assert choice == ("none", "none") or (row["saves_gib"] > 0 and row["costs"] > 0)
        assert (row["host_gib"] > 0) == (choice[1] != "none")
    # Recomputing the MLPs saves more than recomputing half of the layers, for less.
    assert rows["selective", "none"]["saves_gib"] > rows["block:16", "none"]["saves_gib"]
    assert rows["selective", "none"]["costs"] < rows["block:16", "none"]["costs"]
    faulty = replace(layout, tensor_model_parallel_size=64, context_parallel_size=1)
    assert activation_choices(JOB, faulty) == []


@pytest.mark.parametrize(
    "kept",
    [
        {"tensor_model_parallel_size": 8, "recompute": "full"},
        {"context_parallel_size": 2, "micro_batch_size": 2},
        {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 4, "recompute": "block:1"},
        {"tensor_model_parallel_size": 2, "sequence_parallel": False},
    ],
)
def test_what_is_pinned_stays_and_the_rest_is_searched(kept):
    ranked = search([JOB], replace(CHUNKED, **kept), kept)
    assert {tuple(getattr(c.layout, name) for name in kept) for c in ranked} == {tuple(kept.values())}
    assert len(ranked) > 10


def test_sequence_parallelism_is_on_wherever_it_can_be_whatever_the_recipe_had(ranked):
    for found in (ranked, search([JOB], replace(CHUNKED, sequence_parallel=False))):
        assert all(c.layout.sequence_parallel == (c.layout.tensor_model_parallel_size > 1) for c in found)


def test_a_layout_has_to_run_and_fit_in_every_stage():
    """12 Mi tokens are 384 sequences of 32,768, which 96 GPUs can share, and 512 of 24,576, which they cannot."""
    tokens = 3 * 2**22
    stages = [replace(JOB, seq_length=length, tokens_per_step=tokens, steps=10) for length in (24_576, 32_768)]
    base = replace(CHUNKED, gpus=96)
    alone = search(stages[1:], base)[0]
    assert layout_faults(JOB.model, alone.layout, 24_576, tokens // 24_576)  # what a search of the longest stage alone chooses
    with_all = search(stages, base)
    assert with_all[0].verdict == "cannot run"
    assert "24,576" in with_all[0].reason
    short = [replace(job, seq_length=length) for job, length in zip(stages, (4096, 32_768), strict=True)]
    found = search(short, replace(base, gpus=64), {"micro_batch_size"})
    assert found[0].verdict == "fastest"
    for stage in short:
        assert not layout_faults(JOB.model, found[0].layout, stage.seq_length, stage.global_batch_size)


def test_a_run_of_two_stages_is_judged_by_its_mean_step_and_its_fullest_stage():
    layout = replace(CHUNKED, tensor_model_parallel_size=4, recompute="full")
    stages = [replace(JOB, seq_length=4096, steps=3), replace(JOB, seq_length=32_768, steps=1)]
    (short, _), (long, _) = (judge(job, layout) for job in stages)
    both, time = judge_run(stages, layout)
    assert both.seconds == pytest.approx((3 * short.seconds + long.seconds) / 4)
    assert time.total == pytest.approx(both.seconds)
    assert both.memory_gib == max(short.memory_gib, long.memory_gib)
    assert both.tokens_per_second_per_gpu == pytest.approx(JOB.tokens_per_step / both.seconds / 64)


def test_nothing_left_by_what_is_pinned_is_an_error():
    base = replace(CHUNKED, tensor_model_parallel_size=1, sequence_parallel=True)
    with pytest.raises(ConfigError, match="leave one of them"):
        search([JOB], base, {"tensor_model_parallel_size", "sequence_parallel"})


def test_longest_length_keeps_what_is_pinned():
    model, gpu, kept = MODELS["llama2_7b"], GPUS["h100"], {"tensor_model_parallel_size": 1, "recompute": "none"}
    base = Layout(gpus=8, loss="chunked", **kept)
    longest, free = longest_length(model, gpu, base, kept), longest_length(model, gpu, base)
    assert (longest.layout.tensor_model_parallel_size, longest.layout.recompute) == (1, "none")
    assert longest.seq_length < free.seq_length
    assert free.layout.recompute == "full"


@pytest.mark.parametrize("changes", [{"recompute": "block:100"}, {"offload": "block:33"}])
def test_more_layers_than_a_model_chunk_has_cannot_run(changes):
    assert "32 layers of a model chunk" in "".join(layout_faults(JOB.model, replace(CHUNKED, **changes), 32_768, 128))
    assert not layout_faults(JOB.model, replace(CHUNKED, recompute="block:32", offload="block:32"), 32_768, 128)


@pytest.mark.parametrize("value", [-2, 0, True, 1.5])
def test_model_chunks_are_counted_in_whole_numbers(value):
    with pytest.raises(ConfigError, match="virtual_pipeline"):
        Layout(gpus=8, virtual_pipeline_model_parallel_size=value)
    assert Layout(gpus=8, virtual_pipeline_model_parallel_size=1).virtual_pipeline_model_parallel_size == 1


def test_longest_length_fits_and_a_tenth_more_does_not():
    model, gpu = MODELS["llama3_8b"], GPUS["h100"]
    longest = longest_length(model, gpu, Layout(gpus=8, loss="chunked"))

    def gib(length):
        batch = longest.layout.data_parallel_size * longest.layout.pipeline_model_parallel_size
        return memory_plan(model, longest.layout, seq_length=length, global_batch_size=batch).total / GIB

    assert gib(longest.seq_length) <= gpu.memory_gib * FILL < gib(int(longest.seq_length * 1.1))
    assert longest.seq_length > longest_length(model, gpu, Layout(gpus=8)).seq_length  # logits of all tokens cost length


def test_more_gpus_never_shorten_the_longest_length():
    lengths = [longest_length(MODELS["llama2_7b"], GPUS["h100"], Layout(gpus=n)).seq_length for n in (4, 8, 16)]
    assert lengths == sorted(lengths)


def test_a_model_that_no_layout_holds_is_an_error():
    with pytest.raises(ConfigError, match="more GPUs"):
        longest_length(MODELS["llama2_70b"], GPUS["a100"], Layout(gpus=4))


def planned(chosen, curriculum, **changes):
    values = {"model_name": "llama2_7b", "model": MODELS["llama2_7b"], "gpu": GPUS["h100"]}
    return Planned(chosen=chosen, curriculum=curriculum, **{**values, **changes})


def test_override_is_what_the_schema_accepts(ranked):
    curriculum = parse_curriculum("4096@0.2,32768", tokens_per_step=4_194_304, steps=100_000)
    text, notes = recipe_override(planned(ranked[0], curriculum))
    assert not notes
    written = yaml.safe_load(text)
    assert written["defaults"] == ["llama2_7b", "_self_"]
    trainer = build(TrainerConfig, written["trainer"])
    assert trainer.world_size == 64
    assert trainer.recompute == ranked[0].layout.recompute
    assert trainer.data_parallel_size == ranked[0].layout.data_parallel_size
    assert build(Curriculum, written["curriculum"]) == build(
        Curriculum, override_values(ranked[0].layout, curriculum, devices=8)["curriculum"]
    )
    assert written["curriculum"]["total_tokens"] == curriculum.total_tokens


def test_override_of_a_recipe_file_is_merged_into_it(ranked, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [llama2_7b, _self_]\nname: mine\ntrainer: {num_nodes: 64, log_every_n_steps: 7}\n")
    curriculum = parse_curriculum("32768", tokens_per_step=4_194_304, steps=3000)  # longer than the recipe's warm-up
    written = yaml.safe_load(recipe_override(planned(ranked[0], curriculum, recipe=str(mine)))[0])
    assert written["defaults"] == ["llama2_7b", "_self_"]
    assert written["name"] == "mine"
    assert written["trainer"]["log_every_n_steps"] == 7
    assert written["trainer"]["num_nodes"] == 8


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"precision": "fsdp_bf16"}, "precision"), ({"sharding": "full"}, "sharding"), ({"loss": "eager"}, "loss")],
)
def test_a_layout_that_no_recipe_can_say_is_not_written(ranked, changes, key):
    curriculum = parse_curriculum("32768", tokens_per_step=4_194_304, steps=100)
    with pytest.raises(ConfigError, match=key):
        override_values(replace(ranked[0].layout, **changes), curriculum, devices=8)
