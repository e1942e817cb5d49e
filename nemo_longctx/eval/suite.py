"""What is measured of one model at one moment: loss by position and by context, probes, and tasks, each a block of YAML.

A suite runs the same way on a live model in the middle of a run and on a checkpoint. Ranks that hold the same model share the
work; a task that fails on any rank is reported on all and the next one runs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.corpus import is_corpus, open_corpus
from nemo_longctx.data.sft_instances import PROMPT, chat_template, encode_conversation, read_conversations
from nemo_longctx.data.vocabulary import check_ids
from nemo_longctx.eval import context, position, probe_scores, probes
from nemo_longctx.eval.config import (
    AnswersTask,
    ContextTask,
    HarnessTask,
    PositionTask,
    ProbeTask,
    Task,
    longest_input,
    parse_tasks,
)
from nemo_longctx.eval.generation import end_tokens
from nemo_longctx.eval.requests import Continuation
from nemo_longctx.eval.results import SuiteResult, blank_result
from nemo_longctx.eval.scoring import CausalModel, Chunks, Scorer, Speed
from nemo_longctx.eval.sharing import PeerError, check_in, everywhere, new_tokens, run_shared
from nemo_longctx.eval.truncation import TruncationRecord

__all__ = [
    "AnswersTask",
    "ContextTask",
    "HarnessTask",
    "PositionTask",
    "ProbeTask",
    "Suite",
    "Task",
    "longest_input",
    "parse_tasks",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """Of one lm-eval block: metrics by task and group; value of each sample by `task/metric`; prompts that were cut."""

    tasks: dict[str, dict[str, Any]]
    watched: dict[str, list[float]] = field(default_factory=dict)
    truncations: list[TruncationRecord] = field(default_factory=list)


HarnessRunner = Callable[[HarnessTask], HarnessResult]


class InterruptedEvaluationError(Exception):
    """An evaluation that was asked to leave before its end; nothing of it is kept."""


class Suite:
    """Runs tasks over models.

    Args:
        tasks: what to measure.
        tokenizer: Hugging Face tokenizer; probes and lm-eval tasks need one.
        chunks: how much is held at once.
    """

    def __init__(self, tasks: Sequence[Task], *, tokenizer: Any = None, chunks: Chunks | None = None):
        # One lm-eval task at a time, so that one whose data is missing costs no other.
        self.tasks = [one for task in tasks for one in _apart(task)]
        self.tokenizer, self.chunks = tokenizer, chunks
        names = [task.name for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(
                "eval.tasks", twice, "two tasks of this name; give each a `label` (probes: put them in one block)"
            )
        if tokenizer is None and any(not isinstance(task, PositionTask | ContextTask) for task in self.tasks):
            raise ConfigError(
                "eval.tokenizer", None, "probes, answers and lm-eval tasks need the model's Hugging Face tokenizer"
            )
        self.rate = 0.0  # tokens a second, from what was run before
        self.speed: Speed | None = None  # of the model that was measured last
        self.took: dict[str, float] = {}  # seconds of each task, from the last time

    def run(
        self,
        model: CausalModel,
        *,
        name: str,
        harness: HarnessRunner | None = None,
        group: Any = None,
        quiet: bool = False,
        time_budget: float | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> SuiteResult:
        """Measure `model`, on every rank that holds it or a part of it.

        A task that fails, on one rank or on all, is reported by all, and the next one begins.

        Args:
            name: label of the model in tables and figures.
            harness: runs lm-eval tasks. group: ranks that share the work.
            time_budget: seconds; a task that is not expected to end within it is skipped and reported.
            interrupted: asked before each task, on every rank with the same answer: whether to leave now.

        Raises:
            InterruptedEvaluationError: it was to leave.
        """
        began = time.monotonic()
        result = blank_result(name)
        for task in self.tasks:
            if interrupted is not None and interrupted():
                raise InterruptedEvaluationError
            if not _all_agree(self._in_time(task, began, time_budget)):
                result.skipped.append(task.name)
                continue
            start, found = time.monotonic(), blank_result(name)
            try:
                self._one(task, model, found, harness, group, quiet)
            except PeerError as heard:
                errors = heard.errors
            except Exception as failure:  # a task must never end the training run that it watches
                logger.debug("evaluation task failed", exc_info=True)
                errors, _ = check_in(f"{type(failure).__name__}: {failure}")
            else:
                errors, _ = check_in()
            if errors:
                result.errors[task.name] = "; ".join(errors)
            else:  # on every rank or on none, so that all hold the same
                result.add(found)
            self.took[task.name] = result.seconds[task.name] = time.monotonic() - start
        return result

    def _in_time(self, task: Task, began: float, budget: float | None) -> bool:
        return budget is None or time.monotonic() - began + self.expected_seconds(task) <= budget

    def expected_seconds(self, task: Task) -> float:
        """What the task took last time; before, its tokens at the speed seen so far; 0 where nothing is known."""
        if task.name in self.took:
            return self.took[task.name]
        return _tokens_of(task) / self.rate if self.rate else 0.0

    def _one(
        self, task: Task, model: CausalModel, result: SuiteResult, harness: HarnessRunner | None, group: Any, quiet: bool
    ) -> None:
        if isinstance(task, PositionTask):
            totals = self._position(task, model, group, quiet)
            result.position[task.name] = totals.rows(result.model)
            sums, counts = totals.by_document()
            result.documents[task.name] = {"edges": totals.edges.tolist(), "sums": sums.tolist(), "counts": counts.tolist()}
            if task.guard:
                result.watched[f"loss_{task.name}"] = (sums.sum(1) / counts.sum(1)).tolist()
        elif isinstance(task, ContextTask):
            result.context[task.name] = self._context(task, model, group, quiet)
        elif isinstance(task, ProbeTask):
            result.probes.extend(self._probes(task, model, result.model, group, quiet))
        elif isinstance(task, AnswersTask):
            losses, right = self._answers(task, model, group, quiet)
            spread = losses.std(ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else np.nan
            values = {"loss": float(losses.mean()), "loss_stderr": float(spread), "right": float(right.mean())}
            result.tasks[task.name] = values | {"samples": len(losses)}
            if task.guard:
                result.watched.update({f"loss_{task.name}": losses.tolist(), f"{task.name}/right": right.tolist()})
        elif harness is None:
            raise ConfigError("eval.tasks", task.tasks, "lm-eval tasks need lm-eval: pip install nemo-longctx[eval]")
        else:
            found = harness(task)
            result.tasks.update({task.labelled(name): values for name, values in found.tasks.items()})
            result.truncations.extend(replace(cut, task=task.labelled(cut.task)) for cut in found.truncations)
            if task.guard:
                result.watched.update({task.labelled(name): values for name, values in found.watched.items()})

    def _corpus(self, path: Any) -> Any:
        """The corpus at `path`, whose ids must be those of the tokenizer, if there is one."""
        corpus = open_corpus(path)
        if self.tokenizer is not None:
            check_ids(corpus, self.tokenizer)
        return corpus

    def _position(self, task: PositionTask, model: CausalModel, group: Any, quiet: bool) -> position.PositionLosses:
        corpus = self._corpus(task.corpus)
        chosen = choose_documents(np.asarray(corpus.lengths), task.seq_length + 1, task.documents)
        requests = []
        for document in chosen:
            stop = min(int(corpus.lengths[document]), task.seq_length + 1)
            tokens = corpus.tokens(int(document), 0, stop).tolist()
            requests.append(Continuation(context=tokens[:1], continuation=tokens[1:]))
        edges = position.uniform_edges(task.seq_length, task.bins) if task.bins else position.geometric_edges(task.seq_length)
        totals = position.PositionLosses(edges)
        for score in self._run(requests, model, group, "loss by position", quiet):
            totals.add(-score.token_log_probs[None])
        return totals

    def _context(self, task: ContextTask, model: CausalModel, group: Any, quiet: bool) -> context.ContextScores:
        corpus = self._corpus(task.corpus)
        chosen = context.choose_blocks(corpus.lengths, needed=task.needed, documents=task.documents, blocks=task.blocks)
        requests = []
        for document, ends in chosen:
            for end in ends:
                tokens = corpus.tokens(document, end - task.needed, end).tolist()
                requests += context.block_requests(tokens, task.contexts, task.targets)
        found = iter(self._run(requests, model, group, "loss on fixed targets", quiet))
        losses = [
            [[-next(found).token_log_probs for _ in task.contexts] for _ in ends]  # [W, C, K] of each document
            for _, ends in chosen
        ]
        return context.scores(
            losses,
            documents=[document for document, _ in chosen],
            contexts=task.contexts,
            short=task.short or task.contexts[0],
            key_threshold=task.key_threshold,
        )

    def _probes(self, task: ProbeTask, model: CausalModel, name: str, group: Any, quiet: bool) -> list[probe_scores.ProbeRow]:
        bos = self.tokenizer.bos_token_id
        prefix = [] if bos is None else [bos]
        if is_corpus(task.text):
            self._corpus(task.text)
            texts = corpus_texts(task.text, self.tokenizer, 4 * max(task.probes.lengths))
        else:
            texts = read_texts(task.text)
        unmade: dict[tuple[str, int], str] = {}
        made = probes.make_probes(task.probes, texts, self.tokenizer, prefix=prefix, cache=task.cache, unmade=unmade)
        for (kind, length), why in () if quiet else unmade.items():
            logger.warning("no %s probes of %d tokens: %s", kind, length, why)
        asked = [probe for probe in made if probe_scores.fits(probe, model.max_length)]
        stops = end_tokens(model, self.tokenizer)
        results = self._run(probe_scores.probe_requests(asked, stops), model, group, "probes", quiet)
        rows = probe_scores.probe_rows(made, results, self.tokenizer, name=name, max_length=model.max_length, stop_tokens=stops)
        return rows + probe_scores.empty_rows(task.probes, unmade, name=name)

    def _answers(self, task: AnswersTask, model: CausalModel, group: Any, quiet: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of each conversation: mean loss of its answers' tokens, and whether greedy decoding would write each of them, [n]."""
        template = chat_template(task.template, self.tokenizer)
        encoded = [encode_conversation(self.tokenizer, template, m) for m in read_conversations(task.conversations)]
        read = [one for one in encoded if len(one[0]) <= model.max_length]
        if not read:
            shortest = min((len(tokens) for tokens, _ in encoded), default=0)
            raise ValueError(f"no conversation fits {model.max_length} tokens; the shortest has {shortest}")
        if len(read) < len(encoded):
            left = len(encoded) - len(read)
            where = f"{task.name}: {left} of {len(encoded)} conversations"
            logger.warning("%s are longer than the model's %d tokens and are left out", where, model.max_length)
        chosen = np.unique(np.linspace(0, len(read) - 1, min(task.samples, len(read))).round().astype(int))
        requests, of = [], []  # an answer of a conversation each
        for number, place in enumerate(chosen):
            tokens, roles = read[place]
            edges = np.flatnonzero(np.diff(np.concatenate([[PROMPT], roles, [PROMPT]])))
            for start, end in edges.reshape(-1, 2):
                requests.append(Continuation(context=tokens[:start].tolist(), continuation=tokens[start:end].tolist()))
                of.append(number)
        scores = self._run(requests, model, group, "loss on answers", quiet)
        sums, counts, right = np.zeros(len(chosen)), np.zeros(len(chosen)), np.ones(len(chosen))
        for number, score in zip(of, scores, strict=True):
            sums[number] -= score.log_likelihood
            counts[number] += len(score.token_log_probs)
            right[number] *= score.is_greedy
        return sums / counts, right

    def _run(self, requests: Sequence[Any], model: CausalModel, group: Any, what: str, quiet: bool) -> list[Any]:
        scorer, began = Scorer(model, chunks=self.chunks), time.monotonic()
        scorer.speed = self.speed
        results = run_shared(scorer, requests, group=group, what=what, quiet=quiet)
        self.speed = scorer.speed
        self.rate = new_tokens(scorer, requests) / max(1e-9, time.monotonic() - began)
        return results


