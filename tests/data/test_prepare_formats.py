"""Records come out of every form in which people keep them, and what is wrong with one does not touch the next."""

import bz2
import codecs
import csv
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nemo_longctx.data import long_text
from nemo_longctx.data.inputs import format_of
from nemo_longctx.data.long_text import LongText, pieces_of
from nemo_longctx.data.readers import read_part, split_file


def read(path, keys=("text",), **options):
    return [
        record for part in split_file(str(path), format_of(str(path)), 1 << 30) for record in read_part(part, keys, **options)
    ]


def texts(path, *keys):
    return [record.text for record in read(path, keys or ("text",))]


@pytest.mark.parametrize(("suffix", "pack"), [("bz2", bz2.compress), ("xz", lzma.compress), ("GZ", gzip.compress)])
def test_compressions_of_the_standard_library(tmp_path, suffix, pack):
    raw = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(2000)).encode()
    path = tmp_path / f"A.JSONL.{suffix}"
    path.write_bytes(pack(raw[:9000]) + pack(raw[9000:]))  # two streams one after the other
    assert texts(path) == [f"text {i}" for i in range(2000)]
    path.write_bytes(pack(raw)[:-9])
    assert "damaged or cut short" in read(path)[-1].error
    path.write_bytes(b"nonsense")
    assert "damaged or cut short" in read(path)[-1].error


def test_zstd_with_a_window_of_two_gib(tmp_path):
    raw = b"".join(json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(10))
    for log in (28, 31):
        parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=False, strategy=1, hash_log=6, chain_log=6)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # no size in its header
        (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(raw) + compressor.flush())
        assert len(texts(tmp_path / "a.jsonl.zst")) == 10


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_text_and_records_in_utf16(tmp_path, encoding):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "a.jsonl").write_bytes(mark + '{"text": "é 汉"}\n{"text": "b"}\n'.encode(encoding))
    assert texts(tmp_path / "a.jsonl") == ["é 汉", "b"]
    parts = split_file(str(tmp_path / "a.jsonl"), "jsonl", 10)
    assert [record.text for part in parts for record in read_part(part, ["text"])] == ["é 汉", "b"]
    (tmp_path / "a.txt").write_bytes(mark + "é 汉 🎉\n".encode(encoding))
    assert texts(tmp_path / "a.txt") == ["é 汉 🎉\n"]
    (tmp_path / "a.csv").write_bytes(mark + "id,text\n1,é\n".encode(encoding))
    assert texts(tmp_path / "a.csv") == ["é"]


def test_utf16_without_a_mark_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("plain".encode("utf-16-le"))
    [record] = read(tmp_path / "a.txt")
    assert "UTF-16 needs its byte order mark" in record.error


def test_csv_with_quotes_and_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "title"])
        writer.writerow([1, 'said "so",\nthen left', "T"])
        writer.writerow([2, "x" * 200_000, ""])
    assert texts(path) == ['said "so",\nthen left', "x" * 200_000]
    assert texts(path, "title", "text")[0] == 'T\n\nsaid "so",\nthen left'
    path.write_bytes(b"id,text\n1,a\n2\n3,\xff\n4,d\n")
    good, short, wrong, last = read(path)
    assert (good.text, last.text) == ("a", "d")
    assert (short.line, short.error) == (3, "1 fields, where the first line names 2")
    assert (wrong.line, wrong.error) == (4, "not UTF-8 (byte 0xff)")
    assert read(path, replace=True)[2].text == "�"
    (tmp_path / "b.tsv").write_text("a\ttext\n1\tone, two\n")
    assert texts(tmp_path / "b.tsv") == ["one, two"]


