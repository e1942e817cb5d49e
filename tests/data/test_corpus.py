"""The memory-mapped corpus: what goes in comes out, and an index that lies is refused."""

import pickle
import struct
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError, build
from nemo_longctx.data.corpus import IndexedCorpus, ShardedCorpus, fingerprints, open_corpus
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.evaluation import EvaluationConfig, EvaluationWindows
from nemo_longctx.data.index_file import HEADER
from nemo_longctx.data.mixture import Documents, MixConfig, SourceConfig
from nemo_longctx.data.statistics import LengthCounts
from nemo_longctx.data.stream import Stream, report
from nemo_longctx.data.windows import read_documents
from nemo_longctx.data.writer import CorpusWriter


def write(prefix, documents, dtype=np.uint16):
    with CorpusWriter(prefix, dtype) as writer:
        for tokens in documents:
            writer.add_document(tokens)
    return prefix


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "c", [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), cuts=st.sets(st.integers(1, 29), max_size=4), data=st.data()
)
def test_shards_read_as_the_whole(tmp_path_factory, lengths, cuts, data):
    directory = tmp_path_factory.mktemp("shards")
    stream = np.random.default_rng(len(lengths)).integers(0, 60000, size=sum(lengths)).astype(np.uint16)
    documents = np.split(stream, np.cumsum(lengths)[:-1])
    whole = IndexedCorpus(write(directory / "whole", documents))
    bounds = [0, *sorted(c for c in cuts if c < len(documents)), len(documents)]
    (directory / "parts").mkdir()
    for number, (first, last) in enumerate(pairwise(bounds)):
        write(directory / "parts" / f"{number:03d}", documents[first:last])
    parts = open_corpus(directory / "parts")
    assert (parts.n_documents, parts.n_tokens) == (whole.n_documents, whole.n_tokens)
    assert parts.lengths.tolist() == whole.lengths.tolist() == lengths
    assert parts.document_offsets.tolist() == whole.document_offsets.tolist()
    for number, tokens in enumerate(documents):
        assert parts.tokens(number).tolist() == whole.tokens(number).tolist() == tokens.tolist()
    start = data.draw(st.integers(0, whole.n_tokens))
    stop = data.draw(st.integers(start, whole.n_tokens))
    assert parts.read(start, stop).tolist() == whole.read(start, stop).tolist() == stream[start:stop].tolist()


def test_ranges_within_a_document(prefix):
    corpus = IndexedCorpus(prefix)
    assert corpus.tokens(3, 1, 3).tolist() == [8, 9]
    assert corpus.tokens(0, 3).tolist() == []
    for bad in [(4,), (-1,), (0, 0, 4), (0, 2, 1), (1, 2)]:
        with pytest.raises(IndexError):
            corpus.tokens(*bad)
    for bad in [(-1, 2), (3, 2), (0, 11)]:
        with pytest.raises(IndexError):
            corpus.read(*bad)


def test_tokens_are_asked_for_before_they_are_read(prefix, monkeypatch):
    corpus = IndexedCorpus(prefix)
    for start, stop in [(0, 0), (0, 3), (2, corpus.n_tokens), (corpus.n_tokens, corpus.n_tokens), (3, 99), (-1, 2)]:
        corpus.will_need(start, stop)  # what is no range is left to `read`
    calls = []
    for name in ("will_need", "read"):
        given = getattr(IndexedCorpus, name)
        monkeypatch.setattr(IndexedCorpus, name, lambda *a, given=given, name=name: (calls.append(name), given(*a))[1])
    documents = Documents.open(MixConfig(sources=[SourceConfig(path=str(prefix))]))
    whole = read_documents(documents, np.array([3, 0]), [4, 7], [0, 0])
    assert whole.tolist() == [*corpus.tokens(3)[:4].tolist(), *corpus.tokens(0).tolist()]
    assert calls == ["will_need", "will_need", "read", "read"]


def test_tokens_are_read_only_views(prefix):
    tokens = IndexedCorpus(prefix).tokens(0)
    assert type(tokens) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 9


@pytest.mark.parametrize("make", [IndexedCorpus, lambda prefix: ShardedCorpus([prefix, prefix])])
def test_a_pickle_reopens_the_files(prefix, make):
    corpus = make(prefix)
    again = pickle.loads(pickle.dumps(corpus))
    assert again.read(0, again.n_tokens).tolist() == corpus.read(0, corpus.n_tokens).tolist()
    assert len(pickle.dumps(corpus)) < 1000


def test_the_fingerprint_sees_a_changed_token_and_a_changed_length(tmp_path):
    names = {"a": [[1, 2], [3]], "same": [[1, 2], [3]], "token": [[1, 2], [4]], "length": [[1], [2, 3]]}
    seen = {name: IndexedCorpus(write(tmp_path / name, documents)).fingerprint() for name, documents in names.items()}
    assert seen["a"] == seen["same"]
    assert len({seen["a"], seen["token"], seen["length"]}) == 3


def random_corpus(prefix, lengths):
    rng = np.random.default_rng(0)
    return write(prefix, [rng.integers(0, 60000, length) for length in lengths])


