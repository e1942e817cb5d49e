"""The host's `llm.export_ckpt`: which checkpoints its own exporters would lose, and what becomes of those."""

import nemo.lightning as nl
import pytest
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface import AutoTokenizer
from nemo.lightning.io.pl import TrainerContext
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nemo_longctx.adapters.megatron import cpu
from nemo_longctx.adapters.nemo.checkpoint import exporter
from nemo_longctx.adapters.nemo.checkpoint.convert import export_hf
from nemo_longctx.adapters.nemo.model.config import prepare_model
from nemo_longctx.config import ConfigError
from nemo_longctx.rope import parse

SIZES = {
    "num_layers": 1,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 96,
}
MODELS = {
    "llama": (llm.LlamaModel, llm.LlamaConfig, {}),
    "llama31": (llm.LlamaModel, llm.Llama31Config8B, {}),
    "mistral": (llm.MistralModel, llm.MistralConfig7B, {"kv_channels": 16, "window_size": None}),
    "qwen3": (llm.Qwen3Model, llm.Qwen3Config, {"kv_channels": 16}),
    "gemma": (llm.GemmaModel, llm.GemmaConfig, {"kv_channels": 16}),
    "nemotron": (llm.NemotronModel, llm.NemotronConfig, {"kv_channels": 16}),
}
ROPE = {
    "abf": {"variant": "abf"},
    "plain": {"variant": "rope"},
    "pi": {"variant": "pi", "factor": 4.0},
    "llama3": {"variant": "llama3"},
    "yarn": {"variant": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "xpos": {"variant": "xpos"},
}


@pytest.fixture(scope="module", autouse=True)
def _single_process():
    was_installed = cpu.is_installed()
    cpu.install()
    with cpu.stock_configs():
        yield
    if not was_installed:
        cpu.uninstall()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder)
    return AutoTokenizer(folder)


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """A checkpoint's context, as a run writes it; its weights are nobody's concern here."""

    def write(name, rope):
        model_class, config_class, more = MODELS[name]
        model = model_class(config_class(**SIZES, **more), tokenizer=tokenizer)
        prepare_model(model, seq_length=256, variant=parse(ROPE[rope]))
        trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy(), logger=False)
        (tmp_path / "weights").mkdir()
        TrainerContext(model=model, trainer=trainer, extra={}).io_dump(tmp_path / "context", yaml_attrs=["model"])
        return model_class.exporter("hf", tmp_path)

    return write


@pytest.mark.parametrize(
    ("name", "rope", "says_all"),
    [
        ("llama", "abf", True),
        ("llama", "pi", False),
        ("llama", "yarn", False),
        ("llama", "xpos", False),
        ("llama31", "llama3", True),
        ("llama31", "plain", False),
        ("mistral", "pi", False),
        ("qwen3", "abf", True),
        ("gemma", "plain", True),
        ("gemma", "abf", False),  # its exporter writes no base at all
        ("nemotron", "abf", True),
        ("nemotron", "pi", False),
    ],
)
def test_what_the_hosts_exporters_would_lose_is_known(checkpoint, monkeypatch, name, rope, says_all):
    monkeypatch.setattr(exporter, "has_module", lambda module: True)  # as with Transformer Engine
    connector = checkpoint(name, rope)
    assert connector._says_all() is says_all
    if name == "qwen3":
        assert connector.config.max_position_embeddings == 256


@pytest.mark.parametrize(
    ("name", "rope", "message"),
    [("llama", "xpos", "transformers has no xPos"), ("nemotron", "pi", "cannot be exported"), ("gemma", "abf", "cannot be")],
)
def test_what_cannot_be_said_is_refused_by_the_hosts_own_command(checkpoint, tmp_path, name, rope, message):
    checkpoint(name, rope)
    with pytest.raises(ConfigError, match=message):
        llm.export_ckpt(tmp_path, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_registering_twice_is_registering_once():
    before = type(llm.LlamaModel.exporter("hf", "unused"))
    exporter.register()
    assert type(llm.LlamaModel.exporter("hf", "unused")) is before
    assert before.__name__ == "HFLlamaExporter"


def test_a_tokenizer_that_the_embedding_has_no_rows_for_is_refused_before_weights_are_read(checkpoint, tmp_path):
    checkpoint("llama", "abf")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "larger")
    with pytest.raises(ConfigError, match="is number 96 beyond the embedding's 96 rows"):
        export_hf(tmp_path, tmp_path / "hf", tokenizer=tmp_path / "larger")
    assert not (tmp_path / "hf").exists()
