# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""All that this package knows of the inside of oslo.messaging's drivers.

Each module names the versions that its facts were read in.  A driver is
either built into the seam, which :func:`install` does for RabbitMQ, or
derives from :class:`~cellmw.transports.driver.progress.Reporting`, or tells
nothing.  Of a driver that tells nothing, each message may have been written
as soon as the driver has it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import oslo_messaging
from oslo_messaging._drivers import impl_rabbit, pool
from oslo_messaging.transport import RPCTransport

from cellmw.transports.driver import fit
from cellmw.transports.driver.connections import ConnectionPool
from cellmw.transports.driver.progress import (
    Message,
    Reporting,
    Verdict,
    under_way,
)
from cellmw.transports.driver.rabbit import (
    judge,
    keeps_queue_names,
    prepare_queue_manager,
)

__all__ = [
    "Message",
    "Reporting",
    "Verdict",
    "check",
    "connect",
    "install",
    "judge",
    "judge_silent",
    "keeps_queue_names",
    "prepare_queue_manager",
    "release",
    "reports",
    "reserve",
    "under_way",
]

LOG = logging.getLogger(__name__)


@functools.cache
def check() -> bool:
    """Whether the seam fits the installed libraries.

    Looks once, and logs one warning where it does not fit.
    """
    misfits = fit.misfits()
    if misfits:
        LOG.warning(
            "The installed libraries (%s) differ from the versions tried (%s) "
            "in: %s. Messages to RabbitMQ take the careful way: a worker "
            "thread sends each one, none is tried again, and a failure says "
            "that the message may have been delivered.",
            fit.installed(),
            fit.TRIED,
            ", ".join(misfits),
        )
    return not misfits


def install(
    transport: RPCTransport, later: Callable[[Callable[[], Any]], bool]
) -> bool:
    """Build a new transport into the seam, if it is one to RabbitMQ.

    :param later: runs a function in another thread; whether it could
    :returns: whether its driver is RabbitMQ's
    """
    driver: Any = transport._driver
    connections: Any = getattr(driver, "_connection_pool", None)
    is_rabbit = (
        getattr(connections, "connection_cls", None) is impl_rabbit.Connection
    )
    if is_rabbit and check() and type(connections) is pool.ConnectionPool:
        driver._connection_pool = ConnectionPool(connections, later)
    return is_rabbit


def reports(transport: RPCTransport) -> bool:
    """Whether the driver tells the message under way how far it is."""
    driver: Any = transport._driver
    return isinstance(driver, Reporting) or isinstance(
        getattr(driver, "_connection_pool", None), ConnectionPool
    )


def reserve(
    transport: RPCTransport, message: Message, *, is_call: bool
) -> bool:
    """Keep an open connection for a message, if that takes no opening.

    Waits where no more may be opened, until the message's deadline.  Then
    the calling thread may send the message, and waits for nothing but
    that connection's socket, until the message's deadline, and for a reply
    as long as it says.  A call needs the transport's reply queue, which the
    first call opens without a deadline; the lock around that is free as soon
    as there is one.

    :returns: whether there is one; :func:`release` gives it back
    """
    driver: Any = transport._driver
    connections = getattr(driver, "_connection_pool", None)
    if type(connections) is ConnectionPool:
        if is_call and driver._reply_q is None:
            return False
        return connections.reserve(message)
    return isinstance(driver, Reporting) and driver.reserve(message)


def release(transport: RPCTransport, message: Message) -> None:
    """Give back what was reserved for a message and not used."""
    connection, message.reserved = message.reserved, None
    if connection is not None:
        driver: Any = transport._driver
        driver._connection_pool.put(connection)


def connect(transport: RPCTransport) -> bool:
    """Open a connection, and write no message; False: that is not known.

    Blocks as opening does.  Raises what the driver raises.
    """
    driver: Any = transport._driver
    if isinstance(driver, Reporting):
        driver.connect()
        return True
    if not reports(transport):
        return False
    with driver._get_connection(retry=0):
        return True


def judge_silent(error: BaseException, *, is_call: bool) -> Verdict:
    """What an error means that came out of a driver that tells nothing.

    Only its class can be judged, which may be that of a far side's error.
    """
    if isinstance(error, oslo_messaging.RemoteError) or (
        is_call and isinstance(error, oslo_messaging.MessagingTimeout)
    ):
        return Verdict.ANSWERED
    return judge(error)
