# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""One message's way from a request's thread to a cell's queue.

The request's thread takes a place in the cell's guard, gives the message to
a worker thread and waits as long as delivering may take, and then, where the
worker is known to wait for the reply, as long as the reply may take.  The
worker leases the transport, sends, and tries once more where nothing can
have been written.  A request that gives up first makes sure that its worker,
if it has not begun to write, never will.

A :class:`Borrower` is the request as the pool sees it: it holds the lease
from the first message to the end of the response, and sees to it that all
messages go out with one generation.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import oslo_messaging

from cellmw import exceptions, redaction
from cellmw.cells.mapping import Cell, Generation
from cellmw.transports import oslo
from cellmw.transports.guard import Guard, Guards
from cellmw.transports.pool import Lease, Pool
from cellmw.workers import Job, Workers

if TYPE_CHECKING:
    from oslo_messaging.transport import RPCTransport


class _Revoked(Exception):
    """The request gave up before this message was written."""


class _OtherGeneration(Exception):
    """Another message of this request has gone out with another one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outgoing:
    """What oslo.messaging's client hands to a transport."""

    target: oslo_messaging.Target
    context: Any = dataclasses.field(repr=False)
    message: dict[str, Any] = dataclasses.field(repr=False)
    wait_for_reply: bool | None
    timeout: float | None
    call_monitor_timeout: float | None
    transport_options: Any


class Borrower:
    """What a request has of its cell's transports.  Thread-safe.

    :param pool: of the process that the request is in
    :param current: gives the cell's current state; may block; raises
        SendError for a cell that cannot be sent to
    """

    def __init__(self, pool: Pool, current: Callable[[], Cell]) -> None:
        self._pool = pool
        self._current = current
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._pinned: Generation | None = None
        self._ended = False

    def lease(self, timeout: float) -> Lease:
        """A lease for one message; the caller releases it.

        :raises SendError: there is nothing to send with
        """
        while True:
            given_up = None
            with self._lock:
                if self._lease is not None:
                    if not self._lease.given_up:
                        return self._lease.share()
                    # Another request has found its connections dead.
                    given_up, self._lease = self._lease, None
                generation = self._pinned
            if given_up is not None:
                given_up.release()
            if generation is None:
                generation = self.current_generation()
            new = self._pool.acquire(generation, timeout=timeout)
            with self._lock:
                if self._lease is None and self._pinned in (None, generation):
                    if self._ended:
                        return new
                    self._lease = new
                    return new.share()
            # Another message of this request was faster; its lease it is.
            new.release()

    def current_generation(self) -> Generation:
        """The generation that a new request would get."""
        cell = self._current()
        if cell.generation is None:
            raise cell.refuse()
        return cell.generation

    def pin(self, generation: Generation) -> None:
        """From here on a message may have gone out with this one."""
        stale = None
        with self._lock:
            if self._pinned is None:
                self._pinned = generation
            other = self._pinned is not generation
            if self._lease is not None and (
                self._lease.generation is not self._pinned
            ):
                # The next message must not find it again.
                stale, self._lease = self._lease, None
        if stale is not None:
            stale.release()
        if other:
            raise _OtherGeneration

    def drop(self, lease: Lease) -> None:
        """Let go of a transport whose connections are dead."""
        lease.give_up()
        with self._lock:
            held = self._lease
            if held is None or held.transport is not lease.transport:
                return
            self._lease = None
        held.release()

    def turn_from(self, lease: Lease) -> None:
        """Let nobody new have a transport that opens no more connections.

        Those that it has live on, also when the password has been changed,
        and serve the requests that have sent with this generation.
        """
        lease.retire()
        with self._lock:
            held = self._lease
            if (
                held is None
                or self._pinned is not None
                or held.transport is not lease.transport
            ):
                return
            self._lease = None
        held.release()

    def end(self) -> None:
        """End the request's lease; messages in flight keep their own.

        A second time does nothing.
        """
        with self._lock:
            self._ended = True
            held, self._lease = self._lease, None
        if held is not None:
            try:
                held.release()
            except BaseException:
                # A signal's handler may raise anywhere.
                held.release()
                raise


