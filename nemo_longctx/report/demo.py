"""What the demo found, in sentences, tables and pictures that need no other knowledge than what a token is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.eval import context, probe_scores
from nemo_longctx.eval.results import SuiteResult
from nemo_longctx.report.plots import plot_loss_by_context, plot_probes

BASE, LONG = "demo_base", "demo_long"
NAMES = {BASE: "trained to read 256 tokens", LONG: "the same model, extended to 2,048"}
SHORT_LENGTH, LONG_LENGTH, TARGETS = 256, 2048, 64
HARM = 0.05  # nats: what the extended model may lose at the old length
FOUND = ("code", "passkey")


def findings(found: dict[str, SuiteResult]) -> dict[str, Any]:
    """What the extension did, as it came out: use of context, look-ups, and what it cost at the old length.

    Gains and the change at the old length are means over documents with 95 % intervals, nats a token. A sentence each says
    whether the data can tell.
    """
    (name,) = found[BASE].context
    fixed = {model: result.context[name] for model, result in found.items()}
    by_read = {model: {row.read: row.loss for row in context.rows(scores, model)} for model, scores in fixed.items()}
    gains = {model: context.gain(scores) for model, scores in fixed.items()}
    ((watched, before),), ((_, after),) = (found[model].watched.items() for model in (BASE, LONG))
    harm = context.paired(np.array(after) - np.array(before))
    lookups = {model: {kind: _by_length(result, kind) for kind in FOUND} for model, result in found.items()}
    uses = gains[LONG].low > 0
    return {
        "fixed_target_loss": by_read,
        "gain_from_256_to_2048": {model: _interval(gain) for model, gain in gains.items()},
        "lookups": lookups,
        "change_at_old_length": _interval(harm) | {"against": "the base under its own RoPE", "measurement": watched},
        "sentences": [
            f"Context from 256 to 2,048 tokens takes {gains[LONG]} nats off the loss of the extended model"
            + ("." if uses else ": it cannot be told from none."),
            f"For the base it is {gains[BASE]}: "
            + ("more than it can read does harm." if gains[BASE].high < 0 else "no harm seen."),
            f"At the old length the extended model's loss changed by {harm}; more than {HARM} would be a loss of ability"
            + (": this is one." if harm.low > HARM else "." if harm.high < HARM else ": it cannot be told apart."),
            *(_lookup_sentence(kind, lookups) for kind in FOUND),
        ],
    }


def _lookup_sentence(kind: str, lookups: dict[str, Any]) -> str:
    base, long = (lookups[model][kind] for model in (BASE, LONG))
    shortest = min(long)
    if max(base[shortest], long[shortest]) < probe_scores.FLOOR:
        return (
            f"{kind}: both are too weak to tell; at {shortest} tokens they find {base[shortest]:.0%} and {long[shortest]:.0%}."
        )
    return (
        f"{kind} at {LONG_LENGTH:,} tokens: the extended model finds {long[LONG_LENGTH]:.0%}, the base {base[LONG_LENGTH]:.0%}."
    )


def _by_length(result: SuiteResult, kind: str) -> dict[int, float]:
    """Score by length, depths averaged."""
    cells: dict[int, list[float]] = {}
    for row in result.probes:
        if row.kind == kind:
            cells.setdefault(row.length, []).append(row.score)
    return {length: float(np.mean(scores)) for length, scores in cells.items()}


def _interval(gain: context.Gain) -> dict[str, Any]:
    return {"mean": gain.mean, "low": gain.low, "high": gain.high, "documents": gain.documents}


def write_pictures(output: Path, found: dict[str, SuiteResult]) -> None:
    """`context.png` and `lookups.png`, each with its CSV."""
    (name,) = found[BASE].context
    lines = {model: context.rows(result.context[name], NAMES[model]) for model, result in found.items()}
    context.write_csv(output / "context.csv", [row for rows in lines.values() for row in rows])
    plot_loss_by_context(
        {NAMES[model]: rows for model, rows in lines.items()},
        output / "context.png",
        marks=[(SHORT_LENGTH, "what the first model read in training")],
        title="The same 64 tokens, predicted after more and more of the text before them",
    )
    cells = [replace(row, model=NAMES[model]) for model, result in found.items() for row in result.probes]
    probe_scores.write_csv(output / "lookups.csv", cells)
    title = "Share of hidden codes and numbers that are found"
    plot_probes(cells, output / "lookups.png", title=title)


def markdown(summary: dict[str, Any]) -> str:
    """The summary for people."""
    losses, export, found = summary["losses"], summary["export"], summary["findings"]
    lines = ["# From 256 to 2,048 tokens", "", *(f"- {sentence}" for sentence in found["sentences"]), ""]
    reads = list(found["fixed_target_loss"][BASE])
    lines += ["Loss on the same 64 tokens, by how many tokens the model reads:", ""]
    lines += [f"| model | {' | '.join(f'{int(read):,}' for read in reads)} |", "| --- |" + " --- |" * len(reads)]
    for model, by_read in found["fixed_target_loss"].items():
        lines.append(f"| {NAMES[model]} | {' | '.join(f'{loss:.3f}' for loss in by_read.values())} |")
    lines += ["", "| model | loss at positions 128-255 | at 1,024-2,047 |", "| --- | --- | --- |"]
    lines += [f"| {NAMES[model]} | {loss['128-255']:.3f} | {loss['1024-2047']:.3f} |" for model, loss in losses.items()]
    lines += ["", *(f"- {'yes' if held else 'NO'}: {promise}" for promise, held in summary["checks"].items()), "", "Read:", ""]
    for model, read in summary["read"].items():
        shares = ", ".join(f"{share:.0%} of {Path(path).name}" for path, share in read["sources"].items() if share)
        behind = ", behind what the first had read" if read["after"] else ""
        lines.append(f"- {NAMES[model]}: {read['tokens']:,} tokens{f' ({shares})' if shares else ''}{behind}")
    difference, last = export["max_abs_logit_difference"], export["positions_compared"] - 1
    lines += ["", f"Export: rope_theta {export['rope_theta']:,.0f}, longest input {export['max_position_embeddings']:,} "
              f"tokens; its logits differ from the NeMo model's by {difference:.1e} at most, "
              f"at positions to {last:,}."]  # fmt: skip
    lines += ["", "| part | seconds |", "| --- | --- |"]
    lines += [f"| {part} | {seconds} |" for part, seconds in summary["seconds"].items()]
    lines += ["", "Pictures: context.png, lookups.png, loss_by_position.png, training.png, each with its CSV. What was",
              f"measured in training, on one page: {LONG}/results/eval/index.html. The commands:", "", "```"]  # fmt: skip
    return "\n".join([*lines, *summary["commands"].values(), "```", ""])
