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
        *(
            ({name: value}, said)
            for name, value, said in (
                ("attention_chunk_size", 1024, "has windows and no chunks"),
                ("attn_logit_softcapping", 30.0, "not supported"),
                ("mtp_num_layers", 1, "predicts one token"),
                ("defer_embedding_wgrad_compute", True, "at once"),
                ("use_mup", True, "no scaled logits"),
                ("yarn_mscale", 1.0, "RoPE is said under rope"),
                ("rope_scaling", {"type": "yarn"}, "RoPE is said under rope"),
                ("rotary_scaling_factor", 4, "said under rope"),
                ("cp_comm_type", "ring", "no such choice, known: a2a, a2a+p2p, all_gather, p2p"),
            )
        ),
        ({"fp8": "hybrid"}, "fp8='hybrid': the run sets it: set trainer.precision"),
        ({"fp8_margin": 2}, "the run sets it: set trainer.precision"),
        ({"attention_backend": "flsh"}, "no such choice, did you mean 'flash'?"),
        ({"normalization": "rmsnorm"}, "no such choice, did you mean 'RMSNorm'?"),
        ({"position_embedding_type": "none"}, "only RoPE models can be extended; known: rope, yarn"),
        ({"num_moe_experts": 4, "moe_router_topk": 5}, "at most the 4 of model.num_moe_experts"),
    ],
)
def test_a_field_of_another_kind_or_size_is_refused(field, message):
    with pytest.raises(ConfigError) as raised:
        check_model(field)
    assert message in str(raised.value)


def test_what_classes_have_is_taken():
    check_model({"config": "MistralConfig7B", "window_size": None, "cp_comm_type": None, "num_query_groups": None})
    check_model({"window_size": [4095, 0], "rotary_base": 1_000_000, "kv_channels": 64, "softmax_scale": None})
    check_model({"num_moe_experts": 4, "moe_router_topk": 4, "normalization": "RMSNorm", "attention_backend": "fused"})
    check_model({"position_embedding_type": "yarn", "moe_router_topk": 9})
    check_model({"attention_chunk_size": None, "mtp_num_layers": None, "rope_scaling": None, "cp_comm_type": "a2a+p2p"})
    check_model({"attn_logit_softcapping": None, "defer_embedding_wgrad_compute": False, "cp_comm_type": ["p2p", "a2a"]})


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


SIZES = ("num_layers", "hidden_size", "num_attention_heads", "make_vocab_size_divisible_by")
OPTIONAL = ("ffn_hidden_size", "num_query_groups", "kv_channels", "vocab_size", "num_moe_experts", "old_context_len")
POSITIVE = ("layernorm_epsilon", "init_method_std", "scale_factor", "low_freq_factor", "high_freq_factor")


def refusal(call, *args):
    with pytest.raises(ConfigError) as error:
        call(*args)
    return str(error.value)


def test_each_kind_of_field_is_taken_to_its_bounds_and_refused_beyond():
    most = 2**31 - 1
    for name in (*SIZES, *OPTIONAL):
        for value in (1, most):
            check_model({name: value})
        for value in (0, -1, most + 1):
            said = f"model.{name}={value}: set a whole number of at least 1, at most 2,147,483,647"
            assert refusal(check_model, {name: value}) == said
    for name in OPTIONAL:
        check_model({name: None})
    for name in ("hidden_dropout", "attention_dropout"):
        check_model({name: 0.0})
        check_model({name: 0.999})
        assert refusal(check_model, {name: -0.001}) == f"model.{name}=-0.001: set a share in [0, 1)"
        assert refusal(check_model, {name: 1.0}) == f"model.{name}=1.0: set a share in [0, 1)"
    for name in (*POSITIVE, "rotary_percent", "rotary_base"):
        largest = {"rotary_percent": 1.0, "rotary_base": 1e15}.get(name, 3.4e38)
        least, bounds = {"rotary_percent": (1e-9, "a share in (0, 1]"), "rotary_base": (1.0001, "a number above 1")}.get(
            name, (1e-9, "a number above 0")
        )
        check_model({name: largest})
        check_model({name: least})
        for value in (0.0, -1.0):
            assert refusal(check_model, {name: value}) == f"model.{name}={value}: set {bounds}"
        beyond = "set a share in (0, 1]" if name == "rotary_percent" else "is too large a number for it"
        assert refusal(check_model, {name: largest * 1.01}) == f"model.{name}={largest * 1.01!r}: {beyond}"
        assert refusal(check_model, {name: -1e39}) == f"model.{name}=-1e+39: is too large a number for it"
    assert refusal(check_model, {"rotary_base": 1.0}) == "model.rotary_base=1.0: set a number above 1"
    for name in ("softmax_scale", "moe_z_loss_coeff"):
        for value in (None, -5.0, 0):
            check_model({name: value})
        assert "not a number" in refusal(check_model, {name: "x"})
    for name in ("add_qkv_bias", "moe_grouped_gemm"):
        check_model({name: False})
        assert "must be true or false" in refusal(check_model, {name: None})
    for name in ("normalization", "cross_entropy_fusion_impl"):
        check_model({name: None})
        assert "must be text" in refusal(check_model, {name: 1.5})


