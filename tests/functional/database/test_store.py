# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Reading the API database, on each kind of database and of tables."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from oslo_db import exception as db_exception

from cellmw.cells.mapping import CELL0_UUID, CellMapping
from cellmw.cells.store import Store
from cellmw.cells.tables import cell_mappings, instance_mappings
from cellmw.redaction import Secret
from tests import servers
from tests.functional.database import kinds, schema
from tests.functional.database.engines import make_engine
from tests.proxy import Proxy

# oslo.db translates most, not all.
FAILURES = (db_exception.DBError, sa.exc.DBAPIError)

CELL_UUID = "3a0a4dd6-7cb9-4a9c-9a0b-7b1d2b6a0001"


def instance(number: int) -> str:
    return f"5f4b3a52-39d5-4c11-8f2b-{number:012}"


@pytest.fixture
def store(engine: sa.Engine) -> Store:
    with engine.begin() as connection:
        connection.execute(
            sa.insert(cell_mappings),
            [
                {
                    "id": 1,
                    "uuid": CELL0_UUID,
                    "name": None,
                    "transport_url": "none:///",
                    "database_connection": "mysql://u:p@h/cell0",
                    "disabled": False,
                },
                {
                    "id": 7,
                    "uuid": CELL_UUID,
                    "name": "säben",
                    "transport_url": "rabbit://u:p%40@h:5672/v",
                    "database_connection": None,
                    "disabled": True,
                },
                {
                    "id": 8,
                    "uuid": instance(0),
                    "name": "",
                    "transport_url": None,
                    "database_connection": "",
                    "disabled": None,
                },
            ],
        )
        connection.execute(
            sa.insert(instance_mappings),
            [
                {
                    "instance_uuid": instance(number),
                    "cell_id": cell_id,
                    "project_id": "p",
                    "queued_for_delete": queued,
                }
                for number, cell_id, queued in (
                    (1, 7, False),
                    (2, 1, None),
                    (3, None, False),
                    (4, 7, True),
                )
            ],
        )
    return Store(lambda: engine)


def test_cells_are_read_as_they_stand_there(store: Store) -> None:
    assert store.cells() == [
        CellMapping(
            id=1,
            uuid=CELL0_UUID,
            transport_url=Secret("none:///"),
            database_connection=Secret("mysql://u:p@h/cell0"),
        ),
        CellMapping(
            id=7,
            uuid=CELL_UUID,
            name="säben",
            transport_url=Secret("rabbit://u:p%40@h:5672/v"),
            disabled=True,
        ),
        CellMapping(
            id=8, uuid=instance(0), name="", database_connection=Secret("")
        ),
    ]


def test_the_cell_of_an_instance_is_found(store: Store) -> None:
    found = [store.cell_of(instance(number)) for number in (1, 2, 3, 4, 5)]
    assert found == [
        (7, CELL_UUID),
        (1, CELL0_UUID),
        None,
        (7, CELL_UUID),
        None,
    ]
    assert store.cell_of("' OR 1=1 --") is None


def test_each_query_is_one_statement(store: Store, engine: sa.Engine) -> None:
    statements: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(*args: Any) -> None:
        statements.append(args[2])

    for _ in range(3):
        store.cells()
        store.cell_of(instance(1))
    # The connection's own BEGIN is a statement on SQLite.
    asked = [text for text in statements if text != "BEGIN"]
    assert len(asked) == 6
    assert all(text.startswith("SELECT") for text in asked)


def test_an_instance_is_found_by_an_index(
    store: Store, engine: sa.Engine, api_database: servers.Database
) -> None:
    if api_database.kind == "postgresql":
        explain = "EXPLAIN (FORMAT TEXT) "
    elif api_database.kind == "mysql":
        explain = "EXPLAIN "
    else:
        explain = "EXPLAIN QUERY PLAN "
    statement = (
        "SELECT cell_id FROM instance_mappings "
        f"WHERE instance_uuid = '{instance(1)}'"
    )
    with engine.connect() as connection:
        if api_database.kind == "postgresql":
            # It reads a table of four rows from end to end otherwise.
            connection.exec_driver_sql("SET enable_seqscan = off")
        rows = connection.exec_driver_sql(explain + statement).all()
    assert "instance_uuid" in str(rows)


