# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Reading the API database: the cells, and which of them an instance is in.

:class:`Store` owns the engine that it makes, and with it the connections.
It needs SELECT on ``cell_mappings`` and ``instance_mappings`` and nothing
else.  Its calls block for as long as the driver does; who calls it bounds
the waiting.  Writing is in :mod:`cellmw.cells.changes`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from oslo_config import cfg, types
from oslo_db import options as oslo_db_options
from oslo_db.sqlalchemy import engines, exc_filters

from cellmw.cells.mapping import CellMapping
from cellmw.cells.tables import cell_mappings, instance_mappings
from cellmw.exceptions import ConfigurationError
from cellmw.redaction import Secret

GROUP = "api_database"

# Built once: SQLAlchemy then finds the compiled form by identity.
_CELLS = sa.select(
    cell_mappings.c.id,
    cell_mappings.c.uuid,
    cell_mappings.c.name,
    cell_mappings.c.transport_url,
    cell_mappings.c.database_connection,
    cell_mappings.c.disabled,
).order_by(cell_mappings.c.id)
_CELL_ID = sa.select(instance_mappings.c.cell_id).where(
    instance_mappings.c.instance_uuid == sa.bindparam("instance_uuid")
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

    :param engine: makes the engine, for example with :func:`make_engine`;
        called on first use, and again in a process that was forked since
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
        return known[1]

    def cells(self) -> list[CellMapping]:
        """All cell mappings in the order of their ids, with one query."""
        with _told_by_the_error(), self.engine().connect() as connection:
            rows = connection.execute(_CELLS).mappings()
            return [as_mapping(row) for row in rows]

    def cell_id_of(self, instance_uuid: str) -> int | None:
        """``id`` of the cell that an instance is in, with one query.

        :returns: None where there is no mapping, or one without a cell yet
        """
        with _told_by_the_error(), self.engine().connect() as connection:
            found: int | None = connection.execute(
                _CELL_ID, {"instance_uuid": instance_uuid}
            ).scalar()
            return found

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
    return CellMapping(
        id=row["id"],
        uuid=row["uuid"],
        name=row["name"],
        transport_url=_secret(row["transport_url"]),
        database_connection=_secret(row["database_connection"]),
        disabled=bool(row["disabled"]),
    )


def _secret(value: str | None) -> Secret | None:
    return None if value is None else Secret(value)


def register_options(conf: cfg.ConfigOpts, group: str = GROUP) -> None:
    """Register oslo.db's options, as ``[api_database]`` or another group.

    Those that the service has registered there itself are left as they are.
    """
    # Nova copies them as well: an option that two groups share cannot be
    # deprecated in one of them.
    for option in copy.deepcopy(oslo_db_options.database_opts):
        try:
            conf.register_opt(option, group=group)
        except cfg.DuplicateOptError:
            continue


def make_engine(
    conf: cfg.ConfigOpts,
    connection: Secret | str | None = None,
    *,
    timeout: float | None = None,
    connect_timeout: float | None = None,
    enforce_foreign_keys: bool = False,
    for_reading: bool = False,
    at_once: int = 0,
) -> sa.Engine:
    """Make an engine from the options in ``[api_database]``.

    Imports the driver, and opens no connection: of oslo.db's own attempts to
    connect, ``max_retries`` times, none is made.  A database that is not
    there yet is thus found out by the first question, and again by the next
    one, which also notices first that it is back.

    :param connection: SQLAlchemy URL that stands in for the option
        ``connection``
    :param timeout: seconds after which the driver gives up a statement, so
        that its thread and connection come back; None: the driver's own
        limits.  What the URL says about it itself is kept.  One question may
        take a few times as long, for a dead connection has to be found out
        and replaced first
    :param connect_timeout: the same for connecting, if it differs
    :param enforce_foreign_keys: for SQLite, which does not by itself; for
        who writes
    :param for_reading: each statement stands for itself, so none is put in a
        transaction, whose end would cost another round trip
    :param at_once: how many connections will be in use at once, which stay
        open then, where nobody has set ``max_pool_size``
    :raises ConfigurationError: there is no URL, it or an option cannot be
        used, or its driver is not installed; shows no part of the URL
    """
    register_options(conf)
    where = f"option connection in [{GROUP}]"
    if connection:
        where = "paste option api_database_connection"
    # No frame of ours that an error passes through knows the URL.
    connection = connection or option(conf, "connection") or ""
    if isinstance(connection, str):
        connection = Secret(connection)
    if not connection:
        raise ConfigurationError(
            "cellmw: no API database is configured: set connection in "
            f"[{GROUP}], or api_database_connection in the paste section"
        )
    extra = option(conf, "connection_parameters")
    arguments = {name: option(conf, name) for name in ENGINE_OPTIONS}
    if not _is_set(conf, "max_pool_size"):
        most = max(arguments["max_pool_size"], at_once)
        arguments["max_pool_size"] = most
    limits = None if timeout is None else (timeout, connect_timeout or timeout)
    engine = _make_engine(
        connection, extra, limits, sqlite_fk=enforce_foreign_keys, **arguments
    )
    if isinstance(engine, str):
        raise ConfigurationError(f"cellmw: {where}: {engine}")
    # Parameters stand in the text of errors else, URLs among them.
    engine.hide_parameters = True
    _log_no_errors_twice(engine)
    _share_tls_context(engine)
    if for_reading:
        _commit_each_statement(engine)
    return engine


def _make_engine(
    connection: Secret,
    extra: str,
    limits: tuple[float, float] | None,
    **arguments: Any,
) -> sa.Engine | str:
    """The engine, or why there is none."""
    try:
        url = sa.make_url(connection.reveal())
        if extra:
            url = url.update_query_string(extra, append=True)
    except (sa.exc.ArgumentError, ValueError):
        return (
            "it is no database URL; accepted: one as SQLAlchemy takes it, "
            "such as mysql+pymysql://user:password@host/nova_api"
        )
    if limits is not None:
        url = _bounded(url, *limits)
    try:
        engine: sa.Engine = engines.create_engine(
            url,
            max_retries=0,
            # Yields to other green threads; ours are native.
            thread_checkin=False,
            **arguments,
        )
        return engine
    except ImportError as error:
        return f"Python package {error.name} is not installed"
    except sa.exc.NoSuchModuleError:
        return "SQLAlchemy knows no such kind of database, or driver"
    except (sa.exc.ArgumentError, ValueError, TypeError):
        return "an option in its query has a bad value"


def problem_of(url: Secret) -> str:
    """Why no engine can be made for a database URL; empty where one can.

    Imports the driver.  Shows no part of the URL.
    """
    made = _make_engine(url, "", None, connection_debug=-1)
    return made if isinstance(made, str) else ""


def _commit_each_statement(engine: sa.Engine) -> None:
    # SQLite is left alone: there oslo.db begins transactions itself, and
    # nothing travels.
    if engine.dialect.name == "sqlite":
        return

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: Any, record: object) -> None:
        engine.dialect.set_isolation_level(connection, "AUTOCOMMIT")

    # An option of create_engine() since SQLAlchemy 2.0.43, which oslo.db does
    # not pass on; before, the end of the transaction that is none is sent.
    engine.dialect.skip_autocommit_rollback = True


