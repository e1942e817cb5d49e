"""Tokenizers of `prepare`: what a saved one carries must not cut or change text; a trained one is the same each time."""

import json
import random
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer

from nemo_longctx.config import ConfigError
from nemo_longctx.data.prepare import PrepareConfig, _sources
from nemo_longctx.data.prepare_tokenizer import sample_texts
from nemo_longctx.data.shards import is_held_out
from nemo_longctx.data.tokenization import encoder, load_tokenizer, train_bpe

SUBJECTS = [f"{adjective} {noun}" for adjective in ("long", "short", "old") for noun in ("dog", "context")]
TEXTS = [f"The {subject} runs over {n} hills.\n" for subject in SUBJECTS for n in range(30)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe") / "tok"
    train_bpe(TEXTS, 300, str(directory), {"made": "here"})
    return directory


def test_the_same_texts_give_the_same_tokenizer(directory, tmp_path):
    train_bpe(iter(TEXTS), 300, str(tmp_path / "again"), {"made": "here"})
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_any_text_comes_back_from_its_tokens(directory):
    tokenizer = encoder(str(directory / "tokenizer.json"))
    for text in ("plain", "  spaces\n\n\ttabs ", "é ü 汉字 🎉", "\x00\x7f", "<|endoftext|><|pad|>"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_truncation_padding_and_added_begin_tokens_do_not_reach_the_corpus(directory, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain = tokenizer.encode(" ".join(TEXTS)).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    info = load_tokenizer(str(tmp_path), "<|endoftext|>")
    (tmp_path / "as_prepare_saves_it.json").write_text(info.definition)
    [encoding] = encoder(str(tmp_path / "as_prepare_saves_it.json")).encode_batch_fast(
        [" ".join(TEXTS)], add_special_tokens=False
    )
    assert encoding.ids == plain


def test_a_tokenizer_without_tokenizer_json_comes_through_transformers(directory, tmp_path):
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
    info, ours = load_tokenizer(str(tmp_path)), load_tokenizer(str(directory))
    assert (info.eod_id, info.eod_token) == (ours.eod_id, ours.eod_token) == (0, "<|endoftext|>")
    assert info.vocab_size >= ours.vocab_size
    theirs = Tokenizer.from_str(info.definition).encode(TEXTS[5], add_special_tokens=False).ids
    assert theirs == Tokenizer.from_str(ours.definition).encode(TEXTS[5], add_special_tokens=False).ids


def test_a_name_that_is_nowhere_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no tokenizer there"):
        load_tokenizer("nobody/has-this")


def test_a_hub_out_of_reach_is_said_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    asked = []

    def nowhere(*arguments):
        asked.append(arguments)
        raise OSError("no name service")

    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    with pytest.raises(ConfigError, match=r"nobody/has-this.*cannot be reached"):
        load_tokenizer("nobody/has-this")
    assert asked == [(urlsplit(constants.ENDPOINT).hostname, 443)]
    with pytest.raises(ConfigError, match="no such directory, and no name of the Hugging Face hub"):
        load_tokenizer("./nobody/has/this")


def test_a_vocabulary_with_holes_counts_to_its_highest_id(directory, tmp_path):
    values = json.loads((directory / "tokenizer.json").read_text())
    values["model"]["vocab"]["never"] = 70_000  # of 301 tokens, yet ids need more than 16 bits
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert load_tokenizer(str(tmp_path), "<|pad|>").vocab_size == 70_001


def test_training_text_is_spread_over_the_input_without_the_holdout(tmp_path):
    rng = random.Random(0)
    for name in "abcd":
        rows = [{"text": f"{name} " + " ".join(str(rng.random()) for _ in range(20))} for _ in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(
        inputs=(str(tmp_path),),
        output=str(tmp_path / "c"),
        tokenizer="t",
        holdout=0.3,
        train_tokenizer=300,
        train_tokenizer_bytes=40_000,
    )
    shards = _sources(config, [str(tmp_path / f"{name}.jsonl") for name in "abcd"], print)
    texts = list(sample_texts(config, shards, sum(part.n_bytes for shard in shards for part in shard)))
    assert not any(is_held_out(text, config.holdout, config.seed) for text in texts)
    taken = {name: sum(len(text) for text in texts if text.startswith(name)) for name in "abcd"}
    assert 40_000 <= sum(taken.values()) < 41_000
    assert all(9_000 < amount < 11_000 for amount in taken.values())


def sentencepiece_model(directory, model_type, **options):
    """A directory as people have it: SentencePiece's own file, and nothing else."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory.mkdir()
    (directory / "text").write_text("\n".join(TEXTS * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=options.pop("vocab_size", 330),
        model_type=model_type,
        minloglevel=2,
        **options,
    )
    (directory / "text").unlink()
    (directory / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


LLAMA2 = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize("settings", [False, True])
def test_a_sentencepiece_model_gives_its_own_tokens(tmp_path, settings):
    theirs = sentencepiece_model(tmp_path / "tok", "bpe", **LLAMA2)
    if settings:
        config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
        (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
    info = load_tokenizer(str(tmp_path / "tok"))
    assert (info.eod_token, info.eod_id, info.bos_token, info.bos_id) == ("</s>", 2, "<s>", 1)
    ours = Tokenizer.from_str(info.definition)
    for text in ("The old dog runs.", "  two  spaces", "line\nends", "汉字 🎉", "x"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_a_unigram_sentencepiece_model_gives_its_own_tokens(tmp_path):
    theirs = sentencepiece_model(tmp_path / "tok", "unigram", vocab_size=60, hard_vocab_limit=False)
    info = load_tokenizer(str(tmp_path / "tok"))
    assert info.eod_token == "</s>"
    ours = Tokenizer.from_str(info.definition)
    for text in ("The old dog runs.", "The long context runs over 12 hills."):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_a_model_file_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"^tokenizer="):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"), ("tekken.json", b"{}", "tekken.json; name a directory")],
)
def test_forms_of_other_libraries_are_named(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(str(tmp_path))


EOS = {
    "special_tokens_map.json": ({}, {"eos_token": "<|pad|>"}, "<|pad|>"),
    "as a token of its own": ({}, {"eos_token": {"content": "<|pad|>", "lstrip": False}}, "<|pad|>"),
    "the map wins in an old directory": ({"eos_token": "<|endoftext|>"}, {"eos_token": "<|pad|>"}, "<|pad|>"),
    "the map is not read in a new one": (
        {"eos_token": "<|endoftext|>", "added_tokens_decoder": {}},
        {"eos_token": "<|pad|>"},
        "<|endoftext|>",
    ),
    "the class": ({"tokenizer_class": "GPT2TokenizerFast"}, {}, "<|endoftext|>"),
    "none": ({}, {}, None),
}


@pytest.mark.parametrize("name", EOS)
def test_eos_is_found_where_transformers_finds_it(directory, tmp_path, name):
    settings, special, wanted = EOS[name]
    (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if special:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert load_tokenizer(str(tmp_path)).eod_token == wanted
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == wanted
