"""Progress in a log: a line now and then, and no strokes."""

import io
import sys

import pytest

from nemo_longctx import bars


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock, capsys):
    with bars.ProgressBar(total=1000, desc="tokenizing", unit="B", unit_scale=True) as bar:
        for _ in range(100):
            clock[0] += 0.7
            bar.note("3 docs")
            bar.update(10)
    printed = capsys.readouterr().err
    assert "\r" not in printed
    assert printed.splitlines() == [
        "tokenizing: 43% 430/1.00k [00:30<00:39, 14.3B/s, 3 docs]",
        "tokenizing: 86% 860/1.00k [01:00<00:09, 14.3B/s, 3 docs]",
        "tokenizing: 100% 1.00k/1.00k [01:10<00:00, 14.3B/s, 3 docs]",
    ]


@pytest.mark.parametrize("total", [0, 5])
def test_short_work_and_work_without_a_size_print_nothing(clock, capsys, total):
    with bars.ProgressBar(total=total, desc="x", unit="doc") as bar:
        bar.update(total)
    with bars.ProgressBar(total=total, desc="x", unit="doc", show=False) as bar:
        clock[0] += 100
        bar.update(total)
    assert capsys.readouterr().err == ""
    with bars.ProgressBar(total=0, desc="x", unit="doc") as bar:
        clock[0] += 100
        bar.update(1)
    assert capsys.readouterr().err.startswith("x: ")


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with bars.ProgressBar(total=5, desc="x", unit="doc") as bar:
        bars.say("a line")
        bar.update(5)
        assert bar.elapsed >= 0
    assert "100%|" in screen.getvalue()
    assert "a line\n" in screen.getvalue()
