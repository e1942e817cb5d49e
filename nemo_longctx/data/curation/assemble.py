"""Long documents out of what belongs together: a repository's files in import order, a book's chapters, a thread's answers.

Pure functions over the pieces of one group; `grouping` brings the pieces of each group together, however many there are.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of each language: what its imports look like. Group 1 is a module or a path.
_IMPORTS = {
    ".py": re.compile(r"^\s*(?:from\s+(\.*[\w.]*)\s+import|import\s+([\w.]+))", re.MULTILINE),
    ".js": re.compile(r"""(?:from\s*|require\s*\(\s*|import\s*\(?\s*)["'](\.[^"']+)["']"""),
    ".c": re.compile(r"""^\s*#\s*include\s*[<"]([^>"]+)[>"]""", re.MULTILINE),
    ".rs": re.compile(r"^\s*(?:pub\s+)?(?:mod|use\s+(?:crate|super|self)::)\s*(\w+)", re.MULTILINE),
    ".java": re.compile(r"^\s*import\s+(?:static\s+)?([\w.]+)", re.MULTILINE),
    ".go": re.compile(r'^\s*(?:import\s+)?(?:\w+\s+)?"([\w./-]+)"', re.MULTILINE),
}
_SAME_AS = {
    **dict.fromkeys((".pyi", ".pyx"), ".py"),
    **dict.fromkeys((".jsx", ".ts", ".tsx", ".mjs", ".cjs", ".vue"), ".js"),
    **dict.fromkeys((".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".m"), ".c"),
    **dict.fromkeys((".kt", ".scala"), ".java"),
}
CODE_GLOBS = tuple(f"*{suffix}" for suffix in sorted({*_IMPORTS, *_SAME_AS})) + (
    *("*.md", "*.rst", "*.txt", "*.sh", "*.rb", "*.php", "*.cs", "*.swift", "*.jl", "*.lua", "*.pl", "*.r", "*.sql"),
    *("*.toml", "*.yaml", "*.yml", "*.cmake", "Makefile", "Dockerfile", "*.proto", "*.hs", "*.ml", "*.ex", "*.erl"),
)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One part of a long document.

    Attributes:
        text: what it says.
        order: its place: a number, a time, a name or a path; compared as people would (`2` before `10`).
        number: in which order it was read; decides where `order` does not.
        name: of a thread's post, its own; `parent` names the one that it answers.
    """

    text: str
    order: Any
    number: int
    name: Any = None
    parent: Any = None


def assembled(kind: str, pieces: Sequence[Piece]) -> str:
    """The text of a group, of one of the kinds of `config.ASSEMBLE`."""
    if kind == "repositories":
        files = {str(piece.order): piece.text for piece in in_order(pieces)}
        return "\n\n".join(f"# {path}\n{files[path]}" for path in import_order(files))
    ordered = in_order(pieces) if kind == "chapters" else thread_order(pieces)
    return "\n\n".join(piece.text.strip("\n") for piece in ordered)


def in_order(pieces: Sequence[Piece]) -> list[Piece]:
    """By `order`, numbers inside names by their value."""
    return sorted(pieces, key=lambda piece: (_natural(piece.order), piece.number))


def _natural(value: Any) -> tuple[Any, ...]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ((0, float(value), ""),)
    parts = re.split(r"(\d+)", "" if value is None else str(value))
    return tuple((0, float(part), "") if part.isdigit() else (1, 0.0, part) for part in parts if part)


def thread_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Each post behind the one that it answers, answers to one post by their order; depth first, however deep."""
    ordered = in_order(pieces)
    names = {piece.name for piece in ordered if piece.name is not None}
    answers: dict[Any, list[Piece]] = {}
    for piece in ordered:
        parent = piece.parent if piece.parent in names and piece.parent != piece.name else None
        answers.setdefault(parent, []).append(piece)
    found: list[Piece] = []
    done: set[int] = set()
    # Posts that answer each other in a circle are reached from none that starts a thread: they follow, by their order.
    stack = ordered[::-1] + answers.get(None, [])[::-1]
    while stack:
        piece = stack.pop()
        if piece.number in done:
            continue
        done.add(piece.number)
        found.append(piece)
        if piece.name is not None:
            stack += answers.get(piece.name, [])[::-1]
    return found


def import_order(files: Mapping[str, str]) -> list[str]:
    """Paths, each behind the files that it imports where there is no circle; otherwise in their given order.

    Read is what imports look like, not what they do: Python, JavaScript and TypeScript, C and C++, Rust, Java and Go.
    """
    known = _Known(files)
    found: list[str] = []
    state: dict[str, int] = {}  # 1: its imports are being placed, 2: placed
    for start in files:
        stack = [(start, False)]
        while stack:
            path, placed = stack.pop()
            if placed:
                state[path] = 2
                found.append(path)
            elif path not in state:
                state[path] = 1
                stack.append((path, True))
                stack += [(each, False) for each in reversed(known.imports(path, files[path])) if each not in state]
    return found


class _Known:
    """The files of a repository, found by what an import says of them."""

    def __init__(self, files: Mapping[str, str]):
        self._files = files
        self._by_end: dict[str, list[str]] = {}  # `a/b` -> paths that end so, their suffix left out or not
        for path in files:
            for whole in {path, posixpath.splitext(path)[0], _module_of(path)}:
                steps = whole.split("/")
                for start in range(len(steps)):
                    self._by_end.setdefault("/".join(steps[start:]), []).append(path)

    def imports(self, path: str, text: str) -> list[str]:
        """Other files that it imports, in the order of its imports."""
        suffix = posixpath.splitext(path)[1].lower()
        kind = _SAME_AS.get(suffix, suffix)
        if kind not in _IMPORTS:
            return []
        found = []
        for match in _IMPORTS[kind].finditer(text):
            named = next((group for group in match.groups() if group), "")
            for wanted in _paths_of(kind, named, path):
                hits = [each for each in self._by_end.get(wanted, ()) if each != path]
                if hits:
                    # Of several the nearest: the one that shares most of the way.
                    found.append(max(hits, key=lambda hit: len(posixpath.commonprefix([hit, path]))))
                    break
        return list(dict.fromkeys(found))


def _module_of(path: str) -> str:
    """`a/b` of `a/b/__init__.py`, `a/b/index.js` and `a/b/mod.rs`, which stand for their folder."""
    head, name = posixpath.split(posixpath.splitext(path)[0])
    return head if name in ("__init__", "index", "mod") and head else path


def _paths_of(kind: str, named: str, path: str) -> Iterator[str]:
    """What an import may mean, the best guess first."""
    folder = posixpath.dirname(path)
    if kind == ".py":
        dots = len(named) - len(named.lstrip("."))
        steps = named.lstrip(".").split(".") if named.lstrip(".") else []
        if dots:
            for _ in range(dots - 1):
                folder = posixpath.dirname(folder)
            steps = [*folder.split("/"), *steps] if folder else steps
        for end in range(len(steps), 0, -1):  # `import a.b.c` may name what stands inside a/b.py
            yield "/".join(steps[:end])
    elif kind == ".java":
        steps = named.split(".")
        yield from ("/".join(steps), "/".join(steps[:-1]))
    elif kind == ".js" or (kind == ".c" and "/" not in named):
        yield posixpath.normpath(posixpath.join(folder, named))
        yield posixpath.splitext(posixpath.normpath(posixpath.join(folder, named)))[0]
        if kind == ".c":
            yield named
    else:
        yield named
