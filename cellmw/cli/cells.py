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
from cellmw.cli import base
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
    """In a few words, what requests for a cell get."""
    expanded = configuration.outcome(cell)
    if expanded.refusal is None:
        return "disabled, is sent to" if cell.disabled else "usable"
    error, reason = expanded.refusal
    if error is exceptions.CellHasNoQueue:
        return "has no queue"
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

    URLs are shown without credentials. The state tells what requests for an
    instance in the cell get.
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
    """Show one cell, with what its transport URL becomes.

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

    Refused if there is one with the same UUID, name, database, or broker and
    virtual host.
    """

    names = _NAMES

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--uuid",
            type=base.uuid_argument,
            help=f"UUID of the cell; {CELL0_UUID} is cell0. Default: a new "
            "one.",
        )
        parser.add_argument(
            "--name", type=base.name_argument, help="Name of the cell."
        )
        parser.add_argument(
            "--transport-url",
            metavar="URL",
            type=base.secret_argument,
            required=True,
            help=f"{_URL_HELP} cell0 has 'none:///'.",
        )
        parser.add_argument(
            "--database-connection",
            metavar="URL",
            type=base.secret_argument,
            help=f"{_DATABASE_HELP} Required where Nova manages the tables.",
        )
        parser.add_argument(
            "--disabled",
            action="store_true",
            help="Let Nova schedule nothing to it for now.",
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

    What is not given stays as it is.
    """

    names = (*_NAMES, "running_processes")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        _add_cell_argument(parser)
        parser.add_argument(
            "--name", type=base.name_argument, help="New name of the cell."
        )
        parser.add_argument(
            "--transport-url",
            metavar="URL",
            type=base.secret_argument,
            help=_URL_HELP,
        )
        parser.add_argument(
            "--database-connection",
            metavar="URL",
            type=base.secret_argument,
            help=_DATABASE_HELP,
        )
        enabled = parser.add_mutually_exclusive_group()
        enabled.add_argument(
            "--disable",
            action="store_true",
            help="Let Nova schedule nothing to it. Messages for the "
            "instances in it are sent all the same.",
        )
        enabled.add_argument(
            "--enable", action="store_true", help="Undo --disable."
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
            if parsed_args.cell == CELL0_UUID:
                raise base.Failed("cell0 cannot be disabled or enabled")
            values["disabled"] = parsed_args.disable
        if not values:
            raise base.Failed("nothing to change was given; see --help")
        configuration = self.configuration
        before = configuration.cell(parsed_args.cell)
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

    Refused while instances are mapped to it. Running processes refuse to
    send to it from their next refresh of the cell mappings on.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of this command."""
        parser = super().get_parser(prog_name)
        _add_cell_argument(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Write it."""
        self.configuration.cells()
        self.configuration.changes.delete_cell(parsed_args.cell)
        interval = self.configuration.settings.cell_refresh_interval
        self.app.stdout.write(
            f"Cell {parsed_args.cell} was deleted. Running processes refuse "
            "to send to it when they have seen that. "
            f"{_when(interval)}\n"
        )


def _add_cell_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cell",
        metavar="CELL",
        type=base.uuid_argument,
        help="UUID of the cell.",
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
    # Over what a template is filled in stands in Nova's configuration.
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
        # That of another machine, perhaps: who reads it has it installed.
        return None
    return None


def _effect(configuration: base.Configuration, *, moved: bool) -> str:
    """What running processes will do about a change, and when."""
    interval = configuration.settings.cell_refresh_interval
    when = (
        f"{_when(interval)} None needs a restart. Nova's own services see "
        "the change when they are restarted."
    )
    if not moved:
        return f"{when} Messages go where they went before."
    return (
        f"{when} From then on messages go to the new URL. A request that has "
        "sent a message to the old one stays with it; the connections to the "
        "old one are closed when no request uses them."
    )


def _when(interval: float) -> str:
    """When a running process goes by what was written."""
    return (
        "Each with this filter reads the cell mappings again for the first "
        f"request that finds them {interval:g} s old "
        "(cell_refresh_interval). While it reads them, other requests go by "
        f"the old ones until these are {2 * interval:g} s old, and while it "
        "cannot reach the API database, all do, until it can."
    )
