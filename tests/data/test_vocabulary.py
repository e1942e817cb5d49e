"""Corpora of two tokenizers, and ids that the model has no row for, are told before the first step and at the window."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.evaluation import EvaluationConfig, EvaluationWindows
from nemo_longctx.data.tokenization import load_tokenizer, train_bpe
from nemo_longctx.data.vocabulary import RUN, check_corpora, check_sample
from nemo_longctx.data.writer import CorpusWriter


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
