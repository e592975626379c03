# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is known of each database driver, with the drivers themselves."""

from __future__ import annotations

import builtins
import functools
import importlib.metadata
import logging
import threading
from collections.abc import Callable
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa
from oslo_config import cfg

from cellmw.cells import drivers, engines
from cellmw.exceptions import ConfigurationError

MYSQL = "mysql+pymysql://u:Zpw@h/nova_api"
POSTGRESQL = "postgresql+psycopg2://u:Zpw@h/nova_api"
_SQLALCHEMY = importlib.metadata.version("SQLAlchemy")

TLS = {
    "mysql+pymysql": ["ssl_mode=REQUIRED", "ssl=true", "sslmode=require"],
    "mariadb+pymysql": ["ssl_mode=REQUIRED", "ssl=true"],
    "postgresql+psycopg2": ["ssl_mode=require", "ssl=true", "sslmode=ON"],
    "postgresql+psycopg": ["ssl_mode=require", "ssl=true", "sslmode=ON"],
    "postgresql+pg8000": ["sslmode=require", "ssl=true"],
    # SQLAlchemy 2.0 drops what SQLite does not take; 2.1 hands it on.
    "sqlite": ["timeout=Zpw", *(["ssl=true"] * (_SQLALCHEMY >= "2.1"))],
}
FINE = {
    "mysql+pymysql": [
        "charset=utf8mb4",
        "ssl_ca=/none/ca.pem",
        "ssl_verify_cert=true",
        "read_timeout=3&connect_timeout=2",
        "unix_socket=/none/mysql.sock",
        "read_default_file=/none/my.cnf",
    ],
    "mariadb+pymysql": ["charset=utf8mb4"],
    "postgresql+psycopg2": [
        "sslmode=verify-full&sslrootcert=/none/ca.pem",
        "host=h1:5432&host=h2:5433",
        "options=-c statement_timeout=7",
        "gssencmode=require",
        "client_encoding=utf8",
    ],
    "postgresql+psycopg": [
        "sslmode=verify-full&sslrootcert=/none/ca.pem",
        "host=h1:5432&host=h2:5433",
        "application_name=api",
    ],
    "postgresql+pg8000": ["application_name=api", "unix_sock=/none/s"],
    "sqlite": ["mode=ro&uri=true", "timeout=3"],
}


def make(url: str, **how: Any) -> sa.Engine:
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[])
    return engines.make_engine(conf, url, **how)


def connects_with(
    monkeypatch: pytest.MonkeyPatch, url: str, **how: Any
) -> dict[str, Any]:
    """The arguments of the driver's connect()."""
    engine = make(url, **how)
    seen: dict[str, Any] = {}

    def connect(*args: Any, **arguments: Any) -> None:
        seen.update(arguments)
        raise OSError("nowhere")

    monkeypatch.setattr(engine.dialect.loaded_dbapi, "connect", connect)
    with pytest.raises(Exception, match="nowhere"):
        engine.connect()
    return seen


def urls(cases: dict[str, list[str]]) -> list[str]:
    return [
        f"{driver}:///x?{query}"
        if driver == "sqlite"
        else f"{driver}://u:Zpw@h/d?{query}"
        for driver, queries in cases.items()
        for query in queries
    ]


@pytest.mark.parametrize("url", urls(TLS))
def test_a_parameter_that_the_driver_does_not_take_is_named(url: str) -> None:
    name = url.partition("?")[2].partition("=")[0]
    with pytest.raises(ConfigurationError) as caught:
        make(url)
    text = str(caught.value)
    assert f"cannot use {name} as it stands" in text
    assert "accepted: " in text
    assert "Zpw" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("url", urls(FINE))
def test_parameters_that_the_driver_takes_are_fine(url: str) -> None:
    make(url)


def test_of_several_parameters_the_bad_ones_are_named() -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(f"{MYSQL}?charset=utf8&ssl=true&ssl_mode=x&read_timeout=3")
    assert "cannot use ssl, ssl_mode as it stands" in str(caught.value)


def test_what_is_no_name_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(f"{MYSQL}?u:hunter2@h=x")
    assert "cannot use a parameter as it stands" in str(caught.value)


def test_a_plugin_may_take_parameters_out() -> None:
    with pytest.raises(ConfigurationError, match="cannot load a plugin"):
        make(f"{MYSQL}?plugin=none&anything=x")


@pytest.mark.parametrize(
    "driver",
    [
        "postgresql+asyncpg",
        "postgresql+psycopg_async",
        "mysql+aiomysql",
        "mysql+asyncmy",
        "sqlite+aiosqlite",
    ],
)
def test_an_asynchronous_driver_stops_the_load(driver: str) -> None:
    with pytest.raises(ConfigurationError, match=r"asynchronous; accepted: "):
        make(f"{driver}://" if "sqlite" in driver else f"{driver}://u:p@h/d")


