# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What this package knows of oslo.messaging's inside.

The only module that makes transports, and the only one that knows what its
drivers raise and where their threads wait.  Each such fact was read or
measured on oslo.messaging 18.3; where a driver is not known, the answer is
the careful one.
"""

from __future__ import annotations

import enum
import gc
import importlib.metadata
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import amqp.exceptions
import kombu.exceptions
import kombu.transport.pyamqp
import oslo_messaging
from oslo_config import cfg
from oslo_messaging._drivers import amqpdriver, base, common, impl_rabbit
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions
from cellmw.cells.mapping import Generation
from cellmw.transports import url_options

# How long the broker keeps the reply queue of a transport that was made for
# one request.  oslo.messaging's default of 1800 s, meant for reconnecting,
# would let them pile up.  Seconds.
ONE_REQUEST_QUEUE_TTL = 2

_GLOBAL_ONLY_GROUPS = ("oslo_messaging_metrics", "oslo_messaging_tracing")


def known_drivers() -> frozenset[str]:
    """The transport URL schemes that have a driver installed."""
    found = importlib.metadata.entry_points(group="oslo.messaging.drivers")
    return frozenset(entry.name for entry in found)


class _ConfOnly(RPCTransport):
    """As much of a transport as an RPCClient wants when it is made."""

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self.conf = conf


def prepare(conf: cfg.ConfigOpts) -> None:
    """Register on a configuration what sending reads from it.

    oslo.messaging registers two groups on the global configuration only, and
    each send with a private one fails for want of them.  May be called again.
    """
    oslo_messaging.TransportURL(conf)
    oslo_messaging.get_rpc_client(
        _ConfOnly(conf), oslo_messaging.Target(topic="none")
    )
    if conf is cfg.CONF:
        return
    for name in _GLOBAL_ONLY_GROUPS:
        group = cfg.CONF._groups.get(name)
        for info in group._opts.values() if group is not None else ():
            try:
                conf.register_opt(info["opt"], group=name)
            except cfg.DuplicateOptError:
                continue  # the service has its own


def base_url(conf: cfg.ConfigOpts) -> str | None:
    """``[DEFAULT] transport_url``, where anybody has set it.

    oslo.messaging's default is taken for none: it has a scheme and nothing
    else, so that a template over it would lead to another vhost.
    """
    found = conf.get_location("transport_url")
    if found is not None and found.location is cfg.Locations.opt_default:
        return None
    url: str | None = conf.transport_url
    return url


def open_default(
    conf: cfg.ConfigOpts, allowed_remote_exmods: list[str]
) -> RPCTransport:
    """The service's own transport, of ``[DEFAULT] transport_url``.

    Raises what oslo.messaging raises.
    """
    return oslo_messaging.get_rpc_transport(
        conf, allowed_remote_exmods=allowed_remote_exmods
    )


class OsloTransports:
    """Opens transports with one configuration.  Thread-safe.

    :param conf: prepared by :func:`prepare`
    :param allowed_remote_exmods: modules whose exceptions may come back
    """

    def __init__(
        self, conf: cfg.ConfigOpts, allowed_remote_exmods: tuple[str, ...]
    ) -> None:
        self._conf = conf
        self._allowed_remote_exmods = list(allowed_remote_exmods)

    def open(self, generation: Generation, one_request: bool) -> RPCTransport:
        """Open a transport.  Opens no socket yet; the first send does.

        :param one_request: it serves one request and is closed then
        :raises CellMisconfigured: the URL, its driver or its query part
            cannot be used
        """
        made = self._make(generation, one_request)
        if isinstance(made, RPCTransport):
            return made
        raise exceptions.CellMisconfigured(
            made, cell_uuid=generation.cell_uuid
        )

    def _make(
        self, generation: Generation, one_request: bool
    ) -> RPCTransport | str:
        """The transport, or why there is none.

        It returns that instead of raising, for this frame knows the URL and
        must not be part of a traceback.
        """
        try:
            url = oslo_messaging.TransportURL.parse(
                self._conf, generation.url.reveal()
            )
        except (oslo_messaging.InvalidTransportURL, ValueError):
            # The message of either may quote a part of it.
            return "its URL cannot be parsed"
        try:
            if one_request and _is_rabbit(url.transport):
                url.query.setdefault(
                    "rabbit_transient_queues_ttl", str(ONE_REQUEST_QUEUE_TTL)
                )
            transport = oslo_messaging.get_rpc_transport(
                self._conf,
                url,
                allowed_remote_exmods=self._allowed_remote_exmods,
            )
            reason = ""
            if _bound_connecting(transport):
                reason = url_options.rabbit_problem(
                    transport._driver.conf[url_options.RABBIT], url.query
                )
            return reason or transport
        except Exception as error:
            return self._why_not(url, error)

    def _why_not(
        self, url: oslo_messaging.TransportURL, error: Exception
    ) -> str:
        """Why no transport could be made.

        The error itself may quote a part of the URL.
        """
        return (
            url_options.missing_package(url.transport)
            or url_options.refusal(self._conf, url)
            or f"its driver cannot be used ({type(error).__name__})"
        )


def _is_rabbit(scheme: str) -> bool:
    return scheme.partition("+")[0] in ("rabbit", "kombu", "amqp")


class _Connection(impl_rabbit.Connection):
    """A connection that when it is opened tries each host once.

    The driver's own, if it is the one for replies, tries for ever, in the
    thread of the first call and under a lock that all others need.  If it is
    one to send with, ``retry=0`` makes it try one host of a cluster, which
    may be the dead one.  Once open, it behaves as the driver's own.
    """

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        url: oslo_messaging.TransportURL,
        purpose: str,
        retry: int | None = None,
    ) -> None:
        tries_left = max(0, len(url.hosts) - 1)
        try:
            super().__init__(conf, url, purpose, retry=tries_left)
            return
        except Exception as error:
            # A certificate file may have gone since the transport was made.
            reason = url_options.rabbit_problem(
                conf[url_options.RABBIT], url.query
            )
            if not reason and _tells_of_broker(error):
                raise
            no_thread = isinstance(error, RuntimeError) and (
                "start new thread" in str(error)
            )
            # The error's text may quote a piece of a password.
            name = type(error).__name__
        if no_thread:
            raise exceptions.CellBusy("no thread can be started for it")
        raise exceptions.CellMisconfigured(
            reason or f"its URL cannot be used to connect ({name})"
        )


def _tells_of_broker(error: Exception) -> bool:
    """Whether the broker or the network made an attempt to connect fail.

    Everything else stems from the URL or the configuration.
    """
    if isinstance(error, amqp.exceptions.FrameSyntaxError):
        # Raised here as well, for what does not fit into a frame; the
        # broker's names the method.
        return error.method_sig is not None
    return isinstance(error, (*_UNREACHABLE, MemoryError))


def _bound_connecting(transport: RPCTransport) -> bool:
    """Let a transport's connections be opened with a bound.

    :returns: whether its driver is RabbitMQ's
    """
    pool: Any = getattr(transport._driver, "_connection_pool", None)
    if getattr(pool, "connection_cls", None) is impl_rabbit.Connection:
        pool.connection_cls = _Connection
        return True
    return False


class Verdict(enum.Enum):
    """What an exception of a send says about the cell."""

    ANSWERED = enum.auto()
    """The broker took the message: what came back is the far side's."""

    REFUSED = enum.auto()
    """The broker does not take these credentials, or has no such vhost."""

    UNREACHABLE = enum.auto()
    """Delivering failed."""

    UNRELATED = enum.auto()
    """It is the caller's: a message that cannot be serialized, say."""


