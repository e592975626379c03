# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Transactions that change the API database."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import sqlalchemy as sa
from oslo_db import exception as db_exception

from cellmw.cells.tables import cell_mappings
from cellmw.exceptions import CellMWError

# Seconds that a change of the cells waits for another one.
_LOCK_TIMEOUT = 60
# Locks of PostgreSQL are numbers in the database: "cellmw".
_LOCK_NUMBER = int.from_bytes(b"cellmw")


class ChangeRefused(CellMWError):
    """The change cannot be made.  Nothing was written.

    :ivar problems: each reason, if the change has several
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)


@contextlib.contextmanager
def only_cell_change(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction during which nobody else creates or updates a cell.

    A unique key cannot tell that two cells have the same broker, so a change
    compares the cell with all others.  In a MariaDB cluster the lock excludes
    only clients of the same server.

    :raises ChangeRefused: another change holds the lock for too long
    """
    with (
        engine.connect() as connection,
        _LOCKS.get(engine.dialect.name, _begun)(connection),
    ):
        yield connection


def _begun(
    connection: sa.Connection,
) -> contextlib.AbstractContextManager[object]:
    return connection.begin()


@contextlib.contextmanager
def _mysql_lock(connection: sa.Connection) -> Iterator[None]:
    # The lock belongs to the connection.  It outlives the transaction, so
    # that the next holder sees the commit.  Its name belongs to the server
    # and has at most 64 characters.
    name = {"name": f"cellmw {connection.engine.url.database}"[:64]}
    got = connection.execute(
        sa.text(f"SELECT GET_LOCK(:name, {_LOCK_TIMEOUT})"), name
    ).scalar()
    if not got:
        raise ChangeRefused("another client is changing the cells; try again")
    try:
        connection.rollback()
        with connection.begin():
            yield
    finally:
        # If this fails the connection is dead, and the server releases it.
        with contextlib.suppress(sa.exc.SQLAlchemyError, db_exception.DBError):
            connection.execute(sa.text("DO RELEASE_LOCK(:name)"), name)
            connection.rollback()


@contextlib.contextmanager
def _postgresql_lock(connection: sa.Connection) -> Iterator[None]:
    with connection.begin():
        # The end of the transaction releases it.
        connection.execute(
            sa.text("SELECT pg_advisory_xact_lock(:number)"),
            {"number": _LOCK_NUMBER},
        )
        yield


@contextlib.contextmanager
def _sqlite_lock(connection: sa.Connection) -> Iterator[None]:
    with connection.begin():
        # This acts as BEGIN IMMEDIATE, which is too late because oslo.db has
        # begun: a transaction whose first statement writes excludes other
        # writers.
        connection.execute(sa.delete(cell_mappings).where(sa.false()))
        yield


_LOCKS: Mapping[
    str,
    Callable[[sa.Connection], contextlib.AbstractContextManager[object]],
] = {
    "mysql": _mysql_lock,
    "mariadb": _mysql_lock,
    "postgresql": _postgresql_lock,
    "sqlite": _sqlite_lock,
}
