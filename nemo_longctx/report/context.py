"""The part of an evaluation's page about loss on fixed targets: figure, gains, key tokens, and the law where it holds."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_longctx.eval import context
from nemo_longctx.eval.results import SuiteResult
from nemo_longctx.eval.scaling import ContextLaw
from nemo_longctx.report.html import Section
from nemo_longctx.report.plots import plot_context_law, plot_loss_by_context, tokens_label

LINES = 8  # evaluations in one figure: as many as can be told apart; tables and CSV hold all
LAW_COLUMNS = ("model", "alpha (tokens)", "beta", "gamma (nats)", "documents")
LAW_NOTE = (
    "L(c) = (alpha / c)^beta + gamma, with 95 % intervals by a bootstrap over documents. Drawn only where it does better than "
    "a constant and no interval ends at a limit of the search."
)
SHOWS = (
    "The same tokens are predicted at every context, so the fall is what the model makes of the text before them, and a rise "
    "is harm done by text beyond what it can read. It says nothing of tokens in other places of a document."
)


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most `most` of the names, evenly spaced, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(place)] for place in np.linspace(0, len(names) - 1, most)]


def with_interval(law: ContextLaw, key: str) -> str:
    """`beta (low to high)` of one parameter."""
    low, high = law.intervals.get(key, (math.nan, math.nan))
    return f"{getattr(law, key):.3g} ({low:.3g} to {high:.3g})"


def context_sections(
    directory: Path, name: str, results: Sequence[SuiteResult], marks: Sequence[tuple[float, str]]
) -> list[Section]:
    """Figure and tables of one task of fixed targets; writes its CSVs and figures to `directory`."""
    found = {result.model: result.context[name] for result in results if name in result.context}
    lines = {model: context.rows(scores, model) for model, scores in found.items()}
    context.write_csv(directory / f"loss_by_{name}.csv", [row for rows in lines.values() for row in rows])
    drawn = spread(list(found), LINES)
    first = next(iter(found.values()))
    title = f"Loss on the same {first.targets} tokens, after more and more context"
    figure = plot_loss_by_context(
        {model: lines[model] for model in drawn}, directory / f"loss_by_{name}.png", marks=marks, title=title
    )
    gains, keyed = _gain_table(found)
    with (directory / f"gain_by_{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(gains)
    note = f"{SHOWS} {keyed} Bands and intervals: 95 % over documents."
    if len(drawn) < len(found):
        note += f" {len(drawn)} of {len(found)} evaluations are drawn; the CSV has all."
    sections = [Section(heading=title, note=note, figures=[figure], table=gains)]
    tests = {
        model: context.judge_law(_mean_context(scores), np.array(scores.losses))
        for model, scores in found.items()
        if model in drawn
    }
    return [*sections, _law_section(directory, name, found, tests)]


def _mean_context(scores: context.ContextScores) -> np.ndarray:
    """Mean tokens before a target, at each context: the i-th target has i more than the first."""
    return np.array(scores.contexts) + (scores.targets - 1) / 2


def _gain_table(found: dict[str, context.ContextScores]) -> tuple[list[list[object]], str]:
    """One line a model; and a sentence about which tokens are key."""
    judge, judged = list(found.items())[-1]
    keys = context.key_tokens(judged)
    count, of = sum(int(key.sum()) for key in keys), sum(map(len, keys))
    short, long = (f"{c:,}" for c in (judged.short, judged.contexts[-1]))
    head = ["model", f"loss after {short}", f"loss after {long}", "gain (nats)", "loss on key tokens", "LongPPL", "documents"]
    table: list[list[object]] = [[*head]]
    for model, scores in found.items():
        rows = {row.context: row.loss for row in context.rows(scores, model)}
        same = scores.same_targets(judged)
        loss = context.key_loss(scores, keys)[0] if same else math.nan
        told = ["–", "–"] if math.isnan(loss) else [f"{loss:.4f}", f"{math.exp(loss):.4g}"]
        ends = [f"{rows[scores.short]:.4f}", f"{rows[scores.contexts[-1]]:.4f}"]
        for n, (own, told_of) in enumerate(((scores.short, judged.short), (scores.contexts[-1], judged.contexts[-1]))):
            ends[n] += "" if own == told_of else f" (after {own:,})"  # the head is that of the last model
        table.append([model, *ends, str(context.gain(scores)), *told, len(scores.documents)])
    sentence = (
        f"Gain: what the longest context takes off the loss after {short} tokens. Key tokens ({count:,} of {of:,}): those "
        f"whose loss falls by more than {judged.key_threshold:g} nats under long context for “{judge}” (LongPPL)."
    )
    return table, sentence


def _law_section(
    directory: Path, name: str, found: dict[str, context.ContextScores], tests: dict[str, context.LawTest]
) -> Section:
    table: list[list[object]] = [[*LAW_COLUMNS, "p of a constant loss"]]
    laws, curves = {}, {}
    for model, test in tests.items():
        scores = found[model]
        p_value = "–" if math.isnan(test.p_value) else f"{test.p_value:.3g}"
        if test.law is None:
            table.append([model, f"not drawn: {test.why}", "", "", len(scores.documents), p_value])
            continue
        laws[model] = test.law
        curves[model] = {"context": _mean_context(scores), "loss": np.array(scores.losses).mean(axis=0)}
        values = [with_interval(test.law, key) for key in ("alpha", "beta", "gamma")]
        table.append([model, *values, len(scores.documents), p_value])
    longest = tokens_label(max(scores.contexts[-1] for scores in found.values()))
    title = f"Context scaling law on fixed targets, to {longest} tokens"
    figures = [plot_context_law(curves, laws, directory / f"context_law_{name}.png", title=title)] if laws else []
    note = LAW_NOTE if laws else f"{LAW_NOTE} Here no law is drawn; the table says why."
    return Section(heading=title, note=note, figures=figures, table=table)
