# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What every command of ``cellmw-manage`` needs.

A command reads and changes the database through ``Command.configuration``.
Every failure is one line on standard error and a nonzero exit status.  Texts
that may hold a credential are scrubbed before they are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from cliff.command import Command as CliffCommand
from cliff.lister import Lister
from cliff.show import ShowOne
from oslo_config import cfg
from oslo_db import exception as db_exception

from cellmw import configuration, exceptions, options, redaction
from cellmw.cells import engines, mapping, store
from cellmw.cells.changes import Changes
from cellmw.cells.mapping import Cell, CellMapping
from cellmw.cli import arguments, tables
from cellmw.exceptions import CellMWError, ConfigurationError
from cellmw.redaction import Secret
from cellmw.transports import oslo
from cellmw.workers import Workers

# Seconds for each step of connecting to the database, and for one statement.
# Counting a million mappings takes a while.
_CONNECT_TIMEOUT = 10.0
_STATEMENT_TIMEOUT = 300.0


class Failed(Exception):
    """The command failed; the text gives the reason."""


def new_uuid() -> str:
    """Return a random UUID."""
    return str(uuid.uuid4())


def read(sources: Sequence[str]) -> cfg.ConfigOpts:
    """Read the configuration that a command's options name.

    :raises ConfigurationError: a file cannot be read
    """
    return configuration.read(
        sources, project="cellmw", program="cellmw-manage"
    )


class Configuration:
    """The service's configuration, and the database that it leads to.

    :param conf: what :func:`read` returns, or what a filter has read
    :param settings: None: those of ``[cellmw]`` in ``conf``
    :param connection: URL that stands in for ``[api_database] connection``
    """

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        *,
        may_make_database: bool = False,
        settings: options.Settings | None = None,
        connection: Secret | None = None,
    ) -> None:
        self._may_make_database = may_make_database
        self.conf = conf
        oslo.prepare(self.conf)
        engines.register_options(self.conf)
        self.settings = settings or options.load(self.conf, {})
        # Read once, and here: reading may fail.
        self._base_url = _text_of(self.conf, "DEFAULT", "transport_url")
        if self._base_url is not None and oslo.base_url(self.conf) is None:
            self._base_url = None
        connection = connection or _text_of(
            self.conf, engines.GROUP, "connection"
        )
        if connection is None:
            raise Failed(
                "no API database is configured: give a --config-file with "
                f"connection in [{engines.GROUP}] "
                f"({configuration.tell_files_of(self.conf)})"
            )
        self._connection = connection
        self._holds: list[redaction.Hold] = []
        self.hide(self._base_url, connection)

    def hide(self, *urls: Secret | None) -> None:
        """Hide the credentials of these URLs until :meth:`close`."""
        self._holds.append(redaction.KNOWN.hold(*urls))

    @functools.cached_property
    def engine(self) -> sa.Engine:
        """The engine of the API database, after a first connection."""
        engine = engines.make_engine(
            self.conf,
            self._connection,
            timeout=_STATEMENT_TIMEOUT,
            connect_timeout=_CONNECT_TIMEOUT,
            enforce_foreign_keys=True,
        )
        if not self._may_make_database:
            _refuse_missing_file(engine.url)
        if engine.dialect.name != "sqlite":
            self._expect_an_answer()
        return engine

    def _expect_an_answer(self) -> None:
        # PyMySQL waits for the server's greeting as long as for a statement.
        engine = engines.make_engine(
            self.conf, self._connection, timeout=_CONNECT_TIMEOUT
        )
        try:
            engine.connect().close()
        finally:
            engine.dispose()

    @functools.cached_property
    def store(self) -> store.Store:
        """The API database, read."""
        return store.Store(lambda: self.engine)

    @functools.cached_property
    def changes(self) -> Changes:
        """The API database, written."""
        return Changes(self.engine, expand=self.expand)

    @functools.cached_property
    def known_drivers(self) -> frozenset[str]:
        """The drivers that are installed here."""
        return oslo.known_drivers()

    def cells(self) -> list[CellMapping]:
        """Read all cell mappings, and hide their credentials from now on."""
        cells = self.store.cells()
        for cell in cells:
            self.hide(cell.transport_url, cell.database_connection)
        return cells

    def cell(self, name: str) -> CellMapping:
        """The cell mapping of this UUID or name.

        :raises Failed: there is none, or several have this name
        """
        return chosen(self.cells(), name)

    def expand(self, cell: CellMapping) -> Cell:
        """What requests for a cell would get, judged by its URL alone."""
        base_url = None if self._base_url is None else self._base_url.reveal()
        return mapping.expand(cell, base_url, self.known_drivers)

    def outcome(self, cell: CellMapping) -> Cell:
        """What requests for a cell would get, its driver included.

        Makes its transport, which opens no socket, and closes that again.
        """
        expanded = self.expand(cell)
        if expanded.generation is None:
            return expanded
        try:
            transport = self._transports.open(expanded.generation, True)
        except exceptions.CellMisconfigured as error:
            return Cell(
                cell.uuid,
                cell.name,
                refusal=(type(error), f"transport_url: {error.cause}"),
            )
        # A driver that fails to close an unused transport is still usable.
        with contextlib.suppress(Exception):
            transport.cleanup()
        return expanded

    @functools.cached_property
    def _transports(self) -> oslo.OsloTransports:
        return oslo.OsloTransports(self.conf, (), Workers())

    def close(self) -> None:
        """Close the connections, and stop hiding the credentials."""
        if "engine" in self.__dict__:
            self.engine.dispose()
        while self._holds:
            self._holds.pop().drop()


