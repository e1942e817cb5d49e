"""Small faults that a person makes, each a change of one node: a bound, a sign, a dropped check, a swapped argument."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
# Calls whose first two arguments may change places.
EITHER_WAY = {
    "max", "min", "maximum", "minimum", "gcd", "isinstance", "getattr", "hasattr", "array_equal", "allclose", "isclose", "cast",
}  # fmt: skip
SUMS = {"sum", "cumsum", "accumulate"}  # NumPy adds up smaller integers as int64 by itself


@dataclass(frozen=True)
class Mutant:
    """One planted fault: where it stands, what it is, and the whole source with it."""

    path: str
    line: int
    function: str  # dotted name within the file; "" for what runs at import
    kind: str
    was: str
    became: str
    source: str

    @property
    def name(self) -> str:
        """What the list of equivalents calls it; no line number, so that edits above do not matter."""
        return f"{self.path}::{self.function}::{self.was} -> {self.became}"


def mutants(path: str, source: str) -> list[Mutant]:
    """All of a file's mutants, in the order of their lines."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line.encode()))
    data, found = source.encode(), []
    for node, function in _nodes(tree, ""):
        for kind, replaced in _changes(node):
            start = offsets[node.lineno - 1] + node.col_offset
            end = offsets[node.end_lineno - 1] + node.end_col_offset
            text = f"({replaced})" if isinstance(node, ast.expr) else replaced
            mutated = (data[:start] + text.encode() + data[end:]).decode()
            was = " ".join(data[start:end].decode().split())
            found.append(Mutant(path, node.lineno, function, kind, was[:160], replaced[:160].replace("\n", " "), mutated))
    return sorted(found, key=lambda m: (m.line, m.was, m.became))


def _nodes(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node that may be changed, with its function; docstrings, annotations and messages are left as they are."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom):
                continue
            inner = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                inner = f"{function}.{child.name}".lstrip(".")
            if isinstance(child, ast.If) and _type_checking(child):
                continue
            if isinstance(child, ast.keyword) and child.arg == "strict":  # of zip: a guard against slips of ours
                continue
            if isinstance(child, ast.Raise):  # dropped whole; its message is the affair of the tests of texts
                yield child, inner
                continue
            yield child, inner
            yield from _nodes(child, inner)


def _type_checking(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test) or "__main__" in ast.unparse(node.test)


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    for change in CHANGES:
        yield from change(node)


def _compare(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        new = copy.deepcopy(node)
        new.ops[0] = COMPARE[type(node.ops[0])]()
        yield "bound", ast.unparse(new)


def _binary(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY and not _text(node):
        new = copy.deepcopy(node)
        new.op = BINARY[type(node.op)]()
        yield "arithmetic", ast.unparse(new)


def _text(node: ast.BinOp) -> bool:
    return any(isinstance(each, ast.JoinedStr) or (isinstance(each, ast.Constant) and isinstance(each.value, str))
               for each in ast.walk(node))  # fmt: skip


def _boolean(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.BoolOp):
        new = copy.deepcopy(node)
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", ast.unparse(new)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "sign", ast.unparse(node.operand)


def _constant(node: ast.AST) -> Iterator[tuple[str, str]]:
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield "constant", str(not node.value)
    elif isinstance(node.value, int | float):
        yield "constant", repr(node.value + 1)


def _check(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Raise):
        yield "dropped check", "pass"
    if isinstance(node, ast.IfExp):
        new = copy.deepcopy(node)
        new.body, new.orelse = node.orelse, node.body
        yield "swapped branches", ast.unparse(new)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "dropped call", "pass"


def _arguments(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Call) and len(node.args) >= 2 and not any(isinstance(each, ast.Starred) for each in node.args[:2]):
        first, second = node.args[:2]
        if ast.dump(first) != ast.dump(second) and _name(node.func) not in EITHER_WAY:
            new = copy.deepcopy(node)
            new.args[:2] = [copy.deepcopy(second), copy.deepcopy(first)]
            yield "swapped arguments", ast.unparse(new)
    if isinstance(node, ast.Call):
        for index, keyword in enumerate(node.keywords):
            if keyword.arg in ("default", "help", "description", "encoding", "capture_output", "flush", "metavar"):
                continue
            if keyword.arg == "dtype" and _name(node.func) in SUMS and ast.unparse(keyword.value) == "np.int64":
                continue
            if keyword.arg is not None and isinstance(keyword.value, ast.Name | ast.Attribute):
                new = copy.deepcopy(node)
                del new.keywords[index]
                yield "dropped argument", ast.unparse(new)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


Change = Callable[[ast.AST], Iterator[tuple[str, str]]]
CHANGES: tuple[Change, ...] = (_compare, _binary, _boolean, _constant, _check, _arguments)
