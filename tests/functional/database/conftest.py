# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""API databases on each kind of server, with tables of ours and of Nova's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from tests import servers
from tests.functional.database import kinds
from tests.functional.database.engines import make_engine

_FILLED_BY_TESTS = ("host_mappings", "instance_mappings", "cell_mappings")


@pytest.fixture(scope="session", params=kinds.params())
def _api_database(
    request: pytest.FixtureRequest,
) -> Iterator[servers.Database]:
    kind, tables = request.param
    with servers.DATABASES[kind]() as database:
        kinds.TABLES[tables](database)
        yield database


@pytest.fixture
def api_database(
    _api_database: servers.Database,
) -> Iterator[servers.Database]:
    """A database with the two tables, which are empty."""
    yield _api_database
    engine = sa.create_engine(_api_database.url, poolclass=sa.NullPool)
    there = sa.inspect(engine).get_table_names()
    with engine.begin() as connection:
        for name in _FILLED_BY_TESTS:
            if name in there:
                connection.execute(sa.delete(sa.table(name)))


@pytest.fixture
def engine(api_database: servers.Database) -> Iterator[sa.Engine]:
    """The engine of an API database, for who may do everything."""
    engine = make_engine(api_database.url)
    yield engine
    engine.dispose()
