# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What the outage of one cell of twenty costs the other nineteen (S4).

Over HTTP, with 32 threads in the server and more clients than that, casts and
calls by turns.  For each kind of outage: what clients of the healthy cells had
before it, from its beginning to the moment at which the cell is taken as down
(``opening``), from then on (``during``), while it heals (``recovery``), and
afterwards; and the longest that a message to the dead cell held a thread.

``during`` and ``before`` are compared, for what else the machine does falls
upon both.  A round takes about five times ``--seconds`` for each kind.
"""

from __future__ import annotations

import argparse
import functools
import logging
import operator

from benchmarks import _measure
from tests import servers
from tests.faults import outage
from tests.proxy import Proxy

# Of what it was before.
THROUGHPUT, P99 = 0.95, 1.2


def show(kind: str, found: outage.Outage) -> None:
    for name, phase in found.phases.items():
        print(
            f"{kind:18}  {name:9}{phase.seconds:7.1f} s"
            f"{phase.throughput:8.1f}/s  p99 {phase.p99 * 1e3:7.1f} ms"
            f"  not answered: {len(phase.others)}"
        )
    print(
        f"{kind:18}  held by a cast {found.held['cast']:.2f} s, by a call "
        f"{found.held['call']:.2f} s; refused: {found.refused}",
        flush=True,
    )


def report(kind: str, found: list[outage.Outage], reply: float) -> bool:
    """All rounds together, as a row for the documentation.

    One in a hundred is a handful in a phase: of each round it is chance.
    """
    phases = {
        name: functools.reduce(
            operator.add, [one.phases[name] for one in found]
        )
        for name in ("before", "opening", "during", "after")
    }
    cells = [kind]
    cells += [
        f"{phase.throughput:.0f}/s, {phase.p99 * 1e3:.0f} ms"
        for phase in phases.values()
    ]
    before, during = phases["before"], phases["during"]
    kept = during.throughput / before.throughput
    slower = during.p99 / before.p99
    cast = max(one.held["cast"] for one in found)
    call = max(one.held["call"] for one in found)
    cells.append(f"{kept:.2f}; {slower:.2f}")
    cells.append(f"{cast:.2f} s, {call:.2f} s")
    print(" | ".join(cells))
    limit = outage.OPTIONS["send_timeout"]
    return all(
        [
            _measure.verdict(
                f"{kind}: 1 / throughput", 1 / kept, 1 / THROUGHPUT
            ),
            _measure.verdict(f"{kind}: p99", slower, P99),
            # What a busy machine adds to a wait is not the guard's.
            _measure.verdict(f"{kind}: held by a cast", cast, limit + 0.5),
            _measure.verdict(
                f"{kind}: held by a call", call, limit + reply + 0.5
            ),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=70.0)
    parser.add_argument("--reply", type=float, default=2.0)
    parser.add_argument("--client", choices=["ours", "plain"], default="ours")
    parser.add_argument("--kind", choices=outage.KINDS, action="append")
    chosen = parser.parse_args()
    kinds = chosen.kind or list(outage.KINDS)
    # Brokers are killed, which oslo.messaging tells about at length.
    logging.disable()
    found: dict[str, list[outage.Outage]] = {kind: [] for kind in kinds}
    with (
        servers.mariadb_database() as database,
        servers.private_broker() as broker,
        Proxy(broker.host, broker.port) as proxy,
        outage.Api(
            database,
            outage.Broken(broker, proxy),
            clients=(chosen.client,),
            rate=chosen.rate,
            reply=chosen.reply,
        ) as api,
    ):
        for _ in range(chosen.rounds):
            for kind in kinds:
                found[kind].append(api.outage(kind, chosen.seconds))
                show(kind, found[kind][-1])
    print(
        f"client {chosen.client}, {chosen.rounds} rounds of "
        f"{chosen.seconds:g} s together; kind | before | opening | during | "
        "after | during / before: throughput; p99 | held: cast, call"
    )
    missed = 0
    for kind in kinds:
        missed += not report(kind, found[kind], chosen.reply)
    return missed


if __name__ == "__main__":
    raise SystemExit(main())
