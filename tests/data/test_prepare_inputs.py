"""Which files are read: each once, whatever links lead to it; what is passed over is named with its reason."""

import gzip
import json
import os
from pathlib import Path

import fsspec
import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data.inputs import find_files, format_of, shown
from nemo_longctx.data.opening import size_of, stamp_of
from nemo_longctx.data.readers import lines_before, read_part, split_file


def rows(n=2):
    return "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(n))


def write(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows() if text is None else text)
    return path


def names(found, directory):
    return [path.removeprefix(f"{directory}/") for path in found.files]


def reasons(found, directory):
    return {path.removeprefix(f"{directory}/"): why for path, why in found.passed_over.items()}


def test_a_linked_file_or_folder_is_read_once(tmp_path):
    real = write(tmp_path / "in" / "a.jsonl")
    write(tmp_path / "elsewhere" / "b.jsonl")
    (tmp_path / "in" / "0-link.jsonl").symlink_to(real)
    os.link(real, tmp_path / "in" / "hard.jsonl")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    found = find_files([str(tmp_path / "in")], ())
    assert names(found, tmp_path / "in") == ["a.jsonl", "folder/b.jsonl"]
    assert reasons(found, tmp_path / "in") == {
        "0-link.jsonl": "a link to a file that is taken",
        "hard.jsonl": "a link to a file that is taken",
        "twice": "a link to a folder that is taken",
        "loop": "a link to a folder that is taken",
        "gone.jsonl": "a link to nothing",
    }
    assert found.summary().startswith("2 files taken, 5 passed over (2 ")
    with pytest.raises(ConfigError, match="named twice"):
        find_files([str(real), str(tmp_path / "in" / "0-link.jsonl")], ())
    with pytest.raises(ConfigError, match="a link to nothing"):
        find_files([str(tmp_path / "in" / "gone.jsonl")], ())


def test_records_in_any_form_are_taken_and_the_rest_is_named(tmp_path):
    for name in ("a.jsonl", "B.JSONL.GZ", "c.jsonl.bz2", "d.csv", "e.tsv.xz", "f.arrow", "g.PARQUET", "h.jsonl.zstd"):
        write(tmp_path / name)
    write(tmp_path / "records.json", '[\n {"text": "a"}]')
    write(tmp_path / "lines.json")
    write(tmp_path / "settings.json", '{\n "lr": 1}')
    write(tmp_path / "numbers.json", "[1, 2]")
    for name in ("._a.jsonl", ".hidden/x.jsonl", "notes.txt", "paper.pdf", "tokens.bin", "code.py", "Makefile", "old.tar.gz"):
        write(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.jsonl")
    found = find_files([str(tmp_path)], ())
    taken = ["B.JSONL.GZ", "a.jsonl", "c.jsonl.bz2", "d.csv", "e.tsv.xz", "f.arrow", "g.PARQUET", "h.jsonl.zstd", "lines.json"]
    assert names(found, tmp_path) == [*taken, "records.json"]
    assert reasons(found, tmp_path) == {
        ".hidden": "a hidden folder",
        "._a.jsonl": "hidden",
        "pipe.jsonl": "a pipe or device",
        "settings.json": "JSON without an array of records",
        "numbers.json": "JSON without an array of records",
        "notes.txt": "text beside files of records (take it by --glob)",
        "paper.pdf": ".pdf (convert it to text first)",
        "tokens.bin": ".bin (Megatron's own corpus; it is prepared already)",
        "old.tar.gz": ".tar (an archive; unpack it)",
        "code.py": ".py (take it by --glob)",
        "Makefile": "without a suffix (take it by --glob)",
    }


def test_lists_of_what_was_left_out_are_no_input(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "a.rejected.tsv", "a.jsonl:3\t0\tempty\tno text\n")
    found = find_files([str(tmp_path)], ())
    assert names(found, tmp_path) == ["a.jsonl"]
    assert reasons(found, tmp_path) == {"a.rejected.tsv": "what prepare or curate left out"}


def test_a_folder_of_text_is_text(tmp_path):
    """`prepare books.jsonl.zst papers/`, as the README has it."""
    (tmp_path / "papers").mkdir()
    write(tmp_path / "papers" / "a.txt")
    write(tmp_path / "papers" / "deep" / "b.md")
    write(tmp_path / "papers" / "c.pdf")
    books = write(tmp_path / "books.jsonl")
    found = find_files([str(books), str(tmp_path / "papers")], ())
    assert names(found, tmp_path) == ["books.jsonl", "papers/a.txt", "papers/deep/b.md"]
    assert list(reasons(found, tmp_path)) == ["papers/c.pdf"]
    (tmp_path / "code").mkdir()
    write(tmp_path / "code" / "x.py")
    with pytest.raises(ConfigError, match=r"no records or texts; name other files by --glob '\*.py'.*it holds .py"):
        find_files([str(tmp_path / "code")], ())


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.pdf", "A.DOCX", "a.jsonl.lz4", "a.bin"])
def test_a_named_file_that_nobody_reads_is_refused_at_once(tmp_path, name):
    with pytest.raises(ConfigError, match="is not read: "):
        find_files([str(write(tmp_path / name))], ())


def test_a_named_pipe_is_refused_since_it_cannot_be_read_again(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"a pipe or device.*write it to a file"):
        find_files([str(tmp_path / "pipe")], ())


def test_a_folder_of_save_to_disk_gives_the_files_that_it_lists(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["one", "two", "three"]})})
    saved.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2})
    write(tmp_path / "saved" / "train" / "cache-0123.arrow")
    found = find_files([str(tmp_path / "saved")], ())
    texts = [
        record.text
        for path in found.files
        for part in split_file(path, format_of(path), 100)
        for record in read_part(part, ["text"])
    ]
    assert texts == ["one", "two", "three"]
    assert found.passed_over[str(tmp_path / "saved" / "train" / "cache-0123.arrow")] == "a cache of datasets"


