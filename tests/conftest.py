# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Fixtures that all tests share, and the checks that are always on."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from urllib import parse

import pytest

from cellmw import runtime
from tests import servers, threads
from tests.proxy import Proxy

# Canaries: passwords that are found wherever they get out.
pytest_plugins = ["tests.canary", "tests.canary_plugin"]

# How long a thread that was told to end may take for it, in seconds.
_THREADS_END_WITHIN = 5.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="run the long forms of tests as well (marked full)",
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    for item in items:
        for marker in item.iter_markers("leaves_threads"):
            if not marker.args:
                raise pytest.UsageError(
                    f"{item.nodeid}: leaves_threads needs its reason"
                )
    if config.getoption("--full"):
        return
    long = [item for item in items if item.get_closest_marker("full")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_collection_finish() -> None:
    """Keep modules and test items out of each later garbage collection.

    Many tests collect garbage.  Scanning what lives as long as the run would
    take most of their time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_thread_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No thread that a test starts outlives it by much."""
    before = threading.enumerate()
    yield
    if request.node.get_closest_marker("leaves_threads"):
        return
    left = threads.left_since(before, within=_THREADS_END_WITHIN)
    if left:
        pytest.fail(
            f"the test has left threads behind:\n{threads.describe(left)}",
            pytrace=False,
        )


@pytest.fixture(autouse=True)
def _nothing_left_open(_no_thread_left: None) -> Iterator[None]:
    """Every transport that a filter opened is closed once, none is leased.

    Shuts down what the test has loaded, before threads are counted.
    """
    yield
    problems = []
    for known in runtime.registry():
        process = known.current
        if process is None or process.pid != os.getpid():
            runtime.registry().discard(known)
            continue
        leased = known.close(timeout=5.0)
        total = process.pool.stats().total
        if leased:
            problems.append(f"{leased} transports are still leased")
        elif total.opened != total.closed and not process.closer.hanging:
            problems.append(
                f"{total.opened} transports opened, {total.closed} closed"
            )
    if problems:
        pytest.fail("; ".join(problems), pytrace=False)


@pytest.fixture(scope="session")
def broker() -> Iterator[servers.Broker]:
    """The RabbitMQ that all tests share.  Never stop it."""
    broker = servers.shared_broker()
    yield broker
    broker.sweep(all_of_them=True)


@pytest.fixture
def make_vhost(
    broker: servers.Broker,
) -> Iterator[Callable[[], servers.Vhost]]:
    """A function that gives a new vhost of the shared broker each time."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(broker.vhost())


@pytest.fixture
def vhost(make_vhost: Callable[[], servers.Vhost]) -> servers.Vhost:
    """A vhost of the shared broker."""
    return make_vhost()


@pytest.fixture(scope="session")
def _session_broker() -> Iterator[servers.PrivateBroker]:
    with servers.private_broker() as private:
        yield private


@pytest.fixture
def private_broker(
    _session_broker: servers.PrivateBroker,
) -> Iterator[servers.PrivateBroker]:
    """A RabbitMQ that the test may kill, pause and starve.

    It is the same one for all tests of a run, healed after each; what a
    test needs on it, a vhost of its own above all, it makes itself.
    """
    _session_broker.start()
    yield _session_broker
    _session_broker.heal()


@pytest.fixture
def mariadb() -> Iterator[servers.Database]:
    """An empty database on MariaDB."""
    with servers.mariadb_database() as database:
        yield database


@pytest.fixture
def postgresql() -> Iterator[servers.Database]:
    """An empty database on PostgreSQL."""
    with servers.postgresql_database() as database:
        yield database


@pytest.fixture
def sqlite() -> Iterator[servers.Database]:
    """A new SQLite file."""
    with servers.sqlite_database() as database:
        yield database


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("mariadb", marks=pytest.mark.servers),
        pytest.param("postgresql", marks=pytest.mark.servers),
    ]
)
def database(request: pytest.FixtureRequest) -> Iterator[servers.Database]:
    """An empty database, of each kind in turn."""
    with servers.DATABASES[request.param]() as database:
        yield database


@pytest.fixture
def make_proxy() -> Iterator[Callable[[str], Proxy]]:
    """A function that puts a proxy before the server that a URL names."""
    with contextlib.ExitStack() as stack:

        def make(url: str) -> Proxy:
            parts = parse.urlsplit(url)
            assert parts.hostname is not None
            assert parts.port is not None
            proxy = Proxy(parts.hostname, parts.port)
            return stack.enter_context(proxy)

        yield make
