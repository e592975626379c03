# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Each driver that SQLAlchemy has for MariaDB and PostgreSQL.

Those that are built where they are installed need a compiler and the
libraries of the servers; ``tox -e drivers`` installs them and names them in
CELLMW_TEST_DRIVERS.  PgBouncer stands in its default configuration, and with
one session for all, so that what one transaction leaves meets the next.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa

from cellmw import exceptions
from cellmw.cells.changes import Changes
from cellmw.cells.instance_changes import InstanceMapping
from cellmw.cells.mapping import CellMapping
from cellmw.cells.store import Store
from cellmw.redaction import Secret
from cellmw.workers import Workers
from tests import servers
from tests.directories import (
    cell_uuid,
    expanded,
    instance_uuid,
    make,
)
from tests.functional.database import schema
from tests.functional.database.engines import make_engine, migrate
from tests.pgbouncer import pgbouncer
from tests.proxy import Proxy

BUILT = tuple(os.environ.get("CELLMW_TEST_DRIVERS", "").split())
POSTGRESQL = (
    "postgresql+psycopg2",
    "postgresql+psycopg",
    "postgresql+pg8000",
    *(name for name in BUILT if name.startswith("postgresql")),
)
MARIADB = (
    "mysql+pymysql",
    "mariadb+pymysql",
    "mysql+mysqlconnector",
    *(name for name in BUILT if not name.startswith("postgresql")),
)
# These read with a limit of their own; libpq has none, see
# doc/source/reference/database-failures.rst.
GIVE_UP = (*MARIADB, "postgresql+pg8000")

TIMEOUT = 1.0
# What a driver may take beyond that, on a machine that is busy.
SLACK = 10.0

pytestmark = pytest.mark.servers


def url_of(database: servers.Database, driver: str, address: str = "") -> str:
    url = database.url_via(address) if address else database.url
    named = sa.make_url(url).set(drivername=driver)
    return named.render_as_string(hide_password=False)


@contextlib.contextmanager
def database_for(driver: str) -> Iterator[servers.Database]:
    kind = "postgresql" if driver.startswith("postgresql") else "mariadb"
    with servers.DATABASES[kind]() as database:
        schema.create_tables(database)
        yield database


