"""The bytes of a corpus's files against `struct` and `zlib`, and the bounds of what its headers may say."""

import errno
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data import checksums as sums_of
from nemo_longctx.data import corpus as corpora
from nemo_longctx.data import writer as writing
from nemo_longctx.data.checksums import checksums, spread_runs
from nemo_longctx.data.corpus import IndexedCorpus, check_begin_tokens, is_corpus, open_corpus
from nemo_longctx.data.index_file import check_index_size, read_header, token_dtype, without_suffix
from nemo_longctx.data.writer import CorpusWriter, explain_full_disk, write_index

HEAD = b"MMIDIDX\0\0"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize(
    ("dtype", "code"), [(np.uint8, 1), (np.int8, 2), (np.int16, 3), (np.int32, 4), (np.int64, 5), (np.uint16, 8)]
)
def test_an_index_is_written_as_its_layout_says(tmp_path, monkeypatch, n, dtype, code):
    """`write_index` in pieces of three documents; read back, with and without modes."""
    monkeypatch.setattr(writing, "_PIECE", 3)
    lengths = [5, 2, 9, 1, 1, 4, 3][:n]
    write_index(tmp_path / "a.idx", np.array(lengths, np.int32), np.dtype(dtype))
    size = np.dtype(dtype).itemsize
    pointers = [size * sum(lengths[:number]) for number in range(n)]
    expected = HEAD + struct.pack(f"<QBQQ{n}i{n}q{n + 1}q", 1, code, n, n + 1, *lengths, *pointers, *range(n + 1))
    assert (tmp_path / "a.idx").read_bytes() == expected
    (tmp_path / "a.bin").write_bytes(bytes(size * sum(lengths)))
    for modes in (b"", bytes(n)):
        (tmp_path / "a.idx").write_bytes(expected + modes)
        read = IndexedCorpus(tmp_path / "a")
        assert (read.dtype, read.n_documents, read.n_tokens, read.lengths.tolist()) == (dtype, n, sum(lengths), lengths)
        assert read.document_offsets.tolist() == [pointer // size for pointer in pointers]
        assert read.check() == 0


def test_an_index_has_documents_and_the_size_that_its_counts_give():
    for n, ends, more in ((1, 2, 0), (1, 2, 1), (5, 4, 0), (5, 4, 5)):
        check_index_size(34 + 12 * n + 8 * ends + more, n, ends, "p")
    for n, ends in ((0, 2), (1, 1), (0, 1)):
        with pytest.raises(ConfigError, match="lists no documents"):
            check_index_size(34 + 12 * n + 8 * ends, n, ends, "p")
    for more in (-1, 1, 4, 6):
        with pytest.raises(
            ConfigError, match=rf"5 sequences and 3 documents need 126 bytes, it has {126 + more}; copy it again"
        ):
            check_index_size(126 + more, 5, 4, "p")


def test_a_header_names_its_version_and_type():
    good = HEAD + struct.pack("<QBQQ", 1, 8, 3, 4)
    assert read_header(good, "p") == (np.uint16, 3, 4)
    wrong = {
        good[:-1]: "wrong magic",
        b"x" + good[1:]: "wrong magic",
        HEAD + struct.pack("<QBQQ", 0, 8, 3, 4): "version 0, this",
    }
    wrong |= {HEAD + struct.pack("<QBQQ", 1, code, 3, 4): f"dtype code {code}, which is no integer" for code in (0, 6, 7, 9)}
    for header, told in wrong.items():
        with pytest.raises(ConfigError, match=told):
            read_header(header, "p")


def test_the_type_of_tokens_is_megatron_s():
    assert [token_dtype(size) for size in (1, 65499, 65500, 10**6)] == [np.uint16, np.uint16, np.int32, np.int32]


def test_a_suffix_is_cut_where_no_index_is_called_so(tmp_path):
    assert [without_suffix(name) for name in ("a.bin", "a.idx", "a", "a.bin.x")] == ["a", "a", "a", "a.bin.x"]
    (tmp_path / "b.bin.idx").write_bytes(b"")
    assert without_suffix(f"{tmp_path}/b.bin") == f"{tmp_path}/b.bin"


@pytest.mark.parametrize("single", [1, 40, 100, 1 << 24])
def test_checksums_are_those_of_one_stretch_after_the_other(tmp_path, monkeypatch, single):
    """By any number of threads: what is worth one is `SINGLE` bytes."""
    monkeypatch.setattr(sums_of, "SINGLE", single)
    data = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(data)
    with open(tmp_path / "a", "rb") as file:
        for starts, size in ((range(0, 1000, 30), 30), ([5, 900, 3, 3, 990], 20), ([0], 1000), ([], 10)):
            expected = [zlib.crc32(data[start : start + size]) for start in starts]
            assert np.frombuffer(checksums(file, starts, size), np.uint32).tolist() == expected


def test_runs_are_spread_from_the_start_to_the_end(monkeypatch):
    monkeypatch.setattr(sums_of, "RUN", 10)
    for size in (1, 9, 10, 11, 20, 21, 95, 1000):
        for runs in (1, 2, 3, 8, 64):
            n = min(runs, -(-size // 10))
            found = spread_runs(size, runs)
            assert found == [max(0, (size - 10) * at // max(1, n - 1)) for at in range(n)]
            assert found[0] == 0
            assert n == 1 or found[-1] == size - 10


def test_a_writer_takes_documents_one_by_one_in_pieces_and_many_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_LONGEST", 6)
    with CorpusWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2])
        assert writer.add_pieces([np.array([3]), np.array([], int), np.array([4, 5, 6, 7, 8])]) == 6
        assert writer.add_pieces(iter([])) == 0
        for pieces in ([np.arange(6), np.arange(1)], [np.arange(7)]):
            with pytest.raises(ConfigError, match=r"document=2: more than the 6 tokens that the format holds; split it"):
                writer.add_pieces(pieces)
        writer.add_documents(np.array([9, 10, 11]), [1, 2])
        with pytest.raises(ConfigError, match=r"document=4: 7 tokens, the format holds 6; split it"):
            writer.add_document(range(7))
        writer.add_document(np.arange(6, dtype=np.int64))
        for low, high in ((0, 65535), (0, 0)):
            writer.add_document(np.array([low, high], np.int64))
        for bad in (-1, 65536):
            with pytest.raises(ConfigError, match=rf"dtype='uint16': it cannot hold token id {bad}; use int32"):
                writer.add_document([3, bad])
        assert writer.n_tokens == 2 + 6 + 3 + 6 + 4
    read = IndexedCorpus(tmp_path / "a")
    assert read.lengths.tolist() == [2, 6, 1, 2, 6, 2, 2]
    assert read.read(0, read.n_tokens).tolist() == [*range(1, 12), *range(6), 0, 65535, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES])
def test_a_full_disk_is_told_and_other_errors_pass(number):
    with pytest.raises(OSError) as error, explain_full_disk("here"):
        raise OSError(number, "as it is")
    assert error.value.errno == number
    assert ("while writing here; what was there before is unharmed" in str(error.value)) == (number != errno.EACCES)


def prepared(directory, name, bos=None, **made):
    with CorpusWriter(directory / name, np.uint16) as writer:
        for length in (5000, 3):
            writer.add_document(np.arange(length))
    if made or bos is not None:
        (directory / f"{name}.json").write_text(f'{{"tokenizer": {{"bos_id": {bos if bos is not None else "null"}}}}}')
    return str(directory / name)


def test_tokens_are_asked_for_by_whole_pages(tmp_path):
    corpus, asked = IndexedCorpus(prepared(tmp_path, "a")), []
    corpus._token_map = SimpleNamespace(madvise=lambda *all: asked.append(all[1:]))
    corpus.will_need(10, 20)
    corpus.will_need(4500, 5003)
    for start, stop in ((5, 5), (-1, 3), (0, 5004)):
        corpus.will_need(start, stop)
    page = corpora.mmap.PAGESIZE
    assert asked == [(0, 40), (9000 // page * page, 10006 - 9000 // page * page)]


def test_how_documents_begin_is_compared_with_the_first_source_that_says(tmp_path):
    names = {"silent": {}, "none": {"told": True}, "one": {"bos": 1}, "again": {"bos": 1}, "two": {"bos": 2}}
    all_of = {name: open_corpus(prepared(tmp_path, name, **more)) for name, more in names.items()}

    def check(*chosen):
        check_begin_tokens(chosen, [all_of[name] for name in chosen])

    check("silent", "one", "again")
    check("none", "silent")
    check("two")
    with pytest.raises(ConfigError, match=r"='two': its documents begin with token 2, those of one with token 1; prepare both"):
        check("silent", "one", "again", "two")
    with pytest.raises(ConfigError, match=r"='none': its documents begin with no begin token, those of two with token 2"):
        check("two", "none")


def test_what_lies_beside_shards_or_their_folder_is_told(tmp_path):
    (tmp_path / "many").mkdir()
    for name in ("a", "b"):
        prepared(tmp_path / "many", name)
    assert open_corpus(tmp_path / "many").provenance == {}
    (tmp_path / "many.json").write_text('{"seed": 1}')
    assert open_corpus(tmp_path / "many").provenance == {"seed": 1}
    (tmp_path / "many" / "a.json").write_text('{"seed": 2}')
    assert open_corpus(tmp_path / "many").provenance == {"seed": 2}
    (tmp_path / "empty").mkdir()
    there = [is_corpus(f"{tmp_path}/{name}") for name in ("many", "many/a", "empty", "gone")]
    assert there == [True, True, False, False]


def test_a_folder_that_holds_what_was_held_out_of_it_is_refused(tmp_path):
    for name in ("web", "web_holdout", "other"):
        prepared(tmp_path, name)
    with pytest.raises(ConfigError, match=r"this directory holds .*web and .*web_holdout, which was held out of it; name"):
        open_corpus(tmp_path)
    assert open_corpus([tmp_path / "web", f"{tmp_path}/other/"]).n_documents == 4


@pytest.mark.parametrize(
    ("limits", "told"),
    [((532, 532), None), ((-1, -1), None), ((531, 532), (532, 532)), ((9, -1), (532, -1)), ((9, 531), ConfigError)],
)
def test_files_that_may_be_open_are_raised_as_far_as_needed(monkeypatch, limits, told):
    monkeypatch.setattr(corpora.resource, "RLIM_INFINITY", -1)
    changed = []
    monkeypatch.setattr(corpora.resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(corpora.resource, "setrlimit", lambda kind, both: changed.append(both))
    if told is ConfigError:
        with pytest.raises(ConfigError, match=r"corpus='10 shards': they need 532 open files, the limit is 531; merge them"):
            corpora._allow_open_files(20)
    else:
        corpora._allow_open_files(20)
    assert changed == ([told] if isinstance(told, tuple) else [])


def test_what_a_corpus_is_known_by_is_what_checkpoints_hold(tmp_path):
    """Another value would have every run that goes on told that its data changed."""
    tokens = (np.arange(1_500_000, dtype=np.int64) * 7919 % 65521).astype(np.uint16)
    with CorpusWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_documents(tokens, [150_000] * 10)
    corpus = IndexedCorpus(tmp_path / "a")
    known = [corpus.fingerprint(), corpus.fingerprint(2_450_000), corpus.fingerprint(100_000), corpus.fingerprint(3_000_000)]
    assert [each[:12] for each in known] == ["7786d5cdfe87", "5076e14941a5", "03db3bb38e4c", "7786d5cdfe87"]
    assert corpus.identity() == "79d68487239a1b91dee8885a5dc58625"
    assert (corpora.WHOLE_BELOW, len(corpus.identity())) == (2**30, 32)
    assert corpus.fingerprint(3_000_000) == corpus.fingerprint() != corpus.fingerprint(2_999_999)
