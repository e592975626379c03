# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The documentation tells of each line of the log, with its level."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "doc/source/reference/log.rst"
# Not part of a service.
OTHERS = ("cli", "demo", "testing")
LEVELS = {"info", "warning", "error", "exception", "critical", "log"}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in LEVELS
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in ("LOG", "_LOG")
        ):
            yield node


def lines_of_the_code() -> list[tuple[str, str]]:
    """Level and text of each, an ellipsis for what changes."""
    found = []
    for path in sorted((ROOT / "cellmw").rglob("*.py")):
        if path.relative_to(ROOT / "cellmw").parts[0] in OTHERS:
            continue
        for call in calls(ast.parse(path.read_text("utf-8"))):
            assert isinstance(call.func, ast.Attribute)
            level = call.func.attr.upper()
            text = call.args[1 if level == "LOG" else 0]
            assert isinstance(text, ast.Constant), path
            shown = re.sub(
                r"\[?%(\(\w+\))?[.\d]*[sdrf]\]?",
                lambda match: (
                    "[cellmw]" if match[0].startswith("[") else "\u2026"
                ),
                str(text.value),
            )
            found.append((level, shown))
    return found


def lines_of_the_page() -> list[tuple[str, str]]:
    rows = re.findall(
        r"^   \* - ([A-Z, ]+)\n     - ``(.+)``$",
        PAGE.read_text("utf-8"),
        re.MULTILINE,
    )
    return [
        (
            "LOG" if "," in level else level,
            text.removesuffix("\u2026").rstrip(),
        )
        for level, text in rows
    ]


def test_each_line_is_on_the_page_and_the_other_way_round() -> None:
    known = lines_of_the_page()
    lines = lines_of_the_code()
    assert len(lines) > 20
    for level, text in lines:
        told = [one for one, begin in known if text.startswith(begin)]
        assert told == [level], text
    for level, begin in known:
        assert any(
            text.startswith(begin) for one, text in lines if one == level
        ), begin
