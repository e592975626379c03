# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The oslo.messaging driver ``cellmw-memory://HOST/VHOST``, for tests.

Messages stay in this process.  A test that uses it in place of ``rabbit://``
sees the same.  The other end, which can be looked at and broken, is in
:mod:`cellmw.testing.memory_brokers`.  Credentials in the URL count only where
a broker requires some; the query is ignored.

:class:`MemoryDriver` belongs to one transport.  It has no threads; a server
has those that oslo.messaging gives it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import time
import uuid
from collections.abc import Iterator
from typing import Any

import oslo_messaging
from oslo_config import cfg
from oslo_messaging._drivers import base, common
from oslo_serialization import jsonutils

from cellmw.testing import memory_brokers
from cellmw.testing.memory_clients import Consumer, UsedAfterCleanup
from cellmw.testing.memory_state import Delivery, Reply
from cellmw.transports.driver import Message, Reporting, judge, under_way

LOG = logging.getLogger(__name__)

_warned: set[int] = set()


def _warn_once() -> None:
    pid = os.getpid()
    if pid not in _warned:
        _warned.add(pid)
        LOG.warning(
            "The transport driver cellmw-memory is for tests: its messages"
            " do not leave this process (%d)",
            pid,
        )


class MemoryDriver(base.BaseDriver, Reporting):
    """An oslo.messaging driver whose brokers live in this process.

    Behaves as the RabbitMQ driver, its weak points included.  Thread-safe.
    """

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        url: oslo_messaging.TransportURL,
        default_exchange: str | None = None,
        allowed_remote_exmods: list[str] | None = None,
    ) -> None:
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        _warn_once()
        host = url.hosts[0] if url.hosts else oslo_messaging.TransportHost()
        broker = memory_brokers.broker_at(memory_brokers.address_of(url))
        self._client = broker.attach(host.username, host.password)
        self._waiting: dict[str, queue.SimpleQueue[str | None]] = {}

    def require_features(self, requeue: bool = False) -> None:
        """All that oslo.messaging asks for is there."""

    def send(
        self,
        target: oslo_messaging.Target,
        ctxt: Any,
        message: dict[str, Any],
        wait_for_reply: bool | None = None,
        timeout: float | None = None,
        call_monitor_timeout: float | None = None,
        retry: int | None = None,
        transport_options: oslo_messaging.TransportOptions | None = None,
    ) -> Any:
        """Send an RPC message and, if asked to, wait for the reply."""
        mandatory = bool(transport_options and transport_options.at_least_once)
        if not wait_for_reply:
            body = _pack(ctxt, message)
            self._publish(target, body, retry, timeout, mandatory)
            return None
        with _reporting():
            reply_queue = self._client.reply_queue(self._on_reply)
        call_id = uuid.uuid4().hex
        body = _pack(
            ctxt,
            message,
            reply_queue=reply_queue,
            call_id=call_id,
            call_monitor_timeout=call_monitor_timeout,
        )
        answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._waiting[call_id] = answers
        try:
            self._publish(target, body, retry, timeout, mandatory)
            return self._wait(answers, timeout, call_monitor_timeout)
        finally:
            del self._waiting[call_id]

    def _publish(
        self,
        target: oslo_messaging.Target,
        body: str,
        retry: int | None,
        ttl: float | None,
        mandatory: bool,
    ) -> None:
        with _reporting() as message:
            self._client.connect(retry=retry)
            if message is not None:
                message.writing()
            if target.fanout:
                exchange, key = f"{target.topic}_fanout", ""
                ttl, mandatory = None, False
            else:
                exchange, key = self._exchange(target), target.topic
                if target.server:
                    key = f"{target.topic}.{target.server}"
            self._client.send(
                exchange, key, body, retry=retry, ttl=ttl, mandatory=mandatory
            )
        if message is not None:
            message.written()

    def connect(self) -> None:
        """Open a connection, and send nothing."""
        self._client.connect(retry=0)

    def _exchange(self, target: oslo_messaging.Target) -> str:
        return target.exchange or self._default_exchange or ""

    def _on_reply(self, reply: Reply | None) -> None:
        if reply is None:
            for answers in list(self._waiting.values()):
                answers.put(None)
        # Nobody there: the caller has given up.
        elif (waiting := self._waiting.get(reply.call_id)) is not None:
            waiting.put(reply.body)

    def _wait(
        self,
        answers: queue.SimpleQueue[str | None],
        timeout: float | None,
        call_monitor_timeout: float | None,
    ) -> Any:
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0, end - time.monotonic())
            if call_monitor_timeout:
                # Begins anew with each heartbeat; the other one does not.
                left = min(
                    call_monitor_timeout, math.inf if left is None else left
                )
            try:
                body = answers.get(timeout=left)
            except queue.Empty:
                raise oslo_messaging.MessagingTimeout(
                    "no reply from a server within the timeout"
                ) from None
            if body is None:
                raise UsedAfterCleanup(
                    "the transport was cleaned up during the call"
                )
            answer = jsonutils.loads(body)
            if answer["heartbeat"]:
                continue
            if answer["failure"]:
                raise common.deserialize_remote_exception(
                    answer["failure"], self._allowed_remote_exmods
                )
            return answer["result"]

    def send_notification(
        self,
        target: oslo_messaging.Target,
        ctxt: Any,
        message: dict[str, Any],
        version: float,
        retry: int | None = None,
    ) -> None:
        """Send a notification; it is kept until somebody listens."""
        self._client.send(
            self._exchange(target),
            target.topic,
            _pack(ctxt, message),
            retry=retry,
            queue=target.topic,
        )

    def listen(
        self,
        target: oslo_messaging.Target,
        batch_size: int,
        batch_timeout: float | None,
    ) -> base.PollStyleListenerAdapter:
        """A listener for an RPC server.  Opens a connection."""
        exchange = self._exchange(target)
        names = [target.topic, f"{target.topic}.{target.server}"]
        consumer = self._client.consume(
            [(name, exchange, name) for name in names],
            fanout=f"{target.topic}_fanout",
        )
        return base.PollStyleListenerAdapter(
            MemoryListener(self, consumer), batch_size, batch_timeout
        )

    def listen_for_notifications(
        self,
        targets_and_priorities: list[tuple[oslo_messaging.Target, str]],
        pool: str | None,
        batch_size: int,
        batch_timeout: float | None,
    ) -> base.PollStyleListenerAdapter:
        """A listener for notifications.  Opens a connection."""
        queues = []
        for target, priority in targets_and_priorities:
            key = f"{target.topic}.{priority}"
            queues.append((pool or key, self._exchange(target), key))
        consumer = self._client.consume(queues, auto_ack=False)
        return base.PollStyleListenerAdapter(
            MemoryListener(self, consumer), batch_size, batch_timeout
        )

    def cleanup(self) -> None:
        """Close the transport's connections; using it then fails.

        Servers that were made on it keep theirs, but cannot reply.  May be
        called twice.
        """
        self._client.close()


