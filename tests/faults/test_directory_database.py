# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The directory while its database is in trouble, with real servers.

The table in ``doc/source/reference/database-failures.rst`` says the same.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from oslo_config import cfg

from cellmw import exceptions
from cellmw.cells import engines, store
from cellmw.cells.mapping import Cell
from cellmw.workers import Workers
from tests import servers
from tests.database_servers import (
    KINDS,
    PrivateDatabaseServer,
    private_server,
)
from tests.directories import cell_uuid, instance_uuid, make, url_of
from tests.functional.database import schema
from tests.proxy import Proxy

TIMEOUT = 1.5
# What a request may take beyond that on a machine that is busy: less than
# another timeout.
SLACK = 1.4
CONCURRENCY = 4
INTERVAL = 0.2
# How long a test waits for what has to come.
PATIENCE = 30.0

KNOWN = instance_uuid(0)
USER = "api"
PASSWORD = "S3cret-password-of-the-api"

pytestmark = pytest.mark.servers


class Service:
    """A directory on a real database, whose user may read two tables.

    :ivar url: where the directory goes, perhaps through the proxy
    """

    def __init__(
        self,
        database: servers.Database,
        proxy: Proxy | None = None,
        *,
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> None:
        self.database = database
        self.kind = database.kind
        self.proxy = proxy
        self.url = database.url
        if self.kind != "sqlite":
            self.url = database.url_as(USER, PASSWORD)
        if proxy is not None:
            url = sa.make_url(self.url).set(host=proxy.host, port=proxy.port)
            self.url = url.render_as_string(hide_password=False)
        self.owner = sa.create_engine(database.url, poolclass=sa.NullPool)
        schema.create_nova_tables(database)
        self._fill()
        self.conf = cfg.ConfigOpts()
        self.conf([], default_config_files=[])
        engines.register_options(self.conf)
        for name, value in options.items():
            self.conf.set_override(name, value, engines.GROUP)
        self.workers = Workers()
        self.store = store.Store(
            lambda: engines.make_engine(self.conf, self.url, timeout=timeout)
        )
        self.directory = make(
            self.store,
            workers=self.workers,
            lookup_timeout=timeout,
            lookup_concurrency=CONCURRENCY,
            cell_refresh_interval=INTERVAL,
            instance_cache_ttl=1000.0,
        )
        self._next = 0

    def execute(self, *statements: str) -> None:
        """Execute statements in the database, as its owner."""
        with self.owner.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def _fill(self) -> None:
        cells, instances = (
            sa.table(name, *map(sa.column, columns.split()))
            for name, columns in (
                ("cell_mappings", "id uuid name transport_url disabled"),
                ("instance_mappings", "instance_uuid cell_id project_id"),
            )
        )
        with self.owner.begin() as connection:
            connection.execute(
                cells.insert(),
                {
                    "id": 1,
                    "uuid": cell_uuid(1),
                    "name": "cell-1",
                    "transport_url": "rabbit://u:p@host/1",
                    "disabled": False,
                },
            )
            connection.execute(
                instances.insert(),
                [
                    {
                        "instance_uuid": instance_uuid(number),
                        "cell_id": 1,
                        "project_id": "project",
                    }
                    for number in range(1000)
                ],
            )

    def grant(self, server: PrivateDatabaseServer) -> None:
        """Make the user who may read the two tables and nothing else."""
        if self.kind == "mysql":
            account = f"{USER}@'%%'"
            server.administer(
                f"CREATE USER IF NOT EXISTS {account} "
                f"IDENTIFIED BY '{PASSWORD}'"
            )
        else:
            account = USER
            with contextlib.suppress(sa.exc.ProgrammingError):
                server.administer(
                    f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'"
                )
        for table in ("cell_mappings", "instance_mappings"):
            self.execute(f"GRANT SELECT ON {table} TO {account}")

    def find(self, number: int, method: str = "GET") -> Cell | None:
        return self.directory.find(instance_uuid(number), method)

    def find_new(self) -> Cell | None:
        """Look for an instance that was not looked for yet."""
        self._next += 1
        return self.find(self._next)

    def wait_until_stale(self) -> None:
        """Until the snapshot is so old that all would wait for another."""
        until(
            lambda: (self.directory.stats().snapshot_age or 0) > 2 * INTERVAL
        )

    def close(self) -> None:
        self.directory.close()
        self.store.close()
        self.workers.close()
        self.owner.dispose()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.02)


