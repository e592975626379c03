# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage cell ...``: the cell mappings."""

from __future__ import annotations

import argparse
from typing import Any

import sqlalchemy as sa

from cellmw import exceptions, redaction
from cellmw.cells import urls
from cellmw.cells.changes import has_table
from cellmw.cells.mapping import CELL0_UUID, CellMapping
from cellmw.cli import arguments, base
from cellmw.redaction import Secret

_URL_HELP = (
    "Transport URL of the cell's message broker. It may be a template over "
    "the parts of [DEFAULT] transport_url, as in "
    "'rabbit://{username}:{password}@otherhost/{path}'. '-' reads it from "
    "standard input, so that no list of processes shows it."
)
_DATABASE_HELP = (
    "URL of the cell's own database, which Nova reads and cellmw does not; "
    "'-' reads it from standard input."
)


_NAMES = (
    *("uuid", "name", "disabled", "transport_url"),
    *("database_connection", "state"),
)


def shown(url: Secret | None) -> str | None:
    """A URL as it may be printed."""
    return None if url is None else redaction.redact_url(url.reveal())


def state_of(configuration: base.Configuration, cell: CellMapping) -> str:
    """What requests for a cell get, in a few words."""
    expanded = configuration.outcome(cell)
    if expanded.refusal is None:
        return (
            "disabled (still receives messages)" if cell.disabled else "usable"
        )
    error, reason = expanded.refusal
    if error is exceptions.CellHasNoQueue:
        return "no queue"
    return f"misconfigured: {reason}"


def fields_of(
    configuration: base.Configuration, cell: CellMapping
) -> list[tuple[str, Any]]:
    """A cell field by field, as it may be printed."""
    return [
        ("uuid", cell.uuid),
        ("name", cell.name),
        ("disabled", cell.disabled),
        ("transport_url", shown(cell.transport_url)),
        ("database_connection", shown(cell.database_connection)),
        ("state", state_of(configuration, cell)),
    ]


class CellList(base.ListCommand):
    """List the cells.

    URLs are shown without credentials. The state says what a request for an
    instance in the cell gets.
    """

    names = _NAMES

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Give the rows."""
        rows = [
            [value for _, value in fields_of(self.configuration, cell)]
            for cell in self.configuration.cells()
        ]
        return self.names, rows


class CellShow(base.ShowCommand):
    """Show one cell, and what its transport URL becomes.

    URLs are shown without credentials.
    """

    names = (
        *_NAMES,
        *("transport_url_filled_in", "instances", "queued_for_delete"),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        _add_cell_argument(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Give the fields."""
        cell = self.configuration.cell(parsed_args.cell)
        assert cell.id is not None
        generation = self.configuration.expand(cell).generation
        changes = self.configuration.changes
        mapped, queued = changes.count_instances(cell.id)
        return base.columns(
            [
                *fields_of(self.configuration, cell),
                (
                    "transport_url_filled_in",
                    None if generation is None else shown(generation.url),
                ),
                ("instances", mapped),
                ("queued_for_delete", queued),
            ]
        )


