# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Looking up the cell of an instance that is not remembered.

The store's lookup beside a plain select on the same engine, which it may
exceed by a fifth; beside the same through oslo.db's enginefacade and a mapped
class with its cell joined, as an object layer asks, of which it may be the
half; and beside the bare driver.  Each round measures all of them in turn, so
that what else the machine does falls upon all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from oslo_config import cfg
from oslo_context import context as oslo_context
from oslo_db.sqlalchemy import enginefacade
from sqlalchemy import orm

from cellmw.cells import engines, store
from cellmw.cells.tables import cell_mappings, instance_mappings, metadata
from tests import servers

INSTANCES = 1000


class _Base(orm.DeclarativeBase):
    metadata = metadata


class _Cell(_Base):
    __table__ = cell_mappings


class _Instance(_Base):
    __table__ = instance_mappings
    cell_id: orm.Mapped[int | None]
    cell = orm.relationship(_Cell)


@enginefacade.transaction_context_provider
class _Context(oslo_context.RequestContext):
    pass


def instance(number: int) -> str:
    return f"5f4b3a52-39d5-4c11-8f2b-{number % INSTANCES:012}"


def fill(engine: sa.Engine) -> None:
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            cell_mappings.insert(),
            {"id": 1, "uuid": instance(0), "transport_url": "rabbit://h/v"},
        )
        connection.execute(
            instance_mappings.insert(),
            [
                {
                    "instance_uuid": instance(number),
                    "cell_id": 1,
                    "project_id": "project",
                }
                for number in range(INSTANCES)
            ],
        )


def ways(
    url: str, own: contextlib.ExitStack
) -> dict[str, Callable[[str], int | None]]:
    """Each way to ask, by its name."""
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[])
    engine = engines.make_engine(conf, url)
    own.callback(engine.dispose)
    fill(engine)
    ours = store.Store(lambda: engine)

    def store_cell_id(uuid: str) -> int | None:
        found = ours.cell_of(uuid)
        return None if found is None else found[0]

    def plain(uuid: str) -> int | None:
        with engine.connect() as connection:
            found: int | None = connection.execute(
                sa.select(instance_mappings.c.cell_id).where(
                    instance_mappings.c.instance_uuid == uuid
                )
            ).scalar()
            return found

    facade = enginefacade.transaction_context()
    facade.configure(connection=url)
    own.callback(facade.dispose_pool)

    # oslo.db has no types.
    @facade.reader  # type: ignore[untyped-decorator]
    def mapped(context: Any, uuid: str) -> int | None:
        found: _Instance = (
            context.session.query(_Instance)
            .options(orm.joinedload(_Instance.cell))
            .filter(instance_mappings.c.instance_uuid == uuid)
            .first()
        )
        return found.cell_id

    driver = sa.create_engine(url).raw_connection()
    own.callback(driver.invalidate)

    def bare(uuid: str) -> int | None:
        cursor = driver.cursor()
        cursor.execute(
            "SELECT cell_id FROM instance_mappings WHERE instance_uuid = %s",
            (uuid,),
        )
        (found,) = cursor.fetchone() or (None,)
        driver.rollback()
        cursor.close()
        number: int | None = found
        return number

    return {
        "store": store_cell_id,
        "plain select, same engine": plain,
        "enginefacade and mapped class": lambda uuid: mapped(_Context(), uuid),
        "bare driver": bare,
    }


def measure(
    ways: dict[str, Callable[[str], int | None]], rounds: int, count: int
) -> dict[str, list[float]]:
    """Microseconds of one query, of each way in each round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, ask in ways.items():
            start = time.perf_counter()
            for asked in range(count):
                assert ask(instance(asked)) == 1
            took = (time.perf_counter() - start) / count * 1e6
            # The first round opens connections and compiles statements.
            if number:
                found[name].append(took)
    return found


def report(found: dict[str, list[float]], title: str) -> None:
    ours = found["store"]
    print(f"{title}\n{'':32}{'us':>8}{'from':>8}{'to':>8}{'store is':>10}")
    for name, times in found.items():
        ratio = statistics.median(
            mine / other for mine, other in zip(ours, times, strict=True)
        )
        print(
            f"{name:32}{statistics.median(times):8.1f}{min(times):8.1f}"
            f"{max(times):8.1f}{ratio:9.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    for kind in ("mariadb", "postgresql"):
        with (
            servers.DATABASES[kind]() as database,
            contextlib.ExitStack() as own,
        ):
            asked = ways(database.url, own)
            report(measure(asked, options.rounds, options.count), kind)


if __name__ == "__main__":
    main()
