# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Many requests at once for one instance that nobody knows: one query.

On MariaDB, with a thread for each request.  With an unsafe method the answer
must not be older than the request, so that there are a few queries: one
that was under way, and one that all share who came meanwhile, and so on.
"""

from __future__ import annotations

import argparse
import threading
import time

from oslo_config import cfg

from benchmarks import _measure
from benchmarks.not_remembered import fill
from cellmw.cells import engines, store
from cellmw.cells.mapping import CellMapping
from cellmw.workers import Workers
from tests import servers
from tests.directories import instance_uuid, make


class Counted:
    """A source that counts what it is asked."""

    def __init__(self, source: store.Store) -> None:
        self._source = source
        self.cells_read = 0
        self.instances_read = 0

    def cells(self) -> list[CellMapping]:
        self.cells_read += 1
        return self._source.cells()

    def cell_of(self, instance_uuid: str) -> tuple[int, str | None] | None:
        self.instances_read += 1
        return self._source.cell_of(instance_uuid)


def stampede(
    source: store.Store, count: int, method: str
) -> tuple[Counted, float]:
    """The queries, and the seconds until the last request was served."""
    counted = Counted(source)
    workers = Workers()
    directory = make(counted, workers=workers, lookup_timeout=60.0)
    barrier = threading.Barrier(count + 1)

    def find() -> None:
        barrier.wait()
        assert directory.find(instance_uuid(1), method) is not None

    threads = [threading.Thread(target=find) for _ in range(count)]
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    workers.close()
    return counted, took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[])
    met = True
    with servers.mariadb_database() as database:
        fill(database)
        engine = engines.make_engine(conf, database.url, timeout=60.0)
        source = store.Store(lambda: engine)
        source.cell_of(instance_uuid(1))
        for method in ("GET", "POST"):
            results = [
                stampede(source, options.count, method)
                for _ in range(options.rounds)
            ]
            most = max(counted.instances_read for counted, _ in results)
            cells = max(counted.cells_read for counted, _ in results)
            took = _measure.Spread.of([took * 1e3 for _, took in results])
            print(
                f"{options.count} times {method} at once: at most {most} "
                f"queries for the instance and {cells} for the cells; "
                f"all served within {took:.0f} ms"
            )
            if method == "GET":
                met &= _measure.verdict("queries for an instance", most, 1)
                met &= _measure.verdict("queries for the cells", cells, 1)
        engine.dispose()
    return not met


if __name__ == "__main__":
    raise SystemExit(main())
