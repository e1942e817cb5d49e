"""Held-out windows: the text in its own order, each token once."""

import numpy as np
import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import HEADER
from nemo_longctx.data.evaluation import EvaluationConfig, EvaluationWindows


@pytest.mark.parametrize("shards", [[[5, 9, 3, 30, 1]], [[5, 9], [3, 30, 1]]])
@pytest.mark.parametrize("masking", [False, True])
def test_windows_go_through_the_text_once(telling_corpora, shards, masking):
    config = EvaluationConfig(name="held_out", path=tuple(telling_corpora(shards)), seq_length=7)
    windows = EvaluationWindows(config, document_masking=masking)
    text = np.concatenate([1000 * n + np.arange(length) for n, length in enumerate([5, 9, 3, 30, 1])])
    assert len(windows) == (48 - 1) // 7
    for number in range(len(windows)):
        sample = windows[number]
        assert sample["tokens"].tolist() == text[7 * number : 7 * number + 7].tolist()
        assert sample["labels"].tolist() == text[7 * number + 1 : 7 * number + 8].tolist()
        if masking:
            assert sample["loss_mask"].tolist() == (sample["labels"] == sample["tokens"] + 1).tolist()
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_the_first_samples_alone(telling_corpora):
    (path,) = telling_corpora([[50]])
    assert len(EvaluationWindows(EvaluationConfig(name="a", path=path, seq_length=7, samples=3), document_masking=False)) == 3


def test_what_cannot_be_evaluated_is_said(telling_corpora):
    (path,) = telling_corpora([[7]])
    with pytest.raises(ConfigError, match="a window and its last label need 8"):
        EvaluationWindows(EvaluationConfig(name="a", path=path, seq_length=7), document_masking=False)
    with pytest.raises(ConfigError, match="part of a metric's name"):
        EvaluationConfig(name="a/b", path=path, seq_length=7)
    with pytest.raises(ConfigError, match=r"data\.validation\.samples=0"):
        EvaluationConfig(name="a", path=path, seq_length=7, samples=0)


def test_an_index_that_lies_is_refused(telling_corpora):
    (path,) = telling_corpora([[40, 50, 60]])
    with open(f"{path}.idx", "r+b") as file:  # document 1 takes 3 tokens of document 0
        file.seek(HEADER.size)
        file.write(np.array([37, 53, 60], np.int32).tobytes())
    with pytest.raises(ConfigError, match="the pointer of sequence 1 is not the sum"):
        EvaluationWindows(EvaluationConfig(name="a", path=path, seq_length=7), document_masking=False)
