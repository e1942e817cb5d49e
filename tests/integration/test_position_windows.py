"""Which tokens the loss by position is taken of: no part of a document stands at some positions more than at others."""

import numpy as np

from nemo_longctx.adapters.megatron import position
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.writer import CorpusWriter

WINDOW = 32


def corpus_of(path, lengths):
    """Documents whose tokens count 0, 1, 2, ... from their beginning."""
    with CorpusWriter(str(path), np.uint16) as writer:
        for length in lengths:
            writer.add_document(list(range(length)))
    return open_corpus(str(path))


def windows_of(corpus):
    found = position._windows(corpus, WINDOW, max_windows=10**6)
    return {document: [tokens.numpy() for tokens in position._tokens(corpus, document, found, WINDOW)] for document, _ in found}


def test_windows_of_a_document_are_whole_and_share_no_label(tmp_path):
    lengths = [20, 33, 100, 1000]
    windows = windows_of(corpus_of(tmp_path / "c", lengths))
    assert {document: len(found) for document, found in windows.items()} == {1: 1, 2: 3, 3: 4}
    for document, found in windows.items():
        for tokens in found:
            assert tokens.shape == (WINDOW + 1,)
            assert set(np.diff(tokens).tolist()) <= {1, 1 - lengths[document]}  # in order, on at 0 after the end
        labels = np.concatenate([tokens[1:] for tokens in found])
        assert len(set(labels.tolist())) == len(labels)


def test_early_and_late_positions_hold_the_same_text(tmp_path):
    """The beginnings of 2,000 short documents, at each quarter of the window as often as chance has it."""
    length, documents, head = 48, 2000, 12
    windows = windows_of(corpus_of(tmp_path / "c", [length] * documents))
    labels = np.stack([found[0][1:] for found in windows.values()])
    share = (labels < head).mean(axis=0).reshape(4, -1).mean(axis=1)
    error = np.sqrt(head / length * (1 - head / length) / documents)  # of one position; those of a quarter are not independent
    assert (np.abs(share - head / length) < 5 * error).all()
