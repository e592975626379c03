# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Tables fit, and no UUID in them is broken over lines."""

from __future__ import annotations

import io
import re
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmw.cli import tables

_UUIDS = st.integers(0, 2**128 - 1).map(lambda n: str(uuid.UUID(int=n)))
_TEXTS = st.lists(
    st.one_of(_UUIDS, st.text("ab/ ", max_size=90)), max_size=3
).map("".join)
_ROWS = st.integers(1, 7).flatmap(
    lambda count: st.lists(
        st.lists(_TEXTS, min_size=count, max_size=count), max_size=3
    )
)


def printed(rows: list[list[str]], width: int) -> str:
    names = [f"column_{number}" for number in range(len(rows[0]))]
    stream = io.StringIO()
    tables.Table(width).emit_list(names, rows, stream, None)
    return stream.getvalue()


@settings(deadline=None)
@given(_ROWS, st.integers(80, 200))
def test_a_table_fits_and_keeps_uuids_whole(
    rows: list[list[str]], width: int
) -> None:
    if not rows:
        return
    text = printed(rows, width)
    assert max(map(len, text.splitlines())) <= width
    for row in rows:
        for found in tables._UUID.findall(" ".join(row)):
            assert found in text
    text = re.sub("column_.|Field|Value", "", text)
    shown, written = (
        sorted(re.sub("[^a-f/0-9]", "", one))
        for one in (text, "".join(map("".join, rows)))
    )
    assert shown == written


def test_a_table_that_fits_is_one_table() -> None:
    text = printed([["a" * 30, "b" * 60], ["c", "d"]], 80)
    assert text.count("column_0") == 1
    assert max(map(len, text.splitlines())) == 80


def test_where_there_is_no_room_each_row_is_a_table() -> None:
    row = [str(uuid.uuid4()), str(uuid.uuid4()), "x" * 80]
    text = printed([row, row], 80)
    assert text.count("column_0") == 2
    assert max(map(len, text.splitlines())) == 80


def test_wide_characters_take_two_columns() -> None:
    assert list(tables.wrap("\u4e2d" * 7, 6)) == ["\u4e2d" * 3] * 2 + [
        "\u4e2d"
    ]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_its_width_and_all_else_eighty_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "132")
    assert tables.width_of(_Terminal()) == 132
    assert tables.width_of(io.StringIO()) == 80
