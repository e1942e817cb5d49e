"""Question answering data and labelled texts from the user's disk, as its authors publish it: SQuAD, HotpotQA, or one
question a row; texts with labels as rows {"text", "label"}."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError

FILES = {
    "squad": ("squad.json", "squad.jsonl", "dev-v2.0.json", "dev-v1.1.json"),
    "hotpotqa": ("hotpotqa.json", "hotpotqa.jsonl", "hotpot_dev_distractor_v1.json"),
}


LABELLED = "icl.jsonl"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its answers (any of them will do), the documents that hold the answer, and others of the same article."""

    query: str
    answers: list[str]
    holds: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions, and all documents that they and their distractors come from."""

    questions: list[Question]
    documents: list[str]


def read_questions(folder: str | Path, name: str) -> Questions:
    """The questions of `FILES[name]` in a folder.

    Read are SQuAD's JSON (1.1 and 2.0; impossible questions are left out), HotpotQA's JSON, and the rows that the Hugging Face
    hub has of either, as JSONL or a JSON array.

    Raises:
        ConfigError: no such file, or none of these layouts, by file and line.
    """
    tried = [Path(folder) / file for file in FILES[name]]
    found = next((file for file in tried if file.is_file()), None)
    if found is None:
        raise ConfigError("probes.data", str(folder), f"holds none of {', '.join(FILES[name])}")
    rows = _rows(found)
    documents: dict[str, int] = {}
    questions: list[Question] = []
    for number, row in enumerate(rows, start=1):
        try:
            questions += _questions(row, documents)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"row {number} is neither SQuAD's nor HotpotQA's ({type(error).__name__}: {error})"
            raise ConfigError("probes.data", str(found), why) from None
    if not questions:
        raise ConfigError("probes.data", str(found), "holds no question with an answer")
    return Questions(questions=questions, documents=list(documents))


def _rows(file: Path) -> Sequence[Any]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        loaded = json.loads(text)
    except ValueError:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ConfigError("probes.data", f"{file}:{number}", f"is not JSON ({error})") from None
        return rows
    if isinstance(loaded, Mapping):
        return loaded["data"] if isinstance(loaded.get("data"), list) else [loaded]
    return loaded if isinstance(loaded, list) else [loaded]


def _questions(row: Mapping[str, Any], documents: dict[str, int]) -> list[Question]:
    """The questions of one row, whose documents are added to `documents` (text -> number)."""

    def numbered(texts: Iterable[str]) -> tuple[int, ...]:
        return tuple(documents.setdefault(text, len(documents)) for text in texts)

    if "paragraphs" in row:  # an article of SQuAD's own file
        all_of_it = numbered(paragraph["context"] for paragraph in row["paragraphs"])
        return [
            Question(
                query=asked["question"],
                answers=[answer["text"] for answer in asked["answers"]],
                holds=(own,),
                near=tuple(other for other in all_of_it if other != own),
            )
            for paragraph, own in zip(row["paragraphs"], all_of_it, strict=True)
            for asked in paragraph["qas"]
            if not asked.get("is_impossible") and asked["answers"]
        ]
    context, answers = row["context"], row["answer"] if "answer" in row else row["answers"]
    if isinstance(context, str):  # a row of SQuAD
        holds = numbered([context])
    elif isinstance(context, Mapping):  # a row of HotpotQA on the hub: columns
        sentences = zip(context["title"], context["sentences"], strict=True)
        holds = numbered(f"{title}\n{''.join(some)}" for title, some in sentences)
    else:  # HotpotQA's own file: pairs
        holds = numbered(f"{title}\n{''.join(some)}" for title, some in context)
    if isinstance(answers, Mapping):
        answers = answers["text"]
    answers = [answers] if isinstance(answers, str) else [str(answer) for answer in answers]
    return [Question(query=row["question"], answers=answers, holds=holds)] if answers else []


def read_labelled(folder: str | Path) -> dict[str, list[str]]:
    """label -> texts of `icl.jsonl`, rows {"text", "label"}; empty where the folder has none.

    Raises:
        ConfigError: a row without them, or fewer than two labels with two texts.
    """
    file = Path(folder) / LABELLED
    if not file.is_file():
        return {}
    texts: dict[str, list[str]] = {}
    for number, row in enumerate(_rows(file), start=1):
        if not isinstance(row, Mapping) or not isinstance(row.get("text"), str) or "label" not in row:
            raise ConfigError("probes.data", str(file), f'row {number} is no {{"text": "...", "label": ...}}')
        texts.setdefault(str(row["label"]), []).append(row["text"])
    if sum(len(set(some)) > 1 for some in texts.values()) < 2:
        raise ConfigError("probes.data", str(file), "needs two labels with two texts each, at least")
    return {label: list(dict.fromkeys(some)) for label, some in texts.items()}
