"""`ablate all --scale smoke`: every part of every study runs, from text to page, and what is done is not done again."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_longctx.ablation.study import load_study, studies

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.slow
def test_every_study_runs_and_a_second_call_runs_nothing(tmp_path):
    text, out = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    for number, guide in enumerate(sorted(DOCS.rglob("*.md"))):  # whole, and in pieces: studies need long and short documents
        written = guide.read_text(encoding="utf-8")
        (text / f"{number}.md").write_text(written, encoding="utf-8")
        for place in range(0, len(written), 4000):
            (text / f"{number}-{place}.md").write_text(written[place : place + 600], encoding="utf-8")
    command = [sys.executable, "-m", "nemo_longctx", "ablate", "all", "--scale", "smoke", "--text", str(text)]
    command += ["--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True)
    logs = [f"{log}:\n{log.read_text(errors='replace')[-1500:]}" for log in out.glob("logs/*.log")]
    assert first.returncode == 0, "\n".join([first.stdout[-3000:], first.stderr[-3000:], *logs[-2:]])
    tables = {path: path.read_bytes() for path in out.glob("page/*/*.csv")}
    for name in studies():
        study = load_study(name)
        page = out / "page" / name
        assert (page / "index.html").stat().st_size > 50_000  # with its pictures in it
        for measure in study.measures:
            with (page / f"{measure}.csv").open(newline="") as file:
                assert [row["arm"] for row in csv.DictReader(file)] == list(study.scale("smoke").arms)
        with (page / "claims.csv").open(newline="") as file:
            assert {row["verdict"] for row in csv.DictReader(file)} == {"cannot be told here"}  # one seed says nothing
    before = {record: json.loads(record.read_text()) for record in out.glob("*.done.json")}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {record: json.loads(record.read_text()) for record in out.glob("*.done.json")} == before
    assert {path: path.read_bytes() for path in out.glob("page/*/*.csv")} == tables