class MemoryListener(base.PollStyleListener):
    """What a server polls.  Owns one consumer."""

    def __init__(self, driver: MemoryDriver, consumer: Consumer) -> None:
        super().__init__(driver.prefetch_size)
        self._driver = driver
        self._consumer = consumer

    @base.batch_poll_helper  # type: ignore[untyped-decorator]  # not ours
    def poll(self, timeout: float | None = None) -> MemoryMessage | None:
        """The next message, or None after ``timeout`` or :meth:`stop`."""
        delivery = self._consumer.get(timeout)
        if delivery is None:
            return None
        return MemoryMessage(self._driver, self._consumer, delivery)

    def stop(self) -> None:
        """Let :meth:`poll` return; messages not polled stay in the queue."""
        self._consumer.stop()

    def cleanup(self) -> None:
        """Close the connection."""
        self._consumer.close()


class MemoryMessage(base.RpcIncomingMessage):
    """A message as a server gets it."""

    def __init__(
        self,
        driver: MemoryDriver,
        consumer: Consumer,
        delivery: Delivery,
    ) -> None:
        content = jsonutils.loads(delivery.body)
        timeout = content["call_monitor_timeout"]
        # The key is the RabbitMQ driver's: a service that makes its context
        # from all of this must cope with it here too.
        ctxt = content["ctxt"] | {"client_timeout": timeout}
        super().__init__(ctxt, content["message"], content["call_id"])
        self.client_timeout = timeout
        self._call_id = content["call_id"]
        self._reply_queue = content["reply_queue"]
        self._client = driver._client
        self._consumer = consumer
        self._delivery = delivery

    @property
    def is_call(self) -> bool:
        """Whether the sender waits for a reply."""
        return self._reply_queue is not None

    def reply(self, reply: Any = None, failure: Any = None) -> None:
        """Answer a call; does nothing for a cast.

        :param failure: what ``sys.exc_info()`` gave
        """
        if self._reply_queue is None:
            return
        if failure:
            failure = common.serialize_remote_exception(failure)
        if not self._send(result=reply, failure=failure):
            LOG.warning(
                "The reply to call %s was dropped: its queue is gone",
                self._call_id,
            )

    def heartbeat(self) -> None:
        """Tell the caller that its call is still being worked on."""
        if not self._send(heartbeat=True):
            raise oslo_messaging.MessageDeliveryFailure(
                "heartbeat not sent, the reply queue is gone"
            )

    def _send(
        self,
        *,
        result: Any = None,
        failure: str | None = None,
        heartbeat: bool = False,
    ) -> bool:
        body = jsonutils.dumps(
            {"result": result, "failure": failure, "heartbeat": heartbeat}
        )
        return self._client.send_reply(
            Reply(self._reply_queue, self._call_id, body)
        )

    def acknowledge(self) -> None:
        """Acknowledge it.  RPC messages are acknowledged when polled."""
        self._consumer.acknowledge(self._delivery)

    def requeue(self) -> None:
        """Put a notification back."""
        self._consumer.requeue(self._delivery)


@contextlib.contextmanager
def _reporting() -> Iterator[Message | None]:
    """Report errors to the message that is being sent, if any."""
    message = under_way.message
    try:
        yield message
    except Exception as error:
        if message is not None:
            message.failed(judge(error), error)
        raise


def _pack(
    ctxt: Any,
    message: dict[str, Any],
    *,
    reply_queue: str | None = None,
    call_id: str | None = None,
    call_monitor_timeout: float | None = None,
) -> str:
    return jsonutils.dumps(
        {
            "ctxt": ctxt if isinstance(ctxt, dict) else ctxt.to_dict(),
            "message": message,
            "reply_queue": reply_queue,
            "call_id": call_id,
            "call_monitor_timeout": call_monitor_timeout,
        }
    )
