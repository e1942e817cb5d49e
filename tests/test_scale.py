"""`scale=tiny`: every recipe made small in its sizes, and in nothing else."""

import dataclasses
import math

import pytest

from nemo_longctx.compose import compose, groups
from nemo_longctx.config import ConfigError
from nemo_longctx.explain import sources_of
from nemo_longctx.recipe import load_instruct_recipe, load_recipe
from nemo_longctx.resume import flat
from nemo_longctx.scale import ScaleConfig, scaled

SIZES = ("seq_length", "samples", "documents", "targets", "_tokens", "tokens_per_step", "length", "lengths", "contexts",
         "short", "drop_longer", "drop_shorter", "every", "_parallel_size", "devices", "num_nodes", "sequence_parallel",
         "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size")  # fmt: skip
TUNING = ["restore_from=base", "data.tokenizer=t", "data.short=[a]", "data.long=[b]",
          "data.pretraining={sources: [{path: c}]}"]  # fmt: skip


@pytest.mark.parametrize("name", groups()["recipe"])
def test_every_recipe_is_small_and_otherwise_itself(name):
    whole, small = compose([f"recipe={name}"]), compose([f"recipe={name}", "scale=tiny"])
    recipe, before = load_recipe(small), load_recipe(whole)
    assert recipe.seq_length <= 256
    assert recipe.curriculum.total_steps <= 12
    assert recipe.trainer.world_size <= 2
    assert (recipe.trainer.world_size > 1) == (before.trainer.world_size > 1)
    assert len(recipe.curriculum.stages) == len(before.curriculum.stages)
    for interval in ("trainer.val_every_tokens", "checkpoint.every_tokens", "optimizer.warmup_tokens"):
        part, key = interval.split(".")
        assert bool(getattr(getattr(recipe, part), key)) == bool(getattr(getattr(before, part), key))
    was, now = flat(whole), flat(small)
    changed = {key for key in was.keys() | now.keys() if was.get(key) != now.get(key)}
    assert changed
    assert [key for key in changed if not key.endswith(SIZES)] == []


def test_lengths_shrink_by_one_factor():
    whole, small = (load_recipe(compose(["recipe=tiny_cpu_long", *scale])) for scale in ([], ["scale=tiny"]))
    assert whole.seq_length == 8 * small.seq_length
    assert [s.seq_length for s in whole.data.validation] == [8 * s.seq_length for s in small.data.validation]
    assert whole.eval.tasks[2].contexts == tuple(8 * tokens for tokens in small.eval.tasks[2].contexts)
    assert whole.eval.max_length == 8 * small.eval.max_length
    stages = load_recipe(compose(["recipe=llama2_7b_curriculum", "scale=tiny"])).curriculum.stages
    assert [(stage.until, stage.seq_length) for stage in stages] == [(0.2, 32), (1.0, 256)]


@pytest.mark.parametrize("name", ["llama2_7b", "llama2_70b", "llama3_8b", "qwen25_7b", "mistral_7b"])
def test_a_small_model_keeps_its_class_and_ratios(name):
    base = ["recipe=llama2_7b", f"model={name}", "restore_from=null", "rope=null"]
    whole, small = compose(base)["model"], compose([*base, "scale=tiny"])["model"]
    assert {key: small[key] for key in whole if key != "vocab_size"} == {
        key: whole[key] for key in whole if key != "vocab_size"
    }
    assert small["num_attention_heads"] % small["num_query_groups"] == 0
    assert (small["num_query_groups"] == small["num_attention_heads"]) == (name == "llama2_7b")
    assert 2 < small["ffn_hidden_size"] / small["hidden_size"] < 6


def test_what_the_command_line_says_stays_as_said():
    asked = ["recipe=llama2_7b", "scale=tiny", "curriculum.stages=[{until: 1.0, seq_length: 32}]",
             "checkpoint.every_tokens=256", "trainer.tensor_model_parallel_size=1", "curriculum.total_tokens=1024",
             "curriculum.tokens_per_step=256",
             "trainer.val_every_tokens=0"]  # fmt: skip
    recipe = load_recipe(compose(asked))
    assert (recipe.seq_length, recipe.curriculum.total_steps, recipe.checkpoint.every_tokens) == (32, 4, 256)
    assert recipe.data.validation[0].seq_length == 128  # by the recipe's factor, whatever the command line's lengths
    assert (recipe.trainer.tensor_model_parallel_size, recipe.trainer.context_parallel_size) == (1, 2)
    assert not recipe.trainer.sequence_parallel


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_parallel_sizes_fit_the_processes(processes):
    trainer = load_recipe(compose(["recipe=codellama_34b", "scale=tiny", f"scale.processes={processes}"])).trainer
    sizes = trainer.tensor_model_parallel_size, trainer.context_parallel_size, trainer.pipeline_model_parallel_size
    assert trainer.world_size == processes
    assert math.prod(sizes) == processes
    assert sizes == {1: (1, 1, 1), 2: (2, 1, 1), 4: (4, 1, 1), 8: (4, 2, 1)}[processes]


