# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Making an engine, and sharing it among threads and processes."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa
from oslo_config import cfg
from oslo_db import options as oslo_db_options
from oslo_db.sqlalchemy import engines

from cellmw.cells import store
from cellmw.exceptions import ConfigurationError

ROOT = Path(__file__).resolve().parents[3]
MYSQL = "mysql+pymysql://u:Zpw@h/nova_api"
POSTGRESQL = "postgresql+psycopg2://u:Zpw@h/nova_api"


def configuration(tmp_path: Path, *lines: str) -> cfg.ConfigOpts:
    path = tmp_path / "nova.conf"
    path.write_text("\n".join(["[api_database]", *lines]), "utf-8")
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[str(path)])
    return conf


def made_with(
    monkeypatch: pytest.MonkeyPatch, *args: Any, **limits: Any
) -> tuple[sa.URL, dict[str, Any]]:
    """What oslo.db is called with."""
    calls = []
    real = engines.create_engine

    def create_engine(url: sa.URL, **arguments: Any) -> sa.Engine:
        calls.append((url, arguments))
        engine: sa.Engine = real("sqlite://", max_retries=0)
        return engine

    monkeypatch.setattr(engines, "create_engine", create_engine)
    store.make_engine(*args, **limits)
    return calls[0]


def test_the_options_are_those_of_oslo_db(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = configuration(
        tmp_path,
        f"connection = {MYSQL}",
        "max_pool_size = 3",
        "max_overflow = 4",
        "pool_timeout = 6",
        "connection_recycle_time = 7",
        "mysql_sql_mode = ANSI",
        "mysql_wsrep_sync_wait = 1",
        "sqlite_synchronous = false",
        "connection_parameters = ssl_ca=/x&read_timeout=33",
    )
    url, arguments = made_with(monkeypatch, conf, timeout=4.2)
    assert url.render_as_string(hide_password=False).startswith(MYSQL)
    assert dict(url.query) == {
        "ssl_ca": "/x",
        "connect_timeout": "5",
        "read_timeout": "33",
        "write_timeout": "5",
        "init_command": (
            "SET SESSION lock_wait_timeout = 5 "
            "/*M! , max_statement_time = 5 */"
        ),
    }
    assert arguments == {
        "connection_debug": 0,
        "connection_recycle_time": 7,
        "connection_trace": False,
        "max_overflow": 4,
        "max_pool_size": 3,
        # It connects as often as that, waiting in between, while it is made.
        "max_retries": 0,
        "mysql_sql_mode": "ANSI",
        "mysql_wsrep_sync_wait": 1,
        "pool_timeout": 6,
        "sqlite_fk": False,
        "sqlite_synchronous": False,
        "thread_checkin": False,
    }


@pytest.mark.parametrize(
    "lines, at_once, size",
    [
        ([], 0, 5),
        ([], 3, 5),
        ([], 8, 8),
        (["max_pool_size = 5"], 8, 5),
        (["max_pool_size = 2"], 8, 2),
    ],
)
def test_as_many_connections_are_kept_as_are_used_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    at_once: int,
    size: int,
) -> None:
    conf = configuration(tmp_path, f"connection = {MYSQL}", *lines)
    _, arguments = made_with(monkeypatch, conf, at_once=at_once)
    assert arguments["max_pool_size"] == size


def test_a_service_may_have_its_own_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = configuration(tmp_path, f"connection = {MYSQL}")
    store.register_options(conf)
    conf.set_default("max_pool_size", 4, store.GROUP)
    _, arguments = made_with(monkeypatch, conf, at_once=8)
    assert arguments["max_pool_size"] == 4


@pytest.mark.parametrize("url", [MYSQL, "postgresql+psycopg2://u:p@h/d"])
def test_limits_that_drivers_cannot_have_are_less(
    tmp_path: Path, url: str
) -> None:
    conf = configuration(tmp_path, f"connection = {url}")
    engine = store.make_engine(conf, timeout=threading.TIMEOUT_MAX)
    assert engine.url.query["connect_timeout"] == "2000000"
    assert "2000000" in " ".join(map(str, engine.url.query.values()))


def test_without_a_timeout_the_drivers_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = configuration(tmp_path, f"connection = {MYSQL}")
    url, _ = made_with(monkeypatch, conf)
    assert not url.query


