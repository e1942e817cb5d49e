"""Studies on real trainings, small: every part runs from text to page, and one that is killed ends with the same tables."""

import csv
import json
import random
import time

import host_server
import pytest

from nemo_longctx.ablation.study import load_study, studies


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Long and short documents of made-up sentences: the same for ever, so that the same ones are held out."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(600)]

    def paragraph():
        sentences = (" ".join(rng.choices(words, k=rng.randint(5, 14))).capitalize() + "." for _ in range(rng.randint(2, 6)))
        return " ".join(sentences)

    for number in range(60):
        parts = [f"# {rng.choice(words).capitalize()} {number}"] + [paragraph() for _ in range(rng.randint(20, 80))]
        written = "\n\n".join(parts)
        (folder / f"{number}.md").write_text(written, encoding="utf-8")
        for place in range(0, len(written), 4000):
            (folder / f"{number}-{place}.md").write_text(written[place : place + 600], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The folder of all studies at `smoke`, run without a stop."""
    out = tmp_path_factory.mktemp("whole")
    finish(ablate("all", text, out), out)
    return out


def ablate(study, text, out):
    return host_server.start("-m", "nemo_longctx", "ablate", study, "--scale", "smoke", "--text", text, "--out", out)


def finish(started, out):
    status, said = started.finish()
    logs = [f"{log}:\n{log.read_text(errors='replace')[-1500:]}" for log in sorted(out.glob("logs/*.log"))]
    assert status == 0, "\n".join([said[-3000:], *logs[-2:]])


def tables(out, study="*"):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob(f"page/{study}/*.csv"))}


@pytest.mark.slow
def test_every_study_runs_and_a_second_call_runs_nothing(whole, text):
    for name in studies():
        study = load_study(name)
        page = whole / "page" / name
        assert (page / "index.html").stat().st_size > 50_000  # with its pictures in it
        for measure in study.measures:
            with (page / f"{measure}.csv").open(newline="") as file:
                assert [row["arm"] for row in csv.DictReader(file)] == list(study.scale("smoke").arms), (name, measure)
        with (page / "claims.csv").open(newline="") as file:
            assert {row["verdict"] for row in csv.DictReader(file)} == {"cannot be told here"}  # one seed says nothing
    before, made = {file: json.loads(file.read_text()) for file in whole.glob("*.done.json")}, tables(whole)
    finish(ablate("instruct", text, whole), whole)
    assert {file: json.loads(file.read_text()) for file in whole.glob("*.done.json")} == before
    assert tables(whole) == made


@pytest.mark.slow
def test_a_study_killed_five_times_on_its_way_gives_the_same_tables(whole, text, tmp_path):
    def rows(arm):
        file = tmp_path / f"{arm}-1" / "results" / "training.csv"
        return len(file.read_text().splitlines()) - 1 if file.exists() else 0

    reached = (
        lambda: (tmp_path / "data/corpus.idx").exists(),
        lambda: rows("small") >= 1,
        lambda: any((tmp_path / "small-1").glob("checkpoints/*")) and rows("small") >= 4,
        lambda: rows("large") >= 3,
        lambda: any((tmp_path / "large-1").glob("results/eval/*")),
    )
    for moment in reached:
        started = ablate("scaling", text, tmp_path)
        while not moment():
            assert started.poll() is None, started.said[-3000:]
            time.sleep(0.02)
        started.kill()
        while started.poll() is None:
            time.sleep(0.02)
    finish(ablate("scaling", text, tmp_path), tmp_path)
    assert tables(tmp_path) == tables(whole, "scaling")
