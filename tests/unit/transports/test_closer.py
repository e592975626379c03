# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Closing off the request's thread; no I/O."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Self

import pytest

from cellmw.transports.closer import Closer
from cellmw.workers import Job, Workers
from tests.directories import Clock
from tests.fakes import PATIENCE, Gate, Records, cell_uuid

CELL = cell_uuid(1)


class Transport:
    """Something to close."""

    def __init__(
        self, error: BaseException | None = None, gate: Gate | None = None
    ) -> None:
        self.error = error
        self.gate = gate
        self.closed = 0
        self.thread: threading.Thread | None = None

    def cleanup(self) -> None:
        self.closed += 1
        self.thread = threading.current_thread()
        if self.gate is not None:
            self.gate.wait()
        if self.error is not None:
            raise self.error


class NoThreads(Workers):
    """Can start no thread for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 0

    def start(self, job: Job) -> None:
        if self.left:
            super().start(job)
        else:
            job.error = RuntimeError("can't start new thread")
            job.finish()


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def closer(workers: Workers, clock: Clock) -> Iterator[Closer]:
    closer = Closer(workers, budget=10, clock=clock)
    yield closer
    assert closer.wait(PATIENCE) == 0


@pytest.fixture
def records() -> Iterator[Records]:
    with Records() as records:
        yield records


def test_a_transport_is_closed_once_in_a_thread_of_its_own(
    closer: Closer,
) -> None:
    transport = Transport()
    done: list[threading.Thread] = []
    closer.close(
        transport, CELL, done=lambda: done.append(threading.current_thread())
    )
    assert closer.wait(PATIENCE) == 0
    assert transport.closed == 1
    assert done == [transport.thread]
    assert done != [threading.current_thread()]
    assert (closer.closed, closer.failed, closer.hung) == (1, 0, 0)


def test_many_are_closed_at_once(closer: Closer) -> None:
    gate = Gate()
    transports = [Transport(gate=gate) for _ in range(20)]
    for transport in transports:
        closer.close(transport, CELL)
    gate.await_arrival(20)
    gate.open()
    assert closer.wait(PATIENCE) == 0
    assert [transport.closed for transport in transports] == [1] * 20


@pytest.mark.parametrize("kind", [OSError, AttributeError, SystemExit])
def test_one_that_raises_is_told_once(
    closer: Closer, records: Records, kind: type[BaseException]
) -> None:
    done: list[int] = []
    transport = Transport(error=kind("it is rabbit://u:hidden@h/ that failed"))
    closer.close(transport, CELL, done=lambda: done.append(1))
    assert closer.wait(PATIENCE) == 0
    closer.watch()
    closer.watch()
    assert done == [1]
    assert (closer.closed, closer.failed) == (1, 1)
    assert len(records.lines) == 1
    assert (
        f"WARNING Closing a transport of cell {CELL} failed"
        in (records.lines[0])
    )
    assert kind.__name__ in records.lines[0]
    assert "hidden" not in records.lines[0]


def test_one_that_hangs_is_told_once_and_when_it_ends(
    closer: Closer, clock: Clock, records: Records
) -> None:
    gate = Gate()
    hung: list[int] = []
    closer.close(Transport(gate=gate), CELL, hung=lambda: hung.append(1))
    gate.await_arrival()
    clock.now += 9
    closer.watch()
    assert not records.lines
    clock.now += 1
    closer.watch()
    closer.watch()
    assert (closer.hung, closer.hanging, closer.closed) == (1, 1, 0)
    assert hung == [1]
    assert len(records.matching("takes more than 10 seconds")) == 1
    gate.open()
    assert closer.wait(PATIENCE) == 0
    assert closer.hanging == 0
    closer.watch()
    closer.watch()
    assert len(records.matching("has ended after all")) == 1
    assert (closer.hung, closer.closed) == (1, 1)
    assert len(records.lines) == 2


def test_one_that_hangs_holds_up_no_other(closer: Closer) -> None:
    gate = Gate()
    closer.close(Transport(gate=gate), CELL)
    gate.await_arrival()
    other = Transport()
    closed = threading.Event()
    closer.close(other, CELL, done=closed.set)
    assert closed.wait(PATIENCE)
    assert closer.wait(0) == 1
    gate.open()


def test_the_wait_for_several_is_one_in_all(
    closer: Closer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    for _ in range(5):
        closer.close(Transport(gate=gate), CELL)
    gate.await_arrival(5)
    now = Clock(0.0)
    waits: list[float] = []

    def wait(job: Job, timeout: float | None = None) -> bool:
        assert timeout is not None
        waits.append(timeout)
        now.now += max(0.0, timeout)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Job, "wait", wait)
        patch.setattr("cellmw.transports.closer.time.monotonic", now)
        assert closer.wait(3.0) == 5
    assert sum(waits) == 3.0
    gate.open()


def test_what_has_ended_is_forgotten(closer: Closer) -> None:
    transport = Transport()
    found = weakref.ref(transport)
    closer.close(transport, CELL)
    del transport
    assert closer.wait(PATIENCE) == 0
    gc.collect()
    assert found() is None
    closer.watch()
    assert not closer._under_way


def test_what_no_thread_can_be_started_for_is_closed_later(
    records: Records,
) -> None:
    workers = NoThreads()
    closer = Closer(workers)
    transport = Transport()
    closer.close(transport, CELL)
    assert len(records.matching("Could not start a thread")) == 1
    closer.watch()
    assert closer.wait(0) == 1
    assert transport.closed == 0
    workers.left = 1
    closer.watch()
    assert closer.wait(PATIENCE) == 0
    assert transport.closed == 1
    assert closer.closed == 1
    workers.close()


def test_what_no_thread_can_be_started_for_is_closed_by_who_offers_itself(
    records: Records,
) -> None:
    closer = Closer(NoThreads())
    transports = [Transport(), Transport(error=OSError("x")), Transport()]
    for transport in transports:
        closer.close(transport, CELL)
    assert closer.wait(0) == 3
    closer.close_here()
    closer.close_here()
    assert [transport.closed for transport in transports] == [1] * 3
    assert closer.wait(0) == 0
    assert transports[0].thread is threading.current_thread()
    assert (closer.closed, closer.failed) == (3, 1)


def _watched(closer: Closer, touched: list[str]) -> Closer:
    """The closer, with what its threads share noted when it is touched."""

    def look(what: str) -> None:
        if not closer._lock.locked():
            touched.append(f"{what} in {sys._getframe(2).f_code.co_qualname}")

    class UnderWay(set[Any]):
        def add(self, closing: Any) -> None:
            look("add")
            super().add(closing)

        def __iter__(self) -> Iterator[Any]:
            look("iter")
            return super().__iter__()

        def __isub__(self, ended: Any) -> Self:  # type: ignore[misc]  # for this alone
            look("remove")
            self.difference_update(ended)
            return self

    class Watched(Closer):
        def __setattr__(self, name: str, value: Any) -> None:
            if name in ("closed", "failed", "hung"):
                look(name)
            super().__setattr__(name, value)

    closer._under_way = UnderWay()
    closer.__class__ = Watched
    return closer


def test_what_threads_share_is_touched_under_the_lock_only(
    closer: Closer, clock: Clock, records: Records
) -> None:
    touched: list[str] = []
    _watched(closer, touched)
    gate = Gate()
    closer.close(Transport(error=OSError("x")), CELL)
    closer.close(Transport(gate=gate), CELL)
    gate.await_arrival()
    clock.now += 10
    closer.watch()
    assert closer.hanging == 1
    gate.open()
    assert closer.wait(PATIENCE) == 0
    closer.watch()
    assert (closer.closed, closer.failed, closer.hung) == (2, 1, 1)
    assert touched == []


def test_what_is_being_closed_is_waited_for_from_the_beginning() -> None:
    under_way: list[int] = []

    class Looking(Workers):
        def start(self, job: Job) -> None:
            under_way.append(len(made._under_way))
            super().start(job)

    workers = Looking()
    made = Closer(workers)
    made.close(Transport(), CELL)
    assert under_way == [1]
    assert made.wait(PATIENCE) == 0
    workers.close()