@contextlib.contextmanager
def reader(database: servers.Database) -> Iterator[str]:
    """The URL of somebody who may read the two tables, nothing else."""
    if database.kind == "sqlite":
        yield f"sqlite:///file:{database.name}?mode=ro&uri=true"
        return
    name = servers.unique("reader")
    tables = ("cell_mappings", "instance_mappings")
    if database.kind == "mysql":
        database.administer(f"CREATE USER {name} IDENTIFIED BY 'Zpw'")
        for table in tables:
            database.administer(
                f"GRANT SELECT ON {database.name}.{table} TO {name}"
            )
    else:
        database.administer(f"CREATE USER {name} PASSWORD 'Zpw'")
        owner = sa.create_engine(database.url, poolclass=sa.NullPool)
        with owner.begin() as connection:
            for table in tables:
                connection.exec_driver_sql(
                    f"GRANT SELECT ON {table} TO {name}"
                )
    try:
        yield database.url_as(name, "Zpw")
    finally:
        if database.kind == "postgresql":
            with owner.begin() as connection:
                connection.exec_driver_sql(f"DROP OWNED BY {name}")
        database.administer(f"DROP USER {name}")


def test_reading_needs_select_on_the_two_tables_and_nothing_else(
    store: Store, api_database: servers.Database
) -> None:
    with reader(api_database) as url:
        engine = make_engine(url, timeout=5)
        reading = Store(lambda: engine)
        assert reading.cells() == store.cells()
        assert reading.cell_of(instance(1)) == (7, CELL_UUID)
        with pytest.raises(FAILURES), engine.begin() as connection:
            connection.execute(sa.delete(instance_mappings))
        reading.close()


def test_rows_changed_by_others_are_seen_by_the_next_query(
    store: Store, engine: sa.Engine
) -> None:
    assert store.cell_of(instance(3)) is None
    with engine.begin() as connection:
        connection.execute(
            sa.update(instance_mappings)
            .where(instance_mappings.c.instance_uuid == instance(3))
            .values(cell_id=8)
        )
    assert store.cell_of(instance(3)) == (8, instance(0))


@kinds.only(kinds.SERVERS)
def test_a_connection_that_died_is_replaced(
    store: Store, api_database: servers.Database
) -> None:
    for _ in range(3):
        assert store.cell_of(instance(1)) == (7, CELL_UUID)
        api_database.kill_connections()


def test_a_child_process_uses_connections_of_its_own(
    store: Store, api_database: servers.Database
) -> None:
    made: list[int] = []

    def make() -> sa.Engine:
        made.append(os.getpid())
        return make_engine(api_database.url)

    shared = Store(make)
    assert shared.cell_of(instance(1)) == (7, CELL_UUID)
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            found = shared.cell_of(instance(1))
            own = made[-1] == os.getpid()
            shared.close()
            status = 0 if found == (7, CELL_UUID) and own else 2
        os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert made == [os.getpid()]
    # The child has not ended the parent's session.
    connections = shared.engine().pool
    assert shared.cell_of(instance(1)) == (7, CELL_UUID)
    assert shared.engine().pool is connections
    shared.close()


@kinds.only(["sqlite", "mariadb"])  # PostgreSQL's server quotes them itself
def test_an_error_does_not_quote_the_values_of_the_statement(
    engine: sa.Engine,
) -> None:
    statement = sa.text("SELECT 1 FROM nowhere WHERE url = :url")
    with pytest.raises(FAILURES) as caught, engine.connect() as connection:
        connection.execute(statement, {"url": "rabbit://u:Zpw@h"})
    assert "nowhere" in str(caught.value)
    assert "Zpw" not in str(caught.value)


@pytest.mark.servers
def test_missing_tables_are_an_error_until_they_are_there(
    database: servers.Database,
) -> None:
    reading = Store(lambda: engine)
    engine = make_engine(database.url)
    with pytest.raises(FAILURES):
        reading.cell_of(instance(1))
    schema.create_tables(database)
    assert reading.cell_of(instance(1)) is None
    reading.close()


