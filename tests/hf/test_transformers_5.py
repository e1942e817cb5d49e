"""Whoever reads a directory that transformers 5 wrote has its RoPE and its tokenizer, not what 4 makes of it without a word."""

import json

import pytest
from tiny_models import byte_tokenizer, tiny_llama

from nemo_longctx.adapters.pretrained import hf_tokenizer
from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.hf.model import load_hf_model
from nemo_longctx.hf.tokenizer import in_other_words, open_tokenizer
from nemo_longctx.instruct.local import LocalCheckpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model under YaRN and its tokenizer, in the keys, the class and the list that 5 writes."""
    path = tmp_path_factory.mktemp("five")
    tiny_llama(vocab=320, layers=1).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": YARN | {"rope_theta": 5e5}}))
    byte_tokenizer(["a text of words"], 320).save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    for key in ("additional_special_tokens", "added_tokens_decoder"):
        settings.pop(key, None)
    settings |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["</s>"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "special_tokens_map.json").unlink()
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return path


def test_the_model_has_the_rope_that_5_says(folder):
    for model in (load_hf_model(folder), LocalCheckpoint(folder, template="tokenizer").scorer.model.model):
        assert model.config.rope_theta == 5e5
        assert model.config.rope_scaling["rope_type"] == "yarn"
        assert model.config.rope_scaling["factor"] == 4.0


def test_every_reader_of_a_tokenizer_opens_it(folder, tmp_path, capsys):
    assert in_other_words(folder)
    expected = open_tokenizer(folder)("a text")["input_ids"]
    assert expected
    assert hf_tokenizer(str(folder))("a text")["input_ids"] == expected
    assert LocalCheckpoint(folder, template="tokenizer").tokenizer("a text")["input_ids"] == expected
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "text"}]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["inspect", str(tmp_path / "talks.jsonl"), "--show", "1", "--tokenizer", str(folder)]) == 0
    assert "text" in capsys.readouterr().out


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": PLAIN}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "rope_parameters": GEMMA3}},
        {"model_type": "gemma3_text", "rope_parameters": GEMMA3},
        {"model_type": "mixtral", "rope_parameters": PLAIN},
        {"model_type": "olmo2", "rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}},
    ],
    ids=["multimodal", "by layer", "base", "unknown"],
)
def test_rope_that_4_would_pass_over_is_refused(config, tmp_path):
    """Of families that are evaluated and not converted, nothing puts 5's words into 4's."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"rope_parameters, which transformers .* passes over.*for {config['model_type']}"):
        load_hf_model(tmp_path)


def test_rope_of_5_that_4_takes_anyway_is_no_reason_to_refuse(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    )
    with pytest.raises(ConfigError, match="transformers cannot load it"):  # only that no weights are there
        load_hf_model(tmp_path)


def test_a_model_that_lacks_weights_is_not_filled_up_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_llama(vocab=32, layers=1).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    load_hf_model(tmp_path)
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights \(lm_head\.weight\), which transformers would draw at random"):
        load_hf_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    load_hf_model(tmp_path)