def test_limits_in_the_url_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = made_with(
        monkeypatch,
        configuration(tmp_path),
        f"{MYSQL}?read_timeout=60&init_command=SET+x=1",
        timeout=5,
        connect_timeout=2,
    )
    assert url.query["read_timeout"] == "60"
    assert url.query["init_command"] == "SET x=1"
    assert url.query["connect_timeout"] == "2"


def test_limits_on_postgresql_and_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = configuration(tmp_path)
    url, _ = made_with(monkeypatch, conf, POSTGRESQL, timeout=5)
    assert url.query["options"] == "-c statement_timeout=5000"
    assert url.query["connect_timeout"] == "5"
    monkeypatch.undo()
    url, _ = made_with(monkeypatch, conf, "sqlite:///x", timeout=5)
    assert dict(url.query) == {"timeout": "5"}


def test_a_url_that_is_given_stands_in_for_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = configuration(tmp_path, f"connection = {MYSQL}")
    url, _ = made_with(monkeypatch, conf, POSTGRESQL)
    assert url.get_backend_name() == "postgresql"


@pytest.mark.parametrize(
    "line, part",
    [
        ("", "no API database is configured"),
        ("connection =", "no API database is configured"),
        ("connection = Zpw", "is no database URL"),
        ("connection = mysql://u:Zpw@h:port/x", "is no database URL"),
        ("connection = Zpw://u:Zpw@h/x", "no such kind of database"),
        ("connection = mysql+Zpw://u:Zpw@h/x", "no such kind of database"),
        (
            "connection = mysql+pymysql://u:Zpw@h/x?read_timeout=Zpw",
            "an option in its query has a bad value",
        ),
        ("connection = sqlite://\nmax_pool_size = Zpw", "max_pool_size"),
        ("connection = sqlite://\nmax_pool_size = $Zpw", "max_pool_size"),
        (
            "connection = mysql+mysqlconnector://u:Zpw@h/x",
            "mysql is not installed",
        ),
    ],
)
def test_what_cannot_be_used_is_named_without_its_value(
    tmp_path: Path, line: str, part: str
) -> None:
    conf = configuration(tmp_path, line)
    with pytest.raises(ConfigurationError) as caught:
        store.make_engine(conf)
    assert part in str(caught.value)
    assert "Zpw" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_options_that_the_service_has_registered_are_left_alone() -> None:
    conf = cfg.ConfigOpts()
    own = cfg.IntOpt("max_pool_size", default=77, help="Nova's.")
    conf.register_opt(own, group="api_database")
    store.register_options(conf)
    store.register_options(conf)
    conf([], default_config_files=[])
    assert conf.api_database.max_pool_size == 77
    # The service can still register a copy of its own, as Nova does.
    conf.register_opts(
        [
            option
            for option in oslo_db_options.database_opts
            if option.name != "max_pool_size"
        ],
        group="api_database",
    )


def test_making_an_engine_connects_to_nothing(tmp_path: Path) -> None:
    conf = configuration(tmp_path)
    engine = store.make_engine(conf, f"sqlite:///{tmp_path}/none/x.sqlite")
    assert list(tmp_path.iterdir()) == [tmp_path / "nova.conf"]
    assert engine.hide_parameters


def test_an_engine_is_made_on_first_use_and_once() -> None:
    made: list[sa.Engine] = []

    def make() -> sa.Engine:
        made.append(sa.create_engine("sqlite://"))
        return made[-1]

    reading = store.Store(make)
    assert not made
    assert reading.engine() is reading.engine()
    assert len(made) == 1


def test_another_process_makes_an_engine_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading = store.Store(lambda: sa.create_engine("sqlite://"))
    disposed: list[object] = []
    parents = reading.engine()
    monkeypatch.setattr(parents, "dispose", lambda: disposed.append(parents))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        assert reading.engine() is not parents
    other = store.Store(lambda: parents)
    other.engine()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        other.close()
    assert not disposed
    other.engine()
    other.close()
    other.close()
    assert disposed == [parents]


# What fails is told by the error.


def break_it(engine: sa.Engine) -> sa.Engine:
    """No statement succeeds, and no connection is given back in order."""

    def execute(*args: object) -> None:
        raise sqlite3.DatabaseError("broken")

    def reset(*args: object) -> None:
        raise OSError("gone")

    sa.event.listen(engine, "do_execute", execute)
    sa.event.listen(engine, "reset", reset)
    return engine


