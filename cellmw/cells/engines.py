# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Engines for the API database, made from oslo.db's options.

The caller owns the engine.  Making one imports the driver and opens no
connection.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import sqlalchemy as sa
from oslo_config import cfg, types
from oslo_db import options as oslo_db_options
from oslo_db.sqlalchemy import engines

from cellmw.cells import drivers
from cellmw.exceptions import ConfigurationError
from cellmw.redaction import Secret

GROUP = "api_database"

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


def register_options(conf: cfg.ConfigOpts, group: str = GROUP) -> None:
    """Register oslo.db's options, as ``[api_database]`` or another group.

    Options that the service has registered there itself stay as they are.
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
    connect, ``max_retries`` times, none is made.  So the first query finds
    out that the database is not there yet, and the next one notices first
    that it is back.

    :param connection: SQLAlchemy URL that stands in for the option
        ``connection``
    :param timeout: seconds after which the driver gives up a statement, so
        that its thread and connection come back; None: the driver's own
        limits.  Limits in the URL are kept.  One query may take a few times
        as long, because it has to detect and replace a dead connection first
    :param connect_timeout: the same for connecting, if it differs
    :param enforce_foreign_keys: for SQLite, which does not by itself; for
        engines that write
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
    engine = _make_engine(
        connection, extra, sqlite_fk=enforce_foreign_keys, **arguments
    )
    if isinstance(engine, str):
        raise ConfigurationError(f"cellmw: {where}: {engine}")
    # Otherwise parameters, URLs among them, stand in the text of errors.
    engine.hide_parameters = True
    drivers.limit(engine, timeout, connect_timeout)
    if for_reading and drivers.reads_without_transaction(
        engine, limited=timeout is not None
    ):
        _commit_each_statement(engine)
    return engine


def _make_engine(
    connection: Secret, extra: str, **arguments: Any
) -> sa.Engine | str:
    """The engine, or the reason for having none."""
    try:
        url = sa.make_url(connection.reveal())
        if extra:
            url = url.update_query_string(extra, append=True)
    except (sa.exc.ArgumentError, ValueError):
        return (
            "it is no database URL; accepted: one as SQLAlchemy takes it, "
            "such as mysql+pymysql://user:password@host/nova_api"
        )
    problem = drivers.refuse(url)
    if problem is not None:
        return problem
    try:
        engine: sa.Engine = engines.create_engine(
            url,
            max_retries=0,
            # Yields to other green threads; ours are native.
            thread_checkin=False,
            **arguments,
        )
        return engine
    except (sa.exc.NoSuchModuleError, ImportError):
        return "SQLAlchemy cannot load a plugin that the URL names"
    except (sa.exc.ArgumentError, ValueError, TypeError):
        return "SQLAlchemy does not take the URL with these options"


def problem_of(url: Secret) -> str:
    """Why no engine can be made for a database URL; empty where one can.

    Imports the driver.  Shows no part of the URL.
    """
    made = _make_engine(url, "", connection_debug=-1)
    return made if isinstance(made, str) else ""


def _commit_each_statement(engine: sa.Engine) -> None:
    dialect = engine.dialect

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: Any, record: object) -> None:
        dialect.set_isolation_level(connection, "AUTOCOMMIT")
        # An option of create_engine() since SQLAlchemy 2.0.43, which oslo.db
        # does not pass on.  Older versions, and drivers that cannot tell,
        # send the end of a transaction that is none all the same.
        with contextlib.suppress(AttributeError, NotImplementedError):
            if dialect.detect_autocommit_setting(connection):
                dialect.skip_autocommit_rollback = True


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
