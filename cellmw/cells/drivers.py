# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Database drivers: the time limits each one takes, and what it refuses.

A request has a deadline of its own, whatever the driver does.  The limits
here only give a thread back that waits for a server in vain, and end its
statement in the server.  Arguments of ``connect()`` are chosen by driver.
Statements that limit the server are chosen by server, and are sent in a way
that a connection pooler passes on.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

LOG = logging.getLogger(__name__)

# Seconds.  PyMySQL takes a year at most; PostgreSQL takes as many
# milliseconds as a 32-bit integer holds.
_MOST = 2_000_000.0

# A path under a file.  Connecting to a Unix socket there fails at once,
# after the driver has looked at its arguments and without any traffic.
_NOWHERE = "/dev/null/nowhere"

_MYSQL = frozenset({"mysql", "mariadb"})

# An identifier.  What else stands before a "=" may be part of a password.
_NAME = re.compile(r"[A-Za-z_]\w{0,40}", re.ASCII)

# Named in the log already, in this process.
_without_limits: set[str] = set()

_Limits = Callable[[int, int], Mapping[str, object]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Driver:
    """A driver that was tried.

    :ivar package: its name on the package index
    :ivar limits: arguments of ``connect()`` for a number of seconds for a
        statement and another for connecting
    :ivar nowhere: arguments of ``connect()`` that lead to no server
    :ivar tls: the parameters of a URL that configure TLS
    :ivar fixed: arguments of ``connect()`` that it always gets
    :ivar without: arguments of oslo.db's that it does not take
    """

    package: str
    limits: _Limits
    nowhere: Mapping[str, object]
    tls: str
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()


def _mysql_limits(statement: int, connect: int) -> Mapping[str, object]:
    return {
        "connect_timeout": connect,
        "read_timeout": statement,
        "write_timeout": statement,
    }


def _cymysql_limits(statement: int, connect: int) -> Mapping[str, object]:
    # Its only limit, which then holds for each read and write.
    return {"connect_timeout": max(statement, connect)}


def _libpq_limits(statement: int, connect: int) -> Mapping[str, object]:
    # libpq has no limit for reading.  TCP finds a server that is gone.
    return {
        "connect_timeout": connect,
        "tcp_user_timeout": statement * 1000,
        "keepalives_idle": statement,
        "keepalives_interval": 1,
        "keepalives_count": 3,
    }


def _pg8000_limits(statement: int, connect: int) -> Mapping[str, object]:
    return {"timeout": max(statement, connect)}


def _sqlite_limits(statement: int, connect: int) -> Mapping[str, object]:
    # Waiting for a lock.  A statement itself cannot be limited.
    return {"timeout": statement}


_MYSQL_TLS = "ssl_ca, ssl_cert and ssl_key"
_MYSQL_NOWHERE = {"host": "localhost", "unix_socket": _NOWHERE}
_LIBPQ_TLS = "sslmode, sslrootcert, sslcert and sslkey"
_LIBPQ_NOWHERE = {"host": "/dev/null"}

# By SQLAlchemy's name for the driver.
_DRIVERS: Mapping[str, _Driver] = {
    "pymysql": _Driver(
        "PyMySQL", _mysql_limits, {"defer_connect": True}, _MYSQL_TLS
    ),
    "mysqldb": _Driver(
        "mysqlclient",
        _mysql_limits,
        _MYSQL_NOWHERE,
        f"ssl_mode, {_MYSQL_TLS}",
    ),
    "mysqlconnector": _Driver(
        "mysql-connector-python", _mysql_limits, _MYSQL_NOWHERE, _MYSQL_TLS
    ),
    "mariadbconnector": _Driver(
        "mariadb",
        _mysql_limits,
        _MYSQL_NOWHERE,
        _MYSQL_TLS,
        without=("charset",),
    ),
    "cymysql": _Driver("cymysql", _cymysql_limits, _MYSQL_NOWHERE, _MYSQL_TLS),
    "psycopg2": _Driver("psycopg2", _libpq_limits, _LIBPQ_NOWHERE, _LIBPQ_TLS),
    "psycopg2cffi": _Driver(
        "psycopg2cffi", _libpq_limits, _LIBPQ_NOWHERE, _LIBPQ_TLS
    ),
    "psycopg": _Driver(
        "psycopg",
        _libpq_limits,
        _LIBPQ_NOWHERE,
        _LIBPQ_TLS,
        # A pooler gives the next statement to another session of the
        # server, which does not know what was prepared before.
        {"prepare_threshold": None},
    ),
    "pg8000": _Driver(
        "pg8000",
        _pg8000_limits,
        {"unix_sock": _NOWHERE},
        "none (pg8000 takes a context for TLS from Python only)",
    ),
    "pysqlite": _Driver(
        "sqlite3", _sqlite_limits, {"database": ":memory:"}, "none"
    ),
}
# Of libpq; these send several statements as one message.
_ONE_MESSAGE = frozenset({"psycopg", "psycopg2", "psycopg2cffi"})


def refuse(url: sa.URL) -> str | None:
    """Why an engine for this URL could not work; None: nothing is known.

    Imports the driver and connects to nothing.  The text shows no value of
    the URL.
    """
    try:
        dialect_class: Any = url.get_dialect()
    except sa.exc.NoSuchModuleError:
        return "SQLAlchemy has no dialect or driver of this name"
    name = dialect_class.driver
    if dialect_class.is_async:
        return (
            f"driver {name} is asynchronous; accepted: one that blocks, such "
            "as mysql+pymysql or postgresql+psycopg2"
        )
    try:
        dialect = dialect_class(dbapi=dialect_class.import_dbapi())
    except ImportError as error:
        return _not_installed(url, name, error)
    bad = _bad_parameters(dialect, url)
    if not bad:
        return None
    known = _DRIVERS.get(name)
    tls = f"; for TLS: {known.tls}" if known else ""
    return (
        f"driver {name} cannot use {', '.join(bad)} as it stands in the "
        "query of the URL; accepted: the parameters of the driver's own "
        f"connect(){tls}"
    )


def _not_installed(url: sa.URL, name: str, error: ImportError) -> str:
    known = _DRIVERS.get(name)
    package = known.package if known else error.name
    # Without a driver in the URL, which one it is depends on the version of
    # SQLAlchemy.
    chosen = "" if "+" in url.drivername else ", SQLAlchemy's choice here,"
    return (
        f"driver {name}{chosen} cannot be imported: install the Python "
        f"package {package} and the libraries that it needs, or name another "
        "driver, such as mysql+pymysql or postgresql+psycopg2"
    )


def _bad_parameters(dialect: sa.Dialect, url: sa.URL) -> list[str]:
    """Names of parameters in the query that the driver does not take."""
    # A plugin takes parameters out of the URL, which ones it alone knows.
    if not url.query or "plugin" in url.query or _takes(dialect, url):
        return []
    bare = url.set(query={})
    bad = [
        name
        for name, value in url.query.items()
        if not _takes(dialect, bare.set(query={name: value}))
    ]
    return [
        name if _NAME.fullmatch(name) else "a parameter"
        for name in bad or url.query
    ]


def _takes(dialect: sa.Dialect, url: sa.URL) -> bool:
    """Whether the driver takes these arguments: it is asked to connect to
    nowhere.
    """
    driver: Any = dialect.loaded_dbapi
    known = _DRIVERS.get(dialect.driver)
    try:
        args, arguments = dialect.create_connect_args(url)
        if known is None:
            return True
        given = {**arguments, **known.nowhere}
        if dialect.driver == "pysqlite":
            args = []
        # Nothing that traces calls of connect() is to see this one.
        connect = inspect.unwrap(driver.connect)
        if dialect.driver == "pymysql":
            connect = driver.connections.Connection
        connect(*args, **given).close()
    except OSError:
        # A file of certificates, say, which may come later.
        return True
    except Exception as error:
        # Not told apart by class alone: libpq says of a bad value what it
        # says of a server that is not there.
        return (
            isinstance(error, driver.Error)
            and not isinstance(error, driver.ProgrammingError)
            and re.search("invalid|must be", str(error)) is None
        )
    return True


def limit(
    engine: sa.Engine, statement: float | None, connect: float | None
) -> None:
    """Limit how long a connection of this engine can hold a thread.

    Limits that the URL sets itself are kept.

    :param statement: seconds for a statement; None: no limits at all
    :param connect: seconds for connecting
    """
    known = _DRIVERS.get(engine.dialect.driver)
    arguments = dict(known.fixed) if known else {}
    if statement is not None:
        seconds = math.ceil(min(statement, _MOST))
        if known is None:
            _tell_once(engine.dialect.driver)
        else:
            to_connect = math.ceil(min(connect or statement, _MOST))
            arguments.update(known.limits(seconds, to_connect))
        _limit_in_server(engine, seconds)
    _connect_with(engine, arguments, known.without if known else ())


def _connect_with(
    engine: sa.Engine,
    arguments: Mapping[str, object],
    without: tuple[str, ...],
) -> None:
    @sa.event.listens_for(engine, "do_connect")
    def add(dialect: object, record: object, cargs: Any, cparams: Any) -> None:
        # The dialect then connects in its own way, with the driver's own
        # connect(), which tracing may have wrapped.
        for name, value in arguments.items():
            cparams.setdefault(name, value)
        for name in without:
            cparams.pop(name, None)


def _tell_once(driver: str) -> None:
    if driver in _without_limits:
        return
    _without_limits.add(driver)
    LOG.warning(
        "No time limits are known for the database driver %s. Requests "
        "still wait no longer than lookup_timeout, but a thread that waits "
        "for a hung server returns only when the driver gives up. Use a "
        "driver that the documentation lists to bound that.",
        driver,
    )


def _limit_in_server(engine: sa.Engine, seconds: int) -> None:
    # Otherwise a statement that the driver gave up waits on in the server,
    # for a locked table a day long by default, until none can connect.
    if engine.dialect.name in _MYSQL:
        if "init_command" not in engine.url.query:
            _limit_mysql(engine, seconds)
    elif engine.dialect.name == "postgresql" and (
        "options" not in engine.url.query
    ):
        _limit_postgresql(engine, seconds)


def _limit_mysql(engine: sa.Engine, seconds: int) -> None:
    # Poolers follow these two variables of a session: ProxySQL has both
    # among those it tracks, MaxScale repeats the statement on each server.
    # ProxySQL's parser knows no comment inside it.
    @sa.event.listens_for(engine, "connect")
    def set_up(connection: Any, record: object) -> None:
        statement = f"SET SESSION lock_wait_timeout = {seconds}"
        if getattr(engine.dialect, "is_mariadb", False):
            statement += f", max_statement_time = {seconds}"
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()


def _limit_postgresql(engine: sa.Engine, seconds: int) -> None:
    # PgBouncer refuses limits in the startup packet, and would give what
    # SET leaves in a session to others.  So the limit is set for the
    # statement's own transaction.
    setting = f"SET LOCAL statement_timeout = {seconds * 1000}"
    if engine.dialect.driver in _ONE_MESSAGE:
        _send_before_each_statement(engine, setting)
        return

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # Executing something begins a transaction, inside this one's
        # beginning.
        if connection.info.get(_limiting):
            return
        connection.info[_limiting] = True
        try:
            connection.exec_driver_sql(setting)
        finally:
            del connection.info[_limiting]


_limiting = object()


def _send_before_each_statement(engine: sa.Engine, setting: str) -> None:
    """Set the limit in the message that brings the statement.

    The server takes both as one transaction, so that costs no round trip.
    """
    several_results = engine.dialect.driver == "psycopg"

    @sa.event.listens_for(engine, "before_cursor_execute", retval=True)
    def add(
        connection: object,
        cursor: object,
        statement: str,
        parameters: object,
        context: object,
        executemany: bool,
    ) -> tuple[str, object]:
        # Of many at once the first may be the driver's own business; the
        # transaction's limit stands from the statement before.
        if executemany:
            return statement, parameters
        return f"{setting}; {statement}", parameters

    if not several_results:
        return

    @sa.event.listens_for(engine, "do_connect")
    def client_side(
        dialect: Any, record: object, cargs: Any, cparams: Any
    ) -> None:
        # The other kind of cursor sends parameters apart, which allows one
        # statement only.
        cursor = dialect.loaded_dbapi.ClientCursor
        cparams.setdefault("cursor_factory", cursor)

    @sa.event.listens_for(engine, "after_cursor_execute")
    def skip(
        connection: object,
        cursor: Any,
        statement: object,
        parameters: object,
        context: object,
        executemany: bool,
    ) -> None:
        if not executemany:
            cursor.nextset()


def reads_without_transaction(engine: sa.Engine, limited: bool) -> bool:
    """Whether each statement may stand for itself, in no transaction.

    :param limited: whether statements of this engine have a limit
    """
    if engine.dialect.name in _MYSQL:
        return True
    return engine.dialect.name == "postgresql" and (
        not limited or engine.dialect.driver in _ONE_MESSAGE
    )
