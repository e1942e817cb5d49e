"""Which files `prepare` reads: named ones, those of directories, and those behind a URL; what is passed over, and why.

Each file is taken once, whatever links lead to it. Paths with a scheme (`s3://`, `gs://`, `hf://`, ...) go through fsspec.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nemo_longctx.config import ConfigError
from nemo_longctx.data.opening import COMPRESSED, DamagedError, is_url, open_bytes, url_to_fs

_HEAD = 1 << 16  # bytes that tell most files of one size apart
FORMATS = ("jsonl", "json", "parquet", "arrow", "csv", "text")
_FORMAT_OF = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
_TEXT = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
# Nothing here is text, whatever its bytes happen to decode to.
_OTHER = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".tbz2", ".txz"), "an archive; unpack it"),
    **dict.fromkeys(
        (".lz4", ".lzma", ".br", ".z", ".lz", ".sz", ".snappy"), "a compression that is not read; use gz, zst, bz2 or xz"
    ),
    **dict.fromkeys((".pdf", ".epub", ".docx", ".doc", ".odt", ".rtf", ".pptx", ".xlsx", ".xls"), "convert it to text first"),
    **dict.fromkeys(
        (".avro", ".orc", ".feather", ".h5", ".npy", ".pkl", ".pt", ".sqlite", ".db", ".msgpack"), "save it as Parquet"
    ),
    **dict.fromkeys((".bin", ".idx"), "Megatron's own corpus; it is prepared already"),
}


@dataclass(kw_only=True)
class Found:
    """Files to read, in order, and what was passed over: path -> why."""

    files: list[str] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """`3 files taken, 2 passed over (1 hidden, 1 a link to a file that is taken)`."""
        taken = f"{len(self.files):,} file{'s' if len(self.files) != 1 else ''} taken"
        why = ", ".join(f"{count:,} {reason}" for reason, count in Counter(self.passed_over.values()).most_common())
        return f"{taken}, {len(self.passed_over):,} passed over{f' ({why})' if why else ''}"


def shown(path: str) -> str:
    """A path as it can be printed and written to a table: bytes that are not UTF-8, tabs and line ends are escaped."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def printable(text: str) -> str:
    """A text as it can be printed and written to a table: half surrogate pairs, tabs and line ends are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text.translate({ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"})


def find_files(inputs: Sequence[str], globs: Sequence[str], *, exclude: Collection[str] = ()) -> Found:
    """The files that `inputs` name: files as given; in directories, those that match `globs`, or all that hold records.

    A directory without any file of records is taken for a directory of texts (`.txt`, `.md`, ...). A folder that datasets'
    `save_to_disk` wrote gives the files that its `state.json` lists.

    Args:
        inputs: files, directories, and URLs of either.
        globs: shell patterns for names (`*.py`) or, with a slash, for paths below the directory.
        exclude: absolute paths of files and directories to pass over (the output may lie inside an input directory).

    Raises:
        ConfigError: nothing at a path, nothing that matches in a directory, a file named twice, or one that is no file.
    """
    found = Found()
    # Also where a linked folder leads to them.
    exclude = {*exclude, *(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in exclude)}
    seen: dict[Any, str] = {}
    for given in inputs:
        given = _without_file_scheme(given)
        named = not _is_directory(given)
        taken = [_named(given)] if named else _in_directory(given, globs, exclude, found.passed_over)
        for path in taken:
            identity = _identity(path)
            if identity not in seen:
                seen[identity] = path
                found.files.append(path)
            elif named or seen[identity] == path:
                raise ConfigError("input", path, "named twice; name it once")
            else:
                found.passed_over[path] = "a link to a file that is taken"
    return found


def check_globs(inputs: Sequence[str], globs: Sequence[str]) -> None:
    """Refuse patterns where no input is a directory that they could choose from.

    Raises:
        ConfigError: by the patterns.
    """
    if globs and not any(os.path.isdir(path) or is_url(path) for path in inputs):
        mend = "has no effect: no input is a directory, and files that are named are all taken; leave it out"
        raise ConfigError("glob", " ".join(globs), mend)


def same_bytes(files: Sequence[str]) -> dict[str, str]:
    """Local files that hold the same bytes as one before them -> that one. Only files of one size are read for it."""
    by_size: dict[int, list[str]] = {}
    for path in files:
        if not is_url(path) and (size := os.path.getsize(path)):
            by_size.setdefault(size, []).append(path)
    copies: dict[str, str] = {}
    for paths in by_size.values():
        heads = {path: _digest(path, _HEAD) for path in paths} if len(paths) > 1 else {}
        often = Counter(heads.values())
        first: dict[bytes, str] = {}
        for path, head in heads.items():
            if often[head] > 1 and (found := first.setdefault(_digest(path), path)) != path:
                copies[path] = found
    return copies


def _digest(path: str, n_bytes: int = -1) -> bytes:
    """Of a file's first bytes, or of all."""
    with open(path, "rb") as file:
        if n_bytes >= 0:
            return hashlib.sha256(file.read(n_bytes)).digest()
        return hashlib.file_digest(file, "sha256").digest()


