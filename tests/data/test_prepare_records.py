"""From records to the corpus: nothing lost or doubled in silence, and what stood in the way is named with file and line."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from tiny_models import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError, build
from nemo_longctx.data import prepare as prepare_module
from nemo_longctx.data import prepare_tokenizer
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.engines import ENGINES
from nemo_longctx.data.mixture import Documents, MixConfig
from nemo_longctx.data.prepare import PrepareConfig, prepare
from nemo_longctx.data.readers import split_file
from nemo_longctx.data.records import Key, row_record
from nemo_longctx.data.shards import ShardJob, tokenize_shard
from nemo_longctx.data.writer import work_directory

WORDS = "the old dog runs over long hills and short words"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Shards are made in this process: starting others takes seconds, and tests/integration does it."""
    monkeypatch.setitem(
        ENGINES, "processes", lambda jobs, progress, *, workers: ((job, tokenize_shard(job, progress)) for job in jobs)
    )


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tok")
    byte_tokenizer([WORDS]).save_pretrained(directory)
    return directory


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(tmp_path, inputs, tokenizer, **options):
    said = []
    inputs = [inputs] if not isinstance(inputs, list) else inputs
    config = PrepareConfig(inputs=tuple(map(str, inputs)), output=str(tmp_path / "c"), tokenizer=str(tokenizer), **options)
    made = prepare(config, say=said.append, progress=lambda n_bytes: lambda *steps: None)
    return made, said


def rejected(tmp_path):
    return [line.split("\t") for line in (tmp_path / "c.rejected.tsv").read_text("utf-8").splitlines()]


