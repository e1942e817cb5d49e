"""Where `prepare` writes is where its report says and its reader looks; settings without an effect are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import byte_tokenizer

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.prepare import PrepareConfig, prepare
from nemo_longctx.data.writer import write_index


def config(**changes):
    return PrepareConfig(**{"inputs": ("a.jsonl",), "output": "c", "tokenizer": "t", **changes})


@pytest.mark.parametrize("output", ["", "/", ".", "..", "x/.", "x/..", "x/y/", "x.bin", "x/y.idx"])
def test_an_output_that_is_no_prefix_is_refused(output):
    """`x/` would write `x.bin` beside the directory, `` beside the working directory, `x.bin` `x.bin.bin`."""
    with pytest.raises(ConfigError, match=r"^output="):
        config(output=output)


@pytest.mark.parametrize("output", ["", ".", "..", "/"])
def test_a_directory_of_shards_needs_a_name(output):
    with pytest.raises(ConfigError, match=r"^output="):
        config(output=output, keep_shards=True)


def test_a_directory_of_shards_may_end_in_a_slash(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    byte_tokenizer(["text 1 2 3"]).save_pretrained(tmp_path / "tok")
    command = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "tok"), "--workers", "1", "--keep-shards"]
    assert main([*command, "--output", f"{tmp_path}/shards/", "--holdout", "0.3"]) == 0
    told = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [f"{tmp_path}/shards", f"{tmp_path}/shards_holdout"]
    assert sum(open_corpus(prefix).n_documents for prefix in told) == 40


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
