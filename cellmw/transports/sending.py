# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""One message, from the request's thread to the cell's queue.

A :class:`Sending` is one message.  Two threads know it: the request's, which
waits, and the sender's, a worker.  One lock guards one state:

    QUEUED -> WRITING -> WRITTEN -> DONE
    QUEUED -> REVOKED

The sender writes only what is QUEUED, and a request that gives up revokes
what is QUEUED, so that a message which was reported as not delivered is never
written.  What is WRITING at that moment may arrive.  From WRITTEN on the
broker has it: a call awaits its reply, and what follows is the far side's.

A message holds a place in its cell's guard until it is WRITTEN or its sender
comes back, whichever is first.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import oslo_messaging
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions, redaction
from cellmw.cells.mapping import Cell, Generation
from cellmw.transports import driver
from cellmw.transports.driver import Verdict
from cellmw.transports.guard import Guards, Place
from cellmw.transports.pool import Lease
from cellmw.workers import Job, Workers

# How much longer than send_timeout a request waits: a sender that meets the
# deadline on its socket then says so itself.  Seconds.
_GRACE = 0.1


# A message's time to live is one of 32 bits in milliseconds; RabbitMQ answers
# PRECONDITION_FAILED (406) to a longer one.
_LONGEST = 2**32 // 1000


# The error for a verdict that says nothing about the cell, and the seconds
# after which trying again makes sense.
_NOT_THE_CELLS: dict[
    Verdict, tuple[type[exceptions.SendError], float | None]
] = {
    Verdict.FULL: (exceptions.CellBusy, 1.0),
    Verdict.INVALID: (exceptions.InvalidMessage, None),
    Verdict.NACKED: (exceptions.DeliveryUncertain, 1.0),
}


class _Revoked(Exception):
    """The request gave up before this message was written."""


class OtherGeneration(Exception):
    """Another message of this request has gone out with another one."""


class State(enum.IntEnum):
    """How far a message is."""

    QUEUED = 0
    WRITING = 1
    WRITTEN = 2
    DONE = 3
    REVOKED = 4


class Borrower(Protocol):
    """Who leases transports for the messages of one request."""

    def lease(self, timeout: float) -> Lease:
        """A lease for one message; the caller releases it."""

    def current_generation(self) -> Generation:
        """The generation that a new request would get."""

    def pin(self, generation: Generation) -> None:
        """From here on a message may have gone out with this one.

        :raises OtherGeneration: one has gone out with another
        """

    def drop(self, lease: Lease) -> None:
        """Let go of a transport whose connections are dead."""

    def turn_from(self, lease: Lease) -> None:
        """Let go of a transport whose credentials are refused."""


@dataclasses.dataclass(slots=True)
class Outgoing:
    """What oslo.messaging's client hands to a transport."""

    target: oslo_messaging.Target
    context: Any = dataclasses.field(repr=False)
    message: dict[str, Any] = dataclasses.field(repr=False)
    wait_for_reply: bool | None
    timeout: float | None
    call_monitor_timeout: float | None
    transport_options: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Delivering:
    """What all messages of one process share.

    :ivar send_timeout: seconds that delivering one may take
    :ivar refresh: reads the cell mappings again; may block
    :ivar refresh_due_in: seconds until the cell mappings are read again
    """

    guards: Guards
    workers: Workers
    send_timeout: float
    refresh: Callable[[], None]
    refresh_due_in: Callable[[], float]


def check_timeouts(
    timeout: float | None, call_monitor_timeout: float | None
) -> None:
    """See that these are times that can be waited for.

    :raises InvalidMessage: they are not
    :raises MessagingTimeout: the time has already passed
    """
    for seconds in (timeout, call_monitor_timeout):
        if seconds is None:
            continue
        if type(seconds) is bool or not isinstance(seconds, int | float):
            raise exceptions.InvalidMessage(
                f"a timeout is a number of seconds, not {type(seconds)!r}"
            )
        if not seconds < _LONGEST:
            raise exceptions.InvalidMessage(
                f"a timeout is less than {_LONGEST} seconds, not {seconds}"
            )
    if timeout is not None and timeout <= 0:
        raise oslo_messaging.MessagingTimeout(
            f"the timeout of {timeout} seconds has passed before the message "
            "was sent"
        )
    if call_monitor_timeout is not None and call_monitor_timeout < 0:
        raise exceptions.InvalidMessage(
            f"call_monitor_timeout is {call_monitor_timeout} seconds"
        )


