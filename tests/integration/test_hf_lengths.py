"""What goes with the weights into a checkpoint and out again: special tokens, lengths, sampling, pickled and renamed files."""

import json
import os
import signal

import pytest
import torch
from hf_files import word_tokenizer
from test_rope_hf import HEAD, _single_process, hugging_face  # noqa: F401

from nemo_longctx.adapters.nemo.checkpoint import convert
from nemo_longctx.adapters.nemo.checkpoint.convert import export_hf, import_hf
from nemo_longctx.adapters.nemo.checkpoint.load import load_model
from nemo_longctx.cli import main
from nemo_longctx.rope import Rope

pytestmark = pytest.mark.slow
SHORT, LONG = 256, 2048


def directory(folder, model_type="llama", **changes):
    """A directory of the shortest length, without generation config and tokenizer, as a research release has it."""
    keys = Rope().to_hf(rotary_dim=HEAD, max_position_embeddings=SHORT)
    model = hugging_face(model_type, keys, bos_token_id=1, eos_token_id=2, pad_token_id=None, **changes)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model, folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_tokens_stay_without_generation_config_and_tokenizer(tmp_path):
    _, source = directory(tmp_path / "a model", "llama")
    config = read(source, "config.json") | {"eos_token_id": [2, 5]}
    (source / "config.json").write_text(json.dumps(config))
    import_hf(source, tmp_path / "a checkpoint")
    export_hf(tmp_path / "a checkpoint", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        written = read(tmp_path / "out", name)
        assert (written["bos_token_id"], written["eos_token_id"]) == (1, [2, 5])


def test_lengths_leave_together_and_sampling_stays(tmp_path):
    """Llama 2 chat's generation config, a tokenizer with a limit and a truncation of its own, pickled weights with tied heads
    and stored frequencies: all of it in one directory."""
    source, folder = directory(tmp_path / "hf", tie_word_embeddings=True)
    (folder / "model.safetensors").unlink()
    state = source.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.from_numpy(Rope().inv_freq(HEAD))}
    torch.save(state, folder / "pytorch_model.bin")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "max_length": SHORT}
    tokenizer = word_tokenizer() | {
        "truncation": {"direction": "Right", "max_length": SHORT, "strategy": "LongestFirst", "stride": 0}
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": SHORT, "eos_token": "w2", "bos_token": "w1"}
    for name, content in [
        ("generation_config.json", generation), ("tokenizer.json", tokenizer), ("tokenizer_config.json", settings),
    ]:  # fmt: skip
        (folder / name).write_text(json.dumps(content))
    import_hf(folder, tmp_path / "ckpt")
    exported = export_hf(tmp_path / "ckpt", tmp_path / "out", max_position_embeddings=LONG)
    assert read(tmp_path / "out", "config.json")["max_position_embeddings"] == LONG
    written = read(tmp_path / "out", "generation_config.json")
    assert {key: written[key] for key in ("do_sample", "temperature", "top_p", "max_length")} == {
        "do_sample": True, "temperature": 0.9, "top_p": 0.6, "max_length": LONG,
    }  # fmt: skip
    assert read(tmp_path / "out", "tokenizer_config.json")["model_max_length"] == LONG
    assert set(read(tmp_path / "out", "special_tokens_map.json")) == {"bos_token", "eos_token"}  # none of NeMo's own
    truncation = read(tmp_path / "out", "tokenizer.json")[
        "truncation"
    ]  # the host's tokenizer takes it away: then nothing is cut
    assert truncation is None or truncation["max_length"] == LONG
    assert [line.split(",")[0] for line in exported.notes[:2]] == ["transformers reads: 2", "vLLM reads: 2"]


@pytest.mark.parametrize(
    ("stored", "said", "kept"), [(torch.float32, "bfloat16", torch.float32), (torch.bfloat16, "float32", torch.float32)]
)
def test_weights_of_another_type_than_the_configs_are_rounded_nowhere(tmp_path, stored, said, kept):
    source, folder = directory(tmp_path / "hf")
    source.to(stored).save_pretrained(folder)
    config = read(folder, "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "dtype": said}))
    import_hf(folder, tmp_path / "ckpt")
    module, nemo, _ = load_model(tmp_path / "ckpt")
    assert nemo.params_dtype == kept
    weight = module.state_dict()["decoder.layers.1.mlp.linear_fc2.weight"]
    assert torch.equal(weight, source.state_dict()["model.layers.1.mlp.down_proj.weight"].to(kept))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("phi3", {"original_max_position_embeddings": 64, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}}),
        ("starcoder2", {"sliding_window": 50, "tie_word_embeddings": True}),
        ("starcoder2", {"hidden_act": "gelu", "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ],
)  # fmt: skip
def test_families_of_other_layouts_convert_both_ways(model_type, changes, tmp_path):
    """Phi-3's fused projections, StarCoder2's norms and biases: logits at positions beyond the window and trained length."""
    source, folder = directory(tmp_path / "hf", model_type, **changes)
    variant = import_hf(folder, tmp_path / "ckpt")
    assert export_hf(tmp_path / "ckpt", tmp_path / "out").variant == variant
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 100, (1, 400), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert (again(ids).logits - source(ids).logits).abs().max() < 1e-4
    for key, weight in source.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    kept = ("rope_scaling", "rope_theta", "sliding_window", "hidden_act", "original_max_position_embeddings")
    assert {key: again.config.to_dict().get(key) for key in kept} == {key: source.config.to_dict().get(key) for key in kept}


def test_a_conversion_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, capsys):
    """SIGTERM while the result is compared, when all of it is written beside the target."""
    _, source = directory(tmp_path / "hf")
    monkeypatch.setattr(convert, "verify_same", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        main(["import", str(source), str(tmp_path / "ckpt")])
    assert ended.value.code == 143
    assert "nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
