"""Hugging Face <-> NeMo: weights, RoPE at far positions, tokenizer; what cannot be said is refused."""

import json
import subprocess
import sys
import tempfile

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from nemo.collections import llm
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_longctx.adapters.nemo import cpu
from nemo_longctx.adapters.nemo.attention import long_context_layer_spec
from nemo_longctx.adapters.nemo.checkpoint import hf_model, verify_export
from nemo_longctx.adapters.nemo.hf_weights import family_of_hf, family_of_nemo, nemo_config, to_hugging_face, to_megatron
from nemo_longctx.adapters.nemo.rope import place_rope
from nemo_longctx.adapters.nemo.rope_module import rotary_dim_of
from nemo_longctx.config import ConfigError
from nemo_longctx.rope import VARIANTS, RopeVariant, parse

FAR = 8192
HEAD = 16
PARTS = {"factor": 4.0, "original_max_position_embeddings": 2048}
LONG = {**PARTS, "short_factor": [1.0] * (HEAD // 2), "long_factor": [1.0 + j for j in range(HEAD // 2)]}
FIELDS = {
    "pi": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "longrope": LONG,
    **dict.fromkeys(("yarn", "ntk_by_parts", "dynamic_ntk", "llama3"), PARTS),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def example(name):
    return parse({"variant": name, "base": 20_000.0, **FIELDS.get(name, {})})


@pytest.fixture(scope="module", autouse=True)
def _single_process():
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


def hugging_face(model_type, rope, **changes):
    """A small random model of transformers. Its biases are not zero and its norms not one, so that a lost one shows."""
    fields = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD,
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
    }
    fields |= {"sliding_window": None} if model_type == "mistral" else {}
    config = AutoConfig.for_model(model_type, **(fields | rope | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def nemo_from(source):
    """The NeMo config and live Megatron-Core model of a transformers model, as the importer makes them."""
    family, variant = family_of_hf(source.config), RopeVariant.from_hf(source.config.to_dict())
    with cpu.stock_configs():
        config = nemo_config(source.config, family, family.config_class, None)
        model = family.model_class(config)
    place_rope(model, variant)
    config.transformer_layer_spec = long_context_layer_spec
    module = config.configure_model(None, pre_process=True, post_process=True).eval()
    if model.model_transform is not None:
        model.model_transform(module)
    weights = to_megatron(source.state_dict(), set(module.state_dict()), config)
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("_extra_state") for name in missing)
    return config, module, variant


@torch.no_grad()
def largest_difference(source, module, length):
    ids = torch.randint(0, 100, (1, length), generator=torch.Generator().manual_seed(3))
    theirs = source(ids).logits
    ours = module(ids, torch.arange(length)[None], None)
    return float((ours - theirs).abs().max()), float(theirs.std())


@pytest.mark.parametrize("length", [3000, pytest.param(FAR, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "xpos"])
def test_every_exportable_variant_gives_the_same_logits(name, length, tmp_path):
    """HF -> NeMo -> HF, beyond the trained length of 2,048: three models, one set of logits; verification agrees."""
    keys = example(name).to_hf(rotary_dim=HEAD, max_position_embeddings=FAR)
    source = hugging_face("llama", keys)
    config, module, variant = nemo_from(source)
    worst, spread = largest_difference(source, module, length)
    assert worst < 1e-4 < 0.1 < spread
    again = hf_model(module, config, variant, max_position_embeddings=keys["max_position_embeddings"])
    assert {k: v for k, v in again.config.to_dict().items() if "rope" in k} == {
        k: v for k, v in source.config.to_dict().items() if "rope" in k
    }
    for key, weight in source.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    again.save_pretrained(tmp_path)
    assert verify_export(module, tmp_path, variant, rotary_dim=HEAD, tokens=300, longest=FAR) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_converts_both_ways(model_type, tied):
    source = hugging_face(
        model_type, example("yarn").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR), tie_word_embeddings=tied
    )
    source.tie_weights()
    config, module, _ = nemo_from(source)
    assert family_of_nemo(config).model_type == model_type
    assert config.seq_length == FAR
    worst, spread = largest_difference(source, module, 300)
    assert worst < 1e-4 < spread
    back = to_hugging_face(module.state_dict(), config)
    for key, weight in source.state_dict().items():
        if key != "lm_head.weight" or not tied:
            assert torch.equal(back[key], weight), key


def test_a_bf16_model_is_verified_in_fp32(tmp_path):
    source = hugging_face("qwen2", example("abf").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR)).bfloat16()
    source.config.dtype = torch.bfloat16
    config, module, variant = nemo_from(source)
    assert config.params_dtype == torch.bfloat16
    hf_model(module, config, variant, max_position_embeddings=FAR).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify_export(module, tmp_path, variant, rotary_dim=HEAD, tokens=100, longest=FAR) < 1e-4


def test_verification_sees_a_lost_pi_factor(tmp_path):
    """What the host's own exporter does: PI is dropped from config.json without a word."""
    source = hugging_face("llama", example("pi").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR))
    config, module, variant = nemo_from(source)
    hf_model(module, config, variant, max_position_embeddings=FAR).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["rope_scaling"] = None
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ConfigError, match="inv_freq"):
        verify_export(module, tmp_path, variant, rotary_dim=HEAD, tokens=64, longest=FAR)