class Delivery:
    """One message, as the worker thread sees it."""

    def __init__(
        self,
        outgoing: Outgoing,
        borrower: Borrower,
        guard: Guard,
        *,
        send_timeout: float,
        refresh: Callable[[], None],
    ) -> None:
        self._outgoing = outgoing
        self._borrower = borrower
        self._guard = guard
        self._send_timeout = send_timeout
        self._refresh = refresh
        # Whoever takes it first decides: the worker that it writes, or the
        # request that this will never be written.
        self._decision = threading.Lock()
        self._used: Generation | None = None
        self._leased: Lease | None = None
        self.may_be_written = False
        self.verdict: oslo.Verdict | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._stuck = False

    def run(self) -> Any:
        """Send it, and wait for the reply if there is to be one."""
        try:
            if self._decision.locked():
                raise _Revoked  # before a thread was found for it
            return self._send_at_most_twice()
        finally:
            self.leave()

    def leave(self) -> None:
        """Give back the message's place in the guard; again does nothing."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._guard.leave(stuck=self._stuck)

    def revoke(self) -> bool:
        """Whether this message has not been written and never will be."""
        return self._decision.acquire(blocking=False)

    def give_up(self) -> None:
        """Count the worker as stuck until it comes back.

        What it is stuck with serves nobody else: where packets are lost,
        nothing tells that the other connections are dead as well.
        """
        with self._lock:
            if self._ended:
                return
            self._stuck = True
            self._guard.note_stuck()
        leased = self._leased
        if leased is not None:
            self._borrower.drop(leased)

    def _send_at_most_twice(self) -> Any:
        try:
            return self._send()
        except Exception as error:
            if self.may_be_written or not self._worth_another_try(error):
                raise
        return self._send()

    def _worth_another_try(self, error: Exception) -> bool:
        if self.verdict is oslo.Verdict.UNREACHABLE:
            # On a fresh connection; with several hosts to another, by chance.
            return True
        if self.verdict is not oslo.Verdict.REFUSED:
            return False
        # The mapping may have been changed under us: read it again.
        used = self._used
        try:
            self._refresh()
            return self._borrower.current_generation() is not used
        except exceptions.CellMWError:
            return False

    def _send(self) -> Any:
        try:
            return self._send_once()
        except _OtherGeneration:
            pass
        # Now that one is pinned, the borrower leases no other.
        return self._send_once()

    def _send_once(self) -> Any:
        self.verdict = None
        lease = self._borrower.lease(self._send_timeout)
        self._used = lease.generation
        self._leased = lease
        try:
            assert lease.transport is not None
            return self._write(lease.transport, lease.generation)
        except Exception as error:
            answerable = bool(self._outgoing.wait_for_reply)
            self.verdict = oslo.judge(
                error, answerable=answerable and self.may_be_written
            )
            if self.verdict is oslo.Verdict.UNREACHABLE:
                self._borrower.drop(lease)
            elif self.verdict is oslo.Verdict.REFUSED:
                self._borrower.turn_from(lease)
            raise
        finally:
            self._leased = None
            lease.release()

    def _write(self, transport: RPCTransport, generation: Generation) -> Any:
        outgoing = self._outgoing

        def announce() -> None:
            self._announce(generation)

        if not oslo.announces(transport):
            announce()
        return transport._send(
            oslo.AnnouncingTarget(outgoing.target, announce),
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

    def _announce(self, generation: Generation) -> None:
        """The next step writes.  Raises where it must not be taken."""
        if self.may_be_written:
            return
        if not self._decision.acquire(blocking=False):
            raise _Revoked
        try:
            self._borrower.pin(generation)
        except _OtherGeneration:
            self._decision.release()
            raise
        self.may_be_written = True


class Courier:
    """Delivers the messages of one process.  Thread-safe.

    :param send_timeout: seconds that delivering one may take
    :param refresh_due_in: seconds until the cell mappings are read again
    """

    def __init__(
        self,
        guards: Guards,
        workers: Workers,
        *,
        send_timeout: float,
        refresh_due_in: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._guards = guards
        self._workers = workers
        self._send_timeout = send_timeout
        self._refresh_due_in = refresh_due_in
        self._clock = clock

    def send(
        self,
        cell: Cell,
        outgoing: Outgoing,
        borrower: Borrower,
        refresh: Callable[[], None],
    ) -> Any:
        """Deliver one message and, for a call, wait for the reply.

        Blocks for ``send_timeout`` at most, and for a call as long as its
        own timeout besides.

        :returns: the reply
        :raises SendError: it was not delivered, or perhaps not
        :raises Exception: what the far side, or MessagingTimeout, says
        """
        started = self._clock()
        limit = self._send_timeout
        guard, admission = self._guards.admit(cell.uuid, cell.name, limit)
        delivery = Delivery(
            outgoing, borrower, guard, send_timeout=limit, refresh=refresh
        )
        attempt = _Attempt(
            cell, outgoing, guard, admission, delivery, self._refresh_due_in
        )
        try:
            job = attempt.start(self._workers)
            if job.wait(limit - (self._clock() - started)):
                return attempt.finish(self._clock() - started)
            if attempt.is_awaiting_reply():
                attempt.report(True)
                # What delivering has not used of its time is left over.
                left = limit + (outgoing.timeout or 0.0)
                if job.wait(left - (self._clock() - started)):
                    return attempt.finish(self._clock() - started)
            return attempt.give_up(limit)
        except BaseException:
            attempt.break_off()
            raise


class _Attempt:
    """One message, as the thread sees it that waits for it.

    It owns the place in the guard until a worker has it.
    """

    def __init__(
        self,
        cell: Cell,
        outgoing: Outgoing,
        guard: Guard,
        admission: int,
        delivery: Delivery,
        refresh_due_in: Callable[[], float],
    ) -> None:
        self._cell = cell
        self._outgoing = outgoing
        self._guard = guard
        self._admission = admission
        self._delivery = delivery
        self._refresh_due_in = refresh_due_in
        self._job: Job | None = None
        self._reported = False

    def start(self, workers: Workers) -> Job:
        # Known before it is started: from then on the worker gives the place
        # back, whatever ends this thread meanwhile.
        self._job = job = Job(self._delivery.run, ())
        workers.start(job)
        return job

    def report(
        self,
        delivered: bool | None,
        *,
        seconds: float | None = None,
        cause: str = "",
    ) -> float:
        """The first report counts; gives the seconds until the next trial."""
        if self._reported:
            if seconds is not None:
                self._guard.note_duration(seconds, call=True)
            return 0.0
        self._reported = True
        return self._guard.report(
            delivered,
            self._admission,
            seconds=seconds,
            call=bool(self._outgoing.wait_for_reply),
            cause=cause,
        )

    def is_awaiting_reply(self) -> bool:
        assert self._job is not None
        return (
            bool(self._outgoing.wait_for_reply)
            and self._delivery.may_be_written
            and oslo.is_awaiting_reply(self._job.thread_id)
        )

    def finish(self, seconds: float) -> Any:
        """What came of it, after so many seconds."""
        assert self._job is not None
        if self._job.error is None:
            self.report(True, seconds=seconds)
            return self._job.result
        raise self._translate(self._job.error, seconds)

    def _translate(
        self, error: BaseException, seconds: float
    ) -> BaseException:
        """The error to raise for what the worker met.

        It is looked at here and not in the frame that raises: that one is
        part of the traceback.
        """
        assert self._job is not None
        if self._job.thread_id is None:
            # No thread could be started, so nobody else gives it back.
            self._delivery.leave()
            self.report(None)
            return self._error(
                exceptions.CellBusy, "no thread can be started for it"
            )
        verdict = self._delivery.verdict
        if verdict in (oslo.Verdict.UNREACHABLE, oslo.Verdict.REFUSED):
            return self._failure(
                redaction.describe(error),
                uncertain=self._delivery.may_be_written,
            )
        if verdict is oslo.Verdict.ANSWERED:
            self.report(True, seconds=seconds)
            return _bare(error)
        self.report(None)
        if isinstance(error, exceptions.SendError):
            left = error.retry_after
            if left is None and isinstance(
                error, exceptions.CellMisconfigured
            ):
                # Nothing changes before the mapping is read again.
                left = self._refresh_due_in()
            return self._error(type(error), error.cause, left)
        return _bare(error)

    def give_up(self, limit: float) -> Any:
        """The request's thread has waited long enough."""
        assert self._job is not None
        revoked = self._delivery.revoke()
        if self._job.done and not isinstance(self._job.error, _Revoked):
            return self.finish(limit)  # just now, after all
        self._delivery.give_up()
        if self._reported:
            # Delivered; the driver did not keep to the reply's timeout.
            raise oslo_messaging.MessagingTimeout(
                f"no reply from cell {self._cell.uuid} in time"
            )
        raise self._failure(
            f"it took longer than {limit:g} seconds", uncertain=not revoked
        )

    def break_off(self) -> None:
        """Something else ended the wait: a server that ends its thread."""
        if self._reported:
            return
        revoked = self._delivery.revoke()
        if revoked and (self._job is None or self._job.thread_id is None):
            # No thread has it yet; one that gets it yet finds that it is not
            # to be written.
            self._delivery.leave()
        else:
            self._delivery.give_up()
        self.report(None)

    def _failure(self, cause: str, *, uncertain: bool) -> exceptions.SendError:
        """Count a failure to deliver; the error that tells of it."""
        left = self.report(False, cause=cause)
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
    """An exception without what it drags along.

    Tracebacks of the worker hold the driver's local variables, and those the
    credentials.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
