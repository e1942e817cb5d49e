"""Hugging Face directories with the peculiarities of real ones: each loads, or ends in one sentence with the mend."""

import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hf_files import config_of, word_tokenizer, write_safetensors

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.config import read_config
from nemo_longctx.hf.directory import check_directory, write_copy
from nemo_longctx.hf.files import check_target
from nemo_longctx.hf.generation import read_generation_config
from nemo_longctx.hf.layers import attention_values
from nemo_longctx.hf.tokenizer import other_things
from nemo_longctx.planning.models import model_from_hf
from nemo_longctx.rope import PiRope, Rope, YarnRope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def refused(folder, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_directory(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor=None: missing"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type=None: missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "missing; rope_type 'llama3' needs it"),
        ({"rope_scaling": [{"type": "linear", "factor": 2.0}]}, "rope_scaling=.*must be a mapping"),
        ({"rope_scaling": []}, "rope_scaling=.*must be a mapping"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4.0"}}, "rope.factor='4.0': not a number"),
        ({"rope_theta": None}, "rope_theta=None: null"),
        ({"rope_theta": 0}, "rope.base=0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_theta": 10000.0, "rope_parameters": YARN | {"rope_theta": 5e5}}, "beside it say"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set a layer type"),
        (
            {"rope_parameters": {"full_attention": YARN | {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}},
            "one set a layer type, where transformers' llama has one RoPE for all",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config='awq': its weights are quantised"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config='gptq'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config='compressed-tensors'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config='bitsandbytes'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config='fp8'"),
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
        ({"model_type": "mine"}, "model_type='mine': cannot be converted: no converter knows it; .*llama, mistral"),
        ({"model_type": "gpt2"}, "it has no RoPE"),
        ({"model_type": "glm4"}, "a part of each head"),
        ({"model_type": "Yi"}, "say model_type llama"),
        ({"model_type": "llama "}, "transformers writes it 'llama'"),
        ({"model_type": "ministral"}, "model_type='ministral': cannot be converted: say model_type mistral"),
        ({"model_type": "llava", "text_config": {}}, "it is multimodal"),
        ({"model_type": "gemma3_text"}, "its norms are of 1"),
        ({"model_type": "Llama"}, "transformers writes it 'llama'"),
        ({"model_type": None}, "must name its architecture"),
        ({"model_type": "afmoe", "auto_map": {"AutoConfig": "x.Y"}}, "its code comes with the directory"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "another head than a language model's"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_size": "64"}, "hidden_size='64': must be a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: must divide"),
        ({"pad_token_id": 100}, "pad_token_id=100: outside the 100 rows"),
        ({"eos_token_id": [2, 128009]}, "eos_token_id=.*outside the 100 rows"),
    ],
)
def test_a_config_that_would_be_lost_is_refused_in_a_sentence(directory, changes, message):
    refused(directory(**changes), message)


@pytest.mark.parametrize(
    ("changes", "variant"),
    [
        ({"rope_scaling": {}}, Rope()),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, PiRope(factor=2)),
        ({"rope_scaling": {"rope_type": "default"}, "pad_token_id": -1}, Rope()),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 128.0}},
         YarnRope(factor=4.0, original_max_position_embeddings=128)),
        ({"head_dim": None, "num_key_value_heads": None}, Rope()),
        ({"torch_dtype": "bfloat16", "unheard_of": {"a": [1]}, "id2label": 7, "architectures": 5}, Rope()),
        ({"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "x.Y"}}, Rope()),
    ],
)  # fmt: skip
def test_what_says_enough_is_taken(directory, changes, variant):
    assert check_directory(directory(**changes)).config.variant == variant


def test_settings_that_nothing_reads_are_said():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attn_factor": 1.2}
    first, second = read_config(config_of(rope_scaling=scaling, logit_scale=0.5, num_experts=0)).notes
    assert first == "logit_scale: transformers' llama does not read it, and neither does the import"
    assert second == "rope_scaling: attn_factor is read by no RoPE of transformers' llama; left out"


def test_a_length_in_words_that_nothing_reads_is_said():
    """Vicuna's and LongChat's max_position_embeddings is the length before linear scaling."""
    linear = {"type": "linear", "factor": 4.0}
    (note,) = read_config(config_of(rope_scaling=linear, max_position_embeddings=4096, max_sequence_length=16384)).notes
    assert note.startswith("max_sequence_length=16,384 is read by no class")
    assert "max_position_embeddings=4,096; write 16384 there" in note
    assert not read_config(config_of(rope_scaling=linear, max_position_embeddings=4096, max_sequence_length=4096)).notes


def test_rope_parameters_of_transformers_5_are_written_in_keys_that_4_reads():
    raw = {key: value for key, value in config_of().items() if key != "rope_theta"}
    found = read_config(raw | {"rope_parameters": YARN | {"rope_theta": 5e5}})
    assert found.variant == YarnRope(base=5e5, factor=4.0, original_max_position_embeddings=128)
    assert found.values["rope_theta"] == 5e5
    assert "does not read rope_parameters" in found.notes[0]


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("mistral", {"sliding_window": 128}, [128] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("mistral", {"sliding_window": 512}, [None] * 4),
        ("mistral", {}, [None] * 4),  # the default of 4,096 covers 512
        ("mistral", {"max_position_embeddings": 8192}, [4096] * 4),
        ("qwen2", {"sliding_window": 128}, [None] * 4),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 4}, [None] * 4),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 128]),
        ("qwen3", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0}, [128] * 4),
        ("llama", {"sliding_window": 128}, [None] * 4),  # transformers' llama reads none
    ],
)
def test_windows_are_those_of_transformers(model_type, changes, windows):
    assert list(read_config(config_of(model_type, **changes)).windows) == windows