def test_csv_that_is_none(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\n"a" b\nfine\n"never closed\n')
    bad, good, last = read(path)
    assert good.text == "fine"
    assert "not CSV" in bad.error
    assert "not CSV" in last.error
    path.write_text("txt\na\n")
    assert "did you mean 'txt'" in read(path)[0].error


ARRAYS = [
    '[{"text": "a"}, {"text": "b"}]',
    '\ufeff[\n  {\n "text": "a"\n },\n {"text": "b"}\n]\n',
    '{\n"text": "a"\n}\n{\n"text":\n "b"}',
    '{"text": "a"}\n{"text": "b"}\n',
]


@pytest.mark.parametrize("raw", ARRAYS)
def test_json_as_an_array_or_over_several_lines(tmp_path, raw):
    (tmp_path / "a.json").write_text(raw)
    assert texts(tmp_path / "a.json") == ["a", "b"]


@pytest.mark.parametrize(
    "raw", ['[{"text": "a"}, {"te', '[{"text": "a"}', '[{"text": "a"}]\n[{"text": "b"}]', '[{"text": "a"} x']
)
def test_an_array_that_is_cut_short_or_goes_on_is_said(tmp_path, raw):
    (tmp_path / "a.json").write_text(raw)
    good, bad = read(tmp_path / "a.json")
    assert good.text == "a"
    assert bad.error.startswith("not JSON")


def test_a_large_array_is_read_as_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_longctx.data.tables._BLOCK", 50)
    wanted = [f"text {i} " + "x" * (i % 130) for i in range(300)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in wanted], indent=1))
    assert texts(tmp_path / "a.json") == wanted


def test_arrow_files_and_streams(tmp_path):
    table = pa.table({"text": [f"row {i}" for i in range(150)], "n": range(150)})
    for name, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=40)
        assert texts(tmp_path / name) == [f"row {i}" for i in range(150)]
        assert "did you mean 'text'" in read(tmp_path / name, ["txt"])[0].error
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:900])
        assert "not a readable Arrow file" in read(tmp_path / name)[-1].error


def test_bytes_in_arrow_that_are_no_utf8_spoil_one_row(tmp_path):
    column = pa.array([b"a", b"b\xff", b"c"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    first, bad, last = read(tmp_path / "a.parquet")
    assert (first.text, last.text, bad.line) == ("a", "c", 2)
    assert "not UTF-8 (byte 0xff at 1)" in bad.error
    assert [record.text for record in read(tmp_path / "a.parquet", replace=True)] == ["a", "b�", "c"]


@pytest.mark.parametrize("kind", ["text", "a list's text", "a list", "a struct"])
def test_offsets_in_arrow_that_point_outside_end_in_a_sentence(tmp_path, kind):
    """They ended the process with a segmentation fault: Arrow follows them without a look."""
    columns = {
        "text": ["abcde"],
        "a list's text": [["abcde"]],
        "a list": [["abcde"] * 5],
        "a struct": [{"a": "b"}] * 5,
    }
    column, key = pa.array(columns[kind]), "text.a" if kind == "a struct" else "text"
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([("text", column.type)])) as writer:
        writer.write_batch(pa.record_batch([column], names=["text"]))
    data = (tmp_path / "a.arrow").read_bytes()
    offsets, beyond = bytes(4) + (5).to_bytes(4, "little"), bytes(4) + (2**30).to_bytes(4, "little")
    if key == "text.a":  # rows of the field, of which none is null
        offsets, beyond = (5).to_bytes(8, "little") + bytes(8), (3).to_bytes(8, "little") + bytes(8)
    at = data.rindex(offsets) if kind != "a list" else data.index(offsets)
    (tmp_path / "a.arrow").write_bytes(data[:at] + beyond + data[at + len(beyond) :])
    [record] = read(tmp_path / "a.arrow", [key])
    assert "not a readable Arrow file" in record.error


def test_bytes_in_an_arrow_file_that_are_no_utf8_spoil_one_row(tmp_path):
    column = pa.array([b"a", b"b\xff", b"c"]).cast(pa.binary()).view(pa.string())
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([column], names=["text"]))
    assert [record.text for record in read(tmp_path / "a.arrow") if not record.error] == ["a", "c"]


