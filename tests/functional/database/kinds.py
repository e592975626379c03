# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Which databases there are to test with: each server, with tables of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests import servers
from tests.functional.database import schema
from tests.functional.database.engines import migrate

TABLES = {"migrated": migrate, "nova": schema.create_nova_tables}
KINDS = tuple(servers.DATABASES)
SERVERS = tuple(kind for kind in KINDS if kind != "sqlite")


def params(
    kinds: Iterable[str] = KINDS, tables: Iterable[str] = TABLES
) -> list[Any]:
    """What the fixture of the API database is parametrized with."""
    return [
        pytest.param(
            (kind, of),
            id=f"{kind}-{of}",
            marks=() if kind == "sqlite" else pytest.mark.servers,
        )
        for kind in kinds
        for of in tables
    ]


def only(
    kinds: Iterable[str] = KINDS, tables: Iterable[str] = TABLES
) -> pytest.MarkDecorator:
    """For a test of what the others do not have."""
    return pytest.mark.parametrize(
        "_api_database", params(kinds, tables), indirect=True, scope="session"
    )
