# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The longest that one message holds a request's thread.

For each state that a broker can be in: cold, on a transport that is new, and
warm, on one whose connections are open; casts and calls; plain and over TLS.
Several threads send two messages each.  Of a call that was delivered, the time
that it waited for its reply does not count.

What the senders were told is compared with what the broker took: "delivered"
arrived once, "not delivered" did not arrive, and nothing arrived twice.
"""

from __future__ import annotations

import argparse
import logging

from tests import servers
from tests.faults import trouble

# What a hold may take beyond ``send_timeout``, in seconds.
BEYOND = 0.25
VERDICTS = ("delivered", "no reply", "uncertain", "not delivered")
HEAD = (
    f"{'state':24}  {'':4}  {'':4}  {'':5}  {'longest':>8}  delivered  "
    "no reply  uncertain  not delivered  arrived"
)


def show(case: trouble.Case, found: trouble.Found) -> bool:
    """Print one row; whether it is as it should be."""
    counts = "  ".join(
        f"{found.verdicts[name]:{len(name)}}" for name in VERDICTS
    )
    in_time = found.longest <= trouble.SEND_TIMEOUT + BEYOND
    marks = ["" if in_time else "TOO LONG", *found.wrong]
    print(
        f"{case}  {found.longest:6.2f} s  {counts}  {found.arrived:7}  "
        f"{'; '.join(filter(None, marks))}".rstrip(),
        flush=True,
    )
    return in_time and not found.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", choices=trouble.STATES, action="append")
    parser.add_argument("--kind", choices=["cast", "call"])
    parser.add_argument("--warm", choices=["yes", "no"])
    parser.add_argument("--tls", choices=["yes", "no"])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--each", type=int, default=2)
    chosen = parser.parse_args()
    only: dict[str, object] = {
        name: value == "yes"
        for name in ("warm", "tls")
        if (value := getattr(chosen, name)) is not None
    }
    if chosen.kind:
        only["kind"] = chosen.kind
    # Brokers are killed, and oslo.messaging reports that at length.
    logging.disable()
    print(
        f"send_timeout {trouble.SEND_TIMEOUT:g} s; "
        f"{chosen.threads} threads, {chosen.each} messages each"
    )
    print(HEAD)
    bad = 0
    with (
        servers.private_broker() as broker,
        trouble.Site(broker, threads=chosen.threads, each=chosen.each) as site,
    ):
        for case in trouble.cases(chosen.state, **only):
            bad += not show(case, site.meet(case))
    print(f"rows that miss a bound or say what is not true: {bad}")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
