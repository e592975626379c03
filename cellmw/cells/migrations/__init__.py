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
from alembic.script import ScriptDirectory
from oslo_db import exception as db_exception

from cellmw.cells.tables import metadata
from cellmw.exceptions import CellMWError

VERSION_TABLE = "cellmw_alembic_version"

# Tables of Nova's API database that it has had from its first release to
# this day, and of a cell's database.
_NOVA_API_TABLES = frozenset({"host_mappings", "request_specs"})
_NOVA_CELL_TABLES = frozenset({"instances", "compute_nodes", "services"})


# A comment on this table tells its revision to users who may not see the
# version table.
_MARKED = "cell_mappings"
_MARK = "made by cellmw-manage db sync, revision "

# ER_TABLEACCESS_DENIED_ERROR of MariaDB and MySQL; SQLSTATE of PostgreSQL.
_TABLE_ACCESS_DENIED = 1142
_INSUFFICIENT_PRIVILEGE = "42501"


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
        while somebody else manages them; it is another kind of database; or
        the user has too few rights to tell or to upgrade
    """
    with engine.begin() as connection:
        there = frozenset(sa.inspect(connection).get_table_names())
        if not _may_read_revision(connection, there):
            return _without_revision(connection)
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
        after = revision_of(connection)
        _mark(connection, str(after))
        return Outcome(before, after)


def _may_read_revision(
    connection: sa.Connection, there: frozenset[str]
) -> bool:
    """Whether this user would see the version table, if there is one.

    MariaDB and MySQL do not list a table to a user without a right on it, and
    do not tell such a user whether it exists.  PostgreSQL lists all tables.
    """
    if there & _NOVA_API_TABLES:
        return True
    if VERSION_TABLE not in there and (
        connection.dialect.name not in ("mysql", "mariadb")
        or not there & frozenset(metadata.tables)
    ):
        return True
    try:
        with connection.begin_nested():
            connection.execute(
                sa.select(sa.literal(1)).select_from(sa.table(VERSION_TABLE))
            )
    except (db_exception.DBError, sa.exc.DBAPIError) as error:
        return not _is_refused(error)
    return True


def _is_refused(error: Exception) -> bool:
    """Whether a statement failed for want of a right."""
    inner = getattr(error, "inner_exception", None) or error
    original = getattr(inner, "orig", inner)
    arguments = getattr(original, "args", ())
    return arguments[:1] == (_TABLE_ACCESS_DENIED,) or (
        getattr(original, "pgcode", getattr(original, "sqlstate", None))
        == _INSUFFICIENT_PRIVILEGE
    )


def _without_revision(connection: sa.Connection) -> Outcome:
    """What can be said of tables by a user who must not see their version."""
    inspector = sa.inspect(connection)
    comment = inspector.get_table_comment(_MARKED)["text"] or ""
    if not comment.startswith(_MARK):
        raise SchemaRefused(
            "this database user cannot see who manages the tables; nothing "
            "was changed. Run db sync as the user who owns the database"
        )
    there = comment.removeprefix(_MARK)
    head = ScriptDirectory.from_config(_config(connection)).get_current_head()
    if there != head:
        raise SchemaRefused(
            f"the tables are to be upgraded from revision {there} to {head}, "
            "and this database user may not do that; nothing was changed. Run "
            "db sync as the user who owns the database"
        )
    return Outcome(there, head)


def _mark(connection: sa.Connection, revision: str) -> None:
    """Leave the revision where each user of the tables can see it."""
    if not connection.dialect.supports_comments:
        return
    text = f"{_MARK}{revision}"
    if sa.inspect(connection).get_table_comment(_MARKED)["text"] != text:
        table = sa.Table(_MARKED, sa.MetaData(), comment=text)
        connection.execute(sa.schema.SetTableComment(table))


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
    # A user may have rights on some of them only.
    return "Nova" if there & _NOVA_API_TABLES else "somebody else"


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
