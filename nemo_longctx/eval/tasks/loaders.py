"""Published data sets -> one row shape for all our tasks: {id, context, question, choices, answers, prompt, longctx}.

Each loader reads the data as its authors publish it, from a local file or folder (`metadata: {data: PATH}`) or else from the
Hugging Face hub. `longctx` tells the model how to truncate: the policy, the budget, and what must survive.
"""

from __future__ import annotations

import functools
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.eval import metrics

Row = dict[str, Any]
LETTERS = "ABCD"


def row(
    name: str,
    *,
    context: str,
    question: str,
    answers: Iterable[str],
    prompt: str,
    choices: Iterable[str] = (),
    protect: Mapping[str, str],
) -> Row:
    """One sample; `protect` names the parts of `prompt` without which the answer means nothing."""
    return {
        "id": name,
        "context": context,
        "question": question,
        "choices": list(choices),
        "answers": list(answers),
        "prompt": prompt,
        "protect": dict(protect),
    }


def paper_prompt(context: str, question: str) -> str:
    """The context, then `Q:` question, `A:` (Xiong et al. 2023, section 4)."""
    return f"{context}\n\nQ: {question}\nA:"


# SCROLLS (Shaham et al. 2022): {id, pid, input: question, blank line, document; output}, one line a reference.


def scrolls_rows(lines: Iterable[Mapping[str, Any]], *, choices: bool = False) -> list[Row]:
    """Rows of a SCROLLS question answering split; references of one id are gathered.

    With `choices` (QuALITY) the four options stand between the question and the document and go into the prompt.
    """
    rows: dict[str, Row] = {}
    for line in lines:
        if line["id"] in rows:
            rows[line["id"]]["answers"].append(line["output"])
            continue
        question, options, context = _split_scrolls(line["input"], choices)
        asked = (
            question
            if not choices
            else question + "\n" + "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
        )
        rows[line["id"]] = row(
            line["id"],
            context=context,
            question=question,
            choices=options,
            answers=[line["output"]],
            prompt=paper_prompt(context, asked),
            protect={"question": f"Q: {asked}\nA:"},
        )
    return list(rows.values())


def _split_scrolls(text: str, choices: bool) -> tuple[str, list[str], str]:
    question, _, rest = text.partition("\n\n")
    if not choices:
        return question.strip(), [], rest.strip()
    found = re.match(r"\s*\(A\) (.*?)\n\s*\(B\) (.*?)\n\s*\(C\) (.*?)\n\s*\(D\) (.*?)(?:\n|$)(.*)", rest, re.DOTALL)
    if not found:
        raise ValueError(f"the options (A) to (D) of {question[:60]!r} were not found in the published layout")
    *options, context = found.groups()
    return question.strip(), [option.strip() for option in options], context.strip()


