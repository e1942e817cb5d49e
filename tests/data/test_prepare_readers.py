"""Readers: every record comes out, whatever the cut and the compression, and what is wrong has its file and line."""

import gzip
import json
import time
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.data import inputs
from nemo_longctx.data.inputs import find_files, format_of
from nemo_longctx.data.opening import open_bytes
from nemo_longctx.data.readers import Part, lines_before, read_part, split_file


def whole(path, kind):
    return Part(path=str(path), format=kind, start=0, stop=path.stat().st_size, n_bytes=path.stat().st_size)


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=25), n=st.integers(1, 12), final_newline=st.booleans())
def test_byte_ranges_of_jsonl_yield_each_line_once_with_its_number(tmp_path_factory, texts, n, final_newline):
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    raw = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(raw if final_newline else raw[:-1])
    parts = split_file(str(path), "jsonl", max(1, len(raw) // n))
    assert sum(part.n_bytes for part in parts) == path.stat().st_size
    seen = [(record.text, record.line + lines_before(part)) for part in parts for record in read_part(part, ["text"])]
    assert seen == [(text, number + 1) for number, text in enumerate(texts)]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_compressions_agree(tmp_path, suffix):
    raw = jsonl(f"text {i} é" for i in range(5000))
    path = tmp_path / f"a.{suffix}"
    half = len(raw) // 2  # two members, two frames: what `cat a.zst b.zst` makes
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}[suffix]
    path.write_bytes(pack(raw[:half]) + pack(raw[half:]))
    assert format_of(path.name) == "jsonl"
    [part] = split_file(str(path), "jsonl", 1 << 30)
    assert [record.text for record in read_part(part, ["text"])] == [f"text {i} é" for i in range(5000)]


def test_what_repeats_itself_is_unpacked_in_small_steps(tmp_path):
    """64 MiB of zeros are 2 KiB packed: never more than a few MiB of them are held."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(bytes(64 << 20)))
    tracemalloc.start()
    try:
        with open_bytes(str(path)) as file:
            read = sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == 64 << 20
    assert peak < 20 << 20


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstandard.ZstdCompressor().compress)])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-6], lambda raw: b"nonsense"])
def test_a_damaged_compressed_file_is_not_a_short_one(tmp_path, suffix, pack, damage):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(damage(pack(jsonl(str(i) for i in range(3)))))
    *good, last = read_part(whole(path, "jsonl"), ["text"])
    assert "damaged or cut short" in last.error
    assert last.line == len(good) + 1


BAD_LINES = {
    b"{": "not JSON",
    b"[1, 2]": "no keys",
    b"3": "no keys",
    b'{"txet": "a"}': r"no key 'text' \(did you mean 'txet'\?\)",
    b"{}": "the record has no keys",
    b'{"text": 3}': "holds int, not text",
    b'{"text": null}': "holds NoneType, not text",
    b'{"text": "\xff"}': "not UTF-8 .byte 0xff at column 11",
    b'{"text": "\\ud800"}': "half a surrogate pair",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_each_kind_of_bad_line_is_named_and_the_rest_goes_on(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["before"]) + b"\n" + line + b"\n" + jsonl(["after"]))
    before, bad, after = read_part(whole(path, "jsonl"), ["text"])
    assert (before.text, before.line, after.text, after.line) == ("before", 1, "after", 4)
    assert bad.line == 3
    with pytest.raises(AssertionError, match=BAD_LINES[line]):
        raise AssertionError(bad.error)


def test_keys_may_be_nested_and_several(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"title": "T", "body": {"plain": "B"}}) + "\n")
    [record] = read_part(whole(path, "jsonl"), ["title", "body.plain"])
    assert record.text == "T\n\nB"
    [record] = read_part(whole(path, "jsonl"), ["title.plain"])
    assert "something that has no keys" in record.error


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(["x"]))
    assert [record.text for record in read_part(whole(path, "jsonl"), ["text"])] == ["x"]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfx")
    assert [record.text for record in read_part(whole(path, "text"), ["text"])] == ["x"]


def test_parquet_by_row_groups(tmp_path):
    texts = [f"row {i}" for i in range(95)] + [None] + [f"row {i}" for i in range(96, 100)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts, "other": range(100)}), path, row_group_size=10)
    parts = split_file(str(path), "parquet", path.stat().st_size // 3)
    assert len(parts) == 3
    seen = [(record, record.line + lines_before(part)) for part in parts for record in read_part(part, ["text"])]
    assert [line for _, line in seen] == list(range(1, 101))
    assert [record.text for record, _ in seen if not record.error] == [text for text in texts if text is not None]
    [(bad, line)] = [(record, line) for record, line in seen if record.error]
    assert line == 96
    assert "NoneType" in bad.error


def test_parquet_that_is_none_or_lacks_the_column(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"]}), path)
    [record] = read_part(split_file(str(path), "parquet", 1000)[0], ["contents"])
    assert "did you mean 'content'" in record.error
    path.write_bytes(b"PAR1 nonsense")
    [record] = read_part(split_file(str(path), "parquet", 1000)[0], ["content"])
    assert "not a readable Parquet file" in record.error


def test_files_that_are_not_text(tmp_path):
    path = tmp_path / "a.txt"
    for raw, line, message in [(b"a\nb\xff", 2, "0xff at 3"), (b"\xef\xbb\xbfa\xff", 1, "0xff at 4"), (b"a\n\n\0", 3, "NUL")]:
        path.write_bytes(raw)
        [record] = read_part(whole(path, "text"), ["text"])
        assert record.line == line
        assert message in record.error


def test_directories_yield_data_files_or_what_the_globs_say(tmp_path):
    for name in [
        "b/x.jsonl",
        "a/y.jsonl.gz",
        "a/z.parquet",
        "n.txt",
        "a/m.md",
        ".hidden/x.jsonl",
        "out.jsonl",
        "out.work/x.jsonl",
        "settings.json",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(globs=()):
        return [
            path.removeprefix(f"{tmp_path}/")
            for path in find_files([str(tmp_path)], globs, exclude={f"{tmp_path}/out.jsonl", f"{tmp_path}/out.work"}).files
        ]

    assert found() == ["a/y.jsonl.gz", "a/z.parquet", "b/x.jsonl"]
    assert found(["*.txt", "*.md"]) == ["n.txt", "a/m.md"]
    assert found(["a/*.md"]) == ["a/m.md"]
    with pytest.raises(ConfigError, match=r"nothing matches \*\.py"):
        found(["*.py"])
    with pytest.raises(ConfigError, match="no such file"):
        find_files([str(tmp_path / "gone")], ())
    with pytest.raises(ConfigError, match="named twice"):
        find_files([str(tmp_path / "b"), str(tmp_path / "b" / "x.jsonl")], ())


def test_what_globs_leave_is_listed_in_the_time_of_one_look_at_each(monkeypatch, tmp_path):
    names = [str(tmp_path / f"{n}.{kind}") for n in range(20_000) for kind in ("py", "so")]
    monkeypatch.setattr(inputs, "_walk", lambda *_: names)
    passed_over: dict[str, str] = {}
    began = time.process_time()
    taken = inputs._in_directory(str(tmp_path), ["*.py"], (), passed_over)
    assert time.process_time() - began < 5  # a look at every other file for each would take half a minute
    assert (len(taken), len(passed_over)) == (20_000, 20_000)
    assert passed_over[names[1]] == "not *.py"
