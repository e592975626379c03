# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``mq_connection``, as a handler and as clients see it; no I/O."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import oslo_messaging
import pytest
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions
from cellmw.cells.mapping import Cell
from cellmw.transports import oslo
from cellmw.transports.handle import Handle, RequestLease, runtime_id_of
from cellmw.transports.pool import Lease
from tests.fakes import (
    PASSWORD,
    PATIENCE,
    Gate,
    Stack,
    Threads,
    call,
    cast,
    cell,
    cell_uuid,
    in_child,
)


@pytest.fixture(params=[16, 0], ids=["cached", "uncached"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with Stack(max_size=request.param) as stack:
        stack.put(1)
        yield stack


@pytest.fixture
def handle(stack: Stack) -> Iterator[Handle]:
    with stack.handle() as handle:
        yield handle


# What opens nothing.


def test_it_is_an_rpc_transport(handle: Handle) -> None:
    assert isinstance(handle, RPCTransport)


@pytest.mark.parametrize(
    "look",
    [
        bool,
        repr,
        str,
        hash,
        copy.copy,
        copy.deepcopy,
        lambda handle: handle == handle.conf,
        lambda handle: handle.cleanup(),
        lambda handle: handle.conf,
        dir,
    ],
)
def test_looking_at_it_opens_nothing(
    stack: Stack, handle: Handle, look: Callable[[Handle], object]
) -> None:
    before = threading.active_count()
    look(handle)
    assert stack.transports.attempts == 0
    assert threading.active_count() == before
    assert handle._borrower is None


def test_it_is_true_and_equal_to_itself_only(stack: Stack) -> None:
    with stack.handle() as one, stack.handle() as other:
        assert bool(one) is True
        assert one == copy.copy(one)
        assert one != other
        assert len({one, other}) == 2


def test_copies_are_the_handle_itself(handle: Handle) -> None:
    assert copy.copy(handle) is handle
    assert copy.deepcopy(handle) is handle
    assert copy.deepcopy({"context": [handle]})["context"][0] is handle


def test_it_cannot_be_pickled(handle: Handle) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="no pickling"):
            pickle.dumps(handle, protocol)


def test_its_repr_tells_the_cell_and_no_secret(stack: Stack) -> None:
    with stack.handle() as handle:
        cast(handle)
        assert repr(handle) == f"<mq_connection of cell {cell_uuid(1)}, live>"
    assert repr(handle).endswith("released>")
    assert PASSWORD not in repr(handle) + str(vars(handle))


def test_cleaning_it_up_does_nothing(stack: Stack, handle: Handle) -> None:
    cast(handle)
    handle.cleanup()
    handle.cleanup()
    cast(handle)
    assert stack.transports.opened[0].closed == 0


# What it refuses.


@pytest.mark.parametrize(
    "use",
    [
        lambda handle: handle._driver,
        lambda handle: handle._listen(None, 1, None),
        lambda handle: handle._listen_for_notifications([], None, 1, None),
        lambda handle: handle._send_notification(None, {}, {}, 2.0),
        lambda handle: handle._require_driver_features(requeue=True),
        lambda handle: oslo_messaging.get_rpc_server(
            handle, oslo_messaging.Target(topic="t", server="s"), []
        ).start(),
    ],
    ids=[
        "driver",
        "listen",
        "listen for notifications",
        "notify",
        "features",
        "server",
    ],
)
def test_it_only_sends(
    stack: Stack, handle: Handle, use: Callable[[Handle], object]
) -> None:
    oslo.prepare(stack.conf)
    with pytest.raises(exceptions.SendOnly) as caught:
        use(handle)
    assert caught.value.cell_uuid == cell_uuid(1)
    assert caught.value.cell_name == cell(1).name
    assert stack.transports.attempts == 0


def test_a_notifier_on_it_notifies_nobody(
    stack: Stack, handle: Handle, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = oslo_messaging.Notifier(
        handle, driver="messaging", topics=["t"], publisher_id="p"
    )
    notifier.info({}, "instance.create", {})
    assert "SendOnly" in caplog.text
    assert stack.transports.attempts == 0


def test_a_cell_without_a_queue_refuses(stack: Stack) -> None:
    refused = Cell(cell_uuid(9), "zero", None, (exceptions.CellHasNoQueue, ""))
    stack.cells = {cell_uuid(9): refused}
    with stack.handle(9) as handle:
        with pytest.raises(exceptions.CellHasNoQueue) as caught:
            cast(handle)
    assert caught.value.cell_uuid == cell_uuid(9)
    assert caught.value.cell_name == "zero"
    assert stack.transports.attempts == 0


def test_where_the_cell_is_not_known_it_refuses(stack: Stack) -> None:
    unknown = Cell("", None, None, (exceptions.CellNotKnown, "no database"))
    handle = Handle(stack, unknown)
    with pytest.raises(exceptions.CellNotKnown, match="no database"):
        cast(handle)
    assert "no cell" in repr(handle)
    handle.release()
    with pytest.raises(exceptions.TransportReleased):
        cast(handle)


# Its end.


def test_after_the_end_it_refuses(stack: Stack) -> None:
    with stack.handle() as handle:
        cast(handle)
    uses: tuple[Callable[[Handle], object], ...] = (
        cast,
        call,
        lambda handle: handle.conf,
    )
    for use in uses:
        with pytest.raises(exceptions.TransportReleased) as caught:
            use(handle)
        assert caught.value.cell_uuid == cell_uuid(1)
        assert caught.value.cell_name == cell(1).name
    assert len(stack.transports.sent) == 1


def test_it_is_released_once_whoever_does_it_twice(stack: Stack) -> None:
    with stack.handle() as other:
        cast(other)
        with stack.handle() as handle:
            cast(handle)
            for _ in range(3):
                handle.release()
        assert stack.stats.leases == 1


def test_many_releases_at_once_are_one(stack: Stack) -> None:
    with stack.handle() as other:
        cast(other)
        for _ in range(50):
            with stack.handle() as handle:
                cast(handle)
                barrier = threading.Barrier(4)

                def release(
                    barrier: threading.Barrier = barrier,
                    handle: Handle = handle,
                ) -> None:
                    barrier.wait()
                    handle.release()

                with Threads() as threads:
                    for _ in range(4):
                        threads.start(release)
            assert stack.stats.leases == 1


def test_after_the_end_it_holds_nothing() -> None:
    with Stack() as stack:
        stack.put(1)
        kept = stack.handle()
        handle = kept.__enter__()
        cast(handle)
        kept.__exit__(None, None, None)
        found = [weakref.ref(each) for each in (stack, stack.pool)]
        stack.close()
    del stack, kept
    # A worker thread's last job may still be on its way out.
    for _ in range(100):
        gc.collect()
        if not any(each() for each in found):
            break
    assert [each() for each in found] == [None, None]
    assert repr(handle).endswith("released>")


@pytest.mark.parametrize("sends", [0, 1])
def test_it_can_be_abandoned(stack: Stack, sends: int) -> None:
    handle = Handle(stack, cell(1))
    for _ in range(sends):
        cast(handle)
    assert handle.abandon()
    assert not handle.abandon()
    assert stack.stats.leases == 0


def test_a_finalizer_that_abandons_it_waits_for_no_lock(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage is collected wherever: also by who has one of the locks."""
    later: list[RequestLease] = []
    monkeypatch.setattr(stack, "abandon", later.append)
    handle = Handle(stack, cell(1))
    cast(handle)
    with stack.pool._lock, stack.closer._lock, stack.lock:
        assert handle.abandon()
    (borrower,) = later
    borrower.end()
    assert stack.stats.leases == 0


class Stream:
    """One that nobody reads to its end; only the collector finds it."""

    def __init__(self, handle: Handle) -> None:
        self._chunks = self._run(handle)
        next(self._chunks)

    def _run(self, handle: Handle) -> Iterator[Stream]:
        try:
            yield self
        finally:
            handle.release()


def test_the_collector_that_releases_it_waits_for_no_lock(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever collects may have one of the locks just then."""
    later: list[RequestLease] = []
    monkeypatch.setattr(stack, "abandon", later.append)
    handle = Handle(stack, cell(1))
    cast(handle)
    gc.collect()
    with stack.pool._lock, stack.closer._lock, stack.lock:
        Stream(handle)
        gc.collect()
    (borrower,) = later
    assert repr(handle).endswith("released>")
    borrower.end()
    assert stack.stats.leases == 0


def test_an_exception_in_the_middle_of_the_release_leaves_no_lease(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's handler raises wherever it strikes."""
    real = Lease.release
    strikes = iter([True, False])

    def release(lease: Lease) -> None:
        if next(strikes):
            raise KeyboardInterrupt
        real(lease)

    handle = Handle(stack, cell(1))
    cast(handle)
    monkeypatch.setattr(Lease, "release", release)
    with pytest.raises(KeyboardInterrupt):
        handle.release()
    assert stack.stats.leases == 0


@pytest.mark.parametrize("sends", [0, 1])
def test_a_first_message_and_the_end_at_once(stack: Stack, sends: int) -> None:
    """One of them comes first; in neither case a lease is left."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            handle = Handle(stack, cell(1))
            for _ in range(sends):
                cast(handle)
            barrier = threading.Barrier(3)

            def use(
                barrier: threading.Barrier = barrier, handle: Handle = handle
            ) -> None:
                barrier.wait()
                with contextlib.suppress(exceptions.TransportReleased):
                    cast(handle)

            with Threads() as threads:
                threads.start(use)
                threads.start(use)
                barrier.wait()
                handle.release()
            assert stack.stats.leases == 0
            assert handle._borrower is None
    finally:
        sys.setswitchinterval(before)


def test_released_just_as_it_borrows(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = Handle(stack, cell(1))
    real = stack.borrower

    def borrower(of: Cell) -> Any:
        made = real(of)
        handle.release()
        return made

    monkeypatch.setattr(stack, "borrower", borrower)
    with pytest.raises(exceptions.TransportReleased):
        cast(handle)
    assert handle._borrower is None
    assert stack.transports.attempts == 0


def test_released_between_borrowing_and_looking(stack: Stack) -> None:
    """The release takes out the borrower that was just put in."""

    class Lock:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *exc_info: object) -> None:
            made.release()

    made = Handle(stack, cell(1))
    # As much of a lock as is used.
    stack.lock = Lock()  # type: ignore[assignment]
    with pytest.raises(exceptions.TransportReleased):
        cast(made)
    assert made._borrower is None
    assert stack.stats.leases == 0


def test_released_just_as_the_borrower_is_put_in(stack: Stack) -> None:
    class Racing(Handle):
        """Released by another thread the moment that it has a borrower."""

        @property
        def _borrower(self) -> Any:
            return self.__dict__.get("borrower")

        @_borrower.setter
        def _borrower(self, value: Any) -> None:
            self.__dict__["borrower"] = value
            if value is not None:
                self.release()

    made = Racing(stack, cell(1))
    with pytest.raises(exceptions.TransportReleased):
        cast(made)
    assert stack.stats.leases == 0


def test_sent_just_as_it_is_released(stack: Stack) -> None:
    """The message finds that it is over, or the release finds its lease."""

    class Racing(Handle):
        """Sent with by another thread in the middle of its release."""

        released = False

        @property
        def _borrower(self) -> Any:
            return self.__dict__.get("borrower")

        @_borrower.setter
        def _borrower(self, value: Any) -> None:
            self.__dict__["borrower"] = value
            if self.released and value is None:
                self.released = False
                with contextlib.suppress(exceptions.TransportReleased):
                    cast(self)

    made = Racing(stack, cell(1))
    made.released = True
    made.release()
    assert not made.released
    assert stack.stats.leases == 0


def test_released_while_another_message_has_the_borrower(
    stack: Stack,
) -> None:
    """It was put in too late for the release, and a message has used it."""

    class Lock:
        def __enter__(self) -> None:
            made.release()

        def __exit__(self, *exc_info: object) -> None:
            # Another thread, which has looked before the release.
            borrower = made._borrower
            assert borrower is not None
            borrower.lease(PATIENCE).release()

    made = Handle(stack, cell(1))
    # As much of a lock as is used.
    stack.lock = Lock()  # type: ignore[assignment]
    with pytest.raises(exceptions.TransportReleased):
        cast(made)
    assert made._borrower is None
    assert stack.stats.leases == 0


def test_first_messages_at_once_have_one_borrower(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    real = stack.borrower

    def borrower(of: Cell) -> Any:
        made = real(of)
        gate.wait()
        return made

    monkeypatch.setattr(stack, "borrower", borrower)
    with stack.handle() as handle:
        with Threads() as threads:
            for _ in range(2):
                threads.start(cast, handle)
            gate.await_arrival(2)
            gate.open()
        assert stack.stats.leases == 1
    assert stack.stats.leases == 0


def test_a_finalizer_of_what_has_sent_nothing_needs_no_thread(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first message there is none that would release it."""
    later: list[Handle] = []
    monkeypatch.setattr(stack, "abandon", later.append)
    handle = Handle(stack, cell(1))
    assert handle.abandon()
    assert not later
    assert repr(handle).endswith("released>")


# After a fork.


def test_a_child_sends_through_its_own_process(stack: Stack) -> None:
    with stack.handle() as handle:
        cast(handle)
        parents = stack.transports.opened[0]

        def child() -> tuple[int, int, int, bool]:
            with stack.pool._lock, stack.lock:  # held by a thread at the fork
                with Stack(max_size=stack.max_size) as own:
                    own.put(1)
                    # What a runtime does after a fork.
                    stack.here = lambda: own  # type: ignore[method-assign]
                    cast(handle)
                    cast(handle)
                    leases = own.stats.leases
                    handle.release()
                    return (
                        leases,
                        len(own.transports.sent),
                        parents.closed,
                        handle.abandon(),
                    )

        assert in_child(child) == (1, 2, 0, False)
        cast(handle)
        assert len(parents.sent) == 2


def test_a_child_that_only_releases_touches_nothing(stack: Stack) -> None:
    with stack.handle() as handle:
        cast(handle)

        _, borrower = handle._borrow()

        def child() -> tuple[bool, int]:
            with stack.pool._lock, stack.lock, borrower._lock:
                abandoned = handle.abandon()
                handle.release()
            return abandoned, stack.stats.leases

        assert in_child(child) == (False, 1)


def test_threads_of_a_child_move_there_once(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a fork, for all that a handle can tell."""
    with Stack() as own, stack.handle() as handle:
        own.put(1)
        cast(handle)
        stack.pid = os.getpid() + 1
        gate = Gate()

        def here() -> Stack:
            gate.wait()
            return own

        monkeypatch.setattr(stack, "here", here)
        with Threads() as threads:
            for _ in range(4):
                threads.start(cast, handle)
            gate.await_arrival(4)
            gate.open()
        assert own.stats.leases == 1
        stack.pid = os.getpid()
        # What the handle had borrowed before is the parent's.
        assert stack.stats.leases == 1
        handle.release()
        assert own.stats.leases == 0
        for entry in stack.pool._everything():
            entry.leases = 0
        stack.pool.keep_only({})
        if not stack.cached:
            for entry in stack.pool._everything():
                assert stack.pool._finish(entry)
                stack.pool._dispose(entry)


def test_who_finds_a_childs_process_finds_nothing_borrowed_before(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []

    class Watched(Handle):
        """Looked at by another thread as soon as it has moved."""

        @property
        def _process(self) -> Any:
            return self.__dict__.get("process")

        @_process.setter
        def _process(self, value: Any) -> None:
            self.__dict__["process"] = value
            if value is own:
                found.append((self._borrower, own.lock.locked()))

    with Stack() as own:
        own.put(1)
        handle = Watched(stack, cell(1))
        _, before = handle._borrow()
        monkeypatch.setattr(stack, "pid", os.getpid() + 1)
        monkeypatch.setattr(stack, "here", lambda: own)
        _, after = handle._borrow()
        assert after is not before
        assert found == [(None, True)]
        handle.release()


class _ReleasedAsItMoves(Handle):
    """Released by another thread once a child has found that it is not."""

    own: Stack
    on_move: Callable[[], object]

    @property
    def _process(self) -> Any:
        found = self.__dict__.get("process")
        if self.own.lock.locked() and not self._is_released:
            self.release()
        return found

    @_process.setter
    def _process(self, value: Any) -> None:
        self.__dict__["process"] = value
        if value is self.own:
            self.on_move()  # by another thread, just then


@pytest.fixture
def moving(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> Iterator[_ReleasedAsItMoves]:
    """Made before a fork, for all that a handle can tell."""
    with Stack() as own:
        own.put(1)
        monkeypatch.setattr(_ReleasedAsItMoves, "own", own, raising=False)
        monkeypatch.setattr(stack, "here", lambda: own)
        made = _ReleasedAsItMoves(stack, cell(1))
        made.on_move = bool
        monkeypatch.setattr(stack, "pid", os.getpid() + 1)
        yield made
        assert own.stats.leases == 0


def test_released_just_as_a_child_moves_it(moving: _ReleasedAsItMoves) -> None:
    for _ in range(2):
        with pytest.raises(exceptions.TransportReleased):
            cast(moving)
        assert moving._process is None


def test_sent_by_another_thread_before_a_child_sees_the_release(
    moving: _ReleasedAsItMoves,
) -> None:
    def send_too() -> None:
        sent.append(1)
        moving.own.lock.release()
        with pytest.raises(exceptions.TransportReleased):
            cast(moving)
        moving.own.lock.acquire()

    sent: list[int] = []
    moving.on_move = send_too
    with pytest.raises(exceptions.TransportReleased):
        cast(moving)
    assert sent == [1]


# With oslo.messaging's clients.


def test_a_client_takes_it_and_opens_nothing(
    stack: Stack, handle: Handle, recwarn: pytest.WarningsRecorder
) -> None:
    oslo.prepare(stack.conf)
    client = oslo_messaging.get_rpc_client(
        handle, oslo_messaging.Target(topic="compute", version="6.0")
    )
    prepared = client.prepare(server="host", timeout=3)
    assert client.can_send_version("6.0")
    assert stack.transports.attempts == 0
    assert not recwarn.list
    stack.transports.on_send = lambda one, sent: sent.message["method"]
    assert prepared.call({}, "reboot") == "reboot"
    prepared.cast({}, "reboot")
    client.prepare(fanout=False).cast({}, "reboot")
    assert len(stack.transports.sent) == 3
    assert stack.transports.sent[0].target.server == "host"


def test_it_tells_which_runtime_made_it(handle: Handle) -> None:
    assert runtime_id_of(handle) == Stack.runtime_id
    assert runtime_id_of(None) is None
    assert runtime_id_of(object()) is None