def chosen(cells: Iterable[CellMapping], name: str) -> CellMapping:
    """Find a cell by its UUID or name.

    :raises Failed: there is none, or several have this name
    """
    named = []
    for cell in cells:
        if cell.uuid == name:
            return cell
        if cell.name == name:
            named.append(cell)
    if not named:
        raise Failed(f"cell {name} does not exist")
    if len(named) > 1:
        uuids = ", ".join(cell.uuid for cell in named)
        raise Failed(f"several cells are named {name}; give a UUID: {uuids}")
    return named[0]


def _refuse_missing_file(url: sa.URL) -> None:
    """Refuse a missing file, which SQLite would create."""
    name = url.database
    if (
        url.get_backend_name() == "sqlite"
        and name
        and not name.startswith((":memory:", "file:"))
        and not Path(name).exists()
    ):
        raise Failed(f"SQLite database {name} does not exist")


def _text_of(conf: cfg.ConfigOpts, group: str, name: str) -> Secret | None:
    """Return the value of a text option, or None if it is not set."""
    try:
        text = conf[name] if group == "DEFAULT" else conf[group][name]
        return Secret(text) if text else None
    except (cfg.Error, ValueError):
        # "$name" refers to another option, and the error quotes the name: the
        # rest of a password that has a "$" in it.
        pass
    raise Failed(
        f"option {name} in [{group}] has a bad value: it refers to an option "
        "that is not there (a $ is written $$ in a configuration file)"
    )


class Command(CliffCommand):
    """A command with a configuration, whose failures are one line.

    :ivar names: the columns or fields that the command prints; empty if no
        option selects among them
    :ivar status: exit status of a command that did not fail
    :ivar may_make_database: whether SQLite may create a file
    """

    names: ClassVar[tuple[str, ...]] = ()
    status = 0
    may_make_database = False

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Build the parser, with the options that every command has."""
        parser = super().get_parser(prog_name)
        arguments.add_config_options(parser, dest="config_sources")
        arguments.report_errors_on_one_line(parser)
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Run the command, and return the exit status."""
        unknown = self._unknown_column(parsed_args)
        if unknown is not None:
            # cliff would report it only after the change was made.
            arguments.complain(
                self.app.stderr,
                f"argument -c/--column: there is no column {unknown!r} "
                f"(known: {', '.join(self.names)})",
            )
            return 2
        problem = self._configure(parsed_args)
        if problem is not None:
            arguments.complain(self.app.stderr, problem)
            return 1
        try:
            problem = self._try(parsed_args)
            if problem is None:
                return self.status
            arguments.complain(self.app.stderr, problem)
            return 1
        finally:
            self._close()

    def _close(self) -> None:
        self.configuration.close()

    def _unknown_column(self, parsed_args: argparse.Namespace) -> str | None:
        for wanted in getattr(parsed_args, "columns", ()):
            # As cliff compares them.
            if wanted.lower().strip().replace(" ", "_") not in self.names:
                return str(wanted)
        return None

    def sources(self, parsed_args: argparse.Namespace) -> list[str]:
        """Return the ``--config-file`` and ``--config-dir`` arguments."""
        return [
            *(getattr(self.app.options, "global_sources", None) or ()),
            *(parsed_args.config_sources or ()),
        ]

    def _configure(self, parsed_args: argparse.Namespace) -> str | None:
        """Read the configuration, or return why that failed."""
        try:
            self.configuration = Configuration(
                read(self.sources(parsed_args)),
                may_make_database=self.may_make_database,
            )
        except (Failed, ConfigurationError) as error:
            return str(error)
        except Exception as error:
            # No credential of the configuration is known yet.
            return of_configuration(error)
        return None

    def _try(self, parsed_args: argparse.Namespace) -> str | None:
        """Run the command, or return why it failed."""
        try:
            super().run(parsed_args)
        except BrokenPipeError:
            raise
        except (Failed, CellMWError) as error:
            return str(error)
        except (db_exception.DBError, sa.exc.SQLAlchemyError) as error:
            return self.about_database(error)
        except cfg.Error as error:
            return of_configuration(error)
        except Exception as error:
            return f"unexpected {redaction.describe(error)}"
        return None

    def about_database(self, error: Exception) -> str:
        """Describe a failure of the database."""
        return about_database(self.configuration, error)


