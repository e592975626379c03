# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""oslo.messaging's connection to RabbitMQ, which tells what it does.

Read in oslo.messaging 18.3, kombu 5.4 and 5.7, and amqp 5.2 and 5.4:

- ``Connection._ensure_publishing`` takes the connection's lock and runs the
  method that publishes in ``ensure``, which replaces what it raises by a
  MessageDeliveryFailure.  With ``retry=0`` it runs it once.  The method
  returns when the broker has confirmed the message.
- ``_publish`` sets the socket's timeout twice, by
  ``_transport_socket_timeout``.
- ``_set_current_channel`` gets each new channel.  ``_heartbeat_start`` is
  called at the end of opening, before anybody else has the connection, and
  only where it is one to send with.
- kombu makes a transport by ``create_transport`` wherever it has none, and
  that makes each connection of py-amqp as its ``Connection``, which makes the
  socket by ``Transport``.  ``_setup_transport`` is called when that is
  connected, and before anything is written.
- ``declare_consumer`` tries for ever where nothing else is said.
- kombu keeps its default channel in ``_default_channel``, also when it was
  closed.
- A channel of py-amqp sends each method by its ``send_method``; the first
  argument is the method's number.  Before ``Basic.Publish`` it reads what has
  arrived and turns on confirms.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import amqp.exceptions
import amqp.spec
import amqp.transport
import kombu.exceptions
import kombu.transport.pyamqp
import oslo_messaging
from oslo_concurrency import lockutils
from oslo_config import cfg, types
from oslo_messaging._drivers import base, common, impl_rabbit

from cellmw import exceptions
from cellmw.transports import url_options
from cellmw.transports.driver.progress import Message, Verdict, under_way
from cellmw.transports.driver.wire import Expired, Wire

_TRANSPORTS = (amqp.transport.TCPTransport, amqp.transport.SSLTransport)

