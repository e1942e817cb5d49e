"""Hugging Face <-> NeMo: weights, RoPE at far positions, tokenizer; what cannot be said is refused."""

import copy
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections import llm
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.megatron.attention import packed_documents
from nemo_longctx.adapters.megatron.inference import MCoreCausalModel, evaluating
from nemo_longctx.adapters.megatron.rope_guard import verify_live_rope
from nemo_longctx.adapters.megatron.rope_module import rotary_dim_of, transform_rope
from nemo_longctx.adapters.nemo.checkpoint import convert as checkpoint_module
from nemo_longctx.adapters.nemo.checkpoint.convert import export_hf, hf_model, import_hf
from nemo_longctx.adapters.nemo.checkpoint.hf_verify import verify_export
from nemo_longctx.adapters.nemo.checkpoint.hf_weights import family_of_nemo, to_hugging_face
from nemo_longctx.adapters.nemo.checkpoint.load import load_model
from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.rope import VARIANTS, Rope, RopeVariant, parse

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
PATTERN = {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1}
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
    # (transformers 4.51 gives Qwen 3 the window of its default though `use_sliding_window` is false)
    fields |= {"sliding_window": None} if model_type in ("mistral", "qwen3") else {}
    config = AutoConfig.for_model(model_type, **(fields | rope | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def nemo_from(source, folder):
    """The NeMo config, live Megatron-Core model and RoPE of a transformers model, through the importer itself."""
    source.save_pretrained(folder / "source")
    variant = import_hf(folder / "source", folder / "checkpoint")
    module, config, _ = load_model(folder / "checkpoint")
    return config, module, variant


def rewrite_config(folder, **changes):
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | changes))


def plain_source(folder):
    hugging_face("llama", example("rope").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR)).save_pretrained(folder)
    return folder


@torch.no_grad()
def largest_difference(source, module, length):
    ids = torch.randint(0, 100, (1, length), generator=torch.Generator().manual_seed(3))
    theirs = source(ids).logits
    ours = module(ids, torch.arange(length)[None], None)
    return float((ours - theirs).abs().max()), float(theirs.std())


@torch.no_grad()
def same_in_every_way(source, module):
    """Logits equal those of a transformers model: whole, packed documents against each alone, and token by token."""
    length, ends, steps = 700, (0, 300, 303, 700), (0, 300, *range(301, 340), 700)
    worst, spread = largest_difference(source, module, length)
    assert worst < 1e-4 < 0.1 < spread
    ids = torch.randint(0, 100, (1, length), generator=torch.Generator().manual_seed(3))
    whole = source(ids).logits
    alone = torch.cat([source(ids[:, a:b]).logits for a, b in itertools.pairwise(ends)], 1)
    packed = module(ids, torch.arange(length)[None], None, packed_seq_params=packed_documents(ends))
    assert (packed - alone).abs().max() < 1e-4
    with evaluating(module):
        model = MCoreCausalModel(module, vocab_size=100, max_length=FAR)
        states = torch.cat([model.extend(ids[0, a:b]) for a, b in itertools.pairwise(steps)])
        cached = torch.stack([model.next_logits(state) for state in states])
    assert (cached - whole[0]).abs().max() < 1e-4


SLOW = [pytest.param(name, FAR, marks=pytest.mark.slow) for name in ("yarn", "longrope", "dynamic_ntk")]


@pytest.mark.parametrize(("name", "length"), [*((name, 3000) for name in VARIANTS if name != "xpos"), *SLOW])
def test_every_exportable_variant_gives_the_same_logits(name, length, tmp_path):
    """HF -> NeMo -> HF, beyond the trained length of 2,048: three models, one set of logits; verification agrees."""
    keys = example(name).to_hf(rotary_dim=HEAD, max_position_embeddings=FAR)
    source = hugging_face("llama", keys)
    config, module, variant = nemo_from(source, tmp_path)
    worst, spread = largest_difference(source, module, length)
    assert worst < 1e-4 < 0.1 < spread
    again = hf_model(module, config, variant, max_position_embeddings=keys["max_position_embeddings"])
    assert {k: v for k, v in again.config.to_dict().items() if "rope" in k} == {
        k: v for k, v in source.config.to_dict().items() if "rope" in k
    }
    for key, weight in source.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    again.save_pretrained(tmp_path / "again")
    assert verify_export(module, tmp_path / "again", variant, rotary_dim=HEAD, tokens=300, longest=FAR) < 1e-4


