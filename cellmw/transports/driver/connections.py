# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A transport's connections to send with.

In place of oslo.messaging's pool, which waits without end when it is full,
closes expired connections under its lock, and gives out dead ones.  What is
owned is the same: each connection is open from :meth:`ConnectionPool.create`
until the pool closes it.

Read in oslo.messaging 18.3: ``ConnectionContext`` takes a connection to send
with by ``get`` and gives it back by ``put``, in one thread, whatever happens
in between, and makes one for replies by ``create``.  ``cleanup`` calls
``empty``, which closes what ``iter_free`` takes out of ``_items``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import amqp.exceptions
from oslo_messaging._drivers import common, pool

from cellmw.transports.driver.progress import Message, Verdict, under_way
from cellmw.transports.driver.rabbit import Connection, NotReady, reporting
from cellmw.transports.driver.wire import Expired

# How long a broker's limit is taken for granted, in seconds.
_LIMITED_FOR = 2.0
# Pause between two tries while the broker still counts what was closed.
_PAUSE = 0.05


class NoConnectionFree(Exception):
    """All connections stayed in use until the message's deadline."""

    def __init__(self, size: int) -> None:
        super().__init__(
            f"all {size} connections of this transport are in use"
        )


def is_limit(error: BaseException) -> bool:
    """Whether a connection was not opened because there are too many.

    RabbitMQ says NOT_ALLOWED (530) for a vhost's, a user's and its own
    limits.
    """
    return isinstance(
        error, (amqp.exceptions.NotAllowed, amqp.exceptions.ResourceError)
    )


