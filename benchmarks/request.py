# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What the filter adds to a request that sends no message.

A request whose path names no instance, and one whose instance and cell are
remembered, each with a context already there: less what the application takes
alone, beside one ``get`` and ``put`` of oslo.messaging's own pool.  Then one
without a context, beside ``RequestContext.from_environ``, and the remembered
one with 32 threads at once.

The bounds in microseconds are for an idle machine; the ratios are not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from oslo_config import cfg

import cellmw
from benchmarks import _measure
from benchmarks.pool import LONGER, at_once, get_and_put
from cellmw import runtime
from tests import servers
from tests.functional import stack

NO_INSTANCE = "/v2.1/6f70656e737461636b20342065766572/servers/detail"


class Context:
    """A service's own."""

    mq_connection: Any = None
    cell_uuid: str | None = None


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    return [b""]


HEADERS = {
    "HTTP_X_IDENTITY_STATUS": "Confirmed",
    "HTTP_X_USER_ID": "user",
    "HTTP_X_PROJECT_ID": "project",
    "HTTP_X_ROLES": "member,reader",
}


def requests(
    served: Any, path: str, *, with_context: bool = True
) -> Callable[[int], None]:
    """So many requests for a path."""

    def way(count: int) -> None:
        # Each thread's own, as in a server.
        context = Context()
        environ: dict[str, object] = {
            "PATH_INFO": path,
            "REQUEST_METHOD": "GET",
            **HEADERS,
        }
        for _ in range(count):
            if with_context:
                environ["cellmw.context"] = context
            else:
                environ.pop("cellmw.context", None)
            served(environ, None)

    return way


def from_environ(count: int) -> None:
    environ = dict(HEADERS)
    for _ in range(count):
        cellmw.RequestContext.from_environ(environ)


def measure(served: Any, path: str, rounds: int, count: int) -> bool:
    requests(served, path)(1)
    run = _measure.Rounds(
        {
            "bare": requests(application, path),
            "no instance": requests(served, NO_INSTANCE),
            "remembered": requests(served, path),
            "no context": requests(served, NO_INSTANCE, with_context=False),
            "from_environ": from_environ,
            "get and put": get_and_put(),
        },
        clock=time.thread_time,
    )
    run.run(rounds, count)
    pool = statistics.median(run.seconds["get and put"])
    met = []
    print(f"get and put: {run.microseconds('get and put'):.2f} microseconds")
    for name, bound, most in (
        ("no instance", 0.5, 0.3),
        ("remembered", 3.0, 2.0),
    ):
        added = run.without(name, "bare")
        spread = _measure.Spread.of([one * 1e6 for one in added])
        print(f"{name}: {spread:.2f} microseconds added")
        median = statistics.median(added)
        met.append(_measure.verdict(name, median * 1e6, bound))
        met.append(
            _measure.verdict(f"{name} / get and put", median / pool, most)
        )
    ratio = run.ratio("no context", "from_environ")
    print(f"context made here / from_environ: {ratio:.2f}")
    met.append(_measure.verdict("context made here", ratio.median, 1.3))

    one = requests(served, path)
    crowd = _measure.Rounds({"one": one, "32": at_once(one)})
    crowd.run(rounds, count * LONGER)
    ratio = crowd.ratio("32", "one")
    print(f"remembered, 32 threads / one: {ratio:.2f}")
    met.append(_measure.verdict("32 threads", ratio.median, 1.5))
    return all(met)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--count", type=int, default=3200)
    chosen = parser.parse_args()
    conf: cfg.ConfigOpts = stack.configuration()
    with servers.sqlite_database() as database:
        api = stack.ApiDatabase(database.url)
        cell = api.add_cell("cellmw-memory://host/v")
        path = f"/v2.1/servers/{api.add_instance(cell)}"
        served = cellmw.filter_factory(
            {},
            oslo_config_config=conf,
            api_database_connection=database.url,
            cell_refresh_interval="3600",
            instance_cache_ttl="3600",
        )(application)
        try:
            met = measure(served, path, chosen.rounds, chosen.count)
        finally:
            runtime.registry().close()
            api.close()
    return not met


if __name__ == "__main__":
    raise SystemExit(main())