def test_an_export_of_llama_3s_formula_is_imported_again(tmp_path):
    """Two variants that transformers knows as one, for which NeMo has a config class of its own."""
    source, other = (
        hugging_face("llama", example(name).to_hf(rotary_dim=HEAD, max_position_embeddings=FAR))
        for name in ("ntk_by_parts", "llama3")
    )
    assert (
        RopeVariant.from_hf(source.config.to_dict()).variant == RopeVariant.from_hf(other.config.to_dict()).variant == "llama3"
    )
    config, module, variant = nemo_from(source, tmp_path)
    assert type(config).__name__ == "Llama31Config"
    assert export_hf(tmp_path / "checkpoint", tmp_path / "hf").variant == variant
    assert import_hf(tmp_path / "hf", tmp_path / "again") == variant
    again, _, _ = load_model(tmp_path / "again")
    ids, positions = torch.arange(100)[None], torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(again(ids, positions, None), module(ids, positions, None))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_converts_both_ways(model_type, tied, tmp_path):
    source = hugging_face(
        model_type, example("yarn").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR), tie_word_embeddings=tied
    )
    source.tie_weights()
    config, module, _ = nemo_from(source, tmp_path)
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
    config, module, variant = nemo_from(source, tmp_path)
    assert config.params_dtype == torch.bfloat16
    hf_model(module, config, variant, max_position_embeddings=FAR).save_pretrained(tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written.get("dtype", written.get("torch_dtype")) == "bfloat16"  # transformers before 4.56 has the second word
    assert verify_export(module, tmp_path / "hf", variant, rotary_dim=HEAD, tokens=100, longest=FAR) < 1e-4


def test_verification_sees_a_lost_pi_factor(tmp_path):
    """What the host's own exporter does: PI is dropped from config.json without a word."""
    source = hugging_face("llama", example("pi").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR))
    config, module, variant = nemo_from(source, tmp_path)
    hf_model(module, config, variant, max_position_embeddings=FAR).save_pretrained(tmp_path / "hf")
    rewrite_config(tmp_path / "hf", rope_scaling=None)
    with pytest.raises(ConfigError, match="inv_freq"):
        verify_export(module, tmp_path / "hf", variant, rotary_dim=HEAD, tokens=64, longest=FAR)


def test_verification_sees_a_lost_attention_factor_and_a_wrong_weight(tmp_path):
    source = hugging_face("llama", example("yarn").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR))
    config, module, variant = nemo_from(source, tmp_path)
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


def test_a_weight_without_its_counterpart_ends_an_export():
    model = hugging_face("llama", example("abf").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR))
    weights = dict(model.state_dict())
    checkpoint_module._load_strictly(model, weights)
    lost = {name: weight for name, weight in weights.items() if name != "model.norm.weight"}
    for wrong, named in ((lost, "model.norm.weight"), (weights | {"model.more.weight": torch.ones(1)}, "model.more.weight")):
        with pytest.raises(ConfigError, match=f"{named}.*have no counterpart in transformers' model; cannot be exported"):
            checkpoint_module._load_strictly(model, wrong)


