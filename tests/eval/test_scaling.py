import csv
import dataclasses
import json

import numpy as np
import pytest

from nemo_longctx.cli import main
from nemo_longctx.config import ConfigError
from nemo_longctx.eval import scaling
from nemo_longctx.eval.scaling import PAPER, fit_context_law, fit_context_law_by_document, read_curves

NAMES = ("alpha", "beta", "gamma")
CONTEXTS = 2.0 ** np.arange(8, 15.01, 0.25)


def paper_curve(model, context=CONTEXTS):
    alpha, beta, gamma = PAPER[model]
    return (alpha / context) ** beta + gamma


@pytest.mark.parametrize("model", PAPER)
def test_recovers_the_papers_parameters_from_its_own_curve(model):
    law = fit_context_law(CONTEXTS, paper_curve(model), replicates=0)
    np.testing.assert_allclose([law.alpha, law.beta, law.gamma], PAPER[model], rtol=1e-5)
    np.testing.assert_allclose(law.loss(CONTEXTS), paper_curve(model), rtol=1e-7)


@pytest.mark.parametrize("known_errors", [True, False])
def test_7b_with_one_percent_noise_lies_inside_its_intervals(known_errors):
    """Not one lucky draw: the 95 % intervals must hold the truth about 95 times in 100, and not always."""
    truth, curve, inside = PAPER["7B"], paper_curve("7B"), []
    for seed in range(60):
        noisy = curve * (1 + 0.01 * np.random.default_rng(seed).standard_normal(len(curve)))
        error = 0.01 * curve if known_errors else None
        law = fit_context_law(CONTEXTS, noisy, standard_error=error, replicates=200, seed=seed)
        inside.append([law.intervals[n][0] <= v <= law.intervals[n][1] for n, v in zip(NAMES, truth, strict=True)])
    coverage = np.mean(inside, axis=0)
    assert (coverage >= 0.85).all(), coverage
    assert np.mean(inside) < 1.0, coverage


@pytest.mark.parametrize("points", [8, 12])
def test_intervals_of_small_tables_hold_the_truth_too(points):
    context, inside = np.geomspace(2**8, 2**15, points), []
    for seed in range(100):
        noisy = paper_curve("7B", context) * (1 + 0.01 * np.random.default_rng(seed).standard_normal(points))
        law = fit_context_law(context, noisy, replicates=200, seed=seed)
        inside.append([law.intervals[n][0] <= v <= law.intervals[n][1] for n, v in zip(NAMES, PAPER["7B"], strict=True)])
    coverage = np.mean(inside, axis=0)
    assert np.mean(coverage) >= 0.92, coverage
    assert (coverage >= 0.90).all(), coverage


def test_document_bootstrap_holds_the_truth_and_shrinks_with_documents():
    rng, curve = np.random.default_rng(3), paper_curve("7B")
    counts = rng.integers(50, 200, (400, len(CONTEXTS)))
    documents = curve + rng.normal(0, 0.3, (400, 1)) + rng.normal(0, 0.3, counts.shape)
    law = fit_context_law_by_document(CONTEXTS, documents * counts, counts, replicates=300)
    few = fit_context_law_by_document(CONTEXTS, (documents * counts)[:40], counts[:40], replicates=300)
    assert law.bootstrap == "documents"
    for name, value in zip(NAMES, PAPER["7B"], strict=True):
        low, high = law.intervals[name]
        assert low <= value <= high
        assert high - low < few.intervals[name][1] - few.intervals[name][0]
    low, high = law.band(CONTEXTS)
    assert (low < law.loss(CONTEXTS)).all()
    assert (law.loss(CONTEXTS) < high).all()


def test_contexts_that_few_tokens_stand_behind_weigh_little():
    """A point of one token a document against points of a thousand: 1 nat off, it moves neither the law nor its intervals."""
    curve = paper_curve("7B")
    rng = np.random.default_rng(5)
    losses = np.tile(curve, (40, 1)) + rng.normal(0, 0.01, (40, 1))
    counts = np.full(losses.shape, 1000)
    true = fit_context_law_by_document(CONTEXTS, losses * counts, counts, replicates=50)
    middle = len(CONTEXTS) // 2
    counts[:, middle], losses[:, middle] = 1, curve[middle] + 1
    law = fit_context_law_by_document(CONTEXTS, losses * counts, counts, replicates=50)
    assert law.loss(CONTEXTS) == pytest.approx(true.loss(CONTEXTS), abs=0.01)
    low, high = law.band(CONTEXTS)
    assert (low < true.loss(CONTEXTS) + 0.01).all()
    assert (high > true.loss(CONTEXTS) - 0.01).all()
    assert (high - low < 0.1).all()


