# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is remembered: the cost of finding it, and of keeping it.

A request for an instance that is remembered, with 10 cells and 100 instances
and with 10,000 cells and a million: through the filter, from its beginning to
the end of its response, no message sent, less what the same application takes
alone; and the directory's ``find`` alone.  Each request has a path of its own
making, as a server hands it over.

With a million known, the requests are first for 100 of them, as with few: what
that costs more is what the number costs.  Then they are for all in no order,
so that nothing of an instance is in the processor's caches: a lookup in a dict
of Python's own then takes several times as long, and ``dict`` shows how much
of the difference that is.

Then what the process grows by for each of the million.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import psutil
from oslo_config import cfg

import cellmw
from benchmarks import _measure
from cellmw.cells.mapping import CellMapping
from cellmw.cells.queries import Query
from cellmw.redaction import Secret
from tests.directories import Inline, cell_uuid, make

SMALL, LARGE = (10, 100), (10_000, 1_000_000)
VISITS = 2000


class Cells:
    """A database with so many cells, which knows no instance."""

    def __init__(self, count: int) -> None:
        self._rows = [
            CellMapping(
                id=number,
                uuid=cell_uuid(number),
                name=f"cell-{number}",
                transport_url=Secret(f"rabbit://u:p@host/{number}"),
            )
            for number in range(count)
        ]

    def cells(self) -> Iterable[CellMapping]:
        return self._rows

    def cell_of(self, instance_uuid: str) -> tuple[int, str | None] | None:
        raise AssertionError(f"{instance_uuid} is not remembered")


class Known:
    """A directory that remembers so many instances, and their UUIDs."""

    def __init__(self, cells: int, instances: int) -> None:
        self.directory = make(
            Cells(cells),
            workers=Inline(),
            cell_refresh_interval=1e6,
            instance_cache_ttl=1e6,
            instance_cache_size=instances,
        )
        self.directory.refresh()
        self.uuids: list[str] = []
        dice = random.Random(1)
        started_at = time.monotonic()
        for number in range(instances):
            instance = str(uuid.UUID(int=dice.getrandbits(128)))
            query = Query(instance, lambda query: None)
            query.started_at = started_at
            self.directory._instances.learn(query, number % cells)
            self.uuids.append(instance)
        assert self.directory.stats().instances == instances


class Context:
    """A context that is there already, as a service's own."""


def application(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b""]


def answered(status: str, headers: Any) -> None:
    """What a server does here is not measured."""


class Visits:
    """Requests for some of the instances that are known."""

    def __init__(self, known: Known, among: int, served: Any) -> None:
        self._known = known
        self._some = known.uuids[:: len(known.uuids) // among]
        self._served = served
        self._process = served._runtime.process()
        self._dice = random.Random(2)
        self.paths: list[str] = []

    def choose(self) -> None:
        self.paths = [
            f"/v2.1/servers/{instance}/action"
            for instance in self._dice.choices(self._some, k=VISITS)
        ]

    def through_filter(self, count: int) -> None:
        self._process.directory = self._known.directory
        self._serve(self._served)

    def alone(self, count: int) -> None:
        self._serve(application)

    def _serve(self, serve: Callable[[Any, Any], Any]) -> None:
        for path in self.paths:
            serve(
                {
                    "REQUEST_METHOD": "GET",
                    "PATH_INFO": path,
                    "cellmw.context": Context(),
                },
                answered,
            )

    def find(self, count: int) -> None:
        found = self._known.directory.find
        for path in self.paths:
            found(path[14:50], "GET")

    def look_up(self, count: int) -> None:
        found = self._known.directory._instances.recent.get
        for path in self.paths:
            found(path[14:50])

    def nothing(self, count: int) -> None:
        for path in self.paths:
            path[14:50]

    def ways(self) -> dict[str, Callable[[int], None]]:
        return {
            "filter": self.through_filter,
            "application": self.alone,
            "find": self.find,
            "dict": self.look_up,
            "nothing": self.nothing,
        }


# What is measured, and what of it is not ours.
ADDED = {"filter": "application", "find": "nothing", "dict": "nothing"}


def grown_by(make_it: Callable[[], Known]) -> tuple[Known, int]:
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    made = make_it()
    gc.collect()
    return made, process.memory_info().rss - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    # What belongs to the cells is not an instance's.
    _, of_cells = grown_by(lambda: Known(LARGE[0], 1))
    large, of_all = grown_by(lambda: Known(*LARGE))
    small = Known(*SMALL)
    # Not to be walked through before each measurement.
    gc.freeze()
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[])
    served = cellmw.filter_factory(
        {}, oslo_config_config=conf, api_database_connection="sqlite://"
    )(application)
    columns = {
        "few": Visits(small, SMALL[1], served),
        "many": Visits(large, SMALL[1], served),
        "many, in no order": Visits(large, LARGE[1], served),
    }
    found = _measure.Rounds(
        {
            f"{way}, {column}": do
            for column, visits in columns.items()
            for way, do in visits.ways().items()
        },
        clock=time.thread_time,
    )

    def choose() -> None:
        for visits in columns.values():
            visits.choose()

    found.run(options.rounds, VISITS, choose)
    print("microseconds of the processor's, added; median (quarters)")
    added = {}
    for column in columns:
        print(f"  {column}")
        for way, less in ADDED.items():
            more = found.without(f"{way}, {column}", f"{less}, {column}")
            added[way, column] = more
            spread = _measure.Spread.of([s * 1e6 for s in more])
            print(f"    {way:8} {spread:.2f}")
    ratio = _measure.Spread.of(
        [
            many / few
            for many, few in zip(
                added["filter", "many"], added["filter", "few"], strict=True
            )
        ]
    )
    print(f"many against few, through the filter: {ratio:.2f}")
    each = (of_all - of_cells) / LARGE[1]
    return not all(
        [
            _measure.verdict(
                "a request with many known against one with few",
                ratio.median,
                1.2,
            ),
            _measure.verdict("bytes for an instance", each, 250),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
