# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A vhost whose broker takes few connections, and many threads that send.

RabbitMQ refuses each connection over the limit with NOT_ALLOWED (530), while
those that are open go on working.  :class:`Limited` owns the vhost, and what
counts the messages in it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import kombu
import oslo_messaging

from tests import servers
from tests.faults.outage import Child
from tests.faults.service import HOST, Service, plain_client
from tests.functional import stack

THREADS = 16
CONNECTIONS = 6
NOBODY = "nobody"

Send = Callable[[], object]


@dataclasses.dataclass
class Tally:
    """What senders were told, all of them together.

    :ivar outcomes: how many messages, by ``delivered`` or the error's class
    :ivar uncertain: of the errors, those that say "perhaps"
    :ivar longest: seconds that one message took
    """

    outcomes: collections.Counter[str]
    uncertain: int = 0
    longest: float = 0.0

    @property
    def delivered(self) -> int:
        return self.outcomes["delivered"]

    @classmethod
    def of(cls, tallies: Sequence[Tally]) -> Tally:
        """All of these together."""
        return cls(
            sum((one.outcomes for one in tallies), collections.Counter()),
            sum(one.uncertain for one in tallies),
            max((one.longest for one in tallies), default=0.0),
        )

    def __add__(self, other: Tally) -> Tally:
        return self.of([self, other])

    def note(self, error: Exception | None, seconds: float) -> None:
        self.outcomes[type(error).__name__ if error else "delivered"] += 1
        self.uncertain += getattr(error, "maybe_delivered", False)
        self.longest = max(self.longest, seconds)


class Limited:
    """A vhost with a limit on its connections.

    :ivar vhost: the vhost
    """

    def __init__(self, vhost: servers.Vhost) -> None:
        self.vhost = vhost
        exchange = kombu.Exchange("openstack", type="topic", durable=False)
        key = f"{stack.TOPIC}.{NOBODY}"
        queue = kombu.Queue(key, exchange, routing_key=key, durable=False)
        url = vhost.url.replace("rabbit://", "amqp://")
        with kombu.Connection(url) as connection:
            queue(connection.default_channel).declare()

    def limit(self, connections: int = CONNECTIONS) -> None:
        """From now on it takes so many connections beside those it has."""
        most = connections + len(self.vhost.connections())
        self.vhost.broker.ctl(
            "set_vhost_limits",
            "-p",
            self.vhost.name,
            json.dumps({"max-connections": most}),
        )

    def cast(self) -> int:
        """How many messages it holds for a host that does not exist."""
        return self.vhost.queues()[f"{stack.TOPIC}.{NOBODY}"]

    def reply_queues(self) -> int:
        return sum(name.startswith("reply_") for name in self.vhost.queues())


def crowd(
    seconds: float, body: Callable[[Tally, Callable[[], bool]], None]
) -> Tally:
    """Let :data:`THREADS` threads send for a while.

    :param body: what each does, until the function that it is given says that
        time is up
    """
    tallies = [Tally(collections.Counter()) for _ in range(THREADS)]
    over = threading.Event()
    threads = [
        threading.Thread(target=body, args=(tally, over.is_set))
        for tally in tallies
    ]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    over.set()
    for thread in threads:
        thread.join()
    return Tally.of(tallies)


def repeat(send: Send, tally: Tally, over: Callable[[], bool]) -> None:
    """Send one message after another, and note what becomes of each."""
    while not over():
        began = time.monotonic()
        error = None
        try:
            send()
        except Exception as caught:
            error = caught
        tally.note(error, time.monotonic() - began)


def bare(transport: Any, kind: str, seconds: float) -> Tally:
    """Through one transport of oslo.messaging's own, kept open."""
    client = oslo_messaging.get_rpc_client(transport, stack.target(), retry=0)
    send = _sender(client, {}, kind)
    return crowd(seconds, lambda tally, over: repeat(send, tally, over))


def ours(service: Service, cell: str, kind: str, seconds: float) -> Tally:
    """Through ``mq_connection``, in one request for each thread."""

    def request(tally: Tally, over: Callable[[], bool]) -> None:
        def handler(context: Any) -> None:
            send = _sender(plain_client(context), context, kind)
            repeat(send, tally, over)

        assert service.request(cell, handler).status_int == 200

    return crowd(seconds, request)


def _sender(client: Any, context: Any, kind: str) -> Send:
    server = {"cast": NOBODY, "call": HOST}[kind]
    method = getattr(client.prepare(server=server, timeout=5), kind)
    return lambda: method(context, "reboot_instance", number=1)


@contextlib.contextmanager
def served(vhost: servers.Vhost) -> Iterator[None]:
    """A host answers there, whose connections are all open."""
    host = Child("tests.faults.hosts", [vhost.url])
    try:
        assert host.line() == "ready"
        transport = oslo_messaging.get_rpc_transport(
            stack.configuration(), vhost.url
        )
        tally = bare(transport, "call", 0.5)
        transport.cleanup()
        assert tally.delivered == tally.outcomes.total()
        yield
    finally:
        host.end()