def _share_tls_context(engine: sa.Engine) -> None:
    """Have PyMySQL load the certificates of authorities once.

    From 1.2 on it does so before each attempt to connect for which no option
    about TLS is set, and holds the interpreter's lock for some 40 ms: while
    a server is down, each lookup would delay all other requests by that.
    Such connections verify no certificate, so the context is never outdated.
    """
    if engine.dialect.driver != "pymysql":
        return
    from pymysql import connections

    base: Any = connections.Connection
    if not hasattr(base, "_create_ssl_ctx"):
        return
    lock = threading.Lock()
    shared: list[object] = []

    class Connection(base):
        def _create_ssl_ctx(self, sslp: object) -> object:
            if sslp:
                return super()._create_ssl_ctx(sslp)
            with lock:
                if not shared:
                    shared.append(super()._create_ssl_ctx(sslp))
                return shared[0]

    @sa.event.listens_for(engine, "do_connect")
    def connect(
        dialect: object, record: object, cargs: Any, cparams: Any
    ) -> Any:
        return Connection(*cargs, **cparams)


ENGINE_OPTIONS = (
    "connection_debug",
    "connection_recycle_time",
    "connection_trace",
    "max_overflow",
    "max_pool_size",
    "mysql_sql_mode",
    "mysql_wsrep_sync_wait",
    "pool_timeout",
    "sqlite_synchronous",
)


