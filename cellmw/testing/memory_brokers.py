# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Message brokers that live in this process, for tests.

A :class:`Broker` has one address: hosts, ports and a virtual host.  It keeps
its queues as RabbitMQ does for oslo.messaging: a topic queue outlives its
server, a fanout queue does not, and a message without a bound queue is
dropped.  A test can make it fail, and read its counters.

Brokers belong to the process: :func:`broker` gives the one of an address,
:func:`brokers` all of them, and :func:`forget_brokers` begins anew.  The
driver's side is in :mod:`cellmw.testing.memory_clients`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable

import oslo_messaging
from oslo_config import cfg

from cellmw.redaction import Secret
from cellmw.testing.memory_clients import Client
from cellmw.testing.memory_state import Address, State

DEFAULT_PORT = 5672
DEFAULT_HOST = "localhost"
DEFAULT_VHOST = "/"


@dataclasses.dataclass(frozen=True, slots=True)
class BrokerStats:
    """A broker's counters at one moment.

    :ivar transports: transports made for it and not cleaned up
    :ivar connections: connections that are open: one for a transport that
        has sent, one more if it has called, and one for each server
    :ivar consumers: servers and listeners that take messages
    :ivar waiting: messages in queues that no server takes them from
    :ivar published: messages taken from senders; replies are not counted
    :ivar dropped: those of them that no queue was bound for
    :ivar replies: replies and heartbeats taken from servers
    """

    transports: int
    transports_opened: int
    transports_closed: int
    connections: int
    connections_opened: int
    connections_closed: int
    consumers: int
    waiting: int
    published: int
    dropped: int
    replies: int


class Broker:
    """One broker of this process.  Made by :func:`broker`.  Thread-safe.

    The methods that break it work on transports that are already open as
    well, and last until :meth:`heal`.
    """

    def __init__(
        self, address: Address, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.address = address
        self._state = State(address, clock)

    def __repr__(self) -> str:
        return f"<memory broker {self.address}>"

    # To look at

    def stats(self) -> BrokerStats:
        """The counters now."""
        state = self._state
        with state.lock:
            state.routing.expire(state.clock())
            counts = state.counts
            transports = len(state.clients)
            queues = state.routing.queues.values()
            return BrokerStats(
                transports=transports,
                transports_opened=transports + counts.transports_closed,
                transports_closed=counts.transports_closed,
                connections=(
                    counts.connections_opened - counts.connections_closed
                ),
                connections_opened=counts.connections_opened,
                connections_closed=counts.connections_closed,
                consumers=len(state.consumers),
                waiting=sum(len(queue.messages) for queue in queues),
                published=counts.published,
                dropped=counts.dropped,
                replies=counts.replies,
            )

    def queues(self) -> dict[str, int]:
        """How many messages wait in each queue, reply queues included."""
        state = self._state
        with state.lock:
            state.routing.expire(state.clock())
            queues = state.routing.queues.values()
            found = {queue.name: len(queue.messages) for queue in queues}
            return found | dict.fromkeys(state.routing.replies, 0)

    def open_transports(self) -> frozenset[int]:
        """The numbers of the transports that are not cleaned up.

        A number is unique in the process.
        """
        with self._state.lock:
            return frozenset(self._state.clients)

    def faults_met(self) -> frozenset[str]:
        """The faults that a sender has run into, by their methods' names.

        Since the broker was made; :meth:`heal` does not reset it.
        """
        with self._state.lock:
            return frozenset(self._state.faults.met)

    # To break

    def refuse(self) -> None:
        """Refuse connections and cut those that are open.

        As with RabbitMQ, a cast with ``retry=0`` fails, with
        MessageDeliveryFailure on a transport that has sent before and
        kombu's OperationalError on one that has not; a cast with
        ``retry=None``, a transport's first call and a server that starts
        are held until :meth:`heal`; a reply that is awaited does not come
        before that.
        """
        self._begin(refusing=True)

    def hang(self) -> None:
        """Take connections and messages, and answer nothing.

        Senders are held until :meth:`heal`, whatever their ``retry``; the
        message is delivered then.
        """
        self._begin(hanging=True)

    def lose_confirms(self) -> None:
        """Deliver each message, and fail the sender all the same.

        With ``retry=0`` that is a MessageDeliveryFailure; with anything
        else the sender sends the message a second time, as the RabbitMQ
        driver does.
        """
        self._begin(losing_confirms=True)

    def require_credentials(self, username: str | None, password: str) -> None:
        """Refuse other credentials with amqp's AccessRefused.

        Open connections stay open.  After :meth:`heal` the broker accepts
        all credentials.
        """
        with self._state.lock:
            self._state.faults.credentials = (username, Secret(password))

    def hold_closing(self) -> None:
        """Hold the ``cleanup()`` of each transport until :meth:`heal`."""
        self._begin(holding_closing=True)

    def heal(self) -> None:
        """End each fault.  Held senders go on."""
        state = self._state
        with state.lock:
            state.faults.end()
            held, state.held_replies = state.held_replies, []
            for reply in held:
                state.routing.reply(reply)
            state.changed.notify_all()

    def _begin(self, **faults: bool) -> None:
        with self._state.lock:
            for name, value in faults.items():
                setattr(self._state.faults, name, value)

    # The transports' side

    def attach(self, username: str | None, password: str | None) -> Client:
        """The driver's side of a new transport.  Opens no connection."""
        return Client(self._state, username, password)


_known: dict[Address, Broker] = {}


def address_of(url: oslo_messaging.TransportURL) -> Address:
    """The broker that a transport URL names.

    Without a host it is ``localhost``, without a port 5672, without a
    virtual host ``/``, as for RabbitMQ.  Credentials and query do not count.
    """
    hosts = frozenset(
        (
            (host.hostname or DEFAULT_HOST).lower(),
            host.port or DEFAULT_PORT,
        )
        for host in url.hosts
    )
    return Address(
        hosts or frozenset({(DEFAULT_HOST, DEFAULT_PORT)}),
        url.virtual_host or DEFAULT_VHOST,
    )


def broker_at(address: Address) -> Broker:
    """The broker of an address, made on first use."""
    # One operation of the dictionary, so that no lock is inherited by fork.
    found = _known.get(address)
    return found or _known.setdefault(address, Broker(address))


def broker(
    host: str, vhost: str = DEFAULT_VHOST, *, port: int = DEFAULT_PORT
) -> Broker:
    """The broker of a host and virtual host, made on first use."""
    hosts = frozenset({(host.lower(), port)})
    return broker_at(Address(hosts, vhost or DEFAULT_VHOST))


def broker_of(url: str) -> Broker:
    """The broker that ``cellmw-memory://...`` names."""
    parsed = oslo_messaging.TransportURL.parse(cfg.ConfigOpts(), url)
    return broker_at(address_of(parsed))


def brokers() -> list[Broker]:
    """The brokers that were named in this process so far."""
    return list(_known.values())


def forget_brokers() -> None:
    """Heal and forget all brokers, with their queues.

    Transports that are open keep their old brokers.
    """
    for known in brokers():
        known.heal()
    _known.clear()


# A forked child may inherit locked locks, and its parent's servers do not
# run in it.  So it begins with no brokers.
os.register_at_fork(after_in_child=_known.clear)