def test_the_fingerprint_sees_every_token_of_a_corpus_of_ordinary_size(tmp_path):
    prefix = random_corpus(tmp_path / "c", [1000] * 4000)
    before, tokens = IndexedCorpus(prefix).fingerprint(), prefix.with_suffix(".bin")
    raw = tokens.read_bytes()
    for place in [0, len(raw) - 1, *np.random.default_rng(1).integers(0, len(raw), 20).tolist()]:
        edit(tokens, field(place, "<B", raw[place] ^ 1))
        assert IndexedCorpus(prefix).fingerprint() != before
        tokens.write_bytes(raw)
    assert IndexedCorpus(prefix).fingerprint() == before  # the same contents, written at another time


def test_the_fingerprint_sees_tokens_that_move_between_neighbours(tmp_path):
    lengths = np.random.default_rng(1).integers(50, 150, 20000)
    before = IndexedCorpus(random_corpus(tmp_path / "a", lengths)).fingerprint()
    lengths[150:152] += [20, -20]
    assert IndexedCorpus(random_corpus(tmp_path / "b", lengths)).fingerprint() != before


def test_the_fingerprint_of_a_large_corpus_takes_its_index_and_samples(tmp_path):
    prefix, whole_below = random_corpus(tmp_path / "c", [1000] * 2000), 1 << 20
    before = IndexedCorpus(prefix).fingerprint(whole_below)
    assert before != IndexedCorpus(prefix).fingerprint()
    raw = prefix.with_suffix(".bin").read_bytes()
    for begin in (0, len(raw) // 2, len(raw) - 2_000_000):  # wherever a large part of it is written over
        changed = raw[:begin] + bytes(2_000_000) + raw[begin + 2_000_000 :]
        prefix.with_suffix(".bin").write_bytes(changed)
        assert IndexedCorpus(prefix).fingerprint(whole_below) != before
    shards = [IndexedCorpus(random_corpus(tmp_path / name, [1000] * 300)) for name in "xy"]
    whole, sampled = fingerprints(shards, 1_200_000), fingerprints(shards, 1_199_999)
    assert whole == [shard.fingerprint() for shard in shards]
    assert not set(whole) & set(sampled)


def test_a_suffix_or_a_bare_prefix_mean_the_same(prefix):
    assert IndexedCorpus(f"{prefix}.bin").prefix == IndexedCorpus(f"{prefix}.idx").prefix == str(prefix)


def edit(path, change):
    raw = bytearray(path.read_bytes())
    changed = change(raw)
    path.write_bytes(bytes(raw if changed is None else changed))


def field(offset, kind, value):
    def change(raw):
        struct.pack_into(kind, raw, offset, value)

    return change


N = 4
LENGTHS, POINTERS, ENDS = HEADER.size, HEADER.size + 4 * N, HEADER.size + 12 * N
BROKEN_AT_OPEN = {
    "truncated token file": ("bin", lambda raw: raw[:-2], "truncated: 18 bytes, the .idx says 20"),
    "longer token file": ("bin", lambda raw: raw + b"xx", "more than its index"),
    "empty token file": ("bin", lambda raw: b"", "truncated: 0 bytes"),
    "wrong magic": ("idx", lambda raw: b"X" + raw[1:], "magic"),
    "short header": ("idx", lambda raw: raw[:20], "magic"),
    "version": ("idx", field(9, "<Q", 2), "version 2"),
    "float tokens": ("idx", field(17, "<B", 7), "dtype code 7"),
    "unknown code": ("idx", field(17, "<B", 99), "dtype code 99"),
    "more sequences than bytes": ("idx", field(18, "<Q", 5), "lies about its size"),
    "absurd count": ("idx", field(18, "<Q", 1 << 60), "lies about its size"),
    "no documents": ("idx", field(26, "<Q", 1), "no documents"),
    "truncated index": ("idx", lambda raw: raw[:-8], "lies about its size"),
    "last document ends early": ("idx", field(ENDS + 8 * N, "<q", 3), "span 3 sequences"),
    "last length": ("idx", field(LENGTHS + 4 * (N - 1), "<i", 3), "more than its index"),
}
BROKEN_AT_CHECK = {
    "negative length": (field(LENGTHS, "<i", -3), "sequence 0 has a negative length"),
    "pointer": (field(POINTERS + 8, "<q", 4), "pointer of sequence 1"),
    "documents out of order": (field(ENDS + 8, "<q", 2), "document 0 does not have one sequence"),
}


@pytest.mark.parametrize("name", BROKEN_AT_OPEN)
def test_a_broken_pair_is_refused_at_once(prefix, name):
    suffix, change, message = BROKEN_AT_OPEN[name]
    edit(prefix.with_suffix(f".{suffix}"), change)
    with pytest.raises(ConfigError, match=message):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("name", BROKEN_AT_CHECK)
def test_check_finds_lies_inside_the_index(prefix, name):
    change, message = BROKEN_AT_CHECK[name]
    IndexedCorpus(prefix).check()
    edit(prefix.with_suffix(".idx"), change)
    with pytest.raises(ConfigError, match=message):
        IndexedCorpus(prefix).check()


def test_documents_without_tokens_are_counted_and_read_past(tmp_path):
    """As Megatron's tools write them for empty text: as a sequence of no tokens, or as a document of no sequence."""
    rng, texts = np.random.default_rng(0), []
    for builder_of in ("sequence", "none"):
        prefix = tmp_path / builder_of
        lengths = [0, 30, 0, 0, 40, 26, 0, *[25] * 40, 0]
        texts = [rng.integers(1, 99, length).astype(np.uint16) for length in lengths]
        prefix.with_suffix(".bin").write_bytes(b"".join(text.tobytes() for text in texts))
        own = lengths if builder_of == "sequence" else [length for length in lengths if length]
        ends = range(len(lengths) + 1) if builder_of == "sequence" else np.cumsum([0, *(length > 0 for length in lengths)])
        pointers = 2 * (np.cumsum(own) - own)
        head = HEADER.pack(b"MMIDIDX\0\0", 1, 8, len(own), len(lengths) + 1)
        index = np.array(own, np.int32).tobytes() + np.array(pointers, np.int64).tobytes() + np.array(ends, np.int64).tobytes()
        prefix.with_suffix(".idx").write_bytes(head + index)
        assert IndexedCorpus(prefix).check() == 5
        counts = LengthCounts.of([IndexedCorpus(prefix).lengths])
        assert (counts.documents, counts.tokens, int(counts.values[0])) == (43, 1096, 25)
        mix = build(MixConfig, {"sources": [{"path": str(prefix)}]})
        for packing in ("concatenate", "best_fit"):
            curriculum = Curriculum.constant(seq_length=32, global_batch_size=4, total_steps=6)
            stream = Stream(mix, curriculum, packing=packing, document_masking=True, cache_dir=str(tmp_path / "cache"))
            windows = stream.begin()
            assert report(windows)[0] == "5 documents have no tokens; they are read past"
            assert not np.isin(windows.order.visits, np.flatnonzero(np.array(lengths) == 0)).any()
        held_out = EvaluationWindows(EvaluationConfig(name="h", path=str(prefix), seq_length=32), document_masking=True)
        joined = np.concatenate(texts).astype(np.int64)
        for number in range(len(held_out)):
            sample = held_out[number]
            assert sample["tokens"].tolist() == joined[32 * number : 32 * number + 32].tolist()
            assert (np.diff(sample["cu_seqlens"]) > 0).all()


def test_missing_files_and_directories_without_shards(tmp_path, prefix):
    with pytest.raises(ConfigError, match=r"nowhere\.idx is missing"):
        IndexedCorpus(tmp_path / "nowhere")
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(ConfigError, match=r"c\.bin is missing"):
        IndexedCorpus(prefix)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.idx"):
        open_corpus(tmp_path / "empty")
    with pytest.raises(ConfigError, match="at least one"):
        open_corpus([])


def test_shards_of_different_types_are_refused(tmp_path):
    prefixes = [write(tmp_path / "narrow", [[1]]), write(tmp_path / "wide", [[1]], np.int32)]
    with pytest.raises(ConfigError, match="one tokenizer"):
        open_corpus(prefixes)


def test_the_writer_refuses_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(ConfigError, match="cannot hold token id 70000"), CorpusWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([70000])
    with pytest.raises(ConfigError, match="cannot hold token id -1"), CorpusWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.array([-1, 3]))
    with pytest.raises(ConfigError, match="no tokens"), CorpusWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([])
    too_long = np.broadcast_to(np.uint16(1), 2**31)  # one token in memory
    with pytest.raises(ConfigError, match="split it"), CorpusWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(too_long)
    with pytest.raises(ConfigError, match="no document"), CorpusWriter(tmp_path / "a", np.uint16):
        pass
    with pytest.raises(ConfigError, match="float32"):
        CorpusWriter(tmp_path / "a", np.float32)
    assert list(tmp_path.iterdir()) == []


def fail_half_way(writer):
    writer.add_document([1])
    raise ConfigError("anything", 0, "two sizes of one thing")


def test_a_failed_write_leaves_the_corpus_that_was_there(prefix):
    with pytest.raises(ConfigError, match="two sizes"), CorpusWriter(prefix, np.uint16) as writer:
        fail_half_way(writer)
    assert IndexedCorpus(prefix).n_tokens == 10


MANY = """
import resource, sys
from nemo_longctx.data.corpus import open_corpus
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
corpus = open_corpus(sys.argv[1])
print(corpus.n_documents, corpus.tokens(corpus.n_documents - 1).tolist(), corpus.read(0, corpus.n_tokens).sum())
"""


def test_more_shards_than_the_soft_limit_on_open_files_and_than_the_hard_one(tmp_path):
    for number in range(100):
        write(tmp_path / f"{number:03d}", [[number], [1]])
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    done = subprocess.run([*command, "4096"], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["200", "[1]", str(sum(range(100)) + 100)], done.stderr
    refused = subprocess.run([*command, "128"], capture_output=True, text=True, timeout=300)
    assert "100 shards" in refused.stderr.splitlines()[-1]
    assert "ConfigError" in refused.stderr.splitlines()[-1]