def took(function: Callable[[], object]) -> float:
    """Seconds until it gives up."""
    start = time.monotonic()
    with pytest.raises(FAILURES):
        function()
    return time.monotonic() - start


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_a_database_that_cannot_be_reached_is_no_long_wait(
    kind: str, make_proxy: Callable[[str], Proxy]
) -> None:
    with servers.DATABASES[kind]() as database:
        schema.create_tables(database)
        host, port = database.address
        proxy = make_proxy(f"db://{host}:{port}")
        proxy.refuse()
        # Nothing is tried while it is made, nor again and again later.
        engine = make_engine(database.url_via(proxy.address), timeout=5)
        reading = Store(lambda: engine)
        assert took(reading.cells) < 2
        proxy.restore()
        assert reading.cells() == []
        proxy.refuse()
        assert took(reading.cells) < 2
        proxy.restore()
        assert reading.cells() == []
        reading.close()


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_a_locked_table_is_given_up_by_driver_and_server(kind: str) -> None:
    with servers.DATABASES[kind]() as database:
        schema.create_tables(database)
        engine = make_engine(database.url, timeout=1)
        reading = Store(lambda: engine)
        reading.cells()
        locker = sa.create_engine(database.url, poolclass=sa.NullPool)
        with locker.connect() as connection:
            connection.exec_driver_sql(
                "LOCK TABLES instance_mappings WRITE"
                if kind == "mariadb"
                else "LOCK TABLE instance_mappings"
            )
            assert took(lambda: reading.cell_of(instance(1))) < 8
            deadline = time.monotonic() + 8
            # Nothing waits on in the server, where it would add up.
            while len(waiting(database)) > 0:
                assert time.monotonic() < deadline
                threading.Event().wait(0.05)
        assert reading.cell_of(instance(1)) is None
        reading.close()


def waiting(database: servers.Database) -> list[dict[str, Any]]:
    if database.kind == "mysql":
        return database.administer(
            "SELECT id FROM information_schema.processlist "
            "WHERE db = :name AND state LIKE 'Waiting%'",
            name=database.name,
        )
    return database.administer(
        "SELECT pid FROM pg_stat_activity "
        "WHERE datname = :name AND wait_event_type = 'Lock'",
        name=database.name,
    )


@pytest.mark.servers
def test_a_silent_mariadb_is_given_up(
    mariadb: servers.Database, make_proxy: Callable[[str], Proxy]
) -> None:
    schema.create_tables(mariadb)
    host, port = mariadb.address
    proxy = make_proxy(f"db://{host}:{port}")
    engine = make_engine(mariadb.url_via(proxy.address), timeout=1)
    reading = Store(lambda: engine)
    reading.cells()
    proxy.swallow()
    assert took(reading.cells) < 8
    proxy.restore()
    assert reading.cells() == []
    reading.close()


@pytest.mark.servers
def test_reading_ends_no_transaction_on_mariadb(
    mariadb: servers.Database,
) -> None:
    """That would be a round trip more for each query."""
    schema.create_tables(mariadb)
    engine = make_engine(mariadb.url, for_reading=True)
    store = Store(lambda: engine)

    def ended() -> int:
        # All use the one connection that the pool has.
        with engine.connect() as connection:
            counted = connection.exec_driver_sql(
                "SHOW SESSION STATUS LIKE 'Com_rollback'"
            )
            return int(counted.one()[1])

    before = ended()
    for number in range(3):
        assert store.cell_of(instance(number)) is None
    assert store.cells() == []
    assert ended() == before
    store.close()


@pytest.mark.servers
def test_reading_begins_no_transaction_on_postgresql(
    postgresql: servers.Database,
) -> None:
    schema.create_tables(postgresql)
    engine = make_engine(postgresql.url, for_reading=True)
    store = Store(lambda: engine)
    assert store.cell_of(instance(1)) is None
    with engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        assert raw.autocommit
    store.close()


def test_writing_is_a_transaction(database: servers.Database) -> None:
    schema.create_tables(database)
    engine = make_engine(database.url)
    with engine.connect() as connection:
        connection.execute(
            sa.insert(cell_mappings), {"uuid": CELL_UUID, "name": "x"}
        )
        connection.rollback()
    assert Store(lambda: engine).cells() == []
    engine.dispose()
