# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``mq_connection``: the transports that applications send through.

A :class:`Handle` belongs to one request.  It costs little, because most
requests send nothing.  Its first message makes a :class:`RequestLease`, which
leases a transport; the end of the response ends both.  After that the handle
refuses to send, and holds nothing of this package any more.

A :class:`CellTransport` belongs to one cell and to no request.  Each of its
messages leases a transport of its own.
"""

from __future__ import annotations

import abc
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, Self

import oslo_messaging
from oslo_config import cfg
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions, garbage, hidden_errors
from cellmw.cells.mapping import Cell, Generation
from cellmw.refusals import Refusals
from cellmw.transports.pool import Lease, Pool
from cellmw.transports.sending import (
    Delivering,
    OtherGeneration,
    Sending,
    check_timeouts,
)


class Process(Protocol):
    """What a handle needs of the process that it is in."""

    pid: int
    lock: threading.Lock
    conf: cfg.ConfigOpts
    delivering: Delivering
    refusals: Refusals
    runtime_id: int

    def here(self) -> Process:
        """The state of the calling process: another one after a fork."""

    def cell(self, cell_uuid: str) -> Cell:
        """What is known of a cell.  May block for the API database."""

    def borrower(self, cell: Cell) -> RequestLease:
        """A borrower of this cell's transports."""

    def abandon(self, borrower: RequestLease) -> None:
        """End a request's hold in another thread.  Takes no lock."""


