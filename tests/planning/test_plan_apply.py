"""`plan --apply`: the written file is what was planned, or there is no file."""

import json
import os

import pytest
import yaml

from nemo_longctx.cli import main
from nemo_longctx.compose import compose
from nemo_longctx.planning.recipe import recipe_plan
from nemo_longctx.recipe import load_recipe

TWO_STAGES = "curriculum.stages=[{until: 0.5, seq_length: 4096, micro_batch_size: 4}, {until: 1.0, seq_length: 32768}]"


def apply(capsys, file, *args):
    """The plan that was made, and the recipe that was written."""
    assert main(["plan", *args, "--apply", str(file), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out), load_recipe(compose([f"recipe={file}"]))


def refused(capsys, file, *args):
    assert main(["plan", *args, "--apply", str(file)]) == 2
    assert os.listdir(file.parent) == []
    return capsys.readouterr().err


def same_plan(plan, file, *args):
    """Whether the file, planned again, is the fastest layout of `plan`."""
    chosen, again = plan["search"][0], recipe_plan(str(file), *args)
    layout = chosen["layout"]
    assert again.layout.short_name() == type(again.layout)(**layout).short_name()
    assert again.layout.gpus == layout["gpus"] == plan["machine"]["gpus"]
    assert again.model.parameters == plan["model"]["parameters"]
    assert [stage.seq_length for stage in again.curriculum.plan] == [stage["seq_length"] for stage in plan["stages"]]
    assert again.curriculum.total_tokens == plan["tokens"]
    return again


def test_overrides_of_values_and_choices_are_in_the_file(capsys, tmp_path):
    file = tmp_path / "a.yaml"
    args = ("--recipe", "llama2_7b", "trainer.num_nodes=4", "rope=yarn", "seed=7", "optimizer.lr=1e-5", TWO_STAGES)
    plan, recipe = apply(capsys, file, *args)
    assert (recipe.rope["variant"], recipe.seed, recipe.optimizer.lr) == ("yarn", 7, 1e-5)
    assert recipe.rope == compose(["recipe=llama2_7b", "rope=yarn"])["rope"]
    assert same_plan(plan, file).layout.gpus == 32
    assert any("one layout" in note for note in plan["notes"])  # of the stages' own micro batches


def test_a_model_that_an_override_chooses_is_the_files(capsys, tmp_path):
    file = tmp_path / "b.yaml"
    plan, recipe = apply(capsys, file, "--recipe", "llama2_7b", "model=tiny_llama", "restore_from=null")
    assert recipe.restore_from is None
    same_plan(plan, file)


def test_choices_take_the_place_of_a_recipe_files_own(capsys, tmp_path):
    mine, file = tmp_path / "mine.yaml", tmp_path / "out.yaml"
    mine.write_text("defaults:\n- llama2_7b\n- override /rope: pi\n- override /eval: none\nname: mine\n")
    _, recipe = apply(capsys, file, "--recipe", str(mine), "rope=yarn", "~eval")
    assert (recipe.name, recipe.rope["variant"]) == ("mine", "yarn")
    assert yaml.safe_load(file.read_text())["defaults"][1:] == [{"override /rope": "yarn"}, {"override /eval": None}]


def test_an_override_that_a_file_cannot_say_is_refused(capsys, tmp_path):
    assert "optimizer.lr" in refused(capsys, tmp_path / "x.yaml", "--recipe", "llama2_7b", "~optimizer.lr")


@pytest.mark.parametrize(("gpus", "tokens"), [(20, 20 * 2**20), (12, 12 * 2**20), (64, 2**22), (4, 2**22)])
def test_all_gpus_are_in_the_file(capsys, tmp_path, gpus, tokens):
    steps = ("trainer.val_every_tokens=0", "checkpoint.every_tokens=0", "optimizer.warmup_tokens=0")  # in whole steps
    args = ("--recipe", "llama2_7b", *steps, "--gpus", str(gpus), "--tokens-per-step", str(tokens))
    plan, recipe = apply(capsys, tmp_path / "h.yaml", *args)
    trainer = recipe.trainer
    assert trainer.world_size == gpus
    assert trainer.devices % trainer.tensor_model_parallel_size == 0  # tensor parallelism stays within a node
    same_plan(plan, tmp_path / "h.yaml")
    assert any("nodes of" in note for note in plan["notes"]) == (gpus in (20, 12))


def test_nodes_stay_as_large_as_the_recipes(capsys, tmp_path):
    args = ("--recipe", "llama2_7b", "trainer.devices=4", "trainer.num_nodes=8", "--tp", "2")
    _, recipe = apply(capsys, tmp_path / "x.yaml", *args)
    assert (recipe.trainer.devices, recipe.trainer.num_nodes) == (4, 8)


def test_another_model_than_the_recipes_is_refused(capsys, tmp_path):
    args = ("--recipe", "llama2_7b", "--model", "llama2_70b", "--gpus", "256", "--curriculum", "16384")
    assert "llama2_70b" in refused(capsys, tmp_path / "g.yaml", *args)


def test_a_config_that_is_called_as_a_recipe_but_has_other_sizes_is_refused(capsys, tmp_path):
    folder = tmp_path / "llama2_7b"
    folder.mkdir()
    sizes = {"num_hidden_layers": 16, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000, **sizes}))
    out = tmp_path / "out"
    out.mkdir()
    args = ("--model", str(folder), "--curriculum", "4096", "--gpus", "64")
    assert "would train" in refused(capsys, out / "x.yaml", *args)


