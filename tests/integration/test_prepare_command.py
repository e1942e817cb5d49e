"""`nemo-longctx prepare` as a user runs it: same bytes for any number of workers, shards and kills; errors in a sentence."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from nemo_longctx.cli import main
from nemo_longctx.data.corpus import open_corpus

WORDS = [f"{a}{b}" for a in ("lo", "ga", "mi", "tre", "po") for b in ("rin", "sel", "dok", "ba", "quis", "nu")]


def some_text(rng, n_words):
    return " ".join(rng.choices(WORDS, k=n_words)) + "."


def write_jsonl(path, n, seed=0):
    rng = random.Random(seed)
    texts = [some_text(rng, rng.randrange(3, 200)) for _ in range(n)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer trained by the command itself."""
    directory = tmp_path_factory.mktemp("bpe")
    write_jsonl(directory / "a.jsonl", 200)
    out = ["--output", str(directory / "c"), "--tokenizer", str(directory / "tok"), "--train-tokenizer", "320"]
    assert main(["prepare", str(directory / "a.jsonl"), *out, "--workers", "1"]) == 0
    return directory / "tok"


def run(*arguments, **options):
    """A fresh process, as a user would start it."""
    command = [sys.executable, "-m", "nemo_longctx.cli", "prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def digests(*prefixes):
    return [
        hashlib.sha256(Path(f"{prefix}.{suffix}").read_bytes()).hexdigest() for prefix in prefixes for suffix in ("bin", "idx")
    ]


def test_tokens_are_those_of_transformers_and_decode_to_the_text(tmp_path, bpe):
    from transformers import AutoTokenizer

    texts = write_jsonl(tmp_path / "a.jsonl", 50, seed=1)
    assert main(["prepare", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "c"), "--tokenizer", str(bpe)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    assert len(tokenizer) == 320
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    corpus = open_corpus(tmp_path / "c")
    corpus.check()
    assert corpus.n_documents == len(texts)
    for number, text in enumerate(texts):
        assert corpus.tokens(number).tolist() == [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        assert tokenizer.decode(corpus.tokens(number)[:-1]) == text
    assert corpus.provenance["documents"]["train"] == corpus.n_documents
    assert corpus.provenance["tokens"]["train"] == corpus.n_tokens
    assert corpus.provenance["tokenizer"]["vocab_size"] == 320
    assert corpus.provenance["source_files"] == [
        {"path": str(tmp_path / "a.jsonl"), "bytes": (tmp_path / "a.jsonl").stat().st_size}
    ]
    assert not (tmp_path / "c.work").exists()


def test_a_special_token_spelled_in_a_text_is_text(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("before <|endoftext|> and <|pad|> after")
    common = ["prepare", str(tmp_path / "a.txt"), "--tokenizer", str(bpe), "--workers", "1"]
    assert main([*common, "--output", str(tmp_path / "c"), "--no-append-eod"]) == 0
    tokens = open_corpus(tmp_path / "c").read(0, open_corpus(tmp_path / "c").n_tokens)
    assert tokens.min() > 1  # 0 and 1 are the two special tokens
    assert main([*common, "--output", str(tmp_path / "d"), "--eod-token", "<|pad|>"]) == 0
    assert open_corpus(tmp_path / "d").tokens(0).tolist() == [*tokens.tolist(), 1]


def test_workers_shards_and_engines_do_not_change_a_byte(tmp_path, bpe):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", 150, seed=ord(name))
    common = ["prepare", str(tmp_path), "--tokenizer", str(bpe), "--holdout", "0.3"]
    variants = {"one": ["--workers", "1", "--shard-bytes", "1G"], "many": ["--workers", "2", "--shard-bytes", "20K"]}
    for name, options in variants.items():
        assert main([*common, "--output", str(tmp_path / name), *options]) == 0
    assert digests(tmp_path / "one", tmp_path / "one_holdout") == digests(tmp_path / "many", tmp_path / "many_holdout")
    kept = tmp_path / "kept"
    assert main([*common, "--output", str(kept), "--keep-shards", "--shard-bytes", "20K"]) == 0
    for suffix in ("", "_holdout"):
        shards, merged = open_corpus(f"{kept}{suffix}"), open_corpus(tmp_path / f"one{suffix}")
        assert shards.lengths.tolist() == merged.lengths.tolist()
        np.testing.assert_array_equal(shards.read(0, shards.n_tokens), merged.read(0, merged.n_tokens))
        assert shards.provenance["tokenizer"] == merged.provenance["tokenizer"]
    assert len(open_corpus(kept).shards) > 5


def test_the_holdout_shares_no_document_with_training(tmp_path, bpe):
    texts = write_jsonl(tmp_path / "a.jsonl", 150, seed=3)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))  # every text twice
    assert main(["prepare", str(tmp_path), "--output", str(tmp_path / "c"), "--tokenizer", str(bpe), "--holdout", "0.2"]) == 0
    seen = {}
    for split in ("c", "c_holdout"):
        corpus = open_corpus(tmp_path / split)
        seen[split] = {corpus.tokens(i).tobytes() for i in range(corpus.n_documents)}
    assert len(seen["c"]) + len(seen["c_holdout"]) == len(set(texts))
    assert not seen["c"] & seen["c_holdout"]
    assert 0.05 < len(seen["c_holdout"]) / len(texts) < 0.4


def assert_group_ends(group):
    """No worker goes on alone beside the next run's."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail(f"a worker of {group} outlived it")


@pytest.mark.parametrize("keep_shards", [False, True])
def test_stopped_between_any_two_renames_the_next_run_finishes(tmp_path, bpe, monkeypatch, keep_shards):
    """And at no moment do an old index and new tokens, or a train split without its holdout, look like a corpus."""
    from nemo_longctx.data import merge

    old, tmp_path = tmp_path / "old", tmp_path / "now"
    tmp_path.mkdir()
    write_jsonl(tmp_path / "a.jsonl", 40)
    common = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(bpe), "--holdout", "0.3", "--workers", "1"]
    options = ["--output", str(tmp_path / "c"), *(["--keep-shards"] if keep_shards else [])]
    assert main([*common, *options]) == 0
    expected = content(tmp_path)
    assert main([*common, *options, "--force", "--no-append-eod"]) == 0
    shutil.copytree(tmp_path, old)
    for survived in range(20):
        shutil.rmtree(tmp_path)
        shutil.copytree(old, tmp_path)
        left = survived

        def stop(kind):
            real = getattr(os, kind)

            def stopping(source, target):
                nonlocal left
                if left == 0:
                    raise OSError(f"stopped before {target}")
                left -= 1
                real(source, target)

            return stopping

        with monkeypatch.context() as patch:
            for kind in ("replace", "rename"):
                patch.setattr(merge.os, kind, stop(kind))
            status = main([*common, *options, "--force"])
        if (tmp_path / "c.idx").exists() and status:
            assert open_corpus(tmp_path / "c").n_tokens > 0
        assert main([*common, *options, "--force"]) == 0
        assert content(tmp_path) == expected
        if status == 0:
            assert survived > 3
            return
    pytest.fail("it never came through")


def content(directory):
    """Every output file below a directory, notes of when and where aside."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.suffix in (".bin", ".idx")}


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path):
    """SIGKILL at random moments, tokenizer training included; workers die with their parent."""
    write_jsonl(tmp_path / "a.jsonl", 3000, seed=4)

    def arguments(name):
        out = ["--output", tmp_path / name, "--tokenizer", tmp_path / f"{name}-tok", "--train-tokenizer", 330]
        return [tmp_path / "a.jsonl", *out, "--holdout", "0.1", "--shard-bytes", "100K", "--workers", "2"]

    assert run(*arguments("calm")).returncode == 0
    rng = random.Random(5)
    command = [sys.executable, "-m", "nemo_longctx.cli", "prepare", *map(str, arguments("killed"))]
    prefixes = {name: [tmp_path / name, tmp_path / f"{name}_holdout"] for name in ("calm", "killed")}
    reports = tmp_path / "killed.work" / "reports"
    kills = 0
    while kills < 4:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        before = len(list(reports.glob("*.json")))
        # Each life gets a few shards further, so that kills fall into training, tokenizing, merging and in between.
        while process.poll() is None:
            if len(list(reports.glob("*.json"))) > before or (kills == 0 and reports.parent.exists()):
                time.sleep(rng.random() * 0.2)
                break
            time.sleep(0.005)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert_group_ends(process.pid)
        kills += 1
        if (tmp_path / "killed.idx").exists():  # `.idx` of the train split comes last: from then on all of it is there
            assert digests(*prefixes["killed"]) == digests(*prefixes["calm"])
            break
    assert kills >= 1
    assert run(*arguments("killed")).returncode == 0
    assert digests(*prefixes["calm"]) == digests(*prefixes["killed"])
    assert not (tmp_path / "killed.work").exists()


def test_a_second_call_does_nothing_and_another_one_needs_force(tmp_path, bpe, capsys):
    texts = write_jsonl(tmp_path / "c.jsonl", 30)  # input and output of one name, as in `prepare data --output data/web`
    common = ["prepare", str(tmp_path), "--output", str(tmp_path / "c"), "--tokenizer", str(bpe), "--workers", "1"]
    assert main(common) == 0
    assert open_corpus(tmp_path / "c").n_documents == len(texts)
    stamp, before = (tmp_path / "c.bin").stat().st_mtime_ns, digests(tmp_path / "c")
    assert main(common) == 0
    assert (tmp_path / "c.bin").stat().st_mtime_ns == stamp
    assert "nothing to do" in capsys.readouterr().err
    assert main([*common, "--no-append-eod"]) == 2
    assert "--force" in capsys.readouterr().err
    assert digests(tmp_path / "c") == before
    assert main([*common, "--no-append-eod", "--force"]) == 0
    assert digests(tmp_path / "c") != before


def test_bad_records_fail_or_are_listed_each_with_file_and_line(tmp_path, bpe, capsys):
    texts = write_jsonl(tmp_path / "a.jsonl", 300)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines[210], lines[250], lines[20] = "{broken", '{"text": 5}', '{"text": "  "}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    common = ["prepare", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "c"), "--tokenizer", str(bpe)]
    options = ["--workers", "2", "--shard-bytes", "10K"]
    assert main([*common, *options]) == 2
    error = capsys.readouterr().err
    assert "a.jsonl:211" in error or "a.jsonl:251" in error
    assert "--on-error skip" in error
    assert not (tmp_path / "c.idx").exists()
    assert main([*common, *options, "--on-error", "skip"]) == 0
    captured = capsys.readouterr()
    assert "2 bad and 1 empty" in captured.out
    assert "going on" in captured.err  # shards without bad records were done
    assert main([*common, *options]) == 2  # what is there was made with records left out
    assert "--force" in capsys.readouterr().err
    rows = [line.split("\t") for line in (tmp_path / "c.rejected.tsv").read_text().splitlines()]
    assert [row[1] for row in rows] == ["211", "251", "21"]
    assert open_corpus(tmp_path / "c").n_documents == len(texts) - 3


@pytest.mark.parametrize("largest_file", [25_000, 100_000])  # too small for a shard, for the whole
def test_a_full_disk_is_said_and_harms_nothing(tmp_path, bpe, largest_file):
    """A limit on the size of a file stands for the full disk: the write fails in the same place."""
    write_jsonl(tmp_path / "a.jsonl", 1000, seed=6)
    arguments = [
        tmp_path / "a.jsonl",
        "--output",
        tmp_path / "c",
        "--tokenizer",
        bpe,
        "--workers",
        "2",
        "--shard-bytes",
        "100K",
    ]
    assert run(*arguments, "--no-append-eod").returncode == 0
    before = digests(tmp_path / "c")
    arguments += ["--force"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))

    failed = run(*arguments, preexec_fn=limit)
    assert failed.returncode == 2
    assert "unharmed" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    assert digests(tmp_path / "c") == before
    assert not list((tmp_path / "c.work").rglob("*.part"))
    again = run(*arguments)
    assert again.returncode == 0
    assert ("going on" in again.stderr) == (largest_file > 40_000)
    assert digests(tmp_path / "c") != before