def word_level(directory, words, unknown=False):
    vocabulary = {word: number for number, word in enumerate(["<eod>", *words, *(["[UNK]"] if unknown else [])])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.normalizer = normalizers.Replace("​", "")
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_a_record_that_cannot_be_encoded_is_bad_like_any_other(tmp_path):
    texts = ["a b", "b a", "a x", "b", "​", "a"]
    path = write_rows(tmp_path / "a.jsonl", texts)
    tokenizer = word_level(tmp_path / "tok", ["a", "b"])
    with pytest.raises(ConfigError, match=r"a.jsonl:3.*cannot encode it \(WordLevel error.*--on-error skip"):
        run(tmp_path, path, tokenizer, eod_token="<eod>")
    made, _ = run(tmp_path, path, tokenizer, eod_token="<eod>", on_error="skip")
    assert made["bad_records"] == 2
    assert made["documents"]["train"] == 4
    assert [(row[1], row[2].split(" (")[0]) for row in rejected(tmp_path)] == [
        ("3", "the tokenizer cannot encode it"),
        ("5", "the tokenizer gives no tokens for it"),
    ]
    assert open_corpus(tmp_path / "c").tokens(1).tolist() == [2, 1, 0]


def test_a_long_record_that_cannot_be_encoded_leaves_no_part(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["a b", "a b " * 200_000 + "x", "b a"])
    made, _ = run(tmp_path, path, word_level(tmp_path / "tok", ["a", "b"]), eod_token="<eod>", on_error="skip")
    assert made["bad_records"] == 1
    corpus = open_corpus(tmp_path / "c")
    assert [corpus.tokens(number).tolist() for number in range(2)] == [[1, 2, 0], [2, 1, 0]]
    assert rejected(tmp_path)[0][1] == "2"


def test_a_long_document_lies_between_its_neighbours(tmp_path, tok):
    texts = ["first", f"{WORDS}\n" * 11_500, "last"]
    made, _ = run(tmp_path, write_rows(tmp_path / "a.jsonl", texts), tok)
    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    corpus = open_corpus(tmp_path / "c")
    assert [tokenizer.decode(corpus.tokens(number).tolist()) for number in range(3)] == texts
    assert corpus.tokens(1)[:-1].tolist() == tokenizer.encode(texts[1]).ids
    assert made["tokens"]["train"] == corpus.n_tokens


def test_a_name_that_is_not_utf8_is_written_with_its_bytes_escaped(tmp_path, tok):
    folder = tmp_path / "in"
    folder.mkdir()
    path = Path(os.fsdecode(os.path.join(os.fsencode(folder), b"a\xff\t.jsonl")))
    path.write_text('{"text": "good"}\n{broken\n{"\\ud800": 1, "b\\n": 2}\n')
    made, _ = run(tmp_path, folder, tok, on_error="skip")
    assert [row[0].rpartition("/")[2] for row in rejected(tmp_path)] == [r"a\xff\t.jsonl"] * 2
    assert made["source_files"][0]["path"].endswith(r"a\xff\t.jsonl")
    json.loads((tmp_path / "c.json").read_text("utf-8").encode("utf-8"))


def test_begin_tokens_are_kept_and_compared_between_sources(tmp_path, tok, capsys):
    path = write_rows(tmp_path / "a.jsonl", ["text one", "text two"])
    made, _ = run(tmp_path, path, tok, bos=True)
    corpus = open_corpus(tmp_path / "c")
    begin, end = made["tokenizer"]["bos_id"], made["tokenizer"]["eod_id"]
    assert made["tokenizer"]["bos_token"] == "<s>"
    assert all(corpus.tokens(n)[0] == begin and corpus.tokens(n)[-1] == end for n in range(2))
    common = ["prepare", str(path), "--tokenizer", str(tok)]
    assert main([*common, "--output", str(tmp_path / "plain")]) == 0
    assert open_corpus(tmp_path / "plain").tokens(0).tolist() == corpus.tokens(0)[1:].tolist()
    assert main([*common, "--output", str(tmp_path / "d"), "--bos"]) == 0
    assert len(Documents.open(build(MixConfig, {"sources": [{"path": str(tmp_path / name)} for name in "cd"]}))) == 4
    sources = [{"path": str(tmp_path / name)} for name in ("c", "plain")]
    with pytest.raises(ConfigError, match=f"begin with no begin token, those of c with token {begin}.*--bos"):
        Documents.open(build(MixConfig, {"sources": sources}))
    with pytest.raises(ConfigError, match=r"another corpus is there \(another bos\); name"):
        run(tmp_path, path, tok)  # without --bos: not the same corpus
    with pytest.raises(ConfigError, match="no bos_token"):
        run(tmp_path / "x", path, word_level(tmp_path / "words", ["text"], unknown=True), bos=True, eod_token="<eod>")


def test_an_added_token_that_is_not_special_is_told_and_counted(tmp_path):
    tokenizer = byte_tokenizer([WORDS])
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=False), AddedToken("\n\n\n", special=False)])
    tokenizer.save_pretrained(tmp_path / "tok")
    path = write_rows(tmp_path / "a.jsonl", ["plain", "<|im_start|>user <|im_start|>", "</s> <s>"])
    made, said = run(tmp_path, path, tmp_path / "tok")
    assert made["added_tokens_spelled"] == {"<|im_start|>": 2}
    assert any("1 added tokens of the tokenizer are not special: '<|im_start|>'" in line for line in said)
    control = [made["tokenizer"]["eod_id"], tokenizer.bos_token_id]
    corpus = open_corpus(tmp_path / "c")
    assert not set(corpus.tokens(2)[:-1].tolist()) & set(control)


def test_the_token_that_ends_documents_is_never_spelled_by_a_text(tmp_path):
    """Also where its tokenizer adds it without calling it special."""
    byte_tokenizer([WORDS]).save_pretrained(tmp_path / "tok")
    values = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        token["special"] = False
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(values))
    made, _ = run(tmp_path, write_rows(tmp_path / "a.jsonl", ["a </s> b"]), tmp_path / "tok")
    tokens = open_corpus(tmp_path / "c").tokens(0).tolist()
    assert tokens.count(made["tokenizer"]["eod_id"]) == 1


def test_what_is_passed_over_is_told_and_kept(tmp_path, tok):
    folder = tmp_path / "in"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ["a"])
    (folder / "._a.jsonl").write_bytes(b"\0\5\x16\7")
    (folder / "b.pdf").write_bytes(b"%PDF")
    made, said = run(tmp_path, folder, tok)
    assert said[0] == "1 file taken, 2 passed over (1 hidden, 1 .pdf (convert it to text first))"
    assert made["passed_over"] == {
        str(folder / "._a.jsonl"): "hidden",
        str(folder / "b.pdf"): ".pdf (convert it to text first)",
    }