_CONNECTION_ERRORS = (
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
# How much longer than its message may be waited for, in seconds, opening takes
# at most: what is opened too late for one message serves the next.
_OPENING = 5.0
_AS_IT_IS = contextlib.nullcontext()
# What RabbitMQ 3.10 says where a 403 is not about the user's rights.
_NOT_ABOUT_RIGHTS = (
    "reserved prefix",
    "default exchange",
    "internal exchange",
)


def judge(error: BaseException) -> Verdict:
    """What an error of a connection says about the cell, by its class."""
    if isinstance(error, oslo_messaging.MessageUndeliverable):
        return Verdict.ANSWERED
    if isinstance(error, Expired):
        return Verdict.LATE
    if isinstance(
        error, (amqp.exceptions.AccessRefused, amqp.exceptions.NotAllowed)
    ):
        return Verdict.REFUSED
    if isinstance(error, _CONNECTION_ERRORS):
        return Verdict.UNREACHABLE
    return Verdict.UNRELATED


def judge_publishing(error: BaseException) -> Verdict:
    """The same of an error that publishing a message raised."""
    if isinstance(error, amqp.exceptions.MessageNacked):
        return Verdict.NACKED
    if isinstance(error, amqp.exceptions.NotAllowed):
        # It ends the connection, whatever became of the message.
        return Verdict.UNREACHABLE
    if isinstance(error, amqp.exceptions.AccessRefused):
        text = str(error)
        if any(part in text for part in _NOT_ABOUT_RIGHTS):
            return Verdict.INVALID
    elif isinstance(
        error,
        (
            amqp.exceptions.ChannelError,
            # What cannot be put into a frame.
            amqp.exceptions.FrameSyntaxError,
            struct.error,
            UnicodeError,
        ),
    ):
        return Verdict.INVALID
    return judge(error)


def _nothing() -> None:
    """For a channel alone."""


def _fail(error: Exception) -> None:
    raise error


def _problem_finder(
    conf: cfg.ConfigOpts, url: oslo_messaging.TransportURL
) -> Callable[[], str]:
    return lambda: url_options.rabbit_problem(
        conf[url_options.RABBIT], url.query
    )


def _tells_of_broker(error: Exception) -> bool:
    """Whether the broker or the network made an attempt to connect fail.

    Everything else stems from the URL or the configuration.
    """
    if isinstance(error, amqp.exceptions.FrameSyntaxError):
        # Raised here as well, for what does not fit into a frame; the
        # broker's names the method.
        return error.method_sig is not None
    return isinstance(error, (*_CONNECTION_ERRORS, MemoryError))


def _end_of_opening() -> float | None:
    """When to give up what is opened for the message under way, if any."""
    message = under_way.message
    return None if message is None else message.deadline + _OPENING


class _Amqp(kombu.transport.pyamqp.Connection):
    """py-amqp's connection, with a deadline from its first byte on."""

    def Transport(  # noqa: N802  # as py-amqp calls it
        self,
        host: str,
        connect_timeout: float | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        deadline = _end_of_opening()
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Expired
            connect_timeout = min(left, connect_timeout or left)
        made = super().Transport(host, connect_timeout, *args, **kwargs)
        if type(made) in _TRANSPORTS:
            set_up = made._setup_transport

            def set_up_with_wire() -> None:
                set_up()
                made.wire = Wire(made)
                made.wire.deadline = deadline

            made._setup_transport = set_up_with_wire
        return made


class NotReady(Exception):
    """A connection cannot be used at once."""


class _Lock(_thread.RLock):  # type: ignore[misc]  # final in typeshed only
    """In place of the driver's lock: can be tried, and taken again.

    The driver's prefers the heartbeat's thread.  Here that needs no
    preference: a connection that is never free sends all the time, which
    RabbitMQ takes for a heartbeat.
    """

    def heartbeat_acquire(self) -> None:
        """Take it."""
        self.acquire()

    def for_heartbeat(self) -> Self:
        """Hold it for one heartbeat."""
        return self


class Connection(impl_rabbit.Connection):
    """A connection that serves one message at a time, until its deadline.

    When it is opened it tries each host once.  The driver's own, if it is the
    one for replies, tries for ever, in the thread of the first call and under
    a lock that all others need.  If it is one to send with, ``retry=0`` makes
    it try one host of a cluster, which may be the dead one.

    :ivar wire: its socket; None: not known, so that no deadline holds
    :ivar is_taken: whether a message has it
    :ivar is_pooled: whether nobody has it, or it is to be closed
    """

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        url: oslo_messaging.TransportURL,
        purpose: str,
        retry: int | None = None,
    ) -> None:
        self.wire: Wire | None = None
        self.is_taken = False
        self.is_pooled = False
        self._hooked: Any = None
        tries_left = max(0, len(url.hosts) - 1)
        find_problem = _problem_finder(conf, url)
        # An error tracker may show the variables of this frame.
        given = [(conf, url)]
        del conf, url
        try:
            super().__init__(*given.pop(), purpose, retry=tries_left)
            return
        except Exception as error:
            # A certificate file may have gone since the transport was made.
            reason = find_problem()
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

    def take(self, message: Message, *, wait: bool = True) -> bool:
        """Reserve it for a message; whether it can be written to.

        Reads what has arrived: where the broker or a proxy has closed the
        connection, that is seen here, before anything is written.

        :param wait: for the heartbeat's thread, until the message's deadline,
            and for what is to be opened afterwards
        :raises Expired: the deadline has passed, which says nothing about
            this connection
        :raises NotReady: there is something to wait for
        """
        wire = self.wire
        if wait:
            left = message.deadline - time.monotonic()
            if left <= 0 or not self._connection_lock.acquire(timeout=left):
                raise Expired
        elif (
            wire is None
            or self.channel is None
            or not self._connection_lock.acquire(blocking=False)
        ):
            raise NotReady
        self.is_taken = True
        try:
            if wire is None:
                # Nothing tells when it writes.
                message.writing()
                return True
            wire.deadline = message.deadline
            if wire.is_quiet() or self._can_go_on(wire):
                return True
        except BaseException:
            self.leave()
            raise
        self.leave()
        return False

    def leave(self) -> bool:
        """End the reservation, if there is one.

        :returns: whether another message may be sent with it
        """
        wire = self.wire
        if self.is_taken:
            self.is_taken = False
            if wire is not None:
                wire.deadline = None
                if wire.is_short and wire.is_open:
                    wire.is_short = False
                    self.set_transport_socket_timeout()
        lock: Any = self._connection_lock
        if lock._is_owned():
            # Asked of the lock: a signal's handler may have raised before
            # is_taken was set.
            lock.release()
        return wire is None or bool(wire.transport.connected)

    def _can_go_on(self, wire: Wire) -> bool:
        """Read what has arrived, and look whether the connection is open.

        :returns: whether it is, after that
        """
        if not wire.is_open:
            return False
        try:
            while True:
                self.connection.drain_events(timeout=0)
        except TimeoutError:
            return wire.is_open
        except Exception:
            return False

    def _heartbeat_start(self) -> None:
        self._connection_lock = _Lock()
        super()._heartbeat_start()

    def _set_current_channel(self, new_channel: Any) -> None:
        super()._set_current_channel(new_channel)
        if new_channel is None:
            # The driver has closed it, and kombu would give it out again.
            self.connection._default_channel = None
        if new_channel is None or new_channel is self._hooked:
            return
        self._hooked = new_channel
        transport = getattr(new_channel.connection, "transport", None)
        self.wire = getattr(transport, "wire", None)
        if self.wire is not None and self.purpose == common.PURPOSE_SEND:
            new_channel.send_method = self._announcing(new_channel.send_method)

    def ensure_connection(self) -> None:
        """Open it, for the message under way if there is one."""
        connection = self.connection
        make = type(connection).create_transport

        def create_transport() -> Any:
            made = make(connection)
            if isinstance(made, kombu.transport.pyamqp.Transport):
                made.Connection = _Amqp
            return made

        if "create_transport" not in vars(connection):
            connection.create_transport = create_transport
            # It may have one that it was not asked for.
            connection._transport = None
        super().ensure_connection()
        if self.wire is not None:
            self.wire.deadline = None
            self.wire.is_short = False

    def _announcing(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def send_method(signature: Any, *args: Any, **kwargs: Any) -> Any:
            wire = self.wire
            if wire is None or signature != amqp.spec.Basic.Publish:
                return send(signature, *args, **kwargs)
            wire.publishing = under_way.message
            try:
                return send(signature, *args, **kwargs)
            finally:
                wire.publishing = None

        return send_method

    def ensure(
        self, method: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run what publishes a message, and tell the message.

        Once, where the message has this connection: the driver's own way
        would publish it no second time either, and costs more than the rest
        of ours.
        """
        message = under_way.message
        if message is None or not self.is_taken:
            if message is not None:
                kwargs.setdefault("retry", 0)
            return super().ensure(method, *args, **kwargs)
        try:
            try:
                if self.channel is None:
                    super().ensure(_nothing, *args, **kwargs)
                method()
            except oslo_messaging.MessageUndeliverable as error:
                message.failed(judge_publishing(error), error)
                self._read_confirmation()
                raise
            except Exception as error:
                message.failed(judge_publishing(error), error)
                with contextlib.suppress(Exception):
                    # Puts the connection in order, and raises another error.
                    super().ensure(
                        functools.partial(_fail, error), *args, **kwargs
                    )
                raise
        except Exception:
            raise
        except BaseException:
            # What the broker says of this message is still to come, and must
            # not be taken for what it says of the next one.
            self._break_off()
            raise
        message.written()
        return None

    def _read_confirmation(self) -> None:
        """Read what follows the return of a message.

        RabbitMQ confirms what it has returned as well.  The next message on
        this channel would take that for its own confirmation.
        """
        try:
            self.channel.wait([amqp.spec.Basic.Ack, amqp.spec.Basic.Nack])
        except Exception:
            self._break_off()

    def _break_off(self) -> None:
        if self.wire is not None:
            self.wire.shut_down()

    def _transport_socket_timeout(
        self, timeout: float | None
    ) -> contextlib.AbstractContextManager[Any]:
        if self.is_taken and self.wire is not None:
            return _AS_IT_IS  # the wire sees to that, with less system calls
        bound: contextlib.AbstractContextManager[Any]
        bound = super()._transport_socket_timeout(timeout)
        return bound

    def declare_consumer(self, consumer: Any) -> Any:
        """Declare a queue: for a sender, the one for its replies."""
        wire, deadline = self.wire, _end_of_opening()
        if wire is None or deadline is None:
            return super().declare_consumer(consumer)
        wire.deadline = deadline
        try:
            with reporting():
                return super().declare_consumer(consumer)
        finally:
            wire.deadline = None
            self.set_transport_socket_timeout()


def prepare_queue_manager(conf: cfg.ConfigOpts) -> None:
    """Let a queue manager find its locks where a configuration says.

    The driver has them at ``[oslo_concurrency] lock_path`` of the global
    configuration, whichever it was made with itself.

    :raises ConfigurationError: there is to be one, and no path is set
    """
    conf.register_opts(impl_rabbit.rabbit_opts, group="oslo_messaging_rabbit")
    path = lockutils.get_lock_path(conf)
    if path and not lockutils.get_lock_path(cfg.CONF):
        lockutils.set_defaults(path)
    elif not path and conf.oslo_messaging_rabbit.use_queue_manager:
        raise exceptions.ConfigurationError(
            "[oslo_messaging_rabbit] use_queue_manager needs a directory for "
            "its locks: set [oslo_concurrency] lock_path"
        )


def keeps_queue_names(
    conf: cfg.ConfigOpts, url: oslo_messaging.TransportURL
) -> bool:
    """Whether the reply queue's name is the process's, not the transport's."""
    named = url.query.get("use_queue_manager")
    if named is None:
        return bool(conf.oslo_messaging_rabbit.use_queue_manager)
    return types.Boolean()(named)


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Tell the message under way what fails in this block."""
    try:
        yield
    except Exception as error:
        message = under_way.message
        if message is not None:
            message.failed(judge(error), error)
        raise


# Loaded on use otherwise, and then the first request would pay for it.
_ = kombu.transport.pyamqp