def test_verification_sees_a_lost_attention_factor_and_a_wrong_weight(tmp_path):
    source = hugging_face("llama", example("yarn").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR))
    config, module, variant = nemo_from(source)
    exported = hf_model(module, config, variant, max_position_embeddings=FAR)
    exported.config.rope_scaling["attention_factor"] = 1.0
    exported.save_pretrained(tmp_path / "factor")
    with pytest.raises(ConfigError, match="attention_factor"):
        verify_export(module, tmp_path / "factor", variant, rotary_dim=HEAD, tokens=64, longest=FAR)
    exported = hf_model(module, config, variant, max_position_embeddings=FAR)
    with torch.no_grad():
        exported.model.layers[1].self_attn.k_proj.weight[0] += 0.5
    exported.save_pretrained(tmp_path / "weight")
    with pytest.raises(ConfigError, match="logits"):
        verify_export(module, tmp_path / "weight", variant, rotary_dim=HEAD, tokens=64, longest=FAR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "cannot be converted"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_would_be_lost_on_import_is_refused(changes, message):
    config = AutoConfig.for_model(**{"model_type": "llama", **changes})
    with pytest.raises(ConfigError, match=message):
        family_of_hf(config)


def test_a_sliding_window_is_refused():
    with pytest.raises(ConfigError, match="sliding_window"):
        family_of_hf(AutoConfig.for_model("mistral", sliding_window=4096))


def test_other_architectures_are_refused_on_export():
    with cpu.stock_configs():
        config = llm.NemotronConfig(num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16)
    with pytest.raises(ConfigError, match="cannot be exported"):
        family_of_nemo(config)


def test_xpos_is_refused_with_the_reason():
    source = hugging_face("llama", example("rope").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR))
    config, module, _ = nemo_from(source)
    assert rotary_dim_of(config) == HEAD
    with pytest.raises(ConfigError, match="transformers has no xPos"):
        hf_model(module, config, example("xpos"), max_position_embeddings=FAR)


def _cli(*argv):
    code = "import sys; from nemo_longctx.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_import_and_export_commands(tmp_path):
    """The two commands on real checkpoints: NeMo writes and reads its own, tokenizer and generation config come along."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    source = hugging_face("qwen3", example("yarn").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR), eos_token_id=1)
    source.generation_config = GenerationConfig(eos_token_id=[1, 2], temperature=0.6, do_sample=True)
    source.save_pretrained(tmp_path / "hf")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(tmp_path / "hf")
    done = _cli("import", tmp_path / "hf", tmp_path / "ckpt")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "ckpt" / "weights").is_dir()
    done = _cli("export", tmp_path / "ckpt", tmp_path / "out", "--verify-tokens", "600")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verified" in done.stdout
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 100, (1, FAR), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert (again(ids).logits - source(ids).logits).abs().max() < 1e-4
    assert again.config.max_position_embeddings == FAR
    assert again.config.eos_token_id == [1, 2]
    assert again.generation_config.temperature == 0.6
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w7")["input_ids"] == [5, 7]
    done = _cli("export", tmp_path / "ckpt", tmp_path / "out")
    assert done.returncode == 2
    assert "exists already" in done.stderr
