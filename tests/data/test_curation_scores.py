"""What `curate` measures and how it compares, against plain counting; its settings and limits on both sides."""

import hashlib
import json
import re
import sys
import zlib
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curation import duplicates, scores, shard
from nemo_longctx.data.curation.config import CurateConfig
from nemo_longctx.data.curation.duplicates import Shards, band_hashes, bands_for, near_duplicates
from nemo_longctx.data.curation.scores import WordHashes, _lines, _runs, measure
from nemo_longctx.data.curation.shard import CurateJob
from nemo_longctx.data.readers import split_file

WHOLE = 2**64


def config(**changes):
    return CurateConfig(**{"inputs": ("a",), "output": "x.jsonl", "near_duplicates": 0.0, **changes})


def test_settings_by_default_and_at_their_bounds():
    plain = CurateConfig(inputs=("a",), output="x.jsonl", near_duplicates=0)
    shares = (plain.max_repeated_lines, plain.max_repeated_words, plain.max_boilerplate)
    assert (plain.keys, plain.min_length, plain.max_length, plain.force, shares) == (("text",), 1, None, False, (0.3, 0.3, 0.2))
    assert CurateConfig.__dataclass_fields__["near_duplicates"].default == 0.8
    for good in (
        {"output": "a/.x.jsonl"}, {"min_length": 1, "max_length": 1}, {"workers": 1, "shard_bytes": 1},
        {"split_lengths": (1, 2)},
        {"max_repeated_lines": 0, "max_repeated_words": 1, "max_boilerplate": 0}, {"gzip_band": (0, 1)}, {"near_duplicates": 1},
        {"assemble": "threads", "parent": "p", "group": "g", "order": "o"}, {"assemble": "chapters", "group": "g"},
    ):  # fmt: skip
        config(**good)
    for bad, told in [
        ({"inputs": ()}, r"^input=\(\): name at least one"), ({"keys": ()}, r"^keys=\(\): name at least one"),
        ({"keys": ("a", "?")}, "a name between commas"), ({"keys": ("a", "b", "a")}, "a key is named twice"),
        ({"format": "csvv"}, "did you mean 'csv'"), ({"engine": "rayy"}, "did you mean 'ray'"),
        ({"output": ".jsonl"}, "as JSON lines"), ({"output": "a/.jsonl"}, "as JSON lines"),
        ({"output": "jsonl"}, "as JSON lines"),
        ({"min_length": 0}, "min_length=0: use 1 or more"), ({"max_length": 0}, "max_length=0: use 1 or more"),
        ({"workers": 0}, "workers=0"), ({"shard_bytes": 0}, "shard_bytes=0"),
        ({"min_length": 3, "max_length": 2}, "max_length=2: below min_length=3; nothing would stay"),
        ({"split_lengths": (0, 2)}, "rising order"), ({"split_lengths": (2, 2)}, "rising order"),
        ({"max_repeated_lines": -0.1}, "a share from 0 to 1"), ({"max_repeated_words": 1.1}, "a share from 0 to 1"),
        ({"gzip_band": (0.5, 0.5)}, "rising order"), ({"gzip_band": (0.1, 0.2, 0.3)}, "rising order"),
        ({"gzip_band": (-0.1, 0.5)}, "rising order"), ({"gzip_band": (0.1, 1.1)}, "rising order"),
        ({"languages": ("en", "EN")}, "languages='EN': no language has this code"),
        ({"languages": ("german",)}, "no language has this code; write ISO 639-1's two small letters"),
        ({"order": "o"}, "order='o': it has no effect without --assemble"), ({"parent": "p"}, "no effect without --assemble"),
        ({"assemble": "repositories", "parent": "p"}, "only threads have answers"),
        ({"near_duplicates": -0.1}, "near_duplicates=-0.1: a similarity"), ({"near_duplicates": 0.035}, "too low for MinHash"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            config(**bad)


def test_libraries_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config()
    with pytest.raises(ConfigError, match=r"near_duplicates=0\.8: needs rensa; pip install 'nemo-longctx\[curate\]'"):
        config(near_duplicates=0.8)
    with pytest.raises(ConfigError, match=r"languages=\('de',\): needs py3langid"):
        config(languages=("de",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    config(languages=("de",), near_duplicates=0.8)


@pytest.mark.parametrize("threshold", [0.036, 0.3, 0.5, 0.77, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("permutations", [16, 128])
def test_bands_have_the_most_rows_that_find_the_pairs_at_the_threshold(threshold, permutations):
    def found(rows):
        return 1 - (1 - threshold**rows) ** (permutations // rows)

    good = [rows for rows in range(1, permutations // 2 + 1) if found(rows) >= 0.99]
    if good:
        assert bands_for(threshold, permutations) == (permutations // max(good), max(good))
    else:
        with pytest.raises(ConfigError, match="too low for MinHash to find; use"):
            bands_for(threshold, permutations)


def test_the_hash_of_a_band_is_of_its_own_rows():
    signatures = np.random.default_rng(0).integers(0, 2**32, (4, 10), dtype=np.uint32)
    for band, hashes in enumerate(band_hashes(signatures, 3, 3).tolist()):
        for signature, told in zip(signatures.tolist(), hashes, strict=True):
            value = 0
            for number in signature[3 * band : 3 * band + 3]:
                value = (value ^ number) * 0x9E3779B97F4A7C15 % WHOLE
                value ^= value >> 29
            assert told == value


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 25), kinds=st.integers(1, 4), pairs=st.sampled_from([1, 3, 1 << 16]))
def test_groups_are_those_that_pairs_of_equal_bands_join(seed, n, kinds, pairs):
    """Of all documents of one hash each is compared with the one before it and with the first."""
    rng = np.random.default_rng(seed)
    bands, signatures = rng.integers(0, kinds, (3, n)).astype(np.uint64), rng.integers(0, 2, (n, 4), dtype=np.uint32)
    group = list(range(n))
    for band in bands.tolist():
        for value in set(band):
            same = [number for number in range(n) if band[number] == value]
            for before, number in [*pairwise(same), *((same[0], number) for number in same[1:])]:
                if (signatures[before] == signatures[number]).mean() >= 0.75:
                    joined = {group[before], group[number]}
                    group = [min(joined) if each in joined else each for each in group]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_PAIRS", pairs)
        assert near_duplicates(lambda number: bands[number], 3, lambda numbers: signatures[numbers], n, 0.75).tolist() == group


def test_rows_of_shards_are_read_as_those_of_one():
    whole = np.random.default_rng(0).integers(0, 99, (20, 3), dtype=np.uint32)
    read = Shards([whole[:7], whole[7:7], whole[7:12], whole[12:]])
    numbers = np.array([19, 0, 6, 7, 11, 12, 7, 3])
    assert read(numbers).tolist() == whole[numbers].tolist()
    assert read(numbers).dtype == np.uint32


def plain_runs(hashes, n):
    found = []
    for at in range(len(hashes) - n + 1):
        total = 0
        for value in hashes[at : at + n]:
            total = (total * 0x9E3779B97F4A7C15 + value) % WHOLE
        total ^= total >> 32
        found.append(total * 0xD6E8FEB86659FD93 % WHOLE)
    return found


def test_words_and_their_runs_have_stable_hashes(monkeypatch):
    monkeypatch.setattr(scores, "_KNOWN", 2)
    hashes, words = WordHashes(), ["a", "b", "c", "a", "d", "e", "é", "a"]
    expected = [int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in words]
    for _ in range(3):  # forgotten in between, and the same again
        assert hashes(words).tolist() == expected
        assert len(hashes._known) == 6
    hashes(["x"])
    assert len(hashes._known) == 1
    for n in (1, 3, 8, 9):
        assert _runs(np.array(expected, np.uint64), n).tolist() == plain_runs(expected, n)


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.text("ab \n", max_size=40), max_size=6))
def test_long_lines_are_cut_at_the_last_space_that_fits(pieces):
    lines = []
    for line in "".join(pieces).split("\n"):
        while len(line) > 8:
            space = line[:8].rfind(" ")
            lines.append(line[: space + 1 if space > 0 else 8])
            line = line[len(lines[-1]) :]
        lines.append(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_LINE", 8)
        assert list(_lines(pieces)) == lines


TEXTS = [
    "", "One two.\n\nthree", "same line\nother\n same line \n--\n--\nsame line", "a b c d e f g h i j " * 3 + "k", "x " * 9,
    "x " * 10, "Click here now\nplain words here", "Lorem Ipsum " + "word " * 80 + "\nmore of it\n", "日月 moon\n日月", "  \n ",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TEXTS)))
@pytest.mark.parametrize("at_once", [1, 4, 1 << 16])
def test_scores_are_those_of_plain_counting(monkeypatch, number, at_once):
    """However few words are hashed together."""
    monkeypatch.setattr(scores, "_WORDS", at_once)
    text = TEXTS[number]
    lines = [line.strip() for line in text.split("\n") if re.search(r"\w", line)]
    words = re.findall("[日月]|[^\\W日月]+", text.lower())
    stretches = [tuple(words[at : at + 10]) for at in range(len(words) - 9)]
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    packed = len(packer.compress(text.encode()) + packer.flush())
    size = sum(map(len, lines)) or 1
    suspect = sum(min(300, len(line)) for line in lines if re.search("click here|lorem ipsum", line.lower()))
    told = measure([text], WordHashes(), signature=False)
    assert (told.characters, told.words, told.signature) == (len(text), len(words), None)
    assert told.gzip_ratio == packed / max(1, len(text.encode()))
    assert told.repeated_lines == sum(len(line) for at, line in enumerate(lines) if line in lines[:at]) / size
    assert told.boilerplate == suspect / size
    assert told.repeated_words == pytest.approx(1 - len(set(stretches)) / len(stretches) if stretches else 0)
    spaced = "".join(" ".join([*line.split(), ""]) for line in text.split("\n"))
    assert told.digest == hashlib.blake2b(spaced.encode(), digest_size=16).digest()


def test_a_signature_is_the_least_of_each_permutation_over_the_shingles_of_five_words(monkeypatch):
    rensa = pytest.importorskip("rensa")
    hashes = WordHashes()
    for text in ("one two three", "one two three four five", " ".join(f"w{n % 13}" for n in range(60))):
        words = hashes(text.split()).tolist()
        shingles = np.unique(np.array(plain_runs(words, min(5, len(words))), np.uint64))
        rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], 128, 1).to_rows()
        for at_once in (3, 7, 1 << 16):
            monkeypatch.setattr(scores, "_WORDS", at_once)
            told = measure([text[:20], text[20:]], hashes, signature=True).signature
            assert told.tolist() == list(rows[0])
    assert measure([""], hashes, signature=True).signature.tolist() == [2**32 - 1] * 128


def job(tmp_path, texts, **changes):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    parts = split_file(str(tmp_path / "a.jsonl"), "jsonl", 1 << 20)
    return CurateJob(number=3, parts=tuple(parts), directory=str(tmp_path), config=config(**changes))


def test_a_shard_tells_where_it_is_and_what_it_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_TOLD", 2)
    now, told = job(tmp_path, ["a b c"] * 5), []

    def progress(*step):
        told.append((*step, now.place().removeprefix(f"{tmp_path}/")))

    assert now.load() is None
    report = now.run(progress)
    size = (tmp_path / "a.jsonl").stat().st_size
    assert told == [(10, 2, 10, "a.jsonl:2"), (10, 2, 10, "a.jsonl:4"), (size - 20, 1, 5, "a.jsonl:4")]
    assert now.n_bytes == size
    assert now.place() == str(tmp_path / "a.jsonl")
    assert report.totals() == (5, 25)
    assert sorted(path.name for path in tmp_path.glob("shard-*")) == [
        f"shard-000003.{kind}" for kind in ("json", "rows.npy", "text")
    ]
    assert now.load() == report


def test_documents_at_a_limit_stay_and_beyond_it_go(tmp_path):
    texts = ["x" * 9, "y" * 10, "z" * 20, "v" * 21, "same line\nlonger one\nsame line", 'é "q" \\ 🎉 words', "  ", "w" * 15]
    limits = {"min_length": 10, "max_length": 20, "max_repeated_lines": 9 / 28}
    now = job(tmp_path, texts, **limits)
    report = now.run(lambda *steps: None)
    assert [(line, rule, why) for _, line, _, rule, why in report.rejected] == [
        (1, "too_short", "9 < 10"), (4, "too_long", "21 > 20"), (5, "too_long", "30 > 20"), (7, "empty", "no text"),
    ]  # fmt: skip
    assert [characters for _, _, characters, _, _ in report.rejected] == [9, 21, 30, 0]
    assert report.totals() == (8, sum(map(len, texts)) - 2)
    rows, raw = np.load(now.path("rows.npy")), now.path("text").read_bytes()
    read = [json.loads(raw[row["start"] : row["start"] + row["n_bytes"]] + b"}")["text"] for row in rows]
    assert read == [texts[1], texts[2], texts[5], texts[7]]
    assert rows["length"].tolist() == rows["characters"].tolist() == [10, 20, len(texts[5]), 15]
    assert rows["line"].tolist() == [2, 3, 6, 8]
    less = job(tmp_path, texts, **(limits | {"max_repeated_lines": 9 / 28 - 1e-9, "max_length": None})).run(lambda *steps: None)
    assert [(line, rule) for _, line, _, rule, _ in less.rejected] == [(1, "too_short"), (5, "repeated_lines"), (7, "empty")]


def test_the_language_is_that_of_the_first_words(tmp_path, monkeypatch):
    seen = []
    langid = SimpleNamespace(classify=lambda text: seen.append(text) or ("de" if "ich" in text else "en", 0))
    monkeypatch.setitem(sys.modules, "py3langid.langid", langid)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    now = job(tmp_path, ["das bin ich " * 500, "that is me"], languages=("de",), max_repeated_words=1)
    report = now.run(lambda *steps: None)
    assert [(line, rule, why) for _, line, _, rule, why in report.rejected] == [(2, "language", "en")]
    assert seen == [("das bin ich " * 500)[:4000], "that is me"]