@pytest.mark.parametrize(
    "url, module, package",
    [
        (MYSQL, "pymysql", "PyMySQL"),
        ("mysql+cymysql://h/d", "cymysql", "cymysql"),
        ("mysql+mysqldb://h/d", "MySQLdb", "mysqlclient"),
        ("mysql+mysqlconnector://h/d", "mysql", "mysql-connector-python"),
        ("mariadb+mariadbconnector://h/d", "mariadb", "mariadb"),
        (POSTGRESQL, "psycopg2", "psycopg2"),
        ("postgresql+psycopg://h/d", "psycopg", "psycopg"),
        ("postgresql+pg8000://h/d", "pg8000", "pg8000"),
    ],
)
def test_what_is_not_installed_is_named_as_the_index_has_it(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str, package: str
) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *args: Any, **how: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ImportError(f"No module named {name}", name=name)
        return real(name, *args, **how)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError) as caught:
        make(url)
    assert f"install the Python package {package} " in str(caught.value)


def test_a_url_without_a_driver_says_who_chose_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = sa.make_url("postgresql://h/d").get_dialect()

    def fail() -> None:
        raise ImportError("no library")

    monkeypatch.setattr(chosen, "import_dbapi", fail)
    with pytest.raises(ConfigurationError) as caught:
        make("postgresql://h/d")
    assert (
        f"driver {chosen.driver}, SQLAlchemy's choice here, cannot be "
        "imported: install the Python package" in str(caught.value)
    )


@pytest.mark.parametrize(
    "url, limits",
    [
        (
            MYSQL,
            {"connect_timeout": 3, "read_timeout": 5, "write_timeout": 5},
        ),
        (
            f"{MYSQL}?read_timeout=60",
            {"connect_timeout": 3, "read_timeout": 60, "write_timeout": 5},
        ),
        (
            POSTGRESQL,
            {
                "connect_timeout": 3,
                "tcp_user_timeout": 5000,
                "keepalives_idle": 5,
                "keepalives_interval": 1,
                "keepalives_count": 3,
            },
        ),
        (
            "postgresql+psycopg://h/d",
            {"connect_timeout": 3, "prepare_threshold": None},
        ),
        ("postgresql+pg8000://u@h/d", {"timeout": 5}),
        ("sqlite:///x", {"timeout": 5}),
    ],
)
def test_limits_are_what_the_driver_takes(
    monkeypatch: pytest.MonkeyPatch, url: str, limits: dict[str, Any]
) -> None:
    seen = connects_with(monkeypatch, url, timeout=4.2, connect_timeout=2.1)
    assert {name: seen[name] for name in limits} == limits
    # PgBouncer refuses what is not one of its few startup parameters.
    assert "options" not in seen


@pytest.mark.parametrize("url", [MYSQL, POSTGRESQL])
def test_limits_that_drivers_cannot_have_are_less(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    seen = connects_with(monkeypatch, url, timeout=threading.TIMEOUT_MAX)
    assert seen["connect_timeout"] == 2_000_000


def test_without_a_timeout_the_drivers_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "read_timeout" not in connects_with(monkeypatch, MYSQL)


def test_a_driver_that_is_not_known_is_used_and_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = {
        name: one
        for name, one in drivers._DRIVERS.items()
        if name != "pymysql"
    }
    # The table is the only thing that makes a driver a known one.
    monkeypatch.setattr(drivers, "_DRIVERS", known)
    monkeypatch.setattr(drivers, "_without_limits", set())
    caplog.set_level(logging.DEBUG, "cellmw")
    for _ in range(3):
        seen = connects_with(monkeypatch, MYSQL, timeout=5)
        assert "read_timeout" not in seen
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "pymysql" in line] == lines
    assert len(lines) == 1


def test_what_wraps_connect_sees_our_connections_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As tracing does: by another function in the driver's module."""
    seen: list[dict[str, Any]] = []

    @functools.wraps(pymysql.connect)
    def traced(*args: Any, **arguments: Any) -> None:
        seen.append(arguments)
        raise pymysql.err.OperationalError(2003, "refused")

    monkeypatch.setattr(pymysql, "connect", traced)
    engine = make(f"{MYSQL}?charset=utf8mb4", timeout=5)
    assert not seen
    for number in (1, 2):
        with pytest.raises(Exception, match="refused"):
            engine.connect()
        assert len(seen) == number
