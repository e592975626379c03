# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""One message, from the request's thread to the cell's queue.

A :class:`Sending` is one message.  Where all that it needs is open, the
request's own thread sends it.  Then nothing but the socket can hold that
thread, and each wait for the socket ends at the message's deadline:

- the request's lease and the pool's: only of a transport that is open, and of
  a cell whose mapping is known;
- a connection: only one that is open, whose lock nobody has, the heartbeat's
  thread included; where no more may be opened, in line until the deadline;
- the reply queue: only where it is open; the reply: for the call's timeout;
- connections that have expired or are dead are closed by workers.

All else can take longer than anybody may wait: opening, asking the database,
a driver that cannot be given a deadline.  There a worker sends, or tries once
more, and the request waits for it.  One lock guards one state:

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
from typing import TYPE_CHECKING, Any

import oslo_messaging

from cellmw import exceptions, redaction
from cellmw.cells.mapping import Cell
from cellmw.transports import driver
from cellmw.transports.driver import Verdict
from cellmw.transports.guard import Guards, Place
from cellmw.transports.pool import Lease
from cellmw.workers import Job, Workers

if TYPE_CHECKING:
    from cellmw.transports.handle import RequestLease

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


# Those after which, with nothing written, a worker may try once more.
_WORTH_A_WORKER = (Verdict.UNREACHABLE, Verdict.REFUSED)


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

    :param borrower: leases transports for the messages of the request
    :param message: target, context and message, as a client gives them
    :param options: the rest of what the transport wants
    :ivar deadline: when delivering ends, on ``time.monotonic``
    :ivar reserved: the connection that its driver keeps for it, if any
    """

    def __init__(
        self,
        delivering: Delivering,
        cell: Cell,
        borrower: RequestLease,
        message: tuple[oslo_messaging.Target, Any, dict[str, Any]],
        options: dict[str, Any],
    ) -> None:
        self._delivering = delivering
        self._cell = cell
        self._borrower = borrower
        self._message = message
        self._options = options
        self._is_call = bool(options["wait_for_reply"])
        self._lock = threading.Lock()
        self._state = State.QUEUED
        # What the driver said first of what went wrong in this try.
        self._fault: tuple[Verdict, BaseException] | None = None
        self._lease: Lease | None = None
        self.reserved: Any = None
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
        job: Job | None = None
        try:
            end = self._send_here()
            if end is None:
                job = Job(self._run, ())
                end = self._await(job)
        except BaseException:
            # A server that ends its thread, say.
            self._abandon(job)
            raise
        result, error = end
        if error is not None:
            raise error
        return result

    def _send_here(self) -> tuple[Any, BaseException | None] | None:
        """Send it in this thread, where all that it needs is open.

        :returns: what came of it; None: it is a worker's to send, or to try
            once more
        """
        lease = self._lease = self._borrower.lease_now()
        if lease is None:
            return None
        assert lease.transport is not None
        try:
            if driver.reserve(lease.transport, self, is_call=self._is_call):
                return self._send_with(lease), None
            lease.release()
        except OtherGeneration:
            self._fault = None
        except Exception as error:
            if not (
                self._state is State.QUEUED
                and self._verdict() in _WORTH_A_WORKER
            ):
                lease.release()
                return None, self._explain(error)
        except BaseException as error:
            # A signal's handler, say.  It is to be raised as it is, whatever
            # had failed before.
            self._abandon(None)
            return None, _bare(error)
        return None

    def _await(self, job: Job) -> tuple[Any, BaseException | None]:
        """Have it sent by a worker; what came of it until the deadline."""
        self._delivering.workers.start(job)
        left = self.deadline - time.monotonic() + _GRACE
        if not job.wait(left) and self._awaits_reply():
            # What delivering has not used of its time is left over.
            timeout = self._options["timeout"] or 0.0
            job.wait(self.deadline + timeout - time.monotonic() + _GRACE)
        state = self._revoke()
        if state is State.DONE:
            job.wait()  # it says so in a moment
        if job.done and (state is not State.QUEUED or job.thread_id is None):
            return self._end_of(job)
        if state is State.WRITTEN:
            if not self._is_call:
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

    def _awaits_reply(self) -> bool:
        return self._is_call and self._state is State.WRITTEN

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

    def _abandon(self, job: Job | None) -> None:
        """Leave the message to its sender, if there is one."""
        state = self._revoke()
        if job is None:
            self._give_back()
            self._place.settle(None)
        elif job.thread_id is None:
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
        """Send it, in a worker; what came of it.

        An error is returned, not raised: a traceback would hold the driver's
        local variables, and those the credentials.
        """
        result = problem = None
        try:
            result = self._send_at_most_twice()
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
        if self._fault is None:
            try:
                return self._send()
            except Exception:
                if (
                    self._state is not State.QUEUED
                    or not self._worth_a_retry()
                ):
                    raise
        elif not self._worth_a_retry():
            # The request's thread has tried.
            raise self._fault[1]
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
        timeout = self._delivering.send_timeout
        self._fault = None
        try:
            return self._send_with(self._borrower.lease(timeout))
        except OtherGeneration:
            self._fault = None
        # Now that one is pinned, the borrower leases no other.
        return self._send_with(self._borrower.lease(timeout))

    def _send_with(self, lease: Lease) -> Any:
        """One try, in either thread.  Releases the lease."""
        self._lease = lease
        under_way = driver.under_way
        before, under_way.message = under_way.message, self
        transport = lease.transport
        try:
            assert transport is not None
            if self.reserved is None and not driver.reports(transport):
                self.writing()
            target, context, message = self._message
            result = transport._send(
                target,
                context,
                # The driver writes into it.
                dict(message),
                **self._options,
            )
        except Exception as error:
            if self._state is State.WRITTEN and not self._is_call:
                return None  # what failed then was putting things away
            self._judge(error, lease)
            raise
        finally:
            under_way.message = before
            if self.reserved is not None:
                self._give_back()
            lease.release()
        if self._state is not State.WRITTEN:
            self.written()  # its driver does not tell
        if self._is_call:
            self._note_duration()
        return result

    def _give_back(self) -> None:
        lease = self._lease
        if lease is not None and lease.transport is not None:
            driver.release(lease.transport, self)
            lease.release()

    def _judge(self, error: Exception, lease: Lease) -> None:
        assert lease.transport is not None
        if self._state is State.WRITTEN:
            self._fault = Verdict.ANSWERED, error
        elif self._fault is None and not driver.reports(lease.transport):
            verdict = driver.judge_silent(error, is_call=self._is_call)
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
        seconds = None if self._is_call else time.monotonic() - self._started
        self._place.settle(True, seconds=seconds)

    def failed(self, verdict: Verdict, error: BaseException) -> None:
        """See :class:`cellmw.transports.driver.Message`."""
        if self._fault is None:
            self._fault = verdict, error

    def _note_duration(self) -> None:
        self._place.guard.note_duration(
            time.monotonic() - self._started, call=self._is_call
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
