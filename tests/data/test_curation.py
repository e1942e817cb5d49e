"""`curate`: every document is taken or listed, planted duplicates are found, and long documents come together in order."""

import json
import random

import numpy as np
import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curation import run as running
from nemo_longctx.data.curation.assemble import Piece, _paths_of, assembled, import_order, in_order, thread_order
from nemo_longctx.data.curation.config import CurateConfig
from nemo_longctx.data.curation.duplicates import bands_for, first_of_equal, near_duplicates
from nemo_longctx.data.curation.grouping import _placer
from nemo_longctx.data.curation.scores import WordHashes, measure
from nemo_longctx.data.engines import ENGINES

pytest.importorskip("rensa")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Shards are judged in this process: starting others takes seconds."""
    monkeypatch.setitem(ENGINES, "processes", lambda jobs, progress, *, workers: ((job, job.run(progress)) for job in jobs))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows))
    return path


def run(folder, inputs, **options):
    inputs = inputs if isinstance(inputs, list) else [inputs]
    config = CurateConfig(inputs=tuple(map(str, inputs)), output=str(folder / "out.jsonl"), **options)
    return running.curate(config, say=lambda line: None, progress=lambda n_bytes: lambda *steps: None)


def kept(folder, name="out.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def listed(folder):
    return [line.split("\t") for line in (folder / "out.rejected.tsv").read_text("utf-8").splitlines()]


def prose(rng, n):
    words = [f"w{rng.randrange(4000)}" for _ in range(n)]
    return " ".join(word + (".\n" if rng.random() < 0.06 else "") for word in words)


def changed(rng, text, share):
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(1, int(share * len(words)))):
        words[place] = f"x{rng.randrange(10**6)}"
    return " ".join(words)


def test_what_was_taken_is_told_where_there_is_a_choice(tmp_path):
    def said_of(names, inputs):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        for name in names:
            write_rows(folder / name, [f"{name}: " + prose(random.Random(1), 60)])
        said = []
        config = CurateConfig(inputs=tuple(str(folder / each) for each in inputs), output=str(folder / "out.jsonl"))
        running.curate(config, say=said.append, progress=lambda n_bytes: lambda *steps: None)
        return [line for line in said if "taken" in line]

    assert said_of(["a.jsonl"], ["a.jsonl"]) == []
    assert len(said_of(["a.jsonl", "b.jsonl"], ["."])) == 1


def test_planted_duplicates_are_found_and_nothing_else(tmp_path):
    rng = random.Random(1)
    texts = [prose(rng, rng.randint(100, 500)) for _ in range(200)]
    exact = [text.replace(" ", "  ") + "\n" for text in texts[:40]]
    near = [changed(rng, text, 0.01) for text in texts[40:100]]  # a Jaccard similarity of 0.90
    far = [changed(rng, text, 0.15) for text in texts[100:150]]  # of some 0.28
    made = run(tmp_path, write_rows(tmp_path / "a.jsonl", texts + exact + near + far), shard_bytes=60_000)
    assert made["rejected"]["exact_duplicate"]["documents"] == 40
    found = {where for where, _, rule, _ in listed(tmp_path) if rule == "near_duplicate"}
    planted = {f"{tmp_path / 'a.jsonl'}:{number}" for number in range(241, 301)}
    assert len(found & planted) >= 0.97 * len(planted)  # recall
    assert found <= planted  # precision
    of = {where: why for where, _, rule, why in listed(tmp_path) if rule.endswith("duplicate")}
    assert all(why == f"of {tmp_path / 'a.jsonl'}:{int(where.rpartition(':')[2]) - 200}" for where, why in of.items())


def test_every_document_is_taken_or_listed_by_one_rule(tmp_path):
    rng = random.Random(2)
    rows = [prose(rng, 200) for _ in range(30)]
    rows += [
        "the same line again\n" * 100,
        "one two three four five six seven eight nine ten eleven " * 40,
        "",
        "  \n",
        {"text": 3},
    ]
    rows += ["Click here. All rights reserved.\nbuy", "short", rows[0], prose(rng, 9000)]
    write_rows(tmp_path / "a.jsonl", rows)
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"text": "half \xff"}\nno json\n')
    made = run(tmp_path, tmp_path / "a.jsonl", min_length=10, max_length=20_000)
    counts = {rule: counts["documents"] for rule, counts in made["rejected"].items()}
    expected = {"repeated_lines": 1, "repeated_words": 1, "empty": 2, "bad_record": 3, "boilerplate": 1, "too_short": 1}
    assert counts == expected | {"too_long": 1, "exact_duplicate": 1}
    assert made["documents"] == len(rows) + 2 == made["kept"]["documents"] + len(listed(tmp_path))
    assert [row["text"] for row in kept(tmp_path)] == rows[:30]
    assert [row["source"] for row in kept(tmp_path)] == [f"{tmp_path / 'a.jsonl'}:{n}" for n in range(1, 31)]
    assert sum(row["documents"] for row in made["lengths"]) == 30


def test_length_buckets_and_the_gzip_band(tmp_path):
    rng = random.Random(3)
    plain = [prose(rng, 100 if number % 2 else 1000) for number in range(60)]
    write_rows(tmp_path / "a.jsonl", plain)
    made = run(tmp_path, tmp_path / "a.jsonl", split_lengths=(2000,), gzip_band=(0.1, 0.9))
    short, long = kept(tmp_path, "out.0-2000.jsonl"), kept(tmp_path, "out.2000-.jsonl")
    assert all(row["length"] < 2000 for row in short)
    assert all(row["length"] >= 2000 for row in long)
    dropped = made["rejected"]["gzip_band"]["documents"]
    assert len(short) + len(long) + dropped == 60
    assert 8 <= dropped <= 16  # a tenth at each end of each doubling
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_that_was_stopped_goes_on_and_an_output_that_is_there_stays(tmp_path, monkeypatch):
    rng = random.Random(4)
    write_rows(tmp_path / "a.jsonl", [prose(rng, 100) for _ in range(200)])
    options = {"shard_bytes": 20_000}
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole", tmp_path / "a.jsonl", **options)

    def stops(jobs, progress, *, workers):
        for job in list(jobs)[:3]:
            yield job, job.run(progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "processes", stops)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tmp_path / "a.jsonl", **options)
    judged = []

    def counted(jobs, progress, *, workers):
        for job in jobs:
            judged.append(job.number)
            yield job, job.run(progress)

    monkeypatch.setitem(ENGINES, "processes", counted)
    run(tmp_path, tmp_path / "a.jsonl", **options)
    assert min(judged) == 3
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole/out.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.work").exists()
    judged.clear()
    run(tmp_path, tmp_path / "a.jsonl", **options)
    assert not judged
    with pytest.raises(ConfigError, match=r"something else is there \(made with another min_length\); .* with --force"):
        run(tmp_path, tmp_path / "a.jsonl", min_length=3, **options)
    assert run(tmp_path, tmp_path / "a.jsonl", min_length=3, force=True, **options)["settings"]["min_length"] == 3


def test_a_run_that_was_stopped_while_it_published_goes_on(tmp_path, monkeypatch):
    rng = random.Random(7)
    write_rows(tmp_path / "a.jsonl", [prose(rng, 100) for _ in range(20)])

    def stops(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "write_text", stops)  # of the report, the last of all
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tmp_path / "a.jsonl")
    assert (tmp_path / "out.jsonl").exists()
    assert run(tmp_path, tmp_path / "a.jsonl")["kept"]["documents"] == 20
    assert len(kept(tmp_path)) == 20
    assert not (tmp_path / "out.jsonl.work").exists()


@pytest.mark.parametrize("step", [997, 50_000])
def test_scores_do_not_depend_on_how_a_text_is_cut(step):
    rng = random.Random(5)
    text = prose(rng, 3000) + "\n" + prose(rng, 200) * 3 + " ".join(["long"] * 40_000)
    whole = measure([text], WordHashes(), signature=True)
    cut = measure([text[at : at + step] for at in range(0, len(text), step)], WordHashes(), signature=True)
    assert np.array_equal(whole.signature, cut.signature)
    for name in ("characters", "words", "digest", "repeated_lines", "repeated_words", "boilerplate"):
        assert getattr(whole, name) == getattr(cut, name), name
    assert whole.gzip_ratio == pytest.approx(cut.gzip_ratio, rel=0.02)


def test_scripts_without_spaces_have_words(tmp_path):
    one = measure(["天地玄黃宇宙洪荒日月盈昃辰宿列張" * 5], WordHashes(), signature=True)
    assert one.words == 80
    assert one.repeated_words > 0.5


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_meet_the_pairs_at_the_threshold(threshold):
    bands, rows = bands_for(threshold, 128)
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    assert bands * rows <= 128


def test_groups_hang_together_by_verified_pairs_only():
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (50, 128), dtype=np.uint32)
    signatures[7] = signatures[3]
    signatures[9] = np.where(rng.random(128) < 0.9, signatures[7], signatures[9])
    bands = rng.integers(0, 4, (5, 50)).astype(np.uint64)  # nearly all collide
    bands[:, [3, 7, 9]] = 9
    first = near_duplicates(lambda number: bands[number], 5, lambda numbers: signatures[numbers], 50, 0.8)
    assert first[[3, 7, 9]].tolist() == [3, 3, 3]
    assert (first == np.arange(50)).sum() == 48
    assert first_of_equal(np.array([b"b", b"a", b"b"])).tolist() == [0, 1, 0]


def test_files_of_a_repository_follow_what_they_import(tmp_path):
    files = {
        "pkg/app.py": "from pkg.models import thing\nimport pkg.util as u\nimport numpy",
        "pkg/models/__init__.py": "from .thing import *",
        "pkg/models/thing.py": "from ..util import helper",
        "pkg/util.py": "import os",
        "src/a.c": '#include "a.h"\n#include <stdio.h>',
        "src/a.h": "",
        "web/main.ts": "import {x} from './lib'",
        "web/lib/index.js": "require('../main')",  # a circle
    }
    order = import_order(files)
    assert sorted(order) == sorted(files)
    at = order.index
    assert at("pkg/util.py") < at("pkg/models/thing.py") < at("pkg/models/__init__.py") < at("pkg/app.py")
    assert at("src/a.h") < at("src/a.c")
    assert at("web/lib/index.js") < at("web/main.ts")
    deep = {f"m{number}.py": f"import m{number + 1}" for number in range(5000)}
    assert import_order(deep)[0] == "m4999.py"
    for path, text in files.items():
        where = tmp_path / "repos/one" / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text + "\n# " + prose(random.Random(len(path)), 30))
    (tmp_path / "repos/two").mkdir()
    (tmp_path / "repos/two/x.py").write_text("print(1) # alone here")
    made = run(tmp_path, tmp_path / "repos", assemble="repositories")
    rows = {row["source"]: row["text"] for row in kept(tmp_path)}
    assert set(rows) == {"one", "two"}
    assert made["documents"] == 2
    assert rows["one"].index("# pkg/util.py\n") < rows["one"].index("# pkg/app.py\n")


def test_chapters_come_in_the_order_that_people_count(tmp_path):
    names = ["ch10", "ch2", "ch1", "preface"]
    pieces = [Piece(text=name, order=name, number=number) for number, name in enumerate(names)]
    assert [piece.text for piece in in_order(pieces)] == ["ch1", "ch2", "ch10", "preface"]
    rng = random.Random(6)
    chapters = [{"book": f"b{n % 2}", "chapter": n // 2, "text": f"Chapter {n // 2}. {prose(rng, 20)}"} for n in range(24)]
    rng.shuffle(chapters)
    run(tmp_path, write_rows(tmp_path / "a.jsonl", [*chapters, {"book": "b0", "chapter": 99, "text": ""}]), assemble="chapters")
    assert sorted(row["source"] for row in kept(tmp_path)) == ["b0", "b1"]
    for row in kept(tmp_path):
        places = [row["text"].index(f"Chapter {number}.") for number in range(12)]
        assert places == sorted(places)
    assert [rule for _, _, rule, _ in listed(tmp_path)] == ["empty"]
    write_rows(tmp_path / "b.jsonl", [{"text": "no group"}])
    with pytest.raises(ConfigError, match=r"b.jsonl:1.*'book'.*--group"):
        run(tmp_path, tmp_path / "b.jsonl", assemble="chapters", force=True)


@pytest.mark.parametrize(
    ("inputs", "path", "placed"),
    [
        (
            ("repos/", "repos/team"),
            "repos/team/lib/src/a.py",
            ("lib", "src/a.py"),
        ),  # by the nearest input, whatever their order
        (("repos/team", "repos/"), "repos/team/lib/src/a.py", ("lib", "src/a.py")),
        (("repos/", "repos/team"), "repos/one/a.py", ("one", "a.py")),
        (("repos",), "repos/a.py", ("repos", "a.py")),
        (("checkout",), "checkout/src/a.py", ("checkout", "src/a.py")),  # which is a repository itself
    ],
)
def test_a_file_belongs_to_the_first_folder_below_its_input(tmp_path, monkeypatch, inputs, path, placed):
    (tmp_path / "checkout" / ".git").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert _placer(CurateConfig(inputs=inputs, output="o.jsonl", assemble="repositories"))(path) == placed
    folder, _, name = path.rpartition("/")
    assert _placer(CurateConfig(inputs=inputs, output="o.jsonl", assemble="chapters"))(path) == (folder, name)


def test_answers_follow_what_they_answer():
    rows = [("d", None, 9), ("b", "a", 3), ("a", None, 1), ("c", "b", 4), ("e", "a", 2), ("lost", "gone", 8), ("x", "y", 5)]
    rows.append(("y", "x", 6))  # two that answer each other
    pieces = [Piece(text=n, order=t, number=i, name=n, parent=p) for i, (n, p, t) in enumerate(rows)]
    order = [piece.text for piece in thread_order(pieces)]
    assert sorted(order) == sorted(name for name, *_ in rows)
    assert order[:4] == ["a", "e", "b", "c"]
    assert order.index("lost") < order.index("d")
    chain = [Piece(text=str(n), order=-n, number=n, name=n, parent=n - 1 if n else None) for n in range(3000)]
    assert assembled("threads", chain).split() == [str(n) for n in range(3000)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "x.json"}, "ends in .jsonl"),
        ({"output": "s3://bucket/x.jsonl"}, "object storage"),
        ({"near_duplicates": 0.01}, "too low"),
        ({"near_duplicates": 1.5}, "a similarity"),
        ({"gzip_band": (0.8, 0.2)}, "two quantiles"),
        ({"split_lengths": (5, 3)}, "rising order"),
        ({"assemble": "books"}, "chapters"),
        ({"group": "x"}, "--assemble"),
        ({"assemble": "chapters", "parent": "x"}, "threads"),
        ({"max_boilerplate": 2.0}, "share"),
        ({"min_length": 9, "max_length": 3}, "min_length"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        CurateConfig(**{"inputs": ("a",), "output": "x.jsonl"} | options)


@pytest.mark.parametrize(
    ("kind", "named", "path", "means"),
    [
        (".py", "a.b.c", "x/y.py", ["a/b/c", "a/b", "a"]),
        (".py", ".c", "x/y.py", ["x/c", "x"]),
        (".py", "..c.d", "x/z/y.py", ["x/c/d", "x/c", "x"]),
        (".py", "..c", "y.py", ["c"]),
        (".py", ".", "y.py", []),
        (".java", "a.b.C", "x/Y.java", ["a/b/C", "a/b"]),
        (".js", "./c.js", "x/y.js", ["x/c.js", "x/c"]),
        (".js", "../c", "x/y.js", ["c", "c"]),
        (".c", "c.h", "x/y.c", ["x/c.h", "x/c", "c.h"]),
        (".c", "a/c.h", "x/y.c", ["a/c.h"]),
        (".rs", "c", "x/y.rs", ["c"]),
    ],
)
def test_an_import_means_the_files_of_its_language(kind, named, path, means):
    assert list(_paths_of(kind, named, path)) == means


def test_a_band_that_few_documents_are_too_few_for_is_told(tmp_path):
    """Of small inputs `--gzip-band` kept every document, and said nothing."""
    rng, said = random.Random(3), []
    write_rows(tmp_path / "a.jsonl", [prose(rng, 100) for _ in range(25)] + [prose(rng, 1000) for _ in range(19)])
    config = CurateConfig(inputs=(str(tmp_path / "a.jsonl"),), output=str(tmp_path / "out.jsonl"), gzip_band=(0.2, 0.8))
    made = running.curate(config, say=said.append, progress=lambda n_bytes: lambda *steps: None)
    assert made["rejected"]["gzip_band"]["documents"] == 10
    assert [line for line in said if line.startswith("--gzip-band leaves 19 documents as they are: fewer than 20")]


def test_what_is_in_the_way_of_an_output_is_told(tmp_path):
    write_rows(tmp_path / "a.jsonl", ["one", "two"])
    run(tmp_path, tmp_path / "a.jsonl", near_duplicates=0)
    write_rows(tmp_path / "a.jsonl", ["one", "two", "three"])
    with pytest.raises(ConfigError, match=r"something else is there \(its input has changed since\); name"):
        run(tmp_path, tmp_path / "a.jsonl", near_duplicates=0)
    with pytest.raises(ConfigError, match=r"\(made with another keys and another max_length\); name"):
        run(tmp_path, tmp_path / "a.jsonl", near_duplicates=0, max_length=9, keys=("text", "title?"))
    (tmp_path / "out.report.json").unlink()
    with pytest.raises(ConfigError, match="something else is there; name"):
        run(tmp_path, tmp_path / "a.jsonl", near_duplicates=0)
