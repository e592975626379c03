# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A request for an instance that is not remembered, on MariaDB.

What the directory's ``find`` takes with an unsafe method, which asks each
time: the hand-over to the thread that asks, and back, included.  Beside it a
plain select on an engine of the same options as oslo.db makes it, the same on
an engine of SQLAlchemy's own, and the bare driver.

Nova is not needed here.  Its object layer was measured once, on another
machine, at 588 microseconds where the bare driver took 39; half of that
against the driver is the bound here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import sqlalchemy as sa
from oslo_config import cfg

from benchmarks import _measure
from cellmw.cells import engines, store
from cellmw.cells.tables import instance_mappings
from cellmw.workers import Workers
from tests import servers
from tests.directories import cell_uuid, instance_uuid, make
from tests.functional.database import schema

INSTANCES = 1000
NOVA = 588 / 39


def fill(database: servers.Database) -> None:
    schema.create_nova_tables(database)
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO cell_mappings (id, uuid, name, transport_url) "
                "VALUES (1, :uuid, 'cell-1', 'rabbit://u:p@host/1')"
            ),
            {"uuid": cell_uuid(1)},
        )
        connection.execute(
            sa.text(
                "INSERT INTO instance_mappings "
                "(instance_uuid, cell_id, project_id) VALUES (:uuid, 1, 'p')"
            ),
            [{"uuid": instance_uuid(n)} for n in range(INSTANCES)],
        )


def asking(
    ask: Callable[[str], object],
) -> Callable[[int], None]:
    uuids = [instance_uuid(number) for number in range(INSTANCES)]

    def way(count: int) -> None:
        for number in range(count):
            ask(uuids[number % INSTANCES])

    return way


def plain(engine: sa.Engine) -> Callable[[str], object]:
    statement = sa.select(instance_mappings.c.cell_id).where(
        instance_mappings.c.instance_uuid == sa.bindparam("uuid")
    )

    def ask(uuid: str) -> object:
        with engine.connect() as connection:
            return connection.execute(statement, {"uuid": uuid}).scalar()

    return ask


def bare(engine: sa.Engine) -> Callable[[str], object]:
    cursor = engine.raw_connection().cursor()

    def ask(uuid: str) -> object:
        cursor.execute(
            "SELECT cell_id FROM instance_mappings WHERE instance_uuid = %s",
            (uuid,),
        )
        return cursor.fetchone()

    return ask


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[])
    with servers.mariadb_database() as database:
        fill(database)
        engine = engines.make_engine(conf, database.url, timeout=5.0)
        ours = engines.make_engine(
            conf, database.url, timeout=5.0, for_reading=True
        )
        core = sa.create_engine(database.url)
        workers = Workers()
        directory = make(store.Store(lambda: ours), workers=workers)
        found = _measure.Rounds(
            {
                "find": asking(lambda uuid: directory.find(uuid, "POST")),
                "select": asking(plain(engine)),
                "core": asking(plain(core)),
                "driver": asking(bare(core)),
            }
        )
        found.run(options.rounds, options.count)
        workers.close()
        engine.dispose()
        ours.dispose()
        core.dispose()
    print("microseconds, median (quarters)")
    for name, what in (
        ("find", "find, not remembered"),
        ("select", "plain select, oslo.db"),
        ("core", "plain select, plain engine"),
        ("driver", "bare driver"),
    ):
        print(
            f"  {what:28} {found.microseconds(name):7.1f}   "
            f"find takes {found.ratio('find', name):.2f} times that"
        )
    return not all(
        [
            _measure.verdict(
                "find against a plain select on the same engine",
                found.ratio("find", "select").median,
                1.2,
            ),
            _measure.verdict(
                "find against the bare driver (half of Nova's object layer)",
                found.ratio("find", "driver").median,
                NOVA / 2,
            ),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