class CellCreate(base.ShowCommand):
    """Add a cell.

    The command refuses a cell with the UUID, the name, the database, or the
    broker and virtual host of another one. It tries all that can be tried
    without a broker: the options in the URL, and certificate files.
    """

    names = _NAMES

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--uuid",
            type=arguments.uuid,
            help=f"UUID of the cell; {CELL0_UUID} is cell0. Default: a new "
            "one.",
        )
        parser.add_argument(
            "--name", type=arguments.name, help="Name of the cell."
        )
        parser.add_argument(
            "--transport-url",
            metavar="URL",
            type=arguments.secret,
            required=True,
            help=f"{_URL_HELP} cell0 has 'none:///'.",
        )
        parser.add_argument(
            "--database-connection",
            metavar="URL",
            type=arguments.secret,
            help=f"{_DATABASE_HELP} Required where Nova manages the tables.",
        )
        parser.add_argument(
            "--disabled",
            action="store_true",
            help="Keep Nova from scheduling to the cell.",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Write it and give its fields."""
        cell = CellMapping(
            uuid=parsed_args.uuid or base.new_uuid(),
            name=parsed_args.name,
            transport_url=parsed_args.transport_url,
            database_connection=parsed_args.database_connection,
            disabled=parsed_args.disabled,
        )
        configuration = self.configuration
        _check(configuration, cell)
        if cell.disabled and cell.uuid == CELL0_UUID:
            raise base.Failed("cell0 cannot be disabled")
        if cell.database_connection is None and has_table(
            configuration.engine, "host_mappings"
        ):
            raise base.Failed(
                "Nova manages these tables, and it cannot read a cell "
                "without --database-connection"
            )
        configuration.changes.create_cell(cell)
        return base.columns(fields_of(configuration, cell))


class CellUpdate(base.ShowCommand):
    """Change a cell, and say what running processes will do.

    What no option names stays as it is.
    """

    names = (*_NAMES, "running_processes")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        _add_cell_argument(parser)
        parser.add_argument(
            "--name", type=arguments.name, help="New name of the cell."
        )
        parser.add_argument(
            "--transport-url",
            metavar="URL",
            type=arguments.secret,
            help=_URL_HELP,
        )
        parser.add_argument(
            "--database-connection",
            metavar="URL",
            type=arguments.secret,
            help=_DATABASE_HELP,
        )
        enabled = parser.add_mutually_exclusive_group()
        enabled.add_argument(
            "--disable",
            action="store_true",
            help="Keep Nova from scheduling to the cell. The cell still "
            "receives the messages for its instances.",
        )
        enabled.add_argument(
            "--enable", action="store_true", help="Let Nova schedule again."
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Write it and give its fields."""
        values: dict[str, Any] = {
            name: value
            for name in ("name", "transport_url", "database_connection")
            if (value := getattr(parsed_args, name)) is not None
        }
        if parsed_args.disable or parsed_args.enable:
            values["disabled"] = parsed_args.disable
        if not values:
            raise base.Failed("no option says what to change; see --help")
        configuration = self.configuration
        before = configuration.cell(parsed_args.cell)
        if "disabled" in values and before.uuid == CELL0_UUID:
            raise base.Failed("cell0 cannot be disabled or enabled")
        _check(
            configuration,
            CellMapping(
                uuid=before.uuid,
                transport_url=values.get(
                    "transport_url", before.transport_url
                ),
                database_connection=values.get("database_connection"),
            ),
            transport_url="transport_url" in values,
        )
        after = configuration.changes.update_cell(before.uuid, **values)
        moved = after.transport_url != before.transport_url
        return base.columns(
            [
                *fields_of(configuration, after),
                ("running_processes", _effect(configuration, moved=moved)),
            ]
        )


class CellDelete(base.Command):
    """Remove a cell.

    The command refuses while instances are mapped to the cell. Running
    processes refuse to send to it from their next refresh of the cell
    mappings on. For cell0 it asks first.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        _add_cell_argument(parser)
        parser.add_argument(
            "--yes", action="store_true", help="Delete cell0 without asking."
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Write it."""
        cell = self.configuration.cell(parsed_args.cell)
        if cell.uuid == CELL0_UUID and not parsed_args.yes:
            self._confirm()
        self.configuration.changes.delete_cell(cell.uuid)
        interval = self.configuration.settings.cell_refresh_interval
        self.app.stdout.write(
            f"Cell {cell.uuid} was deleted. Running processes refuse to send "
            f"to it once they have seen that. {_when(interval)}\n"
        )

    def _confirm(self) -> None:
        if not self.app.stdin.isatty():
            raise base.Failed("cell0 is deleted only with --yes")
        self.app.stderr.write(
            "Nova keeps the instances in cell0 that never got a host. "
            "Delete cell0? [y/N] "
        )
        self.app.stderr.flush()
        if self.app.stdin.readline().strip().lower() not in ("y", "yes"):
            raise base.Failed("nothing was changed")


def _add_cell_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cell",
        metavar="CELL",
        type=arguments.cell,
        help="UUID or name of the cell.",
    )


def _check(
    configuration: base.Configuration,
    cell: CellMapping,
    *,
    transport_url: bool = True,
) -> None:
    """Refuse what could not be used, before anything is written."""
    configuration.hide(cell.transport_url, cell.database_connection)
    if transport_url:
        refusal = configuration.outcome(cell).refusal
        if refusal and refusal[0] is exceptions.CellMisconfigured:
            raise base.Failed(refusal[1])
    database = cell.database_connection
    # What fills in a template stands in Nova's configuration.
    if database is not None and not urls.is_template(database.reveal()):
        problem = _problem_of_database(database)
        if problem is not None:
            raise base.Failed(f"database_connection: {problem}")


def _problem_of_database(url: Secret) -> str | None:
    """Why this cannot lead to a database; its driver needs not be here."""
    try:
        sa.make_url(url.reveal()).get_dialect()
    except sa.exc.NoSuchModuleError:
        return "SQLAlchemy knows no such kind of database, or driver"
    except (sa.exc.ArgumentError, ValueError):
        return "it is no database URL"
    except ImportError:
        # The machine that reads it may have the driver installed.
        return None
    return None


def _effect(configuration: base.Configuration, *, moved: bool) -> str:
    """What running processes will do about a change, and when."""
    interval = configuration.settings.cell_refresh_interval
    when = (
        f"{_when(interval)} None needs a restart. Nova's own services see the "
        "change after a restart."
    )
    if not moved:
        return f"{when} Messages go where they went before."
    return (
        f"{when} From then on messages go to the new URL. A request that has "
        "sent a message to the old URL stays with it. Connections to the old "
        "URL are closed when no request uses them."
    )


def _when(interval: float) -> str:
    """When a running process sees what was written."""
    return (
        "A process with this filter reads the cell mappings again for the "
        f"first request that finds them {interval:g} s old "
        "(cell_refresh_interval). Meanwhile other requests use the old ones "
        f"until these are {2 * interval:g} s old, and all requests do while "
        "the API database cannot be reached."
    )
