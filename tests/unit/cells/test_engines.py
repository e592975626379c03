# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Making an engine from the options of oslo.db."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from oslo_config import cfg
from oslo_db import options as oslo_db_options
from oslo_db.sqlalchemy import engines as oslo_db_engines

from cellmw.cells import engines
from cellmw.exceptions import ConfigurationError

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
    real = oslo_db_engines.create_engine

    def create_engine(url: sa.URL, **arguments: Any) -> sa.Engine:
        calls.append((url, arguments))
        engine: sa.Engine = real("sqlite://", max_retries=0)
        return engine

    monkeypatch.setattr(oslo_db_engines, "create_engine", create_engine)
    engines.make_engine(*args, **limits)
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
        "read_timeout": "33",
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
    engines.register_options(conf)
    conf.set_default("max_pool_size", 4, engines.GROUP)
    _, arguments = made_with(monkeypatch, conf, at_once=8)
    assert arguments["max_pool_size"] == 4


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
        ("connection = Zpw://u:Zpw@h/x", "no dialect or driver"),
        ("connection = mysql+Zpw://u:Zpw@h/x", "no dialect or driver"),
        (
            "connection = mysql+pymysql://u:Zpw@h/x?read_timeout=Zpw",
            "cannot use read_timeout as it stands",
        ),
        ("connection = sqlite://\nmax_pool_size = Zpw", "max_pool_size"),
        ("connection = sqlite://\nmax_pool_size = $Zpw", "max_pool_size"),
        (
            "connection = mysql+pymysql://u:Zpw@h/x\n"
            "connection_parameters = ssl=Zpw",
            "cannot use ssl as it stands",
        ),
    ],
)
def test_what_cannot_be_used_is_named_without_its_value(
    tmp_path: Path, line: str, part: str
) -> None:
    conf = configuration(tmp_path, line)
    with pytest.raises(ConfigurationError) as caught:
        engines.make_engine(conf)
    assert part in str(caught.value)
    assert "Zpw" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_options_that_the_service_has_registered_are_left_alone() -> None:
    conf = cfg.ConfigOpts()
    own = cfg.IntOpt("max_pool_size", default=77, help="Nova's.")
    conf.register_opt(own, group="api_database")
    engines.register_options(conf)
    engines.register_options(conf)
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
    engine = engines.make_engine(conf, f"sqlite:///{tmp_path}/none/x.sqlite")
    assert list(tmp_path.iterdir()) == [tmp_path / "nova.conf"]
    assert engine.hide_parameters


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
    engines.register_options(conf)
    with pytest.raises(ConfigurationError) as caught:
        engines.option(conf, name)
    message = str(caught.value)
    assert message == (
        f"option {name} in [api_database] has a bad value; "
        f"accepted: {accepted}"
    )