def answers(action: Callable[[], object]) -> bool:
    try:
        action()
    except exceptions.LookupFailed:
        return False
    return True


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@pytest.fixture(scope="module", params=list(KINDS))
def server(
    request: pytest.FixtureRequest,
) -> Iterator[PrivateDatabaseServer]:
    """A server that the tests may stop, kill and freeze."""
    with private_server(request.param) as server:
        yield server


@pytest.fixture
def make_service(
    server: PrivateDatabaseServer,
) -> Iterator[Callable[..., Service]]:
    """Makes a service that has read its cells and remembers one instance."""
    with contextlib.ExitStack() as stack:

        def make_one(**options: Any) -> Service:
            database = stack.enter_context(server.database())
            proxy = stack.enter_context(Proxy("127.0.0.1", server.port))
            service = Service(database, proxy, **options)
            stack.callback(service.close)
            # Threads that were left with a deaf connection end with it.
            stack.callback(proxy.cut)
            service.grant(server)
            # The machine may be busy.
            until(lambda: answers(lambda: service.find(0)))
            return service

        yield make_one


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


@pytest.fixture
def patient(make_service: Callable[..., Service]) -> Service:
    """One whose requests wait long, for they are not to fail."""
    return make_service(timeout=PATIENCE)


# Troubles.  Each is a context manager: what happens, and its end.


@contextlib.contextmanager
def stopped(server: PrivateDatabaseServer, service: Service) -> Iterator[None]:
    """An operator stops the server."""
    server.stop()
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def killed(server: PrivateDatabaseServer, service: Service) -> Iterator[None]:
    """The server's machine loses its power."""
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def frozen(server: PrivateDatabaseServer, service: Service) -> Iterator[None]:
    """The server does nothing any more, and its connections stay."""
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


@contextlib.contextmanager
def refused(server: PrivateDatabaseServer, service: Service) -> Iterator[None]:
    """Nobody listens."""
    assert service.proxy is not None
    service.proxy.refuse()
    yield
    service.proxy.restore()


@contextlib.contextmanager
def swallowed(
    server: PrivateDatabaseServer, service: Service
) -> Iterator[None]:
    """What is sent does not arrive, either way; connections stay."""
    assert service.proxy is not None
    service.proxy.swallow()
    yield
    service.proxy.restore()


@contextlib.contextmanager
def answers_swallowed(
    server: PrivateDatabaseServer, service: Service
) -> Iterator[None]:
    """What the server answers does not arrive."""
    assert service.proxy is not None
    service.proxy.swallow("to_client")
    yield
    service.proxy.restore()


@contextlib.contextmanager
def slow(server: PrivateDatabaseServer, service: Service) -> Iterator[None]:
    """Each answer takes longer than a request waits."""
    assert service.proxy is not None
    service.proxy.delay(2 * TIMEOUT)
    yield
    service.proxy.restore()


@contextlib.contextmanager
def locked(server: Any, service: Service) -> Iterator[None]:
    """Somebody has locked the tables and does not let go."""
    statements = {
        "mysql": ["LOCK TABLES cell_mappings WRITE, instance_mappings WRITE"],
        "postgresql": [
            "LOCK TABLE cell_mappings, instance_mappings "
            "IN ACCESS EXCLUSIVE MODE"
        ],
        "sqlite": ["BEGIN EXCLUSIVE"],
    }[service.kind]
    with service.owner.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        yield
        if service.kind == "mysql":
            connection.exec_driver_sql("UNLOCK TABLES")


@contextlib.contextmanager
def missing(server: Any, service: Service) -> Iterator[None]:
    """The tables are not there."""
    names = ("cell_mappings", "instance_mappings")
    service.execute(*(f"ALTER TABLE {n} RENAME TO not_{n}" for n in names))
    yield
    service.execute(*(f"ALTER TABLE not_{n} RENAME TO {n}" for n in names))


