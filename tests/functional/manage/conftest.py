# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Running ``cellmw-manage`` on a database of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from tests import servers
from tests.functional.database import schema
from tests.functional.manage.manage import Manage


@pytest.fixture
def manage(
    sqlite: servers.Database,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Manage:
    """The command, with a configuration file and tables that are empty."""
    # Width of a table, were the tests run in a terminal.
    monkeypatch.setenv("CLIFF_MAX_TERM_WIDTH", "0")
    schema.create_tables(sqlite)
    engine = sa.create_engine(sqlite.url, poolclass=sa.NullPool)
    return Manage(tmp_path, sqlite.url, engine, capsys)