class ConnectionPool(pool.ConnectionPool):
    """Connections that are given out alive, in turn, until a deadline.

    Thread-safe.  Opens and closes nothing under its lock.

    :param like: the driver's own pool, from which nothing was taken yet
    :param later: runs a function in another thread; whether it could
    """

    def __init__(
        self, like: Any, later: Callable[[Callable[[], Any]], bool]
    ) -> None:
        super().__init__(
            like.conf,
            like._max_size,
            like._min_size,
            like._item_ttl,
            like.url,
            Connection,
        )
        self._later = later
        self._waiting = 0
        self._unclosed: list[Connection] = []
        # Until then no further connection is opened.
        self._limited_until = 0.0

    def get(self, retry: int | None = None) -> Connection:
        """A connection for the message under way, or for nobody's.

        :raises NoConnectionFree: none became free in time
        :raises Expired: there is one, and no time left to use it
        """
        message = under_way.message
        if message is not None and message.reserved is not None:
            reserved: Connection = message.reserved
            message.reserved = None
            return reserved
        while True:
            connection = self._next(message)
            if connection is None:
                connection = self._open(retry)
            if connection is None:
                continue  # the broker allows no more: wait for one of ours
            if message is None:
                return connection
            try:
                if connection.take(message):
                    return connection
            except Expired as error:
                # It serves the next message.
                self.put(connection)
                message.failed(Verdict.LATE, error)
                raise
            self._discard(connection)

    def reserve(self, message: Message) -> bool:
        """Keep a connection for the next :meth:`get` of this message.

        Where all are in use and no more may be opened, waits in line until
        the deadline.  Does not wait for the thread that has one for its
        heartbeat.

        :returns: whether there is one; False: one may be opened
        :raises NoConnectionFree: none became free in time
        """
        while True:
            connection = self._next(message)
            if connection is None:
                # For somebody who can wait until it is open.
                with self._cond:
                    self._current_size -= 1
                    self._cond.notify()
                return False
            try:
                if connection.take(message, wait=False):
                    message.reserved = connection
                    return True
            except NotReady:
                self.put(connection)
                return False
            except BaseException:
                self.put(connection)
                raise
            self._discard(connection)

    def _next(self, message: Message | None) -> Connection | None:
        """The one used last; None: one may be opened, and is booked."""
        with self._cond:
            if not self._waiting:
                if self._items:
                    connection: Connection = self._items.pop()[1]
                    connection.is_pooled = False
                    return connection
                if self._may_open():
                    self._current_size += 1
                    return None
            self._waiting += 1
            try:
                return self._wait(message)
            finally:
                self._waiting -= 1

    def _wait(self, message: Message | None) -> Connection | None:
        while True:
            left = None
            if message is not None:
                left = message.deadline - time.monotonic()
                if left <= 0:
                    error = NoConnectionFree(self._current_size)
                    message.failed(Verdict.FULL, error)
                    raise error
            if self._current_size < self._max_size:
                # It is the broker's limit, and may be lifted.
                retry = max(0.0, self._limited_until - time.monotonic())
                left = retry if left is None else min(left, retry)
            # Woken in the order of their coming.
            self._cond.wait(left)
            if self._items:
                connection: Connection = self._items.pop()[1]
                connection.is_pooled = False
                return connection
            if self._may_open():
                self._current_size += 1
                return None

    def _may_open(self) -> bool:
        return self._current_size < self._max_size and (
            not self._limited_until
            or not self._current_size
            or time.monotonic() >= self._limited_until
        )

    def _open(self, retry: int | None) -> Connection | None:
        """Open what was booked; None: there are others, and no more fit."""
        try:
            connection: Connection = super().create(retry=retry)
        except BaseException as error:
            with self._cond:
                self._current_size -= 1
                others = self._current_size
                if others and is_limit(error):
                    self._limited_until = time.monotonic() + _LIMITED_FOR
                self._cond.notify()
            if others and is_limit(error):
                return None
            with reporting():
                raise
        self._limited_until = 0.0
        return connection

    def create(
        self, purpose: str = common.PURPOSE_SEND, retry: int | None = None
    ) -> Connection:
        """Open a connection that the pool does not count: one for replies.

        Where the broker allows no more, one of those to send with is closed
        for it.
        """
        with reporting():
            for give_up in self._making_room():
                try:
                    made: Connection = super().create(purpose, retry=retry)
                    return made
                except Exception as error:
                    if give_up or not is_limit(error):
                        raise
            raise AssertionError  # the last round raises or returns

    def _making_room(self) -> Iterator[bool]:
        """Rounds in which to try; True: the last one."""
        message = under_way.message
        if message is None:
            yield True
            return
        yield False
        # Looked at afterwards: those to send with may have come meanwhile.
        if not self._current_size:
            yield True
            return
        with self._cond:
            self._limited_until = time.monotonic() + _LIMITED_FOR
        spare = self._next(message)
        if spare is None:
            with self._cond:
                self._current_size -= 1
        else:
            spare.close()
            with self._cond:
                self._current_size -= 1
        # The broker counts it for a moment yet.
        while time.monotonic() < message.deadline - _PAUSE:
            # Nor must another one to send with take the room.
            self._limited_until = time.monotonic() + _LIMITED_FOR
            time.sleep(_PAUSE)
            yield False
        yield True

    def put(self, item: Connection) -> None:
        """Take a connection back; a second time does nothing.

        Closes the one that is unused for longest, if that is too long, in
        another thread.
        """
        if item.is_pooled:
            # A signal's handler has raised at the end of the first time.
            return
        if not item.leave():
            self._discard(item)
            return
        now = time.monotonic()
        expired = None
        with self._cond:
            item.is_pooled = True
            self._items.append((now, item))
            if self._waiting:
                self._cond.notify()
            if len(self._items) > self._min_size:
                since, unused = self._items[0]
                if now - since >= self._item_ttl:
                    self._items.popleft()
                    self._current_size -= 1
                    expired = unused
        if expired is not None:
            self._close(expired)

    def _discard(self, connection: Connection) -> None:
        connection.is_pooled = True
        with self._cond:
            self._current_size -= 1
            self._cond.notify()
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        # Joins the heartbeat's thread, and may talk to the broker.
        if not self._later(connection.close):
            with self._cond:
                # No thread: left to the end of the transport.
                self._unclosed.append(connection)

    def iter_free(self) -> Iterator[Connection]:
        """Take out what nobody uses, to be closed."""
        yield from super().iter_free()
        while self._unclosed:
            yield self._unclosed.pop()