def test_stages_of_any_lengths_and_shares_stay_whole(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "defaults: [llama2_7b, _self_]\ncurriculum:\n  tokens_per_step: 4718592\n  total_tokens: 4718592000\n  stages:\n"
        "  - {until: 0.03, seq_length: 4096, micro_batch_size: 3}\n  - {until: 0.5, seq_length: 12288}\n"
        "  - {until: 1.0, seq_length: 32768}\noptimizer: {warmup_tokens: 0}\n"
        "trainer: {val_every_tokens: 0, tensor_model_parallel_size: 1, context_parallel_size: 1, sequence_parallel: false}\n"
        "checkpoint: {every_tokens: 0}\n"
    )
    recipe = load_recipe(compose([f"recipe={mine}", "scale=tiny"]))
    assert [stage.seq_length for stage in recipe.curriculum.stages] == [32, 96, 256]
    assert recipe.trainer.data_parallel_size == 2
    assert 12 < recipe.curriculum.total_steps < 50  # a step or more in the stage of 3 %


@pytest.mark.parametrize("row", groups()["sft"])
def test_every_row_of_instruction_tuning_is_small(row):
    recipe = load_instruct_recipe(compose([*TUNING, f"sft={row}", "scale=tiny"], config_name="sft"))
    assert recipe.seq_length == 256
    assert recipe.curriculum.total_steps == 12


def test_a_wrong_scale_is_named():
    with pytest.raises(ConfigError, match=r"scale.step=3: unknown key, did you mean 'steps'"):
        compose(["recipe=llama2_7b", "scale=tiny", "scale.step=3"])
    with pytest.raises(ConfigError, match=r"scale.steps=0: set a whole number"):
        compose(["recipe=llama2_7b", "scale=tiny", "scale.steps=0"])
    with pytest.raises(ConfigError, match="scale='tinny': no such choice, did you mean 'tiny'"):
        compose(["recipe=llama2_7b", "scale=tinny"])


def test_print_config_says_what_the_scale_made():
    sources = sources_of(["recipe=llama2_7b", "scale=tiny", "checkpoint.every_tokens=2048"])
    assert sources["curriculum.tokens_per_step"] == sources["trainer.num_nodes"] == "conf/scale/tiny.yaml"
    assert sources["checkpoint.every_tokens"] == "command line"
    assert sources["optimizer.lr"] == "conf/recipe/llama2_7b.yaml"


def test_a_scale_of_nothing_is_a_laptop_s():
    assert dataclasses.asdict(ScaleConfig()) == {
        "longest": 256, "lengths": None, "windows": 8, "steps": 12, "num_layers": 2, "hidden_size": 128,
        "num_attention_heads": 8, "vocab_size": 512, "processes": 2,
    }  # fmt: skip
    for field in dataclasses.fields(ScaleConfig):
        smallest = {"hidden_size": 8} if field.name == "hidden_size" else {field.name: 1}
        ScaleConfig(**smallest)
        with pytest.raises(ConfigError, match=rf"^scale\.{field.name}=0: set a whole number of at least 1"):
            ScaleConfig(**{field.name: 0})
    with pytest.raises(ConfigError, match=r"^scale\.num_attention_heads=3: must divide scale\.hidden_size"):
        ScaleConfig(num_attention_heads=3)


def a_run():
    """A recipe as composed, of plain numbers."""
    return {
        "model": {"config": "Own", "num_layers": 8, "hidden_size": 1024, "num_attention_heads": 16, "num_query_groups": 4,
                  "ffn_hidden_size": 2816, "vocab_size": 400},
        "trainer": {"devices": 4, "num_nodes": 4, "tensor_model_parallel_size": 4, "context_parallel_size": 2,
                    "pipeline_model_parallel_size": 2, "sequence_parallel": True, "virtual_pipeline_model_parallel_size": 2,
                    "val_every_tokens": 0, "precision": "32"},
        "curriculum": {"stages": [{"until": 0.5, "seq_length": 1024, "tensor_model_parallel_size": 4},
                                  {"until": 1.0, "seq_length": 4096, "micro_batch_size": 2}],
                       "tokens_per_step": 2**20, "total_tokens": 2**20 * 1000},
        "data": {"validation": [{"seq_length": 4096, "samples": 64}, {"seq_length": 1024, "samples": 3}],
                 "mix": {"drop_shorter": 2048, "long_length": 8, "sources": [{"path": "a", "drop_longer": 64_000}]}},
        "eval": {"every": 500, "max_length": 4096,
                 "tasks": [{"contexts": [512, 1024, 1030], "targets": 64, "documents": 100}, {"probes": {"lengths": [4096]}},
                           {"metadata": {"max_prompt": 2048}, "limit": 4}]},
        "optimizer": {"warmup_tokens": 2**20 * 20, "lr": 0.1},
        "checkpoint": {"every_tokens": 2**20 * 100},
        "rope": {"variant": "yarn", "original_max_position_embeddings": 1024},
        "scale": {},
    }  # fmt: skip


