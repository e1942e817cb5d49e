"""The rows of other people's directories through the commands: one sentence, status 2, nothing left behind."""

import json

import numpy as np
import pytest
from hf_files import word_tokenizer

from nemo_longctx.cli import main
from nemo_longctx.rope import Rope

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
HEAD = {"lm_head.weight": np.ones((100, 64), np.float32)}
GEMMA3 = {"rope_local_base_freq": 10_000.0, "sliding_window": 512, "hidden_activation": "gelu_pytorch_tanh"}


def command(capsys, *arguments):
    """Status and what was printed to stderr, without warnings of libraries."""
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.strip().splitlines()
    return status, said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"files": {"tokenizer.json": word_tokenizer(**{"[PAD]": 100})}}, "tokenizer='[PAD]': is number 100 beyond the"),
        ({"tensors": HEAD, "tie_word_embeddings": True}, "tie_word_embeddings=True: lm_head.weight in the files is not"),
        ({"tensors": {INV_FREQ: Rope(base=5e5).inv_freq(16)}}, "is unlike config.json's RoPE"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config='awq': its weights are quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": None}, "rope_theta=None: null"),
        ({"rope_scaling": [1.0]}, "rope_scaling=[1.0]: must be a mapping"),
        ({"model_type": "gemma3_text", **GEMMA3}, "model_type='gemma3_text': cannot be converted: its norms are of 1"),
        ({"model_type": "nemotron"}, "Megatron-Core has in Transformer Engine alone"),
        ({"model_type": "chatglm"}, "its code comes with the directory (auto_map) and is not run"),
        ({"model_type": "mixtral"}, "it has experts"),
        ({"model_type": "unheard_of"}, "no converter knows it"),
    ],
)
def test_import_refuses_in_a_sentence(directory, capsys, tmp_path, given, message):
    status, said = command(capsys, "import", directory(**given), tmp_path / "a" / "checkpoint")
    assert (status, len(said)) == (2, 1)
    assert message in said[0]
    assert "did you mean" not in said[0]
    assert not (tmp_path / "a").exists()


def test_targets_are_refused_before_anything_is_read(directory, capsys, tmp_path):
    source = directory()
    for command_name, why in (
        ("import", "exists already"),
        ("export", "is a Hugging Face directory; make a NeMo checkpoint of it"),
    ):
        status, said = command(capsys, command_name, source, source)
        assert status == 2
        assert why in said[0]
    status, said = command(capsys, "import", source, source / "checkpoint")
    assert "lies inside" in said[0]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "starcoder2"])
def test_plan_takes_what_import_takes(directory, capsys, model_type):
    more = {"hidden_act": "gelu_pytorch_tanh"} if model_type == "starcoder2" else {}
    folder = directory(model_type, pad_token_id=None, **more)
    assert main(["plan", "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_run_that_begins_from_a_hugging_face_directory_is_told_to_import_it(directory, capsys):
    status = main(["train", "recipe=tiny_cpu_long", f"restore_from={directory()}", "--dry-run"])
    assert status == 2
    assert "nemo-longctx import" in capsys.readouterr().out
