# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The cells' own databases, on each kind of server."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from oslo_config import cfg
from oslo_db import exception as db_exception
from oslo_db import options as oslo_db_options

from cellmw.cells import databases
from cellmw.cells.databases import Databases
from cellmw.cells.mapping import Cell
from cellmw.context import RequestContext
from cellmw.redaction import Secret
from cellmw.workers import Workers
from tests import servers
from tests.fakes import PATIENCE, Gate, Threads, cell_uuid, in_child
from tests.functional.database import kinds
from tests.functional.stack import eventually

UUID = cell_uuid(1)
# oslo.db translates most, not all.
FAILURES = (db_exception.DBError, sa.exc.DBAPIError)
PASSWORD = "pass-not-for-logs"

on_servers = pytest.mark.parametrize(
    "pair",
    [pytest.param(kind, marks=pytest.mark.servers) for kind in kinds.SERVERS],
    indirect=True,
)


def configuration(**options: Any) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[])
    databases.prepare(conf)
    for name, value in options.items():
        conf.set_override(name, value, group="database")
    return conf


@pytest.fixture
def make_databases() -> Iterator[Callable[..., Databases]]:
    """Makes the databases of a process; closes them at the end."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Databases:
            conf = configuration(**options)
            workers = Workers()
            stack.callback(workers.close)
            made = Databases(lambda url: databases.make(conf, url), workers)
            stack.callback(made.close, PATIENCE)
            return made

        yield make


def cell(url: str | servers.Database | None) -> Cell:
    if isinstance(url, servers.Database):
        url = url.url
    secret = None if url is None else Secret(url)
    return Cell(UUID, "cell-1", database=secret)


def name_in(manager: Any, context: Any = None) -> str:
    """Where a context manager's sessions arrive."""
    with manager.reader.using(context or RequestContext()) as session:
        found: str = session.execute(sa.text("SELECT name FROM here")).scalar()
        return found


def test_one_object_serves_all_threads(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
) -> None:
    made, here = make_databases(), cell(pair[0])
    barrier = threading.Barrier(16)
    found: list[Any] = []

    def use() -> None:
        barrier.wait(PATIENCE)
        found.append(made.of(here))
        assert name_in(found[-1]) == "old"

    with Threads() as threads:
        for _ in range(16):
            threads.start(use)
    assert len(found) == 16
    assert len(set(map(id, found))) == 1


def test_a_session_that_is_open_finishes_where_it_began(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
) -> None:
    made, (old, new) = make_databases(), pair
    context = RequestContext()
    before = made.of(cell(old))
    with before.writer.using(context) as session:
        session.execute(sa.text("INSERT INTO here VALUES ('more')"))
        made.keep_only({UUID: cell(new)})
        assert name_in(made.of(cell(old))) == "new"
        names = session.execute(sa.text("SELECT name FROM here")).scalars()
        assert set(names) == {"old", "more"}
    # A handler that has kept it is served.
    assert name_in(before) == "old"
    assert made.of(cell(new)) is not before


@on_servers
def test_under_load_nothing_fails_and_the_old_connections_go(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
) -> None:
    made, (old, new) = make_databases(max_pool_size=16), pair
    made.keep_only({UUID: cell(old)})
    barrier = threading.Barrier(9)
    arrived: list[str] = []

    def load() -> None:
        barrier.wait(PATIENCE)
        while "new" not in arrived or len(arrived) < 500:
            arrived.append(name_in(made.of(cell(old))))

    with Threads() as threads:
        for _ in range(8):
            threads.start(load)
        barrier.wait(PATIENCE)
        eventually(lambda: len(arrived) > 50)
        assert old.connections()
        made.keep_only({UUID: cell(new)})
    assert {"old", "new"} == set(arrived)
    # The next reading of the mappings.
    made.keep_only({UUID: cell(new)})
    eventually(lambda: not old.connections())
    assert new.connections()