def qmsum_rows(meetings: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of QMSum as its authors publish it (Zhong et al. 2021): one sample a query, the whole meeting as context."""
    rows = []
    for number, meeting in enumerate(meetings):
        context = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in meeting["meeting_transcripts"])
        queries = [*meeting["general_query_list"], *meeting["specific_query_list"]]
        for index, query in enumerate(queries):
            rows.append(
                row(
                    f"{number}-{index}",
                    context=context,
                    question=query["query"],
                    answers=[query["answer"]],
                    prompt=paper_prompt(context, query["query"]),
                    protect={"question": f"Q: {query['query']}\nA:"},
                )
            )
    return rows


def zeroscrolls_rows(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of a ZeroSCROLLS task (Shaham et al. 2023): the prompt as published, instruction and query marked by offsets;
    references of one id are gathered.

    A prompt that is too long loses the end of its document, for which the published separator stands: `separator`, `tail`.
    """
    rows: dict[str, Row] = {}
    for line in lines:
        text, output = line["input"], line["output"]
        answers = [output] if isinstance(output, str) else output or []
        if line["id"] in rows:
            rows[line["id"]]["answers"] += [answer for answer in answers if answer not in rows[line["id"]]["answers"]]
            continue
        start, end = int(line["document_start_index"]), int(line["document_end_index"])
        asked = int(line["query_start_index"]), int(line["query_end_index"])
        query = text[slice(*asked)]
        protect = {"instruction": text[:start].strip(), "question": query.strip()}
        made = row(
            line["id"],
            context=text[start:end],
            question=query,
            answers=answers,
            prompt=text,
            protect={name: part for name, part in protect.items() if part},
        )
        separator = line.get("truncation_seperator") or ""  # spelled so where it is published
        rows[line["id"]] = made | {"separator": separator, "tail": text[asked[0] if query.strip() else end :]}
    return [made for made in rows.values() if made["answers"]]  # the test split hides its answers


# What L-Eval's scorer counts (`SUPPORT_METRICS` of its Evaluation/auto_eval.py at cd34b05); the other rows are for judges.
LEVAL_SCORED = ("exam", "f1", "rouge")


def leval_rows(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of an L-Eval task (An et al. 2023): each document has several instructions with one output each.

    Documents that are published for a judge (`evaluation`: LLM, human) are left out, as by the official scorer.
    """
    rows = []
    for number, line in enumerate(lines):
        if line.get("evaluation", LEVAL_SCORED[0]) not in LEVAL_SCORED:
            continue
        for index, (question, answer) in enumerate(zip(line["instructions"], line["outputs"], strict=True)):
            rows.append(
                row(
                    f"{number}-{index}",
                    context=line["input"],
                    question=question,
                    answers=[answer],
                    prompt=paper_prompt(line["input"], question),
                    protect={"question": f"Q: {question}\nA:"},
                )
            )
    return rows


def left_out(source: str, lines: Iterable[Mapping[str, Any]]) -> int:
    """How many samples of the published rows are no samples of ours, being for a judge to score."""
    if not source.startswith("leval_"):
        return 0
    return sum(len(line["instructions"]) for line in lines if line.get("evaluation", LEVAL_SCORED[0]) not in LEVAL_SCORED)


def bold_rows(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of a BOLD domain (Dhamala et al. 2021): one sample a prompt, its group (say American_actors) beside it."""
    rows = []
    for line in lines:
        for index, text in enumerate(line["prompts"]):
            prompt = text.strip()  # published with a space behind, which tokenizers would make a token of its own
            made = row(
                f"{line['category']}/{line['name']}/{index}",
                context="",
                question=prompt,
                answers=[""],
                prompt=prompt,
                protect={"prompt": prompt},
            )
            rows.append(made | {"group": line["category"]})
    return rows


def bold_lines(domain: str, groups: Mapping[str, Mapping[str, list[str]]]) -> list[Mapping[str, Any]]:
    """The hub's rows from the layout of the authors' own files: {group: {name: [prompts]}}."""
    return [
        {"domain": domain, "category": group, "name": name, "prompts": prompts}
        for group, names in groups.items()
        for name, prompts in names.items()
    ]


BOLD_DOMAINS = ("gender", "political_ideology", "profession", "race", "religious_ideology")

# name -> (hub data set, file in it or "" for what `datasets` loads, member of a zip or None, converter). {split} is train,
# validation or test.
SOURCES: dict[str, tuple[str, str, str | None, Callable[[Iterable[Mapping[str, Any]]], list[Row]]]] = {
    **{n: ("tau/scrolls", f"{n}.zip", f"{n}/{{split}}.jsonl", scrolls_rows) for n in ("narrative_qa", "qasper", "qmsum")},
    "quality": ("tau/scrolls", "quality.zip", "quality/{split}.jsonl", functools.partial(scrolls_rows, choices=True)),
    **{
        f"zero_{n}": ("tau/zero_scrolls", f"{n}.zip", f"{n}/{{split}}.jsonl", zeroscrolls_rows)
        for n in (
            "gov_report", "summ_screen_fd", "qmsum", "squality", "qasper", "narrative_qa", "quality", "musique",
            "space_digest", "book_sum_sort",
        )
    },
    **{
        f"leval_{n}": ("L4NLP/LEval", f"LEval/{folder}/{n}.jsonl", None, leval_rows)
        for folder, names in {
            "Exam": ("coursera", "tpo", "topic_retrieval_longchat"),
            "Generation": ("financial_qa", "legal_contract_qa", "natural_question"),
        }.items()
        for n in names
    },
    **{f"bold_{n}": ("AlexaAI/bold", "", None, bold_rows) for n in BOLD_DOMAINS},
}  # fmt: skip


def load(
    source: str,
    data: str | None = None,
    max_prompt: int | None = None,
    policy: str = "left",
    splits: str = "validation",
    **_: Any,
) -> Any:
    """A task's data as lm-eval takes it (`custom_dataset`; the arguments are the task's `metadata`): a data set for each split,
    and `all` of them together, told apart by the column `split`.

    Args:
        source: a name of `SOURCES`.
        data: a JSONL file, or a folder with `SOURCE.jsonl`, `SOURCE/SPLIT.jsonl` or `SOURCE_SPLIT.jsonl` (of BOLD also the
            authors' `DOMAIN_prompt.json`); None: the hub.
        max_prompt: tokens a prompt may have, shots and question included. policy: how it is cut.
        splits: the splits to load, separated by spaces; a local file serves for all of them.

    Raises:
        ConfigError: an unknown source, or nothing of it at `data`.
    """
    import datasets

    if source not in SOURCES:
        raise ConfigError("metadata.source", source, f"known: {', '.join(SOURCES)}")
    if source.startswith("bold_"):
        metrics.sentiment("")  # is its scorer here? Better asked now than after the generations
    loaded = {}
    for split in splits.split():
        lines = _local_lines(source, data, split) if data else _hub_lines(source, split)
        rows = convert(source, lines)
        judged = left_out(source, lines)
        if not rows:
            raise ConfigError("metadata.data", data, f"holds no row of {source} with an answer for {split}")
        for made in rows:
            made["split"] = split
            made["longctx"] = {"policy": policy, "max_prompt": max_prompt, "protect": made.pop("protect")}
            made["longctx"] |= {name: made.pop(name) for name in ("separator", "tail") if name in made}
            made["longctx"]["left_out"] = judged
        loaded[split] = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict(loaded | {"all": datasets.concatenate_datasets(list(loaded.values()))})


def convert(source: str, lines: list[Mapping[str, Any]]) -> list[Row]:
    """Rows from published lines; QMSum's own layout is told from SCROLLS's by its fields."""
    if lines and "meeting_transcripts" in lines[0]:
        return qmsum_rows(lines)
    try:
        return SOURCES[source][3](lines)
    except KeyError as missing:
        raise ValueError(f"a row of {source} has no field {missing}; it has {', '.join(lines[0])}") from None


def _local_lines(source: str, data: str, split: str) -> list[Mapping[str, Any]]:
    path, name = Path(data), re.sub("^(zero|leval|bold)_", "", source)
    tried = [path / name / f"{split}.jsonl", path / f"{name}_{split}.jsonl", path / f"{name}.jsonl"]
    if source.startswith("bold_"):
        tried.append(path / f"{name}_prompt.json")
    tried = [path] if path.is_file() else tried
    found = next((file for file in tried if file.is_file()), None)
    if found is None:
        raise ConfigError("metadata.data", data, f"holds none of {', '.join(file.name for file in tried)} for {source}")
    return _parse(found.read_text(encoding="utf-8-sig"), source, str(found))


def _parse(text: str, source: str, where: str) -> list[Mapping[str, Any]]:
    """Lines of a JSONL file, or the rows of a BOLD file in its authors' layout, one JSON object of groups.

    Raises:
        ConfigError: no row, or one that is no JSON object, by file and line.
    """
    if source.startswith("bold_"):
        first = text.lstrip().splitlines()[0] if text.strip() else ""
        if first and '"prompts"' not in first:
            try:
                return bold_lines(source.removeprefix("bold_"), json.loads(text))
            except (ValueError, AttributeError) as error:
                mend = f"is neither JSONL nor one JSON object of groups ({error})"
                raise ConfigError("metadata.data", where, mend) from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError("metadata.data", f"{where}:{number}", f"is not JSON ({error})") from None
        if not isinstance(rows[-1], Mapping):
            raise ConfigError("metadata.data", f"{where}:{number}", "is no JSON object with the published fields")
    if not rows:
        raise ConfigError("metadata.data", where, f"holds no row of {source}")
    return rows


def _hub_lines(source: str, split: str) -> list[Mapping[str, Any]]:
    import datasets
    from huggingface_hub import hf_hub_download

    repository, name, member, _ = SOURCES[source]
    if not name:
        rows = datasets.load_dataset(repository, split=split)
        return [line for line in rows if line["domain"] == source.removeprefix("bold_")]
    file = Path(hf_hub_download(repository, name, repo_type="dataset"))
    if member is None:
        text = file.read_text(encoding="utf-8")
    else:
        with zipfile.ZipFile(file) as archive, archive.open(member.format(split=split)) as inside:
            text = io.TextIOWrapper(inside, encoding="utf-8").read()
    return _parse(text, source, f"{repository}/{name}")