def test_tokens_that_only_the_class_names_and_the_vocabulary_has_not_are_none():
    found = read_config({key: value for key, value in config_of("phi3").items() if not key.endswith("token_id")})
    assert (found.values["bos_token_id"], found.values["eos_token_id"], found.values["pad_token_id"]) == (1, None, None)


@pytest.mark.parametrize(
    ("family", "windows", "said"),
    [
        ("qwen2", (64, 128), r"window_size=\[64, 128\]: transformers has one window for all layers with one"),
        ("llama", (64, None), "window_size=64: transformers' llama has no window; its mistral has"),
        ("mistral", (64, None), "window_attn_skip_freq=.*transformers' mistral has one window in every layer"),
    ],
)
def test_windows_that_no_config_json_can_say_are_refused(family, windows, said):
    with pytest.raises(ConfigError, match=said):
        attention_values(family, windows, (False, False))
    assert attention_values(family, (None, None), (False, False))["sliding_window"] is None
    if family != "llama":
        assert attention_values(family, (64, 64), (False, False))["sliding_window"] == 64


def test_smollm3s_layers_without_rope():
    assert read_config(config_of("smollm3", pad_token_id=None)).no_rope == (False, False, False, True)
    said = read_config(config_of("smollm3", pad_token_id=None, no_rope_layers=[0, 1, 1, 0]))
    assert said.no_rope == (True, False, False, True)
    assert said.values["no_rope_layers"] == [0, 1, 1, 0]
    with pytest.raises(ConfigError, match="has RoPE in every layer"):
        attention_values("qwen2", (None, None), (True, False))


def test_defaults_are_those_of_transformers():
    from transformers import AutoConfig

    from nemo_longctx.hf.families import DEFAULTS

    for family, defaults in DEFAULTS.items():
        theirs = AutoConfig.for_model(family, **({"use_sliding_window": True} if family.startswith("qwen") else {}))
        for key, value in defaults.items():
            if key in ("head_dim", "num_key_value_heads", "use_sliding_window") and value in (None, False):
                continue  # resolved by the class
            assert getattr(theirs, key, None) == value, (family, key)
        assert theirs.rope_theta == read_config({"model_type": family, **{
            key: getattr(theirs, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                                  "num_attention_heads")}}).variant.base  # fmt: skip


def test_sampling_without_do_sample_is_made_sampling():
    """Llama 2 chat's and Vicuna's file: transformers refuses to save it, and servers use its numbers."""
    from transformers import GenerationConfig

    kept, notes = read_generation_config({"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "pad_token_id": -1}, 100)
    assert kept == {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "do_sample": True}
    assert "without do_sample" in notes[1]
    GenerationConfig(**kept).validate(strict=True)
    with pytest.raises(ConfigError, match="temperature='hot'"):
        read_generation_config({"temperature": "hot"}, 100)


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ({"temperature": 0.0, "top_p": 0.9}, {"do_sample": False}),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}),
        ({"temperature": 0.7, "top_k": 20, "do_sample": False}, {"do_sample": False}),
        ({"top_p": 1.5}, "top_p=1.5: must be a share"),
        ({"do_sample": True, "min_p": 2}, "min_p=2: must be a share"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: must be above 0"),
    ],
)
def test_what_transformers_would_refuse_when_it_generates_is_mended_or_refused(raw, kept):
    from transformers import GenerationConfig

    if isinstance(kept, str):
        with pytest.raises(ConfigError, match=kept):
            read_generation_config(raw, 100)
        return
    found, notes = read_generation_config(raw, 100)
    assert found == kept
    assert "have no effect" in notes[0]
    GenerationConfig(**found).validate(strict=True)


