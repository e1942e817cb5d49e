"""Long question-answer data from unlabelled documents: ask, drop repeats, criticise, and build training instances.

Xiong et al. 2023, sections 2.2 and 4.3: a question about one chunk becomes a training instance over the whole document.
Everything is planned from the documents and the settings alone, and every reply is read back from the journal: the output is
a function of (documents, settings, replies), whatever was killed, retried or done in another order meanwhile.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.instruct.chunking import (
    Chunk,
    Document,
    chunk_document,
    load_tokenizer,
    read_document_at,
    read_documents,
    token_ends,
)
from nemo_longctx.instruct.client import OMITTABLE, Call, Completer
from nemo_longctx.instruct.dedup import NearDuplicates
from nemo_longctx.instruct.journal import Journal
from nemo_longctx.instruct.output import said
from nemo_longctx.instruct.prompts import KINDS, PromptSet, parse_pair, parse_verdict
from nemo_longctx.instruct.replies import Asker, Outcome, Prices

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What is asked and what is kept.

    Args:
        documents: JSONL file, one object with a text a line.
        model: the model's name, as the server knows it.
        tokenizer: tokenizer of the model to be tuned: a folder with tokenizer.json, that file, or a hub name.
        target_length: most tokens of one training instance; the document is cut to fit.
        chunk_tokens: most tokens of the chunk that a question is asked about; with the prompt's words and the answer it
            must fit the short model's window.
        max_chunks_per_document: ask about so many chunks of a document, drawn evenly; 0 asks about all.
        template_tokens: tokens kept free in each instance for the chat template's marks.
        max_answer_tokens: most tokens of one reply.
        temperature: of the questions; the critique is asked at 0.
        near_duplicate: similarity of two questions (Jaccard, words and word pairs) from which the later one is dropped.
        form_attempts: replies to one prompt before its chunk is given up as out of form.
        stop_after_malformed: stop the run after so many replies out of form with none in form between them.
        text_key, id_key: fields of a document's text and name.
        seed: of the draw of question kinds and chunks, and of the model's sampling where the server honours one.
        extra_body: JSON object that goes into each request, as {"chat_template_kwargs": {"enable_thinking": false}}.
        omit: fields that the server does not take, by comma: temperature, seed, max_tokens (or rather max_completion_tokens).
    """

    documents: Path
    model: str
    tokenizer: str
    target_length: int = 16_384
    chunk_tokens: int = 3_072
    max_chunks_per_document: int = 0
    template_tokens: int = 64
    max_answer_tokens: int = 512
    temperature: float = 0.7
    near_duplicate: float = 0.8
    form_attempts: int = 3
    stop_after_malformed: int = 20
    text_key: str = "text"
    id_key: str = "id"
    seed: int = 1234
    extra_body: str = ""
    omit: str = ""

    def __post_init__(self):
        self._check_request()
        for name in ("target_length", "max_answer_tokens", "form_attempts", "stop_after_malformed"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        for name in ("max_chunks_per_document", "template_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative")
        if self.chunk_tokens < 32:
            raise ConfigError("chunk_tokens", self.chunk_tokens, "must be at least 32; less holds nothing to ask about")
        if self.chunk_tokens >= self.target_length:
            mend = f"leaves no room for a document of target_length={self.target_length}; make chunks smaller than that"
            raise ConfigError("chunk_tokens", self.chunk_tokens, mend)
        if not 0 < self.near_duplicate <= 1:
            raise ConfigError("near_duplicate", self.near_duplicate, "must be in (0, 1]; 1 drops only the same words")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError("temperature", self.temperature, "must be a number that is not negative")
        if not self.model:
            raise ConfigError("model", self.model, "name the model as the server knows it")

    def _check_request(self):
        try:
            extra = json.loads(self.extra_body) if self.extra_body else {}
        except ValueError as error:
            raise ConfigError("extra_body", self.extra_body, f"is not JSON ({error})") from None
        if not isinstance(extra, dict):
            raise ConfigError("extra_body", self.extra_body, "give a JSON object of request fields")
        for name in filter(None, (part.strip() for part in self.omit.split(","))):
            if name not in OMITTABLE:
                raise ConfigError("omit", name, f"cannot be left out of a request, {did_you_mean(name, OMITTABLE)}")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One chunk to ask about. `offset` finds its document again."""

    id: str
    document_id: str
    document_sha256: str
    offset: int
    chunk: Chunk
    kind: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """An item with its accepted question and answer, and why the critique let it pass."""

    item: Item
    question: str
    answer: str
    critique: str


class Generation:
    """One run. `await run()` asks what the journal does not know, then writes instances and report into `output`.

    Args:
        config: what to ask and keep.
        prompts: the words.
        completer: who answers.
        output: folder for journal.jsonl, instances.jsonl, dropped.jsonl (every question that came to nothing, and why) and
            report.json.
        prices: what tokens cost.
        show_progress: a bar on stderr.

    Raises:
        ConfigError: no document with text, or prompts that leave a document no room in `target_length`.
    """

    def __init__(
        self,
        config: GenerateConfig,
        *,
        prompts: PromptSet,
        completer: Completer,
        output: Path,
        prices: Prices,
        show_progress: bool = True,
    ):
        self.config, self.prompts, self.completer, self.output = config, prompts, completer, Path(output)
        self.prices, self.show_progress = prices, show_progress
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer)
        self.counts: Counter[str] = Counter()
        self._asker: Asker | None = None
        self._dropped: dict[str, dict[str, object]] = {}
        self._ends: tuple[str, np.ndarray] | None = None
        # Items come document by document: a few texts in memory spare a read and a hash for every call.
        self._document_at = functools.lru_cache(maxsize=32)(self._read_document)

    def stop(self) -> None:
        """Begin no call any more: `run` ends in KeyboardInterrupt once those under way are journaled."""
        if self._asker is not None:
            self._asker.stop()

    async def run(self) -> dict[str, object]:
        """Generate; returns the report that report.json holds. Call once."""
        self.output.mkdir(parents=True, exist_ok=True)
        items = self._plan()
        with Journal(self.output / "journal.jsonl") as journal:
            self._asker = asker = Asker(
                self.completer,
                journal,
                form_attempts=self.config.form_attempts,
                stop_after_malformed=self.config.stop_after_malformed,
                prices=self.prices,
                show_progress=self.show_progress,
            )
            answers = await asker.ask_all("questions", items, self._question_call, parse_pair)
            pairs = self._drop_repeats(items, answers)
            asked = [item for item in items if item.id in pairs]
            verdicts = await asker.ask_all(
                "critiques", asked, lambda item, attempt: self._critique_call(item, pairs[item.id], attempt), parse_verdict
            )
            rows = self._instances(self._judge(asked, pairs, verdicts))
            report = self._write(rows, items, asker)
        return report

    def _plan(self) -> list[Item]:
        """Every chunk to ask about, in the order of the documents."""
        config = self.config
        items: list[Item] = []
        seen: set[str] = set()
        for document in read_documents(config.documents, text_key=config.text_key, id_key=config.id_key):
            self.counts["documents"] += 1
            if not document.text.strip():
                self.counts["documents_empty"] += 1
            elif document.sha256 in seen:
                self.counts["documents_repeated"] += 1
            else:
                seen.add(document.sha256)
                items.extend(self._plan_document(document))
        if not seen:
            raise ConfigError(
                "documents", str(config.documents), f"holds no document with text ({self.counts['documents']} read)"
            )
        self.counts["asked"] = len(items)
        return items

    def _plan_document(self, document: Document) -> Iterator[Item]:
        config = self.config
        ends = token_ends(self.tokenizer, document.text)
        chunks = chunk_document(document.text, ends, chunk_tokens=config.chunk_tokens)
        self.counts["chunks"] += len(chunks)
        # A chunk that ends beyond the target length cannot be in any instance: asking about it would be money thrown away.
        room = int(ends[config.target_length - 1]) if config.target_length < len(ends) else len(document.text)
        inside = [chunk for chunk in chunks if chunk.end <= room]
        self.counts["outside_cut_before_asking"] += len(chunks) - len(inside)
        draw = random.Random(f"{config.seed}/{document.sha256}")
        if config.max_chunks_per_document and len(inside) > config.max_chunks_per_document:
            self.counts["chunks_not_drawn"] += len(inside) - config.max_chunks_per_document
            inside = sorted(draw.sample(inside, config.max_chunks_per_document), key=lambda chunk: chunk.index)
        for chunk in inside:
            own = random.Random(f"{config.seed}/{document.sha256}/{chunk.index}")
            yield Item(
                id=f"{document.sha256[:16]}-{chunk.index}",
                document_id=document.id,
                document_sha256=document.sha256,
                offset=document.offset,
                chunk=chunk,
                kind=own.choice(KINDS),
                seed=own.randrange(1 << 31),
            )

    def _read_document(self, offset: int, sha256: str) -> Document:
        config = self.config
        document = read_document_at(config.documents, offset, text_key=config.text_key, id_key=config.id_key)
        if document.sha256 != sha256:
            raise ConfigError("documents", str(config.documents), "changed while it was being read; run the command again")
        return document

    def _document(self, item: Item) -> Document:
        return self._document_at(item.offset, item.document_sha256)

    def _question_call(self, item: Item, attempt: int) -> Call:
        chunk = self._document(item).text[item.chunk.start : item.chunk.end].strip()
        prompt = self.prompts.fill(f"question_{item.kind}", chunk=chunk)
        return self._call(prompt, self.config.temperature, item, attempt)

    def _critique_call(self, item: Item, pair: tuple[str, str], attempt: int) -> Call:
        chunk = self._document(item).text[item.chunk.start : item.chunk.end].strip()
        prompt = self.prompts.fill("critique", chunk=chunk, question=pair[0], answer=pair[1])
        # At temperature 0 a second attempt would repeat the first one's mistake.
        return self._call(prompt, 0.0 if attempt == 0 else self.config.temperature, item, attempt)

    def _call(self, prompt: str, temperature: float, item: Item, attempt: int) -> Call:
        return Call(
            model=self.config.model,
            prompt=prompt,
            max_tokens=self.config.max_answer_tokens,
            temperature=temperature,
            seed=item.seed + attempt,
            attempt=attempt,
            extra=self.config.extra_body,
            omit=tuple(name.strip() for name in self.config.omit.split(",") if name.strip()),
        )

    def _drop(self, item: Item, reason: str, **facts: object) -> None:
        """Count `item` away under `reason`; what is known of it goes into dropped.jsonl."""
        self.counts[reason] += 1
        self._dropped[item.id] = {"reason": reason} | facts

    def _drop_repeats(self, items: list[Item], outcomes: dict[str, Outcome]) -> dict[str, tuple[str, str]]:
        """Pairs in form whose question no earlier one resembles."""
        near, pairs = NearDuplicates(self.config.near_duplicate), {}
        for item in items:
            outcome = outcomes[item.id]
            if outcome.reason is not None:
                self._drop(item, f"question_{outcome.reason}", said=outcome.said)
                continue
            self.counts["parsed"] += 1
            question, answer = outcome.value
            earlier = near.add(item.id, question)
            if earlier is None:
                pairs[item.id] = outcome.value
            else:
                self._drop(item, "near_duplicate", of=earlier, question=question, answer=answer)
        return pairs

    def _judge(self, items: list[Item], pairs: dict[str, tuple[str, str]], verdicts: dict[str, Outcome]) -> Iterator[Kept]:
        """Items that the critique lets pass."""
        for item in items:
            outcome, (question, answer) = verdicts[item.id], pairs[item.id]
            if outcome.reason is not None:
                self._drop(item, f"critique_{outcome.reason}", said=outcome.said, question=question, answer=answer)
                continue
            correct, why = outcome.value
            if correct:
                yield Kept(item=item, question=question, answer=answer, critique=why)
            else:
                self._drop(item, "critiqued_away", critique=why, question=question, answer=answer)

    def _instances(self, kept: Iterator[Kept]) -> Iterator[dict[str, object]]:
        """Training rows, in order, without pairs whose chunk is beyond the cut."""
        for one in kept:
            document = self._document(one.item)
            end, tokens = self._fit(document, one)
            if one.item.chunk.end > end:
                self._drop(one.item, "outside_cut", document_ends=end, question=one.question, answer=one.answer)
                continue
            self.counts["kept"] += 1
            self.counts[f"kept_{one.item.kind}"] += 1
            yield self._row(document, one, end, tokens)

    def _prompt(self, one: Kept, text: str) -> str:
        return self.prompts.fill(f"train_{one.item.kind}", document=text, question=one.question)

    def _fit(self, document: Document, one: Kept) -> tuple[int, int]:
        """(end, tokens): the characters [0, end) of the document that fit, and the instance's tokens without marks."""
        room = self.config.target_length - self.config.template_tokens
        ends = self._first_ends(document)
        keep = min(len(ends), room)
        whole = len(document.text) if len(ends) < self.config.target_length else int(ends[-1])
        while keep > 0:
            end = whole if keep == len(ends) else int(ends[keep - 1])
            parts = (self._prompt(one, document.text[:end]), one.answer)
            used = sum(len(self.tokenizer.encode(part, add_special_tokens=False).ids) for part in parts)
            if used <= room:
                return end, used
            keep -= used - room
        mend = "leaves no room for a document beside its question and answer; raise it"
        raise ConfigError("target_length", self.config.target_length, mend)

    def _first_ends(self, document: Document) -> np.ndarray:
        """`token_ends` of the first `target_length` tokens; the last document's are remembered, its pairs come together."""
        if self._ends is None or self._ends[0] != document.sha256:
            ends = token_ends(self.tokenizer, document.text)[: self.config.target_length].copy()
            self._ends = (document.sha256, ends)
        return self._ends[1]

    def _row(self, document: Document, one: Kept, end: int, tokens: int) -> dict[str, object]:
        chunk = one.item.chunk
        return {
            "id": one.item.id,
            "length": "long",
            "messages": [
                {"role": "user", "content": self._prompt(one, document.text[:end])},
                {"role": "assistant", "content": one.answer},
            ],
            "tokens": tokens,
            "provenance": {
                "document_id": one.item.document_id,
                "document_sha256": document.sha256,
                "document_characters": [0, end],
                "chunk_index": chunk.index,
                "chunk_characters": [chunk.start, chunk.end],
                "kind": one.item.kind,
                "question": one.question,
                "critique": one.critique,
                "model": self.config.model,
                "prompt_version": self.prompts.version,
                "seed": self.config.seed,
            },
        }

    def _write(self, rows: Iterator[dict[str, object]], items: list[Item], asker: Asker) -> dict[str, object]:
        """instances.jsonl, dropped.jsonl and report.json, each whole or not at all."""
        digest = hashlib.sha256()

        def lines() -> Iterator[str]:
            for row in rows:
                line = json.dumps(row, ensure_ascii=False) + "\n"
                digest.update(line.encode())
                yield line

        _write_whole(self.output / "instances.jsonl", lines())
        dropped = (_dropped_row(item, self._dropped[item.id]) for item in items if item.id in self._dropped)
        _write_whole(self.output / "dropped.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in dropped))
        report: dict[str, object] = {
            "yield": dict(sorted(self.counts.items())),
            "instances_sha256": digest.hexdigest(),
            "prompt_version": self.prompts.version,
            "model": self.config.model,
            "settings": said(self.config),
            "calls": asker.summary(),
        }
        _write_whole(self.output / "report.json", [json.dumps(report, indent=2) + "\n"])
        return report


def _dropped_row(item: Item, facts: dict[str, object]) -> dict[str, object]:
    where = {"document_sha256": item.document_sha256, "chunk_characters": [item.chunk.start, item.chunk.end]}
    return {"id": item.id, "kind": item.kind} | facts | where


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
