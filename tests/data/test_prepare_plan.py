"""What `prepare` plans and counts without a tokenizer: settings, keys of its caches, cuts of its input, batches, shares."""

import dataclasses
import hashlib
import json
import os
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.data import engines, merge, prepare, prepare_tokenizer, readers, shards
from nemo_longctx.data.inputs import Found
from nemo_longctx.data.prepare_config import PrepareConfig
from nemo_longctx.data.readers import Part, lines_before, split_file, split_files
from nemo_longctx.data.shards import ShardJob, ShardReport, is_held_out, load_report
from nemo_longctx.data.tokenization import TokenizerInfo

TOKENIZER = TokenizerInfo(name="t", definition="{}", vocab_size=9, eod_token="e", eod_id=1, bos_token="b", bos_id=2)


def config(**changes):
    return PrepareConfig(**{"inputs": ("a.jsonl",), "output": "c", "tokenizer": "t", **changes})


def test_settings_by_default_and_at_their_bounds():
    plain = config()
    defaults = {"keys": ("text",), "globs": (), "format": "auto", "bos": False, "append_eod": True, "on_error": "fail"}
    defaults |= {"replace_invalid": False, "holdout": 0.0, "seed": 1234, "engine": "processes", "keep_shards": False}
    assert {key: getattr(plain, key) for key in defaults} == defaults
    assert (plain.force, plain.workers, plain.shard_bytes, plain.eod_token) == (False, None, None, None)
    for good in (
        {"workers": 1, "shard_bytes": 1, "max_input_bytes": 1, "max_file_bytes": 1}, {"holdout": 0.999}, {"seed": 0},
        {"seed": 2**63 - 1}, {"train_tokenizer": 300, "train_tokenizer_bytes": 1}, {"eod_token": "x"}, {"append_eod": False},
        {"keys": ("a", "b?")}, {"output": "x/c"}, {"output": "c/", "keep_shards": True},
    ):  # fmt: skip
        config(**good)
    for bad, told in [
        ({"format": "jsnol"}, "did you mean 'json"), ({"on_error": "skipp"}, "did you mean 'skip'"),
        ({"engine": "rays"}, "did you mean 'ray'"), ({"workers": 0}, "workers=0: use 1 or more"),
        ({"max_input_bytes": 0}, "max_input_bytes=0: use 1"), ({"max_file_bytes": 0}, "max_file_bytes=0: use 1"),
        ({"shard_bytes": 0}, "shard_bytes=0: use 1"), ({"train_tokenizer": 300, "train_tokenizer_bytes": 0}, "bytes=0: use 1"),
        ({"holdout": 1}, "holdout=1: a share"), ({"holdout": -0.1}, "holdout=-0.1: a share"), ({"seed": -1}, "seed=-1: use"),
        ({"seed": 2**63}, "seed=9223372036854775808: use a number"), ({"inputs": ()}, r"^input=\(\): name at least one"),
        ({"keys": ()}, r"^keys=\(\): name at least one"), ({"keys": ("a", " ")}, "a name between commas"),
        ({"keys": ("a", "a")}, "a key is named twice"), ({"train_tokenizer": 3}, "train_tokenizer=3"),
        ({"append_eod": False, "eod_token": "x"}, "eod_token='x': it is not appended"), ({"output": "c.idx"}, "name it 'c'"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            config(**bad)


def test_a_plan_has_all_that_changes_a_byte_of_the_output(tmp_path):
    files = [tmp_path / name for name in ("a", "b")]
    for path in files:
        path.write_text("x" * 10)
    parts = [Part(path=str(path), format="jsonl", start=0, stop=10, n_bytes=10) for path in files]
    base = config(keys=("k",), holdout=0.1)
    cases = {"same": (base, [parts], TOKENIZER)}
    for name, changes in {
        "keys": {"keys": ("l",)}, "replace": {"replace_invalid": True}, "holdout": {"holdout": 0.2}, "seed": {"seed": 5},
        "bos": {"bos": True}, "eod": {"append_eod": False}, "shards": {"keep_shards": True},
    }.items():  # fmt: skip
        cases[name] = (dataclasses.replace(base, **changes), [parts], TOKENIZER)
    cases |= {"cut": (base, [[part] for part in parts], TOKENIZER), "order": (base, [parts[::-1]], TOKENIZER)}
    cases["range"] = (base, [[dataclasses.replace(parts[0], stop=9), parts[1]]], TOKENIZER)
    for name, changes in {"definition": {"definition": "[]"}, "eod_id": {"eod_id": 3}}.items():
        cases[name] = (base, [parts], dataclasses.replace(TOKENIZER, **changes))
    plans = {name: prepare._plan_hash(*case) for name, case in cases.items()}
    assert len(set(plans.values())) == len(plans)
    for free in ({"workers": 3}, {"force": True}, {"on_error": "skip"}, {"max_input_bytes": 99}, {"output": "d"}):
        assert prepare._plan_hash(dataclasses.replace(base, **free), [parts], TOKENIZER) == plans["same"]
    unused = dataclasses.replace(TOKENIZER, bos_id=7)  # it begins no document
    assert prepare._plan_hash(base, [parts], unused) == plans["same"]
    os.utime(files[0], ns=(1, 1))
    assert prepare._plan_hash(base, [parts], TOKENIZER) != plans["same"]


def test_jobs_are_what_the_settings_ask_and_a_run_of_another_plan_is_dropped(tmp_path):
    said, parts = [], [Part(path="a", format="jsonl", start=0, stop=9, n_bytes=9)]
    told = dataclasses.replace(TOKENIZER, plain_added={7: "x", 5: "y"})
    base = config(holdout=0.25, keys=("k",), seed=3)
    (job, other) = prepare._jobs(base, [parts, parts], told, tmp_path, "plan", said.append)
    assert (job.number, other.number, job.parts, job.directory) == (0, 1, tuple(parts), str(tmp_path))
    assert (job.keys, job.bos_id, job.eod_id, job.dtype, job.skip_bad, job.replace) == (("k",), None, 1, "uint16", False, False)
    assert (job.holdout, job.seed, job.watched) == (0.25, 3, (7, 5))
    more = dataclasses.replace(base, bos=True, append_eod=False, on_error="skip", replace_invalid=True)
    wide = dataclasses.replace(told, vocab_size=70_000)
    (tmp_path / "train" / "x").write_text("done")
    (job,) = prepare._jobs(more, [parts], wide, tmp_path, "plan", said.append)
    assert (job.bos_id, job.eod_id, job.dtype, job.skip_bad, job.replace) == (2, None, "int32", True, True)
    assert (tmp_path / "train" / "x").exists()
    assert said == []
    prepare._jobs(base, [parts], told, tmp_path, "another", said.append)
    assert said == ["an unfinished run with other settings or other input was here; starting again"]
    assert not list((tmp_path / "train").iterdir())
    assert ((tmp_path / "plan").read_text(), (tmp_path / "tokenizer.json").read_text()) == ("another", "{}")


def test_what_differs_from_what_is_there_is_named_setting_by_setting():
    base, told = config(holdout=0.1), dataclasses.replace(TOKENIZER, definition="[]")
    made = json.loads(json.dumps(prepare._settings(base, TOKENIZER)))
    assert made["tokenizer"] == {
        "name": "t", "sha256": hashlib.sha256(b"{}").hexdigest(), "vocab_size": 9, "bos_token": None, "bos_id": None,
        "eod_token": "e", "eod_id": 1,
    }  # fmt: skip
    both = prepare._settings(dataclasses.replace(base, bos=True, append_eod=False), TOKENIZER)["tokenizer"]
    assert [both[key] for key in ("bos_token", "bos_id", "eod_token", "eod_id")] == ["b", 2, None, None]
    unchanged = " (its inputs have changed since, or its shards have another size)"
    for changes, tokenizer, merged, said in [
        ({}, TOKENIZER, True, unchanged), ({}, told, True, " (another tokenizer)"),
        ({}, TOKENIZER, False, " (another keep_shards)"),
        ({"bos": True}, TOKENIZER, True, " (another bos)"), ({"append_eod": False}, TOKENIZER, True, " (another eod)"),
        ({"seed": 1, "inputs": ("b",)}, TOKENIZER, True, " (another seed, another inputs)"),
        ({"keys": ("k",), "holdout": 0.2}, TOKENIZER, True, " (another keys, another holdout)"),
        ({"keep_shards": True}, TOKENIZER, False, unchanged),
    ]:  # fmt: skip
        assert prepare._differs(dataclasses.replace(base, **changes), tokenizer, made, merged=merged) == said
    assert prepare._differs(base, TOKENIZER, {}, merged=True) == ", without the report of how it was made"


@pytest.mark.parametrize("limit", [1, 10, 35, 60, 10**6])
def test_a_sample_of_files_is_drawn_until_it_is_full_and_keeps_their_order(limit):
    sizes = {f"f{n}": 5 + 3 * n for n in range(9)}
    order = np.random.default_rng(7).permutation(9).tolist()
    chosen, total = [], 0
    for number in order:
        total += sizes[f"f{number}"]
        if total > limit:
            break
        chosen.append(number)
    assert prepare._sample_files(list(sizes), sizes, limit, 7) == [f"f{n}" for n in sorted(chosen or order[:1])]


def test_added_tokens_are_told_with_five_examples():
    for n, more in ((5, ""), (6, ", ...")):
        said = []
        prepare._tell_plain_added(dataclasses.replace(TOKENIZER, plain_added={k: f"t{k}" for k in range(n)}), said.append)
        assert said[0].startswith(
            f"{n} added tokens of the tokenizer are not special: 't0', 't1', 't2', 't3', 't4'{more}; where"
        )
    said = []
    prepare._tell_plain_added(TOKENIZER, said.append)
    assert said == []


def test_files_over_a_size_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "find_files", lambda *a, **k: Found(files=["a", "b", "c"]))
    monkeypatch.setattr(prepare, "size_of", {"a": 5, "b": 6, "c": 7}.__getitem__)
    found = prepare._find(config(max_file_bytes=6), "c")
    assert (found.files, found.passed_over) == (["a", "b"], {"c": "too large"})
    with pytest.raises(ConfigError, match="max_file_bytes=4: every file is larger, the smallest has 5 bytes; allow"):
        prepare._find(config(max_file_bytes=4), "c")


@settings(max_examples=40, deadline=None)
@given(fraction=st.sampled_from([0, 0.25, 0.5, 0.999]), seed=st.integers(0, 2**63 - 1), text=st.text("aé🎉 \n", max_size=9))
def test_a_document_is_held_out_by_a_keyed_hash_of_its_text(fraction, seed, text):
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    assert is_held_out(text, fraction, seed) == (int.from_bytes(digest, "little") / 2**64 < fraction)


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def job_of(parts, directory, **changes):
    plain = {"number": 7, "keys": ("text",), "bos_id": None, "eod_id": None, "dtype": "uint16", "skip_bad": True}
    return ShardJob(
        **plain | {"replace": False, "holdout": 0.0, "seed": 1, "directory": str(directory), **changes}, parts=tuple(parts)
    )


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(0, 14), max_size=9), min_size=1, max_size=3), most=st.integers(1, 4))
def test_batches_hold_every_record_once_within_their_bounds(tmp_path_factory, lengths, most):
    """`_batches`: so many characters and documents, a long text alone; what is told adds up to the bytes of the input."""
    folder, parts = tmp_path_factory.mktemp("batches"), []
    for number, each in enumerate(lengths):
        path = jsonl(folder / f"{number}.jsonl", ["x" * n for n in each])
        parts += split_file(str(path), "jsonl", 1 << 20)
    report, expected, batch = ShardReport(), [], []
    for n in (n for each in lengths for n in each if n):
        if batch and (n > 10 or sum(batch) + n > 10 or len(batch) == most):
            expected.append(batch)
            batch = []
        batch.append(n)
        if n > 10:
            expected.append(batch)
            batch = []
    expected += [batch] if batch else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_BATCH", 10)
        patch.setattr(shards, "_BATCH_DOCUMENTS", most)
        found = list(shards._batches(job_of(parts, folder), report))
    assert [[len(each.text) for each in batch] for batch, _ in found if batch] == expected
    assert sum(told for _, told in found) == sum(part.n_bytes for part in parts)
    assert all(told >= 0 for _, told in found)
    empty = [(part.path, at + 1) for part, each in zip(parts, lengths, strict=False) for at, n in enumerate(each) if not n]
    assert len(parts) < len(lengths) or report.empty == empty