def test_the_first_document_is_read_back_at_the_end(tmp_path, tok):
    _, said = run(tmp_path, write_rows(tmp_path / "a.jsonl", ["the old dog", "x"]), tok, bos=True)
    assert said[-1].endswith("'<s>the old dog</s>'")
    _, said = run(tmp_path, write_rows(tmp_path / "b.jsonl", [f"{WORDS} " * 200]), tok, force=True)
    assert "tokens ...]" in said[-1]
    assert len(said[-1]) < 1000


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_corpus_that_lost_a_file_is_made_again(tmp_path, tok, suffix, damage):
    path = write_rows(tmp_path / "a.jsonl", ["a", "b"])
    run(tmp_path, path, tok)
    whole = (tmp_path / f"c.{suffix}").read_bytes()
    (tmp_path / f"c.{suffix}").unlink()
    if damage == "short":
        (tmp_path / f"c.{suffix}").write_bytes(whole[:-2])
    _, said = run(tmp_path, path, tok)
    assert not any("nothing to do" in line for line in said)
    assert (tmp_path / f"c.{suffix}").read_bytes() == whole
    _, said = run(tmp_path, path, tok)
    assert any("nothing to do" in line for line in said)


def test_two_runs_that_train_one_tokenizer_wait_for_each_other(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [f"{WORDS} {number}" for number in range(100)])
    trained, inside = [], []
    real = prepare_tokenizer.train_bpe

    def slowly(*arguments):
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.3)
        real(*arguments)
        trained.append(inside.pop())

    monkeypatch.setattr(prepare_tokenizer, "train_bpe", slowly)
    (tmp_path / "tok.part").mkdir()  # what a killed run left
    results = []

    def one(name):
        config = PrepareConfig(
            inputs=(str(path),), output=str(tmp_path / name), tokenizer=str(tmp_path / "tok"), train_tokenizer=300
        )
        results.append(prepare(config, say=lambda line: None, progress=lambda n_bytes: lambda *steps: None))

    threads = [threading.Thread(target=one, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1
    assert len({made["tokenizer"]["sha256"] for made in results}) == 1
    assert len(results) == 3
    assert [path.name for path in tmp_path.glob("tok*")] == ["tok"]


def test_bad_records_that_a_killed_run_left_out_stop_a_run_that_must_fail(tmp_path, tok, monkeypatch):
    """`--on-error skip`, killed after its shards were made, then the same command without it."""
    lines = ['{"text": "good"}', "{broken", '{"text": "good too"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish_merged", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tmp_path / "a.jsonl", tok, on_error="skip")
    assert list((tmp_path / "c.work" / "reports").glob("*.json"))
    with pytest.raises(ConfigError, match=r"a.jsonl:2.*not JSON"):
        run(tmp_path, tmp_path / "a.jsonl", tok)
    assert not (tmp_path / "c.idx").exists()
    made, _ = run(tmp_path, tmp_path / "a.jsonl", tok, on_error="skip")
    assert made["bad_records"] == 1
    assert made["documents"]["train"] == 2


@pytest.mark.parametrize(("bad", "on_error"), [(True, "skip"), (True, "fail"), (False, "skip"), (False, "fail")])
def test_a_finished_corpus_serves_a_command_that_would_have_made_it(tmp_path, tok, bad, on_error):
    """One that left bad records out does not serve a command that must stop at them; every other one is kept."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + '{"text": 1}\n' * bad)
    run(tmp_path, path, tok, on_error="skip")
    made = (tmp_path / "c.bin").stat().st_ino
    if bad and on_error == "fail":
        with pytest.raises(ConfigError, match=r"another corpus is there \(another on_error\)"):
            run(tmp_path, path, tok, on_error=on_error)
        with pytest.raises(ConfigError, match=r"a\.jsonl:2"):
            run(tmp_path, path, tok, on_error=on_error, force=True)
    else:
        _, said = run(tmp_path, path, tok, on_error=on_error)
        assert any("nothing to do" in line for line in said)
    assert (tmp_path / "c.bin").stat().st_ino == made


def test_one_run_at_a_time_writes_to_an_output(tmp_path, tok):
    path = write_rows(tmp_path / "a.jsonl", [WORDS])
    with work_directory(tmp_path / "c.work"), pytest.raises(ConfigError, match="another run is writing there; wait for it"):
        run(tmp_path, path, tok)
    made, _ = run(tmp_path, path, tok)
    assert made["documents"]["train"] == 1


def test_of_one_text_the_end_is_held_out(tmp_path, tok):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a word and another " * 200}) + "\n")
    made, _ = run(tmp_path, tmp_path / "a.jsonl", tok, holdout=0.25)
    kept, held = open_corpus(tmp_path / "c"), open_corpus(tmp_path / "c_holdout")
    assert made["documents"] == {"train": 1, "holdout": 1}
    assert 0.2 < held.n_tokens / (kept.n_tokens + held.n_tokens) < 0.3


def test_a_field_is_given_beside_the_text_whatever_it_is():
    keys = [Key("text"), Key("meta.page", field=True), Key("none?", field=True)]
    record = row_record({"text": "a", "meta": {"page": 7}}, 3, keys, replace=False)
    assert (record.text, record.line, record.error, record.fields) == ("a", 3, "", (7, None))


def test_max_input_bytes_takes_whole_files_by_the_seed(tmp_path, tok):
    for number in range(20):
        write_rows(tmp_path / f"{number:02d}.jsonl", [f"{number:02d} " + "x" * 80])
    size = (tmp_path / "00.jsonl").stat().st_size
    taken = {}
    for seed in (1, 2):
        made, _ = run(tmp_path / f"s{seed}", sorted(tmp_path.glob("*.jsonl")), tok, max_input_bytes=5 * size + 1, seed=seed)
        paths = [each["path"] for each in made["source_files"]]
        assert len(paths) == made["documents"]["train"] == 5
        assert paths == sorted(paths)
        taken[seed] = paths
    assert taken[1] != taken[2]
    made, _ = run(tmp_path / "s1", sorted(tmp_path.glob("*.jsonl")), tok, max_input_bytes=5 * size + 1, seed=1)
    assert [each["path"] for each in made["source_files"]] == taken[1]
    made, _ = run(tmp_path / "one", sorted(tmp_path.glob("*.jsonl")), tok, max_input_bytes=1)
    assert made["documents"]["train"] == 1  # never none


def test_files_over_a_size_are_passed_over_and_told(tmp_path, tok):
    for name, size in (("a", 100), ("b", 5000), ("c", 120)):
        write_rows(tmp_path / f"{name}.jsonl", ["x" * size])
    made, _ = run(tmp_path / "s", sorted(tmp_path.glob("*.jsonl")), tok, max_file_bytes=1000)
    assert [each["path"][-7:] for each in made["source_files"]] == ["a.jsonl", "c.jsonl"]
    assert made["passed_over"] == {str(tmp_path / "b.jsonl"): "too large"}
    with pytest.raises(ConfigError, match="the smallest has"):
        run(tmp_path / "t", sorted(tmp_path.glob("*.jsonl")), tok, max_file_bytes=10)


def test_where_a_killed_worker_was_is_known(tmp_path, tok, monkeypatch):
    write_rows(tmp_path / "a.jsonl", ["x" * 400] * 50)
    parts = split_file(str(tmp_path / "a.jsonl"), "jsonl", 8000)
    for name in ("train", "holdout", "reports"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer.json").write_text((tok / "tokenizer.json").read_text())
    fixed = {"keys": ("text",), "bos_id": None, "eod_id": None, "dtype": "int32", "skip_bad": False, "replace": False}
    job = ShardJob(number=3, parts=tuple(parts[1:2]), directory=str(tmp_path), holdout=0.0, seed=1, **fixed)
    assert job.place() == str(tmp_path / "a.jsonl")

    class KilledError(Exception):
        pass

    def killed(*steps):
        raise KilledError

    with pytest.raises(KilledError):
        tokenize_shard(job, killed)
    line = int(job.place().rpartition(":")[2])
    assert 10 < line < 30
    tokenize_shard(job, lambda *steps: None)
    assert not job.place_path.exists()


def test_what_differs_from_the_corpus_that_is_there_is_named(tmp_path, tok):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "better"}\n')
    run(tmp_path, path, tok)
    with pytest.raises(ConfigError, match=r"\(another holdout, another seed\)"):
        run(tmp_path, path, tok, holdout=0.5, seed=7)
    path.write_text('{"text": "good"}\n')
    with pytest.raises(ConfigError, match=r"\(its inputs have changed since"):
        run(tmp_path, path, tok)
    (tmp_path / "c.json").unlink()
    with pytest.raises(ConfigError, match="without the report of how it was made"):
        run(tmp_path, path, tok)