@pytest.fixture
def broken(tmp_path: Path) -> sa.Engine:
    url = f"sqlite:///{tmp_path}/x.sqlite"
    engine = store.make_engine(configuration(tmp_path), url)
    engine.connect().close()
    return break_it(engine)


def fails_elsewhere(engine: sa.Engine) -> None:
    with (
        pytest.raises(Exception, match="broken"),
        engine.connect() as connection,
    ):
        connection.exec_driver_sql("SELECT 1")


EXC_FILTERS = "oslo_db.sqlalchemy.exc_filters"


def test_no_traceback_is_logged_of_what_is_raised(
    broken: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    reading = store.Store(lambda: broken)
    for _ in range(3):
        with pytest.raises(Exception, match="broken"):
            reading.cells()
        with pytest.raises(Exception, match="broken"):
            reading.cell_id_of("x")
    assert not caplog.records


def test_what_others_read_is_logged_as_ever(
    broken: sa.Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = engines.create_engine(f"sqlite:///{tmp_path}/x.sqlite")
    break_it(others)
    with pytest.raises(Exception, match="broken"):
        store.Store(lambda: broken).cells()
    for engine in (broken, others):
        caplog.clear()
        fails_elsewhere(engine)
        assert {record.name for record in caplog.records} == {
            EXC_FILTERS,
            f"sqlalchemy.pool.impl.{type(engine.pool).__name__}",
        }


def test_at_debug_all_is_logged(
    broken: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, EXC_FILTERS):
        with pytest.raises(Exception, match="broken"):
            store.Store(lambda: broken).cells()
    assert {record.name for record in caplog.records} == {EXC_FILTERS}


def test_a_filter_is_added_once(broken: sa.Engine, tmp_path: Path) -> None:
    logger = logging.getLogger(EXC_FILTERS)
    before = list(logger.filters)
    store.make_engine(configuration(tmp_path), "sqlite://")
    assert logger.filters == before


# TLS.


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What contexts are made with, while no server can be reached."""
    made: list[object] = []

    def create(**arguments: object) -> ssl.SSLContext:
        made.append(arguments["cafile"])
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def connect(*args: object, **arguments: object) -> None:
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(ssl, "create_default_context", create)
    monkeypatch.setattr(socket, "create_connection", connect)
    return made


def try_to_connect(engine: sa.Engine) -> None:
    for _ in range(3):
        with pytest.raises(Exception, match="refused"):
            engine.connect()


def test_attempts_to_connect_share_one_context(
    tmp_path: Path, contexts: list[object]
) -> None:
    try_to_connect(store.make_engine(configuration(tmp_path), MYSQL))
    # Before 1.2 PyMySQL makes none unless asked to.
    assert len(contexts) == (1 if pymysql.VERSION >= (1, 2) else 0)


def test_options_about_tls_are_left_to_the_driver(
    tmp_path: Path, contexts: list[object]
) -> None:
    url = f"{MYSQL}?ssl_ca=/x"
    try_to_connect(store.make_engine(configuration(tmp_path), url))
    assert contexts == ["/x"] * 3
    del contexts[:]
    url = f"{MYSQL}?ssl_disabled=true"
    try_to_connect(store.make_engine(configuration(tmp_path), url))
    assert contexts == []


def test_a_driver_made_otherwise_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pymysql.connections.Connection, "_create_ssl_ctx")
    engine = store.make_engine(configuration(tmp_path), MYSQL)
    assert not engine.dialect.dispatch.do_connect


def test_reading_imports_neither_alembic_nor_cliff() -> None:
    program = (
        "import sys, cellmw.cells.store\n"
        "print([name for name in sys.modules"
        " if name.startswith(('alembic', 'cliff', 'cellmw.cli'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name, accepted",
    [
        ("max_pool_size", "a whole number"),
        ("connection_debug", "a whole number, 0 to 100"),
        ("connection_trace", "true or false"),
        ("mysql_sql_mode", "a string, each $ in it written as $$"),
        ("connection", "a string, each $ in it written as $$"),
    ],
)
def test_a_bad_option_says_what_is_accepted(
    name: str, accepted: str, tmp_path: Path
) -> None:
    value = "x$hunter2" if accepted.startswith("a string") else "hunter2"
    conf = configuration(tmp_path, f"{name} = {value}")
    store.register_options(conf)
    with pytest.raises(ConfigurationError) as caught:
        store.option(conf, name)
    message = str(caught.value)
    assert message == (
        f"option {name} in [api_database] has a bad value; "
        f"accepted: {accepted}"
    )