_UNREACHABLE = (
    oslo_messaging.MessageDeliveryFailure,
    oslo_messaging.MessagingTimeout,
    base.TransportDriverError,
    common.RPCException,
    amqp.exceptions.AMQPError,
    kombu.exceptions.OperationalError,
    kombu.exceptions.InconsistencyError,
    OSError,
    EOFError,
)
_ANSWERED = (
    oslo_messaging.RemoteError,
    oslo_messaging.MessageUndeliverable,
)


# Where drivers wait for a reply, and where they raise what came in it.
_AWAIT_REPLY = ("ReplyWaiter.wait", "MemoryDriver._wait")
_RAISES_REPLY = "AMQPDriverBase._send"


def judge(error: BaseException, *, answerable: bool) -> Verdict:
    """What an exception that came out of a send says about the cell.

    :param answerable: it was a call, and may have been written
    """
    if isinstance(error, _ANSWERED):
        return Verdict.ANSWERED
    if answerable and (
        isinstance(error, oslo_messaging.MessagingTimeout) or _came_back(error)
    ):
        return Verdict.ANSWERED
    if isinstance(
        error, (amqp.exceptions.AccessRefused, amqp.exceptions.NotAllowed)
    ):
        return Verdict.REFUSED
    if isinstance(error, _UNREACHABLE):
        return Verdict.UNREACHABLE
    return Verdict.UNRELATED


