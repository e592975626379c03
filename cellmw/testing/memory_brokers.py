# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Message brokers that live in this process, for tests.

A :class:`Broker` is what one host, port and virtual host name.  It keeps its
queues as RabbitMQ does for oslo.messaging: a topic queue stays when its
server goes, a fanout queue goes with it, and what no queue is bound for is
dropped.  It can be made to fail, and counts what is opened and closed.

Brokers belong to the process: :func:`broker` gives the one of an address,
:func:`brokers` all of them, :func:`forget_brokers` begins anew.  A
:class:`Client` is the driver's side of one transport; it owns that
transport's connections.  A :class:`Consumer` is a listener's side; it owns
one connection.

There are no threads here.  Everything of a broker is guarded by its one
lock; nothing is called while it is held but what only appends to a queue.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable

import amqp.exceptions
import kombu.exceptions
import oslo_messaging
from oslo_config import cfg

from cellmw.redaction import Secret

DEFAULT_PORT = 5672
DEFAULT_HOST = "localhost"
DEFAULT_VHOST = "/"


class UsedAfterCleanup(oslo_messaging.MessagingException, AttributeError):
    """A transport was used after its ``cleanup()``.

    The RabbitMQ driver raises a bare AttributeError there.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """What tells one broker from another.

    Several hosts are one cluster, in whatever order they are named.
    """

    hosts: frozenset[tuple[str, int]]
    vhost: str

    def __str__(self) -> str:
        hosts = ",".join(f"{h}:{p}" for h, p in sorted(self.hosts))
        return f"{hosts}/{self.vhost}"


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


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """A reply, or a heartbeat, on its way to the caller."""

    queue: str
    call_id: str
    body: str


OnReply = Callable[["Reply | None"], None]


class Delivery:
    """A message on its way to one consumer."""

    __slots__ = ("body", "expires_at", "queue")

    def __init__(
        self, body: str, queue: _Queue, expires_at: float | None
    ) -> None:
        self.body = body
        self.queue = queue
        self.expires_at = expires_at


class _Queue:
    """A queue with the consumers that share it.  Needs the broker's lock."""

    __slots__ = ("consumers", "messages", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.messages: collections.deque[Delivery] = collections.deque()
        self.consumers: collections.deque[Consumer] = collections.deque()

    def push(self, delivery: Delivery) -> None:
        if self.consumers:
            consumer = self.consumers[0]
            self.consumers.rotate(-1)
            consumer.take(delivery)
        else:
            self.messages.append(delivery)

    def give_back(self, deliveries: list[Delivery]) -> None:
        """Put messages back in front, in their order."""
        if self.consumers:
            for delivery in deliveries:
                self.push(delivery)
        else:
            self.messages.extendleft(reversed(deliveries))

    def add(self, consumer: Consumer, now: float) -> None:
        self.expire(now)
        self.consumers.append(consumer)
        waiting, self.messages = self.messages, collections.deque()
        for delivery in waiting:
            self.push(delivery)

    def expire(self, now: float) -> None:
        self.messages = collections.deque(
            delivery
            for delivery in self.messages
            if delivery.expires_at is None or delivery.expires_at > now
        )


class Broker:
    """One broker of this process.  Made by :func:`broker`.  Thread-safe.

    The methods that break it work on transports that are already open as
    well, and last until :meth:`heal`.
    """

    def __init__(
        self, address: Address, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.address = address
        self._clock = clock
        self._lock = threading.Lock()
        # Tells those who are held that a fault or their transport is over.
        self._changed = threading.Condition(self._lock)
        self._queues: dict[str, _Queue] = {}
        self._bindings: dict[tuple[str, str], list[_Queue]] = {}
        self._reply_queues: dict[str, OnReply] = {}
        self._held_replies: list[Reply] = []
        self._clients: dict[int, Client] = {}
        self._consumers: set[Consumer] = set()
        self._credentials: tuple[str | None, Secret] | None = None
        self._refusing = False
        self._hanging = False
        self._losing_confirms = False
        self._holding_closing = False
        self._met: set[str] = set()
        self._catch_all: Consumer | None = None
        self._transports_closed = 0
        self._connections_opened = 0
        self._connections_closed = 0
        self._published = 0
        self._dropped = 0
        self._replies = 0

    def __repr__(self) -> str:
        return f"<memory broker {self.address}>"

    # To look at

    def stats(self) -> BrokerStats:
        """The counters now."""
        with self._lock:
            now = self._clock()
            for queue in self._queues.values():
                queue.expire(now)
            return BrokerStats(
                transports=len(self._clients),
                transports_opened=(
                    len(self._clients) + self._transports_closed
                ),
                transports_closed=self._transports_closed,
                connections=(
                    self._connections_opened - self._connections_closed
                ),
                connections_opened=self._connections_opened,
                connections_closed=self._connections_closed,
                consumers=len(self._consumers),
                waiting=sum(len(q.messages) for q in self._queues.values()),
                published=self._published,
                dropped=self._dropped,
                replies=self._replies,
            )

    def queues(self) -> dict[str, int]:
        """How many messages wait in each queue, reply queues included."""
        with self._lock:
            now = self._clock()
            for queue in self._queues.values():
                queue.expire(now)
            found = {q.name: len(q.messages) for q in self._queues.values()}
            return found | dict.fromkeys(self._reply_queues, 0)

    def open_transports(self) -> frozenset[int]:
        """The numbers of the transports that have not been cleaned up.

        A number is given once in a process.
        """
        with self._lock:
            return frozenset(self._clients)

    def faults_met(self) -> frozenset[str]:
        """The faults that some sender has run into, by their methods' names.

        Counted since the broker was made; :meth:`heal` does not reset it.
        """
        with self._lock:
            return frozenset(self._met)

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
        self._set(refusing=True)

    def hang(self) -> None:
        """Take connections and messages, and answer nothing.

        Senders are held until :meth:`heal`, whatever their ``retry``; the
        message is delivered then.
        """
        self._set(hanging=True)

    def lose_confirms(self) -> None:
        """Deliver each message, and fail the sender all the same.

        With ``retry=0`` that is a MessageDeliveryFailure; with anything
        else the sender sends the message a second time, as the RabbitMQ
        driver does.
        """
        self._set(losing_confirms=True)

    def require_credentials(self, username: str | None, password: str) -> None:
        """Let in who has these; others get amqp's AccessRefused.

        Connections that are open stay so.  Without this, and after
        :meth:`heal`, all are let in.
        """
        with self._lock:
            self._credentials = (username, Secret(password))

    def hold_closing(self) -> None:
        """Hold the ``cleanup()`` of each transport until :meth:`heal`."""
        self._set(holding_closing=True)

    def heal(self) -> None:
        """End each fault; those who are held go on."""
        with self._lock:
            self._refusing = self._hanging = False
            self._losing_confirms = self._holding_closing = False
            self._credentials = None
            held, self._held_replies = self._held_replies, []
            for reply in held:
                self._reply(reply)
            self._changed.notify_all()

    def _set(self, **faults: bool) -> None:
        with self._lock:
            for name, value in faults.items():
                setattr(self, f"_{name}", value)

    # The transports' side

    def attach(self, username: str | None, password: str | None) -> Client:
        """The driver's side of a new transport.  Opens no connection."""
        return Client(self, username, password)

    def _reply(self, reply: Reply) -> bool:
        deliver = self._reply_queues.get(reply.queue)
        if deliver is None:
            return False
        deliver(reply)
        return True

    def _wait_for_broker(
        self, client: Client, retry: int | None, failure: type[Exception]
    ) -> None:
        """Return when the broker answers.  Takes and leaves the lock held."""
        while True:
            client._check_open()
            if not (self._refusing or self._hanging):
                return
            self._met.add("refuse" if self._refusing else "hang")
            if self._refusing and retry is not None and retry >= 0:
                raise failure(
                    f"memory broker {self.address} refuses the connection"
                )
            self._changed.wait()

    def _open_connection(self, client: Client, retry: int | None) -> None:
        self._wait_for_broker(client, retry, kombu.exceptions.OperationalError)
        if self._credentials not in (None, client.credentials):
            self._met.add("require_credentials")
            raise amqp.exceptions.AccessRefused(
                "ACCESS_REFUSED - the memory broker requires other"
                " credentials",
                (0, 0),
            )
        self._connections_opened += 1

    def _declare(self, name: str, exchange: str, key: str) -> _Queue:
        # A queue's name is the broker's: two exchanges can feed one queue.
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue(name)
        bound = self._bindings.setdefault((exchange, key), [])
        if queue not in bound:
            bound.append(queue)
        return queue

    def _delete(self, queue: _Queue) -> None:
        del self._queues[queue.name]
        for bound in self._bindings.values():
            if queue in bound:
                bound.remove(queue)

    def _publish(
        self, exchange: str, key: str, body: str, ttl: float | None
    ) -> bool:
        self._published += 1
        expires_at = None if ttl is None else self._clock() + ttl
        queues = self._bindings.get((exchange, key), ())
        for queue in queues:
            queue.push(Delivery(body, queue, expires_at))
        if not queues and self._catch_all is not None:
            unbound = _Queue(key)
            self._catch_all.take(Delivery(body, unbound, expires_at))
            return True
        self._dropped += not queues
        return bool(queues)


class Client:
    """One transport's side of a broker.  Made by :meth:`Broker.attach`.

    Thread-safe.  :meth:`close` releases all that it holds.
    """

    _numbers = itertools.count(1)

    def __init__(
        self, broker: Broker, username: str | None, password: str | None
    ) -> None:
        self.broker = broker
        self.credentials = (username, Secret(password or ""))
        self.closed = False
        self._number = next(self._numbers)
        self._sends = False
        self._reply_queue: str | None = None
        with broker._lock:
            broker._clients[self._number] = self

    def connect(self, *, retry: int | None) -> None:
        """Have a connection to send on, without sending anything yet.

        :param retry: as oslo.messaging's; None tries without end
        """
        with self.broker._lock:
            self._connect(retry)

    def _connect(self, retry: int | None) -> None:
        self._check_open()
        if not self._sends:
            self.broker._open_connection(self, retry)
            # Another thread may have opened it while this one was held.
            self.broker._connections_closed += self._sends
            self._sends = True

    def send(
        self,
        exchange: str,
        key: str,
        body: str,
        *,
        retry: int | None,
        ttl: float | None = None,
        mandatory: bool = False,
        queue: str | None = None,
    ) -> None:
        """Publish a message; the first one opens a connection.

        :param retry: as oslo.messaging's; None tries without end
        :param ttl: seconds after which it is not worth delivering
        :param mandatory: fail where no queue is bound for it
        :param queue: declare this queue for it, so that it is kept
        """
        broker = self.broker
        failure = oslo_messaging.MessageDeliveryFailure
        with broker._lock:
            self._connect(retry)
            broker._wait_for_broker(self, retry, failure)
            if queue is not None:
                broker._declare(queue, exchange, key)
            routed = broker._publish(exchange, key, body, ttl)
            if broker._losing_confirms:
                broker._met.add("lose_confirms")
                if retry == 0:
                    raise failure(
                        f"memory broker {broker.address} did not confirm"
                    )
                routed = broker._publish(exchange, key, body, ttl)
        if mandatory and not routed:
            raise oslo_messaging.MessageUndeliverable(
                None, exchange, key, body
            )

    def reply_queue(self, on_reply: OnReply) -> str:
        """The queue for replies; the first call opens a connection.

        Held while the broker is down, whatever the caller's ``retry``, as
        the RabbitMQ driver is.

        :param on_reply: is given each reply, and None when the transport is
            closed; called under the broker's lock, so it must only note it
        """
        broker = self.broker
        with broker._lock:
            self._check_open()
            if self._reply_queue is None:
                broker._open_connection(self, None)
                # Unless another thread did while this one was held.
                broker._connections_closed += self._reply_queue is not None
            if self._reply_queue is None:
                self._reply_queue = f"reply_{uuid.uuid4().hex}"
                broker._reply_queues[self._reply_queue] = on_reply
            return self._reply_queue

    def send_reply(self, reply: Reply) -> bool:
        """Put a reply into a reply queue.  Does not block.

        While the broker is down the reply is kept, for a server would try
        until the broker is back.

        :returns: False where that queue is gone
        """
        broker = self.broker
        with broker._lock:
            self._check_open()
            if not self._sends:
                self._sends = True
                broker._connections_opened += 1
            broker._replies += 1
            if broker._refusing or broker._hanging:
                broker._held_replies.append(reply)
                return True
            return broker._reply(reply)

    def _check_open(self) -> None:
        if self.closed:
            raise UsedAfterCleanup(
                f"transport to {self.broker.address} used after its cleanup"
            )

    def consume(
        self,
        queues: list[tuple[str, str, str]],
        *,
        fanout: str | None = None,
        auto_ack: bool = True,
    ) -> Consumer:
        """A consumer on a connection of its own.

        It lives on when this client is closed, as a RabbitMQ listener does.

        :param queues: name, exchange and routing key of each
        :param fanout: exchange to have a queue of one's own on
        :param auto_ack: whether taking a message is acknowledging it
        """
        broker = self.broker
        with broker._lock:
            broker._open_connection(self, None)
            consumer = Consumer(broker, auto_ack)
            broker._consumers.add(consumer)
            now = broker._clock()
            for name, exchange, key in queues:
                queue = broker._declare(name, exchange, key)
                consumer._queues.append(queue)
                queue.add(consumer, now)
            if fanout is not None:
                name = f"{fanout}_{uuid.uuid4().hex}"
                own = broker._declare(name, fanout, "")
                consumer._queues.append(own)
                consumer._own_queue = own
                own.add(consumer, now)
            return consumer

    def consume_unbound(self) -> Consumer:
        """A consumer of every message that no queue is bound for.

        A broker has one at most; a second one takes the place of the first.
        """
        broker = self.broker
        with broker._lock:
            broker._open_connection(self, None)
            consumer = broker._catch_all = Consumer(broker, auto_ack=True)
            broker._consumers.add(consumer)
            return consumer

    def close(self) -> None:
        """Close the connections of sending and calling.

        Those who wait for a reply, or are held by a broker that is down,
        fail at once.  May be called twice.
        """
        broker = self.broker
        with broker._lock:
            if self.closed:
                return
            self.closed = True
            broker._changed.notify_all()
            if self._reply_queue is not None:
                broker._reply_queues.pop(self._reply_queue)(None)
            while broker._holding_closing:
                broker._met.add("hold_closing")
                broker._changed.wait()
            broker._connections_closed += self._sends
            broker._connections_closed += self._reply_queue is not None
            del broker._clients[self._number]
            broker._transports_closed += 1


class Consumer:
    """Takes the messages of some queues.  Made by :meth:`Client.consume`."""

    def __init__(self, broker: Broker, auto_ack: bool) -> None:
        self._broker = broker
        self._auto_ack = auto_ack
        self._arrived = threading.Condition(broker._lock)
        self._inbox: collections.deque[Delivery] = collections.deque()
        self._unacknowledged: list[Delivery] = []
        self._queues: list[_Queue] = []
        self._own_queue: _Queue | None = None
        self._stopped = False
        self._closed = False

    def take(self, delivery: Delivery) -> None:
        """Have a message.  Called by its queue, under the broker's lock."""
        self._inbox.append(delivery)
        self._arrived.notify()

    def get(self, timeout: float | None = None) -> Delivery | None:
        """The next message; None after ``timeout`` or when stopped."""
        with self._broker._lock:
            self._arrived.wait_for(
                lambda: self._inbox or self._stopped, timeout
            )
            if not self._inbox:
                return None
            delivery = self._inbox.popleft()
            if not self._auto_ack:
                self._unacknowledged.append(delivery)
            return delivery

    def acknowledge(self, delivery: Delivery) -> None:
        """Be done with a message."""
        with self._broker._lock:
            if delivery in self._unacknowledged:
                self._unacknowledged.remove(delivery)

    def requeue(self, delivery: Delivery) -> None:
        """Put a message back for whoever takes it next."""
        with self._broker._lock:
            if delivery in self._unacknowledged:
                self._unacknowledged.remove(delivery)
                delivery.queue.give_back([delivery])

    def stop(self) -> None:
        """Take no more; what was not got yet goes back to its queue."""
        with self._broker._lock:
            if self._stopped:
                return
            self._stopped = True
            for queue in self._queues:
                queue.consumers.remove(self)
            inbox, self._inbox = list(self._inbox), collections.deque()
            self._give_back(inbox)
            if self._own_queue is not None:
                self._broker._delete(self._own_queue)
            self._broker._consumers.discard(self)
            if self._broker._catch_all is self:
                self._broker._catch_all = None
            self._arrived.notify_all()

    def close(self) -> None:
        """Stop, and close the connection.  May be called twice."""
        self.stop()
        with self._broker._lock:
            if self._closed:
                return
            self._closed = True
            left, self._unacknowledged = self._unacknowledged, []
            self._give_back(left)
            self._broker._connections_closed += 1

    def _give_back(self, deliveries: list[Delivery]) -> None:
        for queue in self._queues:
            queue.give_back([d for d in deliveries if d.queue is queue])


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
    """The broker of an address, made if there is none yet."""
    # One operation of the dictionary, so that no lock is inherited by fork.
    found = _known.get(address)
    return found or _known.setdefault(address, Broker(address))


def broker(
    host: str, vhost: str = DEFAULT_VHOST, *, port: int = DEFAULT_PORT
) -> Broker:
    """The broker of a host and virtual host, made if there is none yet."""
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

    Transports that are still open go on with the old ones, which nobody
    finds any more.
    """
    for known in brokers():
        known.heal()
    _known.clear()


# A forked child may inherit locks that are held.  Its parent's servers do
# not run in it, so it begins with no brokers.
os.register_at_fork(after_in_child=_known.clear)
