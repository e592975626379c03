# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What a check has found, and how that is printed."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from cliff.formatters.base import ListFormatter

from cellmw import redaction
from cellmw.cli import tables

OK, WARN, FAIL = "OK", "WARN", "FAIL"
_LONGEST = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, without credentials.

    :ivar status: ``OK``; ``WARN``: it may be meant so; ``FAIL``: requests or
        messages fail, or reach the wrong queue
    :ivar check: what was looked at
    :ivar finding: what was found there
    :ivar advice: what to do about it; empty where it is good
    """

    status: str
    check: str
    finding: str
    advice: str = ""


def ok(check: str, finding: str) -> Finding:
    """A check that found nothing wrong."""
    return _made(OK, check, finding, "")


def warn(check: str, finding: str, advice: str) -> Finding:
    """A check that found what may be meant so, or may go wrong."""
    return _made(WARN, check, finding, advice)


def fail(check: str, finding: str, advice: str) -> Finding:
    """A check that found what does not work."""
    return _made(FAIL, check, finding, advice)


def _made(*texts: str) -> Finding:
    # Here, and not where it is printed: the known credentials are forgotten
    # with the configuration that they come from.
    return Finding(
        *(
            redaction.one_line(redaction.scrub(text), _LONGEST)
            for text in texts
        )
    )


class Lines(ListFormatter):
    """A formatter of cliff: each row begins a line with its status.

    A line that does not fit goes on below, indented.
    """

    _INDENT = " " * 6

    def add_argument_group(self, parser: argparse.ArgumentParser) -> None:
        """Add no option."""

    def emit_list(
        self,
        column_names: Sequence[str],
        data: Iterable[Sequence[Any]],
        stdout: TextIO,
        parsed_args: argparse.Namespace,
    ) -> None:
        """Print the rows."""
        width = tables.width_of(stdout)
        for row in data:
            named = dict(zip(column_names, row, strict=True))
            stdout.writelines(
                "\n".join(_wrapped(line, width)) + "\n"
                for line in self._lines(named)
            )

    def _lines(self, row: dict[str, str]) -> Iterator[str]:
        status = row.pop("status", "")
        advice = row.pop("advice", "")
        yield f"{status:<4}  {': '.join(row.values())}".rstrip()
        if advice:
            yield f"{self._INDENT}-> {advice}"


def _wrapped(line: str, width: int) -> Iterator[str]:
    indent = Lines._INDENT
    first, *rest = tables.wrap(line[len(indent) :], width - len(indent))
    yield line[: len(indent)] + first
    for more in rest:
        yield indent + more
