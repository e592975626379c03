# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The two sides of a memory broker: transports and consumers.

A :class:`Client` is the driver's side of one transport; it owns the
connections of that transport.  A :class:`Consumer` is a listener's side; it
owns one connection.  Neither starts a thread.
"""

from __future__ import annotations

import collections
import itertools
import threading
import uuid

import oslo_messaging

from cellmw.redaction import Secret
from cellmw.testing.memory_state import (
    Delivery,
    OnReply,
    Queue,
    Reply,
    State,
)


class UsedAfterCleanup(oslo_messaging.MessagingException, AttributeError):
    """A transport was used after its ``cleanup()``.

    The RabbitMQ driver raises a bare AttributeError there.
    """


class Client:
    """The side of one transport.  Made by :meth:`Broker.attach`.

    Thread-safe.  :meth:`close` closes its connections.
    """

    _numbers = itertools.count(1)

    def __init__(
        self, state: State, username: str | None, password: str | None
    ) -> None:
        self._state = state
        self._credentials = (username, Secret(password or ""))
        self.closed = False
        self._number = next(self._numbers)
        self._sends = False
        self._reply_queue: str | None = None
        with state.lock:
            state.clients.add(self._number)

    def connect(self, *, retry: int | None) -> None:
        """Open the connection for sending, unless it is open.

        :param retry: as oslo.messaging's; None tries without end
        """
        with self._state.lock:
            self._connect(retry)

    def _connect(self, retry: int | None) -> None:
        self._check_open()
        if not self._sends:
            self._open_connection(retry)
            # Another thread may have opened it while this one waited.
            self._state.counts.connections_closed += self._sends
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
        :param ttl: seconds after which the message expires
        :param mandatory: fail if no queue is bound for the message
        :param queue: declare this queue, so that the message is kept
        """
        state = self._state
        failure = oslo_messaging.MessageDeliveryFailure
        with state.lock:
            self._connect(retry)
            state.wait_until_up(self._check_open, retry, failure)
            if queue is not None:
                state.routing.declare(queue, exchange, key)
            routed = state.publish(exchange, key, body, ttl)
            if state.faults.losing_confirms:
                state.faults.met.add("lose_confirms")
                if retry == 0:
                    raise failure(
                        f"memory broker {state.address} did not confirm"
                    )
                routed = state.publish(exchange, key, body, ttl)
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
        state = self._state
        with state.lock:
            self._check_open()
            if self._reply_queue is None:
                self._open_connection(None)
                # Another thread may have opened it while this one waited.
                extra = self._reply_queue is not None
                state.counts.connections_closed += extra
            if self._reply_queue is None:
                self._reply_queue = f"reply_{uuid.uuid4().hex}"
                state.routing.replies[self._reply_queue] = on_reply
            return self._reply_queue

    def send_reply(self, reply: Reply) -> bool:
        """Put a reply into a reply queue.  Does not block.

        While the broker is down the reply is kept: a server would try until
        the broker is back.

        :returns: False if the queue is gone
        """
        state = self._state
        with state.lock:
            self._check_open()
            if not self._sends:
                self._sends = True
                state.counts.connections_opened += 1
            state.counts.replies += 1
            if state.faults.down:
                state.held_replies.append(reply)
                return True
            return state.routing.reply(reply)

    def _open_connection(self, retry: int | None) -> None:
        self._state.open_connection(self._check_open, self._credentials, retry)

    def _check_open(self) -> None:
        if self.closed:
            raise UsedAfterCleanup(
                f"transport to {self._state.address} used after its cleanup"
            )

    def consume(
        self,
        queues: list[tuple[str, str, str]],
        *,
        fanout: str | None = None,
        auto_ack: bool = True,
    ) -> Consumer:
        """Make a consumer with its own connection.

        The consumer outlives this client, as a RabbitMQ listener does.

        :param queues: name, exchange and routing key of each
        :param fanout: exchange to have a queue of one's own on
        :param auto_ack: whether taking a message is acknowledging it
        """
        state = self._state
        with state.lock:
            self._open_connection(None)
            consumer = Consumer(state, auto_ack)
            state.consumers.add(consumer)
            now = state.clock()
            for name, exchange, key in queues:
                queue = state.routing.declare(name, exchange, key)
                consumer._queues.append(queue)
                queue.add(consumer, now)
            if fanout is not None:
                name = f"{fanout}_{uuid.uuid4().hex}"
                own = state.routing.declare(name, fanout, "")
                consumer._queues.append(own)
                consumer._own_queue = own
                own.add(consumer, now)
            return consumer

    def consume_unbound(self) -> Consumer:
        """Make a consumer of the messages that no queue is bound for.

        A broker has at most one; a second one replaces the first.
        """
        state = self._state
        with state.lock:
            self._open_connection(None)
            consumer = Consumer(state, auto_ack=True)
            state.routing.catch_all = consumer
            state.consumers.add(consumer)
            return consumer

    def close(self) -> None:
        """Close the connections of sending and calling.

        Callers that wait for a reply or for the broker fail at once.  May be
        called twice.
        """
        state = self._state
        with state.lock:
            if self.closed:
                return
            self.closed = True
            state.changed.notify_all()
            if self._reply_queue is not None:
                state.routing.replies.pop(self._reply_queue)(None)
            while state.faults.holding_closing:
                state.faults.met.add("hold_closing")
                state.changed.wait()
            counts = state.counts
            counts.connections_closed += self._sends
            counts.connections_closed += self._reply_queue is not None
            counts.transports_closed += 1
            state.clients.remove(self._number)