def longrope_scaling(**changes):
    scaling = {**LONG, "rope_type": "longrope", "original_max_position_embeddings": 64}
    return {key: value for key, value in (scaling | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("scaling", "top"),
    [
        (longrope_scaling(), {}),
        (longrope_scaling(), {"original_max_position_embeddings": 128}),
        (longrope_scaling(factor=None, attention_factor=1.25), {}),
    ],
    ids=["nested length ignored", "top length taken", "no factor and no length"],
)
def test_longrope_is_imported_as_transformers_4_reads_it(scaling, top, tmp_path):
    """Logits on both sides of every length that could be meant: 64 (nested), 128 (top), 256 (max_position_embeddings)."""
    keys = {"rope_theta": 20_000.0, "rope_scaling": scaling, "max_position_embeddings": 256, **top}
    source = hugging_face("llama", keys)
    _, module, _ = nemo_from(source, tmp_path)
    for length in (64, 65, 128, 129, 256, 257):
        worst, spread = largest_difference(source, module, length)
        assert worst < 1e-4 < 0.1 < spread, length


def test_rope_parameters_of_transformers_5_are_imported(tmp_path, caplog):
    """The installed transformers 4 ignores them: the comparison must not take its word for plain RoPE."""
    keys = example("yarn").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR)
    source = hugging_face("llama", keys)
    source.save_pretrained(tmp_path / "hf")
    newer = example("yarn").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR, version=5)
    written = json.loads((tmp_path / "hf" / "config.json").read_text()) | newer
    kept = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(kept))
    assert import_hf(tmp_path / "hf", tmp_path / "checkpoint") == example("yarn")
    assert "does not read rope_parameters" in caplog.text
    module, _, _ = load_model(tmp_path / "checkpoint")
    assert largest_difference(source, module, 300)[0] < 1e-4


def test_an_import_is_compared_with_its_source(tmp_path, monkeypatch, capsys):
    """A RoPE read wrongly and a weight put in the wrong place end the import, and nothing is left of it; `--no-verify` asks
    for neither look."""
    source, target = plain_source(tmp_path / "hf"), tmp_path / "checkpoint"
    with monkeypatch.context() as planted:
        planted.setattr(RopeVariant, "from_hf", classmethod(lambda cls, config: Rope(base=10_000.0)))
        with pytest.raises(ConfigError, match="inv_freq"):
            import_hf(source, target)
    convert = checkpoint_module.to_megatron

    def swapped(weights, names, config):
        made = convert(weights, names, config)
        name = "decoder.layers.1.mlp.linear_fc1.weight"
        return made | {name: torch.cat(made[name].chunk(2)[::-1])}

    monkeypatch.setattr(checkpoint_module, "to_megatron", swapped)
    with pytest.raises(ConfigError, match="logits"):
        import_hf(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    assert main(["import", str(source), str(target), "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out
    assert (target / "weights").is_dir()
    exported = checkpoint_module.hf_model

    def changed(*args, **kwargs):
        model = exported(*args, **kwargs)
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight[0] += 0.5
        return model

    monkeypatch.setattr(checkpoint_module, "hf_model", changed)
    with pytest.raises(ConfigError, match="logits"):  # so does an export whose verification fails
        export_hf(target, tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]
    assert main(["export", str(target), str(tmp_path / "exported"), "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"9 weights are missing from the files \(model.layers.2.input_layernorm.weight, "),
        (
            {"num_hidden_layers": 1},
            r"9 weights have no place in the model \(model.layers.1.input_layernorm",
        ),
        ({"hidden_size": 128}, r"21 weights have another shape \(lm_head.weight, model.embed_tokens.weight, "),
    ],
)
def test_weights_that_are_not_the_configs_are_refused(changes, message, tmp_path):
    source = plain_source(tmp_path / "hf")
    rewrite_config(source, **changes)
    with pytest.raises(ConfigError, match=message):
        import_hf(source, tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 20_000), os.unlink], ids=["cut short", "absent"])
def test_weights_that_cannot_be_read_are_refused_in_a_sentence(damage, tmp_path):
    source = plain_source(tmp_path / "hf")
    damage(source / "model.safetensors")
    with pytest.raises(ConfigError, match=r"transformers cannot load its weights|has no weights") as caught:
        import_hf(source, tmp_path / "checkpoint")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verify_tokens": 0}, "verify_tokens=0: the length"),
        ({"verify_tokens": -1}, "verify_tokens=-1: the length"),
        ({"verify": False, "verify_tokens": 7}, "verify_tokens=7: has no effect"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0: the longest input"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1: the longest input"),
    ],
)
def test_arguments_out_of_their_range_are_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_hf(tmp_path / "checkpoint", tmp_path / "hf", **arguments)
    if "max_position_embeddings" not in arguments:
        with pytest.raises(ConfigError, match=message):
            import_hf(plain_source(tmp_path / "source"), tmp_path / "again", **arguments)


