# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The same work in many cells: what comes back, and when."""

from __future__ import annotations

import contextvars
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from oslo_config import cfg
from oslo_context import context as oslo_context

import cellmw
from cellmw import (
    CellMapping,
    CellTimeout,
    RequestContext,
    exceptions,
    options,
    runtime,
    scatter,
    scatter_gather,
)
from cellmw.cells import engines, store
from cellmw.context import HasUUID
from cellmw.transports import oslo
from tests.fakes import PATIENCE, Gate, Threads, cell_uuid, in_child

MOST = scatter.MOST_THREADS
SOON = 0.2
UUIDS = [cell_uuid(number) for number in range(200)]


@pytest.fixture(autouse=True)
def _cells(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A runtime that knows 200 cells."""
    rows = [
        CellMapping(uuid=uuid, id=number, name=f"cell-{number}")
        for number, uuid in enumerate(UUIDS)
    ]
    monkeypatch.setattr(store.Store, "cells", lambda self: rows)
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    engines.register_options(conf)
    made = runtime.registry().get(
        "test", lambda: runtime.Runtime(options.load(conf, {}), conf)
    )
    yield
    assert made.close() == 0


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Holds calls; open at the end, whatever the test came to."""
    gate = Gate()
    yield gate
    gate.open()


def where(context: Any) -> str:
    found: str = context.cell_uuid
    return found


@pytest.mark.parametrize("count", [0, 1, 20, 200])
def test_each_cell_gives_what_its_own_call_returns(count: int) -> None:
    context = RequestContext(user_id="u")
    seen: list[Any] = []

    def work(own: Any, one: int, two: int) -> tuple[str, int]:
        seen.append(own)
        assert own.user_id == "u"
        return own.cell_uuid, one + two

    found = scatter_gather(context, UUIDS[:count], work, 1, 2)
    assert list(found) == UUIDS[:count]
    assert found == {uuid: (uuid, 3) for uuid in UUIDS[:count]}
    assert len(set(map(id, seen))) == count
    assert context.mq_connection is None
    # Each lease has ended.
    assert all(own.mq_connection._process is None for own in seen)


def test_the_calls_are_under_way_at_once() -> None:
    barrier = threading.Barrier(MOST)
    found = scatter_gather(
        RequestContext(), UUIDS[:MOST], lambda _: barrier.wait(PATIENCE)
    )
    assert sorted(map(str, found.values())) == sorted(map(str, range(MOST)))


def test_the_keys_are_what_the_caller_passed() -> None:
    known = cellmw.cells(RequestContext())[2]
    mapping = CellMapping(uuid=UUIDS[1])
    cells: list[HasUUID | str] = [UUIDS[0], mapping, known, "cell-3"]
    found = scatter_gather(RequestContext(), cells, where)
    assert found == {
        UUIDS[0]: UUIDS[0],
        mapping: UUIDS[1],
        known: UUIDS[2],
        "cell-3": UUIDS[3],
    }


@pytest.mark.parametrize("count", [1, 20, 200])
def test_a_cell_that_fails_is_its_exception(count: int) -> None:
    def work(own: Any) -> str:
        if own.cell_uuid == UUIDS[0]:
            raise KeyError("odd")
        return where(own)

    found = scatter_gather(RequestContext(), UUIDS[:count], work)
    error = found.pop(UUIDS[0])
    assert isinstance(error, KeyError)
    assert found == {uuid: uuid for uuid in UUIDS[1:count]}


def test_a_cell_that_is_not_there_is_an_exception() -> None:
    found = scatter_gather(RequestContext(), ["nowhere", UUIDS[0]], where)
    assert isinstance(found["nowhere"], exceptions.CellNotFound)
    assert found[UUIDS[0]] == UUIDS[0]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_ends_a_thread_elsewhere_is_an_exception(
    kind: type[BaseException],
) -> None:
    def work(own: Any) -> str:
        if own.cell_uuid == UUIDS[0]:
            raise kind
        return where(own)

    found = scatter_gather(RequestContext(), UUIDS[:2], work)
    assert isinstance(found[UUIDS[0]], kind)
    assert found[UUIDS[1]] == UUIDS[1]


def test_an_exception_holds_no_variable() -> None:
    def driver(password: str) -> None:
        try:
            raise OSError("no route")
        except OSError as error:
            raise ValueError("cannot connect") from error

    def work(own: Any) -> None:
        driver("hunter2")

    error = scatter_gather(RequestContext(), UUIDS[:1], work)[UUIDS[0]]
    assert isinstance(error, ValueError)
    for one in (error, error.__cause__):
        assert one is not None
        shown = "".join(
            traceback.TracebackException.from_exception(
                one, capture_locals=True
            ).format()
        )
        # Where it happened is still there.
        assert "in driver" in shown
        assert "hunter2" not in shown.replace('driver("hunter2")', "")
        for frame, _ in traceback.walk_tb(one.__traceback__):
            assert not frame.f_locals


@pytest.mark.parametrize("count", [1, 20, 200])
def test_one_that_hangs_is_a_timeout_and_the_others_answer(
    count: int, gate: Gate
) -> None:
    late: list[Any] = []

    def work(own: Any) -> str:
        if own.cell_uuid == UUIDS[0]:
            gate.wait()
            late.append(own)
        return where(own)

    # On a busy machine many others take a while.
    timeout = 2 + count // 40
    found = scatter_gather(
        RequestContext(), UUIDS[:count], work, timeout=timeout
    )
    error = found[UUIDS[0]]
    assert isinstance(error, CellTimeout)
    assert str(error) == (
        f"cell {UUIDS[0]} has not answered within {timeout} seconds"
    )
    assert error.cell == UUIDS[0]
    assert {uuid: uuid for uuid in UUIDS[1:count]} == {
        uuid: found[uuid] for uuid in UUIDS[1:count]
    }
    # What comes late changes nothing, and ends its lease.
    gate.open()
    _await_end_of_threads()
    assert found[UUIDS[0]] is error
    assert late[0].mq_connection._process is None


def test_all_gathers_share_the_threads(gate: Gate) -> None:
    started: list[str] = []
    results: dict[Any, Any] = {}

    def work(own: Any) -> None:
        started.append(own.cell_uuid)
        gate.wait()

    with Threads() as threads:
        for part in (UUIDS[:100], UUIDS[100:]):
            threads.start(
                lambda part: results.update(
                    scatter_gather(RequestContext(), part, work, timeout=8)
                ),
                part,
            )
        gate.await_arrival(MOST)
        # No thread is free: neither for another gather ...
        found = scatter_gather(
            RequestContext(), ["cell-7"], where, timeout=0.1
        )
        assert str(found["cell-7"]) == (
            f"cell cell-7 found none of {MOST} threads free within 0.1 seconds"
        )
    # ... nor for the rest of these.
    assert len(results) == 200
    assert all(isinstance(one, CellTimeout) for one in results.values())
    none_free = [one for one in results.values() if "free" in str(one)]
    assert len(none_free) == 200 - MOST
    assert len(started) == MOST
    gate.open()
    _await_end_of_threads()
    # A call that was given up is never begun.
    assert len(started) == MOST
    assert scatter_gather(RequestContext(), UUIDS, where) == {
        uuid: uuid for uuid in UUIDS
    }


def test_a_slow_one_makes_nobody_wait_for_a_thread(gate: Gate) -> None:
    def work(own: Any) -> str:
        if own.cell_uuid in UUIDS[: MOST - 1]:
            gate.wait()
        elif own.cell_uuid == UUIDS[-1]:
            gate.open()
        return where(own)

    found = scatter_gather(RequestContext(), UUIDS, work, timeout=PATIENCE)
    assert found == {uuid: uuid for uuid in UUIDS}


def test_a_gather_in_a_call_ends() -> None:
    barrier = threading.Barrier(MOST)

    def outer(own: Any) -> Any:
        barrier.wait(PATIENCE)
        # All threads are taken by calls that wait for one.
        inner = scatter_gather(own, ["cell-1"], where, timeout=SOON)
        barrier.wait(PATIENCE)
        return inner["cell-1"]

    found = scatter_gather(RequestContext(), UUIDS[:MOST], outer)
    assert all(isinstance(one, CellTimeout) for one in found.values())
    few = scatter_gather(
        RequestContext(),
        UUIDS[:5],
        lambda own: scatter_gather(own, UUIDS[5:9], where),
    )
    assert few == {
        uuid: {inner: inner for inner in UUIDS[5:9]} for uuid in UUIDS[:5]
    }


def test_a_call_has_the_callers_variables_and_its_own_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("v")
    variable.set("outside")
    before = RequestContext(request_id="req-1")

    def work(own: Any) -> tuple[str, bool]:
        found = variable.get()
        variable.set(own.cell_uuid)
        return found, oslo_context.get_current() is own

    found = scatter_gather(before, UUIDS[:9], work)
    assert set(found.values()) == {("outside", True)}
    assert variable.get() == "outside"
    assert oslo_context.get_current() is before


def test_the_context_is_taken_as_it_is_at_the_call(gate: Gate) -> None:
    context = RequestContext(user_id="before")

    def work(own: Any) -> str:
        gate.wait()
        return str(own.user_id)

    found: dict[Any, Any] = {}
    with Threads() as threads:
        threads.start(
            lambda: found.update(scatter_gather(context, UUIDS, work))
        )
        gate.await_arrival(MOST)
        context.user_id = "after"
        gate.open()
    assert set(found.values()) == {"before"}


def test_an_interrupt_ends_the_gather(gate: Gate) -> None:
    started: list[str] = []

    def work(own: Any) -> None:
        started.append(own.cell_uuid)
        if len(started) == MOST:
            signal.pthread_kill(
                threading.main_thread().ident or 0, signal.SIGINT
            )
        gate.wait()

    with pytest.raises(KeyboardInterrupt):
        scatter_gather(RequestContext(), UUIDS, work, timeout=PATIENCE)
    gate.open()
    _await_end_of_threads()
    assert len(started) == MOST


def test_where_no_thread_can_be_started_the_cell_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        # Known before, or reading the cells would need one as well.
        found = scatter_gather(RequestContext(), UUIDS[:3], where)
    assert {str(one) for one in found.values()} == {"can't start new thread"}
    assert scatter_gather(RequestContext(), UUIDS[:3], where) == {
        uuid: uuid for uuid in UUIDS[:3]
    }


@pytest.mark.parametrize("timeout", [0, -1])
def test_without_time_nothing_is_waited_for(timeout: float) -> None:
    begun = time.monotonic()
    found = scatter_gather(RequestContext(), UUIDS, where, timeout=timeout)
    assert time.monotonic() - begun < PATIENCE
    assert list(found) == UUIDS
    _await_end_of_threads()


def test_a_timeout_without_end_is_none() -> None:
    found = scatter_gather(
        RequestContext(), UUIDS[:1], where, timeout=float("inf")
    )
    assert found == {UUIDS[0]: UUIDS[0]}


def test_a_child_that_is_forked_has_its_own_threads(gate: Gate) -> None:
    with Threads() as threads:
        threads.start(
            lambda: scatter_gather(
                RequestContext(), UUIDS, lambda _: gate.wait(), timeout=10
            )
        )
        gate.await_arrival(MOST)

        inherited = dict(scatter._threads)

        def child() -> bool:
            # As where a server forks without telling Python.
            scatter._threads.update(inherited)
            found = scatter_gather(RequestContext(), UUIDS, where)
            return found == {uuid: uuid for uuid in UUIDS}

        assert in_child(child)
        gate.open()


def test_a_call_may_fork() -> None:
    def work(own: Any) -> str:
        return in_child(lambda: where(own))

    assert scatter_gather(RequestContext(), UUIDS[:3], work) == {
        uuid: uuid for uuid in UUIDS[:3]
    }


def test_a_child_that_leaves_its_call_ends(gate: Gate) -> None:
    ended = threading.Event()

    def work(own: Any) -> int:
        gate.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            return -1
        status = os.waitpid(pid, 0)[1]
        ended.set()
        return status

    found: dict[Any, Any] = {}
    with Threads() as threads:
        threads.start(
            lambda: found.update(
                scatter_gather(RequestContext(), UUIDS[:1], work)
            )
        )
        gate.await_arrival()
        # While it forks, another thread has the lock.
        with scatter._threads_here()._lock:
            gate.open()
            assert ended.wait(PATIENCE)
    assert found == {UUIDS[0]: 0}


def test_a_cell_that_cannot_be_a_key_is_the_callers_mistake() -> None:
    class Unhashable:
        uuid = UUIDS[0]
        __hash__ = None  # type: ignore[assignment]  # on purpose

    with pytest.raises(TypeError):
        scatter_gather(RequestContext(), [Unhashable()], where)


def _await_end_of_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "cellmw-gather":
            thread.join(PATIENCE)