class _SendOnly(RPCTransport, abc.ABC):
    """A transport that sends RPC messages and does nothing else.

    Copies are the transport itself, equality is identity, and it cannot be
    pickled.
    """

    __slots__ = ()

    @property
    def _driver(self) -> NoReturn:
        raise self._error(exceptions.SendOnly)

    @abc.abstractmethod
    def _error(self, kind: type[exceptions.SendError]) -> exceptions.SendError:
        """An error that names this transport's cell."""

    @abc.abstractmethod
    def _note(
        self, error: exceptions.CellMWError, context: Any = None
    ) -> None:
        """Leave a trace of a refusal.

        :param context: of the message, serialized
        """

    def cleanup(self) -> None:
        """Do nothing: the transport behind it belongs to the pool."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        error = self._error(exceptions.SendOnly)
        self._note(error)
        raise error

    _send_notification = _refuse
    _listen = _refuse
    _listen_for_notifications = _refuse
    _require_driver_features = _refuse

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("mq_connection belongs to its process: no pickling")


class RequestLease:
    """A request's hold on its cell's transports.  Thread-safe.

    Holds the lease from the first message to the end of the response, and
    sees to it that all messages go out with one generation.

    :param pool: of the process that the request is in
    :param current: gives the cell's current state; may block; raises
        SendError for a cell that cannot be sent to
    :param known: the same, or None where it would block
    """

    def __init__(
        self,
        pool: Pool,
        current: Callable[[], Cell],
        known: Callable[[], Cell | None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._current = current
        self._known = known
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._pinned: Generation | None = None
        self._ended = False

    def lease_now(self) -> Lease | None:
        """A lease for one message, if that takes no waiting.

        The caller releases it.
        """
        with self._lock:
            held = self._lease
            if held is not None:
                return None if held.given_up else held.share()
            generation = self._pinned
        if generation is None:
            cell = self._known()
            generation = None if cell is None else cell.generation
        if generation is None:
            return None
        new = self._pool.acquire_now(generation)
        return None if new is None else self._keep(new)

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
            kept = self._keep(new)
            if kept is not None:
                return kept

    def _keep(self, new: Lease) -> Lease | None:
        """Hold it for the request; a share of it for the message.

        None: another message of this request was faster; its lease it is.
        """
        with self._lock:
            if self._lease is None and self._pinned in (
                None,
                new.generation,
            ):
                if self._ended:
                    return new
                self._lease = new
                return new.share()
        new.release()
        return None

    def current_generation(self) -> Generation:
        """The generation that a new request would get."""
        cell = self._current()
        if cell.generation is None:
            raise cell.refuse()
        return cell.generation

    def pin(self, generation: Generation) -> None:
        """From here on a message may have gone out with this one.

        :raises OtherGeneration: one has gone out with another
        """
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
            raise OtherGeneration

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


class Handle(_SendOnly):
    """The request's own transport for its cell.

    Any oslo.messaging RPC client takes it.  It opens nothing before the
    first message is sent through it; its truth value, ``repr``, copies and
    comparison open nothing ever.  Copies are the handle itself, equality is
    identity, and it cannot be pickled.  Thread-safe.

    Whoever made it calls :meth:`release`.

    :param request_id: for the log, where a message's context has none
    """

    __slots__ = (
        "_borrower",
        "_cell",
        "_is_released",
        "_process",
        "_refusals",
        "_request_id",
        "_runtime_id",
    )

    def __init__(
        self, process: Process, cell: Cell, request_id: str | None = None
    ) -> None:
        # Not the base class's, which wants a driver.
        self._process: Process | None = process
        # Outlives the lease: a message after it is refused.
        self._refusals = process.refusals
        self._request_id = request_id
        self._cell = cell
        self._borrower: RequestLease | None = None
        self._is_released = False
        self._runtime_id = process.runtime_id

    @property
    def conf(self) -> cfg.ConfigOpts:
        """The configuration that transports are made with."""
        process = self._process
        if process is None:
            raise self._released()
        return process.conf

    def release(self) -> None:
        """End the request's hold.  Does not block; again does nothing.

        A message that is still in flight keeps the transport until that
        message is done.  Where the calling thread is in the middle of a
        collection of garbage, another thread ends the hold a moment later.
        """
        # In this order, and the other way round in _borrow and _move_here: of
        # a release and a first message at the same time one sees what the
        # other has done.
        self._is_released = True
        process, self._process = self._process, None
        borrower, self._borrower = self._borrower, None
        if borrower is None or process is None:
            return
        try:
            _end(borrower, process, soon=garbage.is_collected_here())
        except BaseException:
            # A signal's handler may raise anywhere; ending twice is once.
            _end(borrower, process, soon=False)
            raise

    def abandon(self) -> bool:
        """Have it released soon, by another thread; for finalizers.

        A finalizer runs wherever a thread happens to let go of the last
        reference, also while that thread has a lock that :meth:`release`
        would wait for.

        :returns: whether it was neither released nor its parent's, in a
            forked child
        """
        self._is_released = True
        process, self._process = self._process, None
        borrower, self._borrower = self._borrower, None
        if process is None or process.pid != os.getpid():
            return False
        if borrower is not None:
            _end(borrower, process, soon=True)
        return True

    def _send(
        self,
        target: oslo_messaging.Target,
        ctxt: Any,
        message: dict[str, Any],
        wait_for_reply: bool | None = None,
        timeout: float | None = None,
        call_monitor_timeout: float | None = None,
        retry: int | None = None,
        transport_options: Any = None,
    ) -> Any:
        """Send one message to the cell.

        What oslo.messaging's clients call.  ``retry`` is not used: a message
        is handed to the driver with ``retry=0`` always.

        :raises SendError: it was not delivered, or perhaps not
        """
        if not target.topic:
            raise oslo_messaging.InvalidTarget(
                "A message needs a topic to go to", target
            )
        cell = self._cell
        try:
            # In this order; see release().
            process, borrower = self._process, self._borrower
            if (
                borrower is None
                or process is None
                or process.pid != os.getpid()
            ):
                process, borrower = self._borrow()
            if cell.generation is None:
                # Refuses, unless the mapping has been mended meanwhile.
                borrower.current_generation()
            if wait_for_reply and timeout is None:
                timeout = process.conf.rpc_response_timeout
            if timeout is not None or call_monitor_timeout is not None:
                check_timeouts(timeout, call_monitor_timeout)
            options = {
                "wait_for_reply": wait_for_reply,
                "timeout": timeout,
                "call_monitor_timeout": call_monitor_timeout,
                # At most once: with any other value a lost confirmation
                # makes two messages of one.
                "retry": 0,
                "transport_options": transport_options,
            }
            return Sending(
                process.delivering,
                cell,
                borrower,
                (target, ctxt, message),
                options,
            ).deliver()
        except exceptions.CellMWError as error:
            self._note(error, ctxt)
            raise

    def _borrow(self) -> tuple[Process, RequestLease]:
        process = self._process
        if process is None:
            raise self._released()
        if not self._cell.uuid:
            raise self._cell.refuse()
        if process.pid != os.getpid():
            process = self._move_here(process)
        borrower = self._borrower
        if borrower is None:
            new = process.borrower(self._cell)
            with process.lock:
                borrower = self._borrower
                if borrower is None:
                    borrower = self._borrower = new
            if self._is_released:
                # Meanwhile.  Whoever comes second ends it again,
                # which does nothing.
                self._borrower = None
                new.end()
                borrower.end()
                raise self._released()
        return process, borrower

    def _move_here(self, inherited: Process) -> Process:
        process = inherited.here()
        with process.lock:
            if self._process is inherited:
                # In this order: who sees this process must not see what
                # was borrowed in the other.
                self._borrower = None
                self._process = process
                self._refusals = process.refusals
            if self._is_released:
                # Meanwhile: not to be brought back.
                self._process = None
        return process

    def _released(self) -> exceptions.SendError:
        return self._error(exceptions.TransportReleased)

    def _error(self, kind: type[exceptions.SendError]) -> exceptions.SendError:
        cell = self._cell
        return kind(cell_uuid=cell.uuid or None, cell_name=cell.name)

    def _note(
        self, error: exceptions.CellMWError, context: Any = None
    ) -> None:
        request_id = _request_id_in(context) or self._request_id
        self._refusals.note(error, request_id)
        hidden_errors.note(error)

    def __repr__(self) -> str:
        state = "released" if self._process is None else "live"
        cell = f"cell {self._cell.uuid}" if self._cell.uuid else "no cell"
        return f"<mq_connection of {cell}, {state}>"


class CellTransport(_SendOnly):
    """A transport of one cell that belongs to no request.

    Each message passes the cell's guard and leases the transport of the
    connection information that is current at that moment, so that a change
    of the mapping holds without a restart.  Nothing is held between two
    messages.  Thread-safe, and may be used on both sides of a fork.

    :param here: gives the state of the calling process
    :param cell_uuid: of the cell that the messages are for
    """

    __slots__ = ("_cell_uuid", "_here")

    def __init__(self, here: Callable[[], Process], cell_uuid: str) -> None:
        # The base class's constructor wants a driver.
        self._here = here
        self._cell_uuid = cell_uuid

    @property
    def conf(self) -> cfg.ConfigOpts:
        """The configuration that transports are made with."""
        return self._here().conf

    def _send(
        self,
        target: oslo_messaging.Target,
        ctxt: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Send one message to the cell; as :meth:`Handle._send`.

        :raises CellNotFound: the cell's mapping is gone
        :raises LookupFailed: the API database could not be asked
        """
        process = self._here()
        try:
            cell = process.cell(self._cell_uuid)
        except exceptions.CellMWError as error:
            self._note(error, ctxt)
            raise
        handle = Handle(process, cell)
        try:
            return handle._send(target, ctxt, *args, **kwargs)
        finally:
            handle.release()

    def _error(self, kind: type[exceptions.SendError]) -> exceptions.SendError:
        return kind(cell_uuid=self._cell_uuid)

    def _note(
        self, error: exceptions.CellMWError, context: Any = None
    ) -> None:
        request_id = _request_id_in(context) or hidden_errors.request_id()
        self._here().refusals.note(error, request_id)
        hidden_errors.note(error)

    @property
    def _runtime_id(self) -> int:
        return self._here().runtime_id

    def __repr__(self) -> str:
        return f"<mq_connection of cell {self._cell_uuid}, of no request>"


def _end(borrower: RequestLease, process: Process, *, soon: bool) -> None:
    # In a forked child it is the parent's, lock and lease.  At the end of an
    # interpreter threads that were stopped have locks, and none is started.
    if process.pid != os.getpid() or sys.is_finalizing():
        return
    if soon:
        process.abandon(borrower)
    else:
        borrower.end()


def _request_id_in(context: Any) -> object:
    """The request's id in a serialized context, if it has one."""
    return context.get("request_id") if isinstance(context, dict) else None


def runtime_id_of(transport: object) -> int | None:
    """Which runtime made this ``mq_connection``, where one did."""
    if not isinstance(transport, Handle | CellTransport):
        return None
    return transport._runtime_id
