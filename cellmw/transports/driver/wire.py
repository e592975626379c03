# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A connection's socket, with a deadline.

py-amqp bounds each read and write by itself, which bounds no message: a
broker that sends a byte now and then holds its client for ever.  A
:class:`Wire` bounds the sum.  At the deadline it shuts the socket down, so
that whatever the driver does next with it fails at once.

Read in amqp 5.2 and 5.4: a transport reads with ``_quick_recv`` and writes
with ``_write``, both attributes of the object; ``_read_buffer`` holds what
was received and not used; a read that finds nothing in the middle of a frame
is repeated without a pause where it raises EAGAIN, and not where it raises
TimeoutError.
"""

from __future__ import annotations

import contextlib
import errno
import math
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, NoReturn

from cellmw.transports.driver.progress import Message

# Received at once, where it has arrived: py-amqp asks for each frame's head,
# body and end by themselves.  TLS gives no more than this anyway.
_READ_AHEAD = 16384
# How much longer than the deadline a wait may last, in seconds.  Setting a
# socket's timeout is a system call, which this saves for most messages.
_TOLERANCE = 0.05
# A shorter timeout than this is not left on a socket that is not in use.
_SHORT = 1.0


class Expired(ConnectionAbortedError):
    """The deadline of a message has passed; its connection is broken off."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNABORTED, "its time is up")


class Wire:
    """The socket under one transport of py-amqp.

    Used by one thread at a time: the driver's lock sees to that.

    :ivar deadline: of the message that has the connection, on
        ``time.monotonic``; None: nobody has it
    :ivar publishing: the message whose bytes are written now
    :ivar is_short: whether the socket was left with a short timeout
    """

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.deadline: float | None = None
        self.publishing: Message | None = None
        self.is_short = False
        self._sock: socket.socket = transport.sock
        self._arrived = select.poll()
        self._arrived.register(self._sock.fileno(), select.POLLIN)
        transport._quick_recv = self._bounded(transport._quick_recv)
        transport._write = self._bounded(transport._write)

    @property
    def is_open(self) -> bool:
        """Whether it is not known to be closed."""
        return bool(self.transport.connected)

    def is_quiet(self) -> bool:
        """Whether it is open, and no more has arrived, nor its end."""
        transport, sock = self.transport, self._sock
        if transport._read_buffer or not transport.connected:
            return False
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return False
        return not self._arrived.poll(0)

    def _bounded(self, use: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A read or a write that waits until the deadline at most."""
        sock = self._sock

        def bounded(what: Any) -> Any:
            timeout = sock.gettimeout()
            is_bound = timeout != 0 and self.deadline is not None
            if self.deadline is not None:
                left = self.deadline - time.monotonic()
                if left <= 0:
                    self.break_off()
                if is_bound and abs((timeout or math.inf) - left) > _TOLERANCE:
                    sock.settimeout(left)
                    self.is_short = left < _SHORT
            if type(what) is int:
                what = max(what, _READ_AHEAD)
            elif self.publishing is not None:
                self.publishing.writing()
            try:
                return use(what)
            except (BlockingIOError, ssl.SSLWantReadError):
                raise TimeoutError("timed out") from None
            except TimeoutError:
                if is_bound:
                    self.break_off()
                raise

        return bounded

    def break_off(self) -> NoReturn:
        """Shut the socket down at the deadline.

        :raises Expired: always
        """
        self.shut_down()
        raise Expired

    def shut_down(self) -> None:
        """See that what is done next with the socket fails at once."""
        self.transport.connected = False
        with contextlib.suppress(OSError, ValueError):
            # Not SSLSocket's, which forgets its TLS object.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