def test_tokens_of_the_config_are_kept_where_nothing_else_says_them(directory):
    assert check_directory(directory(eos_token_id=[2, 5])).generation == {"bos_token_id": 1, "eos_token_id": [2, 5]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": word_tokenizer(**{"[PAD]": 100})}, r"tokenizer='\[PAD\]': is number 100 beyond .*100 rows"),
        ({"tokenizer.json": word_tokenizer(512)}, "tokenizer='w100': is number 100, one of 412 tokens"),
        ({"tokenizer.json": word_tokenizer(), "added_tokens.json": {"<x>": 100}}, "tokenizer='<x>'"),
        (
            {"tokenizer.json": word_tokenizer(), "tokenizer_config.json": {"pad_token": "<pad>"}},
            "tokenizer='<pad>': is number 100",
        ),
        (
            {
                "tokenizer.json": word_tokenizer(),
                "special_tokens_map.json": {"eos_token": {"content": "</s>"}, "bos_token": "w1"},
            },
            "tokenizer='</s>': is number 100",
        ),
        (
            {"tokenizer.json": word_tokenizer(), "tokenizer_config.json": {"additional_special_tokens": ["w3", "<a>", "<b>"]}},
            "tokenizer='<a>': is number 100, one of 2 tokens",
        ),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, "neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.model": "no model"}, "is no SentencePiece model"),
        ({"tokenizer.json": "{"}, "is not JSON"),
        ({"generation_config.json": {"pad_token_id": 100}}, "pad_token_id=100: outside .*generation_config.json"),
        ({"quantize_config.json": {"bits": 4}}, "quantised .quantize_config.json"),
        (
            {"tokenizer.json": word_tokenizer(90, **{"<p>": 90}), "added_tokens.json": {"<p>": 91}},
            "added_tokens.json'?: gives token '<p>' the number 91, where transformers loads it as 90",
        ),
        (
            {
                "tokenizer.json": word_tokenizer(90),
                "tokenizer_config.json": {"added_tokens_decoder": {"95": {"content": "<p>"}}},
            },
            "tokenizer_config.json'?: gives token '<p>' the number 95, where transformers loads it as 90",
        ),
        (
            {"tokenizer.json": word_tokenizer(), "special_tokens_map.json": {"eos_token": ["w2"]}},
            r"eos_token=\['w2'\]: must be a token, in special_tokens_map.json",
        ),
        (
            {"tokenizer.json": word_tokenizer(), "special_tokens_map.json": {"additional_special_tokens": {"a": "w2"}}},
            "additional_special_tokens=.*must be a list of tokens, in special_tokens_map.json",
        ),
        (
            {"tokenizer.json": word_tokenizer(), "tokenizer_config.json": {"chat_template": ["{{ messages }}"]}},
            "chat_template=.*must be a template, or a list of mappings of name and template",
        ),
        ({"tokenizer.json": word_tokenizer(), "chat_template.jinja": "\ufeff{{ messages }}"}, "begins with a byte order mark"),
        ({"vocab.txt": "\ufeffw0"}, "begins with a byte order mark"),
    ],
)
def test_files_that_do_not_fit_the_model_are_refused(directory, files, message):
    refused(directory(files=files), message)


@pytest.mark.parametrize(
    ("tensors", "dtypes", "changes", "message"),
    [
        (
            {"lm_head.weight": np.ones((100, 64), np.float32)},
            None,
            {"tie_word_embeddings": True},
            "tie_word_embeddings=True: lm_",
        ),
        ({"a.qweight": np.ones((4, 4), np.int32)}, None, {}, r"1 weights are quantised \(a.qweight, I32\)"),
        ({"a.weight": np.ones((4, 4), np.uint8)}, {"a.weight": "F8_E4M3"}, {}, "a.weight, F8_E4M3"),
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": Rope(base=5e5).inv_freq(16)}, None, {}, "unlike config.json's RoPE"),
    ],
)
def test_tensors_that_would_be_dropped_are_looked_at(directory, tensors, dtypes, changes, message):
    refused(directory(tensors=tensors, dtypes=dtypes, **changes), message)