def test_a_negative_gamma_is_zero_and_the_rest_is_the_best_under_that():
    """A curve that bends down: without the bound gamma is below 0, and alpha and beta are then the best through 0."""
    loss = 3 - 0.18 * np.log2(CONTEXTS / CONTEXTS[0])
    law = fit_context_law(CONTEXTS, loss, replicates=0)
    assert law.gamma == 0
    cost = np.square((law.loss(CONTEXTS) - loss) / loss).sum()
    for alpha, beta in ((law.alpha * 1.02, law.beta), (law.alpha / 1.02, law.beta)):
        assert np.square(((alpha / CONTEXTS) ** beta - loss) / loss).sum() > cost


@pytest.mark.parametrize("seed", range(4))
def test_at_every_beta_the_best_of_all_bounded_pairs_is_taken(seed):
    """The plain way: of the least squares with both terms, with one and with none, the best that breaks no bound."""
    rng = np.random.default_rng(seed)
    y_RN = np.exp(np.cumsum(rng.normal(-0.3, 0.4, (3, 6)), axis=1))
    w_RN, beta_RK, log_c = rng.uniform(0.1, 5, (3, 6)), rng.uniform(0.05, 3, (3, 5)), np.log(2.0 ** np.arange(6))
    cost_RK, A_RK, gamma_RK = scaling._project(log_c, beta_RK, y_RN, w_RN)
    for r, k in np.ndindex(cost_RK.shape):
        w, columns, found = w_RN[r] / w_RN[r].sum(), np.stack([np.exp(-beta_RK[r, k] * log_c), np.ones(6)], axis=1), []
        for used in ([0, 1], [0], [1], []):
            solved = np.zeros(2)
            if used:
                solved[used] = np.linalg.lstsq(columns[:, used] * np.sqrt(w)[:, None], y_RN[r] * np.sqrt(w), rcond=None)[0]
            if (solved >= 0).all():
                found.append((float((w * np.square(y_RN[r] - columns @ solved)).sum()), *solved))
        assert (cost_RK[r, k], A_RK[r, k], gamma_RK[r, k]) == pytest.approx(min(found), abs=1e-9)


def test_gamma_is_never_negative_and_beta_of_a_power_law_is_found():
    law = fit_context_law(CONTEXTS, 40 * CONTEXTS**-0.3, replicates=0)
    assert law.gamma == pytest.approx(0, abs=1e-3)
    assert law.beta == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(
    ("context", "loss", "message"),
    [
        ([1, 2], [3, 2], "3 or more context lengths"),
        ([1, 2, 4, 8, 16], [1, 2, 3, 4, 5], "does not fall"),
        ([1, 2, 4, 8, 0], [5, 4, 3, 2, 1], "positive number, got 0"),
        ([1, 2, 4, 8, 16], [5, 4, float("nan"), 2, 1], "loss must be a positive number, got nan"),
        ([1, 2, 4], [5, 4, 3.5], "3 points leave no residuals"),
        ([1, 2, 4, 8, 16], [9, 2, 2, 2, 2], "best beta is at the limit, 8"),
    ],
)
def test_a_table_without_a_fit_is_refused(context, loss, message):
    with pytest.raises(ValueError, match=message):
        fit_context_law(context, loss, replicates=10)


