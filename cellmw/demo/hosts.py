# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Compute hosts: oslo.messaging RPC servers, one for each cell.

Each writes what reaches it into a :class:`Ledger` that all share.  A
:class:`Host` owns its transport and its server.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import oslo_messaging
from oslo_config import cfg

from cellmw.demo.rpcapi import TOPIC

# The same in each cell, so that a message in the wrong one is not lost there
# but taken, and seen.
HOST_NAME = "compute-1"


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    """A message that reached a host.

    :ivar cell: the cell of the host, as the host knows it
    :ivar request_id: the API request that it was sent for
    """

    cell: str
    host: str
    method: str
    instance_uuid: str
    request_id: str


class Ledger:
    """All messages that reached any host, in their order.  Thread-safe.

    :param tell: is called with each one, in the host's thread
    """

    def __init__(self, tell: Callable[[Received], None] | None = None) -> None:
        self._tell = tell
        self._entries: list[Received] = []
        self._changed = threading.Condition()

    def add(self, received: Received) -> None:
        """Note a message."""
        with self._changed:
            self._entries.append(received)
            self._changed.notify_all()
        if self._tell is not None:
            self._tell(received)

    def all(self) -> list[Received]:
        """What was noted so far."""
        with self._changed:
            return list(self._entries)

    def of(
        self, request_id: str, *, count: int, timeout: float
    ) -> list[Received]:
        """What was noted for one API request.

        Waits until there are ``count``, ``timeout`` seconds at most.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                found = [
                    entry
                    for entry in self._entries
                    if entry.request_id == request_id
                ]
                left = deadline - time.monotonic()
                if len(found) >= count or left <= 0:
                    return found
                self._changed.wait(left)


class Endpoint:
    """The methods of a compute host."""

    target = oslo_messaging.Target(version="1.0")

    def __init__(self, cell: str, ledger: Ledger) -> None:
        self._cell = cell
        self._ledger = ledger
        self._reboots: dict[str, int] = {}

    def _note(self, ctxt: dict[str, Any], method: str, uuid: str) -> None:
        self._ledger.add(
            Received(self._cell, HOST_NAME, method, uuid, ctxt["request_id"])
        )

    def get_instance(
        self, ctxt: dict[str, Any], instance_uuid: str
    ) -> dict[str, Any]:
        """How an instance is."""
        self._note(ctxt, "get_instance", instance_uuid)
        return {
            "status": "ACTIVE",
            "host": HOST_NAME,
            "cell": self._cell,
            "reboots": self._reboots.get(instance_uuid, 0),
        }

    def get_console_output(
        self, ctxt: dict[str, Any], instance_uuid: str
    ) -> dict[str, str]:
        """What an instance has printed."""
        self._note(ctxt, "get_console_output", instance_uuid)
        return {
            "output": f"{instance_uuid} at {HOST_NAME} in {self._cell}",
            "host": HOST_NAME,
            "cell": self._cell,
        }

    def reboot_instance(
        self, ctxt: dict[str, Any], instance_uuid: str
    ) -> None:
        """Reboot an instance."""
        reboots = self._reboots.get(instance_uuid, 0)
        self._reboots[instance_uuid] = reboots + 1
        self._note(ctxt, "reboot_instance", instance_uuid)

    def delete_instance(
        self, ctxt: dict[str, Any], instance_uuid: str
    ) -> None:
        """Delete an instance."""
        self._reboots.pop(instance_uuid, None)
        self._note(ctxt, "delete_instance", instance_uuid)


class Host:
    """A compute host that serves until :meth:`stop`.

    :param cell: the name of its cell
    :param url: the cell's message queue
    """

    def __init__(
        self, conf: cfg.ConfigOpts, cell: str, url: str, ledger: Ledger
    ) -> None:
        self._started = False
        self._transport = oslo_messaging.get_rpc_transport(conf, url)
        self._server = oslo_messaging.get_rpc_server(
            self._transport,
            oslo_messaging.Target(topic=TOPIC, server=HOST_NAME),
            [Endpoint(cell, ledger)],
        )

    def start(self) -> None:
        """Take messages from now on.  Blocks until the broker is there."""
        self._server.start()
        self._started = True

    def stop(self) -> None:
        """Take no more, and close the connections."""
        if self._started:
            self._server.stop()
            self._server.wait()
        self._transport.cleanup()