def test_a_longest_input_that_dynamic_ntk_cannot_say_is_refused(tmp_path):
    source = hugging_face("llama", example("dynamic_ntk").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR))
    nemo_from(source, tmp_path)
    with pytest.raises(ConfigError, match="max_position_embeddings=4096: dynamic NTK must write its trained length"):
        export_hf(tmp_path / "checkpoint", tmp_path / "hf", max_position_embeddings=4096)
    assert export_hf(tmp_path / "checkpoint", tmp_path / "hf").variant == example("dynamic_ntk")


def by_layer_type(source, module, config, yarn):
    """OLMo 3's: layers with a window have its own rotary embedding of the default type, of another base; the rest YaRN."""
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

    asked = dataclasses.replace(yarn, local_base=1_000.0)
    transform_rope(module, asked)
    assert largest_difference(source, module, 700)[0] > 0.01  # the source has one RoPE so far
    windowed = copy.deepcopy(source.config)
    windowed.rope_theta = asked.local_base
    rotary = Olmo3RotaryEmbedding(windowed, rope_type="default")

    def own_angles(attention, args, kwargs):
        states = kwargs["hidden_states"]
        return args, {**kwargs, "position_embeddings": rotary(states, torch.arange(states.shape[1])[None])}

    assert [layer.attention_type for layer in source.model.layers] == ["full_attention", "sliding_attention"]
    source.model.layers[1].self_attn.register_forward_pre_hook(own_angles, with_kwargs=True)
    verify_live_rope(module, asked)
    same_in_every_way(source, module)
    with pytest.raises(ConfigError, match=r"rope.layers='full_attention': no class of transformers has"):
        hf_model(module, config, asked, max_position_embeddings=FAR)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": 24}),
        ("qwen2", PATTERN),
        ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_layers_with_a_window_or_without_rope_convert_both_ways(model_type, changes, tmp_path):
    """Logits of transformers' own models, full, packed and cached, far beyond the window; what is exported says the same."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    source = hugging_face(model_type, example("yarn").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR), **changes)
    lacks = {"qwen2": "window_attn_skip_freq", "smollm3": "no_rope_freq"}.get(model_type)
    if lacks and lacks not in TransformerConfig.__dataclass_fields__:
        with pytest.raises(ConfigError, match=rf"its layers differ \({lacks}\), which this version of NeMo cannot build"):
            nemo_from(source, tmp_path)
        return
    config, module, variant = nemo_from(source, tmp_path)
    same_in_every_way(source, module)
    again = hf_model(module, config, variant, max_position_embeddings=FAR)
    ids = torch.randint(0, 100, (1, 200), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert (again.eval()(ids).logits - source(ids).logits).abs().max() < 1e-5
    said = again.config.to_dict()
    for key in ("sliding_window", "layer_types", "no_rope_layers"):
        assert said.get(key) == source.config.to_dict().get(key), key
    if model_type == "qwen2" and "olmo3" in CONFIG_MAPPING:
        by_layer_type(source, module, config, variant)


def test_other_architectures_are_refused_on_export():
    with cpu.stock_configs():
        config = llm.NemotronConfig(num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16)
    with pytest.raises(ConfigError, match="cannot be exported"):
        family_of_nemo(config)


def test_xpos_is_refused_with_the_reason(tmp_path):
    source = hugging_face("llama", example("rope").to_hf(rotary_dim=HEAD, max_position_embeddings=FAR))
    config, module, _ = nemo_from(source, tmp_path)
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
    templates = {"default": "{{ messages }}", "rag": "{{ documents }}"}  # transformers writes the second into a folder
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", chat_template=templates).save_pretrained(tmp_path / "hf")
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
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert again.config.eos_token_id == [1, 2]
    assert again.generation_config.temperature == 0.6
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert tokenizer.chat_template == templates
    done = _cli("export", tmp_path / "ckpt", tmp_path / "out")
    assert done.returncode == 2
    assert "exists already" in done.stderr