def _without_file_scheme(given: str) -> str:
    match = re.match(r"(?:file|local)://(?=/)", given)
    return given[match.end() :] if match else given


def _is_directory(given: str) -> bool:
    if not is_url(given):
        return os.path.isdir(given)
    fs, inside = url_to_fs(given)
    with _reached(given):
        return bool(fs.isdir(inside)) or any(letter in inside for letter in "*?[")


@contextmanager
def _reached(given: str) -> Iterator[None]:
    """What a store that cannot be reached raises, as one sentence that names the URL."""
    try:
        yield
    except OSError as error:
        raise ConfigError("input", given, f"cannot be reached ({(str(error).splitlines() or [''])[0]}); mend it") from error


def _named(given: str) -> str:
    """A file that the user named, if it is one that can be read again and again."""
    if is_url(given):
        fs, inside = url_to_fs(given)
        with _reached(given):
            if not fs.exists(inside):
                hub = "; on the hub's hf:// lie datasets/OWNER/NAME" if given.startswith("hf://") else ""
                raise ConfigError("input", given, f"no such file or directory{hub}")
    elif not os.path.exists(given):
        dangling = os.path.islink(given)
        mend = "a link to nothing; mend it" if dangling else "no such file or directory"
        if any(letter in given for letter in "*?["):
            mend += "; a pattern is the shell's, without quotes, or that of --glob beside a directory"
        elif scheme := re.match(r"(s3|gs|hf|https?):/+(?!/)", given):
            mend += f"; a URL begins with two slashes, {scheme[1]}://{given[scheme.end() :]}"
        elif given == "-":
            mend = "standard input cannot be read again when a run goes on; write it to a file and name that"
        raise ConfigError("input", given, mend)
    elif not stat.S_ISREG(os.stat(given).st_mode):
        mend = "a pipe or device, which cannot be read again when a run goes on; write it to a file and name that"
        raise ConfigError("input", given, mend)
    other = _OTHER.get(_suffix(given))
    if other is not None:
        raise ConfigError("input", given, f"a {_suffix(given)} file is not read: {other}")
    return given


def _identity(path: str) -> Any:
    """The same for two names of one file."""
    if is_url(path):
        return path
    facts = os.stat(path)
    # Hard links share an inode; otherwise the real path tells, since not every file system has inodes that mean something.
    return (facts.st_dev, facts.st_ino) if facts.st_nlink > 1 and facts.st_ino else os.path.realpath(path)


def _in_directory(given: str, globs: Sequence[str], exclude: Collection[str], passed_over: dict[str, str]) -> list[str]:
    """The files of a directory that are taken; the others, and the reason of each, are added to `passed_over`."""
    inside = list(_walk_url(given) if is_url(given) else _walk(given, exclude, passed_over))
    below = {path: path[len(given) :].lstrip("/") for path in inside}
    here: dict[str, str] = {}
    if globs:
        taken = [path for path in inside if any(_matches(below[path], glob) for glob in globs)]
        others = set(inside).difference(taken)
        here = {path: f"not {' '.join(globs)}" for path in inside if path in others}
    else:
        kinds = {path: _reason_against(path) for path in inside}
        taken = [path for path in inside if kinds[path] == ""]
        texts = [path for path in inside if kinds[path] == "text"]
        if not taken:
            taken, texts = texts, []
        here = {path: why for path, why in kinds.items() if why not in ("", "text")}
        here |= dict.fromkeys(texts, "text beside files of records (take it by --glob)")
    if not taken:
        kinds_there = sorted({_suffix(path) or os.path.basename(path) for path in inside})
        there = f"; it holds {', '.join(kinds_there[:8])}" if kinds_there else ""
        wanted = f"nothing matches {' '.join(globs)}" if globs else "no records or texts; name other files by --glob '*.py'"
        raise ConfigError("input", given, f"{wanted} in this directory{there}")
    passed_over.update(here)
    return taken


