"""Corpora of two tokenizers, and ids that the model has no row for, are told before the first step and at the window."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_longctx.config import ConfigError
from nemo_longctx.data import vocabulary
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.evaluation import EvaluationConfig, EvaluationWindows
from nemo_longctx.data.tokenization import load_tokenizer, train_bpe
from nemo_longctx.data.vocabulary import RUN, check_corpora, check_ids, check_sample, not_the_base_s
from nemo_longctx.data.writer import CorpusWriter
from nemo_longctx.hf.tokenizer import open_tokenizer

BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def corpus(prefix, documents, dtype=np.uint16, tokenizer=None):
    with CorpusWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    if tokenizer:
        Path(f"{prefix}.json").write_text(json.dumps({"tokenizer": {"sha256": tokenizer, "vocab_size": 300, "name": "t"}}))
    return str(prefix)


@pytest.mark.parametrize("second", ["data.mix.sources[1].path", "data.validation[0].path"])
def test_corpora_of_two_tokenizers_of_one_size_are_refused(tmp_path, second):
    one = corpus(tmp_path / "one", [[1, 2, 3]], tokenizer="aa")
    other = corpus(tmp_path / "other", [[1, 2, 3]], tokenizer="bb")
    silent = corpus(tmp_path / "silent", [[1, 2, 3]])
    check_corpora({"data.mix.sources[0].path": one, second: one, "data.mix.sources[2].path": silent}, vocab_size=300)
    with pytest.raises(ConfigError, match="other tokenizer than") as error:
        check_corpora({"data.mix.sources[0].path": one, second: other}, vocab_size=300)
    assert (error.value.key, error.value.value) == (second, other)
    with pytest.raises(ConfigError, match="other tokenizer than"):  # two shards of one source
        check_corpora({"data.mix.sources[0].path": [one, other]}, vocab_size=300)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=299.*300 tokens"):
        check_corpora({"data.mix.sources[0].path": one}, vocab_size=299)


def test_a_corpus_of_another_tokenizer_than_data_tokenizer_is_refused(tmp_path):
    for name, text in (("mine", "abc abd abe"), ("other", "xyz xyw xyv")):
        train_bpe([text] * 50, 262, str(tmp_path / name), {})
    mine, other = (load_tokenizer(str(tmp_path / name)) for name in ("mine", "other"))
    assert mine.sha256 != other.sha256
    path = corpus(tmp_path / "corpus", [[1, 2, 3]], tokenizer=mine.sha256)
    check_corpora({"data.mix.sources[0].path": path}, tokenizer=str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match=r"data\.mix\.sources\[0\]\.path=.*than data\.tokenizer="):
        check_corpora({"data.mix.sources[0].path": path}, tokenizer=str(tmp_path / "other"))


def test_ids_that_are_other_tokens_to_the_model_are_refused_where_their_tokenizer_is_at_hand(tmp_path):
    for name, text in (("mine", "abc abd abe"), ("other", "xyz xyw xyv")):
        train_bpe([text] * 50, 262, str(tmp_path / name), {})
    kept = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = kept["model"]["vocab"]
    alphabet = sorted(vocabulary, key=vocabulary.get)[2:258]
    kept["model"]["vocab"] |= {token: 2 + (number + 1) % 256 for number, token in enumerate(alphabet)}  # other bytes
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(kept))
    mine, other = (open_tokenizer(tmp_path / name) for name in ("mine", "other"))
    path = corpus(tmp_path / "corpus", [[1, 2, 3]])
    made = {"name": str(tmp_path / "mine"), "sha256": load_tokenizer(str(tmp_path / "mine")).sha256, "vocab_size": 262}
    Path(f"{path}.json").write_text(json.dumps({"tokenizer": made}))
    check_ids(open_corpus(path), mine)
    mine.add_tokens(["<more>", "<and more>"])
    check_ids(open_corpus(path), mine)
    with pytest.raises(ConfigError, match=r"another tokenizer \(.*mine\): 2\d\d of 262 ids are other tokens.*own tokenizer"):
        check_ids(open_corpus(path), other)
    for changed in ({"sha256": "another"}, {"name": str(tmp_path / "gone")}, {"name": None, "sha256": None}):
        Path(f"{path}.json").write_text(json.dumps({"tokenizer": made | changed}))
        check_ids(open_corpus(path), other)  # what is there now does not show by what it was made
    renamed = {f"<{number}>" if number < 26 else token: number for token, number in mine.get_vocab().items()}
    Path(f"{path}.json").write_text(json.dumps({"tokenizer": made}))
    check_ids(open_corpus(path), SimpleNamespace(get_vocab=lambda: renamed))  # a tenth: reserved tokens, given names
    renamed = {f"<{number}>" if number < 27 else token: number for token, number in mine.get_vocab().items()}
    with pytest.raises(ConfigError, match=r"27 of 262 ids are other tokens to the model's, 0 is '<\|endoftext\|>' there"):
        check_ids(open_corpus(path), SimpleNamespace(get_vocab=lambda: renamed))


@pytest.mark.parametrize(
    ("changed", "named", "told"),
    [
        ({}, "corpus", False),
        ({"post_processor": BYTES}, "corpus", False),
        ({"normalizer": {"type": "Lowercase"}}, "corpus", True),
        ({"normalizer": {"type": "Lowercase"}}, "setting", True),
        ({}, "setting", False),
        (None, "corpus", True),  # the tokenizer is not there any more
        (None, "nothing", False),
    ],
    ids=str,
)
def test_tokens_of_another_tokenizer_than_the_base_carries_are_told(tmp_path, changed, named, told):
    """Corpora were compared with each other and with `data.tokenizer`, not with the model that they are to train."""
    mine, base = tmp_path / "mine", tmp_path / "base"
    train_bpe(["abc abd abe"] * 50, 262, str(mine), {})
    shutil.copytree(mine, base / "context" / "tokenizer")
    values = json.loads((mine / "tokenizer.json").read_text())
    changes = {"normalizer": {"type": "Lowercase"}} if changed is None else changed
    (mine / "tokenizer.json").write_text(json.dumps(values | changes))
    made = load_tokenizer(str(mine))
    path = corpus(tmp_path / "corpus", [[1, 2, 3]])
    if named == "corpus":
        Path(f"{path}.json").write_text(json.dumps({"tokenizer": {"sha256": made.sha256, "name": str(mine)}}))
    if changed is None:
        shutil.rmtree(mine)
    said = not_the_base_s(base, [path], str(mine) if named == "setting" else None)
    assert (said is not None) is told
    if told:
        what = "data.tokenizer" if named == "setting" else f"the corpus {path}"
        assert said.startswith(f"{what} is of the tokenizer {mine}, and {base} carries another: an id may mean")
    shutil.copytree(base / "context" / "tokenizer", base / "context" / "second")
    assert not_the_base_s(base, [path], str(mine)) is None  # nobody knows which


@pytest.mark.parametrize(("dtype", "bad"), [(np.uint16, 128), (np.int32, -1), (np.int32, 70_000), (np.int64, 2**40)])
def test_an_id_beyond_the_vocabulary_is_named_before_and_at_the_window(tmp_path, dtype, bad):
    documents = [np.arange(100) % 128 for _ in range(5)]
    documents[3] = np.array([5, bad, 7] * 10)
    prefix = corpus(tmp_path / "text", documents, dtype)
    with pytest.raises(ConfigError, match=rf"the token id {bad}, the model's vocabulary has 128.*no JSON beside it"):
        check_sample(open_corpus(prefix), 128)
    windows = EvaluationWindows(EvaluationConfig(name="a", path=prefix, seq_length=16), document_masking=False)
    windows.documents.vocab_size = 128
    assert windows[0]["tokens"].max() < 128
    with pytest.raises(ConfigError, match=f"document 3 holds the token id {bad}"):
        [windows[number] for number in range(len(windows))]


def test_a_sample_is_spread_over_a_large_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_longctx.data.vocabulary.SAMPLED", 4 * RUN)
    tokens = np.zeros(40 * RUN, np.int32)
    for bad, seen in ((0, True), (40 * RUN - 1, True), (20 * RUN, False)):
        tokens[:] = 0
        tokens[bad] = 500
        prefix = corpus(tmp_path / str(bad), [tokens], np.int32)
        if seen:
            with pytest.raises(ConfigError, match="500"):
                check_sample(open_corpus(prefix), 128)
        else:
            check_sample(open_corpus(prefix), 128)
    check_sample(open_corpus(prefix), 501)


class Bad(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, number):
        raise ConfigError("corpus", "there", "document 3 holds: too much; mend it")


def test_an_error_of_a_worker_stays_one_sentence():
    with pytest.raises(ConfigError) as error:
        next(iter(torch.utils.data.DataLoader(Bad(), num_workers=1)))
    assert str(error.value) == "corpus='there': document 3 holds: too much; mend it"


def test_a_held_out_set_that_is_missing_is_named_by_its_setting_with_a_mend(tmp_path):
    corpus(tmp_path / "text", [[1, 2, 3]])
    paths = {"data.mix.sources[0].path": str(tmp_path / "text"), "data.validation[0].path": str(tmp_path / "holdout")}
    with pytest.raises(ConfigError) as error:
        check_corpora(paths)
    assert error.value.key == "data.validation[0].path"
    assert "`prepare --holdout 0.02` writes PREFIX_holdout" in str(error.value)
    assert "data.validation=[] does without" in str(error.value)
    check_corpora({key: path for key, path in paths.items() if "mix" in key})


@pytest.mark.parametrize(("n", "tokens"), [(5, 100), (100, 100), (100, 99), (1000, 40), (1000, 9), (1000, 25), (11, 10)])
def test_looks_are_spread_evenly_or_take_all(monkeypatch, n, tokens):
    monkeypatch.setattr(vocabulary, "RUN", 10)
    looks = -(-n // 10) if tokens >= n else max(1, tokens // 10)
    starts = [number * max(0, n - 10) // max(1, looks - 1) for number in range(looks)]
    found = list(vocabulary._looks(SimpleNamespace(n_tokens=n), tokens))
    assert found == [(start, min(start + 10, n)) for start in starts]
    if tokens >= n:
        assert set().union(*(range(*look) for look in found)) == set(range(n))


@pytest.mark.parametrize(("dtype", "size", "read"), [
    (np.uint8, 256, False), (np.uint8, 255, True), (np.uint16, 65536, False), (np.uint16, 65535, True), (np.int16, 40000, True),
])  # fmt: skip
def test_a_type_that_holds_no_other_id_is_not_looked_at(tmp_path, monkeypatch, dtype, size, read):
    there, looks = open_corpus(corpus(tmp_path / "c", [[1, 2]], dtype)), []
    monkeypatch.setattr(vocabulary, "_looks", lambda shard, tokens: looks.append(tokens) or [])
    check_sample(there, size)
    assert looks == ([vocabulary.SAMPLED] if read else [])


def test_the_first_and_last_id_of_a_vocabulary_are_in_it(tmp_path):
    there = open_corpus(corpus(tmp_path / "c", [[0, 7]], np.int32))
    check_sample(there, 8)
    with pytest.raises(ConfigError, match=r"it holds the token id 7, the model's vocabulary has 7 \(model\.vocab_size\)"):
        check_sample(there, 7)
    with pytest.raises(ConfigError, match="it holds the token id -3"):
        check_sample(open_corpus(corpus(tmp_path / "d", [[4, -3]], np.int32)), 8)


def test_the_document_of_a_bad_token_is_found_by_its_edges(tmp_path):
    paths = [corpus(tmp_path / name, [[1]] * 3, tokenizer="x" if name == "b" else None) for name in "ab"]
    shards = [open_corpus(path) for path in paths]
    for tokens, document, prefix in (([9, 1, 1, 1], 2, paths[0]), ([0, 7, 8, 9], 1, paths[1]), ([5, 5, 5, -1], 1, paths[1])):
        error = vocabulary.bad_token(shards, np.array([0, 3, 6]), np.array([2, 4]), [2, 4], np.array(tokens), 8)
        bad = next(token for token in tokens if not 0 <= token < 8)
        assert str(error).startswith(f"corpus='{prefix}': document {document} holds the token id {bad}, ")
        assert ("no JSON beside it" in str(error)) == (prefix == paths[0])