def about_database(configuration: Configuration, error: Exception) -> str:
    """Describe a failure of a configuration's database."""
    cause = _cause(error)
    # oslo.db does not recognize libpq's text for a timeout.
    if isinstance(error, db_exception.DBConnectionError) or (
        cause.endswith("timeout expired")
    ):
        return f"the API database cannot be reached: {cause}"
    if _lacks_tables(configuration):
        return (
            "the API database has no table cell_mappings; make it with "
            "nova-manage api_db sync, or with cellmw-manage db sync"
        )
    return f"the API database refused the query: {cause}"


def _lacks_tables(configuration: Configuration) -> bool:
    if "engine" not in vars(configuration):
        return False  # there was no connection
    try:
        found = sa.inspect(configuration.engine)
        return not found.has_table("cell_mappings")
    except Exception:
        return False


def of_configuration(error: Exception) -> str:
    """Describe an error whose text may quote a value."""
    return (
        f"the configuration cannot be used ({type(error).__name__}); a $ in "
        "a value is written $$ in a configuration file"
    )


def _cause(error: Exception) -> str:
    """Return the first line of what the driver says.

    On PostgreSQL the other lines quote the statement and the row.
    """
    inner = getattr(error, "inner_exception", None) or error
    original = getattr(inner, "orig", None) or inner
    lines = str(original).splitlines()
    text = lines[0] if lines else ""
    return redaction.one_line(
        redaction.scrub(f"{type(original).__name__}: {text}")
    )


# These formats escape unprintable characters themselves.
_ESCAPING_FORMATS = ("json", "yaml")


def printable(value: Any) -> Any:
    """Return a value that is safe on a terminal and on one line.

    Other tools write names and projects too.
    """
    if not isinstance(value, str):
        return value
    return redaction.one_line(value, sys.maxsize)


class _Printing(Command):
    """Base class of commands that print a table or the fields of one row."""

    formatter: Any

    def _fit(self, parsed_args: argparse.Namespace) -> bool:
        """Fit a table to the terminal; say whether to escape values here."""
        if parsed_args.formatter == "table":
            width = parsed_args.max_width
            if width <= 0:
                width = tables.width_of(self.app.stdout)
            self.formatter = tables.Table(width)
        return parsed_args.formatter not in _ESCAPING_FORMATS


class ListCommand(_Printing, Lister):
    """A command that prints rows."""

    def produce_output(
        self,
        parsed_args: argparse.Namespace,
        column_names: Sequence[str],
        data: Iterable[Sequence[Any]],
    ) -> int:
        """Print the rows."""
        if self._fit(parsed_args):
            data = [[printable(value) for value in row] for row in data]
        return super().produce_output(parsed_args, column_names, data)


class ShowCommand(_Printing, ShowOne):
    """A command that prints one thing, field by field."""

    def produce_output(
        self,
        parsed_args: argparse.Namespace,
        column_names: Sequence[str],
        data: Sequence[Any],
    ) -> int:
        """Print the fields."""
        if self._fit(parsed_args):
            data = [printable(value) for value in data]
        return super().produce_output(parsed_args, column_names, data)


def columns(fields: Iterable[tuple[str, Any]]) -> tuple[Any, Any]:
    """Names and values as cliff wants them."""
    names, values = zip(*fields, strict=True)
    return names, values
