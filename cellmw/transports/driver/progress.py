# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The interface between a message and the driver that sends it.

A thread that sends a message puts it into :data:`under_way` first.  A driver
that knows of this interface tells the message there how far it is, and so
derives from :class:`Reporting`.
"""

from __future__ import annotations

import enum
import threading
from typing import Any, Protocol


class Verdict(enum.Enum):
    """What a failed message says about its cell."""

    ANSWERED = enum.auto()
    """The broker took the message; what came back is the far side's."""

    REFUSED = enum.auto()
    """The broker refuses these credentials, or has no such vhost."""

    UNREACHABLE = enum.auto()
    """The connection failed."""

    LATE = enum.auto()
    """The message's deadline has passed; the connection is broken off."""

    FULL = enum.auto()
    """All connections are in use, and the broker allows no more."""

    INVALID = enum.auto()
    """The broker rejected this message, and certainly did not take it."""

    NACKED = enum.auto()
    """The broker answered that it did not keep the message everywhere."""

    UNRELATED = enum.auto()
    """The caller's mistake, or this process's."""


class Message(Protocol):
    """A message as its driver sees it.

    :ivar deadline: when delivering it must end, on ``time.monotonic``
    :ivar reserved: the connection that its driver keeps for it, if any
    """

    deadline: float
    reserved: Any

    def writing(self) -> None:
        """Say that the next step may write the message.

        Raises where the message must not be written.  May be called again.
        """

    def written(self) -> None:
        """Say that the broker has confirmed the message."""

    def failed(self, verdict: Verdict, error: BaseException) -> None:
        """Say why delivering failed.  The first reason counts."""


class _UnderWay(threading.local):
    message: Message | None = None


under_way = _UnderWay()
"""Holds, as ``message``, what the calling thread is sending."""


class Reporting:
    """Base class of drivers that tell :data:`under_way` what they do."""

    def connect(self) -> None:
        """Open a connection to the broker, and write no message.

        :raises Exception: the broker cannot be reached
        """
        raise NotImplementedError

    def reserve(self, message: Message) -> bool:
        """Whether sending waits for nothing without a deadline.

        From then on the driver ends each wait at the message's deadline.
        """
        return False
