"""Windows as the model gets them, for a person to read: text with its seams, tokens, labels and masks, documents of origin."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np

from nemo_longctx.config import ConfigError
from nemo_longctx.data.sft import window
from nemo_longctx.data.sft_instances import ANSWER, encode_conversation, read_conversations
from nemo_longctx.data.windows import StageWindows, Windows

_BOLD, _DIM, _RED, _PLAIN = "\033[1m", "\033[2m", "\033[31m", "\033[0m"
_AROUND = 4  # tokens listed on each side of a seam
_TEXT = 60  # tokens of a document's part that are printed at its beginning, and at its end


def show_windows(
    windows: Windows, tokenizer: Any, *, first: int, count: int, source: str | None = None, colour: bool = False
) -> Iterator[str]:
    """Lines about windows `first`, `first + 1`, ... of a run.

    Args:
        windows: the run's windows.
        tokenizer: has `decode(ids, skip_special_tokens=)`; None leaves the text out.
        first: number of the first window.
        count: windows that are shown.
        source: only windows that hold a document of this source.
        colour: terminal colours: seams bold, what does not count for the loss dim.
    """
    bold, dim, red, plain = (_BOLD, _DIM, _RED, _PLAIN) if colour else ("", "", "", "")
    shown = 0
    for number in range(first, len(windows)):
        if shown == count:
            return
        stage = windows.curriculum.stage_of_sample(number)
        place = windows.stages[stage.number]
        origins = _origins(windows, place, number - stage.first_sample)
        if source is not None and source not in {name for name, *_ in origins}:
            continue
        shown += 1
        sample = windows[number]
        tokens, labels, mask = (sample[key].tolist() for key in ("tokens", "labels", "loss_mask"))
        counted = sum(value > 0 for value in mask)
        yield f"{bold}window {number}{plain} (stage {stage.number}, {len(tokens):,} tokens, {counted:,} count for the loss)"
        begin = 0
        for name, prefix, document, start, length in origins:
            end = min(begin + length, len(tokens))
            if end <= begin:
                continue
            where = f"document {document} of {prefix}, from its token {start:,}"
            yield f"{bold}--- {name}: {where}, {end - begin:,} tokens ---{plain}"
            if tokenizer is not None:
                yield _text(tokenizer, tokens[begin:end])
            begin = end
        if begin < len(tokens):
            yield f"{dim}--- padding, {len(tokens) - begin:,} tokens ---{plain}"
        yield "  position     token     label   loss"
        for at in _listed(origins, len(tokens)):
            count_for = f"{mask[at]:>6g}"
            paint = red if mask[at] == 0 else ""
            yield f"{paint}  {at:>8,} {tokens[at]:>9} {labels[at]:>9} {count_for}{plain if paint else ''}"


def show_instances(
    path: str, tokenizer: Any, template: str, *, first: int, count: int, units: tuple[int, int], colour: bool = False
) -> Iterator[str]:
    """Lines about conversations `first`, `first + 1`, ... of a file, as instruction tuning gets them.

    Args:
        path: JSONL, see `sft_instances`.
        tokenizer: a fast one of transformers.
        template: Jinja text of its chat form.
        first, count: which.
        units: what a prompt's and an answer's token count for the loss, `sft.loss_units`.
        colour: terminal colours: answers bold, what does not count for the loss dim.

    Raises:
        ConfigError: a bad row up to there, or no such one.
    """
    bold, dim, red, plain = (_BOLD, _DIM, _RED, _PLAIN) if colour else ("", "", "", "")
    number = -1
    for number, messages in enumerate(islice(read_conversations(path), first + count)):
        if number < first:
            continue
        ids, roles = encode_conversation(tokenizer, template, messages)
        sample = window([(ids, roles)], seq_length=len(ids) - 1, pad_id=0, units=units)
        labels, mask = sample["labels"].tolist(), sample["loss_mask"].tolist()
        counted = sum(value > 0 for value in mask)
        yield f"{bold}instance {number} of {path}{plain} ({len(ids):,} tokens, {counted:,} count for the loss)"
        seams = [0, *(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(ids)]
        for begin, end in pairwise(seams):
            answer = bool(roles[begin] == ANSWER)
            weight = units[1] if answer else units[0]
            yield f"--- {'answer' if answer else 'prompt'}, {end - begin:,} tokens, each counts {weight / units[1]:g} ---"
            yield f"{bold if answer else dim if not weight else ''}{_text(tokenizer, ids[begin:end].tolist())}{plain}"
        yield "  position     token     label   loss"
        for at in sorted({at for seam in seams for at in range(seam - _AROUND, seam + _AROUND) if 0 <= at < len(mask)}):
            paint = red if mask[at] == 0 else ""
            loss = f"{mask[at] / units[1]:>6g}"
            yield f"{paint}  {at:>8,} {int(ids[at]):>9} {labels[at]:>9} {loss}{plain if paint else ''}"
    if number < first:
        raise ConfigError("at", first, f"{path} has {number + 1} conversations, counted from 0")


def _text(tokenizer: Any, ids: list[int]) -> str:
    if len(ids) <= 2 * _TEXT:
        return tokenizer.decode(ids, skip_special_tokens=False)
    head, tail = (tokenizer.decode(some, skip_special_tokens=False) for some in (ids[:_TEXT], ids[-_TEXT:]))
    return f"{head} [... {len(ids) - 2 * _TEXT:,} tokens ...] {tail}"


def _listed(origins: list[tuple[str, str, int, int, int]], size: int) -> list[int]:
    """Positions around the window's ends and its seams."""
    edges, at = [0, size], 0
    for *_, length in origins:
        at += length
        edges.append(at)
    return sorted({place for edge in edges for place in range(edge - _AROUND, edge + _AROUND) if 0 <= place < size})


def _origins(windows: Windows, place: StageWindows, number: int) -> list[tuple[str, str, int, int, int]]:
    """(source, its file's prefix, document there, first token of it, tokens) of each part of a window, in order."""
    documents = windows.order.documents
    found = []
    for visit, start, size in zip(*place.parts(number), strict=True):
        shard = int(documents.shard_offsets.searchsorted(visit, side="right")) - 1
        name = documents.names[int(documents.source_of_shard[shard])]
        found.append((name, documents.shards[shard].prefix, int(visit) - int(documents.shard_offsets[shard]), start, size))
    return found
