import csv
import json

import numpy as np
import pytest

from nemo_longctx.cli import main
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
