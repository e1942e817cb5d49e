"""Parts of a study's page that are computed from its arms rather than measured: the decay of the raw score, L(c) by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nemo_longctx.ablation.measured import last_result
from nemo_longctx.ablation.page import write_table
from nemo_longctx.ablation.study import Run
from nemo_longctx.compose import compose
from nemo_longctx.eval import context
from nemo_longctx.recipe import load_recipe
from nemo_longctx.report.context import LAW_NOTE, with_interval
from nemo_longctx.report.html import Section
from nemo_longctx.report.plots import plot_context_law
from nemo_longctx.rope.figures import plot_decay
from nemo_longctx.rope.variants import Rope

HEAD_DIM = 128  # Llama 2's, as in Figure 4


def decay_section(runs: Sequence[Run], directory: Path, *, short: int, distances: int) -> Section:
    """Raw score of each arm's encoding against distance (Xiong et al. 2023, Figure 4); `decay.png` and `decay.csv`.

    Args:
        runs: one an arm. short: the base's length, which factors are counted from. distances: tokens.
    """
    variants = {}
    for run in runs:
        request = load_recipe(compose(run.overrides)).rope_variant
        if request is not None:
            variants[run.arm] = request.complete(Rope(), seq_length=distances, trained=short, source="the base").variant
    figure, _ = plot_decay(variants, directory, head_dim=HEAD_DIM, rotary_dim=HEAD_DIM, distances=distances)
    note = (
        f"Computed, not measured: the score of a query and a key of ones (Figure 4), heads of {HEAD_DIM} as Llama 2's, to "
        f"{distances:,} tokens. A score that falls early or swings leaves little to tell far tokens by."
    )
    return Section(heading="Raw score against distance (Figure 4)", note=note, figures=[figure])


def law_section(arms: Mapping[str, Sequence[Run]], task: str, directory: Path) -> Section | None:
    """L(c) of each arm (Figure 1; `law.csv`), a document's losses averaged over seeds; None where no arm was measured."""
    table: list[list[object]] = [["arm", "alpha (tokens)", "beta", "gamma (nats)", "documents", "p of a constant loss"]]
    laws, curves = {}, {}
    for arm, runs in arms.items():
        found = [result.context[task] for run in runs if (result := last_result(run)) is not None and task in result.context]
        if not found or len(found) < len(runs):
            continue
        losses_DC = np.mean([np.array(scores.losses) for scores in found], axis=0)
        c = np.array(found[0].contexts) + (found[0].targets - 1) / 2
        test = context.judge_law(c, losses_DC)
        p_value = "–" if np.isnan(test.p_value) else f"{test.p_value:.3g}"
        if test.law is None:
            table.append([arm, f"not drawn: {test.why}", "", "", str(len(losses_DC)), p_value])
            continue
        laws[arm], curves[arm] = test.law, {"context": c, "loss": losses_DC.mean(axis=0)}
        values = [with_interval(test.law, key) for key in ("alpha", "beta", "gamma")]
        table.append([arm, *values, str(len(losses_DC)), p_value])
    if len(table) == 1:
        return None
    write_table(directory / "law.csv", table)
    title = "Loss against context by size (Figure 1)"
    figures = [plot_context_law(curves, laws, directory / "law.png", title=title)] if laws else []
    return Section(heading=title, note=f"{LAW_NOTE} A document's losses are averaged over seeds.", figures=figures, table=table)