def test_a_place_is_that_of_its_part_and_line_and_a_report_is_read_as_it_was_written(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["text"] * 40)
    parts = split_file(str(path), "jsonl", 200)
    job = job_of(parts, tmp_path)
    assert job.n_bytes == path.stat().st_size
    assert job.prefix("train") == f"{tmp_path}/train/shard-000007"
    assert (job.report_path, job.place_path) == (tmp_path / "reports/000007.json", tmp_path / "reports/000007.at")
    assert (job.place(), load_report(job)) == (str(path), None)
    (tmp_path / "reports").mkdir()
    job.place_path.write_text("2 3")
    assert job.place() == f"{path}:{lines_before(parts[2]) + 3}"
    report = ShardReport(bad=[("a", 1, "why")], empty=[("b", 2)], documents={"train": 3, "holdout": 1}, watched={"4": 5})
    report.tokens["train"] = 9
    job.report_path.write_text(json.dumps(dataclasses.asdict(report)))
    assert load_report(job) == report
    assert (report.totals(), ShardReport().totals()) == ((4, 9), (0, 0))
    error = shards.bad_record(parts[1], readers.Record("", 2, "not UTF-8 (x)"))
    assert str(error).startswith(f"input='{path}:{lines_before(parts[1]) + 2}': not UTF-8 (x); write it as UTF-8, have U+FFFD")
    plain = str(shards.bad_record(parts[0], readers.Record("", 2, "no key")))
    assert plain.endswith(":2': no key; mend it, or leave such records out with --on-error skip")


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), shard_bytes=st.integers(1, 4000))
def test_a_file_is_cut_evenly_and_a_compressed_one_is_not(size, shard_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "size_of", lambda path: size)
        patch.setattr(readers, "can_be_cut", lambda path: path == "a.jsonl")
        n = max(1, round(size / shard_bytes))
        cut = split_file("a.jsonl", "jsonl", shard_bytes)
        bounds = [size * at // n for at in range(n + 1)]
        assert [(part.start, part.stop, part.n_bytes) for part in cut] == [
            (low, high, high - low) for low, high in pairwise(bounds)
        ]
        whole = [(0, size, size)]
        for path, kind in (("a.jsonl.gz", "jsonl"), ("a.jsonl", "text")):
            assert [(part.start, part.stop, part.n_bytes) for part in split_file(path, kind, shard_bytes)] == whole


def test_shards_are_consecutive_parts_up_to_their_size(monkeypatch):
    sizes = {"a": 40, "b": 70, "c": 30, "d": 100, "e": 0}
    monkeypatch.setattr(readers, "size_of", sizes.__getitem__)

    def shards_of(names, shard_bytes):
        return ["".join(part.path for part in shard) for shard in split_files(names, "text", shard_bytes)]

    assert shards_of("abcde", 100) == ["a", "bc", "de"]
    assert shards_of("abcde", 110) == ["ab", "c", "de"]
    assert shards_of("abcde", 10**6) == ["abcde"]
    with pytest.raises(ConfigError, match="input='e': all of it is empty; name files that hold text"):
        split_files(["e"], "text", 10)
    asked = []
    monkeypatch.setattr(readers, "split_file", lambda path, kind, target: asked.append((kind, target)) or [])
    for size, target in ((100, 1 << 20), (640 << 20, 10 << 20), (1 << 40, 256 << 20)):
        sizes["x.csv"] = size
        split_files(["x.csv"], "auto", None)
        assert asked.pop() == ("csv", target)


def test_a_shard_that_is_done_is_not_made_again_and_no_more_workers_start_than_shards(monkeypatch):
    began, said, opened = [], [], []

    def engine(jobs, progress, *, workers):
        began.append(([job.number for job in jobs], workers))
        return ((job, f"now {job.number}") for job in jobs[::-1])

    monkeypatch.setitem(engines.ENGINES, "processes", engine)
    monkeypatch.setattr(engines.os, "cpu_count", lambda: 3)
    jobs = [SimpleNamespace(number=number, n_bytes=10**number) for number in range(5)]
    options = {"engine": "processes", "say": said.append, "progress": opened.append}
    done = engines.run_shards(jobs, {1: "before 1"}, workers=None, **options)
    assert done == ["now 0", "before 1", "now 2", "now 3", "now 4"]
    assert (began, said, opened) == ([([0, 2, 3, 4], 3)], ["going on: 1 of 5 shards were finished before"], [11101])
    for workers, reports, expected in ((9, {}, 5), (2, {}, 2), (4, dict.fromkeys(range(5), "x"), 1)):
        engines.run_shards(jobs, reports, workers=workers, **options)
        assert began[-1][1] == expected
    monkeypatch.setattr(engines.os, "cpu_count", lambda: None)
    engines.run_shards(jobs, {}, workers=None, **options)
    assert began[-1][1] == 1


def test_a_tokenizer_is_trained_on_16_mib_or_as_much_as_is_said(tmp_path, monkeypatch):
    trained, said = [], []
    monkeypatch.setattr(prepare_tokenizer, "train_bpe", lambda texts, *rest: trained.append((list(texts), *rest)))
    monkeypatch.setattr(prepare_tokenizer, "trained_with", lambda name: None)
    parts = split_file(str(jsonl(tmp_path / "a.jsonl", ["x" * 10] * 5)), "jsonl", 1 << 20)
    for asked, amount, texts in ((None, 16 << 20, 5), (25, 25, 3), (30, 30, 3), (1, 1, 1)):
        now = config(train_tokenizer=300, train_tokenizer_bytes=asked)
        assert prepare_tokenizer._training_bytes(now) == amount
        wanted = {"vocab_size": 300}
        prepare_tokenizer._train(dataclasses.replace(now), [parts], wanted, said.append)
        size = min(amount, parts[0].n_bytes)
        assert said[-1] == f"training a byte-level BPE of 300 tokens on {size / 1e6:.1f} MB of the input"
        assert trained[-1] == (["x" * 10] * texts, 300, "t", wanted)
    monkeypatch.setattr(prepare_tokenizer, "trained_with", lambda name: {"vocab_size": 300, "bytes": 5, "input": "x"})
    prepare_tokenizer._train(now, [parts], {"vocab_size": 300, "bytes": 5, "input": "x"}, said.append)
    with pytest.raises(ConfigError, match=r"tokenizer='t': a tokenizer trained otherwise is there \(bytes, input differ\)"):
        prepare_tokenizer._train(now, [parts], {"vocab_size": 300, "bytes": 6, "input": "y"}, said.append)
    assert len(trained) == 4


@pytest.mark.parametrize(
    ("share", "tokens", "held"), [(0.1, 160, 16), (0.1, 159, 16), (0.1, 154, 0), (0.9, 160, 144), (0.91, 160, 0)]
)
def test_an_end_is_held_out_where_sixteen_tokens_are_on_both_sides(share, tokens, held):
    made = {"documents": {"holdout": 0}, "tokens": {"train": tokens}, "settings": {"holdout": share}}
    assert merge._from_end(made) == held


def test_files_of_an_output_are_told_from_those_of_others(tmp_path):
    output = str(tmp_path / "c")
    assert merge.output_names("c", False) == {"train": "c"}
    assert list(merge.output_names("c", True).items()) == [("holdout", "c_holdout"), ("train", "c")]
    always = {f"{output}{of}{suffix}" for of in ("", "_holdout")
              for suffix in (".bin", ".idx", ".rejected.tsv", ".lengths.png", ".lengths.csv")}  # fmt: skip
    assert merge.own_files(output) == always
    report = {"tokenizer": {}, "settings": {}, "bad_records": 0}
    for missing in report:
        (tmp_path / "c.json").write_text(json.dumps({key: value for key, value in report.items() if key != missing}))
        assert merge.report_of(output) == {}
    (tmp_path / "c.json").write_text(json.dumps(report))
    assert merge.report_of(output) == report
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "shard-1.bin").write_text("")
    (tmp_path / "c.work").mkdir()
    assert merge.own_files(output) == always | {f"{output}.json", output, f"{output}.work"}
    (tmp_path / "c" / "shard-1.txt").write_text("")
    (tmp_path / "c.work" / "mine").write_text("")
    assert merge.own_files(output) == always | {f"{output}.json"}
    (tmp_path / "c.work" / "lock").write_text("")
    assert merge.own_files(output) == always | {f"{output}.json", f"{output}.work"}
