"""Variants on stock NeMo models: placed, checked live, kept in the checkpoint's context, and planted errors caught."""

import contextlib
import dataclasses
import tempfile

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections import llm
from nemo.lightning import io
from nemo.lightning.pytorch.plugins.mixed_precision import MegatronMixedPrecision, update_config_with_dtype_overrides

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.rope_guard import LiveRopeError, verify_live_rope
from nemo_longctx.adapters.megatron.rope_module import rotary_dim_of, transform_rope
from nemo_longctx.adapters.nemo.model.config import prepare_model
from nemo_longctx.adapters.nemo.model.rope import RopeTransform, place_rope, set_config_field, variant_of
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.variants import VARIANTS, parse, to_dict

PARTS = {"factor": 4.0, "original_max_position_embeddings": 64}


def example(name, rotary_dim, base=50_000.0):
    """One of each variant, for heads with `rotary_dim` rotated dimensions."""
    pairs = rotary_dim // 2
    fields = {
        "pi": {"factor": 4.0},
        "ntk": {"factor": 4.0},
        "longrope": {**PARTS, "short_factor": [1.0] * pairs, "long_factor": [1.0 + j for j in range(pairs)]},
        **dict.fromkeys(("yarn", "ntk_by_parts", "dynamic_ntk", "llama3"), PARTS),
    }
    return parse({"variant": name, "base": base, **fields.get(name, {})})


@pytest.fixture(scope="module", autouse=True)
def _single_process():
    """Megatron-Core's groups of one process."""
    was_installed = cpu.is_installed()
    cpu.install()
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    if not was_installed:
        cpu.uninstall()


SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 96,
    "seq_length": 256,
    "init_method_std": 0.3,  # sharp attention, so that a wrong angle shows
}
# gpt-oss, the one family whose config has Megatron-Core's yarn_* fields, without its experts, windows and sinks.
DENSE = {
    **dict.fromkeys(("num_moe_experts", "moe_ffn_hidden_size", "window_size", "window_attn_skip_freq"), None),
    **dict.fromkeys(("moe_grouped_gemm", "moe_permute_fusion", "add_bias_linear", "bias_activation_fusion"), False),
    "activation_func_clamp_value": None,
    "activation_func": torch.nn.functional.silu,
    "glu_linear_offset": 0.0,
    "softmax_type": "vanilla",
}
MODELS = {
    "llama": lambda: llm.LlamaModel(llm.Llama2Config7B(**SIZES)),
    "llama31": lambda: llm.LlamaModel(llm.Llama31Config8B(**SIZES)),
    "mistral": lambda: llm.MistralModel(llm.MistralConfig7B(**SIZES, kv_channels=16, window_size=None)),
    "qwen2": lambda: llm.Qwen2Model(llm.Qwen2Config(**SIZES)),
    "qwen3": lambda: llm.Qwen3Model(llm.Qwen3Config(**SIZES, kv_channels=16)),
    "nemotron": lambda: llm.NemotronModel(llm.NemotronConfig(**SIZES, layernorm_zero_centered_gamma=False)),
    "starcoder2": lambda: llm.Starcoder2Model(llm.Starcoder2Config(**SIZES, window_size=None)),
}
needs_gpt_oss = pytest.mark.skipif(not hasattr(llm, "GPTOSSModel"), reason="a NeMo before gpt-oss")
if hasattr(llm, "GPTOSSModel"):
    MODELS["gpt_oss"] = lambda: llm.GPTOSSModel(llm.GPTOSSConfig(**SIZES, **DENSE, kv_channels=16))


def fresh(name):
    with cpu.stock_configs():
        model = MODELS[name]()
    cpu.adapt_model_config(model.config)
    return model


def build(model):
    """The Megatron-Core model, transformed as NeMo's ModelTransform callback would."""
    torch.manual_seed(0)
    module = model.config.configure_model(None, pre_process=True, post_process=True).eval()
    if model.model_transform is not None:
        model.model_transform(module)
    return module


def logits(module, tokens):
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    with torch.no_grad():
        return module(tokens, torch.arange(length).expand_as(tokens), mask)


