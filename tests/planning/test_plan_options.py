"""Options of `plan`: each that is given has its effect in every stage, or is an error."""

import json

import pytest

from nemo_longctx.cli import main

TINY = "num_layers=4,hidden_size=512,ffn_hidden_size=1408,num_attention_heads=8,vocab_size=8192"
STAGES = (
    "curriculum.stages=[{until: 0.5, seq_length: 4096, micro_batch_size: 4, recompute: full, context_parallel_size: 1},"
    " {until: 1.0, seq_length: 32768, offload: 'block:2', context_parallel_size: 8}]"
)


def plan(capsys, *args):
    assert main(["plan", *args, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def stages(planned, *keys):
    return [tuple(stage[key] for key in keys) for stage in planned["layout"]["stages"]]


def test_a_micro_batch_is_that_of_memory_and_time(capsys):
    one, four = (plan(capsys, "--recipe", "llama2_7b", "--micro-batch-size", size) for size in "14")
    assert stages(four, "micro_batch_size") == [(4,)]
    (memory,), (of_one,) = stages(four, "memory_gib"), stages(one, "memory_gib")
    assert memory[0]["activations"] == pytest.approx(4 * of_one[0]["activations"])


def test_steps_and_tokens_per_step_leave_the_stages_as_they_are(capsys):
    keys = ("seq_length", "micro_batch_size", "recompute", "offload", "memory_gib", "seconds_per_step")
    recipe = plan(capsys, "--recipe", "llama2_7b", STAGES)
    steps = plan(capsys, "--recipe", "llama2_7b", STAGES, "--steps", "500")
    assert stages(steps, *keys) == stages(recipe, *keys)
    assert [row[:4] for row in stages(recipe, *keys)] == [(4096, 4, "full", "none"), (32_768, 1, "none", "block:2")]
    assert (steps["steps"], steps["tokens_per_step"]) == (500, recipe["tokens_per_step"])
    more = plan(capsys, "--recipe", "llama2_7b", STAGES, "--tokens-per-step", "8388608")
    assert (more["steps"], more["tokens_per_step"]) == (recipe["steps"], 8_388_608)
    assert stages(more, *keys[:5]) == stages(recipe, *keys[:5])


def test_a_curriculum_replaces_the_recipes_stages_and_says_so(capsys):
    replaced = plan(capsys, "--recipe", "llama2_7b", STAGES, "--curriculum", "8192@0.5,16384")
    assert stages(replaced, "seq_length", "micro_batch_size", "recompute") == [(8192, 1, "none"), (16_384, 1, "none")]
    assert any("--curriculum replaces" in note for note in replaced["notes"])
    assert main(["plan", "--recipe", "llama2_7b", "--curriculum", "8192"]) == 0
    assert "note: --curriculum replaces" in capsys.readouterr().out


def test_parallel_sizes_of_the_options_hold_in_stages_that_name_their_own(capsys):
    own = plan(capsys, "--recipe", "llama2_7b", STAGES)
    four = plan(capsys, "--recipe", "llama2_7b", STAGES, "--cp", "4")
    alone = plan(capsys, "--recipe", "llama2_7b", STAGES.replace("context_parallel_size: 8", "context_parallel_size: 4"))
    assert stages(four, "memory_gib")[1] == stages(alone, "memory_gib")[1] != stages(own, "memory_gib")[1]


def test_a_search_keeps_the_options_and_overrides_of_the_layout(capsys):
    args = ("--model", "llama2_7b", "--curriculum", "32768", "--gpus", "64", "--search")
    rows = plan(capsys, *args, "--tp", "8", "--recompute", "full", "--no-sp")["search"]
    assert {(row["layout"]["tensor_model_parallel_size"], row["layout"]["recompute"]) for row in rows} == {(8, "full")}
    assert not any(row["layout"]["sequence_parallel"] for row in rows)
    rows = plan(capsys, "--recipe", "llama2_7b", "trainer.tensor_model_parallel_size=4", "--search")["search"]
    assert {row["layout"]["tensor_model_parallel_size"] for row in rows} == {4}


def test_the_longest_length_keeps_the_options(capsys):
    args = ("--model", "llama2_7b", "--gpus", "8", "--longest")
    pinned = plan(capsys, *args, "--tp", "1", "--recompute", "none")["longest"]
    assert (pinned["layout"]["tensor_model_parallel_size"], pinned["layout"]["recompute"]) == (1, "none")
    assert pinned["seq_length"] < plan(capsys, *args)["longest"]["seq_length"]


def test_a_search_may_leave_a_recipes_sizes_for_another_number_of_gpus(capsys):
    found = plan(capsys, "--recipe", "llama2_70b", "--gpus", "96", "--tokens-per-step", "6291456", "--search")
    assert found["search"][0]["verdict"] == "fastest"
    assert any("96 GPUs do not divide" in note for note in found["notes"])
    assert main(["plan", "--recipe", "llama2_70b", "--gpus", "96"]) == 2


def test_sequence_parallelism_is_an_option(capsys):
    on, off = (plan(capsys, "--model", "llama2_7b", "--gpus", "8", "--tp", "8", sp) for sp in ("--sp", "--no-sp"))
    (on,), (off,) = stages(on, "memory_gib"), stages(off, "memory_gib")
    assert on[0]["activations"] < off[0]["activations"]
    grown = plan(capsys, "--recipe", "llama2_7b", "trainer.sequence_parallel=false", "--tp", "4")
    assert grown["layout"]["sequence_parallel"] is False


def test_a_window_is_counted_and_said(capsys, tmp_path):
    config = {"model_type": "mistral", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_attention_heads": 8, "vocab_size": 100, "sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = ("--model", str(tmp_path), "--curriculum")
    assert any("2 of 2 layers look back on 4,096 tokens" in note for note in plan(capsys, *args, "8192")["notes"])
    assert plan(capsys, *args, "4096")["notes"] == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--steps", "0"], "steps=0"),
        (["--steps", "-1"], "steps=-1"),
        (["--tokens-per-step", "0"], "tokens-per-step=0"),
        (["--curriculum", ""], "4096@0.2,32768"),
        (["--gpus", "8", "--search", "0"], "search=0"),
        (["--gpus", "8", "--search", "-2"], "search=-2"),
        (["--mfu", "0"], "--gpus"),
        (["--gpus", "8", "--mfu", "0"], "mfu=0.0"),
        (["--gpus", "8", "--mfu", "nan"], "mfu=nan"),
        (["--gpus", "8", "--vp", "-2"], "vp=-2"),
        (["--gpus", "8", "--vp", "0"], "vp=0"),
        (["--gpus", "8", "--price", "-3"], "price=-3.0"),
        (["--gpus", "8", "--price", "nan"], "price=nan"),
        (["--gpus", "8", "--price", "inf"], "price=inf"),
        (["--price", "0"], "--gpus"),
        (["--gpus", "8", "--eval-length", "-100000"], "eval-length=-100000"),
        (["--eval-length", "4096"], "--gpus"),
        (["--gpu", "h10"], "did you mean"),
        (["--gpu", "h100"], "--gpus"),
        (["--gpus", "8", "--sp"], "--tp"),
        (["--documents", "corpus"], "--flops document"),
        (["--gpus", "8", "--search", "--tp", "1", "--sp"], "leave one"),
    ],
)
def test_an_option_without_sense_or_effect_is_named(capsys, args, says):
    assert main(["plan", "--model", TINY, *args]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"mfu": null, "convention": "causal"}', "lacks mfu"),
        ('{"mfu": "0.4", "convention": "causal"}', "'0.4'"),
        ('{"mfu": 40, "convention": "causal"}', "40"),
        ('{"mfu": 0.4}', "lacks convention"),
        ("[0.4]", "mapping"),
        ("0.4 or so", "is not JSON"),
    ],
)
def test_a_measured_mfu_that_is_none_is_named_with_its_file(capsys, tmp_path, content, says):
    file = tmp_path / "throughput.json"
    file.write_text(content)
    assert main(["plan", "--model", TINY, "--gpus", "8", "--mfu-from", str(file)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert str(file) in error


def test_more_layers_than_there_are_cannot_be_recomputed(capsys):
    (stage,) = plan(capsys, "--model", "llama2_7b", "--gpus", "8", "--recompute", "block:100")["layout"]["stages"]
    assert stage["verdict"] == "cannot run"
    assert "block:100" in stage["reason"]


def test_sizes_that_contradict_the_checkpoint_are_refused_as_the_run_refuses_them(capsys):
    assert main(["plan", "--recipe", "llama2_7b", "model.num_layers=16"]) == 2
    assert "model.num_layers=16: the checkpoint checkpoints/llama2_7b has 32" in capsys.readouterr().err
    assert main(["plan", "--recipe", "llama2_7b", "model.num_layers=32", "model.num_query_groups=32"]) == 0


def test_a_batch_that_the_gpus_do_not_share_is_told_with_the_nearest_that_they_do(capsys):
    """`plan --gpus 3` ended with what does not divide what."""
    says = "the nearest step that 3 GPUs can share is --tokens-per-step 4190208"
    assert main(["plan", "--model", TINY, "--gpus", "3", "--search"]) == 2
    assert says in capsys.readouterr().err
    planned = plan(capsys, "--model", TINY, "--gpus", "3")
    assert says in planned["notes"]
    assert planned["layout"]["stages"][0]["verdict"] == "cannot run"
    near = plan(capsys, "--model", TINY, "--gpus", "3", "--tokens-per-step", "4190208")
    assert "hours" in near["layout"]
    assert not near["notes"]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--gpus", "3"], "gpus=3: must be a multiple of TP x PP x CP = 4; change one of them"),
        (["--tp", "3"], "tp=3: the 64 GPUs must be a multiple of TP x PP x CP = 6; change one of them, or --gpus"),
        (
            ["--cp", "5", "--pp", "2"],
            "pp=2: the 64 GPUs must be a multiple of TP x PP x CP = 20; change one of them, or --gpus",
        ),
        (["--gpus", "9", "--tp", "4"], "gpus=9: must be a multiple of TP x PP x CP = 8; change one of them"),
        (["--vp", "0"], "vp=0: must be a whole number of 1 or more model chunks a pipeline stage"),
        (["--micro-batch-size", "0"], "micro-batch-size=0: must be a whole number of 1 or more"),
        (["--precision", "bf17"], "precision='bf17': did you mean 'bf16'?"),
    ],
)
def test_a_layout_that_cannot_be_is_told_by_the_option_that_was_typed(capsys, typed, says):
    assert main(["plan", "--recipe", "llama2_7b", *typed]) == 2
    assert capsys.readouterr().err == f"nemo-longctx plan: error: {says}\n"
