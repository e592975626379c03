# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The ``cellmw-manage cell`` commands, which manage cell mappings."""

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
    "Transport URL of the cell's message broker. It may be a template that "
    "takes parts of [DEFAULT] transport_url, for example "
    "'rabbit://{username}:{password}@otherhost/{path}'. '-' reads the URL "
    "from standard input, which keeps it out of the list of processes."
)
_DATABASE_HELP = (
    "URL of the cell's own database. Nova reads it; cellmw uses it only with "
    "db_connection or nova_cell_cache. '-' reads the URL from standard input."
)


_NAMES = (
    *("uuid", "name", "disabled", "transport_url"),
    *("database_connection", "state"),
)


def shown(url: Secret | None) -> str | None:
    """Return a URL without its credentials."""
    return None if url is None else redaction.redact_url(url.reveal())


def state_of(configuration: base.Configuration, cell: CellMapping) -> str:
    """Describe in a few words what requests for a cell get."""
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
    """Return a cell's fields, without credentials."""
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
        """Return the rows."""
        rows = [
            [value for _, value in fields_of(self.configuration, cell)]
            for cell in self.configuration.cells()
        ]
        return self.names, rows


class CellShow(base.ShowCommand):
    """Show a cell, and its transport URL as it is filled in.

    URLs are shown without credentials.
    """

    names = (
        *_NAMES,
        *("transport_url_filled_in", "instances", "queued_for_delete"),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        _add_cell_argument(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Return the fields."""
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

    The command refuses a cell that has the UUID, the name, the database, or
    the broker and virtual host of another cell. It checks the options in the
    URL and the certificate files, and connects to no broker.
    """

    names = _NAMES

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--uuid",
            type=arguments.uuid,
            help=f"UUID of the cell. {CELL0_UUID} is cell0. Default: a random "
            "UUID.",
        )
        parser.add_argument(
            "--name", type=arguments.name, help="Name of the cell."
        )
        parser.add_argument(
            "--transport-url",
            metavar="URL",
            type=arguments.secret,
            required=True,
            help=f"{_URL_HELP} For cell0, give 'none:///'.",
        )
        parser.add_argument(
            "--database-connection",
            metavar="URL",
            type=arguments.secret,
            help=f"{_DATABASE_HELP} Required if Nova manages the tables.",
        )
        parser.add_argument(
            "--disabled",
            action="store_true",
            help="Keep Nova from scheduling to the cell.",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Write the mapping, and return its fields."""
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
    """Change a cell, and describe what running processes do.

    Columns without an option keep their values.
    """

    names = (*_NAMES, "running_processes")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
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
            "--enable",
            action="store_true",
            help="Let Nova schedule to the cell again.",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Write the mapping, and return its fields."""
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
    processes stop sending to the cell when they next read the cell mappings.
    Before it deletes cell0, the command asks.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser of this command."""
        parser = super().get_parser(prog_name)
        _add_cell_argument(parser)
        parser.add_argument(
            "--yes", action="store_true", help="Delete cell0 without asking."
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Delete the mapping."""
        cell = self.configuration.cell(parsed_args.cell)
        if cell.uuid == CELL0_UUID and not parsed_args.yes:
            self._confirm()
        self.configuration.changes.delete_cell(cell.uuid)
        interval = self.configuration.settings.cell_refresh_interval
        self.app.stdout.write(
            f"Cell {cell.uuid} was deleted. Running processes stop sending "
            f"to it when they next read the cell mappings. {_when(interval)}\n"
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
    """Refuse URLs that cannot be used, before anything is written."""
    configuration.hide(cell.transport_url, cell.database_connection)
    if transport_url:
        refusal = configuration.outcome(cell).refusal
        if refusal and refusal[0] is exceptions.CellMisconfigured:
            raise base.Failed(refusal[1])
    database = cell.database_connection
    # Nova's configuration has the parts that fill in a template.
    if database is not None and not urls.is_template(database.reveal()):
        problem = _problem_of_database(database)
        if problem is not None:
            raise base.Failed(f"database_connection: {problem}")


def _problem_of_database(url: Secret) -> str | None:
    """Return what is wrong with a database URL; its driver may be missing."""
    try:
        sa.make_url(url.reveal()).get_dialect()
    except sa.exc.NoSuchModuleError:
        return "SQLAlchemy has no dialect or driver of this name"
    except (sa.exc.ArgumentError, ValueError):
        return "it is not a database URL"
    except ImportError:
        # The machine that reads it may have the driver installed.
        return None
    return None


def _effect(configuration: base.Configuration, *, moved: bool) -> str:
    """Describe when a change reaches running processes."""
    interval = configuration.settings.cell_refresh_interval
    when = (
        f"{_when(interval)} No process needs a restart for it. Nova's own "
        "services read the change when they restart."
    )
    if not moved:
        return f"{when} Messages go to the same broker as before."
    return (
        f"{when} From then on messages go to the new URL. A request that has "
        "sent a message to the old URL keeps using it. Connections to the old "
        "URL are closed when no request uses them."
    )


def _when(interval: float) -> str:
    """Describe when a running process reads a change."""
    return (
        "A process with this filter reads the cell mappings again when a "
        f"request finds them {interval:g} s old (cell_refresh_interval). "
        "Other requests use the old mappings until these are "
        f"{2 * interval:g} s old, and all requests do while the API database "
        "cannot be reached."
    )
