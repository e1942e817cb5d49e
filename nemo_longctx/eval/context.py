"""Loss on fixed targets against context: the same tokens, predicted after more and more of what comes before them.

Loss by position compares different tokens at different places, and a change of text passes for an effect of context. Here the
last K tokens of a block are the targets at every context length c, so whatever differs between two lengths is what the model
made of the tokens between. The independent unit is the document: intervals are of differences paired within it.

Key tokens are the targets whose loss falls by more than a threshold under long context; the mean over them follows long tasks
where the mean over all tokens hardly does (LongPPL, Fang et al. 2024, arXiv 2410.23771).

Shapes: D documents, C context lengths, W blocks of a document, K targets of a block.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.intervals import t_quantile
from nemo_longctx.eval.requests import Continuation
from nemo_longctx.eval.scaling import BETA_RANGE, ContextLaw, fit_context_law_by_document, fit_many

Array = NDArray[np.float64]
COLUMNS = ("model", "context", "read", "documents", "tokens", "loss", "standard error")
FEW = 3  # differences of which a bootstrap knows too little
KEY_LOSS = 2.0  # a key token is also predicted at least this well (nats) in long context: Fang et al. 2024, section 4.2


@dataclass(frozen=True, kw_only=True)
class ContextScores:
    """Losses of one model on fixed targets, nats per token.

    Args:
        contexts: [C] tokens before the first target, rising. targets: K. short: the context that gains are counted from.
        documents: [D] numbers of the documents read.
        losses: [D][C] mean over a document's targets.
        short_tokens, long_tokens: [D][W * K] loss of each target at `short` and at the longest context.
        key_threshold: fall of a target's loss from `short` to the longest context that makes it key, nats.
    """

    contexts: list[int]
    targets: int
    short: int
    documents: list[int]
    losses: list[list[float]]
    short_tokens: list[list[float]]
    long_tokens: list[list[float]]
    key_threshold: float = 2.0

    def same_targets(self, other: ContextScores) -> bool:
        """Whether both are of the same tokens, so that they can be compared token by token."""
        return (self.documents, self.targets, self.short, self.contexts[-1]) == (
            other.documents, other.targets, other.short, other.contexts[-1]
        ) and [len(row) for row in self.long_tokens] == [len(row) for row in other.long_tokens]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A mean of differences paired within documents and its 95 % interval, nats per token; NaN limits for one document."""

    mean: float
    low: float
    high: float
    documents: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:+.3f} (one document: no interval)"
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True, kw_only=True)
class ContextRow:
    """Mean loss at one context. `read`: context + targets, the tokens that the model reads; `standard_error` over documents."""

    model: str
    context: int
    read: int
    documents: int
    tokens: int
    loss: float
    standard_error: float


