# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Fixtures for tests that run the whole width of a request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from oslo_config import cfg

import cellmw
from cellmw import rpc, runtime, testing
from tests import servers
from tests.functional import stack


@pytest.fixture
def memory() -> Iterator[None]:
    """Memory brokers of the test's own; it leaves no transport open."""
    with testing.own_brokers(), testing.no_leaks():
        yield


@pytest.fixture
def runtimes(memory: None) -> Iterator[runtime.Registry]:
    """The runtimes of the filters that the test makes.

    At its end none of them has a lease, and each transport that was opened
    has been closed.
    """
    registry = runtime.registry()
    assert not len(registry), "another test has left a runtime"
    yield registry
    for broker in testing.brokers():
        # A test that failed may hold up the rest.
        broker.heal()
    problems = []
    for made in registry:
        leased = made.close(stack.SOON)
        total = made.process().pool.stats().total
        if leased or total.opened != total.closed:
            problems.append(f"{leased} leased, {total}")
    rpc.cleanup()
    assert not problems, problems


@pytest.fixture
def api_database(sqlite: servers.Database) -> Iterator[stack.ApiDatabase]:
    """An API database on SQLite, with the two tables and no row."""
    database = stack.ApiDatabase(sqlite.url)
    yield database
    database.close()


@pytest.fixture
def make_filter(
    runtimes: runtime.Registry, api_database: stack.ApiDatabase
) -> stack.MakeFilter:
    """Makes filters for the API database of the test, or another one.

    Those of one test share a configuration, unless they are given another.
    """
    shared = stack.configuration()

    def make(
        *,
        conf: cfg.ConfigOpts | None = None,
        database: str | None = None,
        **paste: Any,
    ) -> Callable[[Any], Any]:
        return cellmw.filter_factory(
            {},
            oslo_config_config=conf or shared,
            api_database_connection=database or api_database.url,
            **paste,
        )

    return make


@pytest.fixture
def serve(memory: None) -> Iterator[stack.Serve]:
    """Starts RPC servers, which end with the test."""
    with contextlib.ExitStack() as servers_:

        def start(
            url: str,
            host: stack.Host | None = None,
            *,
            server: str = "host",
            topic: str = stack.TOPIC,
        ) -> stack.Host:
            return servers_.enter_context(
                stack.serving(
                    url, host or stack.Host(url), server=server, topic=topic
                )
            )

        yield start


@pytest.fixture(
    params=[
        pytest.param(
            kind, marks=() if kind == "sqlite" else pytest.mark.servers
        )
        for kind in servers.DATABASES
    ]
)
def pair(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[servers.Database, servers.Database]]:
    """Two databases of one kind: where a cell's was, and where it is now."""
    make = servers.DATABASES[request.param]
    with make() as old, make() as new:
        for database, name in ((old, "old"), (new, "new")):
            engine = sa.create_engine(database.url, poolclass=sa.NullPool)
            with engine.begin() as connection:
                connection.execute(sa.text("CREATE TABLE here (name TEXT)"))
                connection.execute(
                    sa.text("INSERT INTO here VALUES (:name)"), {"name": name}
                )
        yield old, new