@pytest.mark.parametrize("errors", [True, False])
def test_a_replicate_is_the_fit_of_the_fitted_curve_with_noise_of_its_size(errors):
    """The plain way: one curve after the other, each with its own draw; intervals are percentiles of those fits."""
    c, rng = 2.0 ** np.arange(8, 15), np.random.default_rng(0)
    y = paper_curve("7B", c) * (1 + 0.01 * rng.standard_normal(7))
    error = 0.01 * y**2 if errors else None
    law = fit_context_law(c, y, standard_error=error, replicates=20, confidence=0.8)
    fitted = (law.alpha / c) ** law.beta + law.gamma
    assert law.loss(c) == pytest.approx(fitted)
    draws = np.random.default_rng(0)
    if errors:
        noise = draws.standard_normal((20, 7)) * error
    else:
        size = np.sqrt((((y - fitted) / fitted) ** 2).sum() / draws.chisquare(4, (20, 1)))
        noise = draws.standard_normal((20, 7)) * size * fitted
    plain = []
    for row in noise:
        try:
            one = fit_context_law(c, fitted + row, standard_error=y if error is None else error, replicates=0)
            plain.append((one.alpha, one.beta, one.gamma))
        except ValueError:  # one that does not fall, or is at a limit of beta
            plain.append(None)
    assert sum(one is not None for one in plain) > 15
    if len(law.samples) == 20:
        for one, sample in zip(plain, law.samples, strict=True):
            assert one is None or sample == pytest.approx(one, rel=1e-4)
    assert (law.replicates, law.confidence) == (len(law.samples), 0.8)
    assert law.bootstrap == ("standard errors" if errors else "residuals")
    for n, name in enumerate(NAMES):
        assert law.intervals[name] == pytest.approx(np.percentile(law.samples[:, n], [10, 90]))
    curves = np.stack([(a / c) ** b + g for a, b, g in law.samples])
    assert np.stack(law.band(c)) == pytest.approx(np.percentile(curves, [10, 90], axis=0))


def test_a_replicate_of_documents_is_the_fit_of_the_documents_drawn():
    c, rng = 2.0 ** np.arange(8, 14), np.random.default_rng(1)
    counts = rng.integers(1, 9, (5, 6))
    counts[0, :3] = 0
    sums = (paper_curve("7B", c) + rng.normal(0, 0.01, (5, 6))) * counts
    law = fit_context_law_by_document(c, sums, counts, replicates=10)
    draws = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=10)
    plain = []
    for row in [np.ones(5), *draws]:
        total = (row[:, None] * counts).sum(0)
        mean = (row[:, None] * sums).sum(0) / total
        plain.append(fit_context_law(c, mean, standard_error=total**-0.5, replicates=0))
    for one, found in zip(plain, [(law.alpha, law.beta, law.gamma), *law.samples], strict=True):
        assert found == pytest.approx((one.alpha, one.beta, one.gamma), rel=1e-4)
    sums_to, counts_to = (np.pad(table, ((0, 0), (0, 1))) for table in (sums, counts))  # a context that no document reaches
    reached = fit_context_law_by_document(np.append(c, 9e9), sums_to, counts_to, replicates=0)
    assert (reached.alpha, reached.bootstrap, reached.replicates, reached.intervals) == (law.alpha, "none", 0, {})
    with pytest.raises(ValueError, match="needs at least 2 of them, got 1"):
        fit_context_law_by_document(c, sums[:1], counts[:1])


def test_without_words_a_thousand_replicates_give_95_percent_of_seed_0():
    c = 2.0 ** np.arange(8, 14)
    y, more = paper_curve("7B", c) + 0.01 * np.cos(c), {"replicates": 1000, "confidence": 0.95, "seed": 0}
    assert fit_context_law(c, y).intervals == fit_context_law(c, y, **more).intervals
    curve = {"context": c, "loss": y}
    assert scaling.fit_curve(curve).intervals == fit_context_law(c, y).intervals
    counts = np.ones((3, 6))
    sums = np.stack([y, y + 0.01 * np.sin(c), y - 0.01])
    by_document = fit_context_law_by_document(c, sums, counts)
    assert by_document.intervals == fit_context_law_by_document(c, sums, counts, **more).intervals
    assert by_document.replicates == 1000
    fitted = scaling.fit_many(c, np.stack([paper_curve("7B", c), c]))
    assert fitted[0] == pytest.approx(PAPER["7B"], rel=1e-4)
    assert np.isnan(fitted[1]).all()


