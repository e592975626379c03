# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What scrubbing costs a log record, and what the known secrets cost.

A record without a secret, written to a file that throws it away, with the
scrubbing factory in front and without it: with no cell known, with one and
with 1,000, each with a transport and a database URL whose passwords differ.
The same for an access line, for arguments in a dictionary, an object to be
shown, a URL without credentials, and an exception.

Then what the process grows by for each cell, and how long it takes to make
one known and to forget it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import time
import tracemalloc
import uuid
from collections.abc import Callable
from urllib.parse import quote

from benchmarks import _measure
from cellmw.redaction import KNOWN, Hold, Secret, install

LOG = logging.getLogger("kombu.benchmark")
CELL = str(uuid.UUID(int=7))
CELLS = 1000


class _Thing:
    def __str__(self) -> str:
        return "an object that is shown as text"


def plain() -> None:
    LOG.info(
        "Made a transport for cell %s (%s), %d of %d are open, %.3f ms",
        CELL,
        "cell-17",
        12,
        128,
        0.193,
    )


def dictionary() -> None:
    LOG.info(
        "Connected to %(hostname)s:%(port)s with client port %(client)s",
        {"hostname": "rabbit1.example.org", "port": 5672, "client": 40312},
    )


def shown() -> None:
    LOG.info("Serving %s", _Thing())


def link() -> None:
    LOG.info("Connecting to %s", "amqp://rabbit1.example.org:5672/cell-17")


def access() -> None:
    LOG.info(
        '%s - - [%s] "%s %s HTTP/1.1" %d %d "%s" "%s"',
        "10.20.30.40",
        "26/Nov/2026:22:40:11 +0000",
        "GET",
        f"/v2.1/servers/{CELL}?a=b",
        200,
        1422,
        "http://horizon.example.org/project/instances/",
        "python-novaclient keystoneauth1/5.6.0 CPython/3.11",
    )


def exception() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        LOG.exception("It failed")


KINDS: dict[str, Callable[[], None]] = {
    "text and numbers": plain,
    "an access line": access,
    "a dictionary": dictionary,
    "an object": shown,
    "a URL": link,
    "an exception": exception,
}


def _repeat(log: Callable[[], None]) -> Callable[[int], None]:
    def repeat(count: int) -> None:
        for _ in range(count):
            log()

    return repeat


def _with(
    factory: Callable[..., logging.LogRecord], log: Callable[[], None]
) -> Callable[[int], None]:
    repeat = _repeat(log)

    def run(count: int) -> None:
        logging.setLogRecordFactory(factory)
        repeat(count)

    return run


def secret_urls(number: int, *, odd: bool = False) -> tuple[Secret, Secret]:
    middle = "/@ü'" if odd else ""
    first, second = (
        quote(secrets.token_hex(8) + middle + secrets.token_hex(4), safe="")
        for _ in range(2)
    )
    return (
        Secret(f"rabbit://nova:{first}@rabbit{number}:5672/cell-{number}"),
        Secret(f"mysql+pymysql://nova:{second}@db{number}/nova_{number}"),
    )


def records(rounds: int, count: int) -> None:
    # Closed at the end of this.
    stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")
    )
    LOG.propagate = False
    LOG.setLevel(logging.DEBUG)
    LOG.addHandler(handler)
    install()
    scrubbing = logging.getLogRecordFactory()
    holds: list[Hold] = []
    for known in (0, 1, CELLS):
        while len(holds) < known:
            holds.append(KNOWN.hold(*secret_urls(len(holds))))
        print(f"a record without a secret, {known} cells known")
        for kind, log in KINDS.items():
            ways = {
                "plain": _with(logging.LogRecord, log),
                "scrubbed": _with(scrubbing, log),
            }
            found = _measure.Rounds(ways, clock=time.thread_time)
            found.run(rounds, count)
            added = [s * 1e6 for s in found.without("scrubbed", "plain")]
            print(
                f"  {kind:18} {found.ratio('scrubbed', 'plain'):.2f} times; "
                f"{found.microseconds('plain'):.1f} us plain, "
                f"{_measure.Spread.of(added):.1f} us more"
            )
    for hold in holds:
        hold.drop()
    stream.close()


def cells() -> None:
    for odd in (False, True):
        urls = [secret_urls(number, odd=odd) for number in range(CELLS)]
        began = time.thread_time()
        holds = [KNOWN.hold(*pair) for pair in urls]
        held = time.thread_time()
        for hold in holds:
            hold.drop()
        dropped = time.thread_time()
        tracemalloc.start()
        holds = [KNOWN.hold(*pair) for pair in urls]
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        for hold in holds:
            hold.drop()
        kind = "odd passwords" if odd else "passwords of letters and digits"
        print(
            f"a cell with two {kind}: "
            f"{(held - began) / CELLS * 1e6:.0f} us to hold, "
            f"{(dropped - held) / CELLS * 1e6:.0f} us to drop, "
            f"{grown / CELLS:.0f} bytes"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=1000)
    args = parser.parse_args()
    records(args.rounds, args.count)
    cells()


if __name__ == "__main__":
    main()