def _came_back(error: BaseException) -> bool:
    """Whether it rose while a call awaited its reply, or from the reply.

    The class does not tell: an OSError of the far side is rebuilt here as an
    OSError (oslo.messaging's deserialize_remote_exception).
    """
    name = ""
    traceback = error.__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_qualname
        if name in _AWAIT_REPLY:
            return True
        traceback = traceback.tb_next
    return name == _RAISES_REPLY


class AnnouncingTarget(oslo_messaging.Target):
    """A target that tells when the driver is about to write.

    The drivers on AMQP read ``fanout`` when they have a connection and
    before they publish, and nowhere else.  What ``announce`` raises there
    keeps the message from being written.
    """

    def __init__(
        self, target: oslo_messaging.Target, announce: Callable[[], None]
    ) -> None:
        self._announce = announce
        self.exchange = target.exchange
        self.topic = target.topic
        self.namespace = target.namespace
        self.version = target.version
        self.server = target.server
        self._fanout: bool | None = target.fanout
        self.accepted_namespaces = target.accepted_namespaces

    @property
    def fanout(self) -> bool | None:
        """Whether all servers get it; the next step of the driver writes."""
        self._announce()
        return self._fanout


def announces(transport: RPCTransport) -> bool:
    """Whether the driver reads a target's ``fanout`` just before it writes.

    Of other drivers it is not known, so whatever is given to them may have
    been written.
    """
    driver = transport._driver
    return isinstance(driver, amqpdriver.AMQPDriverBase) or bool(
        getattr(driver, "reads_fanout_before_publishing", False)
    )


def is_awaiting_reply(thread_id: int | None) -> bool:
    """Whether a thread that makes a call has delivered it, and waits.

    A driver does not say so while it is at it, but its stack does.  Only
    asked about a call that has been under way for ``send_timeout``.
    """
    if thread_id is None:
        return False
    frame = _frames().get(thread_id)
    try:
        while frame is not None:
            if frame.f_code.co_qualname in _AWAIT_REPLY:
                return True
            frame = frame.f_back
        return False
    finally:
        del frame


def _frames() -> dict[int, types.FrameType]:
    """Where each thread is.

    CPython 3.11 makes what it gives under a lock of its own.  Were garbage
    collected meanwhile, and some of it to run Python code, other threads
    would come to wait for that lock while they have the interpreter's: the
    process would stand still for ever (python/cpython#106883).
    """
    with _frames_lock():
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if collects:
                gc.enable()


_frames_locks: dict[int, threading.Lock] = {}


def _frames_lock() -> threading.Lock:
    # One for each process: a fork may have copied it locked.
    pid = os.getpid()
    lock = _frames_locks.get(pid)
    return lock or _frames_locks.setdefault(pid, threading.Lock())


# Loaded on use otherwise, and then the first request would pay for it.
_ = kombu.transport.pyamqp
