"""Where `prepare` writes is where its report says and its reader looks; settings without an effect are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import byte_tokenizer

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.data import merge
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.prepare import PrepareConfig, prepare
from nemo_longctx.data.writer import write_index


def config(**changes):
    return PrepareConfig(**{"inputs": ("a.jsonl",), "output": "c", "tokenizer": "t", **changes})


@pytest.mark.parametrize("output", ["s3://bucket/c", "gs://bucket/c", "memory://c", "file:///c"])
def test_a_corpus_in_object_storage_is_refused_by_name(output):
    with pytest.raises(ConfigError, match="object storage"):
        PrepareConfig(inputs=("a.jsonl",), output=output, tokenizer="t")
    with pytest.raises(ConfigError, match="object storage"):
        open_corpus(output)


@pytest.mark.parametrize("output", ["", "/", ".", "..", "x/.", "x/..", "x/y/", "x.bin", "x/y.idx"])
def test_an_output_that_is_no_prefix_is_refused(output):
    """`x/` would write `x.bin` beside the directory, `` beside the working directory, `x.bin` `x.bin.bin`."""
    with pytest.raises(ConfigError, match=r"^output="):
        config(output=output)


@pytest.mark.parametrize("output", ["", ".", "..", "/"])
def test_a_directory_of_shards_needs_a_name(output):
    with pytest.raises(ConfigError, match=r"^output="):
        config(output=output, keep_shards=True)
    assert config(output="x/", keep_shards=True).output == "x"


def test_a_directory_of_shards_may_end_in_a_slash(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    byte_tokenizer(["text 1 2 3"]).save_pretrained(tmp_path / "tok")
    command = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "tok"), "--workers", "1", "--keep-shards"]
    assert main([*command, "--output", f"{tmp_path}/shards/", "--holdout", "0.3"]) == 0
    told = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [f"{tmp_path}/shards", f"{tmp_path}/shards_holdout"]
    assert sum(open_corpus(prefix).n_documents for prefix in told) == 40


@pytest.mark.parametrize("lengths", [[200], [100, 100], [170, 20, 10], [180, 20]])
@pytest.mark.parametrize("eod", [7, None])
def test_of_one_text_or_a_few_the_end_is_held_out(tmp_path, lengths, eod):
    """By its hash a text is held out or not: of one file none was, and `prepare one.txt --holdout 0.1` failed."""
    tokens = np.random.default_rng(0).integers(8, 500, 200).astype(np.uint16)
    if eod is not None:
        tokens[np.cumsum(lengths) - 1] = eod
    tokens.tofile(tmp_path / "train.bin.part")
    np.array(lengths, np.int32).tofile(tmp_path / "train.lengths")
    made = {"documents": {"train": len(lengths), "holdout": 0}, "tokens": {"train": 200, "holdout": 0}, "dtype": "uint16",
            "tokenizer": {"eod_id": eod}, "settings": {"holdout": 0.1}}  # fmt: skip
    assert merge._from_end(made) == 20
    merge._hold_out_end(str(tmp_path), made, 20)
    for split in ("train", "holdout"):
        for suffix in ("bin", "idx"):
            (tmp_path / f"{split}.{suffix}.part").rename(tmp_path / f"{split}.{suffix}")
    kept, held = open_corpus(tmp_path / "train"), open_corpus(tmp_path / "holdout")
    assert held.read(0, 20).tolist() == tokens[-20:].tolist()
    assert kept.read(0, 180).tolist() == tokens[:180].tolist()
    cut = 180 not in np.cumsum(lengths)
    assert (kept.n_tokens, held.n_tokens) == (180 + (cut and eod is not None), 20)
    assert made["documents"] == {"train": kept.n_documents, "holdout": held.n_documents}
    assert made["tokens"] == {"train": kept.n_tokens, "holdout": held.n_tokens}
    if eod is not None:
        for corpus in (kept, held):
            assert [int(corpus.read(stop - 1, stop)[0]) for stop in np.cumsum(corpus.lengths)] == [eod] * corpus.n_documents


@pytest.mark.parametrize(("documents", "share", "tokens"), [(3, 0.1, 200), (0, 1e-9, 200), (0, 0.0, 200), (0, 0.99, 200)])
def test_where_documents_were_held_out_or_next_to_nothing_is_asked_nothing_is_cut(documents, share, tokens):
    made = {"documents": {"holdout": documents}, "tokens": {"train": tokens}, "settings": {"holdout": share}}
    assert merge._from_end(made) == 0


def test_a_pair_is_found_by_its_prefix_or_one_of_its_files(tmp_path):
    """Also where another writer put the suffix into the prefix."""
    for name, length in (("c", 3), ("other.bin", 5)):
        Path(f"{tmp_path / name}.bin").write_bytes(np.zeros(length, np.uint16).tobytes())
        write_index(f"{tmp_path / name}.idx", np.array([length], np.int32), np.dtype(np.uint16))
    assert [open_corpus(tmp_path / name).n_tokens for name in ("c", "c.bin", "c.idx")] == [3, 3, 3]
    assert [open_corpus(tmp_path / name).n_tokens for name in ("other.bin", "other.bin.bin", "other.bin.idx")] == [5, 5, 5]


def test_bytes_for_a_tokenizer_that_is_not_trained_are_refused():
    with pytest.raises(ConfigError, match="train_tokenizer_bytes=5: has no effect"):
        config(train_tokenizer_bytes=5)


def test_patterns_for_files_that_are_named_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    wrong = config(inputs=(str(tmp_path / "a.jsonl"),), output=str(tmp_path / "c"), globs=("*.x",))
    with pytest.raises(ConfigError, match=r"glob='\*.x': has no effect"):
        prepare(wrong, say=print, progress=lambda n_bytes: lambda *steps: None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
