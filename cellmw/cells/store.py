# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Reading the API database: the cells, and which of them an instance is in.

:class:`Store` owns the engine that it makes, and with it the connections.
It needs SELECT on ``cell_mappings`` and ``instance_mappings`` and nothing
else.  Its calls block for as long as the driver does; who calls it bounds
the waiting.  Writing is in :mod:`cellmw.cells.changes`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator

import sqlalchemy as sa
from oslo_db.sqlalchemy import exc_filters

from cellmw.cells.mapping import CellMapping
from cellmw.cells.tables import cell_mappings, instance_mappings
from cellmw.redaction import Secret

# Built once: SQLAlchemy then finds the compiled form by identity.
_CELLS = sa.select(
    cell_mappings.c.id,
    cell_mappings.c.uuid,
    cell_mappings.c.name,
    cell_mappings.c.transport_url,
    cell_mappings.c.database_connection,
    cell_mappings.c.disabled,
).order_by(cell_mappings.c.id)
# The UUID from the same reading: an id may have been another cell's before.
_CELL_OF = (
    sa.select(instance_mappings.c.cell_id, cell_mappings.c.uuid)
    .select_from(
        instance_mappings.outerjoin(
            cell_mappings, cell_mappings.c.id == instance_mappings.c.cell_id
        )
    )
    .where(instance_mappings.c.instance_uuid == sa.bindparam("instance_uuid"))
)


class _Reading(threading.local):
    """Whether the calling thread is reading for a :class:`Store`."""

    now = False


_reading = _Reading()


class _ToldByTheError(logging.Filter):
    """Drops tracebacks of errors that a :class:`Store` raises as well.

    oslo.db and the pool log one for each statement that fails.  Who asks
    tells the log of an outage once.  What others read is told as ever, and
    so is everything at DEBUG.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not (_reading.now and record.exc_info):
            return True
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


_TOLD_BY_THE_ERROR = _ToldByTheError()


@contextlib.contextmanager
def _told_by_the_error() -> Iterator[None]:
    before, _reading.now = _reading.now, True
    try:
        yield
    finally:
        _reading.now = before


def _log_no_errors_twice(engine: sa.Engine) -> None:
    """May be called for any number of engines: a filter is added once."""
    pool = engine.pool.logger
    if not isinstance(pool, logging.Logger):
        # Echoing is on.
        pool = pool.logger
    for logger in (logging.getLogger(exc_filters.__name__), pool):
        logger.addFilter(_TOLD_BY_THE_ERROR)


class Store:
    """The API database, read.  Thread-safe; raises what the driver raises,
    and lets nothing else log that.

    :param engine: makes the engine, for example with
        :func:`cellmw.cells.engines.make_engine`; called on first use,
        and again in a process that was forked since
    """

    def __init__(self, engine: Callable[[], sa.Engine]) -> None:
        self._make = engine
        self._engine: tuple[int, sa.Engine] | None = None

    def engine(self) -> sa.Engine:
        """The engine of this process.  Blocks as little as making one."""
        known = self._engine
        pid = os.getpid()
        if known is None or known[0] != pid:
            # Two threads at once make two, of which one is not used any
            # more: an engine that was only made has no connection.
            known = self._engine = (pid, self._make())
            _log_no_errors_twice(known[1])
        return known[1]

    def cells(self) -> list[CellMapping]:
        """All cell mappings in the order of their ids, with one query."""
        with _told_by_the_error(), self.engine().connect() as connection:
            return [_mapping(*row) for row in connection.execute(_CELLS)]

    def cell_of(self, instance_uuid: str) -> tuple[int, str | None] | None:
        """The cell that an instance is in, with one query.

        :returns: the cell's ``id`` and UUID, the UUID None where there is no
            cell with this id; None where the instance has no mapping, or no
            cell yet
        """
        with _told_by_the_error(), self.engine().connect() as connection:
            found = connection.execute(
                _CELL_OF, {"instance_uuid": instance_uuid}
            ).first()
        if found is None or found[0] is None:
            return None
        return found[0], found[1]

    def close(self) -> None:
        """Close the connections that are not in use.  May be called twice.

        Those in use are closed when they come back.  Does nothing for an
        engine that was made before a fork: its sockets are the parent's.
        """
        known, self._engine = self._engine, None
        if known is not None and known[0] == os.getpid():
            known[1].dispose()


def as_mapping(row: sa.RowMapping) -> CellMapping:
    """The row of a cell as a value."""
    return _mapping(*(row[column.name] for column in _CELLS.selected_columns))


def _mapping(
    cell_id: int,
    uuid: str,
    name: str | None,
    transport_url: str | None,
    database_connection: str | None,
    disabled: bool | None,
) -> CellMapping:
    return CellMapping(
        id=cell_id,
        uuid=uuid,
        name=name,
        transport_url=_secret(transport_url),
        database_connection=_secret(database_connection),
        disabled=bool(disabled),
    )


def _secret(value: str | None) -> Secret | None:
    return None if value is None else Secret(value)