@pytest.mark.parametrize("name", ["recompute_method", "recompute_num_layers", "cpu_offloading", "cpu_offloading_num_layers"])
def test_what_is_kept_for_the_backward_pass_is_said_by_the_trainer(name):
    assert refusal(check_model, {name: None}) == (
        f"model.{name}=None: set trainer.recompute and trainer.offload (none, selective, block:N, full), or a stage's own"
    )


def test_windows_and_lists_of_layers_are_megatron_s():
    for window in (None, [0, 0], (-1, -1), [5, -1], [2**40, 0]):
        check_model({"window_size": window})
    for window in ([0], [-2, 0], [0, -2], [1, 2, 3]):
        assert "two whole numbers: tokens before a query and after it, -1 for all" in refusal(
            check_model, {"window_size": window}
        )
    assert "looks ahead" in refusal(check_model, {"window_size": [0, 1]})
    for name, words in (
        ("window_attn_skip_freq", ("all tokens", "the window")),
        ("no_rope_freq", ("no RoPE", "no RoPE")),
    ):
        for value in (None, 1, 7, [0, 1, 1], (1,)):
            check_model({name: value})
        said = f"N (each Nth layer has {words[0]}), a list with 1 for the layers with {words[1]}, or null"
        for value in (0, -1, True, False, 1.5, [], [2], [0.5], "2", ["0"]):
            assert refusal(check_model, {name: value}) == f"model.{name}={value!r}: {said}"
    assert no_rope_layers(1, 3) == [1, 1, 1]
    assert no_rope_layers(3, 6) == [0, 0, 1, 0, 0, 1]
    assert no_rope_layers((1, 0), 2) == [1, 0]
    assert refusal(no_rope_layers, 2, 3, "rope.x").startswith("rope.x=2: must divide the 3 layers; or name each layer")


def test_sizes_that_are_named_go_into_each_other():
    check_model({"num_attention_heads": 6, "num_query_groups": 3, "hidden_size": 12})
    check_model({"num_attention_heads": 5, "hidden_size": 12, "kv_channels": 4})
    check_model({"num_query_groups": 5, "hidden_size": 12})
    assert refusal(check_model, {"num_attention_heads": 6, "num_query_groups": 4}) == (
        "model.num_query_groups=4: must divide the 6 of model.num_attention_heads"
    )
    assert refusal(check_model, {"num_attention_heads": 5, "hidden_size": 12}) == (
        "model.num_attention_heads=5: must divide the 12 of model.hidden_size, or set kv_channels"
    )


