# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""CSV files of instance mappings: reading, checking, and the progress."""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import tqdm

from cellmw.cells.instance_changes import InstanceMapping, Tally
from cellmw.cli import arguments, base

_COLUMNS = ("instance_uuid", "cell_uuid", "project_id", "user_id")
REQUIRED = _COLUMNS[:3]

_NO_TEXT = "the file is not UTF-8 text"

# Seconds between two lines about the progress.
_PROGRESS_INTERVAL = 1.0


@contextlib.contextmanager
def opened(name: str) -> Iterator[TextIO]:
    """Open a file so that it can be read more than once.

    :param name: a path, or ``-`` for standard input
    :raises Failed: the file cannot be read
    """
    with contextlib.ExitStack() as stack:
        try:
            stream = sys.stdin
            if name != "-":
                stream = stack.enter_context(
                    Path(name).open(encoding="utf-8-sig", newline="")
                )
            if name == "-" or not stream.seekable():
                copy = stack.enter_context(
                    tempfile.TemporaryFile("w+", encoding="utf-8", newline="")
                )
                # Spreadsheets write this mark. utf-8-sig removes it.
                copy.write(stream.read(1).removeprefix("\ufeff"))
                shutil.copyfileobj(stream, copy)
                stream = copy
        except OSError as error:
            raise base.Failed(f"{name}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise base.Failed(_NO_TEXT) from None
        yield stream


class Problems:
    """The problems of a file; a single one is the command's error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._first = ""
        self._count = 0

    def add(self, problem: str) -> None:
        """Print a problem, but keep back the first until there is another."""
        self._count += 1
        if self._count == 1:
            self._first = problem
            return
        if self._count == 2:
            arguments.complain(self._stream, self._first)
        arguments.complain(self._stream, problem)

    def stop(self) -> None:
        """Stop the command if there is a problem.

        :raises Failed: there is a problem
        """
        if self._count == 1:
            raise base.Failed(self._first)
        if self._count:
            raise base.Failed(
                f"{self._count} lines cannot be used; nothing was changed"
            )


class MappingFile:
    """A CSV file of instance mappings.

    It is read once for the check and once more for each pass, so its size
    does not matter.
    """

    def __init__(
        self, stream: TextIO, defaults: dict[str, str | None]
    ) -> None:
        self._stream = stream
        self._defaults = defaults

    def check(self, cells: set[str], problems: Problems) -> int:
        """Check every line, and count the instances.

        :raises Failed: a line cannot be used, or there are no lines
        """
        # As a number, a UUID takes less than half the memory of its text.
        seen: set[int] = set()
        for line, row in self._rows():
            if isinstance(row, str):
                problem: str | None = row
            else:
                problem = _problem(row, cells)
            if problem is None and isinstance(row, dict):
                number = int(row["instance_uuid"].replace("-", ""), 16)
                if number in seen:
                    problem = "another line names the same instance"
                seen.add(number)
            if problem is not None:
                problems.add(f"line {line}: {problem}")
        problems.stop()
        if not seen:
            raise base.Failed("the file names no instance")
        return len(seen)

    def mappings(self) -> Iterator[InstanceMapping]:
        """Yield the mappings."""
        for _, row in self._rows():
            assert isinstance(row, dict)  # it was checked
            yield InstanceMapping(
                instance_uuid=row["instance_uuid"].lower(),
                cell_uuid=row["cell_uuid"].lower(),
                project_id=row["project_id"],
                user_id=row["user_id"] or None,
            )

    def _rows(self) -> Iterator[tuple[int, dict[str, str] | str]]:
        """Yield each line with its number; a text is the reason it is bad."""
        self._stream.seek(0)
        reader = csv.reader(self._stream, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            self._check_header(header)
            for values in reader:
                if not any(values):
                    continue
                if len(values) != len(header):
                    yield (
                        reader.line_num,
                        f"it has {len(values)} columns, not {len(header)}",
                    )
                    continue
                found = dict(zip(header, values, strict=True))
                yield (
                    reader.line_num,
                    {
                        name: found.get(name, "").strip()
                        or self._defaults.get(name)
                        or ""
                        for name in _COLUMNS
                    },
                )
        except csv.Error as error:
            raise base.Failed(f"line {reader.line_num}: {error}") from None
        except UnicodeDecodeError:
            raise base.Failed(_NO_TEXT) from None

    def _check_header(self, header: Sequence[str]) -> None:
        unknown = [name for name in header if name not in _COLUMNS]
        missing = [
            name
            for name in REQUIRED
            if name not in header and not self._defaults.get(name)
        ]
        if unknown or len(set(header)) != len(header):
            raise base.Failed(
                "line 1 has to name columns, each once, out of "
                f"{', '.join(_COLUMNS)}"
            )
        if missing:
            raise base.Failed(f"line 1 does not name column {missing[0]}")


def _problem(row: dict[str, str], cells: set[str]) -> str | None:
    """The problem of a line, or None."""
    checks = (
        ("instance_uuid", arguments.uuid),
        ("cell_uuid", arguments.uuid),
        ("project_id", arguments.name),
    )
    for name, check in checks:
        try:
            check(row[name])
        except argparse.ArgumentTypeError as error:
            return f"{name}: {error}"
    if row["user_id"]:
        try:
            arguments.name(row["user_id"])
        except argparse.ArgumentTypeError as error:
            return f"user_id: {error}"
    if row["cell_uuid"].lower() not in cells:
        return f"cell {row['cell_uuid']} does not exist"
    return None


def batches(
    mappings: Iterator[InstanceMapping], size: int
) -> Iterator[list[InstanceMapping]]:
    """Split mappings into lists of a size."""
    while batch := list(itertools.islice(mappings, size)):
        yield batch


class Progress:
    """A progress bar on a terminal, and a line per second elsewhere.

    :param stream: None: print nothing
    """

    def __init__(self, stream: TextIO | None, verb: str, total: int) -> None:
        self._stream = stream
        self._verb = verb
        self._total = total
        self._done = 0
        self._new = 0
        self._printed_at = time.monotonic()
        self._bar: Any = None
        if stream is not None and stream.isatty():
            # Keeps tqdm from starting a thread that watches the bars.
            tqdm.tqdm.monitor_interval = 0
            self._bar = tqdm.tqdm(
                desc=verb, total=total, file=stream, dynamic_ncols=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._print()

    def add(self, count: int, tally: Tally) -> None:
        """Count more instances as done.

        :param tally: of all that are done
        """
        self._done += count
        self._new = tally.added
        if self._bar is not None:
            self._bar.set_postfix(new=self._new, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._printed_at >= _PROGRESS_INTERVAL:
            self._printed_at = now
            self._print()

    def _print(self) -> None:
        if self._stream is not None:
            percent = 100 * self._done // max(1, self._total)
            self._stream.write(
                f"{self._verb} {self._done} of {self._total} ({percent} %), "
                f"{self._new} new\n"
            )
            self._stream.flush()
