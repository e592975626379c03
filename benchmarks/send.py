# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A message through the package, beside one on a bare transport.

Casts and calls on a real RabbitMQ: through ``mq_connection``, with
``rpc.get_client``, and on a bare transport of oslo.messaging with a client
that is kept.  The three take turns in each setting: so many threads send, each
in a request of its own, while others compute.  The broker is a private one,
reached plainly and over TLS; whoever answers calls is a process of its own.

For each setting it prints ratios to the bare transport: of the median time of
a message and of the time of a round divided by its messages, each with its
quartiles, and of the time that one message in a hundred takes or more.  A
ratio over its bound is marked with ``*``.  Where nobody computes, the last
column compares the processor time, which other processes disturb the least.

Apart from these it compares with a transport that is made for each message.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import kombu
import oslo_messaging

import cellmw
from benchmarks import _crowd, _measure
from cellmw import rpc, runtime
from tests import servers
from tests.faults import hosts
from tests.faults.outage import Child
from tests.functional import stack

SERVERS = {"call": hosts.SERVER, "cast": "nobody"}
CONTEXT: dict[str, Any] = {"user_id": "user"}
# Of a message's time, and of p99.
BOUNDS = {"cast": 0.95, "call": 1.0}
P99 = 1.1
# How many times as long as ours a transport for each message takes.
EACH_ITS_OWN = {"cast": 13.0, "call": 10.0}
# What is measured over TLS where nothing else is asked for.
OVER_TLS = ((1, 0), (16, 0))


class Context(dict[str, Any]):
    """A context that is a dict, as it is sent."""

    mq_connection: Any = None
    cell_uuid: str | None = None


def sender(client: Any, context: Any, kind: str) -> _crowd.Send:
    prepared = client.prepare(server=SERVERS[kind], timeout=30)
    return functools.partial(
        getattr(prepared, kind), context, "reboot_instance", number=1
    )


def keep_what_is_cast(url: str) -> None:
    """Make the queue that nobody reads; it keeps the last few messages."""
    exchange = kombu.Exchange("openstack", type="topic", durable=False)
    key = f"{stack.TOPIC}.{SERVERS['cast']}"
    queue = kombu.Queue(
        key, exchange, routing_key=key, durable=False, max_length=1000
    )
    with kombu.Connection(url.replace("rabbit://", "amqp://")) as connection:
        queue(connection.default_channel).declare()


class Ways:
    """The ways to send to one vhost over one of the broker's ports."""

    def __init__(self, url: str, own: contextlib.ExitStack) -> None:
        self.url = url
        self._conf = stack.configuration()
        database = own.enter_context(servers.sqlite_database())
        api = stack.ApiDatabase(database.url)
        own.callback(api.close)
        instance = api.add_instance(api.add_cell(url))
        self._path = f"/servers/{instance}/action"
        served = cellmw.filter_factory(
            {},
            oslo_config_config=self._conf,
            api_database_connection=database.url,
        )
        own.callback(runtime.registry().close)
        self._served = served(self._application)
        transport = oslo_messaging.get_rpc_transport(self._conf, url)
        own.callback(transport.cleanup)
        self._bare = oslo_messaging.get_rpc_client(transport, stack.target())
        self._ours = rpc.get_client(stack.target())

    def _application(self, environ: dict[str, Any], start: Any) -> list[bytes]:
        environ["benchmark"](environ["cellmw.context"])
        start("200 OK", [])
        return []

    def _request(self, handler: Callable[[Any], None]) -> None:
        environ = stack.environ_of(self._path, "POST")
        environ["cellmw.context"] = Context(CONTEXT)
        environ["benchmark"] = handler
        self._served(environ, lambda *args: lambda data: None)

    def bare(self, kind: str, loop: Callable[[_crowd.Send], None]) -> None:
        loop(sender(self._bare, CONTEXT, kind))

    def handle(self, kind: str, loop: Callable[[_crowd.Send], None]) -> None:
        def handler(context: Any) -> None:
            client = oslo_messaging.get_rpc_client(
                context.mq_connection, stack.target()
            )
            loop(sender(client, context, kind))

        self._request(handler)

    def client(self, kind: str, loop: Callable[[_crowd.Send], None]) -> None:
        self._request(lambda context: loop(sender(self._ours, context, kind)))

    def each_its_own(
        self, kind: str, loop: Callable[[_crowd.Send], None]
    ) -> None:
        """A transport and a client made for each message."""

        def send() -> None:
            transport = oslo_messaging.get_rpc_transport(self._conf, self.url)
            client = oslo_messaging.get_rpc_client(transport, stack.target())
            sender(client, CONTEXT, kind)()
            transport.cleanup()

        loop(send)


