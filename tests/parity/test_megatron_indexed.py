"""Our `.bin/.idx` and Megatron-Core's own, both ways."""

import filecmp

import numpy as np
import pytest

from nemo_longctx.data.corpus import IndexedCorpus, open_corpus
from nemo_longctx.data.index_file import token_dtype
from nemo_longctx.data.writer import CorpusWriter

indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
torch = pytest.importorskip("torch")


def documents(dtype, seed=0, n=300):
    rng = np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    return [rng.integers(0, top, size=length, dtype=dtype) for length in rng.integers(1, 400, size=n)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_same_bytes_as_megatrons_builder(tmp_path, dtype):
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    with CorpusWriter(tmp_path / "ours", dtype) as writer:
        for tokens in documents(dtype):
            builder.add_document(torch.from_numpy(tokens.astype(np.int64)), [len(tokens)])
            writer.add_document(tokens)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert filecmp.cmp(tmp_path / f"ours.{suffix}", tmp_path / f"theirs.{suffix}", shallow=False)


@pytest.mark.parametrize("mmap", [True, False])
def test_megatrons_reader_reads_ours(tmp_path, mmap):
    written = documents(np.uint16, seed=1)
    with CorpusWriter(tmp_path / "ours", np.uint16) as writer:
        for tokens in written:
            writer.add_document(tokens)
    theirs = indexed.IndexedDataset(str(tmp_path / "ours"), mmap=mmap)
    assert len(theirs) == len(written)
    assert theirs.document_indices.tolist() == list(range(len(written) + 1))
    for number, tokens in enumerate(written):
        np.testing.assert_array_equal(theirs[number], tokens)
    np.testing.assert_array_equal(theirs.get(7, offset=0, length=1), written[7][:1])


def test_we_read_theirs_with_several_sequences_a_document_and_a_merge(tmp_path):
    """Sentence-split documents, joined from two files: what Megatron's preprocess_data and merge_datasets leave."""
    rng = np.random.default_rng(2)
    expected = []
    for name in ("a", "b"):
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        for _ in range(40):
            sentences = [rng.integers(0, 1 << 20, size=n, dtype=np.int32) for n in rng.integers(1, 30, size=rng.integers(1, 5))]
            for sentence in sentences:
                builder.add_item(torch.from_numpy(sentence))
            builder.end_document()
            expected.append(np.concatenate(sentences))
        builder.finalize(str(tmp_path / f"{name}.idx"))
    merged = indexed.IndexedDatasetBuilder(str(tmp_path / "merged.bin"), dtype=np.int32)
    merged.add_index(str(tmp_path / "a"))
    merged.add_index(str(tmp_path / "b"))
    merged.finalize(str(tmp_path / "merged.idx"))
    for corpus in (IndexedCorpus(tmp_path / "merged"), open_corpus([tmp_path / "a", tmp_path / "b"])):
        corpus.check()
        assert corpus.lengths.tolist() == [len(tokens) for tokens in expected]
        assert corpus.document_offsets.tolist() == np.cumsum([0] + [len(tokens) for tokens in expected])[:-1].tolist()
        for number, tokens in enumerate(expected):
            np.testing.assert_array_equal(corpus.tokens(number), tokens)
        np.testing.assert_array_equal(corpus.read(0, corpus.n_tokens), np.concatenate(expected))


def test_a_multimodal_index_is_read_without_its_modes(tmp_path):
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32, multimodal=True)
    builder.add_document(torch.arange(5), [5], [1])
    builder.add_document(torch.arange(3), [3], [0])
    builder.finalize(str(tmp_path / "m.idx"))
    corpus = IndexedCorpus(tmp_path / "m")
    assert corpus.lengths.tolist() == [5, 3]
    assert corpus.tokens(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("vocab_size", [256, 65499, 65500, 65536, 128256])
def test_the_token_dtype_is_megatrons(vocab_size):
    assert token_dtype(vocab_size) == np.dtype(indexed.DType.optimal_dtype(vocab_size))
