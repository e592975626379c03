# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The command that prints the measures counts what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import measures

MODULE = '''\
"""Docstring."""

import os  # a comment on a line of code


class Thing:
    """Docstring
    of two lines."""

    field: int
    table = """a string
    that is no docstring"""

    def method(self):
        # A comment.
        self.one, self.two = 1, 2

        return other._private or os.getpid() or self._own
'''


def test_lines_of_code_exclude_comments_and_docstrings() -> None:
    source = measures.Source("thing.py", MODULE)
    (method,) = source.functions()
    assert len(source.code) == 8
    assert source.length(method) == 3


def test_attributes_are_fields_and_assignments() -> None:
    (thing,) = measures.Source("thing.py", MODULE).classes()
    assert measures.attributes(thing) == {"field", "one", "two"}


def test_private_names_and_calls_are_found_with_their_line() -> None:
    source = measures.Source("thing.py", MODULE)
    assert list(measures.private_names(source)) == ["thing.py:18 _private"]
    assert list(measures.calls_of_getpid(source)) == ["thing.py:18"]


def test_the_command_prints_each_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("cellmw/cli", "tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "thing.py").write_text(MODULE)
    long = "VALUE = 1\n" * 301
    (tmp_path / "cellmw" / "long.py").write_text(long)
    arguments = ["--root", str(tmp_path)]
    assert measures.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "   301 lines of code without cli, demo, testing  (goal: 6000)",
        "   309 lines of code",
        "     1 modules over 300 lines  (goal: 0)",
        "         cellmw/long.py 301",
        "     0 classes over 10 attributes  (goal: 0)",
        "     0 functions over 40 lines  (goal: 0)",
        "     1 calls of getpid()",
        "     1 private names in tests",
    ]
    assert measures.main([*arguments, "--strict"]) == 1