def test_a_name_that_is_not_utf8_can_be_shown(tmp_path):
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"a\xff\tb.jsonl"))
    Path(path).write_text(rows())
    [found] = find_files([str(tmp_path)], ()).files
    assert found == path
    assert shown(found).endswith(r"a\xff\tb.jsonl")
    assert shown(found).isprintable()


@pytest.fixture
def store():
    """fsspec's file system in memory, which stands for any object store."""
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/in/a.jsonl", rows(60).encode())
    fs.pipe("/bucket/in/deep/b.jsonl.gz", gzip.compress(rows(3).encode()))
    fs.pipe("/bucket/in/notes.txt", b"text")
    yield fs
    fs.rm("/bucket", recursive=True)


def texts_of(paths, shard_bytes=1 << 20):
    parts = [part for path in paths for part in split_file(path, format_of(path), shard_bytes)]
    return [record.text for part in parts for record in read_part(part, ["text"])], parts


def test_urls_are_read_as_files_are(store):
    found = find_files(["memory://bucket/in"], ())
    assert found.files == ["memory:///bucket/in/a.jsonl", "memory:///bucket/in/deep/b.jsonl.gz"]
    texts, _ = texts_of(found.files)
    assert texts == [f"text {i}" for i in range(60)] + [f"text {i}" for i in range(3)]
    cut, parts = texts_of(found.files, 300)
    assert cut == texts
    assert len(parts) > 3
    assert lines_before(parts[1]) > 0
    assert size_of(found.files[0]) == len(rows(60))
    assert list(found.passed_over.values()) == ["text beside files of records (take it by --glob)"]
    assert find_files(["memory://bucket/in"], ["*.txt"]).files == ["memory:///bucket/in/notes.txt"]
    assert find_files(["memory://bucket/in/*.jsonl"], ()).files == ["memory:///bucket/in/a.jsonl"]
    assert find_files(["memory://bucket/in/a.jsonl"], ()).files == ["memory://bucket/in/a.jsonl"]
    before = stamp_of(found.files[0])
    store.pipe("/bucket/in/a.jsonl", rows(2).encode())
    assert stamp_of(found.files[0]) != before


def test_parquet_is_read_behind_a_url(store, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [f"row {i}" for i in range(20)]}), tmp_path / "a.parquet", row_group_size=5)
    store.pipe("/bucket/a.parquet", (tmp_path / "a.parquet").read_bytes())
    texts, parts = texts_of(["memory://bucket/a.parquet"], 300)
    assert texts == [f"row {i}" for i in range(20)]
    assert len(parts) > 1


def test_urls_that_lead_nowhere_are_said(store):
    with pytest.raises(ConfigError, match="no such file"):
        find_files(["memory://bucket/gone.jsonl"], ())
    with pytest.raises(ConfigError, match="fsspec cannot read it"):
        find_files(["nosuch://bucket/a.jsonl"], ())
    with pytest.raises(ConfigError, match=r"two slashes, hf://datasets/me/books"):
        find_files(["hf:/datasets/me/books"], ())
    with pytest.raises(ConfigError, match=r"small letters, memory://bucket/a\.jsonl"):
        find_files(["MEMORY://bucket/a.jsonl"], ())


def test_a_store_that_cannot_be_reached_is_named(store, monkeypatch):
    """The first look was at whether it is a folder, whose error named no input."""
    monkeypatch.setattr(type(store), "isdir", lambda *_: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(ConfigError, match=r"input=.memory://bucket/a\.jsonl': cannot be reached \(no route\)"):
        find_files(["memory://bucket/a.jsonl"], ())


def test_a_local_url_is_a_path(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert find_files([f"file://{path}"], ()).files == [str(path)]


@pytest.mark.slow  # a server of its own; where moto and s3fs are installed
def test_an_s3_server_on_this_machine_is_read_as_a_disk_is(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("bucket")
        fs.pipe({"bucket/in/a.jsonl": rows(600).encode(), "bucket/in/b.jsonl.gz": gzip.compress(rows(3).encode())})
        fsspec.filesystem("s3").invalidate_cache()
        found = find_files(["s3://bucket/in"], ())
        assert found.files == ["s3://bucket/in/a.jsonl", "s3://bucket/in/b.jsonl.gz"]
        texts, parts = texts_of(found.files, 3000)
        assert texts == [f"text {i}" for i in range(600)] + [f"text {i}" for i in range(3)]
        assert len(parts) > 3
        assert stamp_of(found.files[0])
        with pytest.raises(ConfigError, match="no such file"):
            find_files(["s3://bucket/in/gone.jsonl"], ())
    finally:
        server.stop()
