"""The context-length scaling law, L(c) = (alpha / c)^beta + gamma (Xiong et al. 2023, section 1 and Figure 1).

For a given beta the law is linear in A = alpha^beta and gamma, so the fit is a search over beta alone, each with its exact
weighted least-squares solution under A > 0 and gamma >= 0 (variable projection, Golub and Pereyra 1973). There is no
starting point to choose and no local optimum to miss, and all bootstrap replicates are solved at once.

Shapes: R replicates, N points of the curve, K trial values of beta, D documents.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemo_longctx.config import ConfigError

Array = NDArray[np.float64]
# beta outside this range cannot be told from a straight line in log c, or from a step.
BETA_RANGE = (0.01, 8.0)


@dataclass(frozen=True, kw_only=True)
class ContextLaw:
    """A fitted L(c) = (alpha / c)^beta + gamma.

    Args:
        alpha: tokens. beta: exponent. gamma: loss that no context removes, nats per token.
        intervals: parameter -> (low, high) at `confidence`, percentiles of the bootstrap; empty without one.
        confidence: coverage of the intervals.
        bootstrap: what was resampled, as one phrase ("documents", "standard errors", "residuals", "none").
        replicates: bootstrap fits that the intervals rest on (fits of a replicate that does not fall are left out).
        samples: [R, 3] alpha, beta, gamma of each replicate.
    """

    alpha: float
    beta: float
    gamma: float
    intervals: Mapping[str, tuple[float, float]]
    confidence: float
    bootstrap: str
    replicates: int
    samples: Array

    def loss(self, context: ArrayLike) -> Array:
        """L(c), nats per token, at contexts in tokens."""
        return (self.alpha / np.asarray(context, np.float64)) ** self.beta + self.gamma

    def band(self, context: ArrayLike) -> tuple[Array, Array]:
        """Lower and upper limits of L(c) over the bootstrap, pointwise at `confidence`."""
        alpha, beta, gamma = self.samples.T[..., None]
        curves = (alpha / np.asarray(context, np.float64)) ** beta + gamma
        tail = 50 * (1 - self.confidence)
        low, high = np.percentile(curves, [tail, 100 - tail], axis=0)
        return low, high


def fit_context_law(
    context: ArrayLike,
    loss: ArrayLike,
    *,
    standard_error: ArrayLike | None = None,
    replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ContextLaw:
    """Fit the law to a curve, with intervals by a parametric bootstrap: errors known, or their size from the residuals.

    Args:
        context: [N] tokens of context, at least 3 different ones. loss: [N] nats per token.
        standard_error: [N] of `loss`; the weights are then 1 / error^2. Without it each point is taken to err in
            proportion to its loss, and the size of the error is estimated from the residuals.
        replicates: bootstrap fits; 0 for none.

    Raises:
        ValueError: too few points, a value that is not finite or positive, or a loss that does not fall with context.
    """
    c, y, error = _curve(context, loss, standard_error)
    weights = 1 / np.square(y if error is None else error)
    alpha, beta, gamma = _point(c, y, weights)
    fitted = (alpha / c) ** beta + gamma
    rng = np.random.default_rng(seed)
    if error is not None:
        noise, source = rng.standard_normal((replicates, len(c))) * error, "standard errors"
    else:
        if len(c) < 5 and replicates:
            raise ValueError(f"{len(c)} points leave no residuals to resample; give standard errors, documents or 5 points")
        # The fit takes 3 degrees of freedom out of the residuals, and how large the errors are is itself uncertain: each
        # replicate draws their size too, so that the noise has Student's t for its law. Drawing the few residuals again
        # instead gives intervals that hold each parameter 88 % of the time at 8 points, in place of 95 %.
        freedom = max(len(c) - 3, 1)
        size = np.sqrt(np.square((y - fitted) / fitted).sum() / rng.chisquare(freedom, (replicates, 1)))
        noise, source = rng.standard_normal((replicates, len(c))) * size * fitted, "residuals"
    samples = _solve(c, fitted + noise, np.broadcast_to(weights, noise.shape))
    return _law((alpha, beta, gamma), samples, confidence, source)


def fit_context_law_by_document(
    context: ArrayLike,
    sums_DN: ArrayLike,
    counts_DN: ArrayLike,
    *,
    replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ContextLaw:
    """Fit the law to the mean over documents; each replicate draws whole documents with replacement.

    Args:
        context: [N] tokens. sums_DN, counts_DN: loss sums and token counts of each document and point
            (`PositionLosses.by_document`); points that no document reaches are left out.

    Raises:
        ValueError: fewer than two documents, or as `fit_context_law`.
    """
    sums_DN, counts_DN = np.asarray(sums_DN, np.float64), np.asarray(counts_DN, np.float64)
    D = len(sums_DN)
    if D < 2:
        raise ValueError(f"a bootstrap over documents needs at least 2 of them, got {D}")
    reached = counts_DN.sum(axis=0) > 0
    sums_DN, counts_DN = sums_DN[:, reached], counts_DN[:, reached]
    totals = counts_DN.sum(axis=0)
    c, y, _ = _curve(np.asarray(context, np.float64)[reached], sums_DN.sum(axis=0) / totals, None)
    # A point that many tokens stand behind weighs more; the noise itself comes from the documents.
    alpha, beta, gamma = _point(c, y, totals)
    draws_RD = np.random.default_rng(seed).multinomial(D, np.full(D, 1 / D), size=replicates).astype(np.float64)
    counts_RN = draws_RD @ counts_DN
    means = np.divide(draws_RD @ sums_DN, counts_RN, out=np.zeros_like(counts_RN), where=counts_RN > 0)
    return _law((alpha, beta, gamma), _solve(c, means, counts_RN), confidence, "documents")


def _curve(context: ArrayLike, loss: ArrayLike, error: ArrayLike | None) -> tuple[Array, Array, Array | None]:
    c, y = np.asarray(context, np.float64), np.asarray(loss, np.float64)
    e = None if error is None else np.asarray(error, np.float64)
    if c.ndim != 1 or c.shape != y.shape or (e is not None and e.shape != c.shape):
        raise ValueError(f"context {c.shape}, loss {y.shape} and standard errors must be lists of one length")
    if len(np.unique(c)) < 3:
        raise ValueError(f"three parameters need losses at 3 or more context lengths, got {len(np.unique(c))}")
    for name, values in (("context", c), ("loss", y), ("standard error", e)):
        if values is not None and not (np.isfinite(values) & (values > 0)).all():
            bad = values[~(np.isfinite(values) & (values > 0))][0]
            raise ValueError(f"every {name} must be a positive number, got {bad}")
    return c, y, e


def _law(point: tuple[float, float, float], samples: Array, confidence: float, source: str) -> ContextLaw:
    if not 0 < confidence < 1:
        raise ConfigError("confidence", confidence, "give a share between 0 and 1, such as 0.95")
    kept = samples[np.isfinite(samples).all(axis=1)]
    intervals = {}
    if len(kept):
        tail = 50 * (1 - confidence)
        low, high = np.percentile(kept, [tail, 100 - tail], axis=0)
        intervals = {name: (float(low[i]), float(high[i])) for i, name in enumerate(("alpha", "beta", "gamma"))}
    alpha, beta, gamma = (float(v) for v in point)
    return ContextLaw(
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        intervals=intervals,
        confidence=confidence,
        bootstrap=source if len(samples) else "none",
        replicates=len(kept),
        samples=kept,
    )


def _point(c_N: Array, y_N: Array, w_N: Array) -> Array:
    """alpha, beta, gamma of one curve.

    Raises:
        ValueError: the curve is none that the law describes.
    """
    point = _solve(c_N, y_N[None], w_N[None])[0]
    if not math.isfinite(point[0]):
        raise ValueError("the loss does not fall with context, so L(c) = (alpha/c)^beta + gamma has no fit")
    if point[1] > 0.999 * BETA_RANGE[1] or point[1] < 1.001 * BETA_RANGE[0]:
        raise ValueError(
            f"the loss does not follow L(c) = (alpha/c)^beta + gamma: its best beta is at the limit, {point[1]:.3g}"
        )
    return point


def _solve(c_N: Array, y_RN: Array, w_RN: Array) -> Array:
    """Weighted least squares of every replicate -> [R, 3] alpha, beta, gamma; NaN where the loss does not fall."""
    R = len(y_RN)
    scale = math.exp(np.log(c_N).mean())  # powers of c / scale stay near 1
    log_c = np.log(c_N / scale)
    low, high = np.full(R, math.log(BETA_RANGE[0])), np.full(R, math.log(BETA_RANGE[1]))
    K = 60
    for _ in range(5):  # each round narrows the bracket of log beta by K / 2: 5 rounds reach 1e-7
        trials_RK = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, K)
        cost_RK = _project(log_c, np.exp(trials_RK), y_RN, w_RN)[0]
        best = cost_RK.argmin(axis=1)
        rows = np.arange(R)
        low, high = trials_RK[rows, np.maximum(best - 1, 0)], trials_RK[rows, np.minimum(best + 1, K - 1)]
    beta = np.exp((low + high) / 2)
    _, A, gamma = (part[:, 0] for part in _project(log_c, beta[:, None], y_RN, w_RN))
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = np.where(A > 0, scale * np.exp(np.log(A) / beta), np.nan)
    return np.stack([alpha, np.where(A > 0, beta, np.nan), np.where(A > 0, gamma, np.nan)], axis=1)


def fit_many(context: ArrayLike, losses_RN: ArrayLike) -> Array:
    """alpha, beta, gamma [R, 3] of many curves at the same contexts, unweighted; NaN where a curve does not fall."""
    losses_RN = np.asarray(losses_RN, np.float64)
    return _solve(np.asarray(context, np.float64), losses_RN, np.ones_like(losses_RN))


def _project(log_c: Array, beta_RK: Array, y_RN: Array, w_RN: Array) -> tuple[Array, Array, Array]:
    """Cost, A >= 0 and gamma >= 0, each [R, K], of the best A c^-beta + gamma at every trial beta."""
    x_RKN = np.exp(-beta_RK[..., None] * log_c)
    w = w_RN / w_RN.sum(axis=1, keepdims=True)
    mean_x = np.einsum("rkn,rn->rk", x_RKN, w)
    mean_y = (w * y_RN).sum(axis=1)[:, None]
    var = np.einsum("rkn,rn->rk", np.square(x_RKN), w) - mean_x**2
    cov = np.einsum("rkn,rn->rk", x_RKN, w * y_RN) - mean_x * mean_y
    A = np.maximum(cov / np.maximum(var, 1e-300), 0)
    gamma = mean_y - A * mean_x
    through_zero = (cov + mean_x * mean_y) / (var + mean_x**2)  # the best A where gamma would be negative
    A, gamma = np.where(gamma < 0, through_zero, A), np.maximum(gamma, 0)
    residual = y_RN[:, None, :] - A[..., None] * x_RKN - gamma[..., None]
    return np.einsum("rkn,rn->rk", np.square(residual), w), A, gamma


def read_curves(path: str | Path) -> dict[str, dict[str, Array]]:
    """Curves of any CSV table, by model.

    Columns: `loss`, and the context as `context` (or `context_length`, `c`, `length`), or as `position` from 0, or as `start`
    and `end` of a bin of positions;
    optional `model`, `standard error` (or `standard_error`, `se`), `tokens`, and `document` (then each line is one
    document at one context, and the bootstrap is over documents).

    Returns:
        model -> {"context", "loss"} and where present {"standard error", "document", "tokens"}, arrays of one length.

    Raises:
        ValueError: a column or a number is missing, named with the file and line.
    """
    path = Path(path)
    curves: dict[str, dict[str, list[float]]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = {(name or "").strip().lower(): name for name in reader.fieldnames or []}
        x = [names[n] for n in ("context", "context_length", "c", "length", "position") if n in names][:1]
        # A position counts from 0 (`eval.position`): its token is predicted from the one more that precede it.
        before = 1 if x and x[0].strip().lower() == "position" else 0
        x = x or [names[n] for n in ("start", "end") if n in names]
        if "loss" not in names or not x or (len(x) == 1 and x[0].strip().lower() in ("start", "end")):
            some = ", ".join(name[:40] for name in list(names)[:6]) + (", ..." if len(names) > 6 else "")
            raise ValueError(
                f"{path.name} needs a column 'loss' and one 'context' (or 'start' and 'end'); it has {some or 'none'}"
            )
        error = next((names[n] for n in ("standard error", "standard_error", "se") if n in names), None)
        documents: dict[str, int] = {}
        for number, line in enumerate(reader, start=2):
            curve = curves.setdefault(line[names["model"]] if "model" in names else path.stem, {})
            try:
                ends = [float(line[column]) for column in x]
                values = {
                    "context": ends[0] + before if len(ends) == 1 else (ends[0] + ends[1] + 1) / 2,
                    "loss": float(line[names["loss"]]),
                }
                if error is not None:
                    values["standard error"] = float(line[error] or math.nan)
                if "tokens" in names:
                    values["tokens"] = float(line[names["tokens"]])
            except (TypeError, ValueError) as bad:
                raise ValueError(f"{path.name} line {number}: {bad}") from None
            if "document" in names:
                values["document"] = documents.setdefault(line[names["document"]], len(documents))
            for key, value in values.items():
                curve.setdefault(key, []).append(value)
    if not curves:
        raise ValueError(f"{path.name} holds no line below its head; each line is one loss")
    return {model: {key: np.array(values) for key, values in curve.items()} for model, curve in curves.items()}


def fit_curve(curve: Mapping[str, Array], *, replicates: int = 1000, confidence: float = 0.95, seed: int = 0) -> ContextLaw:
    """Fit one curve of `read_curves` by the best bootstrap that its columns allow: documents, errors, residuals."""
    options = {"replicates": replicates, "confidence": confidence, "seed": seed}
    if "document" in curve:
        context, n = np.unique(curve["context"], return_inverse=True)
        _, d = np.unique(curve["document"], return_inverse=True)
        tokens = curve.get("tokens", np.ones(len(n)))
        sums, counts = np.zeros((2, d.max() + 1, len(context)))
        np.add.at(sums, (d, n), curve["loss"] * tokens)
        np.add.at(counts, (d, n), tokens)
        return fit_context_law_by_document(context, sums, counts, **options)  # type: ignore[arg-type]
    error = curve.get("standard error")
    blank = 0 if error is None else int(np.isnan(error).sum())
    law = fit_context_law(curve["context"], curve["loss"], standard_error=None if blank else error, **options)  # type: ignore[arg-type]
    told = f"{law.bootstrap} ({blank} of {len(curve['loss'])} points have no standard error)" if blank else law.bootstrap
    return replace(law, bootstrap=told)


PAPER: Mapping[str, Sequence[float]] = {  # alpha, beta, gamma (Xiong et al. 2023, Figure 1)
    "7B": (25.4, 0.45, 1.56),
    "13B": (19.5, 0.48, 1.45),
    "34B": (17.7, 0.50, 1.41),
    "70B": (17.9, 0.51, 1.35),
}