def hear_ctrl_c():
    """In the child: a shell starts background jobs deaf to SIGINT, and what they start inherits it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_and_wait_for_a_shard(tmp_path, bpe):
    """A run that has much left to do; returns its process and its command."""
    write_jsonl(tmp_path / "a.jsonl", 8_000, seed=7)
    arguments = [
        tmp_path / "a.jsonl",
        "--output",
        tmp_path / "c",
        "--tokenizer",
        bpe,
        "--workers",
        "2",
        "--shard-bytes",
        "200K",
    ]
    command = [sys.executable, "-m", "nemo_longctx.cli", "prepare", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_ctrl_c)
    while process.poll() is None and not list((tmp_path / "c.work" / "reports").glob("*.json")):
        time.sleep(0.01)
    return process, arguments


def test_ctrl_c_ends_all_processes_and_the_same_command_goes_on(tmp_path, bpe):
    process, arguments = start_and_wait_for_a_shard(tmp_path, bpe)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "the same command goes on from here" in error
    assert "Traceback" not in error
    assert_group_ends(process.pid)
    again = run(*arguments)
    assert again.returncode == 0
    assert "going on" in again.stderr


def test_a_killed_worker_is_said(tmp_path, bpe):
    process, _ = start_and_wait_for_a_shard(tmp_path, bpe)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "out of memory?" in error
    assert "Traceback" not in error
    assert_group_ends(process.pid)


def test_two_runs_do_not_share_an_output(tmp_path, bpe):
    import fcntl

    write_jsonl(tmp_path / "a.jsonl", 10)
    (tmp_path / "c.work").mkdir()
    with open(tmp_path / "c.work" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = run(tmp_path / "a.jsonl", "--output", tmp_path / "c", "--tokenizer", bpe)
    assert refused.returncode == 2
    assert "another run" in refused.stderr


def bad_cases(tmp_path, bpe):
    write_jsonl(tmp_path / "a.jsonl", 10)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (tmp_path / "no-tokenizer").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "no-eos").mkdir()
    (tmp_path / "no-eos" / "tokenizer.json").write_text((bpe / "tokenizer.json").read_text())
    good = {"input": [tmp_path / "a.jsonl"], "--tokenizer": bpe}
    return {
        "gone": ({"input": [tmp_path / "gone.jsonl"]}, "no such file"),
        "empty": ({"input": [tmp_path / "empty.jsonl"]}, "empty"),
        "blank": ({"input": [tmp_path / "blank.jsonl"]}, "holds no document"),
        "picture": ({"input": [tmp_path / "image.png"]}, "image.png:3.*NUL byte"),
        "no tokenizer": ({"--tokenizer": tmp_path / "no-tokenizer"}, "empty directory"),
        "broken tokenizer": ({"--tokenizer": tmp_path / "broken"}, "tokenizer.json is broken"),
        "no eos": ({"--tokenizer": tmp_path / "no-eos"}, "--eod-token"),
        "eod unknown": ({"--eod-token": "</nope>"}, "not in the vocabulary"),
        "vocabulary too small": ({"--tokenizer": tmp_path / "t", "--train-tokenizer": 200}, "258 or more"),
        "vocabulary too large": ({"--tokenizer": tmp_path / "t", "--train-tokenizer": 30000}, "yields only"),
        "tokenizer in the way": ({"--tokenizer": tmp_path / "no-eos", "--train-tokenizer": 300}, "not trained here"),
        "holdout": ({"--holdout": 1.5}, "from 0 to below 1"),
        "nothing held out": ({"--holdout": 1e-9}, "this leaves the holdout split .*, too few for a text; use"),
        "engine": ({"--engine": "rya"}, "did you mean 'ray'"),
        "workers": ({"--workers": 0}, "1 or more"),
        "key while training": ({"--tokenizer": tmp_path / "t", "--train-tokenizer": 300, "--keys": "txt"}, "no key 'txt'"),
        "key": ({"--keys": "txt"}, "no key 'txt'.*did you mean 'text'"),
    }, good


CASES = "gone empty blank picture no_tokenizer broken_tokenizer no_eos eod_unknown vocabulary_too_small vocabulary_too_large "
CASES += "tokenizer_in_the_way holdout nothing_held_out engine workers key_while_training key"


@pytest.mark.parametrize("name", CASES.split())
def test_bad_input_ends_in_one_sentence_and_leaves_nothing(tmp_path, bpe, capsys, name):
    cases, good = bad_cases(tmp_path, bpe)
    before = sorted(tmp_path.iterdir())
    changes, message = cases[name.replace("_", " ")]
    settings = good | {"--output": tmp_path / "out" / "c"} | changes
    inputs = settings.pop("input")
    options = [str(word) for pair in settings.items() for word in pair]
    assert main(["prepare", *map(str, inputs), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(lines[0])
    assert not list(tmp_path.glob("out/c.idx"))
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "out"] == before