def test_a_tensor_without_elements_is_no_damage(directory):
    check_directory(directory(tensors={"model.none": np.zeros((0, 4), np.float32)}))


def test_what_lies_beside_a_tokenizer_is_told_from_its_files(tmp_path):
    assert other_things(tmp_path / "a name of the hub") == []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).touch()
    assert other_things(tmp_path) == []
    (tmp_path / "original").mkdir()
    (tmp_path / "model.safetensors").touch()
    assert other_things(tmp_path) == ["model.safetensors", "original"]


def test_a_head_that_is_not_there_is_named_with_the_mend(directory):
    folder = directory()
    table = {"model.embed_tokens.weight": np.zeros((100, 64), np.float32)}
    write_safetensors(folder / "model.safetensors", table)
    refused(folder, "tie_word_embeddings=False: the files have no lm_head.weight; write true where the head is the embedding")
    check_directory(directory(tie_word_embeddings=True))
    refused(directory(vocab_size=90), "vocab_size=90: the embedding in the files has 100 rows")


def test_stored_frequencies_that_agree_are_dropped(directory):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    check_directory(directory(tensors={name: Rope().inv_freq(16)}, tie_word_embeddings=True))
    check_directory(directory(tensors={name: Rope().inv_freq(16).astype(np.float16)}))
    check_directory(directory(tensors={name: Rope().inv_freq(16)}, rope_scaling={"type": "linear", "factor": 4.0}))


def test_an_index_is_followed_and_holes_in_it_are_named(directory):
    folder = directory()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    made = write_copy(check_directory(folder), folder.parent / "copy")
    # transformers ends in a KeyError over an index without metadata
    assert json.loads((made / "model.safetensors.index.json").read_text()) == {**index, "metadata": {}}
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "holds model.norm.weight, which it does not")
    index["weight_map"]["model.norm.weight"] = "../model-00002-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "which is not there")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "its metadata says format None, and transformers takes 'pt' alone"),
        ({"format": "tf"}, "its metadata says format 'tf'"),
        ({"format": "pt", "step": 1}, "its metadata says format 'pt'|cannot load"),
        (["pt"], "its metadata says format"),
        ({"format": "pt"}, None),
        ({"format": "mlx"}, None),
        (None, None),
    ],
)
def test_the_header_of_safetensors_says_what_transformers_takes(directory, metadata, message):
    folder = directory()
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(raw[8 : 8 + length])}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    if message is None:
        check_directory(folder)
    else:
        refused(folder, message)


def test_bytes_that_belong_to_no_tensor_are_damage(directory):
    folder = directory()
    with open(folder / "model.safetensors", "ab") as file:
        file.write(bytes(8))
    refused(folder, "its tensors have 51200 bytes of the 51208 behind the header")


def test_tokens_behind_a_tokenizer_json_are_numbered_as_transformers_does(directory):
    from transformers import AutoTokenizer

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {"95": {"content": "<p>", "special": True}},
    }
    folder = directory(files={"tokenizer.json": word_tokenizer(90), "tokenizer_config.json": settings})
    refused(folder, "the number 95, where transformers loads it as 90")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": {
        "95": {"content": "<p>", "special": True, "__type": "AddedToken"}}}))  # fmt: skip
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<p>") == 90


def test_settings_that_a_family_does_not_read_are_said():
    unsaid = {key: value for key, value in config_of().items() if key != "max_position_embeddings"}
    assert "max_position_embeddings is not said: 2,048 tokens" in read_config(unsaid).notes[0]
    said = read_config(config_of("mistral", sliding_window=64, use_sliding_window=False)).notes
    assert said == ("use_sliding_window=false: transformers' mistral does not read it and keeps its window; write null there",)
    assert "sliding_window: transformers' llama does not read it" in read_config(config_of(sliding_window=64)).notes[0]
    with pytest.raises(ConfigError, match=r"sliding_window=64: layer_types names .* set it and use_sliding_window=true"):
        read_config(config_of("qwen2", sliding_window=64, use_sliding_window=False, layer_types=["sliding_attention"] * 4))


