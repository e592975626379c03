# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage instance ...``: which instance is in which cell."""

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

from cellmw.cells.changes import InstanceMapping, Tally
from cellmw.cli import base

_COLUMNS = ("instance_uuid", "cell_uuid", "project_id", "user_id")
_REQUIRED = _COLUMNS[:3]

_NO_TEXT = "the file is not UTF-8 text"

# Seconds from one line about the progress to the next.
_PROGRESS_INTERVAL = 1.0


class InstanceShow(base.ShowCommand):
    """Show in which cell an instance is."""

    names = (
        *("instance_uuid", "cell_uuid", "cell_name"),
        *("project_id", "user_id", "queued_for_delete"),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        _add_instance_argument(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Give the fields."""
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

    What is mapped already is left as it is, so it can be run again; a
    mapping that says something else is changed only with --replace.

    A file is CSV with a first line that names its columns: instance_uuid,
    cell_uuid, project_id and, if known, user_id. A column may be missing
    whose value is given as an option. All of the file is checked before
    anything is written. Each batch is one transaction: if it is interrupted,
    run it again.
    """

    names = ("added", "changed", "unchanged", "running_processes")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "instance",
            metavar="INSTANCE",
            nargs="?",
            type=base.uuid_argument,
            help="UUID of the instance.",
        )
        what.add_argument(
            "--file",
            metavar="FILE",
            help="CSV file with one instance a line; '-' is standard input.",
        )
        parser.add_argument(
            "--cell",
            metavar="CELL",
            type=base.uuid_argument,
            help="UUID of the cell that it is in.",
        )
        parser.add_argument(
            "--project-id",
            type=base.name_argument,
            metavar="PROJECT",
            help="Project that it belongs to.",
        )
        parser.add_argument(
            "--user-id",
            type=base.name_argument,
            metavar="USER",
            help="User that it belongs to.",
        )
        parser.add_argument(
            "--replace",
            action="store_true",
            help="Change mappings that say something else.",
        )
        parser.add_argument(
            "--batch-size",
            metavar="NUMBER",
            type=_batch_size,
            default=1000,
            help="Instances in one transaction. Default: 1000.",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Write the mappings and give their numbers."""
        defaults = {
            "cell_uuid": parsed_args.cell,
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
        total = file.check({cell.uuid for cell in self.configuration.cells()})
        steps = (
            ("checked", changes.check_instances),
            ("mapped", changes.map_instances),
        )
        tally = Tally()
        for verb, step in steps:
            tally = Tally()
            with _Progress(self._progress_stream(), verb, total) as progress:
                for batch in _batches(file.mappings(), parsed_args.batch_size):
                    tally += step(batch, replace=parsed_args.replace)
                    progress.add(len(batch))
        return tally

    def _progress_stream(self) -> TextIO | None:
        return self.app.stderr if self.app.options.verbose_level else None


class InstanceUnmap(base.Command):
    """Remove the mapping of an instance.

    Requests for it are then served as those for an instance that has no
    cell yet.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        _add_instance_argument(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Write it."""
        self.configuration.changes.unmap_instance(parsed_args.instance)
        self.app.stdout.write(
            f"Instance {parsed_args.instance} is not mapped any more. "
            f"{_effect(self.configuration)}\n"
        )


def _add_instance_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "instance",
        metavar="INSTANCE",
        type=base.uuid_argument,
        help="UUID of the instance.",
    )


def _batch_size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 10000:
        raise argparse.ArgumentTypeError("it takes a number from 1 to 10000")
    return int(text)


def _effect(configuration: base.Configuration) -> str:
    """What running processes go on to believe, and for how long."""
    settings = configuration.settings
    if not settings.instance_cache_ttl:
        return "Running processes see it at once (instance_cache_ttl is 0)."
    which = (
        "GET, HEAD and OPTIONS requests"
        if settings.instance_cache_for == "safe"
        else "all requests"
    )
    others = (
        " Other methods see it at once."
        if settings.instance_cache_for == "safe"
        else ""
    )
    return (
        "A running process that remembers another cell of an instance uses "
        f"that for {which} for up to {settings.instance_cache_ttl:g} s "
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


class _File:
    """A CSV file of instance mappings.

    Read once to check it and again for each thing to be done with it, so
    that its size does not matter.
    """

    def __init__(
        self, stream: TextIO, defaults: dict[str, str | None]
    ) -> None:
        self._stream = stream
        self._defaults = defaults

    def check(self, cells: set[str]) -> int:
        """See that all of it can be used, and count its instances."""
        # A UUID's number takes less than half of its text's memory.
        seen: set[int] = set()
        for line, row in self._rows():
            problem = _problem(row, cells)
            if problem is None:
                number = int(row["instance_uuid"].replace("-", ""), 16)
                if number in seen:
                    problem = "this instance stands in another line, too"
                seen.add(number)
            if problem is not None:
                raise base.Failed(f"line {line}: {problem}")
        if not seen:
            raise base.Failed("the file names no instance")
        return len(seen)

    def mappings(self) -> Iterator[InstanceMapping]:
        """What stands in it."""
        for _, row in self._rows():
            yield InstanceMapping(
                instance_uuid=row["instance_uuid"].lower(),
                cell_uuid=row["cell_uuid"].lower(),
                project_id=row["project_id"],
                user_id=row["user_id"] or None,
            )

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        self._stream.seek(0)
        reader = csv.reader(self._stream, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            self._check_header(header)
            for values in reader:
                if not any(values):
                    continue
                if len(values) != len(header):
                    raise base.Failed(
                        f"line {reader.line_num}: it has {len(values)} "
                        f"columns, not {len(header)}"
                    )
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
                "line 1: it has to name the columns, each once, of "
                f"{', '.join(_COLUMNS)}"
            )
        if missing:
            raise base.Failed(f"line 1: there is no column {missing[0]}")


def _problem(row: dict[str, str], cells: set[str]) -> str | None:
    """What is wrong with a line, if anything is."""
    checks = (
        ("instance_uuid", base.uuid_argument),
        ("cell_uuid", base.uuid_argument),
        ("project_id", base.name_argument),
    )
    for name, check in checks:
        try:
            check(row[name])
        except argparse.ArgumentTypeError as error:
            return f"{name}: {error}"
    if row["user_id"]:
        try:
            base.name_argument(row["user_id"])
        except argparse.ArgumentTypeError as error:
            return f"user_id: {error}"
    if row["cell_uuid"].lower() not in cells:
        return f"there is no cell {row['cell_uuid']}"
    return None


def _batches(
    mappings: Iterator[InstanceMapping], size: int
) -> Iterator[list[InstanceMapping]]:
    while batch := list(itertools.islice(mappings, size)):
        yield batch


class _Progress:
    """Says from time to time how far it is, and at the end in any case."""

    def __init__(self, stream: TextIO | None, verb: str, total: int) -> None:
        self._stream = stream
        self._verb = verb
        self._total = total
        self._done = 0
        self._said_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._say()

    def add(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._said_at >= _PROGRESS_INTERVAL:
            self._said_at = now
            self._say()

    def _say(self) -> None:
        if self._stream is not None:
            percent = 100 * self._done // max(1, self._total)
            self._stream.write(
                f"{self._verb} {self._done} of {self._total} ({percent} %)\n"
            )
            self._stream.flush()
