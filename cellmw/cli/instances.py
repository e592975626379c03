# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The ``cellmw-manage instance`` commands, for instance mappings."""

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
from cellmw.cells.transactions import ChangeRefused
from cellmw.cli import arguments, base

_COLUMNS = ("instance_uuid", "cell_uuid", "project_id", "user_id")
_REQUIRED = _COLUMNS[:3]

_NO_TEXT = "the file is not UTF-8 text"

# Seconds between two progress lines.
_PROGRESS_INTERVAL = 1.0


class InstanceList(base.ListCommand):
    """List instance mappings, a page at a time.

    If there are more mappings, the command says how to list the next page.
    """

    names = (
        *("instance_uuid", "cell_uuid", "cell_name"),
        *("project_id", "user_id", "queued_for_delete"),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--cell",
            metavar="CELL",
            type=arguments.cell,
            help="List only the instances in the cell of this UUID or name.",
        )
        parser.add_argument(
            "--limit",
            metavar="NUMBER",
            type=arguments.number(1, 100000),
            default=1000,
            help="Most mappings to list. Default: 1000.",
        )
        parser.add_argument(
            "--marker",
            metavar="INSTANCE",
            type=arguments.uuid,
            help="Start after the instance with this UUID: the last one of "
            "the previous page.",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Return the rows."""
        known = self.configuration.cells()
        names = {cell.uuid: cell.name for cell in known}
        cell_id = None
        if parsed_args.cell is not None:
            cell_id = base.chosen(known, parsed_args.cell).id
        limit = parsed_args.limit
        # One more tells whether there is another page.
        found = self.configuration.changes.instances(
            cell_id, after=parsed_args.marker, limit=limit + 1
        )
        if len(found) > limit:
            found.pop()
            if self.app.options.verbose_level:
                self.app.stderr.write(
                    "There are more: --marker "
                    f"{found[-1].instance_uuid} shows the next page.\n"
                )
        return self.names, [
            (
                one.instance_uuid,
                one.cell_uuid,
                names.get(one.cell_uuid or ""),
                one.project_id,
                one.user_id,
                one.queued_for_delete,
            )
            for one in found
        ]


class InstanceShow(base.ShowCommand):
    """Show which cell an instance is in."""

    names = (
        *("instance_uuid", "cell_uuid", "cell_name"),
        *("project_id", "user_id", "queued_for_delete"),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        _add_instance_argument(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Return the fields."""
        found = self.configuration.changes.instance(parsed_args.instance)
        if found is None:
            raise base.Failed(f"instance {parsed_args.instance} is not mapped")
        name = None
        if found.cell_uuid is not None:
            name = self.configuration.cell(found.cell_uuid).name
        return base.columns(
            [
                ("instance_uuid", found.instance_uuid),
                ("cell_uuid", found.cell_uuid),
                ("cell_name", name),
                ("project_id", found.project_id),
                ("user_id", found.user_id),
                ("queued_for_delete", found.queued_for_delete),
            ]
        )


class InstanceMap(base.ShowCommand):
    """Map an instance, or a file of instances, to a cell.

    An instance that is already mapped as told is left alone, so the command
    can be repeated. A mapping that differs is an error, or is changed with
    --replace.

    The first line of a CSV file names the columns: instance_uuid, cell_uuid,
    project_id and, if known, user_id. An option can replace a column. The
    command checks the whole file before it writes anything, and reports every
    line that cannot be used. Each batch is one transaction. If the command is
    interrupted, run it again.
    """

    names = ("added", "changed", "unchanged", "running_processes")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "instance",
            metavar="INSTANCE",
            nargs="?",
            type=arguments.uuid,
            help="UUID of the instance.",
        )
        what.add_argument(
            "--file",
            metavar="FILE",
            help="CSV file with one instance per line. '-' is standard input.",
        )
        parser.add_argument(
            "--cell",
            metavar="CELL",
            type=arguments.cell,
            help="UUID or name of the cell that the instance is in.",
        )
        parser.add_argument(
            "--project-id",
            type=arguments.name,
            metavar="PROJECT",
            help="ID of the project that owns the instance.",
        )
        parser.add_argument(
            "--user-id",
            type=arguments.name,
            metavar="USER",
            help="ID of the user who owns the instance.",
        )
        parser.add_argument(
            "--replace",
            action="store_true",
            help="Change mappings that differ.",
        )
        parser.add_argument(
            "--batch-size",
            metavar="NUMBER",
            type=arguments.number(1, 10000),
            default=1000,
            help="Instances per transaction. Default: 1000.",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Write the mappings, and return how many."""
        cell = parsed_args.cell
        if cell is not None:
            cell = self.configuration.cell(cell).uuid
        defaults = {
            "cell_uuid": cell,
            "project_id": parsed_args.project_id,
            "user_id": parsed_args.user_id,
        }
        if parsed_args.file is None:
            missing = [name for name in _REQUIRED[1:] if not defaults[name]]
            if missing:
                option = {"cell_uuid": "--cell", "project_id": "--project-id"}
                raise base.Failed(f"{option[missing[0]]} is missing")
            wanted = InstanceMapping(
                instance_uuid=parsed_args.instance, **defaults
            )
            tally = self.configuration.changes.map_instances(
                [wanted], replace=parsed_args.replace
            )
        else:
            with _opened(parsed_args.file) as stream:
                tally = self._map_file(_File(stream, defaults), parsed_args)
        return base.columns(
            [
                ("added", tally.added),
                ("changed", tally.changed),
                ("unchanged", tally.unchanged),
                ("running_processes", _effect(self.configuration)),
            ]
        )

    def _map_file(self, file: _File, parsed_args: argparse.Namespace) -> Tally:
        changes = self.configuration.changes
        known = {cell.uuid for cell in self.configuration.cells()}
        total = file.check(known, _Problems(self.app.stderr))
        tally = Tally()
        problems = _Problems(self.app.stderr)
        with self._progress("checked", total) as progress:
            for batch in _batches(file.mappings(), parsed_args.batch_size):
                try:
                    tally += changes.check_instances(
                        batch, replace=parsed_args.replace
                    )
                except ChangeRefused as error:
                    for problem in error.problems:
                        problems.add(problem)
                progress.add(len(batch), tally)
        problems.stop()
        tally = Tally()
        with self._progress("mapped", total) as progress:
            for batch in _batches(file.mappings(), parsed_args.batch_size):
                tally += changes.map_instances(
                    batch, replace=parsed_args.replace
                )
                progress.add(len(batch), tally)
        return tally

    def _progress(self, verb: str, total: int) -> _Progress:
        shown = self.app.options.verbose_level
        return _Progress(self.app.stderr if shown else None, verb, total)


class InstanceUnmap(base.Command):
    """Remove the mapping of an instance.

    Requests for the instance are then handled as on_no_cell says.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        _add_instance_argument(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Delete the mapping."""
        self.configuration.changes.unmap_instance(parsed_args.instance)
        self.app.stdout.write(
            f"Instance {parsed_args.instance} is no longer mapped. "
            f"{_effect(self.configuration)}\n"
        )


def _add_instance_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "instance",
        metavar="INSTANCE",
        type=arguments.uuid,
        help="UUID of the instance.",
    )


def _effect(configuration: base.Configuration) -> str:
    """Describe how long running processes use what they remember."""
    settings = configuration.settings
    if not settings.instance_cache_ttl:
        return (
            "Running processes use the change at once "
            "(instance_cache_ttl = 0)."
        )
    which = (
        "GET, HEAD and OPTIONS requests"
        if settings.instance_cache_for == "safe"
        else "all requests"
    )
    others = (
        " Other methods use the change at once."
        if settings.instance_cache_for == "safe"
        else ""
    )
    return (
        "A running process may use the cell that it remembers of an instance "
        f"for {which} for up to {settings.instance_cache_ttl:g} s "
        f"(instance_cache_ttl, instance_cache_for).{others}"
    )


@contextlib.contextmanager
def _opened(name: str) -> Iterator[TextIO]:
    """The file, so that it can be read more than once."""
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
                # As a file with this mark, which spreadsheets write, is read.
                copy.write(stream.read(1).removeprefix("\ufeff"))
                shutil.copyfileobj(stream, copy)
                stream = copy
        except OSError as error:
            raise base.Failed(f"{name}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise base.Failed(_NO_TEXT) from None
        yield stream


class _Problems:
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


class _File:
    """A CSV file of instance mappings.

    It is read once for the check and once more for each pass, so its size
    does not matter.
    """

    def __init__(
        self, stream: TextIO, defaults: dict[str, str | None]
    ) -> None:
        self._stream = stream
        self._defaults = defaults

    def check(self, cells: set[str], problems: _Problems) -> int:
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
            for name in _REQUIRED
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
    """What is wrong with a line, if anything is."""
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


def _batches(
    mappings: Iterator[InstanceMapping], size: int
) -> Iterator[list[InstanceMapping]]:
    while batch := list(itertools.islice(mappings, size)):
        yield batch


class _Progress:
    """A progress bar on a terminal; elsewhere a line from time to time.

    :param stream: None: say nothing
    """

    def __init__(self, stream: TextIO | None, verb: str, total: int) -> None:
        self._stream = stream
        self._verb = verb
        self._total = total
        self._done = 0
        self._new = 0
        self._said_at = time.monotonic()
        self._bar: Any = None
        if stream is not None and stream.isatty():
            # Else it starts a thread that watches for bars that stand still.
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
            self._say()

    def add(self, count: int, tally: Tally) -> None:
        """So many more are done, which makes this of all of them."""
        self._done += count
        self._new = tally.added
        if self._bar is not None:
            self._bar.set_postfix(new=self._new, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._said_at >= _PROGRESS_INTERVAL:
            self._said_at = now
            self._say()

    def _say(self) -> None:
        if self._stream is not None:
            percent = 100 * self._done // max(1, self._total)
            self._stream.write(
                f"{self._verb} {self._done} of {self._total} ({percent} %), "
                f"{self._new} new\n"
            )
            self._stream.flush()