def compare(
    ways: Ways, label: str, kind: str, setting: _crowd.Setting, chosen: Any
) -> bool:
    """Print a row for each way; whether all bounds are met."""
    run = _crowd.Comparison(
        {
            "bare": functools.partial(ways.bare, kind),
            "mq_connection": functools.partial(ways.handle, kind),
            "get_client": functools.partial(ways.client, kind),
        },
        "bare",
        setting,
    )
    # Each hand-over between threads waits for those that compute.
    seconds = chosen.seconds * (1 + min(setting.busy, 1))
    run.run(chosen.rounds, seconds)
    bound = BOUNDS[kind]
    met = True
    for name in ("mq_connection", "get_client"):
        median, each, p99 = run.median(name), run.each(name), run.p99(name)
        limits = ((median.median, bound), (each.median, bound), (p99, P99))
        marks = ["*" if found > limit else " " for found, limit in limits]
        met = met and "*" not in marks
        print(
            f"{label:5}  {kind}  {setting.threads:7}  {setting.busy:4}  "
            f"{run.base_microseconds():7.0f}  {name:13}  "
            f"{median:.2f}{marks[0]}  {each:.2f}{marks[1]}  "
            f"{p99:4.2f}{marks[2]}  "
            f"{'-' if setting.busy else f'{run.processor(name):.2f}'}",
            flush=True,
        )
    return met


def compare_with_each_its_own(ways: Ways, kind: str, rounds: int) -> bool:
    run = _crowd.Comparison(
        {
            "ours": functools.partial(ways.handle, kind),
            "each its own": functools.partial(ways.each_its_own, kind),
        },
        "ours",
        _crowd.Setting(1, 0),
    )
    run.run(rounds, 0.3)
    ratio = run.median("each its own")
    print(f"{kind}, a transport for each message / ours: {ratio:.1f}")
    return _measure.verdict(
        f"{kind}, ours / a transport for each message",
        1 / ratio.median,
        1 / EACH_ITS_OWN[kind],
    )


def settings(chosen: Any, tls: bool) -> list[_crowd.Setting]:
    asked = list(
        itertools.product(chosen.threads or (1, 4, 16, 32), chosen.busy)
    )
    if tls and not chosen.threads:
        asked = [pair for pair in asked if pair in OVER_TLS]
    return [_crowd.Setting(*pair) for pair in asked]


def run(ways: Ways, label: str, chosen: Any) -> bool:
    met = [
        compare(ways, label, kind, setting, chosen)
        for kind in chosen.kind
        for setting in settings(chosen, label == "TLS")
    ]
    return all(met)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.25,
        help="how long one way has in a round; twice that beside busy threads",
    )
    parser.add_argument("--kind", nargs="*", default=["cast", "call"])
    parser.add_argument("--threads", type=int, nargs="*")
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--over", nargs="*", default=["plain", "TLS"])
    parser.add_argument(
        "--without-each",
        action="store_true",
        help="leave out the comparison with a transport for each message",
    )
    chosen = parser.parse_args()
    logging.disable()
    met = []
    with (
        servers.private_broker() as broker,
        broker.vhost() as vhost,
        contextlib.ExitStack() as children,
    ):
        host = Child("tests.faults.hosts", [vhost.url])
        children.callback(host.end)
        assert host.line() == "ready"
        keep_what_is_cast(vhost.url)
        print(
            f"bounds: cast {BOUNDS['cast']:.2f}, call {BOUNDS['call']:.2f}, "
            f"p99 {P99:.2f}\n"
            f"{'':5}  {'':4}  threads  busy  bare us  {'':13}  "
            f"{'median':20}  {'each':20}  {'p99':5}  processor"
        )
        for label in chosen.over:
            url = vhost.url if label == "plain" else broker.over_tls(vhost.url)
            with contextlib.ExitStack() as own:
                ways = Ways(url, own)
                met.append(run(ways, label, chosen))
                if label == "plain" and not chosen.without_each:
                    met += [
                        compare_with_each_its_own(ways, kind, chosen.rounds)
                        for kind in chosen.kind
                    ]
    return not all(met)


if __name__ == "__main__":
    raise SystemExit(main())
