"""Scores of probes: replies against answers, the loss of the answer, tables, and the effective context length.

Every probe is scored twice on one reading of its prompt: the text that the model generates, against the answers; and the loss
of the first answer's own tokens, which tells a small model's progress long before it can say the answer. A probe that does not
fit the model is never cut: it is counted and not scored.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nemo_longctx.eval import helmet, metrics, mrcr, nolima, ruler
from nemo_longctx.eval.probes import WITHOUT_DEPTH, Probe, ProbeConfig, Tokenizer
from nemo_longctx.eval.requests import Continuation, Generation, Score
from nemo_longctx.eval.scoring import CausalModel, Chunks, Scorer


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """Result of one cell: mean score (ROUGE-L F for first sentences, share of answers found for others), mean loss of the
    answer (nats per token), samples scored, samples that were not scored because they did not fit the model or could not be
    made, and why they could not."""

    model: str
    kind: str
    length: int
    depth: float
    score: float
    answer_loss: float
    samples: int
    skipped: int
    reason: str = ""


def empty_rows(config: ProbeConfig, unmade: Mapping[tuple[str, int], str], *, name: str) -> list[ProbeRow]:
    """The cells of probes that could not be made: no score, and the reason."""
    nan = float("nan")
    return [
        ProbeRow(
            model=name, kind=kind, length=length, depth=depth, score=nan, answer_loss=nan, samples=0, skipped=config.samples,
            reason=why,
        )
        for (kind, length), why in unmade.items()
        for depth in ((0.0,) if kind in WITHOUT_DEPTH else config.depths)
    ]  # fmt: skip


def score_reply(probe: Probe, reply: str) -> float:
    """By the rule of the probe's own suite: ROUGE-L of the first line for a first sentence, the share of answers found for
    most others."""
    kind, answers = probe.kind, probe.answers
    if kind == "first_sentence":
        return metrics.rouge(reply.strip().split("\n")[0], answers, ("rougeL",))["rougeL"]
    if kind in ruler.ANY_ANSWER or kind == nolima.KIND:
        return metrics.found_any(reply, answers)
    if kind == "helmet_icl":
        return metrics.exact_match(metrics.after_label(reply, "label:"), answers)
    if kind == "helmet_rerank":
        return metrics.ndcg(metrics.ranking(reply), dict(zip(answers, probe.grades, strict=True)))
    if kind in helmet.KINDS:
        return metrics.contained(reply, answers)
    if kind in mrcr.KINDS:
        return metrics.mrcr(reply, answers[0], answers[0][: mrcr.MARK])
    return metrics.found(reply, answers)


def probe_requests(probes: Sequence[Probe], stop_tokens: Iterable[int]) -> list[Generation | Continuation]:
    """Two requests a probe, in turn: its reply, and the loss of its first answer."""
    stops = frozenset(stop_tokens)
    requests: list[Generation | Continuation] = []
    for probe in probes:
        requests.append(
            Generation(context=probe.prompt, max_new_tokens=probe.max_new_tokens, stop=lambda made: made[-1] in stops)
        )
        requests.append(Continuation(context=probe.prompt, continuation=probe.first))
    return requests


def fits(probe: Probe, max_length: int) -> bool:
    """Whether a model that reads `max_length` tokens can be asked this probe whole; no probe is ever truncated."""
    return len(probe.prompt) + max(probe.max_new_tokens, len(probe.first)) <= max_length


def run_probes(
    model: CausalModel,
    tokenizer: Tokenizer,
    probes: Sequence[Probe],
    *,
    name: str,
    stop_tokens: Iterable[int] = (),
    chunks: Chunks | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[ProbeRow]:
    """Score every probe that fits the model; the others are counted."""
    asked = [probe for probe in probes if fits(probe, model.max_length)]
    stop_tokens = list(stop_tokens)
    requests = probe_requests(asked, stop_tokens)
    results: dict[int, Score | list[int]] = {}
    for index, result, read in Scorer(model, chunks=chunks).run(requests):
        results[index] = result
        if progress is not None:
            progress(read)
    found = [results[i] for i in range(len(requests))]
    return probe_rows(probes, found, tokenizer, name=name, max_length=model.max_length, stop_tokens=stop_tokens)


def probe_rows(
    probes: Sequence[Probe],
    results: Sequence[Score | list[int]],
    tokenizer: Tokenizer,
    *,
    name: str,
    max_length: int,
    stop_tokens: Collection[int] = (),
) -> list[ProbeRow]:
    """Cells from the results of `probe_requests` over the probes that fit `max_length`; a stop token is no part of a reply."""
    cells: dict[tuple[str, int, float], list[tuple[float, float]]] = {}
    skipped: dict[tuple[str, int, float], int] = {}
    waiting = iter(results)
    for probe in probes:
        cell = (probe.kind, probe.length, probe.depth)
        scored = cells.setdefault(cell, [])
        if not fits(probe, max_length):
            skipped[cell] = skipped.get(cell, 0) + 1
            continue
        made, score = next(waiting), next(waiting)
        if isinstance(made, Score) or not isinstance(score, Score):
            raise TypeError("results must come in the order of probe_requests: a reply, then a score, for each probe")
        reply = made[:-1] if made and made[-1] in stop_tokens else made
        scored.append((score_reply(probe, tokenizer.decode(reply)), -score.log_likelihood / len(probe.first)))
    rows = []
    for (kind, length, depth), pairs in cells.items():
        means = [metrics.mean_scored(column) for column in zip(*pairs, strict=True)] if pairs else [float("nan")] * 2
        rows.append(
            ProbeRow(
                model=name,
                kind=kind,
                length=length,
                depth=depth,
                score=means[0],
                answer_loss=means[1],
                samples=len(pairs),
                skipped=skipped.get((kind, length, depth), 0),
            )
        )
    return rows


FLOOR = 0.5  # a model that scores less at the shortest length cannot do the task, so no length says anything of it


def _by_length(rows: Sequence[ProbeRow]) -> dict[tuple[str, str], dict[int, float]]:
    """(model, kind) -> length -> score, depths averaged."""
    lengths: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        lengths.setdefault((row.model, row.kind), {}).setdefault(row.length, []).append(row.score)
    return {key: {n: sum(found[n]) / len(found[n]) for n in sorted(found)} for key, found in lengths.items()}


def effective_length(rows: Sequence[ProbeRow], *, share: float = 0.9, floor: float = FLOOR) -> dict[tuple[str, str], int]:
    """(model, kind) -> the longest length up to which every length keeps `share` of the score at the shortest one, and `floor`.

    Depths are averaged. 0 where the shortest length scores less than `floor`, or was not scored: `too_weak` says which.
    """
    effective = {}
    for key, scores in _by_length(rows).items():
        effective[key] = 0
        short = scores[min(scores)]
        for length, score in scores.items():
            if not score >= max(share * short, floor):  # NaN, not scored, ends it too
                break
            effective[key] = length
    return effective


def too_weak(rows: Sequence[ProbeRow], *, floor: float = FLOOR) -> dict[tuple[str, str], float]:
    """(model, kind) -> score at the shortest length, of those that score less than `floor` there: of them no length tells
    anything, since they cannot do the task at any."""
    short = {key: scores[min(scores)] for key, scores in _by_length(rows).items()}
    return {key: score for key, score in short.items() if score < floor}


def longest_asked(rows: Sequence[ProbeRow]) -> dict[tuple[str, str], int]:
    """(model, kind) -> the longest length, scored or not."""
    return {key: max(scores) for key, scores in _by_length(rows).items()}


def told_length(
    key: tuple[str, str],
    effective: Mapping[tuple[str, str], int],
    weak: Mapping[tuple[str, str], float],
    longest: Mapping[tuple[str, str], int],
) -> str | int:
    """What a table says of one model and kind. Where the longest length that was asked is kept, so may longer ones be."""
    if key in weak:
        return f"too weak to tell ({weak[key]:.2f} at the shortest)"
    length = effective.get(key, "–")
    return at_least(length, longest[key]) if isinstance(length, int) and length else length or "not scored"


def at_least(length: int, longest: int) -> str | int:
    """A length, or `at least 8,192` where no longer one was asked."""
    return f"at least {length:,}" if length == longest else length


def write_csv(path: str | Path, rows: Iterable[ProbeRow]) -> None:
    """One line a cell, under the names of `ProbeRow`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(ProbeRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_csv(path: str | Path) -> list[ProbeRow]:
    """Read what `write_csv` wrote."""
    kinds = {"model": str, "kind": str, "reason": str, "length": int, "samples": int, "skipped": int}
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [ProbeRow(**{key: kinds.get(key, float)(value) for key, value in row.items()}) for row in csv.DictReader(file)]