def test_lines_of_a_document_are_weighed_by_their_tokens_and_added_up(tmp_path):
    c, rng, rows = 2.0 ** np.arange(8, 13), np.random.default_rng(2), []
    sums, counts = np.zeros((4, 5)), np.zeros((4, 5))
    for turn in range(2):
        for d in range(4):
            for n in range(5):
                loss, tokens = paper_curve("7B", c[n]) + rng.normal(0, 0.01), int(rng.integers(1, 9))
                rows.append((f"doc {d}", c[n], loss, tokens, turn))
                sums[d, n] += loss * tokens
                counts[d, n] += tokens
    write(tmp_path / "t.csv", ["Document", " context ", "LOSS", "tokens", "other"], rows)
    law = scaling.fit_curve(read_curves(tmp_path / "t.csv")["t"], replicates=5)
    assert law.samples == pytest.approx(fit_context_law_by_document(c, sums, counts, replicates=5).samples, rel=1e-6)
    write(tmp_path / "u.csv", ["Document", "context", "loss"], [row[:3] for row in rows])
    curve = read_curves(tmp_path / "u.csv")["u"]
    ones = {**curve, "tokens": np.ones(len(rows))}
    assert scaling.fit_curve(curve, replicates=5).intervals == scaling.fit_curve(ones, replicates=5).intervals


def test_a_bin_s_context_is_that_of_its_middle_and_columns_may_be_named_otherwise(tmp_path):
    write(tmp_path / "t.csv", ["start", "end", "loss", "se"], [(0, 1, 3, 0.1), (1, 4, 2, ""), (4, 10, 1, 0.3)])
    found = read_curves(tmp_path / "t.csv")["t"]
    assert found["context"].tolist() == [1.0, 3.0, 7.5]
    assert found["standard error"][[0, 2]].tolist() == [0.1, 0.3]
    assert np.isnan(found["standard error"][1])
    write(tmp_path / "m.csv", ["model", "length", "position", "loss", "standard_error"], [("b", 8, 1, 3, 1), ("a", 9, 2, 2, 1)])
    found = read_curves(tmp_path / "m.csv")
    assert [(name, curve["context"].tolist()) for name, curve in found.items()] == [("b", [8.0]), ("a", [9.0])]
    for header, has in ((["end", "loss"], "it has end, loss"), ([f"{n}" * 50 for n in range(7)], f"{'5' * 40}, ...")):
        write(tmp_path / "t.csv", header, [range(len(header))])
        with pytest.raises(ValueError, match=f"needs a column 'loss' and one 'context' .*{has}$"):
            read_curves(tmp_path / "t.csv")


def test_arguments_that_cannot_be_fitted_are_refused_each_by_its_sentence():
    y = paper_curve("7B")
    for c, loss, error, said in (
        (CONTEXTS, y[:-1], None, "must be lists of one length"),
        (CONTEXTS, y, y[:-1], "must be lists of one length"),
        (CONTEXTS[None], y[None], None, "must be lists of one length"),
        (np.repeat([1.0, 2.0], 4), y[:8], None, "at 3 or more context lengths, got 2"),
        (CONTEXTS, y, np.where(CONTEXTS > 300, 0.1, -1), "every standard error must be a positive number, got -1"),
        (CONTEXTS, y * np.inf, None, "every loss must be a positive number, got inf"),
        (CONTEXTS, 3 - 1e-3 * np.log(CONTEXTS), None, "best beta is at the limit, 0.01"),
        (CONTEXTS[:4], y[:4], None, "4 points leave no residuals"),
    ):
        with pytest.raises(ValueError, match=said):
            fit_context_law(c, loss, standard_error=error, replicates=1)
    assert fit_context_law(CONTEXTS[:5], y[:5], replicates=1).bootstrap == "residuals"
    assert fit_context_law(CONTEXTS[:4], y[:4], replicates=0).bootstrap == "none"
    for confidence in (0.0, 1.0):
        with pytest.raises(ConfigError, match="give a share between 0 and 1"):
            fit_context_law(CONTEXTS, y, replicates=1, confidence=confidence)


def write(path, header, lines):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])


