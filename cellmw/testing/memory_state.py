# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The state of a memory broker: queues, bindings, faults and counters.

:class:`State` holds what the classes around it share.  One lock guards all of
it.  Code that holds the lock calls nothing that blocks: deliveries and replies
are only appended to queues.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable
from typing import Protocol

import amqp.exceptions
import kombu.exceptions

from cellmw.redaction import Secret


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
class Reply:
    """A reply, or a heartbeat, on its way to the caller."""

    queue: str
    call_id: str
    body: str


OnReply = Callable[["Reply | None"], None]


class Taker(Protocol):
    """A consumer, as a queue sees it."""

    def take(self, delivery: Delivery) -> None:
        """Accept a message, under the lock."""
        ...


class Delivery:
    """A message on its way to one consumer."""

    __slots__ = ("body", "expires_at", "queue")

    def __init__(
        self, body: str, queue: Queue, expires_at: float | None
    ) -> None:
        self.body = body
        self.queue = queue
        self.expires_at = expires_at


class Queue:
    """A queue with the consumers that share it.  Needs the lock."""

    __slots__ = ("consumers", "messages", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.messages: collections.deque[Delivery] = collections.deque()
        self.consumers: collections.deque[Taker] = collections.deque()

    def push(self, delivery: Delivery) -> None:
        """Hand a message to the next consumer, or keep it."""
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

    def add(self, consumer: Taker, now: float) -> None:
        """Add a consumer, which gets the messages that wait."""
        self.expire(now)
        self.consumers.append(consumer)
        waiting, self.messages = self.messages, collections.deque()
        for delivery in waiting:
            self.push(delivery)

    def expire(self, now: float) -> None:
        """Drop the messages whose time is over."""
        self.messages = collections.deque(
            delivery
            for delivery in self.messages
            if delivery.expires_at is None or delivery.expires_at > now
        )


class Routing:
    """The queues of a broker and their bindings.  Needs the lock.

    :ivar replies: the callback of each reply queue
    :ivar catch_all: takes the messages that no queue is bound for
    """

    def __init__(self) -> None:
        self.queues: dict[str, Queue] = {}
        self.replies: dict[str, OnReply] = {}
        self.catch_all: Taker | None = None
        self._bindings: dict[tuple[str, str], list[Queue]] = {}

    def declare(self, name: str, exchange: str, key: str) -> Queue:
        """Make and bind a queue.  Its name is unique in the broker."""
        queue = self.queues.get(name)
        if queue is None:
            queue = self.queues[name] = Queue(name)
        bound = self._bindings.setdefault((exchange, key), [])
        if queue not in bound:
            bound.append(queue)
        return queue

    def delete(self, queue: Queue) -> None:
        """Remove a queue and its bindings."""
        del self.queues[queue.name]
        for bound in self._bindings.values():
            if queue in bound:
                bound.remove(queue)

    def publish(
        self, exchange: str, key: str, body: str, expires_at: float | None
    ) -> bool:
        """Route a message; False: no queue and no consumer took it."""
        queues = self._bindings.get((exchange, key), ())
        for queue in queues:
            queue.push(Delivery(body, queue, expires_at))
        if not queues and self.catch_all is not None:
            self.catch_all.take(Delivery(body, Queue(key), expires_at))
            return True
        return bool(queues)

    def reply(self, reply: Reply) -> bool:
        """Deliver a reply; False: its queue is gone."""
        deliver = self.replies.get(reply.queue)
        if deliver is None:
            return False
        deliver(reply)
        return True

    def expire(self, now: float) -> None:
        """Drop the messages whose time is over."""
        for queue in self.queues.values():
            queue.expire(now)


@dataclasses.dataclass(slots=True)
class Faults:
    """The faults of a broker.  Needs the lock.

    :ivar credentials: those required; None: none
    :ivar met: the faults that a sender has run into
    """

    refusing: bool = False
    hanging: bool = False
    losing_confirms: bool = False
    holding_closing: bool = False
    credentials: tuple[str | None, Secret] | None = None
    met: set[str] = dataclasses.field(default_factory=set)

    @property
    def down(self) -> bool:
        """Whether the broker does not answer."""
        return self.refusing or self.hanging

    def end(self) -> None:
        """End each fault."""
        self.refusing = self.hanging = False
        self.losing_confirms = self.holding_closing = False
        self.credentials = None


@dataclasses.dataclass(slots=True)
class Counts:
    """The counters of a broker.  Needs the lock."""

    transports_closed: int = 0
    connections_opened: int = 0
    connections_closed: int = 0
    published: int = 0
    dropped: int = 0
    replies: int = 0


class State:
    """The state of one broker.

    :ivar changed: notified when a fault or a transport ends
    :ivar clients: the numbers of the transports that are not cleaned up
    :ivar consumers: the consumers that take messages
    :ivar held_replies: replies that wait for the end of a fault
    """

    def __init__(self, address: Address, clock: Callable[[], float]) -> None:
        self.address = address
        self.clock = clock
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.routing = Routing()
        self.faults = Faults()
        self.counts = Counts()
        self.clients: set[int] = set()
        self.consumers: set[Taker] = set()
        self.held_replies: list[Reply] = []

    def wait_until_up(
        self,
        check_open: Callable[[], None],
        retry: int | None,
        failure: type[Exception],
    ) -> None:
        """Return when the broker answers.  Releases the lock meanwhile.

        :param check_open: raises if the transport was closed meanwhile
        :param retry: as oslo.messaging's; None waits without end
        :param failure: raised where the broker refuses
        """
        faults = self.faults
        while True:
            check_open()
            if not faults.down:
                return
            faults.met.add("refuse" if faults.refusing else "hang")
            if faults.refusing and retry is not None and retry >= 0:
                raise failure(
                    f"memory broker {self.address} refuses the connection"
                )
            self.changed.wait()

    def open_connection(
        self,
        check_open: Callable[[], None],
        credentials: tuple[str | None, Secret],
        retry: int | None,
    ) -> None:
        """Open a connection; :meth:`wait_until_up` says when it fails."""
        self.wait_until_up(
            check_open, retry, kombu.exceptions.OperationalError
        )
        if self.faults.credentials not in (None, credentials):
            self.faults.met.add("require_credentials")
            raise amqp.exceptions.AccessRefused(
                "ACCESS_REFUSED - the memory broker requires other"
                " credentials",
                (0, 0),
            )
        self.counts.connections_opened += 1

    def publish(
        self, exchange: str, key: str, body: str, ttl: float | None
    ) -> bool:
        """Route a message; False: no queue and no consumer took it."""
        self.counts.published += 1
        expires_at = None if ttl is None else self.clock() + ttl
        taken = self.routing.publish(exchange, key, body, expires_at)
        self.counts.dropped += not taken
        return taken
