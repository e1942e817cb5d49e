"""What commands make of their words and print of what was done: studies, curation, votes, sizes."""

import argparse
import json
import types

import pytest

from nemo_longctx.ablation import estimate, runner, study
from nemo_longctx.cli import main
from nemo_longctx.commands import ablate, curate, prepare
from nemo_longctx.config import ConfigError


def test_a_study_is_checked_printed_and_run_by_its_options(monkeypatch, tmp_path, capsys):
    made = []

    class Recorded:
        def __init__(self, of, scale, out, *, text, executor, run):
            made.append((of.name, scale, str(out), text, executor, run is ablate.here))
            self.study, self.scale = of, of.scales[scale]
            self.runs = [
                types.SimpleNamespace(seed=seed, arm=arm, name=f"{arm}, {seed}", recipe=lambda arm=arm: f"recipe of {arm}")
                for seed in (1, 2)
                for arm in ("base", "a")
            ]

        def commands(self):
            return [("data 1", ["prepare", "a b"]), ("base, seed 1", ["train"])]

        def __call__(self):
            return None if self.study.name == "two" else f"page of {self.study.name}"

    hours = types.SimpleNamespace(hours="an hour", seeds=(1, 2))
    known = {
        name: types.SimpleNamespace(name=name, title=name.upper(), scales=scales)
        for name, scales in (
            ("one", {"gpu": hours, "smoke": hours}),
            ("two", {"smoke": types.SimpleNamespace(hours="", seeds=(1,))}),
        )
    }
    monkeypatch.setattr(study, "studies", lambda: ["one", "two"])
    monkeypatch.setattr(study, "load_study", known.__getitem__)
    monkeypatch.setattr(runner, "Runner", Recorded)
    monkeypatch.setattr(estimate, "planned_hours", lambda recipes: dict.fromkeys(recipes, 0.25))
    monkeypatch.setattr(ablate.sysconfig, "get_path", lambda name: f"/site packages/{name}")
    assert main(["ablate", "all", "--scale", "gpu", "--dry-run"]) == 0
    assert made == [("one", "gpu", "runs/ablate/gpu", "'/site packages/purelib'", "", True)]  # the other has no such scale
    assert capsys.readouterr().out.splitlines() == [
        "# ONE", "# takes about an hour",
        "# by the plan, training takes 60 min on one H100; starts and evaluations come on top",
        "prepare 'a b'  # data 1", "train  # base, seed 1",
    ]  # fmt: skip
    made.clear()
    (tmp_path / "my text").mkdir()
    words = ["--text", str(tmp_path / "my text"), "--text", "s3://b/c", "--out", "o", "--executor", "slurm"]
    assert main(["ablate", "all", "--scale", "smoke", *words]) == 1  # one of them failed
    assert made == [(name, "smoke", "o", f"'{tmp_path}/my text' s3://b/c", "slurm", True) for name in ("one", "two")]
    assert capsys.readouterr().out == "one: page of one\n"
    assert main(["ablate", "one", "--scale", "smoke"]) == 0
    assert main(["ablate", "on", "--scale", "smoke"]) == 2
    assert "study='on': " in capsys.readouterr().err
    assert main(["ablate", "two", "--scale", "smoke", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == ["# TWO", "prepare 'a b'  # data 1", "train  # base, seed 1"]


def test_a_recipe_of_a_study_that_does_not_compose_is_named_by_its_run():
    def bad():
        raise ConfigError("rope.base", 0, "must be positive")

    seen = []
    runs_of = [types.SimpleNamespace(seed=1, arm="a", name="a, seed 1", recipe=lambda: seen.append(1) or "r"),
               types.SimpleNamespace(seed=2, arm="a", name="a, seed 2", recipe=bad)]  # fmt: skip
    study = types.SimpleNamespace(
        runs=runs_of, scale=types.SimpleNamespace(seeds=(1, 2)), study=types.SimpleNamespace(name="s")
    )
    assert ablate.check(study) == {"a": "r"}
    assert seen == [1]
    study.scale.seeds = (2,)
    with pytest.raises(ConfigError, match=r"rope\.base=0: must be positive \(in s: a, seed 2\)"):
        ablate.check(study)


def test_what_curate_did_in_lines(capsys):
    counts = {"documents": 1200, "characters": 34567}
    made = {
        "documents": 2000, "kept": counts | {"length": 8000}, "length_unit": "tokens", "rejected": {"short": counts},
        "lengths": [counts | {"below": 8192}], "gzip_ratio_quantiles": {"0.5": 0.25, "0.9": 0.5}, "files": ["a.jsonl"],
    }  # fmt: skip
    curate._print(made, "out/a.jsonl")
    assert capsys.readouterr().out.splitlines() == [
        "2,000 documents read, 1,200 stay: 34,567 characters, 8,000 tokens",
        f"  short             {1200:>12,} documents{34567:>17,} characters left out",
        f"  below {8192:>12,} tokens{1200:>12,} documents{34567:>17,} characters",
        "  compressed to (quantiles) 0.5: 0.250, 0.9: 0.500",
        "  a.jsonl",
        "  each that is left out: out/a.rejected.tsv",
    ]
    curate._print(made | {"length_unit": "characters", "rejected": {}, "lengths": [], "files": []}, "a.jsonl")
    assert capsys.readouterr().out.splitlines() == [
        "2,000 documents read, 1,200 stay: 34,567 characters", "  compressed to (quantiles) 0.5: 0.250, 0.9: 0.500"
    ]  # fmt: skip


def test_sizes_names_and_lists_of_the_command_line():
    assert [prepare.size(text) for text in ("7", "16k", "1Mi")] == [7, 16_000, 1 << 20]
    assert [prepare.tokens(text) for text in ("-3", "4Ki")] == [-3, 4096]
    for text in ("x", "-3", "1.5.2"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size; write 1000000, 16M or 64MiB"):
            prepare.size(text)
    assert prepare.names('title?,"a,b",meta.text') == ("title?", "a,b", "meta.text")
    assert prepare.names("") == ()
    assert curate._numbers(float)("0.2,0.8") == (0.2, 0.8)


def test_a_page_of_votes_is_written_or_they_are_counted(tmp_path, capsys):
    for name in "ab":
        rows = [{"id": n, "prompt": "p", "response": name} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair, page = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tmp_path / "page.html"
    assert main(["compare", *pair, "--output", str(page)]) == 0
    said = f"wrote {page}: 3 examples. Open it in a browser; each rater saves a file of votes.\n"
    assert capsys.readouterr().out == said
    first = page.read_text()
    assert main(["compare", *pair, "--output", str(page), "--seed", "1234"]) == 0
    assert page.read_text() == first
    assert main(["compare", *pair, "--output", str(page), "--seed", "5"]) == 0
    assert page.read_text() != first