def test_command_fits_every_model_of_a_table(tmp_path, capsys):
    rows = [
        (m, int(c) - 8, int(c) + 7, 1000, y, 0.001)
        for m in ("7B", "70B")
        for c, y in zip(CONTEXTS, paper_curve(m), strict=True)
    ]
    write(tmp_path / "loss.csv", ["model", "start", "end", "tokens", "loss", "standard error"], rows)
    assert main(["fit-context", str(tmp_path / "loss.csv"), "--bootstrap", "50"]) == 0
    fits = json.loads((tmp_path / "loss.fit.json").read_text())
    for model in ("7B", "70B"):
        got = [fits[model][name] for name in NAMES]
        np.testing.assert_allclose(got, PAPER[model], rtol=0.01)
        assert fits[model]["bootstrap"] == "standard errors"
    assert (tmp_path / "loss.fit.png").stat().st_size > 10_000
    assert "95% interval" in capsys.readouterr().out


def test_a_fit_says_what_its_intervals_are_worth(tmp_path, capsys, monkeypatch):
    """It printed `95% interval nan to nan` without a bootstrap, 99.5 % as 100 %, and nothing of resamples without a fit."""
    write(tmp_path / "t.csv", ["c", "loss"], list(zip(CONTEXTS, paper_curve("7B"), strict=True)))
    assert main(["fit-context", str(tmp_path / "t.csv"), "--bootstrap", "0"]) == 0
    said = capsys.readouterr().out
    assert said.count("   no interval\n") == 3
    assert "nan" not in said
    assert main(["fit-context", str(tmp_path / "t.csv"), "--bootstrap", "50", "--confidence", "0.995"]) == 0
    said = capsys.readouterr().out
    assert said.count("99.5% interval") == 3
    assert "not to be relied on" not in said
    fit = scaling.fit_curve
    few = lambda curve, **more: dataclasses.replace(fit(curve, **more), replicates=30)  # noqa: E731
    monkeypatch.setattr(scaling, "fit_curve", few)
    assert main(["fit-context", str(tmp_path / "t.csv"), "--bootstrap", "50"]) == 0
    assert "  not to be relied on: 20 of 50 resamples have no fit\n" in capsys.readouterr().out


def test_a_document_column_asks_for_the_bootstrap_over_documents(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(d, c, y + rng.normal(0, 0.01)) for d in range(20) for c, y in zip(CONTEXTS, paper_curve("7B"), strict=True)]
    write(tmp_path / "d.csv", ["document", "c", "loss"], rows)
    assert main(["fit-context", str(tmp_path / "d.csv"), "--bootstrap", "50", "--out", str(tmp_path / "x" / "fit")]) == 0
    assert json.loads((tmp_path / "x" / "fit.json").read_text())["d"]["bootstrap"] == "documents"


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        (["start", "loss"], [1, 2], "needs a column 'loss' and one 'context'"),
        (["c", "loss"], [1, "two"], "line 2: could not convert"),
        (["c", "loss"], [1, 2], "model 't': three parameters need"),
        (["c", "loss"], None, "t.csv holds no line below its head"),
    ],
)
def test_a_bad_table_is_one_sentence(tmp_path, capsys, header, line, message):
    write(tmp_path / "t.csv", header, [line] if line else [])
    assert main(["fit-context", str(tmp_path / "t.csv")]) == 2
    assert message in capsys.readouterr().err
    if "start" not in header and line and line[1] == 2:
        assert set(read_curves(tmp_path / "t.csv")) == {"t"}


@pytest.mark.parametrize(("column", "shift"), [("position", 1), ("context_length", 0), ("\ufeffcontext", 0)])
def test_contexts_by_other_names(tmp_path, column, shift):
    """A position counts from 0, so that its context is one more; spreadsheets put a mark before the first column."""
    write(tmp_path / "t.csv", [column, "loss"], [(c - shift, y) for c, y in zip(CONTEXTS, paper_curve("7B"), strict=True)])
    np.testing.assert_allclose(read_curves(tmp_path / "t.csv")["t"]["context"], CONTEXTS)


