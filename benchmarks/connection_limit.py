# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Throughput where the broker takes fewer connections than threads send.

Sixteen threads send to a vhost with ``max-connections`` 6: through
``mq_connection``, and on a bare transport kept open, each with a vhost of its
own, by turns.  Casts go to a queue that nobody reads; its length is compared
with what the senders were told.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable

import oslo_messaging

from benchmarks import _measure
from tests import servers
from tests.faults import limits
from tests.faults.service import Service
from tests.functional import stack

# Of what a bare transport delivers.
DELIVERED = 0.9

Way = Callable[[float], limits.Tally]


def measure(ways: dict[str, Way], rounds: int, seconds: float) -> bool:
    found: dict[str, list[limits.Tally]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 else reversed(list(ways)):
            found[name].append(ways[name](seconds))
    for name, tallies in found.items():
        tally = limits.Tally.of(tallies)
        print(f"{name}: longest {tally.longest:.2f} s, {dict(tally.outcomes)}")
    ratio = _measure.Spread.of(
        [
            mine.delivered / theirs.delivered
            for mine, theirs in zip(found["ours"], found["bare"], strict=True)
        ]
    )
    print(f"delivered, ours / bare: {ratio:.2f}")
    return _measure.verdict(
        "1 / delivered", 1 / max(ratio.median, 1e-9), 1 / DELIVERED
    )


def compare(kind: str, rounds: int, seconds: float) -> bool:
    with contextlib.ExitStack() as own:
        places = {}
        for name in ("ours", "bare"):
            vhost = own.enter_context(servers.rabbit_vhost())
            places[name] = limits.Limited(vhost)
            if kind == "call":
                own.enter_context(limits.served(vhost))
            places[name].limit()
        database = own.enter_context(servers.sqlite_database())
        service = Service(database)
        own.callback(service.close)
        cell = service.add_cell(places["ours"].vhost.url)
        transport = oslo_messaging.get_rpc_transport(
            stack.configuration(), places["bare"].vhost.url
        )
        own.callback(transport.cleanup)
        ways: dict[str, Way] = {
            "ours": lambda seconds: limits.ours(service, cell, kind, seconds),
            "bare": lambda seconds: limits.bare(transport, kind, seconds),
        }
        met = measure(ways, rounds, seconds)
        for name, place in places.items():
            print(
                f"{name}: {place.cast()} messages in the queue, "
                f"{place.reply_queues()} reply queues"
            )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0)
    chosen = parser.parse_args()
    # Each refusal is logged, by oslo.messaging as well.
    logging.disable()
    met = []
    for kind in ("cast", "call"):
        print(f"= {kind}")
        met.append(compare(kind, chosen.rounds, chosen.seconds))
    return not all(met)


if __name__ == "__main__":
    raise SystemExit(main())