def choose_blocks(lengths: ArrayLike, *, needed: int, documents: int, blocks: int) -> list[tuple[int, list[int]]]:
    """(document, ends of its blocks) for up to `documents` long enough ones, evenly spaced among them.

    The first block ends where the document does, the others lie before it, evenly spaced and without overlap of whole blocks
    where there is room.

    Raises:
        ConfigError: no document has `needed` tokens: a shorter one has no long context to give.
    """
    lengths = np.asarray(lengths)
    enough = np.flatnonzero(lengths >= needed)
    if not len(enough):
        longest = int(lengths.max(initial=0))
        mend = f"the longest context and the targets need {needed} tokens, the longest document has {longest}"
        raise ConfigError("eval.contexts", needed, f"{mend}; give longer documents or shorter contexts")
    if len(enough) > documents:
        enough = enough[np.linspace(0, len(enough) - 1, documents).round().astype(int)]
    chosen = []
    for document in enough.tolist():
        length = int(lengths[document])
        count = min(blocks, max(1, (length - needed) // needed + 1))
        chosen.append((document, np.linspace(length, needed, count).round().astype(int).tolist()))
    return chosen


def halves(length: int, targets: int) -> list[int]:
    """Contexts such that the model reads `length` tokens, half of them, a quarter and so on, down to twice the targets."""
    read = [length]
    while read[-1] // 2 >= 2 * targets:
        read.append(read[-1] // 2)
    return [tokens - targets for tokens in reversed(read) if tokens > targets]


def length_of_many(lengths: ArrayLike, most: int, documents: int = 8) -> int:
    """The most tokens, up to `most`, that `documents` documents have (or all of them, where there are fewer)."""
    longest = np.sort(np.asarray(lengths))[::-1][:documents]
    return min(most, int(longest[-1])) if len(longest) else 0


def block_requests(tokens: Sequence[int], contexts: Sequence[int], targets: int) -> list[Continuation]:
    """One request a context length: the last `targets` of `tokens` after the c tokens before them."""
    body = list(tokens)
    first = len(body) - targets
    return [Continuation(context=body[first - c : first], continuation=body[first:]) for c in contexts]


def scores(
    losses_DWCK: Sequence[ArrayLike],
    *,
    documents: Sequence[int],
    contexts: Sequence[int],
    short: int,
    key_threshold: float = 2.0,
) -> ContextScores:
    """Put together what a model lost.

    Args:
        losses_DWCK: of each document an array [W, C, K], nats. documents: their numbers. contexts: [C]. short: one of them.

    Raises:
        ValueError: a loss is not finite.
    """
    arrays = [np.asarray(block, np.float64) for block in losses_DWCK]
    for document, array in zip(documents, arrays, strict=True):
        if not np.isfinite(array).all():
            raise ValueError(f"a loss of document {document} is not finite")
    at = list(contexts).index(short)
    return ContextScores(
        contexts=list(contexts),
        targets=arrays[0].shape[-1],
        short=short,
        documents=list(documents),
        losses=[array.mean(axis=(0, 2)).tolist() for array in arrays],
        short_tokens=[array[:, at].round(5).ravel().tolist() for array in arrays],
        long_tokens=[array[:, -1].round(5).ravel().tolist() for array in arrays],
        key_threshold=key_threshold,
    )


def rows(found: ContextScores, model: str) -> list[ContextRow]:
    """One row a context; the mean is over documents, each with the same weight."""
    losses = np.array(found.losses)
    D = len(losses)
    error = losses.std(axis=0, ddof=1) / math.sqrt(D) if D > 1 else np.full(len(found.contexts), math.nan)
    tokens = sum(map(len, found.long_tokens))
    return [
        ContextRow(
            model=model,
            context=c,
            read=c + found.targets,
            documents=D,
            tokens=tokens,
            loss=float(losses[:, n].mean()),
            standard_error=float(error[n]),
        )
        for n, c in enumerate(found.contexts)
    ]


def paired(differences: ArrayLike, *, replicates: int = 4000, seed: int = 0) -> Gain:
    """Mean of paired differences with a 95 % interval: a bootstrap-t over documents (Efron and Tibshirani 1993, section 12.5).

    The studentized bootstrap keeps its coverage for the few, skewed differences that a handful of documents gives, where
    plain percentiles are too narrow. Two or three have too few different draws for it (its interval would hold the truth never
    and four times in five): there Student's t is taken.

    Raises:
        ValueError: no difference.
    """
    d = np.asarray(differences, np.float64)
    d = d[np.isfinite(d)]
    D = len(d)
    if not D:
        raise ValueError("no pair was scored")
    mean = float(d.mean())
    spread = float(d.std(ddof=1)) if D > 1 else math.nan
    if D < 2 or spread <= 1e-12 * max(1.0, abs(mean)):
        edge = math.nan if D < 2 else mean
        return Gain(mean=mean, low=edge, high=edge, documents=D)
    error = spread / math.sqrt(D)
    if D <= FEW:
        half = t_quantile(D - 1) * error
        return Gain(mean=mean, low=mean - half, high=mean + half, documents=D)
    drawn = d[np.random.default_rng(seed).integers(0, D, (replicates, D))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(D)
    kept = errors > 1e-3 * error  # a draw of one document again and again has no spread to divide by
    t = (drawn.mean(axis=1)[kept] - mean) / errors[kept]
    low_t, high_t = np.percentile(t, [2.5, 97.5])
    return Gain(mean=mean, low=mean - high_t * error, high=mean - low_t * error, documents=D)


def gain(found: ContextScores, context: int | None = None) -> Gain:
    """What `context` (default: the longest) takes off the loss at `short`: positive where more context helps."""
    losses = np.array(found.losses)
    at = -1 if context is None else found.contexts.index(context)
    return paired(losses[:, found.contexts.index(found.short)] - losses[:, at])


def key_tokens(judge: ContextScores) -> list[NDArray[np.bool_]]:
    """Of each document, which targets are key: the judge's loss falls by more than its threshold from short to long context,
    to below `KEY_LOSS`.

    One judge chooses for every model that is compared. Its own loss on tokens so chosen is a little too low (they were chosen
    for being low); differences between two other models on them are fair.
    """
    return [
        (np.array(short) - np.array(long) > judge.key_threshold) & (np.array(long) < KEY_LOSS)
        for short, long in zip(judge.short_tokens, judge.long_tokens, strict=True)
    ]


def key_loss(found: ContextScores, keys: Sequence[NDArray[np.bool_]]) -> tuple[float, int]:
    """Mean loss on the key tokens in the longest context, and how many there are; NaN where there is none. LongPPL is its
    exponential."""
    picked = np.concatenate([np.array(row)[key] for row, key in zip(found.long_tokens, keys, strict=True)])
    return (float(picked.mean()) if len(picked) else math.nan), len(picked)


@dataclass(frozen=True, kw_only=True)
class LawTest:
    """Whether L(c) may be drawn: the law, or None and `why` not. `p_value`: of a loss that context does not change."""

    law: ContextLaw | None
    why: str
    p_value: float


def judge_law(
    contexts: ArrayLike,
    losses_DC: ArrayLike,
    *,
    replicates: int = 400,
    shuffles: int = 400,
    significance: float = 0.05,
    seed: int = 0,
) -> LawTest:
    """Fit L(c) = (alpha / c)^beta + gamma and say whether it describes the losses better than a constant does.

    The test: were the loss the same at every context, those of a document could be dealt to the contexts in any order. The
    share of such deals in which the law takes off as much of the squared error as in truth is the p value (Fisher 1935). The
    law is also refused where the loss rises again after its lowest point by an interval above 0, where many replicates have no
    fit, and where an interval ends at a limit of the search: then the data did not set that end.

    Args:
        contexts: [C] tokens. losses_DC: of the same targets, one row a document.
    """
    c, losses = np.asarray(contexts, np.float64), np.asarray(losses_DC, np.float64)
    D, C = losses.shape
    if D < 2 or C < 4:
        need = f"it needs 2 documents and 4 contexts, here are {D} and {C}"
        return LawTest(law=None, why=f"not fitted: {need}", p_value=math.nan)
    mean = losses.mean(axis=0)
    rng = np.random.default_rng(seed)
    order = rng.random((shuffles, D, C)).argsort(axis=2)
    dealt = np.take_along_axis(np.broadcast_to(losses, (shuffles, D, C)), order, axis=2).mean(axis=1)
    taken = _taken_off(c, np.concatenate([mean[None], dealt]))
    p_value = (1 + int((taken[1:] >= taken[0] - 1e-15).sum())) / (shuffles + 1)
    if p_value > significance:
        return LawTest(law=None, why=f"no better than a constant loss (p = {p_value:.2g})", p_value=p_value)
    lowest = int(mean.argmin())
    rise = paired(losses[:, -1] - losses[:, lowest]) if lowest < C - 1 else None
    if rise is not None and rise.low > 0:
        why = f"the loss rises again beyond {c[lowest]:g} tokens, by {rise}"
        return LawTest(law=None, why=why, p_value=p_value)
    try:
        law = fit_context_law_by_document(c, losses, np.ones_like(losses), replicates=replicates, seed=seed)
    except ValueError as error:
        return LawTest(law=None, why=str(error), p_value=p_value)
    why = touches_limit(law, replicates)
    return LawTest(law=None if why else law, why=why, p_value=p_value)


def touches_limit(law: ContextLaw, replicates: int) -> str:
    """Why a fitted law is not to be believed: replicates without a fit, or an interval that ends at a limit; else empty."""
    if replicates and law.replicates < 0.95 * replicates:
        return f"{replicates - law.replicates} of {replicates} resamples have no fit"
    low, high = law.intervals.get("beta", (math.nan, math.nan))
    if low <= 1.01 * BETA_RANGE[0] or high >= 0.99 * BETA_RANGE[1]:
        return f"the interval of beta, {low:.3g} to {high:.3g}, ends at a limit of the search"
    if law.intervals.get("gamma", (1.0, 1.0))[0] <= 1e-9:
        return "the interval of gamma ends at 0, a limit of the search"
    return ""


def _taken_off(c: Array, curves_RC: Array) -> Array:
    """Share of the squared error about a constant that the best law takes off, for each curve."""
    around = np.square(curves_RC - curves_RC.mean(axis=1, keepdims=True)).sum(axis=1)
    alpha, beta, gamma = fit_many(c, curves_RC).T[..., None]
    with np.errstate(divide="ignore"):  # alpha 0: a constant
        fitted = np.exp(beta * (np.log(alpha) - np.log(c))) + gamma
    left = np.square(curves_RC - fitted).sum(axis=1)
    left = np.where(np.isfinite(left), left, around)  # no law falls with this curve
    return (around - left) / np.maximum(around, 1e-300)


def write_csv(path: str | Path, lines: Iterable[ContextRow]) -> None:
    """Write rows under the columns of `COLUMNS`; an unknown standard error is an empty field."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in lines:
            error = "" if math.isnan(row.standard_error) else f"{row.standard_error:.6g}"
            writer.writerow([row.model, row.context, row.read, row.documents, row.tokens, f"{row.loss:.6f}", error])