def test_errors_of_zero_are_refused_and_missing_ones_told(tmp_path, capsys):
    rows = [(c, y, 0.01) for c, y in zip(CONTEXTS, paper_curve("7B"), strict=True)]
    write(tmp_path / "zero.csv", ["c", "loss", "se"], [(*rows[0][:2], 0), *rows[1:]])
    assert main(["fit-context", str(tmp_path / "zero.csv"), "--bootstrap", "50"]) == 2
    assert "every standard error must be a positive number, got 0.0" in capsys.readouterr().err
    write(tmp_path / "blank.csv", ["c", "loss", "se"], [(*rows[0][:2], ""), *rows[1:]])
    assert main(["fit-context", str(tmp_path / "blank.csv"), "--bootstrap", "50"]) == 0
    assert f"residuals (1 of {len(rows)} points have no standard error)" in capsys.readouterr().out


def test_each_model_is_fitted_for_itself(tmp_path, capsys):
    """One whose loss rises has no fit; the others have theirs."""
    rows = ["model,context,loss"]
    for n in CONTEXTS:
        rows += [f"falls,{n},{paper_curve('7B')[list(CONTEXTS).index(n)]}", f"rises,{n},{n**0.1}"]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    assert main(["fit-context", str(tmp_path / "m.csv"), "--bootstrap", "0"]) == 0
    record = json.loads((tmp_path / "m.fit.json").read_text())
    assert record["falls"]["beta"] > 0
    assert "does not fall" in record["rises"]["no_fit"]
    assert "rises: no fit: the loss does not fall" in capsys.readouterr().out


def test_the_command_s_options_reach_the_fit_and_its_record(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [(c, y * (1 + 0.001 * rng.standard_normal())) for c, y in zip(CONTEXTS, paper_curve("7B"), strict=True)]
    write(tmp_path / "t.csv", ["c", "loss"], [*rows, (100, 9.0)])
    least = float(CONTEXTS[4])
    words = ["--min-context", str(least), "--bootstrap", "40", "--confidence", "0.8", "--seed", "3", "--out"]
    assert main(["fit-context", str(tmp_path / "t.csv"), *words, str(tmp_path / "new" / "o.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    law = fit_context_law(*map(np.array, zip(*rows[4:], strict=True)), replicates=40, confidence=0.8, seed=3)
    assert json.loads((tmp_path / "new" / "o.json").read_text()) == {
        "t": {
            **{name: getattr(law, name) for name in NAMES}, "intervals": {k: list(v) for k, v in law.intervals.items()},
            "confidence": 0.8, "bootstrap": "residuals", "replicates": law.replicates, "seed": 3,
        }
    }  # fmt: skip
    low, high = law.intervals["beta"]
    assert said[0] == f"t: L(c) = (alpha/c)^beta + gamma, {len(rows) - 4} points, bootstrap over residuals"
    assert said[2] == f"  beta  {law.beta:>10.4g}   80% interval {low:.4g} to {high:.4g}"
    assert said[4] == f"wrote {tmp_path / 'new' / 'o.json'} and {tmp_path / 'new' / 'o.png'}"
    assert main(["fit-context", str(tmp_path / "t.csv"), "--bootstrap", "-1"]) == 2
    assert "--bootstrap=-1: give 0 or more replicates" in capsys.readouterr().err
    assert main(["fit-context", str(tmp_path / "t.csv"), "--bootstrap", "1", "--confidence", "1"]) == 2
    assert "confidence=1.0" in capsys.readouterr().err


def test_a_fit_takes_no_other_file_s_place_and_says_where_no_point_is_left(tmp_path, capsys):
    """`fit-context DIR/loss.csv --out DIR/results` wrote over the evaluation's results.json."""
    table = tmp_path / "loss.csv"
    table.write_text("context,loss\n" + "".join(f"{c},{2 + 30 / c**0.5}\n" for c in (16, 32, 64, 128, 256, 512)))
    (tmp_path / "results.json").write_text('{"results": []}')
    command = ["fit-context", str(table), "--bootstrap", "0"]
    for more, said in (
        (["--out", str(tmp_path / "results")], "results.json is there, and holds no fit; name another"),
        (["--min-context", "1e4"], "--min-context=10000.0: leaves no point of"),
        (["--seed", "-1"], "--seed=-1: give a whole number of at least 0"),
    ):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == '{"results": []}'
    for _ in range(2):  # its own is replaced
        assert main(command) == 0
    assert "alpha" in (tmp_path / "loss.fit.json").read_text()
