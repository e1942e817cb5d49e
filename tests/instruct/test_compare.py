"""Blind comparison: the page gives nothing away, votes find their way back, and the intervals cover."""

import json
import re
import time

import numpy as np
import pytest
from browser import BINARY, browser

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.instruct import compare
from nemo_longctx.instruct.compare import OUTCOMES, compare_files, page_html, read_votes, tabulate
from nemo_longctx.report.html import Section, write_page

NASTY = "</script><script>document.title='owned'</script> <b>bold</b> & é 🚢 \u2028"


def rows(path, model, count=6):
    made = [{"id": i, "prompt": f"Question {i}?", "response": f"answer {model * (i + 1)} {NASTY}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture
def files(tmp_path):
    return rows(tmp_path / "tuned.jsonl", "x"), rows(tmp_path / "base.jsonl", "y")


def test_sides_are_balanced_and_found_again(files):
    comparison = compare_files(*files, seed=1)
    assert sum(pair.swapped for pair in comparison.pairs) == 3
    assert comparison == compare_files(*files, seed=1)
    assert comparison.page != compare_files(*files, seed=2).page
    assert comparison.page != compare_files(*reversed(files), seed=1).page


def test_the_page_tells_no_sides_and_stands_alone(files):
    comparison = compare_files(*files, seed=1)
    html = page_html(comparison)
    assert not re.search(r"tuned|base\b|swapped|https?://", html)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', html, re.DOTALL)[1])
    assert [set(example) for example in data["examples"]] == [{"id", "prompt", "left", "right"}] * 6
    for pair, example in zip(comparison.pairs, data["examples"], strict=True):
        assert (example["left"], example["right"]) == ((pair.b, pair.a) if pair.swapped else (pair.a, pair.b))


@pytest.mark.skipif(BINARY is None, reason="no Chromium or Chrome on this machine")
def test_votes_in_a_real_browser(files, tmp_path, capsys):
    page, downloads = tmp_path / "page.html", tmp_path / "downloads"
    downloads.mkdir()
    assert main(["compare", *map(str, files), "--output", str(page)]) == 0
    text = {name: f"document.getElementById('{name}').textContent" for name in ("left", "right", "prompt", "count", "notice")}
    with browser(tmp_path / "profile") as tab:
        tab.open(page, downloads)
        assert tab.evaluate("document.title") == "Which answer is better?"  # the nasty answer stayed text
        assert NASTY in tab.evaluate(text["left"])
        tab.click("button[data-vote=left]")
        assert "name" in tab.evaluate(text["notice"])  # no vote without a rater
        tab.click("#rater")
        tab.type("Ada B.")
        tab.evaluate("document.activeElement.blur()")
        winners = []
        for number in range(6):  # prefer the model that says x: by mouse and by key in turn
            assert tab.evaluate(text["count"]).startswith(f"{number + 1} of 6; {number} voted")
            on_left = "x" in tab.evaluate(text["left"]).split()[1]
            winners.append("left" if on_left else "right")
            if number == 4:
                tab.press("2")
            elif number % 2:
                tab.press("1" if on_left else "3")
            else:
                tab.click(f"button[data-vote={winners[-1]}]")
        assert "Save" in tab.evaluate(text["notice"])
        tab.click("#save")
        saved, until = downloads / "votes-Ada_B_.jsonl", time.monotonic() + 30
        while not saved.exists() and time.monotonic() < until:
            time.sleep(0.05)
        tab.reload()
        tab.click("#rater")
        tab.type("Ada B.")
        tab.evaluate("document.activeElement.blur()")
        assert "6 voted" in tab.evaluate(text["count"])  # a closed tab loses no vote
        tab.evaluate("localStorage.clear()")  # another browser: the saved file takes the rater on
        tab.reload()
        assert "0 voted" in tab.evaluate(text["count"])
        for file, said in ((tmp_path / "tuned.jsonl", "no votes"), (page, "no votes"), (saved, "")):
            load = "(text) => load(new File([text], 'votes.jsonl'))"
            tab.evaluate(f"({load})({json.dumps(file.read_text())})")
            assert said in tab.evaluate(text["notice"])
        assert "6 voted" in tab.evaluate(text["count"])
        assert tab.evaluate("document.getElementById('rater').value") == "Ada B."
    assert set(winners) == {"left", "right"}
    capsys.readouterr()
    assert main(["compare", *map(str, files), "--votes", str(saved), "--table", str(tmp_path / "table.json")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"tuned better +83\.3%", said)
    assert re.search(r"base better +0\.0%", said)
    assert json.loads((tmp_path / "table.json").read_text())["shares"]["tie"]["share"] == pytest.approx(1 / 6)
    assert (tmp_path / "table.png").stat().st_size > 1000


def write_votes(path, comparison, votes):
    """votes: [(rater, example, win/tie/loss of A)]."""
    pairs = {pair.id: pair for pair in comparison.pairs}
    lines = []
    for rater, example, outcome in votes:
        side = "tie" if outcome == "tie" else "left" if (outcome == "win") != pairs[example].swapped else "right"
        lines.append(json.dumps({"page": comparison.page, "rater": rater, "id": example, "vote": side}) + "\n")
    path.write_text("".join(lines))
    return path


def test_several_raters_and_the_later_vote(files, tmp_path):
    comparison = compare_files(*files, seed=1)
    ada = write_votes(tmp_path / "ada", comparison, [("Ada", "0", "loss"), ("Ada", "0", "win"), ("Ada", "1", "tie")])
    bob = write_votes(tmp_path / "bob", comparison, [("Bob", "0", "win"), ("Bob", "1", "loss"), ("Bob", "2", "loss")])
    votes = read_votes(comparison, [ada, bob])
    assert votes == {"0": {"Ada": "win", "Bob": "win"}, "1": {"Ada": "tie", "Bob": "loss"}, "2": {"Bob": "loss"}}
    table = tabulate(votes)
    assert [table.shares[outcome].share for outcome in OUTCOMES] == pytest.approx([2 / 5, 1 / 5, 2 / 5])
    assert (table.votes, table.examples, table.raters, table.agreement) == (5, 3, 2, 0.5)


def test_votes_on_another_page_are_refused(files, tmp_path):
    comparison = compare_files(*files, seed=1)
    path = write_votes(tmp_path / "ada", comparison, [("Ada", "0", "win")])
    with pytest.raises(ConfigError, match="another page"):
        read_votes(compare_files(*files, seed=2), [path])
    path.write_text("")
    with pytest.raises(ConfigError, match="no vote"):
        read_votes(comparison, [path])


@pytest.mark.parametrize("name", [[1], None, 1, {"a": 1}])
def test_a_vote_on_a_name_of_another_type_is_named(files, tmp_path, name):
    comparison = compare_files(*files, seed=1)
    row = {"page": comparison.page, "rater": "Ada", "id": name, "vote": "left"}
    (tmp_path / "ada").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"ada:1.*names no example"):
        read_votes(comparison, [tmp_path / "ada"])


def test_a_table_that_could_not_be_is_refused(files, tmp_path, capsys):
    comparison = compare_files(*files, seed=1234)
    votes = write_votes(tmp_path / "ada", comparison, [("Ada", "0", "win"), ("Ada", "1", "tie")])
    pair = [str(file) for file in files]
    assert main(["compare", *pair, "--votes", str(votes), "--table", str(tmp_path / "t.png")]) == 2
    assert "overwritten by its own picture" in capsys.readouterr().err
    assert main(["compare", *pair, "--output", str(tmp_path / "p.html"), "--table", str(tmp_path / "t.json")]) == 2
    assert "has no effect without --votes" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_files_that_do_not_match_are_named(files, tmp_path):
    shorter = rows(tmp_path / "short.jsonl", "z", count=4)
    with pytest.raises(ConfigError, match=r"short\.jsonl.*lacks 2"):
        compare_files(files[0], shorter, seed=1)
    shorter.write_text('{"id": 1, "prompt": "a"}\n')
    with pytest.raises(ConfigError, match=r"short\.jsonl:1"):
        compare_files(files[0], shorter, seed=1)
    shorter.write_text('{"id": null, "prompt": "a", "response": "b"}\n')
    with pytest.raises(ConfigError, match=r"short\.jsonl:1"):
        compare_files(files[0], shorter, seed=1)
    other = tmp_path / "other.jsonl"
    other.write_text(files[1].read_text().replace("Question 3?", "Question three?"))
    with pytest.raises(ConfigError, match="different prompts"):
        compare_files(files[0], other, seed=1)


@pytest.mark.parametrize(("examples", "raters", "spread"), [(60, 3, 0.0), (60, 3, 0.35), (40, 1, 0.2), (150, 3, 1.0)])
def test_intervals_cover_the_truth(examples, raters, spread):
    """Raters who follow the example rather than a coin (`spread`) make votes alike; the interval must allow for that."""
    draw = np.random.default_rng(3)
    covered, trials, mean = 0, 300, 0.4
    for _ in range(trials):
        # Each example has a chance of its own around 0.4: from all alike (0) to always the same vote (1).
        chance = (
            np.full(examples, mean)
            if spread == 0
            else draw.beta(*(np.array([mean, 1 - mean]) * (1 / spread**2 - 1 + 1e-9)), examples)
        )
        votes = {
            str(example): {str(rater): "win" if draw.random() < chance[example] else "loss" for rater in range(raters)}
            for example in range(examples)
        }
        win = tabulate(votes).shares["win"]
        covered += win.low <= mean <= win.high
    assert 0.92 <= covered / trials <= 0.98


def test_one_sided_votes_still_have_an_interval():
    table = tabulate({str(example): {"Ada": "win", "Bob": "win"} for example in range(20)})
    win, loss = table.shares["win"], table.shares["loss"]
    assert (win.share, win.high, loss.share, loss.low) == (1.0, 1.0, 0.0, 0.0)
    assert 0.8 < win.low < 0.9  # Wilson, 20 of 20: 0.839
    assert loss.high == pytest.approx(1 - win.low)


LONG = "word " * 2000


def test_both_pages_are_made_for_a_phone_too(files, tmp_path):
    report = write_page(tmp_path / "report.html", "Report", [Section(heading="One")]).read_text(encoding="utf-8")
    vote = page_html(compare_files(*files, seed=1))
    for page in (report, vote):
        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "#votes { position: sticky; bottom: 0;" in vote


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="no Chromium here")
def test_both_pages_on_a_phone(tmp_path):
    """At 390 px nothing is off the edge, and the votes are in reach while long answers are read."""
    for name in "ab":
        rows = [{"id": "1", "prompt": LONG, "response": LONG + name}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = compare_files(tmp_path / "a.jsonl", tmp_path / "b.jsonl", seed=1)
    (tmp_path / "vote.html").write_text(page_html(comparison), encoding="utf-8")
    table = [[f"column {n}" for n in range(12)], [1.0] * 12]
    write_page(tmp_path / "report.html", "Report", [Section(heading="Wide", table=table, code="x" * 500)] * 3)
    with browser(tmp_path / "profile") as tab:
        tab.open(tmp_path / "vote.html", tmp_path)
        tab.command("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        tab.reload()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        edges = "[...document.querySelectorAll('input,button')].map(e => e.getBoundingClientRect().right)"
        assert tab.evaluate(f"Math.max(...{edges})") <= 390
        assert tab.evaluate("document.getElementById('votes').getBoundingClientRect().bottom") <= 844
        tab.command("Page.navigate", url=(tmp_path / "report.html").as_uri())
        tab.reload()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_votes_of_an_earlier_release_find_their_page_and_sides(tmp_path):
    """Page, order and sides are a function of the files and the seed, in every release."""
    for name in "ab":
        lines = [json.dumps({"id": i, "prompt": f"q{i}", "response": f"{name}{i}"}) + "\n" for i in range(5)]
        (tmp_path / name).write_text("\n".join(lines))
    found = compare_files(tmp_path / "a", tmp_path / "b", seed=7)
    assert found.page == "ca6a0eadc8f6035f"
    assert [(pair.id, pair.prompt, pair.a, pair.b, pair.swapped) for pair in found.pairs] == [
        ("0", "q0", "a0", "b0", False),
        ("3", "q3", "a3", "b3", True),
        ("2", "q2", "a2", "b2", False),
        ("1", "q1", "a1", "b1", False),
        ("4", "q4", "a4", "b4", True),
    ]


def plain_share(hits, counts):
    """The ratio estimator for clusters and the Wilson interval, from the page of a book."""
    n, total = len(counts), sum(counts)
    p = sum(hits) / total
    variance = n / (n - 1) * sum((h - p * c) ** 2 for h, c in zip(hits, counts, strict=True)) / total**2
    effective = min(max(p * (1 - p) / variance, 1), total) if variance else total
    z = 1.959963984540054
    centre = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * (p * (1 - p) / effective + z * z / (4 * effective**2)) ** 0.5
    return p, centre - half, centre + half


@pytest.mark.parametrize(
    "votes", [["wl", "w", "t", "lll", "wwt"], ["wwww", "llll"], ["wl", "wl", "wl"], ["w", "l", "t", "w"], ["wwwwwww", "l"]]
)
def test_shares_and_intervals_are_those_of_the_formula(votes):
    said = {"w": "win", "t": "tie", "l": "loss"}
    made = {str(n): {str(rater): said[one] for rater, one in enumerate(row)} for n, row in enumerate(votes)}
    table = tabulate(made)
    for letter, outcome in said.items():
        hits, counts = [row.count(letter) for row in votes], [len(row) for row in votes]
        if 0 < sum(hits) < sum(counts):
            found = table.shares[outcome]
            assert (found.share, found.low, found.high) == pytest.approx(plain_share(hits, counts))
    assert (table.votes, table.examples, table.raters) == (sum(map(len, votes)), len(votes), max(map(len, votes)))
    pairs = [[a == b for i, a in enumerate(row) for b in row[:i]] for row in votes if len(row) > 1]
    expected = np.mean([np.mean(row) for row in pairs]) if pairs else None
    assert table.agreement == (expected if expected is None else pytest.approx(expected))


def test_one_example_and_votes_all_alike_have_wilson_s_interval_of_the_examples():
    alone = tabulate({"0": {"Ada": "win", "Bob": "loss"}}).shares["win"]
    z = 1.959963984540054  # of one example with two votes nothing tells how alike they are: one vote's worth
    half = z / (1 + z * z) * (0.25 + z * z / 4) ** 0.5
    assert (alone.low, alone.high) == pytest.approx(
        ((0.5 + z * z / 2) / (1 + z * z) - half, (0.5 + z * z / 2) / (1 + z * z) + half)
    )
    whole = tabulate({str(n): {"Ada": "win", "Bob": "win", "Cy": "win"} for n in range(4)})
    assert whole.shares["win"].low == pytest.approx(4 / (4 + z * z))
    assert (whole.shares["win"].high, whole.shares["tie"].low) == (1.0, 0.0)
    assert whole.shares["tie"].high == pytest.approx(z * z / (4 + z * z))
    assert compare.table_text(whole, a="one", b="other model").split("\n") == [
        "                    share   95 % interval",
        "one better          100.0%  [51.0%, 100.0%]",
        "tie                   0.0%  [0.0%, 49.0%]",
        "other model better    0.0%  [0.0%, 49.0%]",
        "12 votes on 4 examples by 3 raters, raters agree on 100.0%",
    ]
    assert compare.table_text(tabulate({"0": {"Ada": "tie"}}), a="a", b="b").endswith("\n1 votes on 1 examples by 1 raters")
    some = compare.table_text(tabulate({"0": {"Ada": "tie"}}, pairs=1200), a="a", b="b")
    assert some.endswith("\n1 votes on 1 of 1,200 examples by 1 raters")


def test_two_files_of_one_name_are_two_models(tmp_path, capsys, monkeypatch):
    """`a/answers.jsonl` against `b/answers.jsonl`: both bars had one name, so the wins' lay under the losses', unseen."""
    for folder in ("tuned", "base"):
        (tmp_path / folder).mkdir()
    a, b = (rows(tmp_path / folder / "answers.jsonl", folder) for folder in ("tuned", "base"))
    assert compare.labels(a, b) == ("tuned/answers", "base/answers")
    assert compare.labels(a, b.with_name("b.jsonl")) == ("answers", "b")
    with pytest.raises(ConfigError, match="is given twice"):
        compare.labels(a, a)
    given = [json.loads(line) for line in a.read_text().splitlines()]
    cut = [row | {"finish_reason": "length" if n < 2 else "stop"} for n, row in enumerate(given)]
    a.write_text("".join(json.dumps(row) + "\n" for row in cut))
    comparison = compare_files(a, b, seed=1234)
    votes = write_votes(tmp_path / "ada", comparison, [("Ada", "0", "win"), ("Ada", "1", "tie")])
    drawn = []
    monkeypatch.setattr("nemo_longctx.report.plots.plot_votes", lambda rows, path, **more: drawn.append((list(rows), more)))
    assert main(["compare", str(a), str(b), "--votes", str(votes), "--table", str(tmp_path / "t.json")]) == 0
    assert drawn == [
        (
            ["tuned/answers better", "tie", "base/answers better"],
            {"title": "tuned/answers against base/answers: 2 votes on 2 of 6 examples"},
        )
    ]
    said = capsys.readouterr()
    assert said.err == "tuned/answers: 2 of 6 answers were cut at their longest length\n"
    assert [line.split("  ")[0] for line in said.out.splitlines()[1:4]] == [
        "tuned/answers better",
        "tie",
        "base/answers better",
    ]
    assert "2 votes on 2 of 6 examples" in said.out


def test_rows_and_votes_that_are_none_are_named_by_their_line(files, tmp_path):
    comparison, (ours, theirs) = compare_files(*files, seed=1), files
    bad = tmp_path / "bad"
    good = theirs.read_text()
    for text, said in (
        ("", "holds no row"), ("\n{x\n", "bad:2'.*is not JSON"), (good + good.split("\n")[1], "bad:7'.*a second answer to 1"),
        ('["id"]', "is no row"), ('{"id": 1.5, "prompt": "a", "response": "b"}', "is no row"),
        ('{"id": 1, "prompt": 2, "response": "b"}', "is no row"), ('{"id": 1, "response": "b"}', "is no row"),
        (good + '{"id": "six", "prompt": "a", "response": "b"}', "tuned.*lacks 1 of .*'six' first"),
    ):  # fmt: skip
        bad.write_text(text)
        with pytest.raises(ConfigError, match=said):
            compare_files(ours, bad, seed=1)
    row = {"page": comparison.page, "rater": "Ada", "id": "0", "vote": "left"}
    for change, said in (
        ({"vote": "up"}, "names no example"),
        ({"id": "9"}, "names no example"),
        ({"page": "x"}, "another page"),
    ):
        bad.write_text(json.dumps(row) + "\n" + json.dumps(row | change))
        with pytest.raises(ConfigError, match=f"bad:2.*{said}"):
            read_votes(comparison, [bad])
    for line in ("[]", json.dumps({key: row[key] for key in ("page", "id", "vote")})):
        bad.write_text(line)
        with pytest.raises(ConfigError, match=r"bad:1.*is no saved vote"):
            read_votes(comparison, [bad])


def test_what_is_read_is_not_written_over(files, tmp_path, capsys):
    """`compare a.jsonl b.jsonl --output b.jsonl` put its page in the place of the answers."""
    pair, before = [str(file) for file in files], files[1].read_bytes()
    votes = tmp_path / "votes.jsonl"
    votes.write_text("votes")
    for more in (["--output", pair[1]], ["--votes", str(votes), "--table", str(votes)]):
        assert main(["compare", *pair, *more]) == 2
        assert "is read, and would be replaced; name another file" in capsys.readouterr().err
    assert main(["compare", *pair, "--output", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err
    assert (files[1].read_bytes(), votes.read_text()) == (before, "votes")
