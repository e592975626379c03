# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Whether the installed libraries are built as this package takes them to be.

What is hooked or relied on here is private to oslo.messaging, kombu and amqp.
Each fact is a function, and names that it must use.  Where one does not hold,
the driver is left alone, and messages go the careful way.
"""

from __future__ import annotations

import importlib.metadata
import operator
import re
import types
from collections.abc import Iterator
from typing import Any

import amqp.channel
import amqp.connection
import amqp.transport
import kombu.connection
from kombu.transport import pyamqp
from oslo_messaging._drivers import amqpdriver, common, impl_rabbit, pool

# First and last minor version of each library.
_TRIED = {
    "oslo.messaging": ((17, 1), (18, 3)),
    "kombu": ((5, 4), (5, 7)),
    "amqp": ((5, 2), (5, 4)),
}


def tried(name: str) -> str:
    """The versions of a library that were tried, in words."""
    first, last = (".".join(map(str, one)) for one in _TRIED[name])
    return first if first == last else f"{first} to {last}"


TRIED = ", ".join(f"{name} {tried(name)}" for name in _TRIED)

_FACTS: tuple[tuple[object, str, str], ...] = (
    # A message takes a connection from the pool and gives it back there.
    (amqpdriver, "AMQPDriverBase._send", "_get_connection _get_reply_q"),
    (amqpdriver, "AMQPDriverBase._get_connection", "_connection_pool"),
    (amqpdriver, "AMQPDriverBase._get_reply_q", "_reply_q_lock _reply_q"),
    (common, "ConnectionContext.__init__", "get create pooled"),
    (common, "ConnectionContext._done", "reset put"),
    (pool, "Pool.__init__", "_min_size _max_size _item_ttl _cond _items"),
    (pool, "Pool.iter_free", "_items pop"),
    (pool, "ConnectionPool.create", "connection_cls"),
    (pool, "ConnectionPool.empty", "iter_free close"),
    # One lock around one ensure(), which publishes.
    (impl_rabbit, "Connection._ensure_publishing", "_connection_lock ensure"),
    (impl_rabbit, "Connection.topic_send", "_ensure_publishing"),
    (impl_rabbit, "Connection.fanout_send", "_ensure_publishing"),
    (impl_rabbit, "Connection.declare_consumer", "_connection_lock ensure"),
    (impl_rabbit, "Connection.__init__", "_heartbeat_start"),
    (impl_rabbit, "Connection._heartbeat_start", "_heartbeat_thread_job"),
    (impl_rabbit, "Connection._set_current_channel", "channel _producer"),
    (
        impl_rabbit,
        "Connection._heartbeat_thread_job",
        "_connection_lock for_heartbeat drain_events",
    ),
    (impl_rabbit, "Connection.ensure_connection", "_set_current_channel"),
    (impl_rabbit, "Connection.ensure", "_set_current_channel autoretry"),
    (impl_rabbit, "Connection._publish", "_transport_socket_timeout publish"),
    (impl_rabbit, "Connection.set_transport_socket_timeout", "settimeout"),
    (kombu.connection, "Connection.default_channel", "_default_channel"),
    (kombu.connection, "Connection.transport", "_transport create_transport"),
    (pyamqp, "Transport.establish_connection", "Connection connect"),
    (amqp.connection, "Connection.connect", "Transport transport connect"),
    (amqp.transport, "_AbstractTransport._init_socket", "_setup_transport"),
    # A channel sends with one method, a transport reads and writes with two.
    (amqp.channel, "Channel._basic_publish", "send_method Publish"),
    (amqp.connection, "Connection.blocking_read", "having_timeout read_frame"),
    (amqp.transport, "_AbstractTransport.write", "_write"),
    (amqp.transport, "_AbstractTransport.read_frame", "_read _read_buffer"),
    (amqp.transport, "TCPTransport._setup_transport", "_write _quick_recv"),
    (amqp.transport, "TCPTransport._read", "_quick_recv _read_buffer"),
    (amqp.transport, "SSLTransport._setup_transport", "_quick_recv"),
    (amqp.transport, "SSLTransport._read", "_quick_recv _read_buffer"),
)


def misfits() -> list[str]:
    """The facts that do not hold; none: the seam fits."""
    return [
        f"{getattr(module, '__name__', module)}.{name}"
        for module, name, used in _FACTS
        if not set(used.split()) <= _names_in(module, name)
    ]


def installed() -> str:
    """The versions of the libraries, for a log."""
    return ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in _TRIED
    )


def libraries() -> Iterator[tuple[str, str, bool]]:
    """Each library, its installed version, and whether that was tried."""
    for name, (first, last) in _TRIED.items():
        version = importlib.metadata.version(name)
        numbers = re.match(r"(\d+)\.(\d+)", version)
        minor = tuple(map(int, numbers.groups())) if numbers else ()
        yield name, version, first <= minor <= last


def _names_in(module: object, name: str) -> set[str]:
    try:
        function: Any = operator.attrgetter(name)(module)
    except AttributeError:
        return set()
    if isinstance(function, property):
        function = function.fget
    function = getattr(function, "__wrapped__", function)
    return set(_names(getattr(function, "__code__", None)))


def _names(code: types.CodeType | None) -> Iterator[str]:
    if code is None:
        return
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