class Consumer:
    """Takes the messages of some queues.  Made by :meth:`Client.consume`."""

    def __init__(self, state: State, auto_ack: bool) -> None:
        self._state = state
        self._auto_ack = auto_ack
        self._arrived = threading.Condition(state.lock)
        self._inbox: collections.deque[Delivery] = collections.deque()
        self._unacknowledged: list[Delivery] = []
        self._queues: list[Queue] = []
        self._own_queue: Queue | None = None
        self._stopped = False
        self._closed = False

    def take(self, delivery: Delivery) -> None:
        """Accept a message.  Called by its queue, under the lock."""
        self._inbox.append(delivery)
        self._arrived.notify()

    def get(self, timeout: float | None = None) -> Delivery | None:
        """The next message; None after ``timeout`` or when stopped."""
        with self._state.lock:
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
        """Acknowledge a message."""
        with self._state.lock:
            if delivery in self._unacknowledged:
                self._unacknowledged.remove(delivery)

    def requeue(self, delivery: Delivery) -> None:
        """Put a message back in front of its queue."""
        with self._state.lock:
            if delivery in self._unacknowledged:
                self._unacknowledged.remove(delivery)
                delivery.queue.give_back([delivery])

    def stop(self) -> None:
        """Take no more messages.  Those not fetched yet go back."""
        with self._state.lock:
            if self._stopped:
                return
            self._stopped = True
            routing = self._state.routing
            for queue in self._queues:
                queue.consumers.remove(self)
            inbox, self._inbox = list(self._inbox), collections.deque()
            self._give_back(inbox)
            if self._own_queue is not None:
                routing.delete(self._own_queue)
            self._state.consumers.discard(self)
            if routing.catch_all is self:
                routing.catch_all = None
            self._arrived.notify_all()

    def close(self) -> None:
        """Stop, and close the connection.  May be called twice."""
        self.stop()
        with self._state.lock:
            if self._closed:
                return
            self._closed = True
            left, self._unacknowledged = self._unacknowledged, []
            self._give_back(left)
            self._state.counts.connections_closed += 1

    def _give_back(self, deliveries: list[Delivery]) -> None:
        for queue in self._queues:
            queue.give_back([d for d in deliveries if d.queue is queue])
