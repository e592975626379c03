# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``mode = observe``: what a request pays, whatever the API database does.

Requests for instances, with the filter and without, while the database works,
is stopped, hangs and is slow.  The handler does a little work, as much as an
API's fastest.  No state may cost a request more than a tenth of that at the
median, and what became of the lookups is printed.  Needs MariaDB.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import cellmw
from benchmarks import _measure
from cellmw import runtime
from tests import servers
from tests.functional import stack
from tests.proxy import Proxy

BOUND = 1.1
INSTANCES = 100
# Steps of the handler's work: about two milliseconds.
STEPS = 60_000

STATES: dict[str, Callable[[Proxy], None]] = {
    "works": Proxy.restore,
    "stopped": Proxy.refuse,
    "hangs": Proxy.swallow,
    "slow": lambda proxy: proxy.delay(2.0),
}


# Of a request: those that its thread worked, and those that it took.
_Seconds = tuple[float, float]


class Context:
    """The service's own."""

    cell_uuid: str | None = None


class Site:
    """An API with the filter and without."""

    def __init__(self, own: contextlib.ExitStack) -> None:
        database = own.enter_context(servers.mariadb_database())
        self.proxy = own.enter_context(Proxy(*database.address))
        api = stack.ApiDatabase(database.url)
        own.callback(api.close)
        self.cell = api.add_cell("cellmw-memory://one/")
        self._instances = api.add_instances([self.cell] * INSTANCES)
        make = cellmw.filter_factory(
            {},
            oslo_config_config=stack.configuration(),
            api_database_connection=database.url_via(self.proxy.address),
            mode="observe",
            lookup_timeout="1",
        )
        own.callback(runtime.registry().close)
        self.observed = make(self.application)

    def application(
        self, environ: dict[str, Any], start_response: Any
    ) -> list[bytes]:
        sum(range(STEPS))
        environ["cellmw.context"].cell_uuid = self.cell
        start_response("202 Accepted", [])
        return []

    def requests(self, application: Any, count: int) -> list[_Seconds]:
        """Seconds of each of so many requests."""
        took = []
        for number in range(count):
            instance = self._instances[number % INSTANCES]
            environ = stack.environ_of(f"/servers/{instance}/action", "POST")
            environ["cellmw.context"] = Context()
            began, worked = time.perf_counter(), time.thread_time()
            application(environ, lambda *args: lambda data: None)
            took.append(
                (time.thread_time() - worked, time.perf_counter() - began)
            )
        return took

    def counts(self) -> dict[str, int]:
        (made,) = runtime.registry()
        return made.process().observer.counts()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1500)
    chosen = parser.parse_args()
    met = []
    with contextlib.ExitStack() as own:
        site = Site(own)
        site.requests(site.observed, INSTANCES)
        for name, change in STATES.items():
            change(site.proxy)
            before = site.counts()
            took: dict[str, list[_Seconds]] = {"without": [], "with": []}
            for _ in range(chosen.requests // 50):
                took["without"] += site.requests(site.application, 50)
                took["with"] += site.requests(site.observed, 50)
            medians = {}
            for way, seconds in took.items():
                worked, waited = zip(*seconds, strict=True)
                medians[way] = statistics.median(worked)
                print(
                    f"database {name}, {way}: {medians[way] * 1e6:.0f} us of "
                    f"work, took {statistics.median(waited) * 1e6:.0f} us, "
                    f"at most {max(waited) * 1e3:.0f} ms"
                )
            counted = site.counts()
            print({k: v - before[k] for k, v in counted.items() if v})
            ratio = medians["with"] / medians["without"]
            met.append(_measure.verdict(f"database {name}", ratio, BOUND))
            site.proxy.restore()
            site.proxy.cut()
    return not all(met)


if __name__ == "__main__":
    raise SystemExit(main())