def test_keys_with_a_dot_and_keys_that_may_be_missing(tmp_path):
    rows = [
        {"meta.text": "literal", "meta": {"text": "nested"}, "title": "T"},
        {"meta": {"text": "nested"}, "title": None},
        {"meta": {"text": "nested"}},
        {"meta": {}, "title": "T"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third, bad = read(tmp_path / "a.jsonl", ["title?", "meta.text"])
    assert [first.text, second.text, third.text] == ["T\n\nliteral", "nested", "nested"]
    assert "no key 'meta.text'" in bad.error
    errors = [record.error for record in read(tmp_path / "a.jsonl", ["title", "meta.text"])]
    assert errors[1] == "'title' holds NoneType, not text; write 'title?' where it may be missing"
    assert "no key 'title'" in errors[2]
    pq.write_table(pa.table({"meta.text": ["x", "y"], "title": ["T", None]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", "title?", "meta.text", "gone?") == ["T\n\nx", "y"]


def test_what_is_no_unicode_can_be_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a \\ud83d b"}\n{"text": "c \xff"}\n{"text": "\\ud83c\\udf89"}\n')
    assert [bool(record.error) for record in read(tmp_path / "a.jsonl")] == [True, True, False]
    assert [record.text for record in read(tmp_path / "a.jsonl", replace=True)] == ["a � b", "c �", "🎉"]
    (tmp_path / "a.txt").write_bytes(b"a\xff")
    assert [record.text for record in read(tmp_path / "a.txt", replace=True)] == ["a�"]


LONG = ["plain words " * 40, 'q"uo\\te\n\t/ é 汉 🎉 ' * 30, "\\" * 300 + '"', "🎉" * 150, "\x7f\u2028 " * 100]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("block", [7, 64])
def test_a_line_too_long_to_hold_gives_the_same_text(tmp_path, monkeypatch, block, ascii_only):
    monkeypatch.setattr(long_text, "LONG", 50)
    monkeypatch.setattr(long_text, "_BLOCK", block)
    rows = [{"id": number, "text": text, "title": "short", "tags": ["a", {"b": 1}]} for number, text in enumerate(LONG)]
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines[0] + "\n" + '{"text": "short"}\n' + "\n".join(lines[1:]))
    records = read(tmp_path / "a.jsonl", ["title?", "text"])
    assert all(isinstance(record.text, LongText) == (record.text != "short") for record in records)
    assert ["".join(pieces_of(record.text)) for record in records] == [
        text if text == "short" else f"short\n\n{text}" for text in [LONG[0], "short", *LONG[1:]]
    ]
    assert "".join(records[0].text.pieces()) == "".join(records[0].text.pieces())  # as often as one likes


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"text": "' + b"a" * 90 + b"\xff" + b'"}', "not UTF-8 (byte 0xff in a long text)"),
        (b'{"text": "' + b"a" * 90 + b"\\ud800 b" + b'"}', "not Unicode text (half a surrogate pair)"),
        (b'{"text": "' + b"a" * 90 + b"\\q" + b"b" * 90 + b'"}', "not JSON"),
        (b'{"text": "' + b"a" * 90, "not JSON (a string without an end)"),
        (b'{"text": "' + b"a" * 90 + b'" x}', "not JSON"),
        (b'{"txt": "' + b"a" * 90 + b'"}', "no key 'text'"),
        (b"x" * 200, "not JSON"),
    ],
)
def test_a_long_line_that_is_bad_is_named_and_the_next_goes_on(tmp_path, monkeypatch, raw, why):
    monkeypatch.setattr(long_text, "LONG", 50)
    (tmp_path / "a.jsonl").write_bytes(raw + b'\n{"text": "after"}\n')
    bad, after = read(tmp_path / "a.jsonl")
    assert bad.error.startswith(why)
    assert (after.text, after.line) == ("after", 2)


def test_long_lines_in_parts_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(long_text, "LONG", 50)
    wanted = [f"{i} " + "x" * (37 * i % 200) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted))
    parts = split_file(str(tmp_path / "a.jsonl"), "jsonl", 300)
    assert len(parts) > 5
    assert ["".join(pieces_of(record.text)) for part in parts for record in read_part(part, ["text"])] == wanted


def test_a_long_file_of_text_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(long_text, "LONG", 50)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + "é\n".encode() * 100))
    [record] = read(tmp_path / "a.txt.gz")
    assert isinstance(record.text, LongText)
    assert "".join(record.text.pieces()) == "é\n" * 100
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("é".encode() * 100 + b"\xc3"))  # cut within a letter
    [record] = read(tmp_path / "b.txt.gz")
    assert record.error.startswith("not UTF-8")
    (tmp_path / "b.txt").write_bytes(b"a\n" * 100 + b"\xff")
    [record] = read(tmp_path / "b.txt")
    assert (record.line, record.error) == (101, "not UTF-8 (byte 0xff)")
    (tmp_path / "c.txt").write_bytes(b"a\n" * 100 + b"\0")
    [record] = read(tmp_path / "c.txt")
    assert (record.line, record.error) == (101, "not text (a NUL byte at 200)")