@pytest.fixture(params=POSTGRESQL + MARIADB)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=POSTGRESQL)
def of_postgresql(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def reads_and_writes(url: str) -> None:
    """As the filter reads, and as cellmw-manage writes."""
    writing = make_engine(url, timeout=5)
    reading = make_engine(url, timeout=5, for_reading=True)
    store, changes = Store(lambda: reading), Changes(writing, expand=expanded)
    try:
        assert store.cells() == []
        for number in (1, 2):
            changes.create_cell(
                CellMapping(
                    uuid=cell_uuid(number),
                    name=f"säben {number}",
                    transport_url=Secret(f"rabbit://u:p%40@h/{number}"),
                )
            )
        there = {cell.uuid: cell for cell in store.cells()}
        assert there[cell_uuid(2)].name == "säben 2"
        wanted = [
            InstanceMapping(
                instance_uuid=instance_uuid(number),
                cell_uuid=cell_uuid(1),
                project_id="100%s it's",
            )
            for number in range(20)
        ]
        assert changes.map_instances(wanted).added == 20
        moved = [
            InstanceMapping(
                instance_uuid=one.instance_uuid,
                cell_uuid=cell_uuid(2),
                project_id=one.project_id,
            )
            for one in wanted[:5]
        ]
        assert changes.map_instances(moved, replace=True).changed == 5
        # Drivers prepare a statement that comes again and again.
        for number in range(20):
            cell = there[cell_uuid(2 if number < 5 else 1)]
            found = store.cell_of(instance_uuid(number))
            assert found == (cell.id, cell.uuid)
        assert store.cell_of(instance_uuid(77)) is None
    finally:
        store.close()
        writing.dispose()


def test_a_driver_reads_and_writes(driver: str) -> None:
    with database_for(driver) as database:
        reads_and_writes(url_of(database, driver))


@pytest.mark.parametrize("name", GIVE_UP)
def test_a_silent_server_gives_the_thread_back(
    name: str, make_proxy: Callable[[str], Proxy]
) -> None:
    with database_for(name) as database:
        proxy = make_proxy("db://{}:{}".format(*database.address))
        url = url_of(database, name, proxy.address)
        engine = make_engine(url, timeout=TIMEOUT, for_reading=True)
        store = Store(lambda: engine)
        assert store.cells() == []
        proxy.swallow("to_client")
        began = time.monotonic()
        # What it is called differs from driver to driver.
        with pytest.raises(Exception, match=r".") as caught:
            store.cells()
        assert not isinstance(caught.value, AssertionError)
        assert time.monotonic() - began < 3 * TIMEOUT + SLACK
        proxy.restore()
        assert store.cells() == []
        store.close()


def test_no_request_waits_longer_than_it_wants(
    driver: str, make_proxy: Callable[[str], Proxy]
) -> None:
    with database_for(driver) as database:
        proxy = make_proxy("db://{}:{}".format(*database.address))
        url = url_of(database, driver, proxy.address)
        engine = make_engine(url, timeout=30, for_reading=True)
        store, workers = Store(lambda: engine), Workers()
        directory = make(store, workers=workers, lookup_timeout=TIMEOUT)
        directory.refresh(timeout=30)
        proxy.swallow("to_client")
        began = time.monotonic()
        with pytest.raises(exceptions.LookupFailed):
            directory.find(instance_uuid(1))
        assert time.monotonic() - began < TIMEOUT + SLACK
        proxy.restore()
        proxy.cut()
        end = time.monotonic() + 30
        while directory.stats().queries_running:
            assert time.monotonic() < end
            threading.Event().wait(0.02)
        directory.close()
        store.close()
        workers.close()


def test_a_pooler_of_transactions_is_no_hindrance(of_postgresql: str) -> None:
    with (
        database_for(of_postgresql) as database,
        pgbouncer(database, sessions=1) as address,
    ):
        reads_and_writes(url_of(database, of_postgresql, address))


def test_tables_are_made_through_a_pooler(
    of_postgresql: str, postgresql: servers.Database
) -> None:
    with pgbouncer(postgresql, sessions=1) as address:
        url = url_of(postgresql, of_postgresql, address)
        engine = make_engine(url, timeout=5)
        assert sa.inspect(engine).get_table_names() == []
        engine.dispose()
        migrate(servers.Database(sa.make_url(url), None))
    engine = make_engine(postgresql.url)
    assert "instance_mappings" in sa.inspect(engine).get_table_names()
    engine.dispose()


def test_the_server_ends_a_statement_behind_a_pooler_and_no_others(
    of_postgresql: str,
) -> None:
    with (
        database_for(of_postgresql) as database,
        pgbouncer(database, sessions=1) as address,
    ):
        url = url_of(database, of_postgresql, address)
        for for_reading in (True, False):
            engine = make_engine(url, timeout=TIMEOUT, for_reading=for_reading)
            began = time.monotonic()
            with (
                pytest.raises(Exception, match=r"statement timeout|timed out"),
                engine.connect() as connection,
            ):
                connection.exec_driver_sql("SELECT pg_sleep(60)")
            assert time.monotonic() - began < TIMEOUT + SLACK
            engine.dispose()
        # The same session of the server, for somebody else.
        others = sa.create_engine(database.url_via(address))
        with others.connect() as connection:
            shown = connection.exec_driver_sql("SHOW statement_timeout")
            assert shown.scalar() == "0"
        others.dispose()


def test_tracing_sees_each_connection(
    mariadb: servers.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema.create_tables(mariadb)
    real: Any = pymysql.connect
    seen: list[object] = []

    def traced(*args: Any, **arguments: Any) -> Any:
        connection = real(*args, **arguments)
        # The test's own administrator connects too.
        if mariadb.name in (arguments.get("database"), arguments.get("db")):
            seen.append(connection)
        return connection

    monkeypatch.setattr(pymysql, "connect", traced)
    url = f"{mariadb.url}?charset=utf8mb4"
    engine = make_engine(url, timeout=5, for_reading=True)
    assert not seen
    store = Store(lambda: engine)
    assert store.cells() == []
    mariadb.kill_connections()
    assert store.cells() == []
    assert len(seen) == 2
    # It is the driver's own connection, not one of a class of ours.
    assert {type(one) for one in seen} == {pymysql.connections.Connection}
    store.close()