class Sending:
    """One message to one cell; also what its driver is told about it.

    :ivar deadline: when delivering ends, on ``time.monotonic``
    """

    def __init__(
        self,
        delivering: Delivering,
        cell: Cell,
        outgoing: Outgoing,
        borrower: Borrower,
    ) -> None:
        self._delivering = delivering
        self._cell = cell
        self._outgoing = outgoing
        self._borrower = borrower
        self._lock = threading.Lock()
        self._state = State.QUEUED
        # What the driver said first of what went wrong in this try.
        self._fault: tuple[Verdict, BaseException] | None = None
        self._lease: Lease | None = None
        self._started = time.monotonic()
        self.deadline = self._started + delivering.send_timeout
        self._place = Place(
            *delivering.guards.admit(
                cell.uuid, cell.name, delivering.send_timeout
            )
        )

    # In the request's thread.

    def deliver(self) -> Any:
        """Deliver it and, for a call, wait for the reply.

        Blocks for ``send_timeout`` at most, and for a call as long as its
        own timeout besides.

        :returns: the reply
        :raises SendError: it was not delivered, or perhaps not
        :raises Exception: what the far side, or MessagingTimeout, says
        """
        job = Job(self._run, ())
        try:
            self._delivering.workers.start(job)
            left = self.deadline - time.monotonic() + _GRACE
            if not job.wait(left) and self._awaits_reply():
                # What delivering has not used of its time is left over.
                timeout = self._outgoing.timeout or 0.0
                job.wait(self.deadline + timeout - time.monotonic() + _GRACE)
            result, error = self._outcome(job)
        except BaseException:
            # A server that ends its thread, say.
            self._abandon(job)
            raise
        if error is not None:
            raise error
        return result

    def _awaits_reply(self) -> bool:
        return self._state is State.WRITTEN and bool(
            self._outgoing.wait_for_reply
        )

    def _outcome(self, job: Job) -> tuple[Any, BaseException | None]:
        """The reply, or the error to raise, now that the wait is over."""
        state = self._revoke()
        if state is State.DONE:
            job.wait()  # it says so in a moment
        if job.done and (state is not State.QUEUED or job.thread_id is None):
            return self._end_of(job)
        if state is State.WRITTEN:
            if not self._outgoing.wait_for_reply:
                return None, None
            cell = self._cell.uuid
            return None, oslo_messaging.MessagingTimeout(
                f"no reply from cell {cell} in time"
            )
        self._drop_lease()
        uncertain = state is State.WRITING
        return None, self._failure(
            self._late(), uncertain=uncertain, stuck=True
        )

    def _revoke(self) -> State:
        """See that it is not written from now on; the state before that."""
        with self._lock:
            state = self._state
            if state is State.QUEUED:
                self._state = State.REVOKED
        return state

    def _end_of(self, job: Job) -> tuple[Any, BaseException | None]:
        if job.thread_id is not None:
            end: tuple[Any, BaseException | None] = job.result
            return end
        # No thread could be started, so nobody else gives the place back.
        self._place.settle(None)
        return None, self._error(
            exceptions.CellBusy, "no thread can be started for it", 1.0
        )

    def _abandon(self, job: Job) -> None:
        """Leave the message to its sender, if there is one."""
        state = self._revoke()
        if job.thread_id is None:
            # A thread that gets it yet finds that it is not to be written.
            self._place.settle(None)
        elif state < State.WRITTEN:
            self._drop_lease()
            self._place.settle(None, stuck=True)

    def _drop_lease(self) -> None:
        """Keep others from the transport that holds up this message.

        Where packets are lost, nothing tells that the other connections of
        the transport are dead as well.
        """
        lease = self._lease
        if lease is not None:
            self._borrower.drop(lease)

    # In the sender's thread.

    def _run(self) -> tuple[Any, BaseException | None]:
        """Send it; what came of it.

        An error is returned, not raised: a traceback would hold the driver's
        local variables, and those the credentials.
        """
        result = problem = None
        try:
            result = self._send_at_most_twice()
            if self._state is not State.WRITTEN:
                self.written()  # its driver does not tell
            self._note_duration()
        except _Revoked:
            self._place.leave()  # the request has told how it went
        except BaseException as error:
            problem = self._explain(error)
        self._lease = None
        with self._lock:
            if self._state is not State.REVOKED:
                self._state = State.DONE
        return result, problem

    def _send_at_most_twice(self) -> Any:
        try:
            return self._send()
        except Exception:
            if self._state is not State.QUEUED or not self._worth_a_retry():
                raise
        return self._send()

    def _worth_a_retry(self) -> bool:
        verdict = self._verdict()
        if verdict is Verdict.UNREACHABLE:
            # On a fresh connection; with several hosts to another, by chance.
            return True
        if verdict is not Verdict.REFUSED:
            return False
        # The mapping may have been changed under us: read it again.
        assert self._lease is not None
        used = self._lease.generation
        try:
            self._delivering.refresh()
            return self._borrower.current_generation() is not used
        except exceptions.CellMWError:
            return False

    def _send(self) -> Any:
        if self._state is State.REVOKED:
            raise _Revoked  # before a thread was found for it
        try:
            return self._send_once()
        except OtherGeneration:
            pass
        # Now that one is pinned, the borrower leases no other.
        return self._send_once()

    def _send_once(self) -> Any:
        self._fault = None
        lease = self._borrower.lease(self._delivering.send_timeout)
        self._lease = lease
        under_way = driver.under_way
        before, under_way.message = under_way.message, self
        try:
            assert lease.transport is not None
            return self._hand_over(lease.transport)
        except Exception as error:
            if self._state is State.WRITTEN and not (
                self._outgoing.wait_for_reply
            ):
                return None  # what failed then was putting things away
            self._judge(error, lease)
            raise
        finally:
            under_way.message = before
            lease.release()

    def _hand_over(self, transport: RPCTransport) -> Any:
        outgoing = self._outgoing
        if not driver.reports(transport):
            self.writing()
        return transport._send(
            outgoing.target,
            outgoing.context,
            # The driver writes into it.
            dict(outgoing.message),
            wait_for_reply=outgoing.wait_for_reply,
            timeout=outgoing.timeout,
            call_monitor_timeout=outgoing.call_monitor_timeout,
            # At most once: with any other value a lost confirmation makes
            # two messages of one.
            retry=0,
            transport_options=outgoing.transport_options,
        )

    def _judge(self, error: Exception, lease: Lease) -> None:
        assert lease.transport is not None
        if self._state is State.WRITTEN:
            self._fault = Verdict.ANSWERED, error
        elif self._fault is None and not driver.reports(lease.transport):
            is_call = bool(self._outgoing.wait_for_reply)
            verdict = driver.judge_silent(error, is_call=is_call)
            self._fault = verdict, error
        verdict = self._verdict()
        if verdict in (Verdict.UNREACHABLE, Verdict.LATE):
            self._borrower.drop(lease)
        elif verdict is Verdict.REFUSED:
            self._borrower.turn_from(lease)

    def _verdict(self) -> Verdict:
        return Verdict.UNRELATED if self._fault is None else self._fault[0]

    def writing(self) -> None:
        """See :class:`cellmw.transports.driver.Message`."""
        with self._lock:
            if self._state is State.REVOKED:
                raise _Revoked
            if self._state is not State.QUEUED:
                return
            self._state = State.WRITING
        lease = self._lease
        assert lease is not None
        try:
            self._borrower.pin(lease.generation)
        except OtherGeneration:
            self._state = State.QUEUED
            raise

    def written(self) -> None:
        """See :class:`cellmw.transports.driver.Message`."""
        with self._lock:
            if self._state is not State.WRITING:
                return
            self._state = State.WRITTEN
        self._place.settle(True)

    def failed(self, verdict: Verdict, error: BaseException) -> None:
        """See :class:`cellmw.transports.driver.Message`."""
        if self._fault is None:
            self._fault = verdict, error

    def _note_duration(self) -> None:
        self._place.guard.note_duration(
            time.monotonic() - self._started,
            call=bool(self._outgoing.wait_for_reply),
        )

    # The errors.

    def _explain(self, error: BaseException) -> BaseException:
        """The error to raise; gives back the place with its verdict.

        It is looked at here and not in the frame that raises: that one is
        part of the traceback.
        """
        verdict = self._verdict()
        if self._fault is not None:
            error = self._fault[1]
        uncertain = self._state is State.WRITING
        if verdict is Verdict.ANSWERED:
            self._place.settle(True)
            self._note_duration()
            return _bare(error)
        if verdict in (Verdict.LATE, Verdict.UNREACHABLE, Verdict.REFUSED):
            late = verdict is Verdict.LATE
            return self._failure(
                self._late() if late else redaction.describe(error),
                uncertain=uncertain and verdict is not Verdict.REFUSED,
            )
        self._place.settle(None)
        if verdict in _NOT_THE_CELLS:
            kind, retry_after = _NOT_THE_CELLS[verdict]
            return self._error(kind, redaction.describe(error), retry_after)
        if isinstance(error, exceptions.SendError):
            left = error.retry_after
            if left is None and isinstance(
                error, exceptions.CellMisconfigured
            ):
                # Nothing changes before the mapping is read again.
                left = self._delivering.refresh_due_in()
            return self._error(type(error), error.cause, left)
        return _bare(error)

    def _late(self) -> str:
        return f"it took longer than {self._delivering.send_timeout:g} seconds"

    def _failure(
        self, cause: str, *, uncertain: bool, stuck: bool = False
    ) -> exceptions.SendError:
        """Count a failure to deliver; the error that tells of it."""
        left = self._place.settle(False, cause=cause, stuck=stuck)
        kind = (
            exceptions.DeliveryUncertain
            if uncertain
            else exceptions.CellUnavailable
        )
        return self._error(kind, cause, max(1.0, left))

    def _error(
        self,
        kind: type[exceptions.SendError],
        cause: str,
        retry_after: float | None = None,
    ) -> exceptions.SendError:
        return kind(
            cause,
            cell_uuid=self._cell.uuid,
            cell_name=self._cell.name,
            retry_after=retry_after,
        )


def _bare(error: BaseException) -> BaseException:
    """An exception without what it drags along."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
