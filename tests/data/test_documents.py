"""Documents numbered through sources, shards and parts of documents, against plain lists of what lies where."""

import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.data import documents as module
from nemo_longctx.data.documents import Documents, Pieces
from nemo_longctx.data.mixture import MixConfig, SourceConfig


def opened(prefixes, shards_of):
    """Documents of sources of so many shards each."""
    prefixes = iter(prefixes)
    paths = [[next(prefixes) for _ in range(n)] for n in shards_of]
    return Documents.open(MixConfig(sources=[SourceConfig(path=path, name=f"s{n}") for n, path in enumerate(paths)]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=5),
    n_pieces=st.integers(0, 5),
    n=st.sampled_from([0, 1, 7, 700]),
    seed=st.integers(0, 999),
)
def test_documents_and_their_parts_are_what_lies_in_the_files(telling_corpora, lengths, n_pieces, n, seed):
    """`lengths`, `starts`, `whole`, `places`, `sources_of`, `label`, `of_source`: for few documents and for many."""
    rng = np.random.default_rng(seed)
    shards_of = [1] * len(lengths) if seed % 3 == 0 else [len(lengths)] if seed % 3 == 1 else [1, len(lengths) - 1]
    shards_of = [n for n in shards_of if n]
    documents = opened(telling_corpora(lengths), shards_of)
    every = [n for shard in lengths for n in shard]
    source_of_shard = np.repeat(np.arange(len(shards_of)), shards_of).tolist()
    source = [source_of_shard[shard] for shard, inside in enumerate(lengths) for _ in inside]
    whole = rng.integers(0, len(every), n_pieces)
    starts = [int(rng.integers(0, every[d])) for d in whole]
    stops = [int(rng.integers(start + 1, every[d] + 1)) for start, d in zip(starts, whole, strict=True)]
    documents = documents.with_pieces(Pieces(*(np.array(each, np.int64) for each in (whole, starts, stops))))
    assert (documents.pieces is None) == (n_pieces == 0)
    # (document, first token, end) of every number that there is.
    known = [(d, 0, n) for d, n in enumerate(every)] + list(zip(whole.tolist(), starts, stops, strict=True))
    for asked in (rng.integers(0, len(known), n), rng.integers(0, min(2, len(known)), n)):  # of all shards, of one
        told = [known[number] for number in asked]
        asked = asked.astype(np.uint32)
        assert documents.lengths(asked).tolist() == [stop - start for _, start, stop in told]
        assert documents.starts(asked).tolist() == [start for _, start, _ in told]
        assert documents.whole(asked).tolist() == [d for d, _, _ in told]
        assert documents.sources_of(asked).tolist() == [source[d] for d, _, _ in told]
        for (corpus, place), (d, start, stop) in zip(documents.places(asked), told, strict=False):
            assert corpus.read(place, place + stop - start).tolist() == list(range(1000 * d + start, 1000 * d + stop))
    labels = [f"s{source[d]}:{d - source.index(source[d])}" for d, _, _ in known]
    assert [documents.label(number) for number in range(len(known))] == labels
    with mock.patch.object(module, "CHUNK", 3):
        for number in range(len(shards_of)):
            found = [(first + at, n) for first, piece in documents.of_source(number) for at, n in enumerate(piece.tolist())]
            assert found == [(d, n) for d, n in enumerate(every) if source[d] == number]
            assert max(len(piece) for _, piece in documents.of_source(number)) <= 3


def many(n):
    return SimpleNamespace(n_documents=n)


def test_documents_and_parts_are_numbered_with_32_bits():
    full = Documents("ab", [many(2**32 - 2), many(1)])
    one, two = (Pieces(*np.ones((3, n), np.int64)) for n in (1, 2))
    assert len(full.with_pieces(one).pieces) == 1
    with pytest.raises(ConfigError, match=r"data\.mix\.sources=4294967295: a mix numbers documents and parts with 32 bits"):
        full.with_pieces(two)
    assert len(Documents("a", [many(2**32)])) == 2**32
    with pytest.raises(ConfigError, match=r"4294967297: a mix numbers its documents with 32 bits \(4\.29 billion\); split"):
        Documents("a", [many(2**32 + 1)])


def test_what_documents_are_known_by_follows_names_and_contents(telling_corpora):
    prefixes = telling_corpora([[5, 6], [7], [8, 9]])
    documents = opened(prefixes, [2, 1])
    assert documents.identities == [shard.identity() for shard in documents.shards]
    files = [f"{prefix}.{suffix}" for prefix in prefixes for suffix in ("idx", "bin")]
    stats = [(os.path.abspath(path), os.stat(path)) for path in files]
    names = ["s0"] * 4 + ["s1"] * 2
    assert documents.stamps() == [
        (name, path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, (path, stat) in zip(names, stats, strict=True)
    ]
    other = documents.renamed(["a", "s1"])
    assert (other.names, documents.names) == (("a", "s1"), ("s0", "s1"))
    again, turned = opened(prefixes, [2, 1]), opened([prefixes[1], prefixes[0], prefixes[2]], [2, 1])
    assert documents.fingerprint == again.fingerprint == other.renamed(["s0", "s1"]).fingerprint
    assert len({documents.fingerprint, other.fingerprint, turned.fingerprint, opened(prefixes, [1, 2]).fingerprint}) == 4


def test_pieces_are_joined_in_their_order():
    one, two = Pieces(*np.arange(6).reshape(3, 2)), Pieces(*np.arange(10, 13).reshape(3, 1))
    joined = Pieces.join([one, Pieces.none(), two])
    assert [column.tolist() for column in (joined.documents, joined.starts, joined.stops)] == [
        [0, 1, 10],
        [2, 3, 11],
        [4, 5, 12],
    ]
    assert len(Pieces.join([])) == 0
