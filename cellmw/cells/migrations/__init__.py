# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Making the two tables where nobody else manages them.

The steps are alembic's, with a version table of their own, so that they can
share a database with a service's own migrations.  Nova's are recognized and
left alone: only tables that were made here are ever changed here.

Needs alembic; imported by ``cellmw-manage`` alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

from cellmw.cells.tables import metadata
from cellmw.exceptions import CellMWError

VERSION_TABLE = "cellmw_alembic_version"

# Tables of Nova's API database that it has had from its first release to
# this day, and of a cell's database.
_NOVA_API_TABLES = frozenset({"host_mappings", "request_specs"})
_NOVA_CELL_TABLES = frozenset({"instances", "compute_nodes", "services"})


class SchemaRefused(CellMWError):
    """The tables of this database are not such that they can be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What :func:`sync` has done.

    :ivar before: the revision that was there; None: there were no tables
    :ivar after: the revision now; None where somebody else manages them
    :ivar managed_by: who else manages the tables; None: we do
    """

    before: str | None = None
    after: str | None = None
    managed_by: str | None = None


def sync(engine: sa.Engine) -> Outcome:
    """Make or upgrade the tables.  Blocks; can be run again.

    :returns: what was done; nothing, if somebody else manages them
    :raises SchemaRefused: one of the tables is missing or lacks a column
        while somebody else manages them, or it is another kind of database
    """
    with engine.begin() as connection:
        there = frozenset(sa.inspect(connection).get_table_names())
        if VERSION_TABLE not in there and there & frozenset(metadata.tables):
            _check_columns(connection, there)
            return Outcome(managed_by=_owner(there))
        if VERSION_TABLE not in there and there >= _NOVA_CELL_TABLES:
            raise SchemaRefused(
                "this is the database of a cell, not an API database; "
                "nothing was changed"
            )
        before = revision_of(connection)
        command.upgrade(_config(connection), "head")
        return Outcome(before, revision_of(connection))


def revision_of(connection: sa.Connection) -> str | None:
    """The revision of the tables that were made here, None without."""
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE}
    )
    return context.get_current_revision()


def _config(connection: sa.Connection) -> Config:
    config = Config()
    folder = str(Path(__file__).parent)
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _owner(there: frozenset[str]) -> str:
    return "Nova" if there >= _NOVA_API_TABLES else "somebody else"


def _check_columns(connection: sa.Connection, there: frozenset[str]) -> None:
    inspector = sa.inspect(connection)
    for name, table in metadata.tables.items():
        found = (
            {column["name"] for column in inspector.get_columns(name)}
            if name in there
            else set()
        )
        missing = [one.name for one in table.c if one.name not in found]
        if missing:
            raise SchemaRefused(
                f"somebody else manages the tables, and {name} lacks "
                f"{', '.join(missing)}; nothing was changed"
            )
