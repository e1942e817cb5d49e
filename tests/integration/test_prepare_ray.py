"""`prepare --engine ray`: the same function on a real Ray cluster of this machine, hence the same bytes and errors."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from nemo_longctx.cli import main

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """One start for all tests: it takes seconds."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def corpus_text(path, n, bad_line=None):
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(("one", "two", "three", "fourteen"), k=50))}) for _ in range(n)]
    if bad_line is not None:
        lines[bad_line - 1] = "{"
    path.write_text("\n".join(lines) + "\n")


def digest(prefix):
    return [hashlib.sha256(Path(f"{prefix}.{suffix}").read_bytes()).hexdigest() for suffix in ("bin", "idx")]


@pytest.mark.slow
def test_ray_and_processes_write_the_same_bytes(tmp_path, cluster):
    corpus_text(tmp_path / "a.jsonl", 500)
    common = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "tok"), "--train-tokenizer", "265"]
    common += ["--holdout", "0.1", "--shard-bytes", "20K", "--workers", "2"]
    for engine in ("ray", "processes"):
        assert main([*common, "--engine", engine, "--output", str(tmp_path / engine)]) == 0
    for suffix in ("", "_holdout"):
        assert digest(tmp_path / f"ray{suffix}") == digest(tmp_path / f"processes{suffix}")


@pytest.mark.slow
def test_a_bad_record_is_the_same_sentence_and_what_was_done_is_kept(tmp_path, cluster, capsys):
    corpus_text(tmp_path / "a.jsonl", 500, bad_line=400)
    common = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "tok"), "--train-tokenizer", "265"]
    common += [
        "--train-tokenizer-bytes",
        "10K",
        "--shard-bytes",
        "20K",
        "--output",
        str(tmp_path / "c"),
        "--engine",
        "ray",
        "--workers",
        "1",
    ]
    assert main(common) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a.jsonl:400" in error
    assert "ray::" not in error
    done = len(list((tmp_path / "c.work" / "reports").glob("*.json")))
    assert done > 0
    corpus_text(tmp_path / "a.jsonl", 500)  # mended: another input, so all is read again
    assert main([*common, "--tokenizer", str(tmp_path / "tok2")]) == 0