@contextlib.contextmanager
def deadlocked(
    server: PrivateDatabaseServer, service: Service
) -> Iterator[None]:
    """Reading ends in a deadlock, as it does on a cluster's other node."""
    if service.kind == "mysql":
        # The function is in the way of each row that is read.
        service.execute(
            "CREATE FUNCTION deadlock() RETURNS INT NOT DETERMINISTIC BEGIN "
            "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, "
            "MESSAGE_TEXT = 'Deadlock found when trying to get lock'; "
            "RETURN 0; END"
        )
    else:
        service.execute(
            "CREATE FUNCTION deadlock() RETURNS INT LANGUAGE plpgsql "
            "SECURITY DEFINER AS $$ BEGIN RAISE EXCEPTION "
            "'deadlock detected' USING ERRCODE = '40P01'; END $$"
        )
    account = USER if service.kind == "postgresql" else f"{USER}@'%%'"
    names = ("cell_mappings", "instance_mappings")
    for name in names:
        service.execute(
            f"ALTER TABLE {name} RENAME TO not_{name}",
            f"CREATE VIEW {name} AS SELECT * FROM not_{name} "
            "WHERE deadlock() = 1",
            f"GRANT SELECT ON {name} TO {account}",
        )
    yield
    for name in names:
        service.execute(
            f"DROP VIEW {name}",
            f"ALTER TABLE not_{name} RENAME TO {name}",
        )


@contextlib.contextmanager
def forbidden(
    server: PrivateDatabaseServer, service: Service
) -> Iterator[None]:
    """The user's rights are taken away."""
    account = USER if service.kind == "postgresql" else f"{USER}@'%%'"
    names = ("cell_mappings", "instance_mappings")
    service.execute(*(f"REVOKE SELECT ON {n} FROM {account}" for n in names))
    yield
    service.execute(*(f"GRANT SELECT ON {n} TO {account}" for n in names))


@contextlib.contextmanager
def full(server: PrivateDatabaseServer, service: Service) -> Iterator[None]:
    """The server lets nobody in any more, for it has too many already."""
    limit, back = {
        "mysql": (
            f"ALTER USER {USER}@'%%' WITH MAX_USER_CONNECTIONS 1",
            f"ALTER USER {USER}@'%%' WITH MAX_USER_CONNECTIONS 0",
        ),
        "postgresql": (
            f"ALTER ROLE {USER} CONNECTION LIMIT 0",
            f"ALTER ROLE {USER} CONNECTION LIMIT -1",
        ),
    }[service.kind]
    service.database.kill_connections()
    until(lambda: not service.database.connections())
    server.administer(limit)
    other = sa.create_engine(
        service.database.url_as(USER, PASSWORD), poolclass=sa.NullPool
    )
    with contextlib.ExitStack() as stack:
        stack.callback(server.administer, back)
        if service.kind == "mysql":
            # It knows no limit of none.
            stack.enter_context(other.connect())
        yield


TROUBLES = [
    stopped,
    killed,
    frozen,
    refused,
    swallowed,
    answers_swallowed,
    slow,
    locked,
    missing,
    deadlocked,
    forbidden,
    full,
]


# What is promised of each.


def serves_what_it_knows(service: Service) -> None:
    # One or two find out and wait; if all did, it would take 50 timeouts.
    with within(3 * TIMEOUT + SLACK):
        for _ in range(50):
            assert url_of(service.find(0)) == "rabbit://u:p@host/1"