def _apart(task: Task) -> list[Task]:
    return [replace(task, tasks=(name,)) for name in task.tasks] if isinstance(task, HarnessTask) else [task]


def _tokens_of(task: Task) -> int:
    """About how many tokens a task reads; 0 for those whose data is not loaded yet."""
    if isinstance(task, PositionTask):
        return task.documents * task.seq_length
    if isinstance(task, ContextTask):
        return task.documents * task.blocks * sum(c + task.targets for c in task.contexts)
    if isinstance(task, HarnessTask | AnswersTask):
        return 0
    asked = task.probes
    cells = sum(1 if kind in probes.WITHOUT_DEPTH else len(asked.depths) for kind in asked.kinds)
    return cells * asked.samples * sum(asked.lengths)


def _all_agree(mine: bool) -> bool:
    """Rank 0's decision: clocks differ, and ranks that part ways would wait for each other for ever."""
    return everywhere(mine)[0]


def choose_documents(lengths: np.ndarray, needed: int, count: int) -> np.ndarray:
    """Which documents to read: `count` of those with `needed` tokens, evenly spaced; else the longest there are.

    Raises:
        ValueError: no document has two tokens.
    """
    enough = np.flatnonzero(lengths >= needed)
    if len(enough) >= count:
        return enough[np.linspace(0, len(enough) - 1, count).round().astype(int)]
    longest = np.argsort(-lengths, kind="stable")[:count]
    longest = longest[lengths[longest] >= 2]
    if not len(longest):
        raise ValueError("no document of the corpus has two tokens, so nothing can be predicted")
    return np.sort(longest)


def read_texts(path: str | Path) -> list[str]:
    """Texts of a JSONL file's `text` fields, or a plain file as one text."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".json"):
        return [path.read_text(encoding="utf-8")]
    texts = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path.name} line {number} is not JSON ({error})") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                has = f"it has {', '.join(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
                raise ValueError(f"{path.name} line {number} has no text in a field 'text'; {has}")
            texts.append(row["text"])
    if not texts:
        raise ValueError(f"{path.name} holds no text; each line is an object with a field 'text'")
    return texts


def corpus_texts(prefix: str, tokenizer: Any, tokens: int) -> list[str]:
    """Documents from the start of an indexed corpus as text, until there are `tokens` of them or no more."""
    corpus, have = open_corpus(prefix), 0
    texts: list[str] = []
    while have < tokens and len(texts) < len(corpus):
        document = corpus.tokens(len(texts))
        texts.append(tokenizer.decode(document.tolist(), skip_special_tokens=True))
        have += len(document)
    return texts
