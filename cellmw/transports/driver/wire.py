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
import select
import socket
import ssl
import time
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
    :ivar expired: whether a deadline has passed, and the socket is shut down
    :ivar is_short: whether the socket was left with a short timeout
    """

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.deadline: float | None = None
        self.publishing: Message | None = None
        self.expired = False
        self.is_short = False
        self._sock: socket.socket = transport.sock
        self._recv = transport._quick_recv
        self._send = transport._write
        self._arrived = select.poll()
        self._arrived.register(self._sock.fileno(), select.POLLIN)
        transport._quick_recv = self._read
        transport._write = self._write

    @property
    def is_open(self) -> bool:
        """Whether it is not known to be closed."""
        return not self.expired and bool(self.transport.connected)

    def is_quiet(self) -> bool:
        """Whether nothing has arrived, an end of the stream included."""
        sock = self._sock
        if self.transport._read_buffer or (
            isinstance(sock, ssl.SSLSocket) and sock.pending()
        ):
            return False
        return not self._arrived.poll(0)

    def _arm(self) -> bool:
        """Bound the next wait; whether the deadline does that."""
        if self.expired:
            raise Expired
        if self.deadline is None:
            return False
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.break_off()
        timeout = self._sock.gettimeout()
        if timeout == 0:
            return False
        if timeout is None or not -_TOLERANCE < timeout - left < _TOLERANCE:
            self._sock.settimeout(left)
            self.is_short = left < _SHORT
        return True

    def _read(self, count: int) -> bytes:
        bounded = self._arm()
        try:
            data: bytes = self._recv(max(count, _READ_AHEAD))
            return data
        except (BlockingIOError, ssl.SSLWantReadError):
            raise TimeoutError("timed out") from None
        except TimeoutError:
            if bounded:
                self.break_off()
            raise

    def _write(self, data: Any) -> None:
        bounded = self._arm()
        if self.publishing is not None:
            self.publishing.writing()
        try:
            self._send(data)
        except TimeoutError:
            if bounded:
                self.break_off()
            raise

    def break_off(self) -> NoReturn:
        """Shut the socket down.

        :raises Expired: always
        """
        self.expired = True
        self.transport.connected = False
        with contextlib.suppress(OSError, ValueError):
            # Not SSLSocket's, which forgets its TLS object.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        raise Expired
