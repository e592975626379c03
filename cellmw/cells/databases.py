# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The cells' own databases: one oslo.db context manager for each.

:class:`Databases` owns the context managers of one process and closes their
connections.  It makes a context manager when a cell's database is first asked
for, and replaces it when the URL in the cell's mapping changes.  Making one
opens no connection.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import sqlalchemy as sa
from oslo_config import cfg

from cellmw import exceptions, redaction
from cellmw.cells import engines
from cellmw.cells.mapping import Cell
from cellmw.forks import keep_for_ever
from cellmw.redaction import Secret
from cellmw.workers import Workers

GROUP = "database"

# Only services that use db_connection need it; it takes the ORM along.
_FACADE = "oslo_db.sqlalchemy.enginefacade"
_OPTIONS = (*engines.ENGINE_OPTIONS, "connection_parameters")


def prepare(conf: cfg.ConfigOpts) -> None:
    """Register the options of ``[database]`` and check their values.

    Imports what :func:`make` needs, so that no request waits for that.

    :raises ConfigurationError: an option has a bad value, which is not shown
    """
    engines.register_options(conf, GROUP)
    for name in ("connection", *_OPTIONS):
        engines.option(conf, name, GROUP)
    importlib.import_module(_FACADE)


def make(conf: cfg.ConfigOpts, url: Secret) -> Any:
    """Make a context manager with the options of ``[database]``.

    Opens no connection, now or when the first session makes the engine.  The
    engine does not know the password: only an attempt to connect does, and
    only while it lasts.

    :param conf: a configuration that :func:`prepare` has seen
    """
    manager = importlib.import_module(_FACADE).transaction_context()
    manager.configure(
        connection=_without_password(url),
        # The replica of [database] is none of this cell's.
        slave_connection=None,
        # Else oslo.db tries to connect, again and again, under a lock.
        max_retries=0,
        thread_checkin=False,
        **{name: engines.option(conf, name, GROUP) for name in _OPTIONS},
    )

    def connect(
        dialect: sa.Dialect, record: object, args: Any, options: Any
    ) -> Any:
        try:
            return _connect(dialect, url, options)
        except Exception as error:
            redaction.strip_frames(error)
            raise

    def set_up(engine: sa.Engine) -> None:
        sa.event.listen(engine, "do_connect", connect)

    manager.append_on_engine_create(set_up)
    return manager


def _without_password(url: Secret) -> sa.URL:
    full = sa.make_url(url.reveal())
    return sa.URL.create(
        full.drivername,
        full.username,
        None,
        full.host,
        full.port,
        full.database,
        full.query,
    )


def _connect(dialect: sa.Dialect, url: Secret, options: Any) -> Any:
    args, known = dialect.create_connect_args(sa.make_url(url.reveal()))
    return dialect.connect(*args, **{**known, **options})


class Databases:
    """The context managers of one process.  Thread-safe.

    :param make: makes a context manager for a URL without connecting
    :param workers: the threads that close connections; lent
    """

    def __init__(
        self, make: Callable[[Secret], Any], workers: Workers
    ) -> None:
        self._make = make
        self._workers = workers
        self._lock = threading.Lock()
        self._cells: Mapping[str, Cell] = {}
        self._known: dict[str, _Database] = {}
        self._retired: list[_Database] = []
        self._all: weakref.WeakSet[_Database] = weakref.WeakSet()
        self._closed = False

    def of(self, cell: Cell) -> Any:
        """The context manager of a cell's database.  Does not block.

        The same object as long as the URL in the cell's mapping is the same.

        :returns: None where the mapping names no database; an object that
            raises DatabaseMisconfigured when used, where nothing can connect
            to what it names
        """
        # The request may have found its cell before the last reading.
        url = self._cells.get(cell.uuid, cell).database
        if url is None:
            return None
        known = self._known.get(cell.uuid)
        if known is None or known.url != url:
            known = self._replace(cell)
        return None if known is None else known.manager

    def _replace(self, cell: Cell) -> _Database | None:
        while True:
            now = self._cells.get(cell.uuid, cell)
            if now.database is None:
                return None
            made = _Database(now, self._make)
            with self._lock:
                if self._cells.get(cell.uuid, cell).database != made.url:
                    continue
                known = self._known.get(cell.uuid)
                if known is not None and known.url == made.url:
                    # Another thread was faster; what is made is not started.
                    return known
                self._known[cell.uuid] = made
                self._all.add(made)
                made.is_retired = self._closed
            if known is not None:
                self._workers.submit(known.retire)
            return made

    def keep_only(self, cells: Mapping[str, Cell]) -> None:
        """Take these for the known cells, and retire what they do not name.

        A retired context manager serves those who have it.  Its connections
        are closed when they are returned, idle ones at once.
        """
        with self._lock:
            self._cells = cells
            changed = [
                uuid
                for uuid, known in self._known.items()
                if uuid not in cells or cells[uuid].database != known.url
            ]
            retired = [self._known.pop(uuid) for uuid in changed]
            # Those of the last time once more: a thread that was returning a
            # connection may have looked before and returned it after.
            again, self._retired = self._retired, retired
        if again or retired:
            self._workers.submit(_retire, [*again, *retired])

    def close(self, timeout: float) -> None:
        """Retire all.  Blocks for ``timeout`` seconds at most."""
        with self._lock:
            self._closed = True
            retired = [*self._retired, *self._known.values()]
            self._known, self._retired = {}, []
        if retired:
            self._workers.submit(_retire, retired).wait(timeout)

    def leave_to_parent(self) -> None:
        """Part from the parent's connections.  Called in a forked child.

        A context that lives on in the child has the parent's context
        manager, which then connects anew.
        """
        for database in list(self._all):
            database.leave_to_parent()


def _retire(databases: Iterable[_Database]) -> None:
    for database in databases:
        database.retire()


class _Database:
    """The context manager of one URL, and the engines that it has made.

    :ivar is_retired: whether connections are closed when they are returned
    """

    def __init__(self, cell: Cell, make: Callable[[Secret], Any]) -> None:
        self.url = url = cell.database
        self.is_retired = False
        self._engines: list[sa.Engine] = []
        problem = engines.problem_of(url) if isinstance(url, Secret) else url
        if problem or not isinstance(url, Secret):
            self.manager: Any = _Unusable(cell, problem or "")
            return
        self.manager = make(url)
        self.manager.append_on_engine_create(self._engine_made)
        # Contexts may use it long after the mapping has changed.
        hold = redaction.KNOWN.hold(url)
        weakref.finalize(self.manager, hold.drop).atexit = False

    def _engine_made(self, engine: sa.Engine) -> None:
        self._engines.append(engine)
        sa.event.listen(engine, "checkin", self._returned)

    def _returned(self, _: object, record: Any) -> None:
        if self.is_retired:
            record.invalidate()

    def retire(self) -> None:
        """Close idle connections, and others when they are returned."""
        self.is_retired = True
        for engine in self._engines:
            engine.pool.dispose()

    def leave_to_parent(self) -> None:
        for engine in self._engines:
            keep_for_ever(engine.pool)
            engine.dispose(close=False)


class _Unusable:
    """Stands for a database that nothing can connect to."""

    def __init__(self, cell: Cell, problem: str) -> None:
        self._error = exceptions.DatabaseMisconfigured(
            problem, cell_uuid=cell.uuid, cell_name=cell.name
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise self._error.again()
