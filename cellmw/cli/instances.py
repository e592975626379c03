# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The ``cellmw-manage instance`` commands, for instance mappings."""

from __future__ import annotations

import argparse
from typing import Any

from cellmw.cells.instance_changes import InstanceMapping, Tally
from cellmw.cells.transactions import ChangeRefused
from cellmw.cli import arguments, base
from cellmw.cli.instance_files import (
    REQUIRED,
    MappingFile,
    Problems,
    Progress,
    batches,
    opened,
)


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
        # One more shows whether another page follows.
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
        _add_mapping_arguments(parser)
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
            missing = [name for name in REQUIRED[1:] if not defaults[name]]
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
            with opened(parsed_args.file) as stream:
                tally = self._map_file(
                    MappingFile(stream, defaults), parsed_args
                )
        return base.columns(
            [
                ("added", tally.added),
                ("changed", tally.changed),
                ("unchanged", tally.unchanged),
                ("running_processes", _effect(self.configuration)),
            ]
        )

    def _map_file(
        self, file: MappingFile, parsed_args: argparse.Namespace
    ) -> Tally:
        changes = self.configuration.changes
        known = {cell.uuid for cell in self.configuration.cells()}
        total = file.check(known, Problems(self.app.stderr))
        tally = Tally()
        problems = Problems(self.app.stderr)
        with self._progress("checked", total) as progress:
            for batch in batches(file.mappings(), parsed_args.batch_size):
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
            for batch in batches(file.mappings(), parsed_args.batch_size):
                tally += changes.map_instances(
                    batch, replace=parsed_args.replace
                )
                progress.add(len(batch), tally)
        return tally

    def _progress(self, verb: str, total: int) -> Progress:
        shown = self.app.options.verbose_level
        return Progress(self.app.stderr if shown else None, verb, total)


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


def _add_mapping_arguments(parser: argparse.ArgumentParser) -> None:
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
