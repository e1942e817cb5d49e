"""The plain names of recomputation and offload: what they mean, and what is refused before a run."""

import pytest

from nemo_longctx.activations import megatron_fields, offloaded_layers, recompute_name, recomputed_layers
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.recipe import load_recipe


@pytest.mark.parametrize(
    ("name", "again", "away"), [("none", 0, 0), ("block:1", 1, 1), ("block:3", 3, 3), ("block:9", 4, 4), ("full", 4, 4)]
)
def test_layers_of_a_name(name, again, away):
    assert recomputed_layers(name, 4) == again
    assert offloaded_layers(name, 4) == away


@pytest.mark.parametrize("wrong", ["some", "block", "block:", "block:0", "block:-1", "block:x", "blocks:2", "", None, 3])
def test_wrong_names_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"trainer\.recompute=.*block:N"):
        recomputed_layers(wrong, 4, key="trainer.recompute")
    with pytest.raises(ConfigError, match="block:N"):
        offloaded_layers(wrong, 4)
    with pytest.raises(ConfigError, match="offload='selective'"):
        offloaded_layers("selective", 4)


@pytest.mark.parametrize("name", ["none", "selective", "full", "block:7"])
def test_names_and_the_hosts_fields_are_inverse(name):
    assert recompute_name(megatron_fields(name)) == name
    assert recompute_name({"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}) == "selective (core_attn)"


def recipe(*overrides):
    return load_recipe(compose(["recipe=tiny_cpu_long", "curriculum=256_to_2048_at_50", *overrides]))


def test_each_stage_of_a_recipe_has_its_own_or_the_runs():
    assert [stage.recompute for stage in recipe("trainer.recompute=selective").curriculum.stages] == ["selective"] * 2
    stages = "curriculum.stages=[{until: 0.5, seq_length: 256}, {until: 1.0, seq_length: 2048, recompute: full}]"
    assert [stage.recompute for stage in recipe(stages).curriculum.stages] == ["none", "full"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.recompute=block", r"trainer\.recompute"),
        ("+model.recompute_granularity=full", r"model\.recompute_granularity.*trainer\.recompute"),
        ("trainer.offload=full", r"trainer\.offload='full': needs a GPU"),
        (
            "curriculum.stages=[{until: 1.0, seq_length: 2048, offload: full}]",
            r"curriculum\.stages\[0\]\.offload='full': needs a GPU",
        ),
    ],
)
def test_what_a_recipe_cannot_have_is_refused(override, said):
    with pytest.raises(ConfigError, match=said):
        recipe(override)
