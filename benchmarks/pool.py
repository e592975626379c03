# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Leasing a transport that is open: alone, and with 32 threads at once.

One acquire and release beside one ``get`` and ``put`` of oslo.messaging's own
pool of connections, which it may equal.  Then the cost of one operation where
32 threads do it at once, beside what it costs one thread: of our pool, which
may take half as much again, and for comparison of oslo.messaging's.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable

from oslo_messaging._drivers import pool as oslo_pool

from benchmarks import _measure
from tests.fakes import Rig, generation

THREADS = 32


class Connections(oslo_pool.Pool):
    """oslo.messaging's pool, of things that cost nothing to make."""

    def __init__(self) -> None:
        super().__init__(max_size=2 * THREADS)

    def create(self, retry: int | None = None) -> object:
        return object()


def get_and_put() -> Callable[[int], None]:
    """So many ``get`` and ``put`` of oslo.messaging's pool."""
    connections = Connections()
    connections.put(connections.get())

    def way(count: int) -> None:
        for _ in range(count):
            connections.put(connections.get())

    return way


def acquire_and_release(rig: Rig) -> Callable[[int], None]:
    """So many leases of one cell's transport."""
    wanted = generation(1)
    pool = rig.pool
    pool.acquire(wanted, timeout=1).release()

    def way(count: int) -> None:
        for _ in range(count):
            pool.acquire(wanted, timeout=1).release()

    return way


# So many times the operations where many threads do them: starting those is
# no part of an operation, and takes as long as a thousand of them.
LONGER = 20


def at_once(way: Callable[[int], None]) -> Callable[[int], None]:
    """The same number of operations, by many threads together."""

    def threaded(count: int) -> None:
        threads = [
            threading.Thread(target=way, args=(count // THREADS,))
            for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return threaded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--count", type=int, default=6400)
    chosen = parser.parse_args()
    met = []
    with Rig(clock=time.monotonic) as rig:
        ours, theirs = acquire_and_release(rig), get_and_put()
        alone = _measure.Rounds(
            {"ours": ours, "theirs": theirs}, clock=time.thread_time
        )
        alone.run(chosen.rounds, chosen.count)
        for name in ("ours", "theirs"):
            print(f"{name}: {alone.microseconds(name):.2f} microseconds")
        ratio = alone.ratio("ours", "theirs")
        print(f"acquire and release / get and put: {ratio:.2f}")
        met.append(_measure.verdict("acquire, release", ratio.median, 1.0))

        crowd = _measure.Rounds(
            {
                "ours": ours,
                "ours, 32": at_once(ours),
                "theirs": theirs,
                "theirs, 32": at_once(theirs),
            }
        )
        crowd.run(chosen.rounds, chosen.count * LONGER)
        ratio = crowd.ratio("ours, 32", "ours")
        print(f"32 threads / one: {ratio:.2f}")
        print(
            "the same of oslo.messaging's: "
            f"{crowd.ratio('theirs, 32', 'theirs'):.2f}"
        )
        met.append(_measure.verdict("32 threads", ratio.median, 1.5))
    return not all(met)


if __name__ == "__main__":
    raise SystemExit(main())
