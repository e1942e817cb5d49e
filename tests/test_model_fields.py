"""Model fields are checked without the host: kinds, bounds, sizes against the layout; what a run would overwrite is refused."""

import pytest

from nemo_longctx import launch, model_fields
from nemo_longctx.compose import compose
from nemo_longctx.config import ConfigError
from nemo_longctx.data.curriculum import Curriculum, StageConfig
from nemo_longctx.model_fields import SET_BY_THE_RUN, check_layout, check_model, no_rope_layers
from nemo_longctx.recipe import TrainerConfig, load_recipe


@pytest.mark.parametrize("name", sorted(SET_BY_THE_RUN))
def test_what_the_run_sets_is_refused(name):
    with pytest.raises(ConfigError, match=f"model.{name}=1: the run sets it"):
        check_model({"config": "LlamaConfig", name: 1})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_layers": 2.0}, "must be a whole number; write 2"),
        ({"num_layers": 0}, "at least 1"),
        ({"num_layers": None}, "must be a whole number"),
        ({"hidden_size": "wide"}, "must be a whole number"),
        ({"hidden_size": True}, "must be a whole number"),
        ({"vocab_size": 2**40}, "at most"),
        ({"hidden_dropout": 1.0}, "share in [0, 1)"),
        ({"hidden_dropout": float("nan")}, "must be a finite number"),
        ({"init_method_std": 0}, "above 0"),
        ({"layernorm_epsilon": float("inf")}, "must be a finite number"),
        ({"rotary_base": 1}, "above 1"),
        ({"rotary_percent": 1.5}, "share in (0, 1]"),
        ({"add_qkv_bias": "no"}, "must be true or false"),
        ({"normalization": ["RMSNorm"]}, "must be text"),
        ({"window_size": 4096}, "must be a list"),
        ({"window_size": [1, 2, 3]}, "two whole numbers"),
        ({"window_size": [1023, 3]}, "looks ahead, where attention is causal"),
        ({"moe_router_bias_update_rate": float("nan")}, "must be a finite number"),
        ({"moe_layer_freq": [1.0, float("inf")]}, "moe_layer_freq[1]=inf: must be a finite number"),
        ({"num_layer": 3}, "no field of the host's config classes, did you mean 'num_layers'?"),
        ({"a": 1}, "no field of the host's config classes, see its class"),
        ({"config": "Llama2Config7b"}, "no such config class, did you mean 'Llama2Config7B'?"),
        ({"rotary_base": 1e300}, "too large"),
        ({"init_method_std": 1e300}, "too large"),
        ({"no_rope_freq": "4"}, "each Nth layer has no RoPE"),
        ({"no_rope_freq": 0}, "each Nth layer has no RoPE"),
        ({"window_attn_skip_freq": [1, 2]}, "1 for the layers with the window"),
        ({"recompute_granularity": "full"}, "set trainer.recompute"),
        ({"config": 5}, "name a config class"),
        ({"config": "llm.LlamaConfig"}, "name a config class"),
        ({"num_attention_heads": 6, "num_query_groups": 4}, "must divide the 6"),
        ({"num_attention_heads": 3, "hidden_size": 128}, "must divide the 128"),
        ({"__class__": 1}, "no field"),
    ],
)
def test_a_field_of_another_kind_or_size_is_refused(field, message):
    with pytest.raises(ConfigError) as raised:
        check_model(field)
    assert message in str(raised.value)


def test_what_classes_have_is_taken():
    check_model({"config": "MistralConfig7B", "window_size": None, "cp_comm_type": None, "num_query_groups": None})
    check_model({"window_size": [4095, 0], "rotary_base": 1_000_000, "kv_channels": 64, "softmax_scale": None})


def test_fields_of_another_version_of_the_host_are_left_to_its_classes(monkeypatch):
    monkeypatch.setattr(model_fields, "host_fields", lambda: None)
    check_model({"config": "NewConfig", "new": "x"})


def run(*stages, tokens=4096):
    return Curriculum(stages=tuple(StageConfig(**stage) for stage in stages), tokens_per_step=tokens, total_tokens=8 * tokens)


ONE = {"until": 1.0, "seq_length": 1024}


