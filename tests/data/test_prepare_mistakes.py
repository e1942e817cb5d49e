"""Slips of every day: nothing that lies there is written over, nothing is read twice unseen, and errors say what to do."""

import gzip
import json
import subprocess
import sys

import pytest
from tiny_models import byte_tokenizer

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError, size_of_text
from nemo_longctx.data import engines
from nemo_longctx.data.corpus import open_corpus
from nemo_longctx.data.inputs import find_files, same_bytes
from nemo_longctx.data.prepare import prepare
from nemo_longctx.data.prepare_config import PrepareConfig
from nemo_longctx.data.readers import read_part, split_file
from nemo_longctx.data.writer import is_work_directory, remove_work

ROWS = "".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(4))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a tokenizer and a corpus, where shards run in this process."""
    monkeypatch.chdir(tmp_path)
    run_here = lambda jobs, progress, *, workers: ((job, job.run(progress)) for job in jobs)  # noqa: E731
    monkeypatch.setitem(engines.ENGINES, "processes", run_here)
    byte_tokenizer(["text 1 2 3"]).save_pretrained(tmp_path / "tok")
    (tmp_path / "a.jsonl").write_text(ROWS)
    return tmp_path


def run(*inputs, output, **changes):
    said = []
    config = PrepareConfig(inputs=inputs, output=output, tokenizer="tok", workers=1, **changes)
    return prepare(config, say=said.append, progress=lambda n_bytes: lambda *steps: None), said


def test_a_script_without_a_main_guard_prepares_once(here):
    """The worker imported the script, which began to prepare there too: "a worker process was killed (out of memory?)"."""
    words = ["prepare", "a.jsonl", "--output", "made", "--tokenizer", "tok", "--workers", "1"]
    script = here / "script.py"
    script.write_text(f"print('began')\nfrom nemo_longctx.cli import main\nraise SystemExit(main({words}))\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.count("began")) == (0, 1), done.stderr
    assert len(open_corpus("made")) == 4


@pytest.mark.parametrize("force", [False, True])
def test_an_input_is_not_replaced_by_the_report(here, force):
    """`prepare books.json --output books` wrote its report over the books."""
    (here / "books.json").write_text(json.dumps([json.loads(row) for row in ROWS.splitlines()]))
    before = (here / "books.json").read_bytes()
    with pytest.raises(ConfigError, match=r"books\.json is read, and would be replaced"):
        run("books.json", output="books", force=force)
    (here / "in").mkdir()
    (here / "in" / "books.json").write_bytes(before)
    (here / "in" / "more.jsonl").write_text(ROWS)
    with pytest.raises(ConfigError, match=r"books\.json is read, and would be replaced"):
        run("in", output="in/books", force=force)
    assert (here / "books.json").read_bytes() == (here / "in" / "books.json").read_bytes() == before


def test_a_folder_with_the_output_s_name_is_input(here):
    """`prepare in --output in/books` passed over in/books/ without a word, and read its own output the second time round."""
    (here / "in" / "books").mkdir(parents=True)
    (here / "in" / "books" / "b.jsonl").write_text(ROWS)
    (here / "in" / "a.jsonl").write_text(ROWS.replace("text ", "other "))
    (here / "linked").symlink_to("in")
    for folder in ("in", "in", "linked"):
        made, said = run(folder, output="in/books", force=folder == "linked")
        assert made["documents"]["train"] == 8
        assert said[0].startswith("2 files taken, 0 passed over")


@pytest.mark.parametrize("name", ["c", "c_holdout", "c.work"])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_others_is_not_removed(here, name, force):
    """Shards took the place of whatever lay in `c_holdout/`, and a `c.work/` went with the end of the run."""
    (here / name).mkdir()
    (here / name / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match=f"{name} is there, "):
        run("a.jsonl", output="c", holdout=0.5, keep_shards=True, force=force)
    assert (here / name / "mine.txt").read_text() == "precious"


def test_a_file_in_the_place_of_shards_is_told_before_the_work(here):
    (here / "c").write_text("x")
    with pytest.raises(ConfigError, match="c is there, and is no directory of shards alone"):
        run("a.jsonl", output="c", keep_shards=True)


def test_shards_are_not_shadowed_by_the_merged_corpus_before(here):
    """`--keep-shards` over a merged corpus left the old .idx, which was read in the place of the shards."""
    run("a.jsonl", output="c")
    (here / "b.jsonl").write_text(ROWS * 2)
    with pytest.raises(ConfigError, match=r"another corpus is there \(another inputs, another keep_shards\)"):
        run("b.jsonl", output="c", keep_shards=True)
    run("b.jsonl", output="c", keep_shards=True, force=True)
    assert open_corpus("c").n_documents == 8


def test_a_holdout_of_the_corpus_before_is_told(here):
    run("a.jsonl", output="c", holdout=0.5)
    _, said = run("a.jsonl", output="c", force=True)
    assert any("c_holdout was held out of the corpus before this one, which holds its text too" in line for line in said)


def test_a_run_killed_while_it_cleans_up_is_still_known(here, monkeypatch):
    work = here / "c.work"
    for name in ("train", "reports"):
        (work / name).mkdir(parents=True)
    (work / "lock").write_text("")
    monkeypatch.setattr("nemo_longctx.data.writer.shutil.rmtree", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remove_work(work)
    assert is_work_directory(work)


@pytest.mark.parametrize("more", [[], ["--split-lengths", "3"]])
def test_curate_does_not_read_what_it_wrote_nor_replace_what_lies_in_its_input(here, more, capsys):
    (here / "in").mkdir()
    (here / "in" / "a.jsonl").write_text(ROWS)
    command = ["curate", "in", "--near-duplicates", "0", "--workers", "1", "--output"]
    name = "in/c.0-3.jsonl" if more else "in/c.jsonl"
    (here / name).write_text(ROWS.replace("text ", "other "))
    assert main([*command, "in/c.jsonl", *more, "--force"]) == 2
    assert "is read, and would be replaced; name another file" in capsys.readouterr().err
    (here / name).unlink()
    assert main([*command, "in/c.jsonl"]) == 0
    assert main([*command, "in/c.jsonl", *more, "--force"]) == 0
    assert main([*command, "in/c.jsonl", *more]) == 0
    made = json.loads((here / "in" / "c.report.json").read_text())
    assert made["documents"] == 4
    assert (here / "in" / "c.jsonl").exists() != bool(more)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_curate_does_not_replace_its_input(here, force, capsys):
    assert main(["curate", "a.jsonl", "--output", "./a.jsonl", *force]) == 2
    assert "a.jsonl is read, and would be replaced; name another file" in capsys.readouterr().err
    assert (here / "a.jsonl").read_text() == ROWS


@pytest.mark.parametrize("name", ["c.json", "c.bin", "c.rejected.tsv", "c_holdout.json"])
def test_files_of_others_are_not_replaced(here, name):
    (here / name).write_text('{"mine": 1}')
    with pytest.raises(
        ConfigError, match=f"{name} is there, and of no corpus; name another prefix, or replace it with --force"
    ):
        run("a.jsonl", output="c", holdout=0.5)
    assert (here / name).read_text() == '{"mine": 1}'
    run("a.jsonl", output="c", holdout=0.5, force=True)


@pytest.mark.parametrize("text", ['{"x": 1}', "[1]", "{", "\x80", '{"plan": "z", "tokenizer": 5}', "[" * 100_000])
def test_a_report_that_is_none_does_not_end_in_a_traceback(here, text):
    run("a.jsonl", output="c")
    (here / "c.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="another corpus is there, without the report"):
        run("a.jsonl", output="c")


def test_a_corpus_whose_index_was_removed_is_made_again(here):
    run("a.jsonl", output="c")
    (here / "c.idx").unlink()
    run("a.jsonl", output="c")
    assert (here / "c.idx").exists()


def test_files_of_the_same_bytes_are_told(here):
    (here / "b.jsonl").write_text(ROWS)
    (here / "c.jsonl").write_text(ROWS.replace("3", "4"))
    (here / "empty.jsonl").write_text("")
    (here / "empty2.jsonl").write_text("")
    names = [f"{name}.jsonl" for name in ("a", "b", "c", "empty", "empty2")]
    assert same_bytes(names) == {"b.jsonl": "a.jsonl"}
    _, said = run(*names, output="out")
    assert any("b.jsonl holds the same bytes as a.jsonl: its documents come once more" in line for line in said)
    for name in ("d", "e"):
        (here / f"{name}.jsonl").write_text(ROWS)
    _, said = run(*names, "d.jsonl", "e.jsonl", output="out2")  # a folder of installed packages has some 900
    [line] = [line for line in said if "same bytes" in line]
    assert line.startswith("3 files hold the same bytes as another")
    assert "b.jsonl those of a.jsonl, and so on" in line


def only(path, **changes):
    [part] = split_file(str(path), changes.pop("kind", "jsonl"), 1 << 20)
    return next(iter(read_part(part, ["text"]))).error


def test_what_is_no_line_of_json_is_told_with_the_format_that_reads_it(tmp_path):
    path = tmp_path / "x.jsonl"
    for text in (json.dumps({"text": "a"}, indent=1), json.dumps([{"text": "a"}]), json.dumps([{"text": "a"}], indent=1)):
        path.write_text(text)
        assert "--format json reads" in only(path)


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_compressed_file_without_its_suffix_is_told(tmp_path, kind):
    path = tmp_path / "x.jsonl"
    path.write_bytes(gzip.compress(ROWS.encode()))
    assert only(path, kind=kind) == "not text, but what is called .gz; give its name that suffix"
    path.write_text("PAR1 is how it begins\n")
    assert only(path, kind="text") == ""


@pytest.mark.parametrize(("name", "other"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", ","), ("a.csv", "|")])
def test_columns_that_are_apart_by_another_character_are_told(tmp_path, name, other):
    path = tmp_path / name
    path.write_text(f'n{other}text\n1{other}"a; b"\n')
    assert f"its columns are apart by {other!r}" in only(path, kind="csv")


def test_text_of_another_encoding_is_told_what_to_do(here):
    (here / "l.txt").write_bytes("café ".encode("latin-1") * 5)
    with pytest.raises(ConfigError, match=r"write it as UTF-8, have U\+FFFD there with --replace-invalid"):
        run("l.txt", output="c")


def test_what_cannot_be_an_input_or_output_is_told(here):
    with pytest.raises(ConfigError, match="a pattern is the shell's, without quotes"):
        find_files(["*.jsonl"], ())
    with pytest.raises(ConfigError, match="standard input"):
        find_files(["-"], ())
    with pytest.raises(ConfigError, match=r"output=.*a\.jsonl is a file; name a place in a folder"):
        run("a.jsonl", output="a.jsonl/c")
    with pytest.raises(ConfigError, match="train_tokenizer=99999999999: ask for"):  # the trainer ended the process
        PrepareConfig(inputs=("a.jsonl",), output="c", tokenizer="t", train_tokenizer=99999999999)


@pytest.mark.parametrize(
    "command",
    [["prepare", "--output", "c", "--tokenizer", "tok"], ["curate", "--output", "c.jsonl", "--near-duplicates", "0"],
     ["synth", "--output", "c.jsonl", "--tokenizer", "tok", "--length", "64", "--tokens", "64"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_pattern_that_no_folder_is_given_for_is_told(here, command, capsys):
    """`curate` and `synth` took the file, and left the pattern out in silence."""
    assert main([*command, "a.jsonl", "--glob", "*.md"]) == 2
    assert "glob='*.md': has no effect: no input is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [("text", ""), ("",), ("", ""), ("?",)])
def test_an_empty_name_of_a_key_is_told(keys):
    with pytest.raises(ConfigError, match="a name between commas is empty"):
        PrepareConfig(inputs=("a.jsonl",), output="c", tokenizer="t", keys=keys)


def test_why_nothing_is_left_is_told(here):
    with pytest.raises(ConfigError, match=r"only 4 bad and 0 empty records \(the first, a\.jsonl:1: no key 'txt'"):
        run("a.jsonl", output="c", keys=("txt",), on_error="skip")


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (1e-4, r"of 40,006 bytes this leaves the holdout split 4, too few for a text; use 0\.0004 or more"),
        (0.9999, r"of 40,006 bytes this leaves the train split 4, too few for a text; use 0\.9996 or less"),
        (1e-9, r"of 40,006 bytes this leaves the holdout split 4e-05, too few"),
        (1e-3, ""), (0.999, "no document fell to the train split"), (4.1e-4, ""),
    ],
)  # fmt: skip
def test_a_share_of_nothing_is_told_before_the_work(here, monkeypatch, share, said):
    """`prepare --holdout 1e-9` tokenized all of the input before it said that the holdout is empty."""
    (here / "one.txt").write_text("ab" * 20_003)
    jobs, work = [], engines.ENGINES["processes"]
    noted = lambda todo, *rest, **more: jobs.extend(todo) or work(todo, *rest, **more)  # noqa: E731
    monkeypatch.setitem(engines.ENGINES, "processes", noted)
    if not said:
        made, _ = run("one.txt", output="c", holdout=share)
        assert made["documents"]["holdout"] == 1
        return
    with pytest.raises(ConfigError, match=said):
        run("one.txt", output="c", holdout=share)
    assert bool(jobs) == said.startswith("no document")
    assert not list(here.glob("c*")) or jobs


def test_how_small_a_packed_file_s_share_is_nobody_knows_before_it_is_read(here):
    with gzip.open(here / "one.txt.gz", "wt") as file:
        file.write("text 1 " * 30_000)
    made, _ = run("one.txt.gz", output="c", holdout=9e-4)
    assert (here / "one.txt.gz").stat().st_size * 9e-4 < 16 < made["tokens"]["holdout"]


@pytest.mark.parametrize(("share", "split"), [(1e-7, "holdout"), (1 - 1e-7, "train")])
def test_what_may_come_of_a_packed_file_s_share_is_told_before_the_work(here, monkeypatch, share, split):
    from nemo_longctx.data import prepare as module

    with gzip.open(here / "one.txt.gz", "wt") as file:
        file.write("text 1 " * 300)
    told = []

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "tokenizer_of", stop)
    config = module.PrepareConfig(inputs=("one.txt.gz",), output="c", tokenizer="t", holdout=share)
    with pytest.raises(KeyboardInterrupt):
        module.prepare(config, say=told.append, progress=None)
    size = (here / "one.txt.gz").stat().st_size
    assert f"leaves the {split} split empty, which is an error at the end, unless these {size} bytes unpack to" in told[0]
    assert f"{16 / (1e-7 * size):,.0f} times as many" in told[0]


def test_more_than_was_allowed_is_told(here):
    _, said = run("a.jsonl", output="c", max_input_bytes=1)
    assert f"1 of 1 files are taken, {len(ROWS)} bytes, more than max_input_bytes" in said


@pytest.mark.parametrize(
    ("text", "size"),
    [("16M", 16_000_000), ("1.5Ki", 1536), ("16 mb", 16_000_000), ("9007199254740993", 9007199254740993), ("7B", 7)]
    + [(text, None) for text in ("16.7", "9" * 400, "1e6", "1_000", "1,000", "", "Mi", "1i", "１6M")],
)
def test_sizes_are_whole_and_exact(text, size):
    """`16.7` was 16, and 400 digits a traceback."""
    assert size_of_text(text) == size


def test_a_size_that_is_none_ends_in_a_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "a", "--output", "c", "--tokenizer", "t", "--max-file-bytes", "9" * 400])
    assert "is no size" in capsys.readouterr().err