def test_every_number_of_a_run_is_scaled_by_its_rule():
    """Lengths by 16 = 4,096 / 256, counts of tokens to 12 steps, sizes and processes to what the scale gives."""
    small = scaled(a_run(), recipe=a_run())
    assert small["trainer"] == {
        "devices": 2, "num_nodes": 1, "tensor_model_parallel_size": 2, "context_parallel_size": 1,
        "pipeline_model_parallel_size": 1, "sequence_parallel": True, "virtual_pipeline_model_parallel_size": None,
        "val_every_tokens": 0, "precision": "32",
    }  # fmt: skip
    assert small["model"] == {
        "config": "Own", "num_layers": 2, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 2,
        "kv_channels": 16,
        "ffn_hidden_size": 352, "vocab_size": 400,
    }  # fmt: skip
    first, second = small["curriculum"]["stages"]
    assert first == {"until": 0.5, "seq_length": 64, "tensor_model_parallel_size": 2}
    assert second == {"until": 1.0, "seq_length": 256, "micro_batch_size": 2}
    step = 2048  # 8 windows of 256, whole for 64 and for 2 x 256
    assert (small["curriculum"]["tokens_per_step"], small["curriculum"]["total_tokens"]) == (step, step * 12)
    assert small["data"]["validation"] == [{"seq_length": 256, "samples": 8}, {"seq_length": 64, "samples": 3}]
    assert small["data"]["mix"] == {"drop_shorter": 128, "long_length": 1, "sources": [{"path": "a", "drop_longer": 4000}]}
    assert small["eval"] == {
        "every": 6, "max_length": 256,
        "tasks": [{"contexts": [32, 64], "targets": 4, "documents": 8}, {"probes": {"lengths": [256]}},
                  {"metadata": {"max_prompt": 128}, "limit": 4}],
    }  # fmt: skip
    assert small["optimizer"] == {"warmup_tokens": step, "lr": 0.1}
    assert small["checkpoint"] == {"every_tokens": 3 * step}
    assert small["rope"] == {"variant": "yarn", "original_max_position_embeddings": 64}
    assert "scale" not in small
    said = ("trainer.devices", "curriculum.stages", "data.validation[1]", "eval.tasks[0].contexts", "model.hidden_size")
    kept = scaled(a_run(), recipe=a_run(), said=said)
    assert (kept["trainer"]["devices"], kept["curriculum"]["stages"]) == (4, a_run()["curriculum"]["stages"])
    assert kept["data"]["validation"] == [{"seq_length": 256, "samples": 8}, {"seq_length": 1024, "samples": 3}]
    assert kept["eval"]["tasks"][0] == {"contexts": [512, 1024, 1030], "targets": 4, "documents": 8}
    assert kept["model"]["hidden_size"] == 1024
    fewer = a_run() | {"scale": {"lengths": 4, "steps": 3, "windows": 1, "processes": 16}}
    made = scaled(fewer, recipe=a_run())
    assert [stage["seq_length"] for stage in made["curriculum"]["stages"]] == [256, 1024]
    assert made["curriculum"]["total_tokens"] == 3 * made["curriculum"]["tokens_per_step"]
    assert (made["trainer"]["devices"], made["trainer"]["pipeline_model_parallel_size"]) == (16, 2)


def test_blocks_of_layers_are_no_more_than_the_small_model_has():
    made = compose(["recipe=llama2_7b", "model=llama2_7b", "restore_from=null", "scale=tiny", "trainer.offload=block:1",
                    "curriculum.stages=[{until: 1.0, seq_length: 32768, recompute: 'block:9'}]"])  # fmt: skip
    assert made["curriculum"]["stages"][0]["recompute"] == "block:9"  # as the command line says
    values = {"model": {"config": "Llama2Config7B"}, "trainer": {"recompute": "block:9", "offload": "block:1"}, "scale": {}}
    values["curriculum"] = {"stages": [{"until": 1.0, "seq_length": 512, "offload": "block:9"}], "tokens_per_step": 4096,
                            "total_tokens": 40960}  # fmt: skip
    small = scaled(values, recipe=values)
    assert (small["trainer"]["recompute"], small["trainer"]["offload"]) == ("block:2", "block:1")
    assert small["curriculum"]["stages"][0]["offload"] == "block:2"
