# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Engines and tables for the tests of this folder."""

from __future__ import annotations

import sqlalchemy as sa
from oslo_config import cfg

from cellmw.cells import engines, migrations
from tests import servers


def make_engine(
    url: str, *, timeout: float | None = None, for_reading: bool = False
) -> sa.Engine:
    """An engine of this package's making."""
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[])
    return engines.make_engine(
        conf,
        url,
        timeout=timeout,
        enforce_foreign_keys=True,
        for_reading=for_reading,
    )


def migrate(database: servers.Database) -> None:
    """Make the tables as ``cellmw-manage db sync`` does."""
    engine = make_engine(database.url)
    migrations.sync(engine)
    engine.dispose()
