"""Bring the pieces of each group together on disk, and write each group as one document of JSON lines.

The pieces go to a few hundred spool files by a hash of their group, so that one of them at a time is held: memory is that of
the largest spool file, not of the input.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curation.assemble import Piece, assembled
from nemo_longctx.data.curation.config import CurateConfig
from nemo_longctx.data.engines import Progress
from nemo_longctx.data.inputs import shown
from nemo_longctx.data.long_text import pieces_of
from nemo_longctx.data.readers import Part, lines_before, read_part
from nemo_longctx.data.writer import explain_full_disk
from nemo_longctx.files import write_text

_SPOOL = 1 << 26  # bytes of input for a spool file
_USUAL = {
    "repositories": ("repo_name", "path", None),
    "chapters": ("book", "chapter", None),
    "threads": ("thread", "time", "parent"),
}
_NAME = "id"  # of a post, which `parent` names


def assemble(config: CurateConfig, parts: list[Part], work: Path, progress: Progress) -> Path:
    """Write the groups of the input to `assembled.jsonl`: their text, and `source`, the group's name.

    What cannot be read is listed in `assembled.rejected.json`: (file, line, characters, rule, why).

    Raises:
        ConfigError: a record without the key of its group.
    """
    output = work / "assembled.jsonl"
    if output.is_file():
        return output
    rejected: list[tuple[str, int, int, str, str]] = []
    n_spools = max(1, min(512, sum(part.n_bytes for part in parts) // _SPOOL))
    spools = [open(work / f"spool-{number:03d}", "wb") for number in range(n_spools)]  # noqa: SIM115 (closed below)
    with explain_full_disk(str(work)):
        try:
            for number, piece in enumerate(_pieces(config, parts, rejected, progress)):
                spool = spools[zlib.crc32(json.dumps(piece[0]).encode()) % n_spools]
                spool.write(json.dumps([number, *piece]).encode() + b"\n")
        finally:
            for spool in spools:
                spool.close()
        write_text(work / "assembled.rejected.json", json.dumps(rejected))
        partial = output.with_suffix(".part")
        with open(partial, "wb") as file:
            for number in range(n_spools):
                path = work / f"spool-{number:03d}"
                for group, pieces in _groups(path).items():
                    text = assembled(str(config.assemble), pieces)
                    file.write(json.dumps({"text": text, "source": group}, ensure_ascii=False).encode() + b"\n")
                path.unlink()
        os.replace(partial, output)
    return output


def _groups(spool: Path) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    with open(spool, "rb") as file:
        for line in file:
            number, group, order, name, parent, text = json.loads(line)
            groups.setdefault(group, []).append(Piece(text=text, order=order, number=number, name=name, parent=parent))
    return groups


def _pieces(
    config: CurateConfig, parts: list[Part], rejected: list[Any], progress: Progress
) -> Iterator[tuple[str, Any, Any, Any, str]]:
    """(group, order, name, parent, text) of each record or file."""
    group_key, order_key, parent_key = (
        given or usual
        for given, usual in zip((config.group, config.order, config.parent), _USUAL[str(config.assemble)], strict=True)
    )
    fields = [key for key in (group_key, order_key, parent_key and _NAME, parent_key) if key]
    place = _placer(config)
    for part in parts:
        documents = characters = 0
        for record in read_part(part, config.keys, fields=fields):
            where = (shown(part.path), record.line + lines_before(part))
            if record.error:
                rejected.append((*where, 0, "bad_record", record.error))
                continue
            text = "".join(pieces_of(record.text))
            if not text.strip():
                rejected.append((*where, 0, "empty", "no text"))
                continue
            documents, characters = documents + 1, characters + len(text)
            if part.format == "text":
                group, order = place(part.path)
                yield group, order, None, None, text
                continue
            values = [*record.fields, None, None][:4]
            if values[0] is None:
                mend = f"it has no {group_key!r} to say what it belongs to; name that key by --group"
                raise ConfigError("input", f"{where[0]}:{where[1]}", mend)
            group, order, name, parent = (_plain(value) for value in values)
            yield str(group), order, name, parent, text
        progress(part.n_bytes, documents, characters)


def _plain(value: Any) -> Any:
    """Something that JSON can hold and that compares."""
    return value if value is None or isinstance(value, int | float | str) else str(value)


def _placer(config: CurateConfig) -> Callable[[str], tuple[str, str]]:
    """(group, place in it) of a file of text: by its folder, or of repositories by the first folder below the input."""
    roots = sorted((given.rstrip("/") for given in config.inputs), key=len, reverse=True)

    def place(path: str) -> tuple[str, str]:
        if config.assemble != "repositories":
            folder, _, name = path.rpartition("/")
            return shown(folder) or ".", shown(name)
        root = next((each for each in roots if path.startswith(f"{each}/")), "")
        below = path[len(root) :].lstrip("/")
        repository, _, inside = below.partition("/")
        if not inside or os.path.exists(os.path.join(root, ".git")):  # the input is the repository
            return shown(root) or ".", shown(below)
        return shown(repository), shown(inside)

    return place
