# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A compute host that records every message of one broker.

A :class:`RecordingHost` owns a transport and a thread.  It takes the messages
that no other server takes, whatever their topic, server, namespace or version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import oslo_messaging
from oslo_config import cfg

from cellmw.testing.memory import MemoryDriver, MemoryMessage

Answer = Callable[["Received"], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    """A message that reached a host.

    :ivar cell: name of the host's cell; ``default`` for the default queue
    :ivar method: name of the RPC method
    :ivar args: keyword arguments of the method
    :ivar context: the request context as it travelled
    :ivar is_call: whether the sender waits for a reply
    """

    cell: str
    method: str
    args: Mapping[str, Any]
    context: Mapping[str, Any]
    is_call: bool


class RecordingHost:
    """Records messages in one thread until :meth:`stop`.  Thread-safe.

    :param cell: name of the cell
    :param url: ``cellmw-memory`` URL of the cell's broker
    :param record: called with each message, before it is answered
    """

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        cell: str,
        url: str,
        record: Callable[[Received], object],
    ) -> None:
        self._cell = cell
        self._record = record
        self._answers: dict[str, Answer] = {}
        self._transport = oslo_messaging.get_rpc_transport(conf, url)
        driver = self._transport._driver
        assert isinstance(driver, MemoryDriver)
        self._driver = driver
        self._consumer = driver._client.consume_unbound()
        self._thread = threading.Thread(
            target=self._run, name=f"cellmw-host-{cell}", daemon=True
        )
        self._thread.start()

    def answer(self, method: str, answer: Any) -> None:
        """Set what a method returns.

        :param answer: the result; or a function that is called with the
            :class:`Received` message, and whose result or exception travels
            back to the caller
        """
        given = answer if callable(answer) else lambda received: answer
        self._answers[method] = given

    def _run(self) -> None:
        while (delivery := self._consumer.get()) is not None:
            message = MemoryMessage(self._driver, self._consumer, delivery)
            received = self._received(message)
            self._record(received)
            self._reply(message, received)

    def _received(self, message: MemoryMessage) -> Received:
        content: dict[str, Any] = message.message
        return Received(
            cell=self._cell,
            method=content["method"],
            args=content.get("args", {}),
            context=message.ctxt,
            is_call=message.is_call,
        )

    def _reply(self, message: MemoryMessage, received: Received) -> None:
        answer = self._answers.get(received.method)
        # The caller's transport may be closed by now, and its queue gone.
        with contextlib.suppress(oslo_messaging.MessagingException):
            try:
                result = None if answer is None else answer(received)
            except Exception:
                message.reply(failure=sys.exc_info())
            else:
                message.reply(result)

    def stop(self) -> None:
        """Take no more messages, and close the transport."""
        self._consumer.stop()
        self._thread.join()
        self._consumer.close()
        self._transport.cleanup()