TOKENS = torch.randint(0, 96, (1, 80), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_every_variant_is_live_on_every_architecture(name):
    """The same transform for all of them; the guard agrees, and the variant changes what the model computes."""
    seen = {}
    for variant_name in VARIANTS:
        model = fresh(name)
        variant = example(variant_name, rotary_dim_of(model.config))
        place_rope(model, variant)
        module = build(model)
        assert f"{variant.variant} (" in verify_live_rope(module, variant)
        seen[variant_name] = logits(module, TOKENS)
        assert seen[variant_name].isfinite().all()
    torch.testing.assert_close(seen["rope"], seen["abf"])  # the same base here
    for variant_name, got in seen.items():
        if variant_name not in ("rope", "abf"):
            assert (got - seen["rope"]).abs().max() > 1e-4, variant_name


@pytest.mark.parametrize("name", ["rope", "abf", "pi", "ntk"])
def test_what_the_host_can_say_needs_no_transform(name):
    model = fresh("llama")
    place_rope(model, example(name, 16))
    assert model.model_transform is None
    assert model.config.rotary_base >= 50_000


YARN = [{}, {"truncate": False}, {"beta_fast": 8.0, "beta_slow": 0.5}, {"mscale": 0.7, "mscale_all_dim": 0.3}]


@needs_gpt_oss
@pytest.mark.parametrize("fields", YARN, ids=str)
def test_megatron_cores_own_yarn_computes_what_our_transform_computes(fields):
    """By the host's fields where the config has them; the same weights under our table give the same logits."""
    variant = parse({"variant": "yarn", "base": 50_000.0, **PARTS, **fields})
    model = fresh("gpt_oss")
    place_rope(model, variant)
    assert model.model_transform is None
    assert model.config.position_embedding_type == "yarn"
    by_host = build(model)
    assert type(by_host.rotary_pos_emb) is YarnRotaryEmbedding
    verify_live_rope(by_host, variant)
    ours = fresh("gpt_oss")
    place_rope(ours, parse({**to_dict(variant), "attention_factor": variant.attention_scaling}))  # a field the host has not
    assert isinstance(ours.model_transform, RopeTransform)
    torch.testing.assert_close(logits(by_host, TOKENS), logits(build(ours), TOKENS), rtol=1e-4, atol=1e-4)
    plain = fresh("gpt_oss")
    place_rope(plain, example("rope", 16))
    assert (logits(by_host, TOKENS) - logits(build(plain), TOKENS)).abs().max() > 1e-2


@needs_gpt_oss
def test_the_guard_sees_a_wrong_field_of_megatron_cores_yarn():
    """A field of the host's that was changed behind the run's back, and a table whose ramp is inverted."""
    variant = example("yarn", 16)
    model = fresh("gpt_oss")
    place_rope(model, variant)
    model.config.yarn_rotary_scaling_factor = 32.0
    with pytest.raises(LiveRopeError, match=r"the config \(yarn, base 50000\) asks for"):
        verify_live_rope(build(model), variant)
    place_rope(model, variant)
    module = build(model)
    rotary = module.rotary_pos_emb
    rotary.inv_freq_extra, rotary.inv_freq_inter = rotary.inv_freq_inter, rotary.inv_freq_extra
    rotary.forward.cache_clear()
    with pytest.raises(LiveRopeError, match="pairs differ"):
        verify_live_rope(module, variant)


def test_llama3_is_the_hosts_own_on_llama31_and_ours_elsewhere():
    for name, transform in (("llama31", type(None)), ("llama", RopeTransform)):
        model = fresh(name)
        place_rope(model, example("llama3", 16))
        assert isinstance(model.model_transform, transform)
        verify_live_rope(build(model), example("llama3", 16))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("architecture", ["llama", "llama31", pytest.param("gpt_oss", marks=needs_gpt_oss)])
def test_a_checkpoints_context_keeps_the_variant(name, architecture, tmp_path):
    model, variant = fresh(architecture), example(name, 16)
    place_rope(model, variant)
    model.io_dump(tmp_path / "context", yaml_attrs=[])
    with cpu.stock_configs():
        again = io.load_context(tmp_path / "context")
    if model.model_transform is None and name in ("abf", "ntk"):  # kept as a base, which is all the host knows of them
        assert variant_of(again) == parse({"variant": "rope", "base": 50_000 * (4 ** (16 / 14) if name == "ntk" else 1)})
    else:
        assert variant_of(again) == variant
    cpu.adapt_model_config(again.config)
    verify_live_rope(build(again), variant)


@pytest.mark.skipif(
    "window_attn_skip_freq" not in TransformerConfig.__dataclass_fields__, reason="a Megatron-Core whose layers do not differ"
)
@pytest.mark.parametrize("name", ["abf", "pi", "llama3", "yarn", "longrope"])
@pytest.mark.parametrize("architecture", ["llama", "llama31", pytest.param("gpt_oss", marks=needs_gpt_oss)])
def test_a_rope_by_layer_type_is_live_and_kept(name, architecture, tmp_path):
    """Whatever the host's own fields could say of it alone: layers with a window have the plain one."""
    model, variant = fresh(architecture), dataclasses.replace(example(name, 16), local_base=2_000.0)
    with pytest.raises(ConfigError, match=r"rope.layers='full_attention': no layer of the model has a window"):
        place_rope(model, variant)
    for key, value in (("window_size", (9, 0)), ("window_attn_skip_freq", [1, 0])):
        set_config_field(model, key, value)
    place_rope(model, variant)
    model.io_dump(tmp_path / "context", yaml_attrs=[])
    with cpu.stock_configs():
        again = io.load_context(tmp_path / "context")
    assert variant_of(again) == variant
    cpu.adapt_model_config(again.config)
    assert "plain rope (base=2000.0) in 1 layers with a window" in verify_live_rope(build(again), variant)
    set_config_field(again, "window_size", None)
    set_config_field(again, "window_attn_skip_freq", None)
    with pytest.raises(ConfigError, match=r"rope.layers='full_attention': no layer"):
        prepare_model(again, seq_length=64)


def test_a_run_s_precision_reaches_a_context_whose_config_the_host_did_not_capture():
    """As Qwen3's after a Qwen2 in the same process: its checkpoints said bf16 of weights that were trained in fp32."""
    with cpu.stock_configs():
        config = llm.Qwen3Config(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16,
                                 ffn_hidden_size=96, vocab_size=128, bf16=True, params_dtype=torch.bfloat16)  # fmt: skip
    vars(config).pop("__io__", None)
    model = llm.Qwen3Model(config)
    prepare_model(model, seq_length=64)
    plugin = MegatronMixedPrecision(precision="32", params_dtype=torch.float32)
    update_config_with_dtype_overrides(plugin.dtype_config, model.config)
    kept = model.__io__.config
    assert (kept.bf16, kept.params_dtype, kept.seq_length) == (False, torch.float32, 64)


def test_a_new_variant_replaces_the_one_of_the_checkpoint():
    model = fresh("llama")
    place_rope(model, example("xpos", 16))
    place_rope(model, example("abf", 16, base=1e6))
    assert model.model_transform is None
    verify_live_rope(build(model), example("abf", 16, base=1e6))


def test_placing_twice_is_placing_once():
    model = fresh("llama")
    variant = example("yarn", 16)
    place_rope(model, variant)
    module = build(model)
    once = logits(module, TOKENS)
    transform_rope(module, variant)
    verify_live_rope(module, variant)
    torch.testing.assert_close(logits(module, TOKENS), once, rtol=0, atol=0)


def test_a_planted_wrong_base_is_caught_with_both_values():
    model = fresh("llama")
    place_rope(model, example("abf", 16))
    module = build(model)
    with pytest.raises(LiveRopeError, match=r"inv_freq=.*the model has .* at pair 1, the config \(abf, base 500000\) asks for"):
        verify_live_rope(module, example("abf", 16, base=500_000.0))
    module.rotary_pos_emb.inv_freq[-1] *= 1 + 2**-23  # one bit
    module.rotary_pos_emb.forward.cache_clear()
    with pytest.raises(LiveRopeError, match="1 of 8 pairs differ"):
        verify_live_rope(module, example("abf", 16))


@pytest.mark.parametrize("asked", ["rope", "pi"])
def test_a_planted_pi_factor_is_caught(asked):
    model = fresh("llama")
    place_rope(model, example("pi", 16))
    module = build(model)
    module.rotary_pos_emb.seq_len_interpolation_factor = 8.0
    module.rotary_pos_emb.forward.cache_clear()
    with pytest.raises(LiveRopeError, match=r"the model has 0\.125 at pair 0"):
        verify_live_rope(module, example(asked, 16))


def test_frequencies_beyond_the_trained_length_are_compared_too():
    """LongRoPE has two lists of factors: a model may be right where it reads little and wrong where it reads much."""
    variant, model = example("longrope", 16), fresh("llama")
    place_rope(model, variant)
    module = build(model)
    verify_live_rope(module, variant)
    other = dataclasses.replace(variant, long_factor=(*variant.long_factor[:-1], 99.0))
    with pytest.raises(LiveRopeError, match="the model at 256 tokens has"):
        verify_live_rope(module, other)


class LocalRope(SelfAttention):
    """A layer that rotates by a table of its own, as Gemma 3's local layers do."""

    def forward(self, *args, rotary_pos_emb=None, **kwargs):
        own = RotaryEmbedding(16, 1.0, rotary_base=10_000, use_cpu_initialization=True)
        return super().forward(*args, rotary_pos_emb=own(len(rotary_pos_emb)), **kwargs)


@pytest.mark.parametrize("name", ["abf", "xpos"])
def test_a_planted_layer_is_caught(name):
    model = fresh("llama")
    place_rope(model, example(name, 16))
    module = build(model)
    module.decoder.layers[1].self_attention.__class__ = LocalRope
    with pytest.raises(LiveRopeError, match=r"layer 2\.rope=.*layer 2 turns a q of ones into"):
        verify_live_rope(module, example(name, 16))


@pytest.mark.parametrize("name", ["yarn", "xpos", "longrope"])
def test_a_layer_without_the_scaling_is_caught(name):
    model = fresh("llama")
    place_rope(model, example(name, 16))
    module = build(model)
    module.decoder.layers[0].self_attention.core_attention._forward_pre_hooks.clear()
    with pytest.raises(LiveRopeError, match="layer 1"):
        verify_live_rope(module, example(name, 16))


@pytest.mark.parametrize("name", ["yarn", "ntk_by_parts", "xpos"])
def test_a_transform_that_was_never_applied_is_caught(name):
    model = fresh("llama")
    place_rope(model, example(name, 16))
    model.model_transform = None
    with pytest.raises(LiveRopeError):
        verify_live_rope(build(model), example(name, 16))


def test_the_guard_leaves_the_model_as_it_was():
    model = fresh("qwen3")
    place_rope(model, example("xpos", 16))
    module = build(model).train()
    attention = module.decoder.layers[0].self_attention
    before, hooks = dict(vars(module.config)), len(attention.core_attention._forward_pre_hooks)
    verify_live_rope(module, example("xpos", 16))
    assert vars(module.config) == before
    assert attention.training
    assert len(attention.core_attention._forward_pre_hooks) == hooks
    assert "get_query_key_value_tensors" not in vars(attention)


def test_models_without_one_rope_are_refused():
    model = fresh("llama")
    for field, value in (
        ("position_embedding_type", "none"),
        ("rotary_base", (10_000, 1_000_000)),
        ("multi_latent_attention", True),
    ):
        broken = fresh("llama")
        setattr(broken.config, field, value)
        with pytest.raises(ConfigError, match=field):
            place_rope(broken, example("abf", 16))
    model.model_transform = contextlib.nullcontext
    with pytest.raises(ConfigError, match="model_transform"):
        place_rope(model, example("yarn", 16))


def test_the_transform_is_made_of_plain_values():
    variant = example("longrope", 16)
    assert RopeTransform(rope=to_dict(variant)).variant == variant
