# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What can go wrong, as one tree.

Everything that this package raises on purpose is a :class:`CellMWError`.
The errors about sending are also oslo.messaging
:class:`~oslo_messaging.MessagingException`, so that handlers which catch
those go on working.  An error names its cell by UUID and name, never by URL,
and holds what caused it as text: the class and the scrubbed message of a
foreign exception, never that exception itself, for its traceback may hold
credentials.
"""

from __future__ import annotations

import math
from typing import Self

import oslo_messaging

from cellmw import redaction


class CellMWError(Exception):
    """The base of all errors of this package.

    :ivar retry_after: seconds until trying again makes sense, or None where
        nothing is known about that
    :ivar is_temporary: whether trying again can help as things stand
    :ivar is_noted: whether it has been logged and counted
    """

    retry_after: float | None = None
    is_temporary = False
    is_noted = False

    @property
    def retry_after_header(self) -> str:
        """The value of a Retry-After header (RFC 9110, 10.2.3).

        Whole seconds, rounded up, and never less than one.
        """
        return str(max(1, math.ceil(self.retry_after or 0)))


class ConfigurationError(CellMWError):
    """The filter cannot be loaded as it is configured."""


class LookupFailed(CellMWError):
    """The API database could not be asked within ``lookup_timeout``.

    :ivar cause: what went wrong, without credentials
    """

    is_temporary = True

    def __init__(
        self, message: str, *, cause: str = "", retry_after: float = 1.0
    ) -> None:
        super().__init__(f"{message}: {cause}" if cause else message)
        self.cause = cause
        self.retry_after = retry_after


class RPCNotInitialized(CellMWError, oslo_messaging.MessagingException):
    """A message for the default transport before :func:`cellmw.rpc.init`."""


class SendError(CellMWError, oslo_messaging.MessagingException):
    """A message was not sent, or may not have been.

    :ivar cell_uuid: UUID of the cell that it was for, None where unknown
    :ivar cell_name: name of that cell, where it has one
    :ivar cause: what went wrong, without credentials
    :ivar maybe_delivered: False: certainly not delivered, so that sending it
        again cannot double it.  True: it may have arrived.
    """

    summary = "the message was not sent"
    maybe_delivered = False

    def __init__(
        self,
        cause: str = "",
        *,
        cell_uuid: str | None = None,
        cell_name: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.cell_uuid = cell_uuid
        self.cell_name = cell_name
        self.cause = cause
        self.retry_after = retry_after
        # What a copy, a pickle and oslo.messaging make it of again.
        super().__init__(cause)

    def again(self) -> Self:
        """A new error that says the same, for another thread to raise."""
        return type(self)(
            self.cause,
            cell_uuid=self.cell_uuid,
            cell_name=self.cell_name,
            retry_after=self.retry_after,
        )

    def __str__(self) -> str:
        parts = [self.summary]
        if self.cell_uuid is not None:
            name = ""
            if self.cell_name:
                # Others' text, which a log gets as a part of ours.
                name = f" ({redaction.one_line(self.cell_name)})"
            parts.insert(0, f"cell {self.cell_uuid}{name}")
        if self.cause:
            parts.append(self.cause)
        return ": ".join(parts)


class CellUnavailable(SendError):
    """The cell's broker cannot be reached, or is marked down."""

    summary = "not delivered, the cell cannot be reached"
    is_temporary = True


class DeliveryUncertain(
    CellUnavailable, oslo_messaging.MessageDeliveryFailure
):
    """Sending failed where the message may have arrived all the same.

    Sending it again can double it.
    """

    summary = "the message may have been delivered, or not"
    is_temporary = False
    maybe_delivered = True


class CellBusy(SendError):
    """A limit of this process is reached; the broker was not asked."""

    summary = "not delivered, a limit of this process is reached"
    is_temporary = True


class CellMisconfigured(SendError):
    """The cell mapping has connection information that cannot be used."""

    summary = "not delivered, the cell mapping cannot be used"


class DatabaseMisconfigured(CellMisconfigured):
    """The mapping's ``database_connection`` cannot be used."""

    summary = "the database_connection of the cell mapping cannot be used"


class CellHasNoQueue(SendError):
    """The instance is in cell0, which has no message queue.

    cell0 holds the instances that never got a host (Nova's cells v2 layout).
    """

    summary = "not delivered, cell0 has no message queue"


class CellNotFound(SendError):
    """There is no mapping for this cell, or no longer."""

    summary = "not delivered, there is no such cell mapping"


class CellNameAmbiguous(SendError):
    """Several cells have this name; a UUID says which one is meant."""

    summary = "several cells have this name, so it takes a UUID"

    def __str__(self) -> str:
        name = redaction.one_line(self.cell_name or "")
        return f"cell {name!r}: {super().__str__()}"


class CellTimeout(CellMWError):
    """A cell did not answer :func:`cellmw.scatter_gather` in time.

    :ivar cell: the cell, as the caller named it
    """

    is_temporary = True

    def __init__(self, message: str, cell: object = None) -> None:
        super().__init__(message)
        self.cell = cell


class CellNotKnown(SendError):
    """Which cell the instance is in could not be found out."""

    summary = "not delivered, the instance's cell is not known"
    is_temporary = True


class IdentityNotConfirmed(SendError):
    """The request's identity was not confirmed; nothing was looked up."""

    summary = "not delivered, the request's identity is not confirmed"


class InstanceHasNoCell(SendError):
    """The instance has no mapping, or is in no cell yet.

    Raised only with ``on_no_cell = refuse``.  The scheduler may be about to
    choose a cell.
    """

    summary = "not delivered, the request's instance is in no cell"
    is_temporary = True


class AmbiguousPath(SendError):
    """The request's path may name an instance for a reader other than us.

    It matches none of ``instance_path_patterns``, but would if a router, a
    handler or a database ignored what stands in it besides: a line break, a
    suffix, another case.  Nothing was looked up.
    """

    summary = (
        "not delivered, the request's path may name an instance, but does "
        "not match instance_path_patterns"
    )


class InvalidMessage(SendError, ValueError):
    """The message as it is cannot be sent to any cell.

    Its timeout is not a time, it is too large for the broker, or its exchange
    exists with another type.  That is the application's mistake; it says
    nothing about the cell.
    """

    summary = "not delivered, the message cannot be sent as it is"


class TransportReleased(SendError):
    """``mq_connection`` was used after the response had ended.

    That is the application's mistake; work that outlives a request uses
    :func:`cellmw.target_cell`.
    """

    summary = "not delivered, the request that this transport served is over"


class SendOnly(SendError):
    """``mq_connection`` only sends RPC messages: no listening, no notices."""

    summary = "mq_connection sends RPC messages and does nothing else"


class ShuttingDown(SendError):
    """This process is closing its transports."""

    summary = "not delivered, this process is shutting down"
    is_temporary = True