def _matches(below: str, glob: str) -> bool:
    return fnmatch.fnmatch(below if "/" in glob else os.path.basename(below), glob)


def _reason_against(path: str) -> str:
    """Empty for a file of records; `text`; otherwise why the file is passed over."""
    if path.endswith(".rejected.tsv"):
        return "what prepare or curate left out"
    suffix = _suffix(path)
    kind = _FORMAT_OF.get(suffix)
    if kind == "json" and not _json_holds_records(path):
        return "JSON without an array of records"
    if kind is not None:
        return ""
    if suffix in _TEXT:
        return "text"
    return f"{suffix} ({_OTHER[suffix]})" if suffix in _OTHER else f"{suffix or 'without a suffix'} (take it by --glob)"


def _json_holds_records(path: str) -> bool:
    """A lone object beside data is settings more often than a record; an array of objects, or JSONL, is data."""
    try:
        with open_bytes(path) as file:
            head = file.read(1 << 16).lstrip()
    except (DamagedError, OSError):
        return True  # the reader will say what is wrong with it
    if head.startswith(b"["):
        return head[1:].lstrip().startswith(b"{")
    first, *rest = head.split(b"\n", 1)
    try:
        return isinstance(json.loads(first), dict) and bool(rest and rest[0].strip().startswith(b"{"))
    except ValueError:
        return False


def _walk(directory: str, exclude: Collection[str], passed_over: dict[str, str]) -> Iterator[str]:
    """Every plain file below a directory that is neither hidden nor excluded, links followed, each directory once."""
    walked = set()
    for root, directories, names in os.walk(directory, followlinks=True):
        here = os.path.abspath(root)
        real = os.path.realpath(root)
        if real in walked:
            passed_over[root] = "a link to a folder that is taken"
            directories.clear()
            continue
        walked.add(real)
        hidden = [name for name in directories if name.startswith(".")]
        passed_over.update({os.path.join(root, name): "a hidden folder" for name in hidden})
        left_out = {name for name in (*directories, *names) for at in (here, real) if os.path.join(at, name) in exclude}
        directories[:] = sorted(name for name in directories if not name.startswith(".") and name not in left_out)
        # Real folders first: a file is known by its own path rather than by that of a link.
        directories.sort(key=lambda name: os.path.islink(os.path.join(root, name)))
        listed = _saved_data_files(root) if "state.json" in names else None
        for name in sorted(names, key=lambda name: (os.path.islink(os.path.join(root, name)), name)):
            path = os.path.join(root, name)
            if name in left_out:
                continue
            why = _no_plain_file(path, name)
            if not why and listed is not None and name.endswith(".arrow") and name not in listed:
                why = "a cache of datasets"
            if why:
                passed_over[path] = why
            else:
                yield path


def _no_plain_file(path: str, name: str) -> str:
    if name.startswith("."):
        return "hidden"
    if not os.path.exists(path):
        return "a link to nothing"
    return "" if stat.S_ISREG(os.stat(path).st_mode) else "a pipe or device"


def _saved_data_files(directory: str) -> set[str] | None:
    """The files that datasets' `save_to_disk` lists; None where the folder is none of its."""
    try:
        with open(os.path.join(directory, "state.json"), encoding="utf-8") as file:
            return {str(each["filename"]) for each in json.load(file)["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _walk_url(given: str) -> Iterator[str]:
    fs, inside = url_to_fs(given)
    names = fs.glob(inside) if any(letter in inside for letter in "*?[") else fs.find(inside)
    for name in sorted(names):
        if not os.path.basename(name).startswith(".") and not fs.isdir(name):
            yield fs.unstrip_protocol(name)


def _suffix(path: str) -> str:
    """The last suffix of a name in lower case, compressions aside: `.jsonl` of `A.JSONL.GZ`, `.tar` of `a.tar.gz`."""
    stem = os.path.basename(path).lower()
    for compression in COMPRESSED:
        stem = stem.removesuffix(compression)
    return os.path.splitext(stem)[1]


def format_of(path: str) -> str:
    """The format that a file's name says, one of `FORMATS`; compressions aside, and text where it says nothing."""
    return _FORMAT_OF.get(_suffix(path), "text")