@on_servers
def test_a_connection_that_was_just_being_returned_goes_too(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, (old, new) = make_databases(), pair
    gate = Gate()
    returned = databases._Database._returned

    def slowly(self: Any, connection: object, record: Any) -> None:
        returned(self, connection, record)
        gate.wait()

    monkeypatch.setattr(databases._Database, "_returned", slowly)
    made.keep_only({UUID: cell(old)})
    with Threads() as threads:
        threads.start(name_in, made.of(cell(old)))
        gate.await_arrival()
        made.keep_only({UUID: cell(new)})
        gate.open()
    made.keep_only({UUID: cell(new)})
    eventually(lambda: not old.connections())


@on_servers
def test_connections_close_when_the_cell_goes_and_at_the_end(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
) -> None:
    made, (old, new) = make_databases(), pair
    here, there = cell(old), cell(new)
    assert name_in(made.of(here)) == "old"
    made.keep_only({})
    eventually(lambda: not old.connections())
    made.keep_only({UUID: there})
    after = made.of(there)
    with after.reader.using(RequestContext()) as session:
        session.execute(sa.text("SELECT name FROM here"))
        assert new.connections()
        made.close(PATIENCE)
    eventually(lambda: not new.connections())
    # What is asked for later leaves nothing behind.
    assert name_in(made.of(there)) == "new"
    eventually(lambda: not new.connections())


@on_servers
def test_a_forked_child_connects_by_itself(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
) -> None:
    made, (old, _) = make_databases(), pair
    manager = made.of(cell(old))
    assert name_in(manager) == "old"
    ours = set(old.connections())
    assert len(ours) == 1

    def child() -> tuple[str, set[int]]:
        made.leave_to_parent()
        name = name_in(manager)
        return name, set(old.connections())

    for _ in range(3):
        name, seen = in_child(child)
        assert name == "old"
        assert len(seen - ours) == 1
    # The parent's was neither used nor closed.
    assert ours <= set(old.connections())
    assert name_in(manager) == "old"
    eventually(lambda: set(old.connections()) == ours)


def test_two_cells_in_one_thread_and_context_are_apart(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
) -> None:
    made, (old, new) = make_databases(), pair
    first = made.of(cell(old))
    second = made.of(Cell(cell_uuid(2), None, database=Secret(new.url)))
    context = RequestContext()
    with first.writer.using(context):
        assert name_in(second, context) == "new"
        assert name_in(first, context) == "old"


def test_the_options_of_the_database_group_are_used(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = pair
    made = make_databases(
        max_pool_size=3,
        max_overflow=4,
        connection_recycle_time=77,
        max_retries=9,
        retry_interval=9,
        connection=new.url,
    )
    # Nor is this one the cell's; oslo.db falls back on the global one.
    cfg.CONF.register_opts(oslo_db_options.database_opts, group="database")
    monkeypatch.setattr(
        cfg.CONF.database._group._opts["slave_connection"]["opt"],
        "default",
        new.url,
    )
    manager = made.of(cell(old))
    engine = manager.writer.get_engine()
    assert engine.pool._recycle == 77
    if old.kind != "sqlite":
        assert engine.pool.size() == 3
        assert engine.pool._max_overflow == 4
    assert name_in(manager) == "old"
    assert manager.reader.get_engine().url.database == old.name


def unreachable(made: Databases, at: servers.Database) -> list[Any]:
    """Two that cannot connect: nobody listens, and no such user."""
    url = at.url_as("cellmw-nobody", PASSWORD)
    closed = url.replace(f":{at.address[1]}/", f":{servers.free_port()}/")
    return [
        made.of(Cell(cell_uuid(number), None, database=Secret(each)))
        for number, each in enumerate((closed, url))
    ]


@on_servers
def test_neither_an_error_nor_the_engine_shows_the_password(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Nor does an attempt wait to be repeated, while all others wait for it.
    monkeypatch.setattr("oslo_db.sqlalchemy.engines.time", None)
    for broken in unreachable(make_databases(), pair[0]):
        with pytest.raises(FAILURES) as caught:
            name_in(broken)
        shown = "".join(
            traceback.TracebackException.from_exception(
                caught.value, capture_locals=True
            ).format()
        )
        assert "in do_connect" in shown or "in connect" in shown
        assert PASSWORD not in shown
        assert broken.writer.get_engine().url.password is None
    assert PASSWORD not in caplog.text


@on_servers
def test_a_password_is_used(
    pair: tuple[servers.Database, servers.Database],
    make_databases: Callable[..., Databases],
) -> None:
    old, _ = pair
    user = servers.unique("u")
    create, drop = {
        "mysql": (
            [
                f"CREATE USER {user}@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'",
                f"GRANT ALL ON {old.name}.* TO {user}@'127.0.0.1'",
            ],
            [f"DROP USER {user}@'127.0.0.1'"],
        ),
        "postgresql": (
            [f"CREATE USER {user} PASSWORD '{PASSWORD}' SUPERUSER"],
            [f"DROP USER {user}"],
        ),
    }[old.kind]
    for statement in create:
        old.administer(statement)
    made = make_databases()
    try:
        assert name_in(made.of(cell(old.url_as(user, PASSWORD)))) == "old"
    finally:
        made.close(PATIENCE)
        eventually(lambda: not old.connections())
        for statement in drop:
            old.administer(statement)
