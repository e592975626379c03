# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Measures of the code's size and shape.

``python -m tests.measures`` prints each measure beside its goal, and what
exceeds it.  The command reports; it fails only with ``--strict``.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Packages for users and operators.  A service that runs the filter imports
# none of them.
APART = ("cli", "demo", "testing")

MOST_LINES_OF_PACKAGE = 6000
MOST_LINES_OF_MODULE = 300
MOST_LINES_OF_FUNCTION = 40
MOST_ATTRIBUTES = 10
# These classes are lists of values by nature.
LISTS_OF_VALUES = ("Settings", "Options", "Stats", "Statistics")

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True, slots=True)
class Measure:
    """A figure, its goal (None: no goal), and the places behind it."""

    name: str
    figure: int
    goal: int | None
    places: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return self.goal is None or self.figure <= self.goal


class Source:
    """A parsed module and its lines of code.

    A line of code has a token other than a comment, a docstring or layout.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.tree = ast.parse(text)
        docstrings = {
            line
            for node in ast.walk(self.tree)
            for line in _docstring_lines(node)
        }
        self.code = {
            line
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in _LAYOUT
            for line in range(token.start[0], token.end[0] + 1)
        } - docstrings

    def length(self, node: ast.AST) -> int:
        """Lines of code of a function or class."""
        assert isinstance(node, ast.stmt)
        last = node.end_lineno or node.lineno
        return len(self.code.intersection(range(node.lineno, last + 1)))

    def functions(self) -> Iterator[FunctionNode]:
        for node in ast.walk(self.tree):
            if isinstance(node, FunctionNode):
                yield node

    def classes(self) -> Iterator[ast.ClassDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):
                yield node


def _docstring_lines(node: ast.AST) -> range:
    if not isinstance(node, ast.Module | ast.ClassDef | FunctionNode):
        return range(0)
    if ast.get_docstring(node, clean=False) is None:
        return range(0)
    docstring = node.body[0]
    return range(docstring.lineno, (docstring.end_lineno or 0) + 1)


def sources(root: Path, folder: str) -> list[Source]:
    return [
        Source(str(path.relative_to(root)), path.read_text("utf-8"))
        for path in sorted((root / folder).rglob("*.py"))
    ]


def attributes(node: ast.ClassDef) -> set[str]:
    """The attributes of an instance: what methods assign, and the fields."""
    found = {
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and "ClassVar" not in ast.dump(statement.annotation)
    }
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        ):
            found.add(inner.attr)
    return found


def private_names(source: Source) -> Iterator[str]:
    """Where a module reaches for a private name of another object."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id in {"self", "cls"}:
                continue
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("_") and not name.endswith("__"):
                yield f"{source.name}:{node.lineno} {name}"


def calls_of_getpid(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and (
            (isinstance(node.func, ast.Name) and node.func.id == "getpid")
            or (
                isinstance(node.func, ast.Attribute)
                and node.func.attr == "getpid"
            )
        ):
            yield f"{source.name}:{node.lineno}"


def measures(root: Path) -> list[Measure]:
    package = sources(root, "cellmw")
    core = [
        source for source in package if Path(source.name).parts[1] not in APART
    ]
    long_modules = [
        f"{source.name} {len(source.code)}"
        for source in package
        if len(source.code) > MOST_LINES_OF_MODULE
    ]
    long_functions = [
        f"{source.name}:{node.lineno} {node.name} {source.length(node)}"
        for source in package
        for node in source.functions()
        if source.length(node) > MOST_LINES_OF_FUNCTION
    ]
    large_classes = [
        f"{source.name}:{node.lineno} {node.name} {len(attributes(node))}"
        for source in package
        for node in source.classes()
        if not node.name.endswith(LISTS_OF_VALUES)
        and len(attributes(node)) > MOST_ATTRIBUTES
    ]
    getpid = [place for source in package for place in calls_of_getpid(source)]
    private = [
        place
        for source in sources(root, "tests")
        for place in private_names(source)
    ]
    lines = sum(len(source.code) for source in core)
    return [
        Measure(
            f"lines of code without {', '.join(APART)}",
            lines,
            MOST_LINES_OF_PACKAGE,
        ),
        Measure("lines of code", sum(len(s.code) for s in package), None),
        _listed(f"modules over {MOST_LINES_OF_MODULE} lines", long_modules),
        _listed(f"classes over {MOST_ATTRIBUTES} attributes", large_classes),
        _listed(
            f"functions over {MOST_LINES_OF_FUNCTION} lines", long_functions
        ),
        Measure("calls of getpid()", len(getpid), None, tuple(getpid)),
        Measure("private names in tests", len(private), None, tuple(private)),
    ]


def _listed(name: str, places: list[str]) -> Measure:
    return Measure(name, len(places), 0, tuple(places))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.measures",
        description="Print measures of the code's size and shape.",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="list the places behind measures without a goal, too",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with status 1 where a measure exceeds its goal",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=ROOT,
        help="the checkout to measure (default: this one)",
    )
    options = parser.parse_args(arguments)
    found = measures(options.root)
    for measure in found:
        goal = "" if measure.goal is None else f"  (goal: {measure.goal})"
        sys.stdout.write(f"{measure.figure:6} {measure.name}{goal}\n")
        if options.verbose or not measure.holds:
            for place in measure.places:
                sys.stdout.write(f"         {place}\n")
    return int(options.strict and not all(m.holds for m in found))


if __name__ == "__main__":
    sys.exit(main())