@pytest.mark.parametrize(
    ("shape", "sizes", "said"),
    [
        ({"num_layers": 4}, (1, 2, 1), ""),
        (
            {"num_layers": 3},
            (1, 2, 1),
            "trainer.pipeline_model_parallel_size=2: the 3 layers must divide by pipeline stages = 2",
        ),
        ({"num_layers": 3, "account_for_loss_in_pipeline_split": True}, (1, 2, 1), ""),
        ({"num_layers": 3, "account_for_loss_in_pipeline_split": False}, (1, 2, 1), "the 3 layers must divide"),
        *(
            (
                {"num_layers": layers, "num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last},
                (1, pipeline, 1),
                f"model.num_layers_in_{end}_pipeline_stage={first or last}: leaves {left} of" if end else "",
            )
            for layers, first, last, pipeline, end, left in (
                (5, 2, None, 2, "", 0),
                (5, 2, None, 4, "", 0),
                (5, 3, None, 4, "first", 2),
                (5, 5, None, 2, "first", 0),
                (5, None, 1, 8, "last", 4),
                (6, 2, 4, 2, "", 0),
                (6, 2, 3, 2, "first", 1),
                (8, 1, 1, 8, "", 0),
                (9, 1, 1, 8, "first", 7),
                (5, 6, None, 2, "first", -1),
                (9, 2, 1, 1, "", 0),
            )
        ),
        (
            {"num_attention_heads": 3},
            (2, 1, 1),
            "trainer.tensor_model_parallel_size=2: the 3 attention heads must divide by it",
        ),
        ({"num_query_groups": 2}, (4, 1, 1), ""),  # each group on two ranks
        ({"num_query_groups": 3}, (2, 1, 1), "trainer.tensor_model_parallel_size=2: the 3 query groups must divide by it"),
        ({"num_query_groups": 3}, (4, 1, 1), "the 3 query groups must divide by it"),
        ({"num_attention_heads": 2}, (4, 1, 1), "the 2 attention heads must divide by it"),
        ({"num_layers": 2, "window_attn_skip_freq": [1]}, (1, 1, 1), "model.window_attn_skip_freq=[1]: must be one number"),
        ({"num_layers": 2, "no_rope_freq": [1]}, (1, 1, 1), "model.no_rope_freq=[1]: must be one number"),
        ({"window_attn_skip_freq": [1], "no_rope_freq": [1]}, (1, 1, 1), ""),  # of how many is not known yet
    ],
)
def test_what_the_parallel_sizes_divide_is_whole(shape, sizes, said):
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    trainer = TrainerConfig(accelerator="cpu", devices=8, **dict(zip(names, sizes, strict=True)))
    if said:
        assert said in refusal(check_layout, shape, trainer, run(ONE))
        own = {name: size for name, size in zip(names, sizes, strict=True) if size > 1}
        if own:  # the same of a stage that has them for itself
            staged = refusal(check_layout, shape, TrainerConfig(accelerator="cpu"), run({**ONE, **own}))
            assert staged == refusal(check_layout, shape, trainer, run(ONE)).replace("trainer.", "curriculum.stages[0].")
    else:
        check_layout(shape, trainer, run(ONE))


@pytest.mark.parametrize(
    ("length", "context", "tensor", "sequence", "said"),
    [
        (24, 3, 1, False, ""),
        (21, 3, 1, False, "2 x context_parallel_size = 6"),
        (21, 1, 2, False, ""),
        (21, 1, 2, True, "tensor_model_parallel_size = 2"),
        (24, 3, 4, True, "" ),
        (36, 3, 4, True, "2 x context_parallel_size x tensor_model_parallel_size = 24"),
    ],
)  # fmt: skip
def test_a_window_has_a_part_for_each_rank(length, context, tensor, sequence, said):
    trainer = TrainerConfig(
        accelerator="cpu", devices=12, context_parallel_size=context, tensor_model_parallel_size=tensor,
        sequence_parallel=sequence,
    )  # fmt: skip
    curriculum = run({"until": 1.0, "seq_length": length}, tokens=length * 4)
    if not said:
        check_layout({}, trainer, curriculum)
        return
    mend = f"must be a multiple of {said}, so that each rank has its part of a window"
    assert refusal(check_layout, {}, trainer, curriculum) == f"curriculum.stages[0].seq_length={length}: {mend}"


@pytest.mark.parametrize(
    ("layers", "sizes", "own", "whole", "said"),
    [
        (4, {}, None, "block:4", ""),
        (4, {}, None, "block:5", "trainer.recompute='block:5': a model chunk has 4 layers; set full, or block:N up to that"),
        (8, {"pipeline_model_parallel_size": 2}, None, "block:5", "trainer.recompute='block:5': a model chunk has 4 layers"),
        (
            8,
            {"pipeline_model_parallel_size": 2},
            "block:5",
            "none",
            "curriculum.stages[0].recompute='block:5': a model chunk has 4",
        ),
        (8, {"pipeline_model_parallel_size": 2}, "block:4", "block:9", ""),
        (8, {"pipeline_model_parallel_size": 2}, "full", "block:9", ""),
        (None, {}, None, "block:9", ""),  # of how many is not known yet
        (8, {"pipeline_model_parallel_size": 2}, "block:5", "block:5", "trainer.recompute='block:5'"),  # as a run fills it in
    ],
)
def test_no_more_layers_of_a_chunk_are_named_than_it_has(layers, sizes, own, whole, said):
    trainer = TrainerConfig(accelerator="cpu", devices=8, recompute=whole, **sizes)
    stage = {**ONE} if own is None else {**ONE, "recompute": own}
    shape = {} if layers is None else {"num_layers": layers}
    if said:
        assert refusal(check_layout, shape, trainer, run(stage)).startswith(said)
    else:
        check_layout(shape, trainer, run(stage))