@pytest.mark.parametrize(
    ("shape", "trainer", "stages", "message"),
    [
        ({}, {"devices": 3, "context_parallel_size": 3}, [ONE], "seq_length=1024: must be a multiple of 2 x"),
        ({}, {"devices": 8, "tensor_model_parallel_size": 8, "sequence_parallel": True}, [{"until": 1.0, "seq_length": 4}],
         "must be a multiple of tensor_model_parallel_size = 8"),
        ({}, {"devices": 1024, "context_parallel_size": 1024}, [ONE], "2 x context_parallel_size = 2048"),
        ({"num_layers": 6}, {"devices": 4, "pipeline_model_parallel_size": 4}, [ONE], "pipeline_model_parallel_size=4: the 6"),
        ({"num_layers": 6}, {"devices": 2, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, [ONE],
         "pipeline x virtual stages = 4"),
        ({"num_attention_heads": 6}, {"devices": 4, "tensor_model_parallel_size": 4}, [ONE], "the 6 attention heads"),
        ({"num_query_groups": 3}, {"devices": 2, "tensor_model_parallel_size": 2}, [ONE], "the 3 query groups"),
        ({}, {}, [{"until": 0.5, "seq_length": 512}, {"until": 1.0, "seq_length": 1024, "context_parallel_size": 1024}],
         "curriculum.stages[1].seq_length=1024"),
        ({"num_layers": 3}, {}, [{**ONE, "pipeline_model_parallel_size": 2}],
         "curriculum.stages[0].pipeline_model_parallel_size=2: the 3 layers"),
    ],
)  # fmt: skip
def test_sizes_against_the_layout(shape, trainer, stages, message):
    with pytest.raises(ConfigError) as raised:
        check_layout(shape, TrainerConfig(accelerator="cpu", **trainer), run(*stages))
    assert message in str(raised.value)


def test_layouts_that_fit_are_taken():
    trainer = TrainerConfig(accelerator="cpu", devices=16, tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
                            context_parallel_size=4, sequence_parallel=True)  # fmt: skip
    check_layout(
        {"num_layers": 4, "num_attention_heads": 8, "num_query_groups": 2}, trainer, run({"until": 1.0, "seq_length": 16})
    )
    uneven = {"num_layers": 5, "num_layers_in_first_pipeline_stage": 2}
    check_layout(uneven, TrainerConfig(accelerator="cpu", devices=2, pipeline_model_parallel_size=2), run(ONE))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["recipe=llama2_7b", "curriculum.total_tokens=4194304000"],
            "optimizer.warmup_tokens=8388608000: the run has 4194304000",
        ),
        (["recipe=llama2_7b", "curriculum.total_tokens=8388608000"], "would never reach optimizer.lr"),
        (["recipe=tiny_cpu_base", "model.seq_length=8"], "model.seq_length=8: the run sets it"),
        (["recipe=tiny_cpu_base", "trainer.virtual_pipeline_model_parallel_size=-1"], "set a whole number of at least 1"),
        (["recipe=tiny_cpu_base", "trainer.virtual_pipeline_model_parallel_size=2"], "needs trainer.pipeline"),
        (["recipe=tiny_cpu_base", "trainer.val_every_tokens=-2048"], "trainer.val_every_tokens=-2048"),
    ],
)
def test_a_recipe_is_refused_before_any_work(overrides, message):
    with pytest.raises(ConfigError) as raised:
        load_recipe(compose(overrides))
    assert message in str(raised.value)


@pytest.mark.parametrize("debug", [False, True])
def test_what_nobody_foresaw_ends_in_one_sentence(monkeypatch, capsys, debug):
    """The traceback comes only where it is asked for."""

    def fails(overrides):
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(launch, "compose", fails)
    monkeypatch.delenv("NEMO_LONGCTX_DEBUG", raising=False)
    if debug:
        monkeypatch.setenv("NEMO_LONGCTX_DEBUG", "1")
        with pytest.raises(ZeroDivisionError):
            launch.main([])
        return
    assert launch.main([]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ZeroDivisionError in fails of test_model_fields.py")
    assert len(said.splitlines()) == 1
    assert "a b; NEMO_LONGCTX_DEBUG=1 shows the traceback" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.no_rope_freq=[0,1]"], "model.no_rope_freq=[0, 1]: must be one number for each of the 3 layers"),
        (["model.no_rope_freq=2"], "model.no_rope_freq=2: must divide the 3 layers"),
        (
            ["model.window_size=[99,0]", "model.window_attn_skip_freq=[1,0]"],
            "model.window_attn_skip_freq=[1, 0]: must be one number for each of the 3 layers",
        ),
    ],
)
def test_layer_lists_are_compared_with_the_layers_as_soon_as_these_are_known(overrides, message):
    with pytest.raises(ConfigError) as raised:
        load_recipe(compose(["recipe=tiny_cpu_base", *overrides]))
    assert str(raised.value).startswith(message)


def test_layers_without_rope_are_listed():
    assert no_rope_layers(2, 4) == [0, 1, 0, 1]
    assert no_rope_layers([0, 0, 0, 1], 4) == [0, 0, 0, 1]
    assert no_rope_layers(None, 4) is None
    for said, message in [(3, "must divide the 4 layers"), ([0, 1], "one number for each of the 4 layers")]:
        with pytest.raises(ConfigError, match=message):
            no_rope_layers(said, 4)