def test_sizes_given_for_a_checkpoint_that_is_not_here_are_taken_with_a_note(capsys, tmp_path):
    file = tmp_path / "x.yaml"
    args = ("--recipe", "llama2_7b", "restore_from=nowhere/step=100-last", "--model", "llama2_7b")
    plan, recipe = apply(capsys, file, *args)
    assert recipe.restore_from == "nowhere/step=100-last"
    assert any("--model" in note for note in plan["notes"])


@pytest.mark.parametrize(
    "args",
    [
        ("--model", "llama2_7b", "--tokens-per-step", "12582912", "--curriculum", "24576@0.5,32768", "--gpus", "96"),
        ("--recipe", "llama2_7b", "--tokens-per-step", "6291456"),  # warm-up is no multiple of it
        ("--model", "llama2_7b", "--gpus", "8", "--precision", "fsdp_bf16"),
    ],
)
def test_a_plan_that_no_run_would_take_leaves_no_file(capsys, tmp_path, args):
    refused(capsys, tmp_path / "d.yaml", *args)


def test_a_file_that_is_there_stays_when_the_plan_is_refused(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("precious")
    assert main(["plan", "--model", "llama2_7b", "--gpus", "8", "--precision", "fsdp_bf16", "--apply", str(file)]) == 2
    assert file.read_text() == "precious"
    assert main(["plan", "--recipe", "llama2_7b", "--gpus", "64", "--apply", str(file)]) == 2  # it was written over
    assert file.read_text() == "precious"
    assert "is there already, and no plan wrote it; name another file" in capsys.readouterr().err
    for gpus in ("64", "128"):  # what an earlier plan wrote is replaced
        assert main(["plan", "--recipe", "llama2_7b", "--gpus", gpus, "--apply", str(tmp_path / "plan.yaml")]) == 0
        assert f"on {gpus} x" in (tmp_path / "plan.yaml").read_text()
    assert main(["plan", "--model", "llama2_7b", "--gpus", "8", "--apply", str(tmp_path / "x.json")]) == 2
    assert ".yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "says"), [("--gpu", "h200", "--gpu h200"), ("--eval-length", "65536", "--eval-length 65536")]
)
def test_what_a_recipe_cannot_hold_is_said_and_stands_in_the_file(capsys, tmp_path, option, value, says):
    file = tmp_path / "y.yaml"
    plan, _ = apply(capsys, file, "--recipe", "llama2_7b", option, value)
    assert any(says in note for note in plan["notes"])
    assert says in file.read_text()


def test_steps_and_curriculum_of_the_options_are_in_the_file(capsys, tmp_path):
    args = ("--recipe", "llama2_7b", "--steps", "4000", "--curriculum", "8192@0.25,65536", "--micro-batch-size", "2")
    plan, recipe = apply(capsys, tmp_path / "x.yaml", *args)
    assert [stage.seq_length for stage in recipe.curriculum.stages] == [8192, 65_536]
    assert [stage.micro_batch_size for stage in recipe.curriculum.stages] == [2, 2]
    assert recipe.curriculum.total_steps == 4000
    same_plan(plan, tmp_path / "x.yaml")


def test_a_cpu_recipe_searched_on_gpus_is_planned_as_it_will_run_there(capsys, tmp_path):
    plan, _ = apply(capsys, tmp_path / "x.yaml", "--recipe", "tiny_cpu_base", "--gpu", "h100", "--gpus", "2")
    assert plan["layout"]["unfused"] is False
    assert plan["notes"] == []
    same_plan(plan, tmp_path / "x.yaml")
