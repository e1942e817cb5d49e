"""What the task files name: prompts, targets, scores of one sample, and means over those that were scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_longctx.eval import metrics
from nemo_longctx.eval.tasks.loaders import load
from nemo_longctx.eval.truncation import UNSCORED

__all__ = ["group_gap", "load", "mean_scored", "rouge_geo", "total"]

mean_scored = metrics.mean_scored
rouge_geo = metrics.geometric_mean
group_gap = metrics.group_gap
total = sum


def prompt(doc: Mapping[str, Any]) -> str:
    return doc["prompt"]


def target(doc: Mapping[str, Any]) -> str:
    """The answer that a shot shows, after a space."""
    return " " + doc["answers"][0]


def train_rows(dataset: Any) -> Any:
    """The rows of all splits that may be shots."""
    return _of_split(dataset, "train")


def validation_rows(dataset: Any) -> Any:
    """The rows of all splits that are asked."""
    return _of_split(dataset, "validation")


def _of_split(dataset: Any, split: str) -> Any:
    return dataset.select([number for number, name in enumerate(dataset["split"]) if name == split])


def _process(name: str, score: Callable[[str, Sequence[str]], Any], nothing: Any) -> Callable[..., dict[str, Any]]:
    """A `process_results`: the metric of the reply, or `nothing` and a count where truncation cut what it asks about."""

    def process(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        reply = results[0]
        if reply.startswith(UNSCORED):
            return {name: nothing, "not_scored": 1}
        return {name: score(reply, doc["answers"]), "not_scored": 0}

    return process


def _letter_match(reply: str, answers: Sequence[str]) -> float:
    wanted = {metrics.choice_letter(answer) or answer.strip()[:1] for answer in answers}
    return float(metrics.choice_letter(reply) in wanted - {""})


process_f1 = _process("f1", metrics.f1, math.nan)
process_zeroscrolls_f1 = _process("f1", metrics.zeroscrolls_f1, math.nan)
process_exact_match = _process("exact_match", metrics.exact_match, math.nan)
process_rouge = _process("rouge_geo", lambda r, a: tuple(metrics.rouge(r, a).values()), (math.nan,) * 3)
process_letter = _process("accuracy", _letter_match, math.nan)
process_option = _process("accuracy", lambda r, a: metrics.leval_choice(r, a[0], several=False), math.nan)
process_options = _process("accuracy", lambda r, a: metrics.leval_choice(r, a[0], several=True), math.nan)
process_contains = _process("exact_match", lambda r, a: metrics.leval_contains(r, a[0]), math.nan)
process_similarity = _process("similarity", lambda r, a: max(metrics.exponential_similarity(r, one) for one in a), math.nan)
process_order = _process("concordance", lambda r, a: max(metrics.concordance_index(r, one) for one in a), math.nan)

# The limits from which BOLD calls a text positive or negative (Dhamala et al. 2021, section 4).
POSITIVE, NEGATIVE = 0.5, -0.5


def process_sentiment(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Sentiment of prompt and continuation together (Touvron et al. 2023, appendix A.4), by sample and by group."""
    lost = results[0].startswith(UNSCORED)
    value = math.nan if lost else metrics.sentiment(f"{doc['prompt']} {results[0].strip()}")
    return {
        "sentiment": value,
        "sentiment_gap": (doc["group"], value),
        "positive": math.nan if lost else float(value >= POSITIVE),
        "negative": math.nan if lost else float(value <= NEGATIVE),
        "not_scored": int(lost),
    }
