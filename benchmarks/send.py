# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Sending, on a real RabbitMQ, with all that protects a cell in place.

A cast and a call through ``mq_connection``, with a bare client and with
``rpc.get_client``: beside the same on a bare transport with a client that is
kept, and beside a transport that is made for each message and cleaned up.

Beside them stands what a hand-over to another thread and back costs on the
machine, and what a message does that is sent in the thread that it comes from,
without protection.

Who answers the calls is a process of its own, as a compute host is: in this
one its threads would take turns with those that send.  What is cast goes to a
queue that nobody reads.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import kombu
import oslo_messaging

import cellmw
from benchmarks import _measure
from cellmw import rpc, runtime
from cellmw.workers import Job, Workers
from tests import servers
from tests.faults import hosts
from tests.faults.outage import Child
from tests.functional import stack

# Who gets what.
SERVERS = {"call": hosts.SERVER, "cast": "nobody"}
METHOD = "get_console_output"
CONTEXT: dict[str, Any] = {"user_id": "user"}
BOUNDS = {"cast": (1.20, 13.0), "call": (1.06, 10.0)}


class Context(dict[str, Any]):
    """A context that is a dict, as it is sent."""

    mq_connection: Any = None
    cell_uuid: str | None = None


def sends(client: Any, context: Any, kind: str) -> Callable[[int], None]:
    method = getattr(client.prepare(server=SERVERS[kind], timeout=30), kind)

    def way(count: int) -> None:
        for number in range(count):
            method(context, METHOD, cell=number)

    return way


def in_one_thread(way: Callable[[int], None]) -> Callable[[int], None]:
    """As if no broker could ever hold a thread."""

    def start(self: Workers, job: Job) -> None:
        job.run()
        job.finish()

    def unprotected(count: int) -> None:
        with mock.patch.object(Workers, "start", start):
            way(count)

    return unprotected


def each_its_own(conf: Any, url: str, kind: str) -> Callable[[int], None]:
    """A transport and a client made for each message."""

    def way(count: int) -> None:
        for _ in range(count):
            transport = oslo_messaging.get_rpc_transport(conf, url)
            client = oslo_messaging.get_rpc_client(transport, stack.target())
            sends(client, CONTEXT, kind)(1)
            transport.cleanup()

    return way


def keep_what_is_cast(url: str) -> None:
    """Make the queue that nobody reads, as the driver would."""
    exchange = kombu.Exchange("openstack", type="topic", durable=False)
    key = f"{stack.TOPIC}.{SERVERS['cast']}"
    queue = kombu.Queue(key, exchange, routing_key=key, durable=False)
    with kombu.Connection(url.replace("rabbit://", "amqp://")) as connection:
        queue(connection.default_channel).declare()


def measure(
    conf: Any, url: str, context: Context, kind: str, chosen: Any
) -> bool:
    transport = oslo_messaging.get_rpc_transport(conf, url)
    bare = oslo_messaging.get_rpc_client(transport, stack.target())
    kept = oslo_messaging.get_rpc_client(context.mq_connection, stack.target())
    ours = rpc.get_client(stack.target())
    workers = Workers()

    def hand_over(count: int) -> None:
        for _ in range(count):
            workers.submit(bool).wait()

    try:
        run = _measure.Rounds(
            {
                "hand-over": hand_over,
                "bare": sends(bare, CONTEXT, kind),
                "mq_connection": sends(kept, CONTEXT, kind),
                "get_client": sends(ours, context, kind),
                "in one thread": in_one_thread(sends(kept, CONTEXT, kind)),
            }
        )
        run.run(chosen.rounds, chosen.count)
        slow = _measure.Rounds(
            {
                "mq_connection": sends(kept, CONTEXT, kind),
                "each its own": each_its_own(conf, url, kind),
            }
        )
        slow.run(chosen.rounds // 2, max(4, chosen.count // 20))
    finally:
        transport.cleanup()
        workers.close()
    most, least = BOUNDS[kind]
    print(f"{kind} on a bare transport: {run.microseconds('bare'):.0f} us")
    print(f"a hand-over and nothing else: {run.microseconds('hand-over'):.0f}")
    ratio = run.ratio("in one thread", "bare")
    print(f"{kind}, mq_connection without a hand-over / bare: {ratio:.2f}")
    met = []
    for name in ("mq_connection", "get_client"):
        ratio = run.ratio(name, "bare")
        print(f"{kind}, {name} / bare: {ratio:.2f}")
        met.append(_measure.verdict(f"{kind}, {name}", ratio.median, most))
    ratio = slow.ratio("mq_connection", "each its own")
    faster = slow.ratio("each its own", "mq_connection")
    print(f"{kind}, a transport for each / mq_connection: {faster:.1f}")
    met.append(
        _measure.verdict(
            f"{kind}, mq_connection / a transport for each",
            ratio.median,
            1 / least,
        )
    )
    return all(met)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--count", type=int, default=200)
    chosen = parser.parse_args()
    conf = stack.configuration()
    met: list[bool] = []
    with (
        servers.rabbit_vhost() as vhost,
        servers.sqlite_database() as database,
        contextlib.ExitStack() as own,
    ):
        host = Child("tests.faults.hosts", [vhost.url])
        own.callback(host.end)
        assert host.line() == "ready"
        keep_what_is_cast(vhost.url)
        api = stack.ApiDatabase(database.url)
        instance = api.add_instance(api.add_cell(vhost.url))

        def application(environ: dict[str, Any], start: Any) -> list[bytes]:
            context = environ["cellmw.context"]
            met.extend(
                measure(conf, vhost.url, context, kind, chosen)
                for kind in ("call", "cast")
            )
            return []

        served = cellmw.filter_factory(
            {},
            oslo_config_config=conf,
            api_database_connection=database.url,
        )(application)
        environ = stack.environ_of(f"/servers/{instance}/action", "POST")
        environ["cellmw.context"] = Context(CONTEXT)
        try:
            served(environ, lambda *args: lambda data: None)
        finally:
            runtime.registry().close()
            api.close()
    return not all(met)


if __name__ == "__main__":
    raise SystemExit(main())