def option(conf: cfg.ConfigOpts, name: str, group: str = GROUP) -> Any:
    """The value of an option in ``[api_database]``, or another group.

    :raises ConfigurationError: it has a bad one, which is not shown
    """
    try:
        return conf[group][name]
    except (cfg.Error, ValueError):
        # Its text quotes the value.
        pass
    raise ConfigurationError(
        f"option {name} in [{group}] has a bad value; "
        f"accepted: {_accepted(name)}"
    )


def _is_set(conf: cfg.ConfigOpts, name: str) -> bool:
    """Whether anybody has set it, an operator or a service."""
    found = conf.get_location(name, GROUP)
    return found is None or found.location is not cfg.Locations.opt_default


def _accepted(name: str) -> str:
    kind = _TYPES[name]
    if isinstance(kind, types.Boolean):
        return "true or false"
    if isinstance(kind, types.Integer):
        if kind.min is None:
            return "a whole number"
        return f"a whole number, {kind.min} to {kind.max}"
    # All that can be wrong with one is what oslo.config puts in for a name.
    return "a string, each $ in it written as $$"


_TYPES = {known.name: known.type for known in oslo_db_options.database_opts}


# Seconds.  PyMySQL takes a year at most; PostgreSQL as many milliseconds as a
# 32-bit integer holds.
_MOST = 2_000_000.0


def _bounded(url: sa.URL, statement: float, connect: float) -> sa.URL:
    """The URL with limits for the driver, where it has none of its own."""
    make = _LIMITS.get(url.get_backend_name())
    if make is None:
        return url
    limits = make(
        math.ceil(min(statement, _MOST)), math.ceil(min(connect, _MOST))
    )
    return url.update_query_dict(
        {name: text for name, text in limits.items() if name not in url.query}
    )


def _mysql_limits(statement: int, connect: int) -> Mapping[str, str]:
    return {
        "connect_timeout": str(connect),
        "read_timeout": str(statement),
        "write_timeout": str(statement),
        # A statement that the driver gave up would wait on in the server,
        # for a locked table a day long by default, until none can connect.
        # The second half is read by MariaDB only.
        "init_command": (
            f"SET SESSION lock_wait_timeout = {statement} "
            f"/*M! , max_statement_time = {statement} */"
        ),
    }


def _postgresql_limits(statement: int, connect: int) -> Mapping[str, str]:
    # The server ends a statement; that the server is gone is found out by
    # TCP alone, for libpq has no limit for reading.
    return {
        "connect_timeout": str(connect),
        "options": f"-c statement_timeout={statement * 1000}",
        "tcp_user_timeout": str(statement * 1000),
        "keepalives_idle": str(statement),
        "keepalives_interval": "1",
        "keepalives_count": "3",
    }


def _sqlite_limits(statement: int, connect: int) -> Mapping[str, str]:
    # Waiting for a lock; a statement itself cannot be bounded.
    return {"timeout": str(statement)}


_LIMITS: Mapping[str, Callable[[int, int], Mapping[str, str]]] = {
    "mysql": _mysql_limits,
    "mariadb": _mysql_limits,
    "postgresql": _postgresql_limits,
    "sqlite": _sqlite_limits,
}
