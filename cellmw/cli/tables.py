# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Tables that fit the terminal, or 80 columns without one.

Columns get narrower and their texts are wrapped, but a UUID is never broken.
If the columns still do not fit, each row becomes a table of its fields.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import prettytable

_UUID = re.compile(r"([0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})")
# Narrower columns are hard to read.
_NARROWEST = 12
# Longer words may be broken.
_LONGEST_WORD = 24
# A border and a space on each side of a column, and one border more.
_FRAME = 3


def width_of(stream: TextIO) -> int:
    """Return the width of a stream's terminal in columns."""
    if not stream.isatty():
        return 80
    return shutil.get_terminal_size((80, 24)).columns


class Table:
    """A cliff formatter for lists and for single rows.

    :param width: columns to fit into
    """

    def __init__(self, width: int) -> None:
        self._width = width

    def emit_list(
        self,
        column_names: Sequence[str],
        data: Iterable[Sequence[Any]],
        stdout: TextIO,
        parsed_args: object,
    ) -> None:
        """Print rows."""
        rows = [[_text(value) for value in row] for row in data]
        if not rows:
            stdout.write("\n")
            return
        widths = self._fit(column_names, rows)
        if widths is None:
            for row in rows:
                self.emit_one(column_names, row, stdout, parsed_args)
            return
        table = _frame(column_names)
        for row in rows:
            table.add_row(_wrapped(row, widths))
        stdout.write(f"{table.get_string()}\n")

    def emit_one(
        self,
        column_names: Sequence[str],
        data: Iterable[Any],
        stdout: TextIO,
        parsed_args: object,
    ) -> None:
        """Print the fields of one row."""
        names = ("Field", "Value")
        table = _frame(names)
        field = max(map(_width, (*column_names, names[0])))
        value = max(36, self._width - field - 2 * _FRAME - 1)
        for name, content in zip(column_names, data, strict=True):
            table.add_row([name, *_wrapped([_text(content)], [value])])
        stdout.write(f"{table.get_string()}\n")

    def _fit(
        self, names: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> list[int] | None:
        """Return the widths of the columns, or None if they cannot fit."""
        columns = list(zip(names, *rows, strict=True))
        natural = [max(_width(text) for text in one) for one in columns]
        widths = [
            min(full, max(_NARROWEST, _width(one[0]), *map(_least, one)))
            for full, one in zip(natural, columns, strict=True)
        ]
        room = self._width - 1 - _FRAME * len(widths) - sum(widths)
        if room < 0:
            return None
        while room:
            wanting = [
                at for at, full in enumerate(natural) if widths[at] < full
            ]
            if not wanting:
                break
            # The column that is shortened most gets the next character.
            at = max(wanting, key=lambda at: natural[at] / widths[at])
            widths[at] += 1
            room -= 1
        return widths


def _frame(names: Sequence[str]) -> prettytable.PrettyTable:
    table = prettytable.PrettyTable(list(names))
    table.align = "l"
    return table


def _text(value: Any) -> str:
    return str(value)


def _width(text: str) -> int:
    return sum(
        2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def _least(text: str) -> int:
    """Return the width at which no UUID and no short word is broken."""
    if _UUID.search(text):
        return 36
    return min(_LONGEST_WORD, max(map(_width, text.split(" "))))


def _wrapped(row: Iterable[str], widths: Sequence[int]) -> list[str]:
    return [
        "\n".join(wrap(text, width))
        for text, width in zip(row, widths, strict=True)
    ]


def wrap(text: str, width: int) -> Iterator[str]:
    """Break a text into lines, between words where that is possible."""
    line = ""
    for word in text.split(" "):
        pieces = [word]
        if _width(word) > width:
            pieces = list(_pieces(word, width))
        for number, piece in enumerate(pieces):
            gap = " " if line and not number else ""
            if line and _width(line) + len(gap) + _width(piece) > width:
                yield line
                line, gap = "", ""
            line += gap + piece
    yield line


def _pieces(word: str, width: int) -> Iterator[str]:
    """Split a long word into UUIDs and single characters."""
    for number, part in enumerate(_UUID.split(word)):
        if number % 2 and width >= len(part):
            yield part
        else:
            yield from part