def shards(folder, *contents, index=None):
    """Weights in files of a few tensors each, as a large model's are; `index` overrides what the index says."""
    (folder / "model.safetensors").unlink()
    said = {}
    for number, tensors in enumerate(contents, 1):
        name = f"model-{number:05}-of-{len(contents):05}.safetensors"
        write_safetensors(folder / name, tensors)
        said |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": said if index is None else index}))
    return folder


def test_what_two_shards_say_of_one_tensor_must_agree(directory):
    one, two = np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)
    refused(
        shards(directory(), {"a": one, "b": one}, {"a": two}), "holds a, and model-00001-of-00002.safetensors holds another"
    )
    check_directory(shards(directory(), {"a": one, "b": one}, {"a": one}))


def test_tensors_that_the_index_does_not_name_are_said(directory):
    folder = shards(directory(), {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, index={
        "a": "model-00001-of-00001.safetensors"})  # fmt: skip
    assert "holds 1 tensors that model.safetensors.index.json does not name (b); left out" in check_directory(folder).notes[0]


def test_two_sets_of_weights_are_refused(directory):
    folder = shards(directory(), {"a": np.ones(2, np.float32)})
    write_safetensors(folder / "model.safetensors", {"a": np.zeros(2, np.float32)})
    refused(folder, "holds both model.safetensors, which transformers takes, and model.safetensors.index.json")
    index = {"weight_map": {"a": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_directory(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", "", "model.safetensors'?: is empty"),
        ("config.json", "", "config.json'?: is empty"),
        ("tokenizer.json", "", "tokenizer.json'?: is empty"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
        (
            "config.json",
            "\ufeff{}",
            "begins with a byte order mark, which transformers cannot read; save it as UTF-8 without one",
        ),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
        ("model.safetensors", None, "is a link to .*blobs/0123, which is not there"),
        ("config.json", None, "is a link to .*blobs/0123, which is not there"),
    ],
)
def test_files_that_stand_for_something_else_are_named(directory, name, content, message):
    folder = directory()
    (folder / name).unlink(missing_ok=True)
    if content is None:
        (folder / name).symlink_to("../../blobs/0123")
    else:
        (folder / name).write_text(content, encoding="utf-8")
    refused(folder, message)


def test_an_adapter_beside_whole_weights_is_said(directory):
    folder = directory()
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json) is left out" in check_directory(folder).notes[-1]


def test_links_into_a_cache_are_followed(directory, tmp_path):
    folder = directory()
    (tmp_path / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / "blobs" / name)
        (folder / name).symlink_to(f"../blobs/{name}")
    made = write_copy(check_directory(folder), tmp_path / "a copy")
    assert (made / "model.safetensors").resolve() == tmp_path / "blobs" / "model.safetensors"


@pytest.mark.parametrize(
    ("said", "stored", "kept"),
    [
        ("bfloat16", ("F32", "BF16"), "float32"),
        ("float16", ("BF16", "BF16"), "bfloat16"),
        ("bfloat16", ("F16", "BF16"), "float32"),
        (None, ("F64", "F64"), "float32"),
        ("float32", ("BF16", "BF16"), "float32"),
        ("bfloat16", ("BF16", "BF16"), "bfloat16"),
        (None, ("F16", "F16"), "float16"),
    ],
)
def test_weights_are_kept_in_a_type_that_rounds_none(directory, said, stored, kept):
    types = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    arrays = {f"{i}": np.ones(4, types[kind]).astype(types[kind]) for i, kind in enumerate(stored)}
    folder = directory(torch_dtype=said)
    write_safetensors(folder / "model.safetensors", arrays, {f"{i}": kind for i, kind in enumerate(stored)})
    found = check_directory(folder)
    assert found.config.values["dtype"] == kept
    assert bool(found.notes) == (said not in (None, "float32", kept))


def pickled(folder, tensors, name="pytorch_model.bin"):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / name)
    return folder


def test_pickled_weights_are_looked_at_like_others(directory):
    import torch

    table = torch.ones(100, 64)
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tied = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    check_directory(pickled(directory(tie_word_embeddings=True), tied))
    refused(pickled(directory(tie_word_embeddings=True), tied | {"lm_head.weight": table * 2}), "tie_word_embeddings=True: lm_")
    refused(pickled(directory(), {inv_freq: torch.from_numpy(Rope(base=5e5).inv_freq(16))}), "unlike config.json's RoPE")
    refused(pickled(directory(), {"a.qweight": torch.ones(4, dtype=torch.int32)}), "1 weights are quantised")
    refused(pickled(directory(), [table]), "is no state_dict")
    refused(pickled(directory(), {"a": Fraction(1, 2)}), "holds other things than tensors")
    folder = pickled(directory(), tied)
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:1000])
    refused(folder, "transformers cannot load its weights")


