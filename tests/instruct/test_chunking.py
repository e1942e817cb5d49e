"""Chunks tile the document, fit the short model, and end where sentences end."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stories import jsonl

from nemo_longctx.config import ConfigError
from nemo_longctx.instruct.chunking import (
    chunk_document,
    load_tokenizer,
    read_document_at,
    read_documents,
    sentence_ends,
    token_ends,
)

ALPHABET = st.sampled_from(["a", "b ", ". ", "? ", "\n\n", " ", "é", "漢", "。", "🚢", 'said." ', "Mr. "])


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


@given(parts=st.lists(ALPHABET, max_size=120), size=st.integers(8, 40))
@settings(max_examples=60, deadline=None)
def test_chunks_tile_and_fit(tokenizer, parts, size):
    text = "".join(parts)
    ends = token_ends(tokenizer, text)
    chunks = chunk_document(text, ends, chunk_tokens=size)
    covered = set()
    for chunk in chunks:
        assert 0 < chunk.tokens <= size
        assert chunk.tokens == np.count_nonzero((ends > chunk.start) & (ends <= chunk.end))
        assert not covered & set(range(chunk.start, chunk.end))
        covered |= set(range(chunk.start, chunk.end))
    assert all(text[at].isspace() for at in set(range(len(text))) - covered)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))


def test_chunks_end_with_sentences_and_are_full(tokenizer):
    text = "".join(f"Sentence number {i} is here. " for i in range(100))
    ends = token_ends(tokenizer, text)
    chunks = chunk_document(text, ends, chunk_tokens=64)
    stops = set(sentence_ends(text))
    assert all(chunk.end in stops for chunk in chunks)
    for chunk, after in itertools.pairwise(chunks):
        next_stop = min(stop for stop in stops if stop > after.start)
        assert np.count_nonzero((ends > chunk.start) & (ends <= next_stop)) > 64  # one sentence more would not fit


def test_sentence_longer_than_a_chunk_is_cut_at_white_space(tokenizer):
    text = "word " * 300 + "end."
    chunks = chunk_document(text, token_ends(tokenizer, text), chunk_tokens=32)
    assert len(chunks) > 2
    assert all(text[chunk.end - 1].isspace() for chunk in chunks[:-1])


def test_abbreviation_quotes_and_foreign_stops():
    assert sentence_ends("He said “Go!” Then left.\n\nEnd") == [14, 26, 29]
    assert sentence_ends("始め。終わり。") == [3, 7]
    assert sentence_ends("3.14 is pi") == [10]
    assert sentence_ends("") == [0]


def test_documents_are_found_again_by_offset(tmp_path):
    path = jsonl(tmp_path / "documents.jsonl", ["one", "zwei é", "", "four"])
    documents = list(read_documents(path, text_key="text", id_key="id"))
    assert [document.text for document in documents] == ["one", "zwei é", "", "four"]
    for document in documents:
        assert read_document_at(path, document.offset, text_key="text", id_key="id").text == document.text


@pytest.mark.parametrize("line", ["{", "[1]", '{"txt": "a"}', '{"text": 3}'])
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n\n" + line + "\n")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:3"):
        list(read_documents(path, text_key="text", id_key="id"))


def test_lone_surrogates_become_writable(tmp_path):
    path = tmp_path / "surrogate.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\udea2"}\n')
    (document,) = read_documents(path, text_key="text", id_key="id")
    assert document.text == "a\ufffdb 🚢"


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path / "none.json" / "no such name"))


def cuts(text, size):
    """Chunks of `text` where each character is a token."""
    chunks = chunk_document(text, np.arange(1, len(text) + 1), chunk_tokens=size)
    assert [chunk.tokens for chunk in chunks] == [chunk.end - chunk.start for chunk in chunks]
    return [text[chunk.start : chunk.end] for chunk in chunks]


@pytest.mark.parametrize(
    ("text", "size", "pieces"),
    [
        ("Aa. Bb. Cc.", 8, ["Aa. Bb. ", "Cc."]),  # the space behind a sentence goes with it
        ("Aa. Bb. Cc.", 7, ["Aa. ", "Bb. Cc."]),
        ("Aa. Bb. Cc.", 11, ["Aa. Bb. Cc."]),
        ("Aa. Bb. Cc.", 10, ["Aa. Bb. ", "Cc."]),
        ("abc def ghi", 8, ["abc def ", "ghi"]),  # no sentence ends: after the last space that fits
        ("abc def ghi", 7, ["abc ", "def ghi"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        (" abcdefg", 4, [" abc", "defg"]),  # a piece of white space alone is no chunk
        ("a    bcdef", 3, ["a  ", "  b", "cde", "f"]),
    ],
)
def test_where_a_text_is_cut(text, size, pieces):
    assert cuts(text, size) == pieces


def test_a_document_without_an_id_is_named_by_its_line_and_found_at_its_place(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes('\n{"text": "é"}\n  \n{"text": "b", "id": 5}\n{"words": "c", "text": "d"}\n'.encode())
    read = list(read_documents(path, text_key="text", id_key="id"))
    assert [(one.id, one.text, one.offset) for one in read] == [("2", "é", 1), ("5", "b", 19), ("5", "d", 42)]
    (tmp_path / "w.jsonl").write_text('{"words": "c", "name": "n"}')
    (one,) = read_documents(tmp_path / "w.jsonl", text_key="words", id_key="name")
    assert (one.id, one.text, one.sha256[:8]) == ("n", "c", "2e7d2c03")
    with pytest.raises(ConfigError, match="has no string under 'text'; name the right field with --text-key"):
        list(read_documents(tmp_path / "w.jsonl", text_key="text", id_key="id"))