def refuses_what_it_does_not_know(service: Service) -> None:
    for action in (service.find_new, lambda: service.find(0, "POST")):
        with within(TIMEOUT + SLACK):
            with pytest.raises(exceptions.LookupFailed) as caught:
                action()
        assert PASSWORD not in repr(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None


def holds_back_a_crowd(service: Service) -> None:
    """Many requests for as many instances, at once."""
    took: list[float] = []
    served: list[bool] = []

    def find() -> None:
        began = time.monotonic()
        served.append(answers(service.find_new))
        took.append(time.monotonic() - began)

    threads = [threading.Thread(target=find) for _ in range(20)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, service.directory.stats().queries_running)
        threads[0].join(0.01)
        threads[-1].join(0.01)
    assert not any(served)
    assert max(took) < TIMEOUT + SLACK
    assert most <= CONCURRENCY


def heals(service: Service) -> None:
    until(lambda: answers(service.find_new))
    until(lambda: answers(service.directory.refresh))
    assert url_of(service.find(0, "POST")) == "rabbit://u:p@host/1"
    until(lambda: service.find(0) and service.directory.stats().reachable)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What anybody has told the log, drivers and libraries included.

    But for what they tell those who listen at DEBUG, as the canary does.
    """
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("cellmw")
        or not logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    ]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda t: str(t.__name__))
def test_trouble_is_borne_and_passes(
    server: PrivateDatabaseServer,
    service: Service,
    trouble: Callable[..., contextlib.AbstractContextManager[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with trouble(server, service):
        service.wait_until_stale()
        serves_what_it_knows(service)
        refuses_what_it_does_not_know(service)
        holds_back_a_crowd(service)
        serves_what_it_knows(service)
        assert not service.directory.stats().reachable
        lines = told(caplog)
        assert len(lines) == 2
        assert all("unreachable" in line for line in lines)
    heals(service)
    if "swallowed" in trouble.__name__ and service.proxy is not None:
        # libpq reads without a limit, so what was swallowed but confirmed
        # holds its place until the connection ends.
        service.proxy.cut()
    until(lambda: service.directory.stats().queries_running == 0)
    # Lookups are healed when there was none that failed for a second.
    until(lambda: service.find_new() and len(told(caplog)) == 4)
    assert all("reachable again" in line for line in told(caplog)[2:])
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize("trouble", [locked, missing])
def test_trouble_with_a_file_is_borne_and_passes(
    sqlite: servers.Database,
    trouble: Callable[..., contextlib.AbstractContextManager[None]],
) -> None:
    service = Service(sqlite)
    try:
        assert service.find(0) is not None
        with trouble(None, service):
            service.wait_until_stale()
            serves_what_it_knows(service)
            refuses_what_it_does_not_know(service)
            holds_back_a_crowd(service)
        heals(service)
        until(lambda: service.directory.stats().queries_running == 0)
    finally:
        service.close()


def test_the_cells_locked_alone_is_trouble_for_what_is_not_remembered(
    server: PrivateDatabaseServer, service: Service
) -> None:
    """The query for an instance reads its cell's UUID too."""
    statement = {
        "mysql": "LOCK TABLES cell_mappings WRITE",
        "postgresql": "LOCK TABLE cell_mappings IN ACCESS EXCLUSIVE MODE",
    }[service.kind]
    with service.owner.connect() as connection:
        connection.exec_driver_sql(statement)
        service.wait_until_stale()
        serves_what_it_knows(service)
        refuses_what_it_does_not_know(service)
        if service.kind == "mysql":
            connection.exec_driver_sql("UNLOCK TABLES")
    heals(service)


def test_an_id_used_again_leads_to_its_new_cell_at_once(
    server: PrivateDatabaseServer, patient: Service
) -> None:
    reuse_an_id(patient)


def test_an_id_used_again_leads_to_its_new_cell_at_once_in_a_file(
    sqlite: servers.Database,
) -> None:
    service = Service(sqlite, timeout=PATIENCE)
    try:
        reuse_an_id(service)
    finally:
        service.close()


def reuse_an_id(service: Service) -> None:
    # What is known stays current until the test is over.
    directory = make(
        service.store, workers=service.workers, lookup_timeout=PATIENCE
    )
    assert url_of(directory.find(KNOWN)) == "rabbit://u:p@host/1"
    service.execute(
        "DELETE FROM instance_mappings",
        "DELETE FROM cell_mappings",
        "INSERT INTO cell_mappings (id, uuid, name, transport_url) "
        f"VALUES (1, '{cell_uuid(2)}', 'new', 'rabbit://u:p@new/1')",
        "INSERT INTO instance_mappings (instance_uuid, cell_id, project_id) "
        f"VALUES ('{instance_uuid(5)}', 1, 'project')",
        "INSERT INTO instance_mappings (instance_uuid, cell_id, project_id) "
        f"VALUES ('{instance_uuid(6)}', 1, 'project')",
    )
    assert url_of(directory.find(instance_uuid(5), "POST")) == (
        "rabbit://u:p@new/1"
    )
    assert url_of(directory.find(instance_uuid(6))) == "rabbit://u:p@new/1"
    # No mapping leads to the cell that had the id before.
    assert directory.find(KNOWN, "POST") is None


def test_a_database_that_is_not_there_at_the_start(
    server: PrivateDatabaseServer, make_service: Callable[..., Service]
) -> None:
    service = make_service()
    fresh = make(
        service.store,
        workers=service.workers,
        lookup_timeout=TIMEOUT,
        lookup_concurrency=CONCURRENCY,
    )
    service.store.close()
    with stopped(server, service):
        for _ in range(3):
            with within(TIMEOUT + SLACK):
                with pytest.raises(exceptions.LookupFailed):
                    fresh.find(KNOWN)
    with within(TIMEOUT + SLACK):
        assert url_of(fresh.find(KNOWN)) == "rabbit://u:p@host/1"


def test_the_pool_is_full(
    server: PrivateDatabaseServer, make_service: Callable[..., Service]
) -> None:
    """All connections are with queries that hang."""
    service = make_service(max_pool_size=1, max_overflow=0, pool_timeout=1)
    with locked(server, service):
        service.wait_until_stale()
        serves_what_it_knows(service)
        refuses_what_it_does_not_know(service)
        holds_back_a_crowd(service)
    heals(service)
    until(lambda: service.directory.stats().queries_running == 0)
    # One connection, and no more queries out than that serves in turn.
    threads = [threading.Thread(target=service.find_new) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert service.directory.stats().queries_running == 0


# Troubles that no request should notice.


def test_connections_that_a_failover_killed_harm_no_request(
    patient: Service,
) -> None:
    for _ in range(3):
        patient.database.kill_connections()
        until(lambda: not patient.database.connections())
        assert patient.find_new() is not None
        patient.directory.refresh()


def test_connections_that_were_reset_harm_no_request(patient: Service) -> None:
    assert patient.proxy is not None
    for _ in range(3):
        patient.proxy.cut()
        until(lambda: not patient.database.connections())
        assert patient.find_new() is not None
        patient.directory.refresh()


def test_connections_that_were_idle_for_too_long_harm_no_request(
    server: PrivateDatabaseServer, patient: Service
) -> None:
    server.end_idle_connections()
    try:
        patient.database.kill_connections()
        for _ in range(2):
            assert patient.find_new() is not None
            # The server ends it, after its wait_timeout.
            until(lambda: not patient.database.connections())
        assert patient.find_new() is not None
        patient.directory.refresh()
    finally:
        server.reset()


def test_a_server_that_takes_no_changes_harms_no_request(
    server: PrivateDatabaseServer, patient: Service
) -> None:
    server.allow_reading_only()
    try:
        for _ in range(2):
            assert patient.find_new() is not None
            patient.directory.refresh()
            patient.database.kill_connections()
    finally:
        server.reset()


def test_a_connection_killed_in_the_middle_fails_its_request_alone(
    server: PrivateDatabaseServer, service: Service
) -> None:
    errors: list[exceptions.LookupFailed] = []

    def find() -> None:
        try:
            service.find_new()
        except exceptions.LookupFailed as error:
            errors.append(error)

    service.directory.refresh()
    with locked(server, service):
        thread = threading.Thread(target=find)
        thread.start()
        until(lambda: service.directory.stats().queries_running)
        until(lambda: len(service.database.connections()) >= 2)
        kill_readers(service)
        thread.join(PATIENCE)
    assert len(errors) == 1
    heals(service)


def kill_readers(service: Service) -> None:
    """Let the server end the connections of the directory alone."""
    column, table, name, kill = {
        "mysql": ("id", "information_schema.processlist", "user", "KILL {}"),
        "postgresql": (
            "pid",
            "pg_stat_activity",
            "usename",
            "SELECT pg_terminate_backend({})",
        ),
    }[service.kind]
    rows = service.database.administer(
        f"SELECT {column} AS id FROM {table} WHERE {name} = :user", user=USER
    )
    for row in rows:
        service.database.administer(kill.format(row["id"]))