def test_a_target_that_cannot_be_written_is_refused_before_any_work(directory, tmp_path):
    source = directory()
    (tmp_path / "file").write_text("")
    for target, message in [
        (source / "ckpt", "lies inside"), (source, "exists already"), (tmp_path / "file" / "x", "is no directory"),
        (tmp_path / "link", "exists already"),
    ]:  # fmt: skip
        if target.name == "link":
            target.symlink_to("nowhere")
        with pytest.raises(ConfigError, match=message):
            check_target(target, source)
    check_target(tmp_path / "new folder" / "ckpt", source)


def test_a_tokenizer_that_transformers_does_not_load_is_said(directory):
    assert "tekken.json is a tokenizer that transformers does not load" in check_directory(directory(files={
        "tekken.json": "{}"})).notes[0]  # fmt: skip


@pytest.mark.parametrize("name", ["adapter_config.json", "params.json", "tf_model.h5", "x.gguf"])
def test_a_directory_of_another_format_is_named(directory, name):
    folder = directory(files={name: "{}"})
    (folder / "model.safetensors").unlink()
    refused(folder, "holds ")


def test_a_directory_without_weights_is_named_by_its_key(directory):
    folder = directory()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no weights: neither model\.safetensors nor model\.safetensors\.index") as error:
        check_directory(folder)
    assert (error.value.key, error.value.value) == ("HF_DIR", str(folder))


def test_a_directory_of_transformers_5_is_loaded_by_4(directory, tmp_path):
    """Class, list of special tokens and chat template as 5.24 writes them."""
    from transformers import AutoConfig, AutoTokenizer

    settings = {
        "backend": "tokenizers", "bos_token": "w1", "eos_token": "w2", "extra_special_tokens": ["w1", "w5", "w6"],
        "is_local": True, "local_files_only": False, "model_max_length": 1e30, "tokenizer_class": "TokenizersBackend",
    }  # fmt: skip
    folder = directory(
        dtype="float32",
        pad_token_id=None,
        files={"tokenizer_config.json": settings, "tokenizer.json": word_tokenizer(), "chat_template.jinja": "{{ messages }}"},
    )
    copy = write_copy(check_directory(folder), tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert (tokenizer.eos_token, tokenizer.additional_special_tokens) == ("w2", ["w5", "w6"])
    assert tokenizer.chat_template == "{{ messages }}"
    assert str(AutoConfig.from_pretrained(copy).dtype) == "torch.float32"


def test_a_sentencepiece_model_alone_is_a_tokenizer(directory, tmp_path):
    """Its conversion reads a protobuf message: the locked releases must go together."""
    import io

    import sentencepiece
    from transformers import AutoTokenizer

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"a quick brown fox {i}" for i in range(50)]), model_writer=made, vocab_size=40,
        model_type="bpe", minloglevel=9, hard_vocab_limit=False,
    )  # fmt: skip
    folder = directory(files={"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}})
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    copy = write_copy(check_directory(folder), tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer("quick fox")["input_ids"], skip_special_tokens=True) == "quick fox"
    (folder / "config.json").write_text(json.dumps(config_of(vocab_size=8)))
    write_safetensors(folder / "model.safetensors", {"x": np.ones(1, np.float32)})
    refused(folder, "beyond the embedding's 8 rows")


def test_plan_reads_qwen3s_config(directory):
    shape = model_from_hf(directory("qwen3", use_sliding_window=False) / "config.json")
    assert (shape.head_dim, shape.sliding_window, shape.query_groups) == (16, None, 2)


@pytest.mark.parametrize("changes", [{"model_type": "gpt2"}, {"rope_scaling": {"factor": 2.0}}])
def test_the_command_refuses_before_the_host_is_imported(directory, changes):
    code = (
        "import sys; from nemo_longctx.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "assert not {'nemo', 'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "import", str(directory(**changes)), "unused"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
